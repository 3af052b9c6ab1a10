"""Normalize removes what has no effect at inference."""

from __future__ import annotations

import operator
import sys

import torch

from tcc.passes.normalize import Normalize
from tests.graphs import Sketch, calls, edits, text, values

aten = torch.ops.aten


def test_it_removes_what_has_no_effect() -> None:
    """Assertions go; dropout at inference, aliases, copies, casts and squeezes that do nothing leave the value."""
    sketch = Sketch()
    x = sketch.input("x", 2, 3)
    y = sketch.call(aten.relu.default, x)
    sketch.call(aten._assert_tensor_metadata.default, y, None, None, torch.float32)
    y = sketch.call(aten.dropout.default, sketch.call(aten.clone.default, y), 0.1, False)
    y = sketch.call(aten._to_copy.default, sketch.call(aten.alias.default, y), dtype=torch.float32)
    y = sketch.call(aten.detach.default, sketch.call(aten.lift_fresh_copy.default, y))
    y = sketch.call(aten.squeeze.dims, sketch.call(aten.squeeze.dim, y, 1), [0, 1])
    gm = sketch.done(sketch.call(aten.neg.default, y))
    expected = Sketch()
    z = expected.call(aten.relu.default, expected.input("x", 2, 3))
    assert Normalize().run(gm) == 9  # without the runner, which drops assertions as dead code
    assert text(gm) == text(expected.done(expected.call(aten.neg.default, z)))


def test_dropout_of_nothing_is_removed_even_in_training() -> None:
    """A rate of 0 drops nothing."""
    sketch = Sketch()
    gm = sketch.done(sketch.call(aten.relu.default, sketch.call(aten.dropout.default, sketch.input("x", 2), 0.0, True)))
    assert edits(gm, Normalize()) == 1
    assert calls(gm) == ["aten.relu.default"]


def test_it_leaves_alone_what_has_an_effect() -> None:
    """A real cast, a copy into another layout, a squeeze of a one, and dropout in training stay."""
    sketch = Sketch()
    x = sketch.call(aten.squeeze.dim, sketch.input("x", 2, 1, 3), 1)
    double = sketch.call(aten._to_copy.default, x, dtype=torch.float64)
    turned = sketch.call(aten.clone.default, sketch.call(aten.t.default, x), memory_format=torch.contiguous_format)
    gm = sketch.done(double, turned, sketch.call(aten.dropout.default, x, 0.1, True))
    before = text(gm)
    assert edits(gm, Normalize()) == 0
    assert text(gm) == before


def test_all_users_read_the_original() -> None:
    """A removed value's users, and the output, read what it was made from."""
    sketch = Sketch()
    x = sketch.call(aten.relu.default, sketch.input("x", 2, 3))
    copy = sketch.call(aten.clone.default, x)
    gm = sketch.done(sketch.call(aten.neg.default, copy), sketch.call(aten.exp.default, copy), copy)
    inputs = values(gm)
    before = gm(*inputs)
    assert edits(gm, Normalize()) == 1
    assert all(torch.equal(a, b) for a, b in zip(gm(*inputs), before, strict=True))
    assert calls(gm) == ["aten.relu.default", "aten.neg.default", "aten.exp.default"]


def test_a_second_run_changes_nothing() -> None:
    """Copies of copies go in one run."""
    sketch = Sketch()
    x = sketch.input("x", 2, 3)
    for _ in range(4):
        x = sketch.call(aten.clone.default, x)
    gm = sketch.done(sketch.call(aten.relu.default, x))
    assert edits(gm, Normalize()) == 4
    assert edits(gm, Normalize()) == 0


def test_what_reads_a_shape_or_a_dtype_reads_no_value() -> None:
    """`type_as`, `copy` and `expand_as` keep their outputs, bit for bit, and lose their second reader."""
    sketch = Sketch()
    x, y = sketch.input("x", 1, 3), sketch.input("y", 2, 3, dtype=torch.float64)
    y = sketch.call(aten.exp.default, y)
    same = sketch.call(aten.type_as.default, x, sketch.call(aten.neg.default, x))
    outputs = [same, *(sketch.call(target, x, y) for target in (aten.type_as.default, aten.expand_as.default))]
    gm = sketch.done(*outputs, sketch.call(aten.copy.default, y, x), sketch.call(aten.reshape_as.default, x, x))
    inputs = values(gm)
    before = gm(*inputs)
    assert edits(gm, Normalize()) == 5
    assert all(torch.equal(a, b) and a.dtype == b.dtype for a, b in zip(gm(*inputs), before, strict=True))
    assert set(calls(gm)) == {"aten._to_copy.default", "aten.expand.default"}


