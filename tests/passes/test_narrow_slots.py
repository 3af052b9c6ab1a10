"""Slots in a narrower dtype: rounded when stored, cast back when read, and nothing else."""

from __future__ import annotations

import pytest
import torch
from torch import fx

from tcc.passes.narrow_slots import NarrowSlots
from tests.graphs import Sketch, calls, edits, text, values

aten = torch.ops.aten
BF16, FP8 = torch.bfloat16, torch.float8_e4m3fn


def step(dtype: torch.dtype = torch.float32) -> fx.GraphModule:
    """`exp(slot) + x`, stored as `a`; `a` moves on to `a~1`; `b` is of a score."""
    sketch = Sketch()
    x, slot = sketch.input("x", 4, 6, dtype=dtype), sketch.input("slot:a", 4, 6, dtype=dtype)
    new = sketch.call(aten.add.Tensor, sketch.call(aten.exp.default, slot), x)
    return sketch.done(sketch.call(aten.neg.default, new), new, slot, x, stores=("a", "a~1", "b"))


NARROW = NarrowSlots(frozenset({"a", "a~1"}), BF16)


def test_it_rewrites() -> None:
    """The graph is the one expected: the history moves on as it is, and the score's slot stays."""
    gm = step()
    assert edits(gm, NARROW) == 3
    expected = Sketch()
    x, slot = expected.input("x", 4, 6), expected.input("slot:a", 4, 6, dtype=BF16)
    wide = expected.call(aten._to_copy.default, slot, dtype=torch.float32)
    new = expected.call(aten.add.Tensor, expected.call(aten.exp.default, wide), x)
    kept = expected.call(aten._to_copy.default, new, dtype=BF16)
    out = expected.call(aten.neg.default, new)
    assert text(gm) == text(expected.done(out, kept, slot, x))


@pytest.mark.parametrize("dtype", [BF16, torch.float16])
def test_values_as_narrow_are_left_alone(dtype: torch.dtype) -> None:
    """Half precision is not widened, and not changed for another half precision."""
    gm = step(dtype)
    assert edits(gm, NARROW) == 0


def test_other_slots_are_left_alone() -> None:
    """Only those that are named."""
    assert edits(step(), NarrowSlots(frozenset({"c"}), BF16)) == 0


def test_a_second_run_changes_nothing() -> None:
    """Everything is done at once."""
    gm = step()
    edits(gm, NARROW)
    assert edits(gm, NARROW) == 0
    assert calls(gm).count("aten._to_copy.default") == 2


@pytest.mark.parametrize("dtype", [BF16, torch.float16, FP8, torch.float8_e5m2])
def test_what_is_kept_is_the_rounded_value(dtype: torch.dtype) -> None:
    """By the dtype's rounding, and its largest number for all that is larger."""
    gm = step()
    edits(gm, NarrowSlots(NARROW.slots, dtype))
    x, slot = values(gm)
    x[0, 0], x[0, 1] = 1e30, -1e30
    out, kept, moved, score = gm(x, slot)
    new = slot.float().exp() + x
    assert torch.equal(out, -new)
    assert torch.equal(kept.float(), new.clamp(-torch.finfo(dtype).max, torch.finfo(dtype).max).to(dtype).float())
    assert kept.float().isfinite().all()
    assert torch.equal(moved.float(), slot.float())
    assert score.dtype == torch.float32


def test_a_slot_that_is_what_the_model_returns_is_returned_wide() -> None:
    """A stream that is held up to the output; the history beside it moves on as it is."""
    sketch = Sketch()
    slot = sketch.input("slot:a", 4, 6)
    gm = sketch.done(slot, slot, stores=("a~1",))
    assert edits(gm, NARROW) == 2
    expected = Sketch()
    narrow = expected.input("slot:a", 4, 6, dtype=BF16)
    assert text(gm) == text(expected.done(expected.call(aten._to_copy.default, narrow, dtype=torch.float32), narrow))
