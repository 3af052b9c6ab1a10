"""What Inductor is told about what slots keep: when it is stored, and where sums are added up."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, fx, nn

import tcc
from tcc.lowering import lower
from tcc.lowering.inductor_stores import StoreEarly
from tcc.models import DiT
from tcc.program import build_program
from tcc.runtime import Session
from tcc.timing import allocations
from tests.graphs import Sketch, calls

aten = torch.ops.aten
QUIET = pytest.mark.filterwarnings("ignore:.*torch.jit.script:DeprecationWarning")  # Inductor's own imports


def summed(*, masked: bool = False, narrow: bool = False) -> fx.GraphModule:
    """Three values one after the other, and at the end of the graph their sum, which a slot keeps: cast, if narrow."""
    sketch = Sketch()
    value, slot, mask = sketch.input("x", 4, 8), sketch.input("slot:a", 4, 8), sketch.input("mask", 4, 8)
    terms = []
    for target in (aten.exp.default, aten.sin.default, aten.cos.default):
        value = sketch.call(target, value)
        terms.append(value)
    out = sketch.call(aten.abs.default, value)
    if masked:
        zero = [sketch.call(aten.full.default, [4, 8], 0.0) for _ in terms]
        terms = [
            sketch.call(aten.where.self, sketch.call(aten.ge.Scalar, mask, 0), *p)
            for p in zip(zero, terms, strict=True)
        ]
    total = sketch.call(aten.add.Tensor, sketch.call(aten.add.Tensor, terms[0], terms[1]), terms[2])
    if narrow:
        total = sketch.call(torch.ops.prims.convert_element_type.default, total, torch.bfloat16)
    sketch.call(aten.copy_.default, slot, total)
    return sketch.done(out)


def told(gm: fx.GraphModule) -> list[str]:
    """The operators after the pass, without their overloads."""
    StoreEarly()(gm.graph)
    gm.graph.lint()
    return [name.split(".")[1] for name in calls(gm)]


def test_every_term_is_added_as_soon_as_it_is_there() -> None:
    """Inductor moves additions to the one who reads them, and its order of steps would follow."""
    assert told(summed()) == ["exp", "put", "sin", "add", "put", "cos", "add", "put", "abs", "copy_"]


def test_a_sum_that_is_kept_narrow_is_added_up_beside_the_slot() -> None:
    """Each term as soon as it is there, or all of them would wait for the cast."""
    assert told(summed(narrow=True)) == [
        "exp", "sin", "add", "made", "cos", "add", "convert_element_type", "copy_", "abs",
    ]  # fmt: skip


def test_what_a_term_alone_reads_comes_with_it() -> None:
    """As where blocks update fewer and fewer tokens, and the sum has zeros for those."""
    mask = ["full", "ge", "where"]
    found = told(summed(masked=True))
    assert [name for name in found if name not in mask] == [
        "exp", "sin", "put", "add", "put", "cos", "add", "put", "abs", "copy_",
    ]  # fmt: skip
    assert found.index("cos") < found.index("where", found.index("cos")) < found.index("abs")


def test_a_first_term_that_nobody_else_reads_is_computed_in_the_slot() -> None:
    """One that somebody reads is copied there."""
    for masked in (False, True):
        gm = summed(masked=masked)
        told(gm)
        alone = [node.args[2] for node in gm.graph.nodes if node.target is torch.ops.tcc.put.default]
        assert alone == [masked, True, True]


def test_any_other_value_is_stored_as_soon_as_it_is_there() -> None:
    """But where somebody still reads what the slot held before."""
    for read in (False, True):
        sketch = Sketch()
        x, slot = sketch.input("x", 4, 8), sketch.input("slot:a", 4, 8)
        kept = sketch.call(aten.exp.default, x)
        out = sketch.call(aten.sin.default, slot if read else kept)
        sketch.call(aten.copy_.default, slot, kept)
        order = ["exp", "sin", "copy_"] if read else ["exp", "copy_", "sin"]
        assert told(sketch.done(out)) == order


@pytest.mark.parametrize("over_the_old", [False, True])
def test_what_is_handed_on_to_another_slot_comes_first(over_the_old: bool) -> None:
    """Also in the writing of torch 2.15, where it is copied over the other slot's old value before."""
    sketch = Sketch()
    x, slot, older = sketch.input("x", 4, 8), sketch.input("slot:a", 4, 8), sketch.input("slot:b", 4, 8)
    kept = sketch.call(aten.exp.default, x)
    out = sketch.call(aten.sin.default, kept)
    handed_on = sketch.call(aten.copy.default, older, slot) if over_the_old else slot
    sketch.call(aten.copy_.default, older, handed_on)
    sketch.call(aten.copy_.default, slot, kept)
    assert told(sketch.done(out)) == ["copy_", "exp", "copy_", "sin"]


