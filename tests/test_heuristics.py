"""Hand-made rules and drops: which units they choose, what they cost, and what they refuse."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterable
from typing import Any

import pytest
import torch

from tcc import Reference, plans
from tcc.calibrate import Calibration
from tcc.errors import PlanError
from tcc.info import ModelInfo
from tcc.learned import Router
from tcc.plan import CachePlan, Compute, Reuse, Skip
from tests.running import CLOSE, call, session
from tests.tiny_models import case, relative_error

BRANCHES = [f"blocks.{b}.{branch}" for b in (0, 1) for branch in ("attn", "mlp")]
OUT = [f"{branch}.out" for branch in BRANCHES]
#: MACs of the branches of the tiny DiT, S = 16 tokens of width D = 32: 4 D^2 S + 2 S^2 D, and 8 D^2 S.
ATTENTION, MLP = 4 * 32 * 32 * 16 + 2 * 16 * 16 * 32, 8 * 32 * 32 * 16


def chosen(plan: CachePlan, action: Any = Reuse()) -> dict[int, list[str]]:  # noqa: B008
    """The sites with that action, by step."""
    found: dict[int, list[str]] = {}
    for (step, site), taken in plan.actions.items():
        if taken == action:
            found.setdefault(step, []).append(site)
        else:
            assert isinstance(taken, Compute)
    return found


def branch_macs(info: ModelInfo, sites: Iterable[str]) -> int:
    """MACs of branches, per image."""
    return sum(info.sites[site].macs // info.batch for site in sites)


def saved(plan: CachePlan) -> list[int]:
    """MACs that every step saves, per image."""
    assert plan.cost is not None
    return [plan.cost.full_macs - macs for macs in plan.cost.step_macs]


def dropped_macs(info: ModelInfo, dropped: dict[int, list[str]]) -> int:
    """MACs that drops save: the branches', and a block's modulation (6 d^2) where both of its branches are dropped."""
    blocks = [[site.rsplit(".", 2)[0] for site in sites] for sites in dropped.values()]
    whole = sum(len(names) - len(set(names)) for names in blocks)
    return sum(branch_macs(info, sites) for sites in dropped.values()) + whole * 6 * 32 * 32


# --- heuristics


@pytest.mark.parametrize("share", [0.0, 0.25, 0.5, 1.0])
def test_bottom_up_and_top_down(share: float) -> None:
    """The first branches, and the last; a P-step is cheaper by what they cost."""
    info, count = case("dit").info, round(4 * share)
    for policy, units in ((plans.bottom_up, OUT[:count]), (plans.top_down, OUT[4 - count :])):
        plan = policy(info, num_steps=6, share=share)
        assert chosen(plan) == ({step: units for step in (1, 3, 5)} if count else {})
        assert plan.macs == 6 * info.macs - 3 * branch_macs(info, units)


def test_random_units_are_as_many_and_the_seeds() -> None:
    """The same count at every P-step; one seed, one plan; other seeds and steps, other units."""
    info = case("dit").info
    first, again, other = (plans.random_units(info, num_steps=40, seed=seed) for seed in (1, 1, 2))
    assert first.actions == again.actions != other.actions
    assert [(step, len(set(units))) for step, units in chosen(first).items()] == [(s, 2) for s in range(1, 40, 2)]
    assert len({tuple(units) for units in chosen(first).values()}) == math.comb(4, 2)


def test_the_random_units_of_a_seed() -> None:
    """A seed's draw stays what it is, so that its results can be had again; and a P-step lacks what it reuses."""
    info = case("dit").info
    plan = plans.random_units(info, num_steps=8)
    other = [OUT[1], OUT[2]]
    assert chosen(plan) == {1: [OUT[0], OUT[3]], 3: other, 5: [OUT[0], OUT[3]], 7: [OUT[0], OUT[3]]}
    assert saved(plan) == [0, ATTENTION + MLP] * 4
    plan = plans.random_units(info, num_steps=7, interval=3, share=0.25, seed=3)
    assert chosen(plan) == {1: [OUT[0]], 2: [OUT[0]], 4: [OUT[2]], 5: [OUT[0]]}
    assert saved(plan) == [0, ATTENTION, ATTENTION, 0, ATTENTION, ATTENTION, 0]


