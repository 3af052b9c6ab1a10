"""SmoothCache: a calibrated error threshold says how long each kind of branch is reused."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Sequence
from pathlib import Path
from types import NoneType
from typing import Any

from tcc.calibrate import Calibration
from tcc.errors import PlanError
from tcc.info import ModelInfo
from tcc.plan import CachePlan
from tcc.plan.site_name import SiteName
from tcc.plans.branches import Kept, branch_plan, branch_sites
from tcc.plans.checks import check_number, check_whole
from tcc.plans.options import plain_options

__all__ = ["smoothcache"]

#: Component names of diffusers' blocks, which published schedules use, and the branches that they are.
_COMPONENTS = {"attn1": "attn", "attn2": "cross", "ff": "mlp"}


@plain_options
def smoothcache(
    info: ModelInfo,
    *,
    num_steps: int,
    errors: Calibration | str | os.PathLike[str] | None = None,
    alpha: float = 0.18,
    lookahead: int = 3,
    schedule: str | os.PathLike[str] | None = None,
    sites: Kept = "out",
) -> CachePlan:
    """SmoothCache (Liu et al., 2024, arXiv 2411.10510), from a calibration or from a published schedule.

    All branches of one kind (self-attention, cross-attention, MLP) share a schedule. A value computed at step i is
    reused for the largest number k of steps, at most `lookahead`, for which the relative L1 error
    |v_(i+k) - v_i|_1 / |v_(i+k)|_1, averaged over the blocks, is at most `alpha`. It grows with k, and in this sense
    accumulates; errors of single steps are not added up. The last step is computed. So does the published code
    (`calibration_helper.py`, Roblox/SmoothCache), which is followed where the text leaves room.

    A published schedule, as found in that repository's `smoothcache_schedules`, is a JSON object of lists with a 1 for
    every step that computes and a 0 for every step that reuses, noisiest step first. Its keys are kinds of branches
    (`attn`, `mlp`; `attn1`, `attn2`, `ff` as in diffusers) or one branch of one block (`attn-0`, `mlp-27`). Branches
    that it does not name are computed at every step.

    Args:
        info: the model.
        num_steps: denoising steps.
        errors: measured changes of `sites`, or their file; see `tcc.calibrate.calibrate`.
        alpha: the threshold.
        lookahead: how many steps a value is reused at most.
        schedule: a JSON file, in place of `errors`; `alpha` and `lookahead` are then in it already.
        sites: keep branch outputs before the gate (`out`, the paper) or after it (`delta`).

    Raises:
        PlanError: an option is out of range, the calibration does not fit, or the file is not such a schedule.
    """
    check_whole("num_steps", num_steps, 1)
    check_whole("lookahead", lookahead, 1)
    check_number("alpha", alpha, 0, what="a relative error")
    names = branch_sites(info, sites)
    if (errors is None) == (schedule is None):
        raise PlanError("smoothcache takes errors= (a calibration) or schedule= (a JSON file): give one of them")
    if not isinstance(schedule, (str, os.PathLike, NoneType)):
        raise PlanError(f"schedule={schedule!r:.40}: give a JSON file")
    policy: dict[str, Any] = {"name": "smoothcache", "sites": sites}
    if schedule is not None:
        computed = _read_schedule(schedule, info, names, num_steps)
        policy["schedule"] = Path(schedule).name
    else:
        assert errors is not None
        computed = _calibrated(Calibration.of(errors), names, num_steps, alpha, lookahead)
        policy |= {"alpha": alpha, "lookahead": lookahead}
    cached = {(step, name) for name, row in computed.items() for step, compute in enumerate(row) if not compute}
    return branch_plan(info, num_steps, list(computed), cached, policy)


def _calibrated(
    errors: Calibration, names: Sequence[str], num_steps: int, alpha: float, lookahead: int
) -> dict[str, list[bool]]:
    """Which steps compute, per site."""
    back = min(lookahead, num_steps - 1)
    errors.columns(names, num_steps, back)
    computed: dict[str, list[bool]] = {}
    for kind in dict.fromkeys(map(_kind, names)):
        group = [name for name in names if _kind(name) == kind]
        columns = errors.columns(group, num_steps, back)
        rows = [errors.relative_l1(k)[:, columns].mean(dim=1).tolist() for k in range(1, back + 1)]
        computed |= dict.fromkeys(group, _scan(rows, num_steps, alpha))
    return {name: computed[name] for name in names}


def _scan(rows: list[list[float]], num_steps: int, alpha: float) -> list[bool]:
    """Which steps compute: after each, as many steps reuse as the errors (`rows[k - 1][step]`) allow."""
    computed = [False] * num_steps
    step = 0
    while step < num_steps:
        computed[step] = True
        reach = range(min(len(rows), num_steps - 1 - step), 0, -1)
        step += 1 + next((k for k in reach if rows[k - 1][step + k] <= alpha), 0)
    computed[-1] = True
    return computed


def _kind(site: str) -> str:
    """The kind of a branch: `blocks.3.attn.out` -> `attn`; the same on all streams."""
    return SiteName.parse(site).owner.rpartition(".")[2]


def _read_schedule(
    path: str | os.PathLike[str], info: ModelInfo, names: Sequence[str], num_steps: int
) -> dict[str, list[bool]]:
    try:
        content = json.loads(Path(path).read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise PlanError(f"{path} is not a schedule that can be read: {error}") from error
    if not isinstance(content, dict) or not content:
        raise PlanError(f"{path}: expected a JSON object such as {{'attn': [1, 0, ...], 'mlp': [...]}}")
    computed: dict[str, list[bool]] = {}
    for key, row in content.items():
        _check_row(row, f"{path}, '{key}'", num_steps)
        chosen = _named(key, info, names)
        if not chosen:
            known = ", ".join(dict.fromkeys(map(_kind, names)))
            raise PlanError(
                f"{path}, '{key}': the model has no such branch. It has {known} in blocks 0..{len(info.blocks) - 1}, "
                "written as 'attn' for all blocks or 'attn-3' for one"
            )
        for name in chosen:
            if name in computed:
                raise PlanError(f"{path}, '{key}': another row of the file speaks of '{name}' too")
            computed[name] = list(map(bool, row))
    return {name: computed[name] for name in names if name in computed}


def _named(key: str, info: ModelInfo, names: Sequence[str]) -> list[str]:
    """The sites that a key of a schedule speaks of."""
    kind, _, block = key.partition("-")
    kind = _COMPONENTS.get(kind, kind) if not any(_kind(name) == kind for name in names) else kind
    if not re.fullmatch(r"\d+|", block):
        return []
    return [n for n in names if _kind(n) == kind and (not block or info.sites[n].block == int(block))]


def _check_row(row: Any, where: str, num_steps: int) -> None:
    if not isinstance(row, list) or any(entry not in (0, 1) for entry in row):
        raise PlanError(f"{where}: expected a list of 0 (reuse) and 1 (compute)")
    if len(row) != num_steps:
        raise PlanError(f"{where} has {len(row)} steps, and num_steps={num_steps}")
    if not row[0]:
        raise PlanError(f"{where}: the first step reuses, and nothing is stored before it")
