"""Polynomial forecasts: what the blocks add to the stream is extrapolated between the computed steps."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from typing import Literal

from tcc.errors import PlanError
from tcc.info import ModelInfo
from tcc.plan import Action, CachePlan, Compute, Reuse
from tcc.plans.branches import block_sites, branch_sites
from tcc.plans.checks import check_i_steps, check_whole
from tcc.plans.options import plain_options

__all__ = ["even_steps", "forecast", "forecast_actions", "polynomial_weights"]


def even_steps(num_steps: int, count: int) -> tuple[int, ...]:
    """`count` steps spread evenly from the first to the last.

    Raises:
        PlanError: there are not so many steps.
    """
    check_whole("i_steps", count, 1, num_steps)
    return tuple(round(i * (num_steps - 1) / max(1, count - 1)) for i in range(count))


def polynomial_weights(computed: Sequence[int], step: int, order: int) -> tuple[float, ...]:
    """What the polynomial through the last `order + 1` computed values weighs them with at `step`, newest first.

    Lagrange's form; the same extrapolation as Newton's backward differences, and as the Adams-Bashforth solvers use.
    TaylorSeer's series (`forecast_weights`) lacks the mixed products of Newton's form, so from order 2 on it misses
    polynomials that this one meets.

    Args:
        computed: the steps computed so far, ascending.
        step: the step that is forecast.
        order: the polynomial's order; lower where fewer values were computed.
    """
    points = list(computed)[::-1][: order + 1]
    return tuple(math.prod((step - b) / (a - b) for b in points if b != a) for a in points)


@plain_options
def forecast(
    info: ModelInfo,
    *,
    num_steps: int,
    i_steps: Sequence[int] | int,
    order: int = 2,
    level: Literal["block", "branch", "out"] = "block",
) -> CachePlan:
    """Forecast between freely placed I-steps, by a polynomial in the step number.

    `f(s) = sum_j f(j) prod_(b != j) (s - b) / (j - b)`, j and b the last `order + 1` I-steps. It is TaylorSeer (Liu et
    al. 2025, arXiv 2503.06923) with three changes of tcc's own: the extrapolation is exact for polynomials (see
    `polynomial_weights`), the I-steps may stand anywhere (`tcc train steps` searches where), and by default the value
    that is forecast is the change of the whole stream, one slot and one history for all blocks together: a P-step then
    costs what stands before and after the blocks. Forecasting that change is close to what a multistep solver does with
    the model's output.

    Args:
        info: the model.
        num_steps: denoising steps.
        i_steps: the steps that compute everything, the first among them; or how many, spread evenly.
        order: the polynomial's order; 0 reuses the last value. The first P-steps have what the computed values allow.
        level: `block` forecasts the change of the stream, `branch` every branch's change, `out` every branch's output
            before its gate, which is then recomputed.

    Raises:
        PlanError: an option is out of range.
    """
    check_whole("num_steps", num_steps, 1)
    if isinstance(i_steps, Iterable):
        computed = check_i_steps("i_steps", i_steps, num_steps)
    else:
        computed = even_steps(num_steps, i_steps)
    check_whole("order", order, 0)
    actions = forecast_actions(
        _names(info, level), num_steps, computed, lambda past, step: polynomial_weights(past, step, order)
    )
    policy = {"name": "forecast", "i_steps": list(computed), "order": order, "level": level}
    return info.count(CachePlan(num_steps=num_steps, actions=actions, policy=policy))


def forecast_actions(
    names: Sequence[str],
    num_steps: int,
    computed: Sequence[int],
    weigh: Callable[[Sequence[int], int], Sequence[float]],
) -> dict[tuple[int, str], Action]:
    """The table of a plan that forecasts the sites `names` at every step that is not computed.

    Args:
        names: the sites.
        num_steps: denoising steps.
        computed: the steps that compute, ascending.
        weigh: the weights of the last computed values, newest first, given the steps computed so far and the step.
    """
    actions: dict[tuple[int, str], Action] = {}
    for step in range(num_steps):
        action: Action = Compute()
        if step not in computed:
            weights = tuple(weigh([s for s in computed if s < step], step))
            action = Reuse(len(weights) - 1, weights) if len(weights) > 1 else Reuse()
        actions |= {(step, name): action for name in names}
    return actions


def _names(info: ModelInfo, level: str) -> list[str]:
    """The sites of a level, on all streams; a block without a change of its own is forecast branch by branch."""
    if level not in ("block", "branch", "out"):
        raise PlanError(f"level={level!r}: use 'block', 'branch' or 'out'")
    if level != "block":
        return branch_sites(info, "out" if level == "out" else "delta")
    return block_sites(info, range(len(info.blocks)))
