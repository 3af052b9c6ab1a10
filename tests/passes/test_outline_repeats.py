"""OutlineRepeats makes one sub-graph of the blocks that repeat, and leaves what would not pay."""

from __future__ import annotations

import pytest
import torch
from torch import fx

from tcc.passes.base import run_passes
from tcc.passes.fake_values import evaluate, fake_mode_of
from tcc.passes.graph import emit
from tcc.passes.outline_repeats import OutlineRepeats
from tcc.passes.repeats import find_repeats
from tests.graphs import Sketch, calls, edits, values

aten = torch.ops.aten
CALL = "invoke_subgraph"


def norm(sketch: Sketch, x: fx.Node) -> fx.Node:
    """A layer norm by hand: many small calls."""
    centred = sketch.call(aten.sub.Tensor, x, sketch.call(aten.mean.dim, x, [-1], True))
    spread = sketch.call(aten.mean.dim, sketch.call(aten.mul.Tensor, centred, centred), [-1], True)
    return sketch.call(
        aten.mul.Tensor, centred, sketch.call(aten.rsqrt.default, sketch.call(aten.add.Tensor, spread, 1))
    )


def block(sketch: Sketch, x: fx.Node, name: str, width: int = 64, wide: int = 128) -> tuple[fx.Node, fx.Node]:
    """A block with weights of its own: the stream after it, and a view of half of what is in it."""
    up, down = sketch.weight(f"up_{name}", wide, width), sketch.weight(f"down_{name}", width, wide)
    for _ in range(2):
        hidden = sketch.call(aten.linear.default, norm(sketch, x), up)
        first = sketch.call(aten.slice.Tensor, hidden, 2, 0, 8)
        x = sketch.call(
            aten.add.Tensor, x, sketch.call(aten.linear.default, sketch.call(aten.gelu.default, hidden), down)
        )
    return x, first


def model(names: str, width: int = 64, wide: int = 128, kept: str = "") -> fx.GraphModule:
    """Blocks in a row, behind something else; an output for the inner view of every block named in `kept`."""
    sketch = Sketch()
    x = sketch.call(aten.tanh.default, sketch.input("x", 2, 16, width))
    views = []
    for name in names:
        x, view = block(sketch, x, name, width, wide)
        views += [view] if name in kept else []
    return sketch.done(sketch.call(aten.relu.default, x), *views)


def outlined(gm: fx.GraphModule) -> list[int]:
    """How often each sub-graph is called."""
    targets = [str(n.args[0].target) for n in gm.graph.nodes if n.target is torch.ops.higher_order.invoke_subgraph]
    return [targets.count(name) for name in dict.fromkeys(targets)]


@pytest.mark.parametrize("kept", ["", "abcd"])
def test_blocks_become_calls_of_one_graph(kept: str) -> None:
    """Four blocks are four calls; everything else stays; views that are read outside are made outside."""
    gm = model("abcd", kept=kept)
    inputs = values(gm)
    expected = gm(*inputs)
    assert edits(gm, OutlineRepeats()) == 1
    assert outlined(gm) == [4]
    assert {call for call in calls(gm) if call.startswith("aten")} == {
        "aten.tanh.default", "aten.relu.default", *(["aten.slice.Tensor"] if kept else [])
    }  # fmt: skip
    for after, before in zip(gm(*inputs), expected, strict=True):
        assert torch.equal(after, before)


def test_blocks_of_two_kinds_become_two_graphs() -> None:
    """As in models with double and single blocks, also where they alternate with something else."""
    sketch = Sketch()
    x = sketch.input("x", 2, 16, 64)
    for number, wide in enumerate((128, 128, 128, 96, 96)):
        x, _ = block(sketch, sketch.call(aten.mul.Tensor, x, float(number)), f"b{number}", wide=wide)
    gm = sketch.done(x)
    inputs = values(gm)
    expected = gm(*inputs)[0]
    assert edits(gm, OutlineRepeats()) == 2
    assert outlined(gm) == [3, 2]
    assert torch.equal(gm(*inputs)[0], expected)


