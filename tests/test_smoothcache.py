"""SmoothCache: schedules from measured errors, and from JSON files."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch

from tcc import plans
from tcc.calibrate import Calibration, calibrate
from tcc.errors import PlanError
from tcc.plan import CachePlan, Compute, Reuse
from tcc.samplers import sample
from tests.tiny_models import case, dit, noise

OUT = [f"blocks.{b}.{branch}.out" for b in (0, 1) for branch in ("attn", "mlp")]


def rows(plan: CachePlan) -> dict[str, str]:
    """The plan as the paper writes schedules: 1 compute, 0 reuse."""
    marks = {Compute(): "1", Reuse(): "0"}
    return {site: "".join(marks[action] for _, action in plan.column(site)) for site in plan.sites}


def errors(attn: list[list[float]], mlp: list[list[float]]) -> Calibration:
    """Relative errors per distance and step: blocks 0 and 1 lie 0.01 below and above the given ones."""
    change = torch.tensor([[[a - 0.01, m - 0.01, a + 0.01, m + 0.01] for a, m in zip(*r, strict=True)]
                           for r in zip(attn, mlp, strict=True)], dtype=torch.float64)  # fmt: skip
    ones = torch.ones(change.shape[1:], dtype=torch.float64)
    return Calibration(tuple(OUT), ones, ones, change, change)


def test_a_value_is_reused_as_long_as_its_error_allows() -> None:
    """Errors of 1, 2 and 3 steps; the last step is computed, and no reuse reaches behind it."""
    low, high = [0.0, 0.1, 0.1, 0.1, 0.1, 0.1, 0.1, 0.1], [0.0, 0.5, 0.5, 0.5, 0.5, 0.5, 0.5, 0.5]
    info = case("dit").info
    for attn, mlp, expected in (
        ([low, low, low], [high, high, high], ("10001001", "11111111")),
        ([low, low, high], [low, high, high], ("10010011", "10101011")),
        ([high, low, high], [low, low, [0.5] * 3 + [0.1] + [0.5] * 4], ("10010011", "10001001")),
    ):
        found = rows(plans.smoothcache(info, num_steps=8, errors=errors(attn, mlp), alpha=0.2))
        assert found == dict(zip(OUT, expected * 2, strict=True))


def test_blocks_are_averaged() -> None:
    """One is 0.01 above the threshold and one below: both reuse at the mean, neither just below it."""
    found, info = errors([[0.25] * 3] * 2, [[0.25] * 3] * 2), case("dit").info
    assert set(rows(plans.smoothcache(info, num_steps=3, errors=found, alpha=0.2501, lookahead=2)).values()) == {"101"}
    assert set(rows(plans.smoothcache(info, num_steps=3, errors=found, alpha=0.2499, lookahead=2)).values()) == {"111"}


def test_the_lookahead_bounds_the_reuse() -> None:
    """Without errors: lookahead + 1 steps per computed one, which is FORA but for the last step."""
    info, none = case("dit").info, errors([[0.0] * 9] * 4, [[0.0] * 9] * 4)
    for lookahead, row in ((1, "101010101"), (2, "100100101"), (4, "100001001")):
        plan = plans.smoothcache(info, num_steps=9, errors=none, lookahead=lookahead, alpha=0.01)
        assert set(rows(plan).values()) == {row}


def test_the_macs_of_a_schedule() -> None:
    """A step costs what it computes."""
    info = case("dit").info
    low, high = [0.0] * 4, [1.0] * 4
    plan = plans.smoothcache(info, num_steps=4, errors=errors([low], [high]), lookahead=1)
    attention = sum(info.sites[site].macs // info.batch for site in OUT if "attn" in site)
    assert plan.cost is not None
    assert plan.cost.step_macs == tuple(info.macs - (attention if step == 1 else 0) for step in range(4))


def test_a_larger_threshold_reuses_more(tmp_path: Path) -> None:
    """From a calibration of a real run, and from its file."""
    info = dit(batch=2).info

    def run(model: Any) -> object:
        return sample(model, noise(2, 4, 8, 8), torch.tensor([1, 2]), num_steps=8)

    measured = calibrate(info, run, num_steps=8)
    measured.save(tmp_path / "errors.safetensors")
    counts = []
    for alpha in (0.0, 0.05, 0.2, 10.0):
        plan = plans.smoothcache(info, num_steps=8, errors=tmp_path / "errors.safetensors", alpha=alpha)
        assert plan.actions == plans.smoothcache(info, num_steps=8, errors=measured, alpha=alpha).actions
        counts.append(sum(row.count("0") for row in rows(plan).values()))
    assert counts == sorted(counts)
    assert (counts[0], counts[-1]) == (0, 4 * 5)


# --- schedules from files


def write(tmp_path: Path, content: Any) -> Path:
    """A JSON file."""
    path = tmp_path / "schedule.json"
    path.write_text(content if isinstance(content, str) else json.dumps(content))
    return path


def imported(tmp_path: Path, content: Any, which: str = "dit", num_steps: int = 4) -> dict[str, str]:
    """The plan of a schedule."""
    return rows(plans.smoothcache(case(which).info, num_steps=num_steps, schedule=write(tmp_path, content)))


def test_a_schedule_per_kind_of_branch(tmp_path: Path) -> None:
    """The format of the published thresholds."""
    found = imported(tmp_path, {"attn": [1, 0, 0, 1], "mlp": [1, 1, 0, 1]})
    assert found == dict(zip(OUT, ["1001", "1101"] * 2, strict=True))


def test_a_schedule_per_branch(tmp_path: Path) -> None:
    """The format of the published L2C schedule; what is not named is computed at every step."""
    found = imported(tmp_path, {"attn-1": [1, 0, 1, 0], "mlp-0": [1, 1, 0, 0]})
    assert found == {"blocks.0.mlp.out": "1100", "blocks.1.attn.out": "1010"}


def test_a_schedule_of_diffusers_components(tmp_path: Path) -> None:
    """`attn1` is self-attention, `attn2` cross-attention, `ff` the MLP."""
    found = imported(tmp_path, {"attn1": [1, 0], "attn2": [1, 1], "ff": [1, 0]}, "hf_pixart", 2)
    expected = {"attn": "10", "cross": "11", "mlp": "10"}
    assert found == {f"transformer_blocks.{b}.{kind}.out": row for b in (0, 1) for kind, row in expected.items()}


def test_a_schedule_of_every_second_step_is_fora(tmp_path: Path) -> None:
    """Action for action."""
    info = case("dit").info
    plan = plans.smoothcache(
        info, num_steps=4, schedule=write(tmp_path, {"attn": [1, 0, 1, 0], "mlp": [1, 0, 1, 0]}), sites="delta"
    )
    assert plan.actions == plans.fora(info, num_steps=4, interval=2, count="up", sites="delta").actions
    assert plan.policy == {"name": "smoothcache", "sites": "delta", "schedule": "schedule.json"}


BAD_SCHEDULES: dict[str, tuple[Any, str]] = {
    "no JSON": ("attn: 1", "is not a schedule that can be read"),
    "a list": ([1, 0, 1, 0], "expected a JSON object such as"),
    "empty": ({}, "expected a JSON object such as"),
    "no list": ({"attn": "1010"}, "'attn': expected a list of 0 (reuse) and 1 (compute)"),
    "other numbers": ({"attn": [1, 0, 2, 0]}, "'attn': expected a list of 0 (reuse) and 1 (compute)"),
    "lists in lists": ({"attn": [1, [0], 1, 0]}, "'attn': expected a list of 0 (reuse) and 1 (compute)"),
    "other steps": ({"attn": [1, 0, 1]}, "'attn' has 3 steps, and num_steps=4"),
    "first step": ({"attn": [0, 1, 1, 1]}, "'attn': the first step reuses, and nothing is stored before it"),
    "other branch": ({"cross": [1, 0, 1, 0]}, "'cross': the model has no such branch. It has attn, mlp in blocks 0..1"),
    "other block": (
        {"attn-2": [1, 0, 1, 0]},
        "'attn-2': the model has no such branch. It has attn, mlp in blocks 0..1",
    ),
    "no block": ({"attn-one": [1, 0, 1, 0]}, "'attn-one': the model has no such branch"),
    "twice": (
        {"attn": [1, 0, 1, 0], "attn-0": [1, 1, 1, 1]},
        "'attn-0': another row of the file speaks of 'blocks.0.attn.out' too",
    ),
}


@pytest.mark.parametrize("kind", BAD_SCHEDULES)
def test_a_file_that_is_no_schedule_is_refused(kind: str, tmp_path: Path) -> None:
    """Naming the row and what is wrong with it."""
    content, message = BAD_SCHEDULES[kind]
    with pytest.raises(PlanError, match=re.escape(message)):
        imported(tmp_path, content)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({}, "smoothcache takes errors= (a calibration) or schedule= (a JSON file): give one of them"),
        ({"errors": "a", "schedule": "b"}, "smoothcache takes errors= (a calibration) or schedule="),
        ({"schedule": "nowhere.json"}, "nowhere.json is not a schedule that can be read"),
        ({"errors": "nowhere.safetensors"}, "there is no file nowhere.safetensors"),
        ({"errors": None, "schedule": None, "sites": "kv"}, "sites='kv': use 'out'"),
        ({"alpha": -0.1}, "alpha=-0.1: expected a relative error, 0 or more"),
        ({"alpha": float("nan")}, "alpha=nan: expected a relative error, 0 or more"),
        ({"lookahead": 0}, "lookahead=0: expected a whole number, 1 or more"),
        ({"lookahead": 2}, "looks 1 steps back, and 2 are needed: measure with back=2"),
        ({"num_steps": 5}, "measured 4 steps, and num_steps=5"),
    ],
    ids=str,
)
def test_options_that_do_not_fit_are_refused(options: dict[str, Any], message: str) -> None:
    """Each with what it may be."""
    given: dict[str, Any] = {"num_steps": 4, "lookahead": 1} | options
    if options and not {"errors", "schedule"} & set(options):
        given["errors"] = errors([[0.0] * 4], [[0.0] * 4])
    with pytest.raises(PlanError, match=re.escape(message)):
        plans.smoothcache(case("dit").info, **given)


def test_a_calibration_must_have_the_sites() -> None:
    """Errors of outputs say nothing about deltas."""
    with pytest.raises(PlanError, match=r"did not measure site 'blocks.0.attn.delta'"):
        plans.smoothcache(
            case("dit").info, num_steps=4, errors=errors([[0.0] * 4], [[0.0] * 4]), sites="delta", lookahead=1
        )
