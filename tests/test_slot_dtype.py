"""Slots in a narrower dtype than the model computes in: what is kept is rounded, and nothing else changes."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

import tcc
from tcc.errors import ExportError, PlanError
from tcc.plan import Action, CachePlan, Compute, Hold, Reuse, Update
from tests.dynamic_plans import SCORES, dynamic_plan
from tests.tiny_models import Case, case, relative_error, tensor_of

C, R = Compute(), Reuse()
BF16, FP8 = torch.bfloat16, torch.float8_e4m3fn
CACHED = Update("even", "cached")


def made(sites: tuple[str, ...], *column: Action, dtype: torch.dtype | None = BF16) -> CachePlan:
    """A plan that treats all sites alike."""
    actions = {(step, site): action for site in sites for step, action in enumerate(column)}
    return CachePlan(len(column), actions, {"even": torch.arange(0, 16, 2)}, slot_dtype=dtype)


def error(which: Case, plan: CachePlan, reference: CachePlan | None = None, backend: str = "eager") -> float:
    """The largest difference from the reference over two runs."""
    compiled = tcc.compile(which.model, plan, example_inputs=(which.args, which.kwargs), backend=backend)
    expected, worst = tcc.Reference(which.model, reference or plan, which.info), 0.0
    for step in [*range(plan.num_steps)] * 2:
        args, kwargs = which.inputs(step)
        worst = max(worst, relative_error(tensor_of(compiled(*args, **kwargs)), tensor_of(expected(*args, **kwargs))))
    return worst


OUTS = ("blocks.0.attn.out", "blocks.0.mlp.out", "blocks.1.mlp.out")
KEYS = ("blocks.0.attn.kv", "blocks.0.attn.out", "blocks.0.mlp.out")
PLANS: dict[str, CachePlan] = {
    "reuse": made(OUTS, C, R, R),
    "update": made(OUTS, C, Update("even"), Update("even", store=False), R),
    "keys": made(KEYS, C, CACHED, CACHED, R),
    "forecast": made(OUTS, C, C, Reuse(1, (2.0, -1.0)), C, Reuse(1, (1.5, -0.5))),
    "hold": made(("blocks.1.stream",), C, Hold(), C, Hold()),
    "one delta": made(("blocks.0.delta",), C, R, Update("even"), R),
}


@pytest.mark.parametrize("dtype", [BF16, FP8], ids=str)
@pytest.mark.parametrize("kind", PLANS)
def test_it_is_what_the_reference_says(kind: str, dtype: torch.dtype) -> None:
    """Equal to float32 rounding, as far as one step of the narrow type is not crossed by it; rounding does show."""
    plan = replace(PLANS[kind], slot_dtype=dtype)
    assert error(case("dit"), plan) < 1e-5
    assert error(case("dit"), plan, replace(plan, slot_dtype=None)) > 1e-5


def test_scores_read_what_is_kept() -> None:
    """Token choice by the norm of a stored value: of the rounded one, in both."""
    which = case("dit")
    plan = replace(dynamic_plan(which, SCORES["norm, stored"]), slot_dtype=BF16)
    assert error(which, plan) < 1e-5


def test_a_sum_is_rounded_once() -> None:
    """Slots that are merged keep the sum: the reference rounds each part, so they agree to the narrow type's step."""
    plan = made(("blocks.0.delta", "blocks.1.delta"), C, R)
    assert [slot.name for slot in plan.memory(case("dit").info).slots] == ["blocks.0.delta+1"]
    assert error(case("dit"), plan) < 2 * torch.finfo(BF16).eps


@pytest.mark.parametrize(("dtype", "share"), [(BF16, 2), (torch.float16, 2), (FP8, 4)], ids=str)
def test_bytes_are_fewer_and_macs_the_same(dtype: torch.dtype, share: int) -> None:
    """Known before, and what a session allocates."""
    which = case("dit")
    wide, narrow = (which.info.count(replace(PLANS["keys"], slot_dtype=kept)) for kept in (None, dtype))
    assert (wide.macs, wide.slot_bytes) == (narrow.macs, share * narrow.slot_bytes)
    inputs = (which.args, which.kwargs)
    compiled = tcc.compile(which.model, wide, example_inputs=inputs, backend="eager", slot_dtype=dtype)
    assert compiled.new_session().slot_bytes == compiled.plan.slot_bytes == narrow.slot_bytes
    assert {slot.dtype for slot in narrow.memory(which.info).slots} == {dtype}
    assert str(dtype).removeprefix("torch.") in narrow.summary()


def test_the_model_s_own_bits_stay() -> None:
    """A step that computes everything is not touched by what it stores."""
    which, plan = case("dit"), PLANS["reuse"]
    compiled = tcc.compile(which.model, plan, example_inputs=(which.args, which.kwargs), backend="eager")
    with torch.no_grad():
        assert torch.equal(tensor_of(compiled(*which.args, **which.kwargs)), tensor_of(which.model(*which.args)))


def test_a_saved_plan_keeps_it(tmp_path: Path) -> None:
    """Back and forth; a plan without one too."""
    for plan in (PLANS["reuse"], replace(PLANS["reuse"], slot_dtype=None)):
        plan.save(str(tmp_path / "plan.safetensors"))
        assert CachePlan.load(str(tmp_path / "plan.safetensors")).slot_dtype == plan.slot_dtype


@pytest.mark.parametrize("dtype", [torch.int8, "bfloat16"])
def test_only_floating_point_types(dtype: Any) -> None:
    """Others are refused when the plan is made."""
    with pytest.raises(PlanError, match=r"slot_dtype=.*floating-point"):
        made(OUTS, C, R, dtype=dtype)


def test_bundles_hold_half_precision_and_refuse_float8(tmp_path: Path) -> None:
    """The exported run is the reference's; the refusal comes before anything is written."""
    pytest.importorskip("onnxruntime")
    which = case("dit")
    inputs = (which.args, which.kwargs)
    written = tcc.export.bundle(which.model, PLANS["reuse"], inputs, tmp_path / "half", target="onnx")
    runner = tcc.load(written.folder)
    reference = tcc.Reference(which.model, PLANS["reuse"], which.info)
    for step in range(3):
        args, kwargs = which.inputs(step)
        # ONNX Runtime rounds float32 otherwise: that sends a value near the middle of two bfloat16 ones the other way
        assert relative_error(tensor_of(runner(*args, **kwargs)), tensor_of(reference(*args, **kwargs))) < 1e-4
    with pytest.raises(ExportError, match=r"slot_dtype=torch.float8_e4m3fn: .*give the plan another one"):
        tcc.export.bundle(which.model, replace(PLANS["reuse"], slot_dtype=FP8), inputs, tmp_path / "eighth")
    assert [path.name for path in tmp_path.iterdir()] == ["half"]
