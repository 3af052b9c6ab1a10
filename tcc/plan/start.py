"""A plan for runs that begin in the middle of its schedule, as image-to-image does."""

from __future__ import annotations

from dataclasses import replace

from tcc.errors import PlanError
from tcc.plan.actions import Action, Compute, Reuse, Skip
from tcc.plan.plan import CachePlan

__all__ = ["check_start", "start_at"]


def check_start(step: int, num_steps: int | None) -> None:
    """Check that a plan of so many steps, or one that is not made yet, can have the step `step`.

    Raises:
        PlanError: it cannot.
    """
    if not isinstance(step, int) or isinstance(step, bool):
        raise PlanError(f"start_step={step!r}: a step is a whole number")
    if step < 0 or (num_steps is not None and step >= num_steps):
        last = "" if num_steps is None else num_steps - 1
        raise PlanError(f"start_step={step}: the plan has steps 0..{last}")


def start_at(plan: CachePlan, step: int) -> CachePlan:
    """The steps of `plan` from `step` on, as a plan of its own, numbered from 0.

    Nothing is stored when such a run begins. So its first step computes every site of the plan that it does not skip; a
    later read of a site that was not computed since computes it; and a forecast whose values are not those of
    the whole plan, because some would come from before the start, reuses the newest value instead.

    Raises:
        PlanError: the plan has no such step.
    """
    check_start(step, plan.num_steps)
    if step == 0:
        return plan
    actions = {
        (at - step, site): action for site in plan.sites for at, action in _column(plan, site, step) if at >= step
    }
    return replace(plan, num_steps=plan.num_steps - step, actions=actions, cost=None)


def _column(plan: CachePlan, site: str, start: int) -> list[tuple[int, Action]]:
    """The actions of `site` from step `start` on, such that every value read was computed from then on."""
    planned: list[int] = []
    computed: list[int] = []
    column: list[tuple[int, Action]] = []
    for at, action in plan.column(site):
        if at >= start:
            column.append((at, _possible(action, planned, computed)))
            if isinstance(column[-1][1], Compute):
                computed.append(at)
        if isinstance(action, Compute):
            planned.append(at)
    return column


def _possible(action: Action, planned: list[int], computed: list[int]) -> Action:
    """`action`, or what stands in for it where `computed` are the steps at which there was a value to store."""
    if isinstance(action, (Compute, Skip)):
        return action
    if not computed:
        return Compute()
    depth = action.order + 1 if isinstance(action, Reuse) else 1
    return Reuse() if depth > 1 and planned[-depth:] != computed[-depth:] else action
