"""Plans that keep one value for a whole run of blocks: Delta-DiT, DeepCache and Faster Diffusion."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import numpy as np

from tcc.errors import PlanError
from tcc.info import ModelInfo
from tcc.plan import Action, CachePlan, Compute, Hold, Reuse
from tcc.plans.branches import block_sites
from tcc.plans.checks import check_i_steps, check_number, check_share, check_whole
from tcc.plans.options import plain_options

__all__ = ["deepcache", "deepcache_steps", "delta_dit", "faster_diffusion"]

#: The key steps of Faster Diffusion for 50 DDIM steps, from its code.
KEY_STEPS = (0, 1, 2, 3, 5, 10, 15, 25, 35)
#: The largest exponent of DeepCache's schedule: the search for distinct steps starts there. The paper's are below 2.
MAX_POWER = 10


@plain_options
def delta_dit(
    info: ModelInfo, *, num_steps: int, interval: int = 2, span: int | None = None, boundary: float = 0.5
) -> CachePlan:
    r"""Delta-DiT (Chen et al. 2024, arXiv 2406.01125): what a run of blocks adds to the stream is kept, as one value.

    Delta-Cache of section 3: F(x_t) = x_t + delta for the blocks in the run. Rear blocks make details and are kept in
    the first phase, when the image gets its outlines; front blocks make outlines and are kept in the second.

    Args:
        info: the model.
        num_steps: denoising steps.
        interval: one step in so many computes everything, N in the paper.
        span: how many blocks are kept, N_c in the paper: the first or the last so many. Half of them, if None.
        boundary: share of steps in the first phase (the paper's b, as a share).

    Raises:
        PlanError: an option is out of range, or a block has no delta.
    """
    blocks = len(info.blocks)
    span = max(1, blocks // 2) if span is None else span
    check_whole("num_steps", num_steps, 1)
    check_whole("interval", interval, 1)
    check_whole("span", span, 1, blocks)
    check_share("boundary", boundary)
    front, rear = block_sites(info, range(span)), block_sites(info, range(blocks - span, blocks))
    actions: dict[tuple[int, str], Action] = {}
    for step in range(num_steps):
        kept = rear if step < round(boundary * num_steps) else front
        for name in dict.fromkeys([*front, *rear]):
            actions[step, name] = Reuse() if step % interval and name in kept else Compute()
    policy = {"name": "delta_dit", "interval": interval, "span": span, "boundary": boundary}
    return info.count(CachePlan(num_steps=num_steps, actions=actions, policy=policy))


def deepcache_steps(num_steps: int, interval: int, center: int | None = None, power: float = 1.2) -> tuple[int, ...]:
    """The computed steps of DeepCache (Ma et al. 2024, arXiv 2312.00858, section 3.4).

    Args:
        num_steps: denoising steps.
        interval: N in the paper. Uniform: every N-th step, from the first.
        center: where computed steps are dense, for the non-uniform schedule: as many steps as the uniform one has, at
            distances from the centre that grow by a power law. None for the uniform schedule.
        power: the exponent, above 1 and up to 10; lowered by 0.02 until the steps are distinct, as in the published
            code.

    Raises:
        PlanError: an option is out of range, or no exponent gives distinct steps.
    """
    check_whole("num_steps", num_steps, 1)
    check_whole("interval", interval, 1)
    check_number("power", power, 1, MAX_POWER)
    if center is not None:
        check_whole("center", center, 0, num_steps - 1)
    uniform = tuple(range(0, num_steps, interval))
    if center is None:
        return uniform
    while power > 1:
        steps = _around(num_steps, len(uniform), center, power)
        if len(steps) == len(uniform):
            return steps
        power -= 0.02
    raise PlanError(
        f"deepcache(interval={interval}, center={center}): no power law has so many distinct steps around it"
    )


def _around(num_steps: int, count: int, center: int, power: float) -> tuple[int, ...]:
    """`x ** power + center` for x on a line; below the centre x is complex in the published code, and so it is here."""
    line = np.linspace(complex(-center) ** (1 / power), (num_steps - center) ** (1 / power), count + 1)
    offsets = np.unique((line**power).real.astype(np.int64))
    return (0, *(int(x) + center for x in offsets[1:-1]))


@plain_options
def deepcache(
    info: ModelInfo,
    *,
    num_steps: int,
    interval: int = 5,
    rear: int = 1,
    center: int | None = None,
    power: float = 1.2,
) -> CachePlan:
    """DeepCache (Ma et al. 2024, arXiv 2312.00858): the stream that enters the last blocks is held between full steps.

    `u(t) = u(t + k)`, u that stream, t + k the last full step; section 3.4 says where those are (`deepcache_steps`).
    What only fed the held stream is not computed. In a U-shaped model the last blocks also take long skips, so the
    blocks that those come from are computed at every step, as in the paper; in others all blocks before are left out.
    Where `rear` reaches beyond the blocks that take skips, a skip that is the held stream is held for all its readers.

    Args:
        info: the model.
        num_steps: denoising steps.
        interval: one step in so many computes everything, N in the paper.
        rear: how many blocks at the end every step computes; the paper's branch number plus one.
        center: where full steps are dense; see `deepcache_steps`. The schedule is uniform, if None.
        power: the exponent of the schedule around a centre.

    Raises:
        PlanError: an option is out of range.
    """
    if len(info.blocks) < 2:
        raise PlanError("deepcache needs a model of at least two blocks: some are held, and some computed")
    check_whole("rear", rear, 1, len(info.blocks) - 1)
    computed = deepcache_steps(num_steps, interval, center, power)
    policy = {"name": "deepcache", "interval": interval, "rear": rear, "center": center, "power": power}
    return _held(info, num_steps, computed, _streams(info, len(info.blocks) - rear), policy)


@plain_options
def faster_diffusion(
    info: ModelInfo, *, num_steps: int, key_steps: Sequence[int] | int | None = None, decoder: int | None = None
) -> CachePlan:
    """Faster Diffusion (Li et al. 2024, arXiv 2312.09608): the encoder runs at key steps only (encoder propagation).

    `E(x_t) = E(x_(t+k))`: at the other steps, the decoder gets the stream and the long skips of the last key step,
    t + k. The paper's noise injection belongs to the sampler and is not part of the plan. Its decoder has the current
    time embedding. A U-ViT has none beside its stream, where time is a token: held with the rest, it makes the output
    that of the key step.

    Args:
        info: the model.
        num_steps: denoising steps.
        key_steps: the steps that compute everything, or m for every m-th. The published list for 50 DDIM steps, scaled
            to `num_steps`, if None.
        decoder: the first block of the decoder. If None: the first that takes a long skip, or the middle of the model
            where none does.

    Raises:
        PlanError: an option is out of range, or the first step is no key step.
    """
    blocks = len(info.blocks)
    skips = [site for site in info.sites.values() if site.kind == "skip"]
    decoder = min((site.block for site in skips), default=blocks // 2) if decoder is None else decoder
    check_whole("num_steps", num_steps, 1)
    check_whole("decoder", decoder, 0, blocks - 1)
    keys = _key_steps(num_steps, key_steps)
    held = [*_streams(info, decoder), *(site.name for site in skips if site.block >= decoder)]
    policy = {"name": "faster_diffusion", "key_steps": list(keys), "decoder": decoder}
    return _held(info, num_steps, keys, held, policy)


def _key_steps(num_steps: int, given: Sequence[int] | int | None) -> tuple[int, ...]:
    if given is None:
        return tuple(sorted({step * num_steps // 50 for step in KEY_STEPS}))
    if isinstance(given, Iterable):
        return check_i_steps("key_steps", given, num_steps)
    check_whole("key_steps", given, 1)
    return tuple(range(0, num_steps, given))


def _streams(info: ModelInfo, block: int) -> list[str]:
    """Every stream that enters a block."""
    return [s.name for s in info.sites.values() if s.kind == "stream" and s.block == block]


def _held(
    info: ModelInfo, num_steps: int, computed: Iterable[int], sites: list[str], policy: dict[str, object]
) -> CachePlan:
    """Hold the sites at every step but the computed ones."""
    full = set(computed)
    actions: dict[tuple[int, str], Action] = {
        (step, name): Compute() if step in full else Hold() for step in range(num_steps) for name in sites
    }
    return info.count(CachePlan(num_steps=num_steps, actions=actions, policy=policy))