def test_one_cutoff_in_time() -> None:
    """P-steps before the cut reuse everything, all other steps compute everything."""
    info = case("dit").info
    plan = plans.time_cut(info, num_steps=8, cut=0.5)
    assert str(plan.schedule) == "IPIPIIII"
    assert chosen(plan) == {1: OUT, 3: OUT}
    assert str(plans.time_cut(info, num_steps=9, cut=2 / 3, interval=3).schedule) == "IPPIPPIII"
    assert plan.macs == 8 * info.macs - 2 * branch_macs(info, OUT)


def test_a_cut_at_the_end_is_fora() -> None:
    """Action for action."""
    info = case("dit").info
    fora = plans.fora(info, num_steps=7, interval=3, count="up")
    assert plans.time_cut(info, num_steps=7, cut=1.0, interval=3).actions == fora.actions
    assert plans.bottom_up(info, num_steps=7, share=1.0, interval=3).actions == fora.actions


@pytest.mark.parametrize("policy", [plans.bottom_up, plans.top_down, plans.random_units, plans.time_cut])
def test_sites_after_the_gate(policy: Callable[..., CachePlan]) -> None:
    """`delta` in place of `out`."""
    assert set(policy(case("dit").info, num_steps=4, sites="delta").sites) == {f"{b}.delta" for b in BRANCHES}


def errors(steps: int = 6, back: int = 2) -> Calibration:
    """Changes of the tiny DiT's branches: larger with the step, the unit and the distance; gates of 1, 4, 1, 4."""
    sites = tuple(f"{branch}.{kind}" for kind in ("out", "delta") for branch in BRANCHES)
    square = torch.ones(steps, 8)
    square[:, 5::2] = 16.0  # deltas of the MLPs: their gate is 4
    unit = torch.tensor([1.0, 2.0, 3.0, 4.0, 0.0, 0.0, 0.0, 0.0])
    distance, step = torch.arange(1.0, back + 1)[:, None, None], torch.arange(1.0, steps + 1)[None, :, None]
    change = distance * (10 * step + unit)
    return Calibration(sites, torch.ones(steps, 8), square, change, change)


def test_the_metric_takes_the_smallest_changes_first() -> None:
    """|g| * ||f_m - f_s||^2 is 21, 4 x 22, 23, 4 x 24 at step 1, and 41, 4 x 42, 43, 4 x 44 at step 3."""
    info = case("dit").info
    for share, units in (
        (0.125, {1: [OUT[0]]}),
        (0.5, {1: [OUT[0], OUT[2]], 3: [OUT[0], OUT[2]]}),
        (0.75, {1: OUT, 3: [OUT[0], OUT[2]]}),
    ):
        assert chosen(plans.metric(info, num_steps=4, errors=errors(4), share=share)) == units


def test_the_metric_looks_back_to_the_computed_step() -> None:
    """With an interval of 3: 21, 23 at step 1, 2 x 31, 2 x 33 at step 2, 51, 53 at step 4, 122 at step 5; MLPs: 88."""
    info, attention = case("dit").info, [OUT[0], OUT[2]]
    plan = plans.metric(info, num_steps=6, errors=errors(), share=4 / 16, interval=3)
    assert chosen(plan) == {1: attention, 4: attention}
    plan = plans.metric(info, num_steps=6, errors=errors(), share=6 / 16, interval=3)
    assert chosen(plan) == {1: attention, 2: attention, 4: attention}


def test_the_cost_of_the_metric() -> None:
    """A P-step lacks the branches that it reuses: one block's attention, both blocks', or with their MLPs."""
    info = case("dit").info
    for share, first, second in ((0.125, 1, 0), (0.5, 2, 2)):
        plan = plans.metric(info, num_steps=4, errors=errors(4), share=share)
        assert saved(plan) == [0, first * ATTENTION, 0, second * ATTENTION]
    plan = plans.metric(info, num_steps=4, errors=errors(4), share=0.75)
    assert saved(plan) == [0, 2 * ATTENTION + 2 * MLP, 0, 2 * ATTENTION]
    plan = plans.metric(info, num_steps=6, errors=errors(), share=6 / 16, interval=3)
    assert saved(plan) == [0, 2 * ATTENTION, 2 * ATTENTION, 0, 2 * ATTENTION, 0]


# --- drops


