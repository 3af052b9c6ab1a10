"""DropDeadParts computes no part of a product that nobody reads."""

from __future__ import annotations

import operator
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor, fx, nn

import tcc
from tcc.lowering import lower
from tcc.passes.drop_dead_parts import DropDeadParts
from tcc.passes.macs import count
from tcc.plan import CachePlan, Compute, Reuse
from tcc.program import build_program
from tcc.runtime import Session
from tests.graphs import Sketch, calls, edits, text, values
from tests.running import CLOSE, call
from tests.tiny_models import Case, case, relative_error

aten = torch.ops.aten
B, D = 2, 4

Form = Callable[[Sketch, fx.Node, Sequence[int]], list[fx.Node]]


def chunked(sketch: Sketch, six: fx.Node, read: Sequence[int]) -> list[fx.Node]:
    """Adaptive norms: six chunks of the channels."""
    chunks = sketch.call(aten.chunk.default, six, 6, 1)
    return [sketch.call(operator.getitem, chunks, i) for i in read]


def sliced(sketch: Sketch, six: fx.Node, read: Sequence[int]) -> list[fx.Node]:
    """The same by slices."""
    return [sketch.call(aten.slice.Tensor, six, 1, i * D, (i + 1) * D) for i in read]


def selected(sketch: Sketch, six: fx.Node, read: Sequence[int]) -> list[fx.Node]:
    """The same by a dimension of their own."""
    apart = sketch.call(aten.view.default, six, [B, 6, D])
    return [sketch.call(aten.select.int, apart, 1, i) for i in read]


def modulation(form: Form, *read: int) -> fx.GraphModule:
    """`exp` of the parts `read` of a product of six parts."""
    sketch = Sketch()
    six = sketch.call(
        aten.linear.default, sketch.input("c", B, D), sketch.weight("w", 6 * D, D), sketch.weight("bias", 6 * D)
    )
    return sketch.done(*(sketch.call(aten.exp.default, part) for part in form(sketch, six, read)))


@pytest.mark.parametrize("form", [chunked, sliced, selected])
def test_parts_that_are_read_are_computed_alone(form: Form) -> None:
    """A third of the MACs, and the same outputs."""
    gm = modulation(form, 2, 5)
    inputs, macs = values(gm), count(gm.graph.nodes)
    before = gm(*inputs)
    assert edits(gm, DropDeadParts()) == 1
    assert count(gm.graph.nodes) * 3 == macs
    for after, wanted in zip(gm(*inputs), before, strict=True):
        torch.testing.assert_close(after, wanted, rtol=1e-6, atol=1e-6)  # products of four terms, in another kernel
    assert edits(gm, DropDeadParts()) == 0


def test_it_rewrites() -> None:
    """The graph is the one expected."""
    gm = modulation(chunked, 5)
    edits(gm, DropDeadParts())
    expected = Sketch()
    c, *weights = expected.input("c", B, D), expected.weight("w", 6 * D, D), expected.weight("bias", 6 * D)
    rows = [expected.call(aten.slice.Tensor, weight, 0, 5 * D, 6 * D) for weight in weights]
    gate = expected.call(aten.linear.default, c, *rows)
    assert text(gm) == text(expected.done(expected.call(aten.exp.default, gate)))


@pytest.mark.parametrize("form", [chunked, sliced, selected])
def test_a_product_that_is_read_whole_is_left_alone(form: Form) -> None:
    """One product is as cheap as six."""
    gm = modulation(form, *range(6))
    before = text(gm)
    assert edits(gm, DropDeadParts()) == 0
    assert text(gm) == before


def test_a_product_with_another_reader_is_left_alone() -> None:
    """It has to be computed whole anyway."""
    sketch = Sketch()
    six = sketch.call(aten.linear.default, sketch.input("c", B, D), sketch.weight("w", 6 * D, D))
    parts = chunked(sketch, six, [1])
    gm = sketch.done(sketch.call(aten.exp.default, parts[0]), sketch.call(aten.sum.default, six))
    assert edits(gm, DropDeadParts()) == 0
    assert calls(gm).count("aten.linear.default") == 1


class Cut(nn.Module):
    """The last channels of a product: as many as the input says."""

    def __init__(self) -> None:
        super().__init__()
        self.make = nn.Linear(D, 6 * D)

    def forward(self, x: Tensor, count: Tensor) -> Tensor:
        """`[B, D]` to `[B, count]`."""
        return self.make(x)[:, -count.item() :]


def test_parts_whose_size_the_data_decide_are_left_alone() -> None:
    """No plan can know which rows of the weight they are."""
    gm = torch.export.export(Cut(), (torch.ones(B, D), torch.tensor(3))).module(check_guards=False)
    assert any(isinstance(node.meta["val"], torch.SymInt) for node in gm.graph.nodes if "val" in node.meta)
    assert DropDeadParts().run(gm) == 0


def lowered(which: Case, plan: CachePlan) -> tuple[list[fx.GraphModule], Session]:
    """What a backend gets, variant by variant, and a session that runs it."""
    graphs: list[fx.GraphModule] = []

    def keep(gm: fx.GraphModule, _: list[torch.Tensor]) -> Any:
        graphs.append(gm)
        return gm.forward

    return graphs, Session(lower(build_program(which.info.captured, which.info.analysis, plan), keep))


def check(which: Case, plan: CachePlan, saved: int) -> None:
    """The second step computes as many MACs fewer than its variant says; the first one all; both as the reference."""
    graphs, session = lowered(which, plan)
    macs = [
        variant.macs - count(gm.graph.nodes)
        for variant, gm in zip(session.executable.program.variants, graphs, strict=True)
    ]
    assert macs == [0, saved]
    reference = tcc.Reference(which.model, plan, which.info)
    for step in range(2):
        assert relative_error(call(session, which, step), call(reference, which, step)) <= CLOSE


@pytest.mark.parametrize("name", ["dit", "hf_dit"])
def test_a_step_that_reuses_branches_computes_their_gates_alone(name: str) -> None:
    """Of every block's modulation, four parts of six are left out; a step that computes keeps them."""
    which = case(name)
    outs = [site for site, s in which.info.sites.items() if s.kind == "out"]
    plan = CachePlan(2, {(step, site): Reuse() if step else Compute() for step in range(2) for site in outs})
    check(which, plan, saved=2 * 2 * 4 * 32 * 32)  # two blocks, two samples, width 32


def test_a_step_that_reuses_keys_computes_queries_alone() -> None:
    """Of the fused projection a third is left."""
    plan = CachePlan(2, {(step, "blocks.1.attn.kv"): Reuse() if step else Compute() for step in range(2)})
    check(case("dit"), plan, saved=2 * 2 * 16 * 32 * 32)  # keys and values, two samples, 16 tokens, width 32
