"""TaylorSeer: its steps, its weights against the published recursion, its cost, and its programs."""

from __future__ import annotations

import math
import re
from typing import Any

import pytest
import torch

import tcc
from tcc import plans
from tcc.errors import PlanError
from tcc.plan import Compute, Reuse
from tcc.plans.taylorseer import forecast_weights, taylorseer_steps
from tests.published import dit_xl2, tera_flops
from tests.running import CLOSE, call, session
from tests.tiny_models import case, relative_error


class Recursion:
    """The published algorithm: a feature's derivatives, updated at computed steps, summed as a series at others."""

    def __init__(self, order: int) -> None:
        self.order = order
        self.derivatives: dict[int, torch.Tensor] = {}
        self.last = 0

    def computed(self, step: int, feature: torch.Tensor) -> None:
        """Each derivative is the change of the one below it since the last computed step, over the distance."""
        new = {0: feature}
        for i in range(self.order):
            if i in self.derivatives:
                new[i + 1] = (new[i] - self.derivatives[i]) / (step - self.last)
        self.derivatives, self.last = new, step

    def forecast(self, step: int) -> torch.Tensor:
        """The series."""
        x = step - self.last
        terms = [self.derivatives[i] * (x**i / math.factorial(i)) for i in self.derivatives]
        return torch.stack(terms).sum(0)


