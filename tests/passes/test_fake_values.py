"""Fake values are found again where a call is like one before, and only there."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import fx
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.symbolic_shapes import ShapeEnv

import tcc
from tcc.passes.fake_values import evaluate, fake_mode_of, memo_of
from tcc.passes.pipeline import StepKind
from tcc.plans import fora, tprr
from tcc.program import Variant
from tests.graphs import Sketch
from tests.tiny_models import dit

aten = torch.ops.aten
Facts = tuple[tuple[int, ...], tuple[int, ...], torch.dtype]


def facts(val: torch.Tensor) -> Facts:
    """What a value is like."""
    return tuple(val.shape), tuple(val.stride()), val.dtype


#: Pairs of calls that differ in one thing, on `x [4, 6]`, its transpose and `x` in float64.
Call = Callable[[Sketch, fx.Node], fx.Node]
PAIRS: dict[str, tuple[Call, Call]] = {
    "the operator": (lambda s, x: s.call(aten.neg.default, x), lambda s, x: s.call(aten.gt.Scalar, x, 0)),
    "the type of a number": (
        lambda s, x: s.call(aten.full_like.default, s.call(aten._to_copy.default, x, dtype=torch.int64), 1),
        lambda s, x: s.call(aten.mul.Tensor, s.call(aten._to_copy.default, x, dtype=torch.int64), 1.0),
    ),
    "a number": (lambda s, x: s.call(aten.sum.dim_IntList, x, [0]), lambda s, x: s.call(aten.sum.dim_IntList, x, [1])),
    "a keyword": (
        lambda s, x: s.call(aten._to_copy.default, x, dtype=torch.float64),
        lambda s, x: s.call(aten._to_copy.default, x, dtype=torch.float16),
    ),
    "the strides": (
        lambda s, x: s.call(aten.neg.default, s.call(aten.view.default, x, [6, 4])),
        lambda s, x: s.call(aten.neg.default, s.call(aten.transpose.int, x, 0, 1)),
    ),
    "the dtype of an operand": (
        lambda s, x: s.call(aten.neg.default, x),
        lambda s, x: s.call(aten.neg.default, s.call(aten._to_copy.default, x, dtype=torch.float64)),
    ),
}


@pytest.mark.parametrize("kind", PAIRS)
def test_calls_that_differ_have_values_of_their_own(kind: str) -> None:
    """Every value is what real tensors give, whichever call comes first."""
    for first, second in (PAIRS[kind], PAIRS[kind][::-1]):
        sketch = Sketch()
        x = sketch.input("x", 4, 6)
        nodes = [first(sketch, x), second(sketch, x)]
        with torch.no_grad():
            real = sketch.done(*nodes)(torch.randn(4, 6))
        assert [facts(node.meta["val"]) for node in nodes] == [facts(val) for val in real]


def test_a_call_like_one_before_is_not_evaluated() -> None:
    """Two blocks of one shape: the second costs nothing; values that are alike are one."""
    sketch = Sketch()
    x, y = sketch.input("x", 4, 6), sketch.input("y", 4, 6)
    one, other = sketch.call(aten.add.Tensor, x, y), sketch.call(aten.add.Tensor, y, x)
    memo = memo_of(sketch.mode)
    assert (memo.evaluated, memo.found) == (1, 1)
    assert one.meta["val"] is other.meta["val"]


def test_writes_and_sizes_of_data_are_evaluated_each_time() -> None:
    """A write has an effect; how many elements are true is another number for each mask."""
    mode = FakeTensorMode(shape_env=ShapeEnv())
    graph = fx.Graph()
    x = graph.placeholder("x")
    with mode:
        x.meta["val"] = torch.empty(4)
    for target, args in ((aten.nonzero.default, (x,)), (aten.copy_.default, (x, x))) * 2:
        evaluate(graph.call_function(target, args), mode)
    assert (memo_of(mode).evaluated, memo_of(mode).found) == (4, 0)


def evaluations(depth: int, plan: Callable[[Any], Any]) -> int:
    """How many fake values it takes to count a plan on a DiT of `depth` blocks."""
    info = dit(depth=depth, hidden_size=16).info
    memo = memo_of(fake_mode_of(info.captured.gm.graph))
    before = memo.evaluated
    plan(info)
    return memo.evaluated - before


POLICIES: dict[str, Callable[[Any], Any]] = {
    "reuse": lambda info: fora(info, num_steps=9, interval=3),
    "tokens": lambda info: tprr(info, num_steps=9, k1=1, k2=1, keep=0.5, attention="cached", level="out"),
}


@pytest.mark.parametrize("policy", POLICIES)
def test_the_work_of_planning_does_not_grow_with_the_blocks(policy: str) -> None:
    """Blocks are alike: twice as many need no more fake values."""
    assert evaluations(2, POLICIES[policy]) == evaluations(4, POLICIES[policy])


def test_counting_writes_no_code(monkeypatch: pytest.MonkeyPatch) -> None:
    """Graphs that are only counted are never made callable."""
    info = dit(depth=2, hidden_size=16).info

    def refuse(*_: Any, **__: Any) -> None:
        raise AssertionError("counting needs no code")

    monkeypatch.setattr(fx.Graph, "python_code", refuse)
    assert fora(info, num_steps=9, interval=3).bound > 1.5


def test_what_is_counted_is_what_is_compiled(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each kind of step is rewritten once, with every check, for a plan that a policy makes, counts and gives away."""
    which, checked = dit(depth=2, hidden_size=16), []
    build = tcc.program.program._build_variant

    def note(gm: fx.GraphModule, kind: StepKind, label: str, check: bool) -> Variant:
        checked.append(check)
        return build(gm, kind, label, check)

    monkeypatch.setattr(tcc.program.program, "_build_variant", note)
    given: Any = {"backend": "eager", "example_inputs": (which.args, which.kwargs)}
    compiled = tcc.compile(which.model, lambda info: fora(info, num_steps=4, interval=2), **given)
    assert compiled.plan.macs > 0
    assert checked == [True, True]
