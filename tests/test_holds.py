"""Delta-DiT, DeepCache and Faster Diffusion: their steps and sites, their cost, and their programs."""

from __future__ import annotations

import cmath
import re
from collections.abc import Callable
from itertools import pairwise
from typing import Any

import pytest

import tcc
from tcc import plans
from tcc.errors import PlanError
from tcc.plan import Compute, Hold, Reuse
from tcc.plans.holds import deepcache_steps
from tests.published import dit_xl2
from tests.running import CLOSE, call, session
from tests.tiny_models import Case, case, dit, relative_error

deep = dit(depth=4)


def block_macs(info: tcc.ModelInfo) -> int:
    """MACs of one block of width 32 for one image, modulation included."""
    return info.sites["blocks.0.delta"].macs // info.batch + 6 * 32 * 32


# --- Delta-DiT


def test_delta_dit_keeps_rear_blocks_first_and_front_blocks_later() -> None:
    """Every second step, the last three of four blocks, then the first three."""
    plan = plans.delta_dit(deep.info, num_steps=8, span=3)
    reused = [[site for site, action in plan.at(step).items() if action == Reuse()] for step in range(8)]
    rear, front = ([f"blocks.{b}.delta" for b in blocks] for blocks in ((1, 2, 3), (0, 1, 2)))
    assert [sorted(names) for names in reused] == [[], rear, [], rear, [], front, [], front]


def test_delta_dit_keeps_one_sum_per_run() -> None:
    """Blocks that are always treated alike share a slot: front and rear half, or front, middle and rear."""
    one = 2 * 16 * 32 * 4
    assert plans.delta_dit(deep.info, num_steps=8).slot_bytes == 2 * one
    assert plans.delta_dit(deep.info, num_steps=8, span=3).slot_bytes == 3 * one
    assert plans.delta_dit(deep.info, num_steps=8, span=4).slot_bytes == one


def test_delta_dit_reuses_branches_where_a_block_has_no_delta() -> None:
    """The stream is scaled inside the block, so its change is not the sum of what its branches add."""
    plan = plans.delta_dit(case("rescaled").info, num_steps=4)
    assert plan.sites == tuple(f"blocks.{b}.{branch}.delta" for b in (0, 1) for branch in ("attn", "mlp"))


def test_the_cost_of_delta_dit() -> None:
    """Full steps cost a full step, the others one block less for every kept block. Published: 1.6x for 20 steps."""
    plan = plans.delta_dit(deep.info, num_steps=6, interval=3, span=3, boundary=1)
    assert plan.cost is not None
    saved = [deep.info.macs - macs for macs in plan.cost.step_macs]
    assert saved == [0, 3 * block_macs(deep.info), 3 * block_macs(deep.info)] * 2
    assert plans.delta_dit(dit_xl2(), num_steps=20, interval=2, span=21).bound == pytest.approx(1.6, rel=1e-3)


# --- DeepCache


@pytest.mark.parametrize(("num_steps", "interval", "count"), [(50, 5, 10), (10, 3, 4), (7, 1, 7), (3, 5, 1)])
def test_deepcache_uniform_steps(num_steps: int, interval: int, count: int) -> None:
    """Every N-th, from the first."""
    steps = deepcache_steps(num_steps, interval)
    assert len(steps) == count
    assert steps[0] == 0
    assert {b - a for a, b in pairwise(steps)} <= {interval}


@pytest.mark.parametrize(
    ("num_steps", "interval", "center", "power", "used"),
    [(50, 5, 15, 1.4, 1.4), (50, 3, 15, 1.2, 1.2), (100, 10, 60, 3.0, None)],
)
def test_deepcache_steps_around_a_centre(
    num_steps: int, interval: int, center: int, power: float, used: float | None
) -> None:
    """As many as the uniform schedule has, `int(|z|^p cos(p arg z)) + centre` for z on a line in the complex plane."""
    steps = deepcache_steps(num_steps, interval, center, power)
    count = len(deepcache_steps(num_steps, interval))
    assert len(steps) == count
    assert steps == tuple(sorted(set(steps)))
    assert steps[0] == 0
    if used is None:
        return
    first = cmath.exp(cmath.log(-center) / used)
    last = (num_steps - center) ** (1 / used)
    line = [first + (last - first) * i / count for i in range(count + 1)]
    offsets = sorted({int(abs(z) ** used * cmath.cos(used * cmath.phase(z)).real) for z in line})
    assert steps[1:] == tuple(center + x for x in offsets[1:-1])


