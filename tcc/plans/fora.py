"""FORA: compute every N-th step, reuse every branch output in between."""

from __future__ import annotations

from typing import Literal

from tcc.errors import PlanError
from tcc.info import ModelInfo
from tcc.plan import Action, CachePlan, Compute, Reuse

__all__ = ["fora"]


def fora(info: ModelInfo, *, num_steps: int, interval: int = 3, sites: Literal["out", "delta"] = "out") -> CachePlan:
    """FORA (Selvaraju et al., 2024): compute every `interval`-th step, reuse all branch outputs in between.

    Steps are counted as in the paper's code: the descending index `num_steps - 1 - step` is a multiple of `interval`,
    or it is the first step.

    Args:
        info: the model.
        num_steps: denoising steps.
        interval: steps from one computed step to the next, N in the paper.
        sites: `out` keeps the branch outputs before the gate (the paper; the gate is recomputed), `delta` after it.

    Raises:
        PlanError: the interval is below 1, or the sites are unknown.
    """
    if interval < 1:
        raise PlanError(f"fora(interval={interval}): the interval is at least 1 (1 computes every step)")
    if sites not in ("out", "delta"):
        raise PlanError(f"fora(sites={sites!r}): use 'out' or 'delta'")
    computed = {s for s in range(num_steps) if s == 0 or (num_steps - 1 - s) % interval == 0}
    names = [name for name, site in info.sites.items() if site.kind == sites]
    actions: dict[tuple[int, str], Action] = {
        (step, name): Compute() if step in computed else Reuse() for step in range(num_steps) for name in names
    }
    policy = {"name": "fora", "interval": interval, "sites": sites}
    return info.count(CachePlan(num_steps=num_steps, actions=actions, policy=policy))
