"""MergeRuns cancels gathers against scatters of the same token set."""

from __future__ import annotations

import torch
from torch import fx

from tcc.passes.merge_runs import MergeRuns
from tests.graphs import Sketch, calls, edits, text, values

aten = torch.ops.aten
KEPT, OTHER = [0, 2, 5], [1, 2, 4]


def start() -> tuple[Sketch, list[fx.Node], tuple[fx.Node, fx.Node], tuple[fx.Node, fx.Node]]:
    """Inputs base, rows, s and more; two token sets of three tokens out of six."""
    sketch = Sketch()
    inputs = [sketch.input(name, 2, size, 4) for name, size in (("base", 6), ("rows", 3), ("s", 6), ("more", 3))]
    return sketch, inputs, sketch.tokens(3, 6, 0), sketch.tokens(3, 6, 1)


def run(gm: fx.GraphModule) -> tuple[int, bool]:
    """The edits, and whether the outputs are bit-identical."""
    inputs = values(gm, kept=[KEPT, OTHER])
    before = gm(*inputs)
    count = edits(gm, MergeRuns())
    return count, all(torch.equal(a, b) for a, b in zip(gm(*inputs), before, strict=True))


def test_gathering_what_was_scattered_gives_the_rows() -> None:
    """Between two blocks of one token set nothing is gathered or scattered."""
    sketch, (base, rows, *_), one, _ = start()
    gm = sketch.done(sketch.call(aten.neg.default, sketch.gather(sketch.scatter(base, rows, *one), one[0])))
    assert run(gm) == (1, True)
    assert calls(gm) == ["aten.neg.default"]


def test_rows_that_are_written_twice_are_written_once() -> None:
    """The outer scatter overwrites what the inner one wrote, through the sum with the next slot too."""
    sketch, (base, rows, s, more), one, _ = start()
    inner = sketch.scatter(base, rows, *one)
    gm = sketch.done(sketch.scatter(sketch.call(aten.add.Tensor, inner, s), more, *one))
    assert run(gm) == (1, True)
    expected, (base, rows, s, more), one, _ = start()
    total = expected.call(aten.add.Tensor, base, s)
    assert text(gm) == text(expected.done(expected.scatter(total, more, *one)))


def test_a_scatter_straight_into_a_scatter() -> None:
    """Without a sum between them as well."""
    sketch, (base, rows, _, more), one, _ = start()
    gm = sketch.done(sketch.scatter(sketch.scatter(base, rows, *one), more, *one))
    assert run(gm) == (1, True)
    assert calls(gm) == ["scatter_tokens"]


def test_another_token_set_is_left_alone() -> None:
    """Sets that overlap do not cancel."""
    sketch, (base, rows, s, more), one, two = start()
    inner = sketch.scatter(base, rows, *one)
    gathered = sketch.gather(inner, two[0])
    gm = sketch.done(gathered, sketch.scatter(sketch.call(aten.add.Tensor, inner, s), more, *two))
    assert run(gm) == (0, True)


def test_another_dimension_is_left_alone() -> None:
    """The same set along another dimension keeps other values."""
    sketch = Sketch()
    base, rows, (kept, place) = sketch.input("base", 6, 6), sketch.input("rows", 6, 3), sketch.tokens(3, 6)
    gm = sketch.done(sketch.gather(sketch.scatter(base, rows, kept, place, 1), kept, 0))
    assert run(gm) == (0, True)


def test_other_users_of_the_scatter_still_read_it() -> None:
    """The stream after a run of blocks is whole, whoever else reads its rows."""
    sketch, (base, rows, s, more), one, _ = start()
    inner = sketch.scatter(base, rows, *one)
    outer = sketch.scatter(sketch.call(aten.add.Tensor, inner, s), more, *one)
    gm = sketch.done(inner, outer, sketch.gather(inner, one[0]), sketch.gather(inner, one[0]))
    assert run(gm) == (3, True)
    assert calls(gm).count("scatter_tokens") == 2


def test_a_chain_of_blocks_scatters_once() -> None:
    """A long run ends with one scatter; a second run of the pass changes nothing."""
    sketch, (base, rows, s, _), one, _ = start()
    stream = sketch.scatter(base, rows, *one)
    for _ in range(4):
        new = sketch.call(aten.exp.default, sketch.gather(stream, one[0]))
        stream = sketch.scatter(sketch.call(aten.add.Tensor, stream, s), new, *one)
    gm = sketch.done(stream)
    count, same = run(gm)
    assert same
    assert count == 8
    assert calls(gm).count("scatter_tokens") == 1
    assert calls(gm).count("gather_tokens") == 0
    assert edits(gm, MergeRuns()) == 0


def test_sets_of_every_sample_cancel_too() -> None:
    """The same set along the same dimensions; along other dimensions it stays."""
    for dims, expected in (((1, 0), 1), ((0, 1), 0)):
        sketch = Sketch()
        base, rows, (kept, place) = (
            sketch.input("base", 4, 4, 2),
            sketch.input("rows", 4, 2, 2),
            sketch.tokens(2, 4, batch=4),
        )
        gm = sketch.done(sketch.gather(sketch.scatter(base, rows, kept, place, 1, 0), kept, *dims))
        inputs = values(gm, kept=[[[0, 1], [1, 2], [2, 3], [0, 3]]])
        before = gm(*inputs)[0]
        assert edits(gm, MergeRuns()) == expected
        assert edits(gm, MergeRuns()) == 0
        assert torch.equal(gm(*inputs)[0], before)
