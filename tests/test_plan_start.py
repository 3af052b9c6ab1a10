"""Plans for runs that begin in the middle of the schedule."""

from __future__ import annotations

import pytest
import torch

import tcc
from tcc.errors import PlanError
from tcc.plan import Action, CachePlan, Compute, Hold, Reuse, Skip
from tcc.plan.start import start_at
from tests.dynamic_plans import SCORES, dynamic_plan
from tests.running import CLOSE, call, compiled, token_plan
from tests.tiny_models import case, relative_error

SITE = "blocks.0.mlp.out"


def column(plan: CachePlan, site: str = SITE) -> list[Action]:
    """The actions of a site, step by step."""
    return [action for _, action in plan.column(site)]


def test_the_first_step_computes_what_was_stored_before() -> None:
    """The steps after it are the plan's."""
    actions: dict[tuple[int, str], Action] = {(s, SITE): Compute() if s % 3 == 0 else Reuse() for s in range(8)}
    actions |= {(s, "out.stream"): Compute() if s == 0 else Hold() for s in range(8)}
    started = start_at(CachePlan(8, actions), 4)
    assert started.num_steps == 4
    assert column(started) == [Compute(), Reuse(), Compute(), Reuse()]
    assert column(started, "out.stream") == [Compute(), Hold(), Hold(), Hold()]


def test_a_forecast_waits_for_the_values_of_the_plan() -> None:
    """Its coefficients are for values of certain steps; until those are there, the newest value is reused."""
    line = Reuse(1, (1.5, -0.5))
    actions = {(s, SITE): Compute() if s % 3 == 0 else line for s in (0, 3, 4, 5, 6, 7, 8, 9, 10)}
    actions |= {(1, SITE): Reuse(), (2, SITE): Reuse()}
    started = column(start_at(CachePlan(11, actions), 4))
    #           4          5        6          7        8        9          10
    assert started == [Compute(), Reuse(), Compute(), Reuse(), Reuse(), Compute(), line]


def test_what_is_skipped_stays_skipped() -> None:
    """A later read computes it."""
    plan = CachePlan(4, {(0, SITE): Compute(), (1, SITE): Skip(), (2, SITE): Reuse(), (3, SITE): Reuse()})
    assert column(start_at(plan, 1)) == [Skip(), Compute(), Reuse()]


def test_the_whole_run_is_the_plan_itself() -> None:
    """And a step that the plan does not have is refused."""
    plan = token_plan("dit")
    assert start_at(plan, 0) is plan
    for step in (-1, 6):
        with pytest.raises(PlanError, match=rf"start_step={step}: the plan has steps 0\.\.5"):
            start_at(plan, step)


def some_plan(name: str) -> CachePlan:
    """A plan of six steps for the tiny DiT."""
    info = case("dit").info
    if name in SCORES:
        return dynamic_plan(case("dit"), SCORES[name], attention="cached")
    return {
        "fora": lambda: tcc.plans.fora(info, num_steps=6, interval=3),
        "taylorseer": lambda: tcc.plans.taylorseer(info, num_steps=6, interval=2, order=1),
        "tokens": lambda: token_plan("dit", attention="cached", level="branch"),
    }[name]()


@pytest.mark.parametrize("name", ["fora", "taylorseer", "tokens", "attended", "stale"])
@pytest.mark.parametrize("start", [1, 4])
def test_a_run_that_starts_late_equals_the_reference(name: str, start: int) -> None:
    """`reset(start_step=...)` runs the steps of the plan from there on, by the definition of what it computes."""
    which, plan = case("dit"), some_plan(name)
    model, reference = compiled(which, plan), tcc.Reference(which.model, start_at(plan, start), which.info)
    model.reset(start_step=start)
    for _ in range(2):  # the run after it starts there too
        for step in range(start, plan.num_steps):
            assert model.session.step == start + reference.step == step
            assert relative_error(call(model, which, step), call(reference, which, step)) <= CLOSE
    with torch.no_grad():
        assert relative_error(call(model, which, 0), call(which.model, which, 0)) <= CLOSE


def test_a_reset_goes_back_to_the_first_step() -> None:
    """And a session of its own starts where it is told to."""
    which, plan = case("dit"), some_plan("fora")
    model = compiled(which, plan)
    first = call(model, which, 0)
    model.reset(start_step=3)
    assert model.session.step == 3
    assert model.program.bindings[0].tensors is not None
    assert len(model.program.bindings) == 3
    model.reset()
    assert torch.equal(call(model, which, 0), first)
    run = model.new_session(start_step=2)
    assert (run.step, run.num_steps) == (2, 6)
    run.run_step(2, *which.args)
    assert run.step == 3
    with pytest.raises(PlanError, match=r"start_step=6: the plan has steps 0\.\.5"):
        model.reset(start_step=6)
