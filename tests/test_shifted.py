"""Plans for solvers of two evaluations per step."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import tcc
from tcc import plans
from tcc.errors import PlanError
from tcc.plan import CachePlan, Reuse, Update
from tcc.samplers import DPMSolver2, dpm_solver_2s
from tcc.train.predictors import Sizes, TablePredictor
from tcc.train.weights import TokenWeights
from tests.test_train_recipes import seeded
from tests.tiny_models import case, relative_error, tensor_of


def made(policy: str, num_steps: int, **options: Any) -> CachePlan:
    """A policy's plan, shifted."""
    info = case("dit").info
    return plans.shifted(info, plans.POLICIES[policy](info, num_steps=num_steps, **options))


@pytest.mark.parametrize("count_from", ["up", "down"])
@pytest.mark.parametrize(("nfe", "count"), [(50, 24), (20, 9)])
def test_every_cached_evaluation_is_the_first_of_a_solver_step(nfe: int, count: int, count_from: str) -> None:
    """As published: 24 of 50, 9 of 20. FORA's table is Learning-to-Cache's with all branches reused."""
    plan = made("fora", nfe, interval=2, count=count_from)
    stages = [e.stage for e in DPMSolver2().evaluations(nfe)]
    cached = [step for step in range(nfe) if step not in plan.schedule.i_steps]

    assert len(cached) == count
    assert not any(stages[step] for step in cached)
    assert plan.schedule.i_steps == plans.i_steps_of_pairs(nfe, shifted=True)
    assert all(plan.action(step, site) == Reuse() for step in cached for site in plan.sites)
    assert plan.policy["shifted"] is True
    assert plans.shifted(case("dit").info, plan).actions == plan.actions


@pytest.mark.parametrize(
    ("policy", "options"),
    [
        ("fora", {"interval": 3}),
        ("tprr", {"k1": 2, "k2": 1, "keep": 0.5, "attention": "cached"}),
        ("toca", {"interval": 3}),
        ("deepcache", {"interval": 2}),
    ],
)
def test_plans_of_any_policy_shift(policy: str, options: dict[str, Any]) -> None:
    """Token sets, scores and holds go along: what is compiled is what the reference computes."""
    which = case("dit")
    plan = made(policy, 6, **options)

    assert plan.schedule.letters in ("IIPIPI", "IIIIPI", "IIPIII")
    compiled = tcc.compile(which.model, plan, backend="eager")
    reference = tcc.Reference(which.model, plan)
    for step in range(6):
        args, kwargs = which.inputs(step)
        with torch.no_grad():
            assert relative_error(tensor_of(compiled(*args, **kwargs)), tensor_of(reference(*args, **kwargs))) < 1e-4


def test_learned_tokens_go_along() -> None:
    """What was learned for an evaluation is kept at it: the steps between have the importance of the later one."""
    info, steps = case("dit").info, 8
    stages = [e.stage for e in DPMSolver2().evaluations(steps)]
    choices = {step: ["blocks.0.mlp.out", "blocks.1.mlp.out"] for step in range(2, steps) if not stages[step]}
    weights = TokenWeights(TablePredictor(Sizes.of(info, steps)), info, choices)
    with torch.no_grad():
        for step in choices:
            weights.predictor.table[step] = torch.randn(weights.predictor.table[step].shape, generator=seeded(step))
    taught = weights.predictor.importance().scores
    plan = plans.tokencache(info, num_steps=steps, importance=weights.learned(), k1=2, k2=2, keep=0.5, select="global")
    shifted = plans.shifted(info, plan, stages=stages)
    for step in choices:
        (tokens,) = {a.tokens for name, a in shifted.at(step).items() if isinstance(a, Update) and name[7] == "0"}
        expected = taught[step].mean(0).topk(8).indices.sort().values
        assert torch.equal(shifted.tokens[str(tokens)], expected), step


def test_a_samplers_own_stages_count() -> None:
    """The singlestepstep solver ends with steps of one evaluation: both may cache."""
    pytest.importorskip("diffusers")
    info = case("dit").info
    stages = [e.stage for e in dpm_solver_2s().evaluations(6)]
    plan = plans.shifted(info, plans.fora(info, num_steps=6, interval=6, count="up"), stages=stages)

    assert stages == [0, 1, 0, 1, 0, 0]
    assert plan.schedule.letters == "IIPIPP"
    fora = plans.fora(info, num_steps=6, interval=3)
    assert plans.shifted(info, fora, stages=[0] * 6).actions == fora.actions


def test_what_cannot_be_shifted_is_refused() -> None:
    """Forecasts, and another number of evaluations: of two per step, an odd one."""
    info = case("dit").info
    with pytest.raises(PlanError, match="a forecast's coefficients hold for the steps that it was made from"):
        plans.shifted(info, plans.taylorseer(info, num_steps=12, interval=3, order=1))
    with pytest.raises(PlanError, match="the plan has 4 steps, and the solver 6 evaluations"):
        plans.shifted(info, plans.fora(info, num_steps=4), stages=[0, 1] * 3)
    with pytest.raises(PlanError, match="the plan has 5 steps, and a solver of two evaluations per step takes an even"):
        made("fora", 5)
    assert plans.shifted(info, plans.fora(info, num_steps=5), stages=[0, 1, 0, 1, 0]).num_steps == 5
