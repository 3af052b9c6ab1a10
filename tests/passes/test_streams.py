"""The residual stream, its blocks and branches, from dataflow alone."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

import tcc
from tcc.errors import AnalysisError
from tcc.passes.dataflow import Dataflow
from tcc.passes.streams import Stream, find_streams
from tests.graphs import Sketch
from tests.tiny_models import Block, Tokens, case, noise

aten = torch.ops.aten


def stream_of(model: nn.Module) -> Stream:
    """The stream of a model of `[B, S, D]` tokens."""
    graph = tcc.inspect(model.eval(), noise(2, 12, 16)).captured.gm.graph
    return find_streams(graph, Dataflow(graph))[0]


def stream(name: str) -> Stream:
    """The stream of a named case."""
    graph = case(name).info.captured.gm.graph
    return find_streams(graph, Dataflow(graph))[0]


@pytest.mark.parametrize(
    ("name", "blocks", "branches"),
    [
        ("dit", ["blocks.0", "blocks.1"], ["attn", "mlp"]),
        ("hf_dit", ["transformer_blocks.0", "transformer_blocks.1"], ["attn", "mlp"]),
        ("hf_pixart", ["transformer_blocks.0", "transformer_blocks.1"], ["attn", "cross", "mlp"]),
        ("separate", ["blocks.0", "blocks.1"], ["attn", "mlp"]),
        ("parallel", ["blocks.0", "blocks.1"], ["attn", "mlp"]),
        ("long_skip", ["blocks.0", "blocks.1", "blocks.2"], ["attn", "mlp"]),
        ("conv", ["blocks.0", "blocks.1"], ["attn", "mlp"]),
    ],
)
def test_blocks_and_branches(name: str, blocks: list[str], branches: list[str]) -> None:
    """Blocks carry their module paths; branches are told by what they attend to."""
    found = stream(name)
    assert [block.name for block in found.blocks] == blocks
    assert [[branch for branch, _ in block.branches] for block in found.blocks] == [branches] * len(blocks)


@pytest.mark.parametrize(("name", "gated"), [("dit", True), ("hf_dit", True), ("separate", False)])
def test_the_output_is_what_the_gate_multiplies(name: str, gated: bool) -> None:
    """With a gate, `out` is the factor from the stream; without one, it is the delta."""
    for block in stream(name).blocks:
        for _, branch in block.branches:
            assert (branch.out is not branch.delta) == gated
            assert (branch.delta.target is aten.mul.Tensor) == gated
            assert branch.add.target is aten.add.Tensor


def test_parallel_branches_read_the_same_stream() -> None:
    """The second branch's origin is the first one's, though it is added later."""
    (_, attn), (_, mlp) = stream("parallel").blocks[0].branches
    assert attn.origin is mlp.origin is attn.stream_in
    assert mlp.stream_in is attn.add


def test_sequential_branches_read_the_stream_before_them() -> None:
    """The second branch's origin is the first one's sum."""
    (_, attn), (_, mlp) = stream("separate").blocks[0].branches
    assert mlp.origin is mlp.stream_in is attn.add


def test_a_block_that_scales_the_stream_is_not_continuous() -> None:
    """Its change of the stream is not the sum of its branches."""
    assert [block.continuous for block in stream("rescaled").blocks] == [False, False]
    assert [block.continuous for block in stream("separate").blocks] == [True, True]


def test_other_adds_are_no_stream() -> None:
    """Positions, embeddings and sums inside a branch are not residual."""
    found = stream("dit")
    assert found.shape == (2, 16, 32)
    assert sum(len(block.branches) for block in found.blocks) == 4


def test_long_skips_enter_between_blocks() -> None:
    """The later half takes the streams of the earlier half in, latest first; the block's own stream comes before."""
    blocks = {block.name: block for block in stream("uvit").blocks}
    assert list(blocks) == ["in_blocks.0", "in_blocks.1", "mid_block", "out_blocks.0", "out_blocks.1"]
    assert [len(block.skips) for block in blocks.values()] == [0, 0, 0, 1, 1]
    for taker, source, before in (("out_blocks.0", "in_blocks.1", "mid_block"), ("out_blocks.1", "in_blocks.0", "")):
        (skip,), block = blocks[taker].skips, blocks[taker]
        assert skip.value is blocks[source].stream_out
        assert skip.reader.target is aten.cat.default
        assert block.entry is skip.beside is blocks[before or "out_blocks.0"].stream_out
        assert block.stream_in.target is aten.linear.default
        assert block.continuous
    assert blocks["mid_block"].entry is blocks["mid_block"].stream_in is blocks["in_blocks.1"].stream_out