def test_deepcache_steps_are_dense_around_the_centre() -> None:
    """Gaps grow with the distance from it."""
    steps = deepcache_steps(100, 5, center=40, power=1.4)
    gap = {a: b - a for a, b in pairwise(steps)}
    near = [g for step, g in gap.items() if abs(step - 40) <= 12]
    far = [g for step, g in gap.items() if step > 70]
    assert sum(near) / len(near) < sum(far) / len(far)


def test_deepcache_holds_the_stream_before_the_last_blocks() -> None:
    """What comes before is not computed: the cost is that of the last blocks, the head and the conditioning."""
    plan = plans.deepcache(deep.info, num_steps=6, interval=3, rear=2)
    assert plan.sites == ("blocks.2.stream",)
    assert [type(a) is Hold for _, a in plan.column("blocks.2.stream")] == [False, True, True] * 2
    assert plan.cost is not None
    one_less = plans.deepcache(deep.info, num_steps=6, interval=3, rear=1).cost
    assert one_less is not None
    assert plan.cost.step_macs[1] - one_less.step_macs[1] == block_macs(deep.info)


def test_deepcache_computes_what_long_skips_take() -> None:
    """A U-ViT of five blocks: the outer two are computed, and the inner three with the skip between them are not."""
    info = case("uvit").info
    plan = plans.deepcache(info, num_steps=2, interval=2)
    assert plan.sites == ("out_blocks.1.stream",)
    assert plan.cost is not None
    assert info.macs - plan.cost.step_macs[1] == uvit_macs(info, "in_blocks.1", "mid_block", "out_blocks.0", joins=1)


def uvit_macs(info: tcc.ModelInfo, *blocks: str, joins: int) -> int:
    """MACs of blocks of a U-ViT and of some of the maps that join skips, for one image."""
    width = info.analysis.stream_shape[-1]
    whole = sum(info.sites[f"{block}.delta"].macs for block in blocks) // info.batch
    return whole + joins * info.num_tokens * 2 * width * width


# --- Faster Diffusion


def test_the_published_key_steps() -> None:
    """For 50 steps as they are; scaled for others, and distinct."""
    plan = plans.faster_diffusion(deep.info, num_steps=50)
    assert plan.schedule.i_steps == (0, 1, 2, 3, 5, 10, 15, 25, 35)
    assert plans.faster_diffusion(deep.info, num_steps=20).schedule.i_steps == (0, 1, 2, 4, 6, 10, 14)


def test_given_key_steps() -> None:
    """A list, or every m-th."""
    assert plans.faster_diffusion(deep.info, num_steps=9, key_steps=[0, 5]).schedule.i_steps == (0, 5)
    assert plans.faster_diffusion(deep.info, num_steps=9, key_steps=4).schedule.i_steps == (0, 4, 8)


def test_the_decoder_gets_the_skips_of_the_last_key_step() -> None:
    """On a U-ViT: the stream after the middle block and every skip are held, and the first half is not computed."""
    info = case("uvit").info
    plan = plans.faster_diffusion(info, num_steps=2, key_steps=[0])
    assert plan.sites == ("out_blocks.0.stream", "out_blocks.0.skip", "out_blocks.1.skip")
    assert set(plan.at(1).values()) == {Hold()}
    later = plans.faster_diffusion(info, num_steps=2, key_steps=[0], decoder=4)
    assert later.sites == ("out_blocks.1.stream", "out_blocks.1.skip")


def test_the_encoder_is_the_first_half_where_there_are_no_skips() -> None:
    """The stream that enters the decoder is held."""
    assert plans.faster_diffusion(deep.info, num_steps=3).sites == ("blocks.2.stream",)
    assert plans.faster_diffusion(deep.info, num_steps=3, decoder=1).sites == ("blocks.1.stream",)


def test_the_cost_of_faster_diffusion_on_a_dit() -> None:
    """The embedding and the first two of four blocks are left out at 41 of 50 steps; 16 tokens S of width D = 32."""
    s, d = 16, 32
    block = 12 * d * d * s + 2 * s * s * d + 6 * d * d  # branches, modulation
    conditioning = 256 * d + d * d
    head = 2 * d * d + d * (2 * 2 * 8) * s  # modulation, patches of 2 x 2 with 8 channels
    decoder = 2 * block + conditioning + head
    plan = plans.faster_diffusion(deep.info, num_steps=50)
    keys = (0, 1, 2, 3, 5, 10, 15, 25, 35)
    assert {step: set(plan.at(step).values()) for step in range(50)} == {
        step: {Compute() if step in keys else Hold()} for step in range(50)
    }
    whole = decoder + 2 * block + (2 * 2 * 4) * d * s
    assert plan.cost is not None
    assert plan.cost.step_macs == tuple(whole if step in keys else decoder for step in range(50))


