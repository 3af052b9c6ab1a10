"""TaylorSeer: compute every N-th step, forecast every branch output in between by a Taylor series."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np

from tcc.info import ModelInfo
from tcc.plan import CachePlan
from tcc.plans.branches import Kept, branch_sites
from tcc.plans.checks import check_whole
from tcc.plans.forecast import forecast_actions
from tcc.plans.options import plain_options

__all__ = ["forecast_weights", "taylorseer", "taylorseer_steps"]


def taylorseer_steps(num_steps: int, interval: int, first_full: int = 2) -> tuple[int, ...]:
    """The computed steps of TaylorSeer: the first `first_full`, then every `interval`-th after the last of them."""
    return (*range(min(first_full, num_steps)), *range(first_full - 1 + interval, num_steps, interval))


def forecast_weights(computed: Sequence[int], step: int, order: int) -> tuple[float, ...]:
    """What a Taylor forecast at `step` weighs the last computed values with, newest value first.

    TaylorSeer (Liu et al. 2025, arXiv 2503.06923), the prediction F(x_{t-k}) = sum_i D^i F(x_t) (-k)^i / (i! N^i) with
    the finite differences D^i F. The interval N is that of the two newest computed steps when a difference is taken,
    as in the published code; so it holds for unequal intervals too.

    Args:
        computed: the steps computed so far, ascending.
        step: the step that is forecast.
        order: the order m of the series; as many weights as it needs values, m + 1, or one per computed step where
            fewer were computed.
    """
    derivatives: list[np.ndarray] = []  # row i: the i-th derivative, as weights of all computed values, oldest first
    for number, at in enumerate(computed):
        value = np.eye(len(computed))[number]
        updated = [value]
        for older in derivatives[:order]:
            updated.append((updated[-1] - older) / (at - computed[number - 1]))
        derivatives = updated
    ahead = step - computed[-1]
    weights = sum(row * ahead**i / math.factorial(i) for i, row in enumerate(derivatives))
    return tuple(float(w) for w in np.asarray(weights)[::-1][: order + 1])


@plain_options
def taylorseer(
    info: ModelInfo,
    *,
    num_steps: int,
    interval: int = 3,
    order: int = 2,
    first_full: int = 2,
    sites: Kept = "out",
) -> CachePlan:
    """TaylorSeer (Liu et al. 2025, arXiv 2503.06923): branch outputs are forecast between computed steps.

    The forecast is a Taylor series in the step number, `F(x_(t-k)) = sum_i D^i F(x_t) (-k)^i / (i! N^i)` with i = 0..O
    and the finite differences D^i F of the last computed values (see `forecast_weights`). Before `order + 1` steps have
    been computed, its order is the highest that the computed values allow, as in the published code. Its weights are
    known when the plan is made and are inputs of the graph: steps forecast with one order share a variant.

    Args:
        info: the model.
        num_steps: denoising steps.
        interval: steps from one computed step to the next, N in the paper.
        order: order of the series, O in the paper; 0 reuses the last value.
        first_full: steps that are computed before the first interval. Published code takes no differences before the
            last two of them: from 3 on, the first forecasts have a higher order here.
        sites: `out` keeps the branch outputs before the gate (the paper; the gate is recomputed), `delta` after it.

    Raises:
        PlanError: an option is out of range.
    """
    check_whole("num_steps", num_steps, 1)
    check_whole("interval", interval, 1)
    check_whole("order", order, 0)
    check_whole("first_full", first_full, 1)
    computed = taylorseer_steps(num_steps, interval, first_full)
    names = branch_sites(info, sites)
    actions = forecast_actions(names, num_steps, computed, lambda past, step: forecast_weights(past, step, order))
    policy = {"name": "taylorseer", "interval": interval, "order": order, "first_full": first_full, "sites": sites}
    return info.count(CachePlan(num_steps=num_steps, actions=actions, policy=policy))
