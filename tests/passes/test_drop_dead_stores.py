"""DropDeadStores removes stores that no later step reads."""

from __future__ import annotations

import torch
from torch import fx

from tcc.passes.drop_dead_stores import DropDeadStores
from tests.graphs import Sketch, calls, edits, text, values

aten = torch.ops.aten


def two_stores() -> fx.GraphModule:
    """One model output and two stored values, one of which costs a call of its own."""
    sketch = Sketch()
    x = sketch.input("x", 2, 3)
    y = sketch.call(aten.relu.default, x)
    return sketch.done(y, y, sketch.call(aten.exp.default, x), stores=("a", "b"))


def test_a_dead_store_goes_with_what_only_it_needed() -> None:
    """The slot's output, its name, and the dead code behind it disappear."""
    gm = two_stores()
    inputs = values(gm)
    y, a, _ = gm(*inputs)
    assert edits(gm, DropDeadStores(frozenset({"a"}))) == 1
    assert gm.meta["stores"] == ("a",)
    assert calls(gm) == ["aten.relu.default"]
    assert all(torch.equal(one, other) for one, other in zip(gm(*inputs), (y, a), strict=True))


def test_the_models_output_stays_where_no_store_is_live() -> None:
    """A value that is an output and a store is still an output."""
    gm = two_stores()
    assert edits(gm, DropDeadStores(frozenset())) == 2
    assert gm.meta["stores"] == ()
    assert len(gm(torch.zeros(2, 3))) == 1


def test_live_stores_are_left_alone() -> None:
    """Names that the graph does not store do not matter, and a graph without stores is left alone."""
    gm = two_stores()
    before = text(gm)
    assert edits(gm, DropDeadStores(frozenset({"a", "b", "c"}))) == 0
    assert text(gm) == before
    sketch = Sketch()
    assert edits(sketch.done(sketch.call(aten.relu.default, sketch.input("x", 2))), DropDeadStores(frozenset())) == 0


def test_a_second_run_changes_nothing() -> None:
    """What is left is live."""
    gm = two_stores()
    assert edits(gm, DropDeadStores(frozenset({"b"}))) == 1
    assert edits(gm, DropDeadStores(frozenset({"b"}))) == 0
