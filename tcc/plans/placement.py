"""Where the I-steps are: schedules of token plans."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import Literal, get_args

import torch

from tcc.errors import PlanError
from tcc.plans.checks import check_known, check_share, check_whole

__all__ = ["Cycle", "first_evaluations", "percentile_steps", "step_means", "tprr_steps"]

Cycle = Literal["p_steps", "length"]


def tprr_steps(num_steps: int, k1: int, k2: int, boundary: float, cycle: Cycle = "p_steps") -> tuple[int, ...]:
    """The I-steps of the two-phase round-robin schedule (TokenCache, Lou et al. 2024, arXiv 2409.18523, section TPRR).

    Args:
        num_steps: denoising steps.
        k1: caching interval of the first phase (noisy steps, large).
        k2: caching interval of the second phase.
        boundary: the share of the steps that the first phase takes, 0..1.
        cycle: how to read the interval: `p_steps`, K P-steps after each I-step; `length`, one I-step every K steps.

    Raises:
        PlanError: the number of steps, an interval or the boundary is out of range, or there is no such cycle.
    """
    check_known("cycle", cycle, get_args(Cycle))
    check_whole("num_steps", num_steps, 1)
    for name, interval in (("k1", k1), ("k2", k2)):
        check_whole(name, interval, 0 if cycle == "p_steps" else 1)
    check_share("boundary", boundary)
    k1, k2 = int(k1), int(k2)  # the steps are Python's numbers, whichever these are
    steps, step = [], 0
    while step < num_steps:
        steps.append(step)
        k = k1 if step < round(boundary * num_steps) else k2
        step += k + 1 if cycle == "p_steps" else k
    return tuple(steps)


def percentile_steps(importance: torch.Tensor, count: int) -> tuple[int, ...]:
    """I-steps at uniform percentiles of the cumulative importance (the revised TokenCache paper, 2025).

    The j-th I-step is the first step before which a share j / count of all importance lies, so the stretches between
    I-steps weigh alike: where importance is dense, they are short. Where one step outweighs a stretch, the next free
    step is taken. The first step always computes everything and nothing is learned for it: it counts as much as the
    second.

    Args:
        importance: `[steps]`, the mean importance of every step; not negative.
        count: how many I-steps.

    Raises:
        PlanError: the count is not in 1..steps, or the importances are negative, not finite, or all zero.
    """
    steps = importance.numel()
    check_whole("i_steps", count, 1, steps)
    mass = importance.detach().double().cpu().clone()
    mass[0] = mass[min(1, steps - 1)]
    if not bool(torch.isfinite(mass).all()) or bool((mass < 0).any()) or not bool(mass.any()):
        raise PlanError("I-steps are placed by importances that are finite, not negative, and not all zero")
    before = (mass.cumsum(0) - mass) / mass.sum()
    chosen: list[int] = []
    for j in range(count):
        first = int(torch.searchsorted(before, j / count - 1e-9))
        free = max(first, chosen[-1] + 1 if chosen else 0)
        chosen.append(min(free, steps - count + j))
    return tuple(chosen)


def step_means(importance: torch.Tensor) -> torch.Tensor:
    """The mean importance of every step, `[steps]`: what `percentile_steps` places I-steps by.

    An importance that was held at a mean while it was learned has the same mean at every step, but for rounding, and
    percentiles of that would be percentiles of rounding errors. What counts as rounding: numbers of a dtype are off by
    a relative eps / 2 at most, and so are their means, which then differ by eps. The dtype is the coarsest that has all
    of the numbers, since files may be of half precision; training is in float32, and holds a mean to some eps of that.

    Args:
        importance: `[steps, blocks, tokens]`.

    Raises:
        PlanError: the means are equal, within rounding; the first step does not count.
    """
    means = importance.detach().double().cpu().mean(dim=(1, 2))
    coarse = (torch.bfloat16, torch.float16)
    held = [torch.finfo(dtype).eps for dtype in coarse if torch.equal(importance.to(dtype).to(importance), importance)]
    tolerance = max([16 * torch.finfo(torch.float32).eps, *held])
    learned = means[1:]
    if learned.numel() > 1 and float(learned.max() - learned.min()) <= tolerance * float(learned.max()):
        raise PlanError(
            f"schedule='percentile': the importance is {float(learned[0]):.4g} on average at every step, so it does "
            "not say where I-steps should be. One that is learned with `tcc train predictor --target` is held at that; "
            "learn it with a price (`--lambda`), so that steps differ, or use schedule='tprr' or 'even'"
        )
    return means


def first_evaluations(p_steps: Collection[int], stages: Sequence[int]) -> tuple[int, ...]:
    """The P-steps of a solver that takes several evaluations per step (Learning-to-Cache, appendix B.1): see `shifted`.

    Args:
        p_steps: the P-steps, as of a solver of one evaluation per step.
        stages: which evaluation of its solver step each evaluation is, 0 the first.
    """
    return tuple(
        step
        for step in range(1, len(stages))
        if stages[step] == 0 and (step in p_steps or (stages[step - 1] > 0 and step - 1 in p_steps))
    )