def test_random_drops_are_the_share_of_all_units() -> None:
    """60 of 560 in the paper; here 7 of 40, others for other seeds, none at full steps."""
    info = case("dit").info
    first, again, other = (plans.random_drop(info, num_steps=20, share=7 / 40, seed=seed) for seed in (1, 1, 2))
    dropped = chosen(first, Skip())
    assert sum(map(len, dropped.values())) == 7
    assert all(step % 2 for step in dropped)
    assert first.actions == again.actions != other.actions
    assert first.slot_bytes == 0
    assert first.macs == 20 * info.macs - dropped_macs(info, dropped)


def test_a_dropped_branch_adds_nothing() -> None:
    """With all branches dropped the stream is the embedding; the compiled plan agrees with the reference."""
    which = case("dit")
    plan = plans.random_drop(which.info, num_steps=4, share=1.0)
    assert chosen(plan, Skip()) == {step: [f"{branch}.delta" for branch in BRANCHES] for step in (1, 3)}
    compiled, reference = session(which, plan), Reference(which.model, plan, which.info)
    for step in range(4):
        assert relative_error(call(compiled, which, step), call(reference, which, step)) < CLOSE


def test_learning_to_drop_skips_where_the_router_says() -> None:
    """Score at most theta; the router's sites are branch outputs, what is dropped is what they add."""
    scores = torch.full((4, 4), torch.nan)
    scores[1], scores[3] = torch.tensor([0.0, 0.1, 0.2, 1.0]), torch.tensor([1.0, 1.0, 1.0, 0.05])
    info = case("dit").info
    plan = plans.learning_to_drop(info, num_steps=4, router=Router(scores, tuple(OUT)), theta=0.1)
    assert chosen(plan, Skip()) == {1: ["blocks.0.attn.delta", "blocks.0.mlp.delta"], 3: ["blocks.1.mlp.delta"]}
    assert plan.policy == {"name": "learning_to_drop", "router": "given", "theta": 0.1, "shifted": False}
    assert (plan.macs, plan.slot_bytes) == (4 * info.macs - dropped_macs(info, chosen(plan, Skip())), 0)


# --- refusals

BAD: dict[str, tuple[Callable[[ModelInfo], Any], str]] = {
    "share": (lambda i: plans.bottom_up(i, num_steps=4, share=1.5), "share=1.5: expected a share, 0..1"),
    "share NaN": (lambda i: plans.top_down(i, num_steps=4, share=math.nan), "share=nan: expected a share, 0..1"),
    "random share": (lambda i: plans.random_units(i, num_steps=4, share=-0.1), "share=-0.1: expected a share"),
    "drop share": (lambda i: plans.random_drop(i, num_steps=4, share=2), "share=2: expected a share, 0..1"),
    "cut": (lambda i: plans.time_cut(i, num_steps=4, cut=1.01), "cut=1.01: expected a share, 0..1"),
    "interval": (
        lambda i: plans.time_cut(i, num_steps=4, interval=0),
        "interval=0: expected a whole number, 1 or more",
    ),
    "broken interval": (lambda i: plans.bottom_up(i, num_steps=4, interval=2.5), "interval=2.5: expected a whole"),
    "steps": (lambda i: plans.random_units(i, num_steps=0), "num_steps=0: expected a whole number, 1 or more"),
    "sites": (lambda i: plans.time_cut(i, num_steps=4, sites="kv"), "sites='kv': use 'out'"),
    "other steps": (lambda i: plans.metric(i, num_steps=8, errors=errors()), "measured 6 steps, and num_steps=8"),
    "not far enough": (
        lambda i: plans.metric(i, num_steps=6, errors=errors(), interval=4),
        "looks 2 steps back, and 3 are needed: measure with back=3",
    ),
    "metric share": (lambda i: plans.metric(i, num_steps=6, errors=errors(), share=-1), "share=-1: expected a share"),
}


@pytest.mark.parametrize("kind", BAD)
def test_what_cannot_be_planned_is_refused(kind: str) -> None:
    """The message names the option and what it may be."""
    make, message = BAD[kind]
    with pytest.raises(PlanError, match=re.escape(message)):
        make(case("dit").info)


def test_a_calibration_of_another_model_is_refused() -> None:
    """It lacks the model's sites."""
    with pytest.raises(PlanError, match=r"did not measure site 'transformer_blocks.0.attn.out'"):
        plans.metric(case("hf_pixart").info, num_steps=6, errors=errors())
