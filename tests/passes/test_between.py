"""What stands between the calls of sub-graphs becomes sub-graphs too, which may write; what cannot be one is left."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, fx
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.symbolic_shapes import ShapeEnv

from tcc.passes.base import run_passes
from tcc.passes.between import stretches_between
from tcc.passes.outline_repeats import OutlineRepeats, invoke_subgraph, outline
from tcc.passes.repeats import find_repeats
from tests.graphs import Sketch, calls, values
from tests.passes.test_outline_repeats import block

aten = torch.ops.aten


class Blocks:
    """Blocks in a row, which become sub-graphs; what the test puts between them is written down before each."""

    def __init__(self) -> None:
        self.sketch = Sketch()
        self.sketch.mode = FakeTensorMode(shape_env=ShapeEnv())  # knows sizes that depend on the data
        self.x = self.sketch.call(aten.tanh.default, self.sketch.input("x", 2, 16, 64))

    def block(self, name: str) -> None:
        """One more block."""
        self.x, _ = block(self.sketch, self.x, name)

    def done(self, *outputs: fx.Node) -> fx.GraphModule:
        """The graph, of which the blocks are sub-graphs."""
        gm = self.sketch.done(self.x, *outputs)
        run_passes(gm, [])
        run_passes(gm, [OutlineRepeats(tuple(find_repeats([gm.graph])[0]))])
        return gm


def outline_all(gm: fx.GraphModule) -> list[list[str]]:
    """Do so, and tell what each stretch calls."""
    stretches = stretches_between(gm.graph)
    for stretch in stretches:
        outline(gm, stretch)
    gm.graph.lint()
    gm.recompile()
    return [[str(node.target).removeprefix("aten.") for node in stretch.nodes] for stretch in stretches]


def results(gm: fx.GraphModule, given: list[Tensor]) -> list[Tensor]:
    """What the graph returns, and what it leaves in its inputs."""
    given = [each.clone() for each in given]
    return [*gm(*given), *given]


def test_writes_and_sums_between_blocks_become_sub_graphs() -> None:
    """Nothing but calls is left; values and what is written are as before; again, nothing is found."""
    blocks = Blocks()
    for name in "abc":
        blocks.block(name)
        slot = blocks.sketch.input(f"slot:{name}", 2, 16, 64)
        blocks.sketch.call(aten.copy_.default, slot, blocks.x)
        blocks.x = blocks.sketch.call(aten.mul.Tensor, blocks.x, 0.5)
    gm = blocks.done()
    given = list(values(gm))
    before = results(gm, given)
    assert outline_all(gm) == [["tanh.default"], *3 * [["copy_.default", "mul.Tensor"]]]
    assert not [call for call in calls(gm) if call.startswith("aten")]
    names = [str(node.args[1]) for node in gm.graph.find_nodes(op="call_function", target=invoke_subgraph)]
    assert len({name for name in names if name.startswith("between")}) == 2
    for after, wanted in zip(results(gm, given), before, strict=True):
        assert torch.equal(after, wanted)
    assert outline_all(gm) == []


def test_graphs_share_what_stands_between() -> None:
    """Equal ones have one name in all graphs, and others another."""
    names = list[set[str]]()
    for factor in (0.5, 0.5, 0.25):
        blocks = Blocks()
        for name in "ab":
            blocks.block(name)
            blocks.x = blocks.sketch.call(aten.mul.Tensor, blocks.x, factor)
        names.append({stretch.name for stretch in stretches_between(blocks.done().graph)})
    assert names[0] == names[1]
    assert len(names[0] & names[2]) == 1  # what is before the first block


def test_views_are_made_outside() -> None:
    """A sub-graph returns what owns its memory, and no view of what it is given."""
    blocks = Blocks()
    blocks.block("a")
    view = blocks.sketch.call(aten.slice.Tensor, blocks.x, 2, 0, 8)
    blocks.x = blocks.sketch.call(aten.mul.Tensor, blocks.x, 0.5)
    blocks.block("b")
    gm = blocks.done(blocks.sketch.call(aten.exp.default, view))
    given = list(values(gm))
    before = results(gm, given)
    outline_all(gm)
    assert [call for call in calls(gm) if call.startswith("aten")] == ["aten.slice.Tensor"]
    for after, wanted in zip(results(gm, given), before, strict=True):
        assert torch.equal(after, wanted)


@pytest.mark.parametrize("left", ["sized by data", "two names", "result read"])
def test_what_is_no_function_of_tensors_is_left(left: str) -> None:
    """It is called as before, and the graph computes the same."""
    blocks = Blocks()
    sketch, outputs = blocks.sketch, list[fx.Node]()
    slot = sketch.input("slot:a", 2, 16, 64)
    half = sketch.call(aten.slice.Tensor, slot, 1, 0, 8)
    outputs.append(sketch.call(aten.exp.default, half))
    blocks.block("a")
    if left == "sized by data":
        outputs.append(sketch.call(aten.nonzero.default, blocks.x))
    elif left == "two names":
        sketch.call(aten.copy_.default, slot, blocks.x)
        outputs.append(sketch.call(aten.neg.default, half))
    else:
        outputs.append(sketch.call(aten.add_.Tensor, slot, blocks.x))
    blocks.block("b")
    gm = blocks.done(*outputs)
    given = list(values(gm))
    before = results(gm, given)
    outline_all(gm)
    kept = {"sized by data": "nonzero.default", "two names": "copy_.default", "result read": "add_.Tensor"}[left]
    assert f"aten.{kept}" in calls(gm)
    for after, wanted in zip(results(gm, given), before, strict=True):
        assert torch.equal(after, wanted)
