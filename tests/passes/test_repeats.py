"""What find_repeats takes for the same, and what it leaves."""

from __future__ import annotations

import operator

import pytest
import torch
from torch import fx

from tcc.passes import repeats
from tcc.passes.base import run_passes
from tcc.passes.repeats import find_repeats, inputs_of
from tests.graphs import Sketch

aten = torch.ops.aten


@pytest.fixture(autouse=True)
def _small(monkeypatch: pytest.MonkeyPatch) -> None:
    """Stretches that compute little are found too."""
    monkeypatch.setattr(repeats, "SPARSEST", 0)


def chain(sketch: Sketch, x: fx.Node, name: str) -> fx.Node:
    """Twelve calls with a weight of their own."""
    weight = sketch.weight(name, 16, 16)
    for _ in range(4):
        x = sketch.call(aten.tanh.default, sketch.call(aten.linear.default, x, weight))
        x = sketch.call(aten.mul.Tensor, x, 1.5)
    return x


def ready(gm: fx.GraphModule) -> fx.Graph:
    """The graph without what is dead."""
    run_passes(gm, [])
    return gm.graph


def lengths(graph: fx.Graph) -> list[int]:
    """Of what is repeated in it."""
    return [len(stretch.nodes) for stretch in find_repeats([graph])[0]]


def test_who_reads_what_is_part_of_what_is_computed() -> None:
    """`x * x` and `x * y` look alike, and are not the same: in order, the values that they read would be."""
    sketch = Sketch()
    x, y, z = (sketch.input(name, 16, 16) for name in "xyz")
    ends = []
    for first, second in (((x, x), (y, z)), ((x, y), (z, z))):
        early = [sketch.call(aten.mul.Tensor, *first), sketch.call(aten.mul.Tensor, *second)]
        ends.append(chain(sketch, sketch.call(aten.add.Tensor, *early), f"w{len(ends)}"))
    assert lengths(ready(sketch.done(*ends))) == [13, 13]


def test_the_stretch_that_is_taken_is_asked_whether_it_pays() -> None:
    """The first place is of another group than the largest one, whose stretches would return a tuple."""
    sketch = Sketch()
    x, ends = sketch.input("x", 16, 16), list[fx.Node]()
    for number, name in enumerate("abcde"):
        begin = sketch.call(getattr(aten, ("sin", "cos", "exp", "neg", "relu")[number]).default, x)
        both = sketch.call(aten.var_mean.correction, chain(sketch, begin, name), [-1], correction=0, keepdim=True)
        ends.append(sketch.call(aten.exp.default, sketch.call(operator.getitem, both, 0)))
        if number:
            ends.append(sketch.call(aten.add.Tensor, sketch.call(operator.getitem, both, 1), float(number)))
    for stretch in find_repeats([ready(sketch.done(*ends))])[0]:
        assert all(isinstance(node.meta["val"], torch.Tensor) for node in stretch.outputs)


def test_names_tell_apart_what_is_made_inside() -> None:
    """The same calls under another default dtype make other values, of which the calls say nothing."""
    names = []
    for dtype in (torch.float32, torch.float64):
        sketch = Sketch()
        x = sketch.input("x", 16, 16)
        for name in "ab":
            x = chain(sketch, x, name)
            torch.set_default_dtype(dtype)
            try:
                made = sketch.call(aten.ones.default, [16, 16])
            finally:
                torch.set_default_dtype(torch.float32)
            x = sketch.call(aten.where.self, sketch.call(aten.gt.Tensor, x, made), x, sketch.call(aten.neg.default, x))
        names += {stretch.name for stretch in find_repeats([ready(sketch.done(x))])[0]}
    assert len(names) == 2
    assert names[0] != names[1]


def test_conjugated_values_are_in_no_stretch() -> None:
    """They are not as they lie in memory."""
    sketch = Sketch()
    x = sketch.input("x", 16, 16, dtype=torch.complex64)
    for name in "ab":
        turned = sketch.call(aten._conj.default, x)
        x = sketch.call(aten.mul.Tensor, turned, turned)
        weight = sketch.weight(name, 16, 16)
        for _ in range(7):
            x = sketch.call(aten.mul.Tensor, sketch.call(aten.add.Tensor, x, weight), 0.5)
    found = find_repeats([ready(sketch.done(x))])[0]
    assert len(found) == 2
    for stretch in found:
        assert not any(node.meta["val"].is_conj() for node in (*stretch.nodes, *inputs_of(stretch.nodes)))
