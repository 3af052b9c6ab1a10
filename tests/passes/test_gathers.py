"""Gathers and scatters where tokens or samples share their dimension with something else."""

from __future__ import annotations

import pytest
import torch

from tcc.passes.gathers import apart, gather, scatter
from tcc.passes.lower_tokens import LowerTokens
from tcc.passes.tokens import Axis
from tests.graphs import Sketch, edits, values

KEPT = [[0, 2, 5], [1, 2, 4]]
#: Layouts of 2 samples, 6 tokens and 4 channels: the shape, and where tokens and samples lie.
LAYOUTS = {
    "samples first": ((2, 6, 4), Axis(1), Axis(0)),
    "tokens first": ((6, 2, 4), Axis(0), Axis(1)),
    "one dimension": ((12, 4), Axis(0, outer=2), Axis(0, inner=6)),
    "one dimension, tokens first": ((12, 4), Axis(0, inner=2), Axis(0, outer=6)),
    "heads between": ((24, 2), Axis(0, outer=4), Axis(0, inner=12)),
    "heads with the samples": ((4, 6, 2), Axis(1), Axis(0, inner=2)),
    "heads before the samples": ((4, 6, 2), Axis(1), Axis(0, outer=2)),
}


def as_rows(x: torch.Tensor, axis: Axis, batch: Axis) -> torch.Tensor:
    """`[B, S, rest]`, element by element."""
    x = x.contiguous()
    strides = [x.stride(a.dim) * a.inner for a in (batch, axis)]
    counts = [x.shape[a.dim] // (a.outer * a.inner) for a in (batch, axis)]
    flat = torch.arange(x.numel())
    places = [flat // stride % count for stride, count in zip(strides, counts, strict=True)]
    order = torch.argsort(places[0] * counts[1] + places[1], stable=True)
    return x.flatten()[order].view(*counts, -1)


@pytest.mark.parametrize("name", LAYOUTS)
def test_every_layout_gives_each_sample_its_tokens(name: str) -> None:
    """A gather takes the rows that the axes say; a scatter puts them back and leaves the rest."""
    sizes, axis, batch = LAYOUTS[name]
    sketch = Sketch()
    x, base, tokens = sketch.input("x", *sizes), sketch.input("base", *sizes), sketch.tokens(3, 6, batch=2)
    rows = gather(sketch.graph, x, tokens[0], axis, batch, x)
    gm = sketch.done(rows, scatter(sketch.graph, base, rows, tokens, axis, batch, x))
    inputs = values(gm, kept=[KEPT])
    few, back = gm(*inputs)
    whole, under = (as_rows(inputs[i], axis, batch) for i in (0, 1))
    fewer = batch  # where the samples lie among three tokens instead of six
    if batch.dim == axis.dim:
        fewer = Axis(batch.dim, max(1, batch.outer // 2), max(1, batch.inner // 2))
    assert torch.equal(as_rows(few, axis, fewer), torch.stack([whole[i, KEPT[i]] for i in range(2)]))
    for i in range(2):
        under[i, KEPT[i]] = whole[i, KEPT[i]]
    assert torch.equal(as_rows(back, axis, batch), under)


def test_a_dimension_of_its_own_stays() -> None:
    """Nothing is split that need not be."""
    assert apart((2, 6, 4), Axis(1), Axis(0)) == ([2, 6, 4], [1, 0])
    assert apart((12, 4), Axis(0, outer=2), Axis(0, inner=6)) == ([1, 2, 1, 6, 1, 4], [3, 1])
    assert apart((6, 12), Axis(1, outer=2, inner=3)) == ([6, 2, 2, 3], [2])


@pytest.mark.parametrize("own", [False, True])
@pytest.mark.parametrize(
    ("sizes", "axis", "batch"),
    [
        ((2, 10, 4), Axis(1, before=3, after=1), Axis(0)),
        ((9, 2, 4), Axis(0, after=3), Axis(1)),
        ((18, 4), Axis(0, outer=2, before=3), Axis(0, inner=9)),
    ],
)
def test_others_are_taken_along(sizes: tuple[int, ...], axis: Axis, batch: Axis, own: bool) -> None:
    """Rows that are joined to the tokens are all gathered, and all replaced; so they are after lowering."""
    sketch = Sketch()
    x, base = sketch.input("x", *sizes), sketch.input("base", *sizes)
    tokens = sketch.tokens(3, 6, batch=2 if own else 0)
    rows = gather(sketch.graph, x, tokens[0], axis, batch, x)
    negative = sketch.call(torch.ops.aten.neg.default, rows)
    gm = sketch.done(rows, scatter(sketch.graph, base, negative, tokens, axis, batch, x))
    inputs = values(gm, kept=[KEPT if own else KEPT[0]])
    total = 6 + axis.before + axis.after
    whole, under = (as_rows(inputs[i], Axis(axis.dim, axis.outer), batch) for i in (0, 1))
    others = [*range(axis.before), *range(total - axis.after, total)]
    chosen = [sorted([*others, *(axis.before + p for p in (KEPT[i] if own else KEPT[0]))]) for i in range(2)]
    expected = torch.stack([whole[i, chosen[i]] for i in range(2)])
    for i in range(2):
        under[i, chosen[i]] = -whole[i, chosen[i]]
    fewer = batch if batch.dim != axis.dim else Axis(0, inner=len(chosen[0]))
    for lower in (False, True):
        if lower:
            assert edits(gm, LowerTokens()) == 2
        few, back = gm(*inputs)
        assert torch.equal(as_rows(few, Axis(axis.dim, axis.outer), fewer), expected)
        assert torch.equal(as_rows(back, Axis(axis.dim, axis.outer), batch), under)