class Joined(nn.Module):
    """Three blocks; between them something of the stream's shape is added that is or is not an earlier stream."""

    def __init__(self, *, embedded: bool) -> None:
        super().__init__()
        self.embed, self.other = nn.Linear(16, 16), nn.Linear(16, 16)
        self.blocks, self.embedded = nn.ModuleList(Block(16) for _ in range(3)), embedded

    def forward(self, x: Tensor) -> Tensor:
        """Add the embedded input, or a value that never was in the stream, before the last block."""
        first = self.embed(x)
        later = self.blocks[1](self.blocks[0](first))
        out: Tensor = self.blocks[2](later + (first if self.embedded else self.other(x)))
        return out


def test_an_added_skip_is_one_too() -> None:
    """The embedded input is the first stream. The add is no branch: it would skip the blocks between."""
    found = stream_of(Joined(embedded=True))
    assert [len(block.skips) for block in found.blocks] == [0, 0, 1]
    (skip,) = found.blocks[2].skips
    assert (skip.value, skip.reader) == (found.blocks[0].stream_in, found.blocks[2].stream_in)
    assert skip.beside is found.blocks[1].stream_out


def test_what_was_never_in_the_stream_is_no_skip() -> None:
    """A value beside the stream changes it; it does not come from it."""
    found = stream_of(Joined(embedded=False))
    assert [len(block.branches) for block in found.blocks] == [2, 2, 2]
    assert [block.skips for block in found.blocks] == [(), (), ()]


class Unnumbered(nn.Module):
    """Two blocks that do not stand in a list: one module holds all the adds."""

    def __init__(self) -> None:
        super().__init__()
        self.one, self.two = Block(16), Block(16)

    def forward(self, x: Tensor) -> Tensor:
        """Both, written out."""
        x = x + self.one.attn(self.one.norm1(x))
        x = x + self.one.mlp(self.one.norm2(x))
        x = x + self.two.attn(self.two.norm1(x))
        return x + self.two.mlp(self.two.norm2(x))


def test_without_numbers_a_block_starts_at_each_attention() -> None:
    """Adds of one module are cut where an attention branch begins."""
    found = stream_of(Unnumbered())
    assert [block.name for block in found.blocks] == ["block0", "block1"]
    assert [[name for name, _ in block.branches] for block in found.blocks] == [["attn", "mlp"], ["attn", "mlp"]]


class TwoMlps(nn.Module):
    """A block with two MLP branches."""

    def __init__(self) -> None:
        super().__init__()
        self.inner, self.more = Block(16), Block(16)

    def forward(self, x: Tensor) -> Tensor:
        """Attention, MLP, MLP."""
        x = self.inner(x)
        out: Tensor = x + self.more.mlp(self.more.norm2(x))
        return out


def test_branches_of_one_kind_are_numbered() -> None:
    """The second one of a kind is `mlp2`."""
    found = stream_of(Tokens([TwoMlps(), TwoMlps()]))
    assert [name for name, _ in found.blocks[0].branches] == ["attn", "mlp", "mlp2"]


@pytest.mark.parametrize("name", ["plain"])
def test_a_model_without_a_stream_is_refused(name: str) -> None:
    """The error says what was looked for, what was found, and what to check."""
    which = case(name)
    message = r"no residual stream found: tcc looks for a chain of `x = x \+ f\(x\)` .* found 0 such add\(s\)"
    with pytest.raises(AnalysisError, match=message):
        tcc.inspect(which.model, *which.args)


def test_a_single_residual_add_is_no_stream() -> None:
    """One add could be anything."""

    class One(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.f = nn.Linear(16, 16)

        def forward(self, x: Tensor) -> Tensor:
            """Add once."""
            out: Tensor = x + self.f(x)
            return out

    with pytest.raises(AnalysisError, match=r"found 1 such add\(s\)"):
        tcc.inspect(One().eval(), noise(2, 12, 16))


def test_dataflow_follows_every_path() -> None:
    """A node depends on its ancestors, not on itself, nor on its readers."""
    sketch = Sketch()
    x = sketch.input("x", 2)
    a, b = sketch.call(aten.exp.default, x), sketch.call(aten.neg.default, x)
    c = sketch.call(aten.add.Tensor, a, b)
    flow = Dataflow(sketch.done(c).graph)
    assert flow.depends(c, x)
    assert not flow.depends(x, c)
    assert not flow.depends(a, b)
    assert not flow.depends(a, a)
    assert flow.between(a, [c]) == [c]
    assert flow.between(x, [c]) == [a, b, c]