def test_open_bounds_of_slices_are_written_out() -> None:
    """From the first, up to the last; what is written already stays."""
    sketch = Sketch()
    x = sketch.input("x", 2, 5)
    cuts = [(1, None, 3), (1, 2, None), (1, None, None, 2), (0, None, None), (1, -2), (1,)]
    gm = sketch.done(*(sketch.call(aten.slice.Tensor, x, *cut) for cut in cuts))
    inputs = values(gm)
    before = gm(*inputs)
    assert edits(gm, Normalize()) == 4
    assert edits(gm, Normalize()) == 0
    assert all(torch.equal(a, b) for a, b in zip(gm(*inputs), before, strict=True))
    assert [node.args[1:] for node in gm.graph.find_nodes(op="call_function", target=aten.slice.Tensor)] == [
        (1, 0, 3), (1, 2, sys.maxsize), (1, 0, sys.maxsize, 2), (0, 0, sys.maxsize), (1, -2), (1,)
    ]  # fmt: skip


def test_constants_made_like_another_value_do_not_read_it() -> None:
    """`new_zeros` and the like take the dtype and the device of a value and nothing else."""
    sketch = Sketch()
    y = sketch.call(aten.exp.default, sketch.input("y", 2, 3, dtype=torch.float64))
    made = [
        sketch.call(aten.new_zeros.default, y, [2, 4]),
        sketch.call(aten.new_ones.default, y, [3], dtype=torch.int64),
    ]
    made += [sketch.call(aten.new_full.default, y, [1, 5], 7.0)]
    empty = sketch.call(aten.zeros_like.default, sketch.call(aten.new_empty.default, y, [2]))
    gm = sketch.done(*made, empty)
    before = gm(*values(gm))
    assert edits(gm, Normalize()) == 4
    assert all(torch.equal(a, b) and a.dtype == b.dtype for a, b in zip(gm(*values(gm)), before, strict=True))
    assert "aten.exp.default" not in calls(gm)


def test_parts_that_are_joined_again_are_the_whole() -> None:
    """Slices and the parts of a split, all of them and in order; turned round or cut elsewhere they are not."""
    sketch = Sketch()
    x = sketch.call(aten.relu.default, sketch.input("x", 2, 9, 3))
    first, rest = sketch.call(aten.slice.Tensor, x, 1, 0, 4), sketch.call(aten.slice.Tensor, x, 1, 4)
    parts = sketch.call(aten.split_with_sizes.default, x, [4, 5], 1)
    both = [sketch.call(operator.getitem, parts, i) for i in range(2)]
    joined = [sketch.call(aten.cat.default, pair, 1) for pair in ([first, rest], both, [rest, first], [first, both[0]])]
    gm = sketch.done(*(sketch.call(aten.neg.default, one) for one in joined))
    inputs = values(gm)
    before = gm(*inputs)
    assert edits(gm, Normalize()) == 2
    assert calls(gm).count("aten.cat.default") == 2
    assert all(torch.equal(a, b) for a, b in zip(gm(*inputs), before, strict=True))


def test_a_copy_that_the_caller_gets_beside_its_source_stays() -> None:
    """Of an input, and of another output, through views too; who writes to one does not mean the other."""
    sketch = Sketch()
    x = sketch.input("x", 2, 3)
    y = sketch.call(aten.relu.default, x)
    copied = [sketch.call(aten.clone.default, x), sketch.call(aten.clone.default, y)]
    turned = sketch.call(aten.permute.default, copied[1], [1, 0])
    last = sketch.call(aten.clone.default, sketch.call(aten.neg.default, x))  # nobody else gets what it copies
    gm = sketch.done(y, copied[0], turned, last)
    assert edits(gm, Normalize()) == 1
    given = values(gm)[0]
    before, outputs = given.clone(), gm(given)
    kept = [output.clone() for output in outputs]
    for number, output in enumerate(outputs):
        output.fill_(7)
        assert torch.equal(given, before)
        assert all(torch.equal(a, b) for a, b in zip(outputs[number + 1 :], kept[number + 1 :], strict=True))


def test_views_become_reshapes() -> None:
    """Which take a value whose layout is another one than at capture; what is a reshape stays one."""
    sketch = Sketch()
    x = sketch.input("x", 2, 3)
    flat = sketch.call(aten.view.default, sketch.call(aten._unsafe_view.default, x, [3, 2]), [6])
    gm = sketch.done(sketch.call(aten.reshape.default, flat, [1, 6]))
    assert edits(gm, Normalize()) == 2
    assert calls(gm) == ["aten.reshape.default"] * 3
    assert edits(gm, Normalize()) == 0
    (value,) = values(gm)
    assert torch.equal(gm(value.mT.contiguous().mT)[0].flatten(), value.flatten())