@pytest.mark.compiles
@QUIET
@pytest.mark.parametrize("operator", [torch.neg, torch.sort, nn.Identity()])
def test_what_is_put_in_a_slot_is_right_wherever_it_was_made(operator: Callable[[Tensor], Any]) -> None:
    """In the slot; or by a library call or the caller, in memory that is not the slot's: that is copied."""

    def step(slot: Tensor, x: Tensor) -> None:
        made = operator(x)
        slot.copy_(torch.ops.tcc.put(slot, made[0] if isinstance(made, tuple) else made, True))

    wanted, got, x = torch.zeros(4, 8), torch.zeros(4, 8), torch.randn(4, 8)
    kept = x.clone()
    step(wanted, x)
    options: dict[str, Any] = {"post_grad_custom_post_pass": StoreEarly()}  # Inductor's cache asks it what has changed
    torch.compile(step, fullgraph=True, options=options)(got, x)
    assert torch.equal(got, wanted)
    assert torch.equal(x, kept)


@pytest.mark.compiles
@QUIET
def test_a_step_that_stores_takes_no_more_than_the_model() -> None:
    """Four blocks with a slot each: nothing is begun early, and no value is kept for its copy."""
    torch.manual_seed(0)
    model = DiT(input_size=16, patch_size=2, hidden_size=64, depth=4, num_heads=2, num_classes=10).eval()
    call = (torch.randn(2, 4, 16, 16), torch.tensor([100, 100]), torch.tensor([1, 2]))
    info = tcc.inspect(model, *call)
    plan = tcc.plans.tprr(info, num_steps=2, keep=0.5, attention="current", level="block")
    peaks = []
    for each in (plan, tcc.plans.full(info, num_steps=2)):
        session = Session(lower(build_program(info.captured, info.analysis, each, check=False)))
        for _ in range(2):
            session(*call)
        peaks.append(max(allocations(lambda: session(*call)).peak for _ in range(2)))  # noqa: B023
    assert plan.slot_bytes == 4 * 2 * 64 * 64 * 4
    assert peaks[0] <= 1.01 * peaks[1]


@pytest.mark.compiles
@QUIET
def test_a_narrow_sum_takes_one_stream_more_at_any_depth() -> None:
    """It is added up in float32 beside the slot; that takes no more with six blocks than with three."""
    call = (torch.randn(2, 4, 16, 16), torch.tensor([100, 100]), torch.tensor([1, 2]))
    stream = 2 * 64 * 64 * 4
    for depth in (3, 6):
        torch.manual_seed(0)
        model = DiT(input_size=16, patch_size=2, hidden_size=64, depth=depth, num_heads=2, num_classes=10).eval()
        info = tcc.inspect(model, *call)
        narrow = tcc.plans.fora(info, num_steps=2, interval=2, sites="delta")
        peaks = []
        for plan in (replace(narrow, slot_dtype=torch.bfloat16), tcc.plans.full(info, num_steps=1)):
            program = build_program(info.captured, info.analysis, plan, check=False)
            session = Session(lower(program))
            for _ in range(2 * plan.num_steps):
                session(*call)
            peaks.append(max(allocations(lambda: session(*call)).peak for _ in range(plan.num_steps)))  # noqa: B023
        assert program.slot_bytes == 0
        assert peaks[0] <= peaks[1] + 1.05 * stream
