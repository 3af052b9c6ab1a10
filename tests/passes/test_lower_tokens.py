"""LowerTokens writes the token operators in ATen."""

from __future__ import annotations

import pytest
import torch
from torch import fx

from tcc.passes.lower_tokens import LowerTokens
from tcc.passes.tokens import gather_tokens, scatter_tokens
from tests.graphs import Sketch, calls, edits, text, values

aten = torch.ops.aten
KEPT = [0, 2, 5]


def both(dim: int) -> fx.GraphModule:
    """A gather and a scatter along `dim`."""
    sketch = Sketch()
    sizes = [2, 4, 3]
    sizes[dim] = 6
    kept, place = sketch.tokens(3, 6)
    x, base = sketch.input("x", *sizes), sketch.input("base", *sizes)
    rows = sketch.gather(x, kept, dim)
    return sketch.done(sketch.scatter(base, sketch.call(aten.neg.default, rows), kept, place, dim))


def test_a_gather_becomes_a_selection() -> None:
    """`index_select` along the token dimension."""
    sketch, expected = Sketch(), Sketch()
    x, (kept, _) = sketch.input("x", 2, 6, 3), sketch.tokens(3, 6)
    gm = sketch.done(sketch.gather(x, kept))
    x, (kept, _) = expected.input("x", 2, 6, 3), expected.tokens(3, 6)
    assert edits(gm, LowerTokens()) == 1
    assert text(gm) == text(expected.done(expected.call(aten.index_select.default, x, 1, kept)))


def test_a_scatter_becomes_a_gather_and_a_choice() -> None:
    """No scatter is left: it would not fuse, and not every exporter has it."""
    gm = both(1)
    assert edits(gm, LowerTokens()) == 2
    assert calls(gm) == [
        "aten.index_select.default",
        "aten.neg.default",
        "aten.ge.Scalar",
        "aten.view.default",
        "aten.clamp.default",
        "aten.index_select.default",
        "aten.where.self",
    ]


def test_outputs_are_bit_identical_along_every_dimension() -> None:
    """Nothing is computed anew, values are only placed."""
    for dim in range(3):
        gm = both(dim)
        inputs = values(gm, kept=[KEPT])
        before = gm(*inputs)[0]
        assert edits(gm, LowerTokens()) == 2
        assert torch.equal(gm(*inputs)[0], before)


def own_sets(dim: int, batch: int) -> fx.GraphModule:
    """A gather and a scatter along `dim`, of other tokens in each of two samples."""
    sketch, sizes = Sketch(), [4, 4, 4]
    sizes[dim], sizes[batch] = 6, 2
    kept, place = sketch.tokens(3, 6, batch=2)
    x, base = sketch.input("x", *sizes), sketch.input("base", *sizes)
    rows = sketch.gather(x, kept, dim, batch)
    return sketch.done(sketch.scatter(base, sketch.call(aten.neg.default, rows), kept, place, dim, batch))


@pytest.mark.parametrize(("dim", "batch"), [(1, 0), (2, 0), (0, 1), (2, 1), (0, 2)])
def test_a_set_for_every_sample_becomes_a_gather(dim: int, batch: int) -> None:
    """Positions are expanded over the other dimensions; no scatter and no data-dependent shape is left."""
    gm = own_sets(dim, batch)
    inputs = values(gm, kept=[[KEPT, [1, 2, 4]]])
    before = gm(*inputs)[0]
    assert edits(gm, LowerTokens()) == 2
    assert calls(gm).count("aten.gather.default") == 2
    assert not [name for name in calls(gm) if "scatter" in name or "index" in name]
    assert torch.equal(gm(*inputs)[0], before)
    assert edits(gm, LowerTokens()) == 0


def test_the_operators_do_what_their_names_say() -> None:
    """Kept tokens come out in order; a scatter replaces them and nothing else."""
    x = torch.arange(12.0).reshape(1, 6, 2)
    kept, place = torch.tensor(KEPT), torch.tensor([0, -1, 1, -1, -1, 2])
    rows = gather_tokens(x, kept, 1)
    assert rows[0, :, 0].tolist() == [0.0, 4.0, 10.0]
    result = scatter_tokens(torch.zeros_like(x), rows, kept, place, 1)
    assert result[0, :, 1].tolist() == [1.0, 0.0, 5.0, 0.0, 0.0, 11.0]


def test_a_graph_without_token_operators_is_left_alone() -> None:
    """A selection that was there before is not touched, and a second run changes nothing."""
    sketch = Sketch()
    x, index = sketch.input("x", 2, 6), sketch.input("index", 3, dtype=torch.int64)
    gm = sketch.done(sketch.call(aten.index_select.default, x, 1, index))
    assert edits(gm, LowerTokens()) == 0
    gm = both(1)
    assert edits(gm, LowerTokens()) == 2
    assert edits(gm, LowerTokens()) == 0
