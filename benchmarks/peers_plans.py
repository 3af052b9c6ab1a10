"""tcc's plans that do the work of peers: the same steps computed, the same values forecast: equal MACs and errors."""

from __future__ import annotations

import functools
from collections.abc import Callable

from tcc.info import ModelInfo
from tcc.plan import CachePlan
from tcc.plans.branches import branch_sites
from tcc.plans.forecast import forecast_actions
from tcc.plans.taylorseer import forecast_weights


def taylorseer(info: ModelInfo, *, num_steps: int, interval: int, order: int, attention: bool) -> CachePlan:
    """TaylorSeer as diffusers' hooks decide: steps 0 to 2 are computed, then 4 and every `interval`-th after it.

    Args:
        info: the model.
        num_steps: denoising steps.
        interval: steps from one computed step to the next.
        order: order of the series.
        attention: whether the outputs of attention alone are forecast, which is diffusers' default.
    """
    computed = [step for step in range(num_steps) if step < 3 or (step - 4) % interval == 0]
    names = [name for name in branch_sites(info, "out") if not attention or info.sites[name].attention]
    actions = forecast_actions(names, num_steps, computed, lambda past, step: forecast_weights(past, step, order))
    return info.count(CachePlan(num_steps, actions))


#: By name: those of the peers' rows, and whose steps they are.
ALIKE: dict[str, Callable[..., CachePlan]] = {
    f"TaylorSeer{what} N={interval} O={order}, diffusers' steps": functools.partial(
        taylorseer, interval=interval, order=order, attention=bool(what)
    )
    for what in (" attention", "")
    for interval, order in ((5, 1), (3, 2))
}
