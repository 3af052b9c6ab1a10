"""Plans that reuse or drop whole branches: what the policies of that kind share."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Sequence
from typing import Any, Literal

from tcc.errors import PlanError
from tcc.info import ModelInfo
from tcc.plan import Action, CachePlan, Compute, Reuse
from tcc.plans.checks import check_whole

__all__ = [
    "Kept",
    "block_sites",
    "branch_plan",
    "branch_sites",
    "i_steps_of_pairs",
    "p_steps",
]

REUSE = Reuse()
#: Which value of a branch is kept: its output before the gate, or what is added to the stream.
Kept = Literal["out", "delta"]


def p_steps(num_steps: int, interval: int) -> list[int]:
    """All steps but every `interval`-th, counted from the first.

    Raises:
        PlanError: one of them is no whole number of at least 1.
    """
    check_whole("num_steps", num_steps, 1)
    check_whole("interval", interval, 1)
    return [step for step in range(num_steps) if step % interval]


def branch_sites(info: ModelInfo, sites: Kept) -> list[str]:
    """The `out` or the `delta` sites of all branches, on all streams that pass through a block, in the model's order.

    Blocks that the main stream does not pass through (a refiner of the text) are left out.

    Raises:
        PlanError: `sites` is neither.
    """
    if sites not in ("out", "delta"):
        raise PlanError(f"sites={sites!r}: use 'out' (before the gate) or 'delta' (after it)")
    return [name for name, site in info.sites.items() if site.kind == sites and site.block < len(info.blocks)]


def block_sites(info: ModelInfo, blocks: Iterable[int]) -> list[str]:
    """What the blocks add to their streams: a delta per block and stream, or its branches' where it has none."""
    chosen = set(blocks)
    sites = [site for site in info.sites.values() if site.block in chosen and site.kind in ("block", "delta")]
    whole = {(site.block, site.stream) for site in sites if site.kind == "block"}
    return [site.name for site in sites if site.kind == "block" or (site.block, site.stream) not in whole]


def branch_plan(
    info: ModelInfo,
    num_steps: int,
    names: Sequence[str],
    cached: Collection[tuple[int, str]],
    policy: dict[str, Any],
    instead: Action = REUSE,
) -> CachePlan:
    """The counted plan that computes the sites `names` at every step, except at the (step, site) pairs in `cached`.

    Args:
        info: the model.
        num_steps: denoising steps.
        names: the sites that the plan names.
        cached: where another action than compute is taken.
        policy: the policy's name and options.
        instead: that action.
    """
    check_whole("num_steps", num_steps, 1)
    actions: dict[tuple[int, str], Action] = {
        (step, name): instead if (step, name) in cached else Compute() for step in range(num_steps) for name in names
    }
    return info.count(CachePlan(num_steps=num_steps, actions=actions, policy=policy))


def i_steps_of_pairs(num_steps: int, shifted: bool = False) -> tuple[int, ...]:
    """The I-steps of Learning-to-Cache's schedule (Ma et al. 2024, Algorithm 2 and appendix B.1).

    Steps come in pairs, a full one and then one that may reuse. In the paper's code the index that counts down to 0 is
    odd at I-steps and even at P-steps. The first step is always full, for nothing is stored before it.

    Args:
        num_steps: denoising steps; for a solver that evaluates the model twice per step, evaluations.
        shifted: the schedule of DPM-Solver-2. Its two evaluations of a solver step form a derivative, which one stale
            value would spoil; so the first evaluation of a solver step reuses the last one of the step before.

    Raises:
        PlanError: `num_steps` is no whole number of at least 1, or is odd where `shifted`.
    """
    check_whole("num_steps", num_steps, 1)
    if shifted and num_steps % 2:
        raise PlanError(f"shifted=True: DPM-Solver-2 takes two evaluations per solver step, got num_steps={num_steps}")
    parity = 1 if shifted else num_steps % 2
    return tuple(step for step in range(num_steps) if step == 0 or step % 2 == parity)
