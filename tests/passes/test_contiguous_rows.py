"""ContiguousRows: a stream that begins as a transposed view lies row by row."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import fx

from tcc.passes.contiguous_rows import ContiguousRows
from tcc.passes.fake_values import refresh_strides
from tests.graphs import Sketch, calls, edits, text, values

aten = torch.ops.aten
B, S, D = 2, 6, 4


def transposed(sketch: Sketch) -> fx.Node:
    """Patches as a convolution leaves them, a token to a row."""
    return sketch.call(aten.transpose.int, sketch.input("patches", B, D, S), 1, 2)


def stream() -> fx.GraphModule:
    """Two residual adds, and a product that reads the same rows."""
    sketch = Sketch()
    rows, delta = transposed(sketch), sketch.input("delta", B, S, D)
    once = sketch.call(aten.add.Tensor, rows, delta)
    product = sketch.call(aten.linear.default, rows, sketch.weight("w", D, D))
    return sketch.done(sketch.call(aten.add.Tensor, once, product))


def layouts(gm: fx.GraphModule) -> list[tuple[int, ...]]:
    """How the results of the elementwise adds lie."""
    refresh_strides(gm.graph)
    return [node.meta["val"].stride() for node in gm.graph.find_nodes(op="call_function", target=aten.add.Tensor)]


def test_a_stream_of_transposed_rows_is_contiguous_after_one_copy() -> None:
    """The copy stands at the view, for all that read it, and results are the same."""
    gm = stream()
    inputs = values(gm)
    wanted = gm(*inputs)
    assert layouts(gm) == [(S * D, 1, S)] * 2
    assert edits(gm, ContiguousRows()) == 1
    assert layouts(gm) == [(S * D, D, 1)] * 2
    assert calls(gm).count("aten.clone.default") == 1
    got = gm(*inputs)
    torch.testing.assert_close(got[0], wanted[0])
    assert got[0].is_contiguous()


def test_twice_is_nothing() -> None:
    """What has been copied is not copied again."""
    gm = stream()
    edits(gm, ContiguousRows())
    before = text(gm)
    assert edits(gm, ContiguousRows()) == 0
    assert text(gm) == before


def heads(sketch: Sketch) -> fx.Node:
    """Queries by head: another order of dimensions, of whole rows."""
    queries = sketch.call(aten.transpose.int, sketch.input("queries", B, S, 2, D), 1, 2)
    return sketch.call(aten.mul.Tensor, queries, 2.0)


def image(sketch: Sketch) -> fx.Node:
    """An image that lies by channels, as convolutions like it."""
    pixels = sketch.call(aten.permute.default, sketch.input("pixels", B, 3, 3, D), [0, 3, 1, 2])
    return sketch.call(aten.mul.Tensor, pixels, 2.0)


def product(sketch: Sketch) -> fx.Node:
    """A product's result lies row by row whatever its operands do."""
    return sketch.call(aten.linear.default, transposed(sketch), sketch.weight("w", D, D))


def led(sketch: Sketch) -> fx.Node:
    """The first operand decides how a sum lies."""
    return sketch.call(aten.add.Tensor, sketch.input("x", B, S, D), transposed(sketch))


def spread(sketch: Sketch) -> fx.Node:
    """A smaller operand does not decide."""
    column = sketch.call(aten.transpose.int, sketch.input("column", 1, D, S), 1, 2)
    return sketch.call(aten.add.Tensor, column, sketch.input("x", B, S, D))


@pytest.mark.parametrize("make", [heads, image, product, led, spread])
def test_other_layouts_are_left_alone(make: Callable[[Sketch], fx.Node]) -> None:
    """Nothing is copied that hands no transposed rows on."""
    sketch = Sketch()
    gm = sketch.done(make(sketch))
    before = text(gm)
    assert edits(gm, ContiguousRows()) == 0
    assert text(gm) == before
