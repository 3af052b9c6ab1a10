"""The router files published with Learning-to-Cache, read without executing anything in them."""

from __future__ import annotations

import argparse
import os
import re
from pathlib import Path
from typing import Any

import torch

from tcc.errors import PlanError
from tcc.info import ModelInfo
from tcc.learned import Router
from tcc.plans.branches import branch_sites, i_steps_of_pairs
from tcc.plans.checks import check_whole

__all__ = ["read_published_router"]

#: What stands beside the routers in a training checkpoint: optimiser state and command line. Neither is used.
_ALLOWED = {"routers", "opt", "args"}
#: What logits may be stored as; narrower numbers lack the operators that checks need.
_DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


def read_published_router(
    path: str | os.PathLike[str], info: ModelInfo, *, num_steps: int, shifted: bool = False
) -> Router:
    """Read a router file in one of the formats of Learning-to-Cache's authors (Ma et al. 2024).

    Both hold a vector of logits `<i>.prob` per step, its entries in the order attn of block 0, mlp of block 0, attn of
    block 1, and so on; a training checkpoint (DiT) has them under `routers`, a plain one (U-ViT) at the top. Score =
    sigmoid(logit). Unshifted, router i belongs to the step that is i steps before the end; shifted, to the first
    evaluation of solver step i, counted from the start. Routers of I-steps were never trained and are not used.

    Args:
        path: the file.
        info: the model, whose `out` sites are the units in order.
        num_steps: the steps that the router was trained for; evaluations, for a solver that takes two per step.
        shifted: it was trained on DPM-Solver-2's schedule, see `i_steps_of_pairs`.

    Raises:
        PlanError: the file is not of these formats, holds other objects, has more or fewer routers than steps or units
            than the model, or a logit is not finite.
    """
    check_whole("num_steps", num_steps, 1)
    logits = _logits(_read(path), path, num_steps)
    sites = branch_sites(info, "out")
    for i, row in enumerate(logits):
        _check_row(row, f"{path}, router {i}", sites, info)
    i_steps = i_steps_of_pairs(num_steps, shifted)
    scores = torch.full((num_steps, len(sites)), torch.nan)
    for step in set(range(num_steps)) - set(i_steps):
        scores[step] = logits[step // 2 if shifted else num_steps - 1 - step].float().sigmoid()
    return Router(scores, tuple(sites))


def _read(path: str | os.PathLike[str]) -> Any:
    if not Path(path).is_file():
        raise PlanError(f"there is no router file at {path}")
    try:
        # Training checkpoints carry their command line as a Namespace: plain attributes, nothing runs.
        with torch.serialization.safe_globals([argparse.Namespace]):
            return torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # damaged bytes lead the unpickler anywhere
        named = re.search(r"GLOBAL ([\w.]+)", str(error))  # the rest of that message is advice to execute the file
        first = f"{type(error).__name__}: {error}".splitlines()[0].partition(". ")[0]
        reason = f"it names {named[1]}" if named else first
        raise PlanError(
            f"{path} is not a router file that can be read safely: it is damaged, or it holds objects other than "
            f"tensors, which are not executed ({reason})"
        ) from error


def _logits(content: Any, path: str | os.PathLike[str], num_steps: int) -> list[Any]:
    """The vectors by number, of a file whose keys are exactly those of a router of `num_steps` steps."""
    if isinstance(content, dict) and "routers" in content:
        _refuse_extra(set(content) - _ALLOWED, path)
        content = content["routers"]
    if not isinstance(content, dict):
        raise PlanError(f"{path}: expected a router's vectors '0.prob', '1.prob', ..., found {type(content).__name__}")
    expected = [f"{i}.prob" for i in range(num_steps)]
    missing = [key for key in expected if key not in content]
    if missing or (len(content) > num_steps and all(map(_is_key, content))):
        count = sum(map(_is_key, content))
        raise PlanError(
            f"{path} holds {count} routers, and num_steps={num_steps}"
            + (f": '{missing[0]}' is missing" if missing else "")
            + "; a router serves the number of steps that it was trained for"
        )
    _refuse_extra(set(content) - set(expected), path)
    return [content[key] for key in expected]


def _is_key(key: object) -> bool:
    return isinstance(key, str) and key.endswith(".prob") and key[:-5].isdecimal()


def _refuse_extra(extra: set[Any], path: str | os.PathLike[str]) -> None:
    if extra:
        names = ", ".join(sorted(map(repr, extra))[:5])
        raise PlanError(f"{path} holds more than a router: {names}")


def _check_row(row: Any, where: str, sites: list[str], info: ModelInfo) -> None:
    if not isinstance(row, torch.Tensor) or row.dtype not in _DTYPES or not _is_dense(row) or row.dim() != 1:
        raise PlanError(f"{where}: expected a vector of logits, found {_describe(row)}")
    if row.numel() != len(sites):
        raise PlanError(
            f"{where} has {row.numel()} units, and the model has {len(sites)} branches in {len(info.blocks)} blocks: "
            "it was trained for a model of another depth"
        )
    if not bool(row.isfinite().all()):
        unit = int((~row.isfinite()).nonzero()[0])
        raise PlanError(f"{where}: the logit of '{sites[unit]}' is {float(row[unit])}")


def _describe(row: Any) -> str:
    if not isinstance(row, torch.Tensor):
        return type(row).__name__
    if not _is_dense(row):
        return "no values (a meta tensor)" if row.is_meta else f"a {row.layout} tensor".replace("torch.", "")
    return f"{row.dtype} {list(row.shape)}"


def _is_dense(row: torch.Tensor) -> bool:
    """Whether it has all of its values in memory: it is not sparse or nested, and is on a real device."""
    return row.layout is torch.strided and not row.is_meta and not row.is_nested
