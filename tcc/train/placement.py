"""Search where the I-steps of a schedule stand: the images themselves say which placement is better."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass

from torch import Tensor

from tcc.driver import CompiledModel
from tcc.errors import PlanError
from tcc.metrics import psnr
from tcc.plan import CachePlan
from tcc.plans.checks import check_i_steps
from tcc.samplers import sample

__all__ = ["Placement", "image_quality", "search_steps"]

#: How far a step is moved at a time; the rest of the moves take it anywhere.
NEAR, NEAR_SHARE = 3, 0.8

Steps = tuple[int, ...]


@dataclass(frozen=True)
class Placement:
    """What a search found.

    Attributes:
        i_steps: the best placement.
        quality: its quality, in the units of the measure (dB for `image_quality`).
        start: the quality of the placement that the search started from.
        evaluations: how many placements were measured.
    """

    i_steps: Steps
    quality: float
    start: float
    evaluations: int


def search_steps(
    quality: Callable[[Steps], float],
    start: Steps,
    *,
    num_steps: int,
    evaluations: int = 300,
    seed: int = 0,
    progress: Callable[[int, float], None] | None = None,
) -> Placement:
    """Move one I-step at a time, and keep what makes the quality higher (ProCache searches schedules in this spirit).

    The first step stays an I-step, and their number stays the same. A placement is measured once.

    Args:
        quality: measures a placement; higher is better.
        start: the placement to start from.
        num_steps: denoising steps.
        evaluations: how many placements to measure.
        seed: seed of the moves.
        progress: called with the number of placements measured and the best quality so far.

    Raises:
        PlanError: the start is no placement, or its quality is not finite.
    """
    best = check_i_steps("start", start, num_steps)
    first = found = quality(best)
    if found != found:
        raise PlanError("the quality of the first placement is not a number: look at the images it makes")
    seen, moves, done = {best}, _moves(num_steps, seed), 1
    for _ in range(evaluations * 100):  # small searches run out of new placements before they run out of evaluations
        if done >= evaluations or not 1 < len(best) < num_steps:
            break
        candidate = _moved(best, next(moves), num_steps)
        if candidate is None or candidate in seen:
            continue
        seen.add(candidate)
        reached, done = quality(candidate), done + 1
        if reached > found:
            best, found = candidate, reached
        if progress is not None:
            progress(done, found)
    return Placement(best, found, first, done)


def _moves(num_steps: int, seed: int) -> Iterator[tuple[float, int]]:
    """Endless moves: which I-step (as a share of them), and how many steps it goes."""
    rng = random.Random(seed)
    near = [d for d in range(-NEAR, NEAR + 1) if d]
    while True:
        yield rng.random(), rng.choice(near) if rng.random() < NEAR_SHARE else rng.randrange(1, num_steps)


def _moved(steps: Steps, move: tuple[float, int], num_steps: int) -> Steps | None:
    share, by = move
    chosen = steps[1 + int(share * (len(steps) - 1))]
    place = (chosen + by) % num_steps
    return None if place in steps else tuple(sorted({*steps, place} - {chosen}))


def image_quality(
    model: CompiledModel,
    policy: Callable[[Steps], CachePlan],
    noise: Tensor,
    labels: Tensor,
    expected: Tensor,
    **options: object,
) -> Callable[[Steps], float]:
    """A measure for `search_steps`: mean PSNR in dB of the final images against the uncached ones in the same noise.

    Args:
        model: the model compiled for any plan; every placement shares its capture and its variants.
        policy: from a placement to a plan.
        noise: `[B, C, H, W]`.
        labels: `[B]`.
        expected: the uncached images `[B, C, H, W]`, in [-1, 1].
        options: of `tcc.samplers.sample`.
    """

    def quality(steps: Steps) -> float:
        plan = policy(steps)
        images = sample(model.with_plan(plan), noise, labels, num_steps=plan.num_steps, **options)  # type: ignore[arg-type]
        return float(psnr(images, expected).clamp(max=140).mean())  # equal images say no more than nearly equal ones

    return quality
