"""Forecasts by a polynomial: weights, tables, costs, and what is refused."""

from __future__ import annotations

import re
from typing import Any

import pytest
import torch

import tcc
from tcc import plans
from tcc.errors import PlanError
from tcc.plan import Compute, Reuse
from tcc.plans.forecast import even_steps, polynomial_weights
from tests.running import CLOSE, call, compiled
from tests.tiny_models import case, relative_error


@pytest.mark.parametrize("order", [0, 1, 2, 3, 4])
def test_the_weights_meet_every_polynomial_of_their_order(order: int) -> None:
    """At unequal distances too; and one order more is missed, so the order is what it says."""
    computed, step = (0, 1, 4, 6, 9), 12

    def missed(degree: int) -> float:
        weights = polynomial_weights(computed, step, order)
        return sum(w * s**degree for w, s in zip(weights, computed[::-1], strict=False)) - step**degree

    assert [missed(degree) for degree in range(order + 1)] == pytest.approx([0.0] * (order + 1), abs=1e-9)
    assert abs(missed(order + 1)) > 1


def test_the_weights_of_few_values_are_of_lower_order() -> None:
    """One value is repeated, two make a line."""
    assert polynomial_weights((0,), 3, 2) == (1.0,)
    assert polynomial_weights((0, 2), 3, 2) == (1.5, -0.5)


def test_steps_are_spread_evenly() -> None:
    """From the first to the last."""
    assert even_steps(9, 3) == (0, 4, 8)
    assert even_steps(5, 1) == (0,)
    assert even_steps(4, 4) == (0, 1, 2, 3)


def test_the_table_and_the_macs() -> None:
    """I-steps compute; P-steps cost what stands before and after the blocks, and keep one slot per age."""
    info = case("dit").info
    plan = plans.forecast(info, num_steps=8, i_steps=(0, 2, 5, 6))
    assert str(plan.schedule) == "IPIPPIIP"
    assert set(plan.sites) == {f"{block}.delta" for block in info.blocks}
    actions = [plan.action(step, plan.sites[0]) for step in range(8)]
    assert [a.order if isinstance(a, Reuse) else None for a in actions] == [None, 0, None, 1, 1, None, None, 2]
    assert actions[0] == Compute()
    assert plan.cost is not None
    inside = sum(site.macs for site in info.sites.values() if site.kind == "block") // info.batch
    modulation = len(info.blocks) * 6 * info.analysis.stream_shape[-1] ** 2  # of the blocks: not needed either
    assert plan.cost.step_macs[7] == plan.cost.full_macs - inside - modulation
    assert plan.slot_bytes == 3 * info.sites[plan.sites[0]].bytes


@pytest.mark.parametrize(("level", "kind"), [("block", "block"), ("branch", "delta"), ("out", "out")])
def test_levels_name_their_sites_and_compile(level: Any, kind: str) -> None:
    """Compiled, the plan gives what the reference gives."""
    which = case("dit")
    plan = plans.forecast(which.info, num_steps=6, i_steps=4, level=level)
    assert {which.info.sites[name].kind for name in plan.sites} == {kind}
    fast, oracle = compiled(which, plan), tcc.reference.Reference(which.model, plan, which.info)
    for step in range(6):
        assert relative_error(call(fast, which, step), call(oracle, which, step)) <= CLOSE


def test_an_exact_forecast_of_a_stream_that_does_not_move() -> None:
    """The same input at every step: every forecast is the value itself."""
    which = case("dit")
    fast = compiled(which, plans.forecast(which.info, num_steps=6, i_steps=(0, 1, 3)))
    full = call(which.model, which, 0)
    with torch.no_grad():
        assert max(relative_error(call(fast, which, 0), full) for _ in range(6)) <= CLOSE


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"i_steps": (1, 3)}, "steps are 0..5, and the first computes everything"),
        ({"i_steps": (0, 6)}, "steps are 0..5"),
        ({"i_steps": ()}, "the first computes everything"),
        ({"i_steps": 7}, "i_steps=7: expected a whole number, 1..6"),
        ({"i_steps": 3, "order": -1}, "order=-1: expected a whole number, 0 or more"),
        ({"i_steps": 3, "order": 1.5}, "order=1.5: expected a whole number"),
        ({"i_steps": 3, "level": "token"}, "use 'block', 'branch' or 'out'"),
    ],
)
def test_bad_options_are_refused(options: dict[str, Any], message: str) -> None:
    """With what is allowed."""
    with pytest.raises(PlanError, match=re.escape(message)):
        plans.forecast(case("dit").info, num_steps=6, **options)
