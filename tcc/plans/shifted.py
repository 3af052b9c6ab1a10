"""Plans for solvers that evaluate the model more than once per step."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from tcc.errors import PlanError
from tcc.info import ModelInfo
from tcc.plan import COMPUTE, Action, CachePlan, Reuse
from tcc.plans.placement import first_evaluations

__all__ = ["shifted"]


def shifted(info: ModelInfo, plan: CachePlan, *, stages: Sequence[int] | None = None) -> CachePlan:
    """The plan for a solver whose evaluations form derivatives: only first evaluations of a solver step cache anything.

    One stale value spoils the difference of the two evaluations of a step. So a P-step that falls on a second
    evaluation moves to the next one, which begins a solver step (Learning-to-Cache, Ma et al. 2024, appendix B.1: of 50
    evaluations 24 cache, and of 20 evaluations 9). Where that is a P-step itself, it stays what it is. It is for plans
    of any policy with as many steps as the run has evaluations; `l2c` has an option for routers that were trained so.

    Args:
        info: the model of the plan.
        plan: a plan for the run, made as for a solver of one evaluation per step.
        stages: which evaluation of its solver step each evaluation is, `Evaluation.stage` of a sampler; by default
            0, 1, 0, 1, ...: two per step.

    Raises:
        PlanError: the plan forecasts, has another number of steps than `stages`, or an odd one without `stages`.
    """
    if stages is None and plan.num_steps % 2:
        raise PlanError(
            f"the plan has {plan.num_steps} steps, and a solver of two evaluations per step takes an even number: give "
            "one, or the sampler's own stages"
        )
    counts = list(stages) if stages is not None else [step % 2 for step in range(plan.num_steps)]
    if len(counts) != plan.num_steps:
        raise PlanError(f"the plan has {plan.num_steps} steps, and the solver {len(counts)} evaluations")
    before = set(range(plan.num_steps)) - set(plan.schedule.i_steps)
    actions: dict[tuple[int, str], Action] = dict.fromkeys(
        ((step, site) for step in range(plan.num_steps) for site in plan.sites), COMPUTE
    )
    for step in first_evaluations(before, counts):
        source = step if step in before else step - 1
        actions |= {(step, site): plan.action(source, site) for site in plan.sites}
    for (step, site), action in actions.items():
        if isinstance(action, Reuse) and action.order:
            raise PlanError(
                f"step {step}, site '{site}': a forecast's coefficients hold for the steps that it was made from: "
                "shift a plan that reuses with order=0"
            )
    return info.count(replace(plan, actions=actions, policy={**plan.policy, "shifted": True}, cost=None))
