"""TokenCache plans: what they cost, what they compute, budgets and refusals."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch

import tcc
from tcc import plans
from tcc.errors import PlanError
from tcc.learned import Importance, Router, save_learned
from tcc.plan import CachePlan, Compute, Reuse
from tests.tiny_models import relative_error, tensor_of
from tests.token_plans import BLOCKS, STEPS, TOKENS, deep, importance, plan

# --- MACs


@pytest.mark.parametrize("r", [0.25, 0.5, 0.75])
@pytest.mark.parametrize("blocks", [1, 4])
def test_the_cost_of_a_p_step(r: float, blocks: int) -> None:
    """Methods A to D of attention, exactly, for each pruned block of N tokens and width d."""
    info, n, d = deep().info, TOKENS, 32
    k, full = round(r * n), 12 * d * d * n + 2 * n * n * d
    costs = {
        "current": 2 * d * d * n + 10 * d * d * k + 2 * k * n * d,
        "kept": 12 * d * d * k + 2 * k * k * d,
        "reused": 8 * d * d * k,
        "cached": 12 * d * d * k + 2 * k * n * d,
    }
    for attention, cost in costs.items():
        made = plan(keep=r, pruned=blocks, attention=attention)
        assert made.cost is not None
        assert [info.macs - macs for macs in made.cost.step_macs] == [0, blocks * (full - cost)] * 3, attention


def test_the_mean_cost_is_that_of_the_steps() -> None:
    """`(n_I + n_P p) / (n_I + n_P)`, p the relative cost of a P-step (cost identity of the method's notes)."""
    made = plan(k1=2, k2=1, keep=0.25)
    assert made.cost is not None
    n_i, n_p = made.schedule.letters.count("I"), made.schedule.letters.count("P")
    p = made.cost.step_macs[1] / made.cost.full_macs
    assert 1 / made.bound == pytest.approx((n_i + n_p * p) / (n_i + n_p), rel=1e-9)


def test_importance_one_is_exact() -> None:
    """Keep all: nothing is reused, and the compiled plan gives the model's outputs, bit for bit."""
    made = plan(keep=1.0)
    assert made.bound == 1.0
    compiled = tcc.compile(deep().model, made, backend="eager")
    for step in range(STEPS):
        args, kwargs = deep().inputs(step)
        with torch.no_grad():
            assert torch.equal(tensor_of(compiled(*args, **kwargs)), tensor_of(deep().model(*args, **kwargs)))


def test_nothing_kept_of_block_deltas_is_the_stream_plus_old_changes() -> None:
    """All blocks reused: what enters them at this step plus what they changed before, not the old output."""
    info = deep().info
    sites = {f"blocks.{b}.delta" for b in range(BLOCKS)}
    actions = {(step, s): (Compute(), Reuse())[step] for step in (0, 1) for s in sites}
    ones = torch.zeros(2, BLOCKS, TOKENS)
    ones[:, 0, 0] = 1.0  # one pair must be kept; dropping it makes the plan above
    made = plans.tokencache(
        info, num_steps=2, importance=Importance(ones), level="block", attention="kept", share=False, keep=1 / 64
    )
    reused = {at: a for at, a in made.actions.items() if isinstance(a, Reuse)}
    assert set(reused) == {(1, f"blocks.{b}.delta") for b in (1, 2, 3)}
    reference = tcc.Reference(deep().model, CachePlan(num_steps=2, actions=actions), info)
    model: Any = deep().model
    with torch.no_grad():
        streams = []
        for step in (0, 1):
            (x, t, y), _ = deep().inputs(step)
            result = tensor_of(reference(x, t, y))
            c = model.t_embedder(t) + model.y_embedder(y)
            before = model.x_embedder(x) + model.pos_embed
            after = before
            for block in model.blocks:
                after = block(after, c)
            streams.append((before, after))
        expected = streams[1][0] + (streams[0][1] - streams[0][0])
        assert relative_error(result, model.unpatchify(model.final_layer(expected, c))) < 2e-6
        old = model.unpatchify(model.final_layer(streams[0][1], c))
    assert relative_error(result, old) > 1e-2


# --- compiled


COMPILED: dict[str, dict[str, Any]] = {
    "defaults": {},
    "global": {"select": "global", "keep": 0.3, "adapt": "step"},
    "reused": {"attention": "reused", "pruned": 2, "refresh": False},
    "shared": {"share": True, "level": "block", "attention": "kept", "k1": 2},
    "rotating": {"rotate": 1.0, "level": "branch", "attention": "current", "sets": "cycle", "k1": 2},
}


@pytest.mark.parametrize("kind", COMPILED)
def test_compiled_plans_agree_with_the_reference(kind: str) -> None:
    """Options change what is computed; the compiler computes it."""
    made = plan(**COMPILED[kind])
    compiled = tcc.compile(deep().model, made, backend="eager")
    reference = tcc.Reference(deep().model, made, deep().info)
    for step in range(STEPS):
        args, kwargs = deep().inputs(step)
        with torch.no_grad():
            error = relative_error(tensor_of(compiled(*args, **kwargs)), tensor_of(reference(*args, **kwargs)))
        assert error <= 2e-5, step


# --- budgets


@pytest.mark.parametrize("select", ["grid", "global"])
def test_a_budget_solves_for_keep(select: Any) -> None:
    """The highest keep ratio whose bound reaches it."""
    made = plan(budget=1.25, select=select)
    assert made.bound >= 1.25
    units = 4 if select == "grid" else TOKENS
    more = plan(keep=made.policy["keep"] + 1 / units, select=select)
    assert more.bound < 1.25


def test_a_budget_solves_for_blocks() -> None:
    """The fewest pruned blocks that reach it, with the keep ratio given."""
    made = plan(budget=1.1, keep=0.25)
    assert made.bound >= 1.1
    assert made.policy["keep"] == 0.25
    assert plan(pruned=made.policy["pruned"] - 1, keep=0.25).bound < 1.1


def test_a_budget_of_one_is_the_uncached_model() -> None:
    """Nothing need be dropped."""
    assert plan(budget=1.0).bound == 1.0


def test_a_budget_out_of_reach_names_the_nearest() -> None:
    """With the knob that gets there."""
    nearest = plan(keep=0.25).bound
    with pytest.raises(PlanError, match=rf"budget=9: the nearest bound within reach is {nearest:.4g}, with keep=0.25"):
        plan(budget=9)
    with pytest.raises(PlanError, match="with pruned=4: take fewer I-steps"):
        plan(budget=9, keep=0.5)


# --- refusals

BAD: dict[str, tuple[dict[str, Any], str]] = {
    "no importance": ({"importance": None}, "scores='learned' needs an importance: give importance=<file"),
    "percentile of nothing": (
        {"importance": None, "scores": "random", "schedule": "percentile"},
        "schedule='percentile' needs an importance",
    ),
    "steps": (
        {"importance": Importance(torch.ones(5, BLOCKS, TOKENS))},
        "the importance is for [5, 4, 16] steps, blocks and tokens; the plan has [6, 4, 16]",
    ),
    "tokens": ({"importance": Importance(torch.ones(STEPS, BLOCKS, 64))}, "the importance is for [6, 4, 64] steps"),
    "a router": ({"importance": Router(torch.ones(1, 1), ("blocks.0.mlp.out",))}, "importance: a router is none"),
    "no file": ({"importance": "no-such-file"}, "there is no file no-such-file"),
    "scores": ({"scores": "best"}, "scores='best': use one of learned, random, uniform, norm"),
    "schedule": ({"schedule": "odd"}, "schedule='odd': use one of tprr, percentile, even"),
    "select": ({"select": "all"}, "select='all': use one of grid, global"),
    "attention": ({"attention": "none"}, "attention='none': use one of kept, current, cached, reused"),
    "reused blocks": ({"attention": "reused", "level": "block"}, "use level='branch' or 'out'"),
    "keep": ({"keep": 0.0}, "keep=0.0: the keep ratio is in (0, 1]"),
    "cell": ({"cell": 3}, "cell=3: the grid is 4 x 4; the cell's side must divide both"),
    "pruned": ({"pruned": 5}, "pruned=5: expected a whole number, 1..4"),
    "pruned none": ({"pruned": 0}, "pruned=0: expected a whole number, 1..4"),
    "blocks without importance": (
        {"pruned": 2, "importance": None, "scores": "random"},
        "pruned=2 chooses blocks by importance: give one, or name the blocks in `blocks`",
    ),
    "last_full": ({"last_full": 4}, "last_full=4: expected a whole number, 0..3"),
    "no block left": ({"last_full": 1, "blocks": [3]}, "no block can be pruned: `blocks` and `last_full` leave none"),
    "no cell": ({"cell": 0}, "cell=0: expected a whole number, 1 or more"),
    "a count of I-steps": ({"i_steps": 3}, "i_steps=3: schedule 'tprr' counts its I-steps by k1, k2 and boundary"),
    "rotate": ({"rotate": float("inf")}, "rotate=inf: expected a number, 0 or more"),
    "i_steps": ({"i_steps": [1, 2]}, "i_steps=[1, 2]: steps are 0..5, and the first computes everything"),
    "even i_steps": ({"i_steps": 7, "schedule": "even"}, "i_steps=7: expected a whole number, 1..6"),
    "budget below 1": ({"budget": 0.5}, "budget=0.5: expected a bound (uncached MACs / planned MACs), 1 or more"),
    "nothing to solve for": (
        {"budget": 1.2, "keep": 0.5, "pruned": 2},
        "budget=1.2: with both keep=0.5 and pruned=2 given there is nothing to solve for",
    ),
    "dynamic cycles": ({"scores": "norm", "sets": "cycle"}, "sets='cycle' keeps one static set"),
}


@pytest.mark.parametrize("kind", BAD)
def test_what_cannot_be_planned_is_refused(kind: str) -> None:
    """With the option, its value, and what to do."""
    options, message = BAD[kind]
    with pytest.raises(PlanError, match=re.escape(message)):
        plan(**options)


def test_an_importance_is_read_from_its_file(tmp_path: Path) -> None:
    """The same plan, up to the rounding of the file."""
    save_learned(importance(), tmp_path / "w.safetensors")
    made = plan(importance=tmp_path / "w.safetensors")
    assert all(torch.equal(made.tokens[name], wanted) for name, wanted in plan().tokens.items())
