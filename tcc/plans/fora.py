"""FORA: compute every N-th step, reuse every branch output in between."""

from __future__ import annotations

from typing import Literal

from tcc.errors import PlanError
from tcc.info import ModelInfo
from tcc.plan import CachePlan
from tcc.plans.branches import Kept, branch_plan, branch_sites
from tcc.plans.checks import check_whole
from tcc.plans.options import plain_options

__all__ = ["fora"]


@plain_options
def fora(
    info: ModelInfo,
    *,
    num_steps: int,
    interval: int = 3,
    sites: Kept = "out",
    count: Literal["down", "up"] = "down",
) -> CachePlan:
    """FORA (Selvaraju et al. 2024, arXiv 2407.01425): compute every `interval`-th step, reuse all branches in between.

    Attention and MLP alike: `f(x_t) = f(x_(t+k))`, t + k the last computed step; the gate is that of the step.

    Args:
        info: the model.
        num_steps: denoising steps.
        interval: steps from one computed step to the next, N in the paper.
        sites: `out` keeps the branch outputs before the gate (the paper; the gate is recomputed), `delta` after it.
        count: which steps are the N-th: `down`, where the index that counts down to 0 is a multiple of N, and the first
            step (the paper's code); `up`, every N-th from the first step on.

    Raises:
        PlanError: the interval is no whole number of at least 1, or another option is unknown.
    """
    check_whole("num_steps", num_steps, 1)
    check_whole("interval", interval, 1)
    if count not in ("down", "up"):
        raise PlanError(f"fora(count={count!r}): use 'down' or 'up'")
    start = (num_steps - 1) % interval if count == "down" else 0
    computed = {0, *range(start, num_steps, interval)}
    names = branch_sites(info, sites)
    cached = {(step, name) for step in range(num_steps) if step not in computed for name in names}
    policy = {"name": "fora", "interval": interval, "sites": sites, "count": count}
    return branch_plan(info, num_steps, names, cached, policy)