def test_the_cost_of_faster_diffusion_on_a_uvit() -> None:
    """Of five blocks the last two, the maps that join their skips and the head; 18 tokens S of width D = 16."""
    info, s, d = case("uvit").info, 18, 16
    block, join = 12 * d * d * s + 2 * s * s * d, 2 * d * d * s
    head, embedding = d * (2 * 2 * 4) * s, (2 * 2 * 4) * d * 16
    whole = 5 * block + 2 * join + head + embedding
    for decoder, blocks in ((None, 2), (3, 2), (4, 1), (2, 3)):
        plan = plans.faster_diffusion(info, num_steps=5, key_steps=[0, 3], decoder=decoder)
        less = blocks * block + min(blocks, 2) * join + head
        assert plan.cost is not None
        assert plan.cost.step_macs == (whole, less, less, whole, less), decoder


# --- all


PLANS: dict[str, Callable[[Case], tcc.CachePlan]] = {
    "delta_dit": lambda c: plans.delta_dit(c.info, num_steps=8, interval=2),
    "delta_dit, long": lambda c: plans.delta_dit(c.info, num_steps=8, interval=3, span=len(c.info.blocks)),
    "deepcache": lambda c: plans.deepcache(c.info, num_steps=6, interval=3),
    "deepcache, centre": lambda c: plans.deepcache(c.info, num_steps=10, interval=2, center=3),
    "faster_diffusion": lambda c: plans.faster_diffusion(c.info, num_steps=8),
}


@pytest.mark.parametrize("name", ["dit", "uvit", "long_skip", "rescaled", "hf_dit"])
@pytest.mark.parametrize("plan", PLANS)
def test_programs_compute_what_the_reference_computes(name: str, plan: str) -> None:
    """Every step of a run."""
    which, made = case(name), PLANS[plan](case(name))
    model, reference = session(which, made), tcc.Reference(which.model, made)
    for step in range(made.num_steps):
        assert relative_error(call(model, which, step), call(reference, which, step)) < CLOSE


BAD: dict[str, tuple[Callable[[tcc.ModelInfo], Any], str]] = {
    "interval": (lambda i: plans.delta_dit(i, num_steps=4, interval=0), "interval=0: expected a whole number, 1 or"),
    "span": (lambda i: plans.delta_dit(i, num_steps=4, span=5), "span=5: expected a whole number, 1..4"),
    "boundary": (lambda i: plans.delta_dit(i, num_steps=4, boundary=2), "boundary=2: expected a share, 0..1"),
    "rear": (lambda i: plans.deepcache(i, num_steps=4, rear=4), "rear=4: expected a whole number, 1..3"),
    "center": (lambda i: plans.deepcache(i, num_steps=4, center=4), "center=4: expected a whole number, 0..3"),
    "power": (
        lambda i: plans.deepcache(i, num_steps=4, center=1, power=1.0),
        "no power law has so many distinct steps",
    ),
    "no power": (lambda i: plans.deepcache(i, num_steps=9, interval=1, center=3), "no power law has so many"),
    "no first": (lambda i: plans.faster_diffusion(i, num_steps=4, key_steps=[1, 2]), "the first computes everything"),
    "late key": (lambda i: plans.faster_diffusion(i, num_steps=4, key_steps=[0, 4]), "steps are 0..3"),
    "every 0th": (
        lambda i: plans.faster_diffusion(i, num_steps=4, key_steps=0),
        "key_steps=0: expected a whole number, 1",
    ),
    "decoder": (
        lambda i: plans.faster_diffusion(i, num_steps=4, decoder=4),
        "decoder=4: expected a whole number, 0..3",
    ),
}


@pytest.mark.parametrize("kind", BAD)
def test_bad_options_are_refused(kind: str) -> None:
    """The message names the option, its value and what it may be."""
    make, message = BAD[kind]
    with pytest.raises(PlanError, match=re.escape(message)):
        make(deep.info)