def test_twice_is_nothing() -> None:
    """Calls of sub-graphs are not outlined again."""
    gm = model("abcd")
    edits(gm, OutlineRepeats())
    assert edits(gm, OutlineRepeats()) == 0


def test_a_single_block_is_left() -> None:
    """There is nothing to share, also inside the block, whose halves are too short to be called."""
    assert edits(model("a"), OutlineRepeats()) == 0


def test_work_that_only_moves_memory_is_left() -> None:
    """Blocks with hardly a product: fused with their neighbours they are faster than called."""
    assert edits(model("abcd", width=64, wide=2), OutlineRepeats()) == 0


def test_what_writes_stays_where_it_is() -> None:
    """A write in place is in no sub-graph."""
    sketch = Sketch()
    x, slots = sketch.input("x", 2, 16, 64), [sketch.input(f"slot:{n}", 2, 16, 64) for n in "abc"]
    for slot, name in zip(slots, "abc", strict=True):
        x, _ = block(sketch, x, name)
        sketch.call(aten.copy_.default, slot, x)
    gm = sketch.done(x)
    assert edits(gm, OutlineRepeats()) == 1
    assert outlined(gm) == [3]
    assert calls(gm).count("aten.copy_.default") == 3


def test_copies_lie_alike_in_memory() -> None:
    """A pass that replaces a slice by a product leaves views with the strides of before: they do not mislead."""
    sketch = Sketch()
    x, c = sketch.input("x", 2, 16, 64), sketch.input("c", 2, 32)
    for name in "abcd":
        wide = sketch.call(aten.linear.default, c, sketch.weight(f"wide_{name}", 128, 32))
        part = sketch.call(aten.unsqueeze.default, sketch.call(aten.slice.Tensor, wide, 1, 0, 64), 1)
        x, _ = block(sketch, sketch.call(aten.mul.Tensor, x, part), name)
    gm = sketch.done(x)
    slices = [node for node in gm.graph.nodes if node.target is aten.slice.Tensor and node.args[1] == 1]
    for cut in slices[2:]:
        wide, (view,) = cut.args[0], cut.users
        with gm.graph.inserting_before(cut):
            rows = emit(gm.graph, aten.slice.Tensor, (wide.args[1], 0, 0, 64), like=wide)
            view.args = (emit(gm.graph, aten.linear.default, (wide.args[0], rows), like=wide), 1)
    inputs = values(gm)
    expected = gm(*inputs)[0]
    edits(gm, OutlineRepeats())
    for call in (node for node in gm.graph.nodes if node.target is torch.ops.higher_order.invoke_subgraph):
        inner = getattr(gm, call.args[1]).graph.find_nodes(op="placeholder")
        given = [evaluate(node, fake_mode_of(gm.graph)).stride() for node in call.args[2:]]
        assert given == [node.meta["val"].stride() for node in inner]
    assert outlined(gm)
    assert torch.equal(gm(*inputs)[0], expected)


def test_graphs_share_what_each_has_once() -> None:
    """It has one name in both; a stretch does not go on from one graph to the next."""
    graphs = [model("a"), model("b"), model("cd")]
    inputs = [values(gm) for gm in graphs]
    expected = [gm(*given)[0] for gm, given in zip(graphs, inputs, strict=True)]
    for gm in graphs:
        run_passes(gm, [])  # drops what is dead
    found = find_repeats([gm.graph for gm in graphs])
    assert [len(stretches) for stretches in found] == [1, 1, 2]
    assert len({stretch.name for stretches in found for stretch in stretches}) == 1
    for gm, stretches, given, wanted in zip(graphs, found, inputs, expected, strict=True):
        assert {node.graph for stretch in stretches for node in stretch.nodes} == {gm.graph}
        assert edits(gm, OutlineRepeats(tuple(stretches))) == 1
        assert torch.equal(gm(*given)[0], wanted)


def test_a_name_says_what_is_computed() -> None:
    """The same for equal sub-graphs that were found apart, and another for other sizes or constants."""
    names = [find_repeats([gm.graph])[0][0].name for gm in (model("ab"), model("cde"), model("ab", wide=192))]
    assert names[0] == names[1] != names[2]
