"""The uncached model, as a plan."""

from __future__ import annotations

from tcc.info import ModelInfo
from tcc.plan import CachePlan
from tcc.plans.checks import check_whole
from tcc.plans.options import plain_options

__all__ = ["full"]


@plain_options
def full(info: ModelInfo, *, num_steps: int) -> CachePlan:
    """Compute everything at every step: the uncached model, as a plan.

    Of no paper: what all methods are compared with.

    Args:
        info: the model.
        num_steps: denoising steps.

    Raises:
        PlanError: `num_steps` is no whole number of at least 1.
    """
    check_whole("num_steps", num_steps, 1)
    return info.count(CachePlan(num_steps=num_steps, actions={}, policy={"name": "full"}))
