"""What plans cost on DiT-XL/2, 256 tokens, counted by hand; and the FLOPs that the papers state."""

from __future__ import annotations

from typing import Any

import pytest

import tcc
from tcc import plans
from tcc.plan import CachePlan, Compute, Hold
from tcc.plans.toca import toca_steps
from tests.published import dit_xl2, tera_flops, toca_tokens, updated_tokens

# --- FORA


def test_the_published_flops_of_fora() -> None:
    """DiT-XL/2, 50 DDIM steps, N = 3: 8.56 T and 2.77x, with 2 FLOPs per MAC and both guidance branches.

    18 steps compute everything; the others have no branches. The published number lies between the counts without the
    modulation of the blocks at those steps and with it.
    """
    n, d = 256, 1152
    blocks, modulation = 28 * (12 * d * d * n + 2 * n * n * d), 28 * 6 * d * d
    outer = (2 * 2 * 4) * d * n + 256 * d + d * d + 2 * d * d + d * (2 * 2 * 8) * n  # patches, time, head
    plan = plans.fora(dit_xl2(), num_steps=50, interval=3)
    assert plan.macs == 18 * blocks + 50 * (modulation + outer)
    assert round(plan.bound, 2) == 2.77
    assert tera_flops(plan) - 32 * modulation * 4 / 1e12 < 8.56 < tera_flops(plan)


# --- ToCa and DuCa


def by_hand(plan: CachePlan) -> float:
    """TFLOPs as published: full blocks, the MLP of as many tokens as the plan updates, and what is not in a block."""
    info, n, d = dit_xl2(), 256, 1152
    branch = {name: site.macs // info.batch for name, site in info.sites.items() if site.kind == "out"}
    modulation = 28 * 6 * d * d
    rest = info.macs - sum(branch.values()) - modulation
    total = 0
    for step in range(plan.num_steps):
        actions = plan.at(step)
        total += rest if actions.get("out.stream") != Hold() else 2 * d * d + 32 * d * n + conditioning(d)
        total += modulation if actions.get("out.stream") != Hold() else 0
        total += sum(branch[site] for site, action in actions.items() if action == Compute() and site in branch)
    return (total + sum(updated_tokens(plan)) * 8 * d * d) * 4 / 1e12


def conditioning(d: int) -> int:
    """MACs of the timestep's embedding."""
    return 256 * d + d * d


@pytest.mark.parametrize(
    ("policy", "options", "published"),
    [
        ("toca", {"num_steps": 50}, 10.23),
        ("toca", {"num_steps": 50, "quirk": False}, 11.13),
        ("toca", {"num_steps": 250, "interval": 4, "layer_slope": 0.8, "step_slope": 0.4}, 43.42),
        ("duca", {"num_steps": 50}, 9.58),
    ],
)
def test_published_flops(
    policy: str, options: dict[str, Any], published: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The table of actions, without its graphs. The published numbers leave out the modulation of partial steps.

    That is 0.2 % of a full step.
    """
    monkeypatch.setattr(tcc.ModelInfo, "count", lambda _, plan: plan)
    assert by_hand(plans.POLICIES[policy](dit_xl2(), **options)) == pytest.approx(published, rel=3e-3)


@pytest.mark.parametrize("policy", ["toca", "duca"])
def test_the_counted_cost_is_that(policy: str) -> None:
    """Exactly, on the rewritten graphs."""
    plan = plans.POLICIES[policy](dit_xl2(), num_steps=50, score="random", levels=1)
    assert tera_flops(plan) == pytest.approx(by_hand(plan), rel=1e-9)
    assert plan.bound == pytest.approx({"toca": 2.32, "duca": 2.48}[policy], rel=5e-3)


@pytest.mark.parametrize(("policy", "ratio"), [("toca", 0.07), ("duca", 0.05)])
def test_the_counted_cost_of_the_defaults(policy: str, ratio: float) -> None:
    """Exactly, per step, from the published schedule alone; and one more product of queries and keys per map.

    All full steps compute the maps of all blocks. A quirk step computes the first block alone, and its map only where a
    partial step reads it before the next full one: not at 45, for 44 is full.
    """
    n, d = 256, 1152
    attention, mlp, scored = 4 * d * d * n + 2 * n * n * d, 8 * d * d, n * n * d
    head = 2 * d * d + d * (2 * 2 * 8) * n + conditioning(d)
    rest = head + 28 * 6 * d * d + (2 * 2 * 4) * d * n  # modulation, patches of 2 x 2 with 4 channels
    kinds = toca_steps(50, 3, aggressive=policy == "duca")
    expected = []
    for step, kind in enumerate(kinds):
        i = 49 - step
        blocks = range(28) if kind == "partial" else range(1, 28)
        macs = rest + sum(toca_tokens(block, i, ratio) for block in blocks) * mlp
        if kind == "full":
            macs = rest + 28 * (attention + mlp * n + scored)
        elif kind == "first":
            macs += attention + mlp * n + (scored if i == 32 else 0)
        expected.append(head if kind == "aggressive" else macs)
    plan = plans.POLICIES[policy](dit_xl2(), num_steps=50)
    assert plan.cost is not None
    assert plan.cost.step_macs == tuple(expected)
    without_maps = plan.macs - (18 * 28 + 1) * scored
    assert 4 * without_maps / 1e12 == pytest.approx({"toca": 10.23, "duca": 9.58}[policy], rel=3e-3)
