"""A peer's decisions as a plan of tcc: the same values computed, reused or forecast at the same steps.

What a cache decided is read off the arithmetic of its eager run, step by step, whatever made it decide so. A plan fixes
these decisions for every run: caches with an error threshold take them anew from the data.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

from tcc.errors import PlanError
from tcc.info import ModelInfo
from tcc.plan import CachePlan, Compute, Reuse
from tcc.plans.branches import block_sites, branch_sites
from tcc.plans.forecast import forecast_actions
from tcc.plans.taylorseer import forecast_weights

#: The plan that repeats a peer's decisions, given the MACs and the timestep of every step of its run.
Twin = Callable[[ModelInfo, Sequence[float], Sequence[float]], CachePlan]
ALL_BUT_NOISE = 0.01  # of a step's MACs: what a cache adds by itself is less, what it saves is more


def taylorseer(info: ModelInfo, macs: Sequence[float], _: Sequence[float], *, order: int, attention: bool) -> CachePlan:
    """Branch outputs are forecast: of all branches, or of attention alone, which is diffusers' default."""
    names = [name for name in branch_sites(info, "out") if not attention or info.sites[name].attention]
    return _forecast(info, names, macs, order)


def blocks(info: ModelInfo, macs: Sequence[float], _: Sequence[float], *, first: int, order: int = 0) -> CachePlan:
    """What all blocks from number `first` on add to the stream is reused, or forecast by a series of that order."""
    return _forecast(info, block_sites(info, range(first, len(info.blocks))), macs, order)


def broadcast(
    info: ModelInfo, macs: Sequence[float], timesteps: Sequence[float], *, interval: int, cross: int | None = None
) -> CachePlan:
    """Attention outputs are reused where diffusers' PyramidAttentionBroadcast does: at timesteps from 100 to 800."""
    own = branch_sites(info, "out")
    kinds = {name: cross if ".cross." in name else interval for name in own if _attends(info, name)}
    actions = {
        (step, name): Reuse() if every and step % every and 100 < timesteps[step] < 800 else Compute()
        for name, every in kinds.items()
        for step in range(len(macs))
    }
    return info.count(CachePlan(len(macs), actions))


def computed_steps(macs: Sequence[float]) -> list[int]:
    """The steps that did all of their work.

    Raises:
        PlanError: all steps did.
    """
    most, least = max(macs), min(macs)
    if most - least < ALL_BUT_NOISE * most:
        raise PlanError("it computed every step: there is no decision to repeat")
    return [step for step, count in enumerate(macs) if count > (most + least) / 2]


def _forecast(info: ModelInfo, names: Sequence[str], macs: Sequence[float], order: int) -> CachePlan:
    computed = computed_steps(macs)
    actions = forecast_actions(names, len(macs), computed, lambda past, step: forecast_weights(past, step, order))
    return info.count(CachePlan(len(macs), actions))


def _attends(info: ModelInfo, name: str) -> bool:
    return bool(info.sites[name].attention) or ".cross." in name