@pytest.mark.parametrize("order", [0, 1, 2, 3, 4])
@pytest.mark.parametrize("computed", [[0, 1, 4, 7, 10, 13], [0, 5, 6, 10, 12, 19, 20], [0, 1, 2]])
def test_the_weights_are_those_of_the_recursion(order: int, computed: list[int]) -> None:
    """On random sequences, at every step that is not computed, equal intervals or not."""
    generator = torch.Generator().manual_seed(order)
    values: list[torch.Tensor] = []
    published = Recursion(order)
    for step in range(computed[-1] + 4):
        if step in computed:
            values.insert(0, torch.randn(5, dtype=torch.float64, generator=generator))
            published.computed(step, values[0])
            continue
        weights = forecast_weights([s for s in computed if s < step], step, order)
        assert len(weights) == min(order, len(values) - 1) + 1
        forecast = sum(w * v for w, v in zip(weights, values, strict=False))
        torch.testing.assert_close(forecast, published.forecast(step), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("order", [1, 2, 3, 4])
def test_equal_intervals_give_the_papers_formula(order: int) -> None:
    """`sum_i D^i F k^i / (i! N^i)`, with `D^i F = sum_j (-1)^j C(i, j) F_j` of backward differences."""
    n, k = 3, 2
    weights = forecast_weights(range(0, n * (order + 1), n), n * order + k, order)
    for j, weight in enumerate(weights):
        terms = [(-1) ** j * math.comb(i, j) * k**i / (math.factorial(i) * n**i) for i in range(j, order + 1)]
        assert weight == pytest.approx(math.fsum(terms), rel=1e-12)


def test_a_line_is_forecast_exactly() -> None:
    """A feature linear in the step number, by every order from 1, at unequal intervals."""
    computed = [0, 1, 4, 9]
    for order in (1, 2, 3):
        weights = forecast_weights(computed, 11, order)
        assert sum(w * (2 * s + 5) for w, s in zip(weights, computed[::-1], strict=False)) == pytest.approx(27.0)


@pytest.mark.parametrize(
    ("options", "schedule"),
    [
        ((8, 3, 2), "IIPPIPPI"),
        ((9, 3, 1), "IPPIPPIPP"),
        ((7, 2, 3), "IIIPIPI"),
        ((4, 1, 1), "IIII"),
        ((2, 5, 4), "II"),
    ],
)
def test_the_steps(options: tuple[int, int, int], schedule: str) -> None:
    """The first ones, then every interval-th after them."""
    num_steps, interval, first_full = options
    plan = plans.taylorseer(case("dit").info, num_steps=num_steps, interval=interval, first_full=first_full)
    assert str(plan.schedule) == schedule
    assert plan.schedule.i_steps == taylorseer_steps(*options)


def test_the_order_grows_with_what_was_computed() -> None:
    """One value: reuse. Two: a line. Then up to the order asked; steps of one order share a variant."""
    plan = plans.taylorseer(case("dit").info, num_steps=12, interval=3, order=2, first_full=1)
    actions = [action for _, action in plan.column("blocks.0.attn.out")]
    orders = [None if isinstance(a, Compute) else a.order for a in actions if isinstance(a, (Compute, Reuse))]
    assert orders == [None, 0, 0, None, 1, 1, None, 2, 2, None, 2, 2]
    assert len(compiled(plan).program.variants) == 4
    assert actions[4] == Reuse(1, (1 + 1 / 3, -1 / 3))


def compiled(plan: tcc.CachePlan) -> tcc.CompiledModel:
    """The tiny DiT under the plan, without a backend."""
    return tcc.compile(case("dit").model, plan, backend="eager", example_inputs=(case("dit").args, {}))


@pytest.mark.parametrize("sites", ["out", "delta"])
def test_it_acts_on_every_branch(sites: Any) -> None:
    """Attention and MLP of every block."""
    plan = plans.taylorseer(case("dit").info, num_steps=4, sites=sites)
    assert plan.sites == tuple(f"blocks.{b}.{branch}.{sites}" for b in (0, 1) for branch in ("attn", "mlp"))
    assert plan.policy == {"name": "taylorseer", "interval": 3, "order": 2, "first_full": 2, "sites": sites}


@pytest.mark.parametrize(
    ("interval", "order", "full_steps", "speedup"), [(3, 3, 18, 2.77), (4, 4, 14, 3.57), (5, 3, 11, 4.53)]
)
def test_published_speedups(interval: int, order: int, full_steps: int, speedup: float) -> None:
    """DiT-XL/2, 50 steps, as shares of the uncached cost: rounding is 0.0007 of it, the modulation at most 0.0015."""
    plan = plans.taylorseer(dit_xl2(), num_steps=50, interval=interval, order=order)
    assert str(plan.schedule).count("I") == full_steps
    assert 1 / plan.bound == pytest.approx(1 / speedup, abs=2e-3)


def test_published_flops() -> None:
    """DiT-XL/2, 50 steps, N = 3: 8.56 T, as FORA."""
    plan = plans.taylorseer(dit_xl2(), num_steps=50, interval=3, order=3)
    assert tera_flops(plan) == pytest.approx(8.56, rel=2e-3)


def test_a_value_per_order_is_kept() -> None:
    """Slots: m + 1 for each of the branches."""
    info = case("dit").info
    one = 4 * 2 * 16 * 32 * 4
    assert [plans.taylorseer(info, num_steps=14, order=m).slot_bytes for m in (0, 1, 3)] == [one, 2 * one, 4 * one]


@pytest.mark.parametrize("order", [1, 2, 3, 4])
def test_programs_compute_what_the_reference_computes(order: int) -> None:
    """Every step of a run on the tiny DiT, the first forecasts of low order included."""
    which = case("dit")
    plan = plans.taylorseer(which.info, num_steps=14, interval=2, order=order)
    model, reference = session(which, plan), tcc.Reference(which.model, plan)
    for step in range(plan.num_steps):
        assert relative_error(call(model, which, step), call(reference, which, step)) < CLOSE


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"interval": 0}, "interval=0: expected a whole number, 1 or more"),
        ({"order": -1}, "order=-1: expected a whole number, 0 or more"),
        ({"first_full": 0}, "first_full=0: expected a whole number, 1 or more"),
        ({"sites": "kv"}, "sites='kv': use 'out' (before the gate) or 'delta' (after it)"),
    ],
)
def test_bad_options_are_refused(options: dict[str, Any], message: str) -> None:
    """The message names the option and its value."""
    with pytest.raises(PlanError, match=re.escape(message)):
        plans.taylorseer(case("dit").info, num_steps=6, **options)
