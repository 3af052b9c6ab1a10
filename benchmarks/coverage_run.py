"""A class of models under a backend, beside what it should give."""

from __future__ import annotations

import itertools
import re
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from coverage_models import Built
from coverage_plan import STEPS
from torch import Tensor
from torch.utils import _pytree as pytree

import tcc
from tcc.lowering import lower
from tcc.program import build_program
from tcc.runtime import Session

__all__ = ["ONNX", "TOLERANCE", "compare", "exact", "one_line", "outputs", "under", "without_folders"]

TOLERANCE = 1e-4
ONNX = "onnx"


def under(built: Built, info: tcc.ModelInfo, plan: tcc.CachePlan, backend: str) -> Callable[..., Any]:
    """The model with a plan, called like it: compiled by a backend, or exported and loaded again (`onnx`)."""
    if backend != ONNX:
        return Session(lower(build_program(info.captured, info.analysis, plan), backend))
    with tempfile.TemporaryDirectory() as folder:
        written = tcc.export.bundle(built.model, plan, ((), built.call(0)), Path(folder, "bundle"))
        runner = tcc.load(written.folder)
    steps = itertools.cycle(range(plan.num_steps))  # said: the inputs of some classes stay the same
    return lambda **inputs: runner.run_step(next(steps), *info.captured.flatten((), inputs))


def outputs(model: Any, built: Built, step: int) -> list[Tensor]:
    """The tensors that a call returns."""
    with torch.no_grad():
        return [leaf for leaf in pytree.tree_leaves(model(**built.call(step))) if isinstance(leaf, Tensor)]


def exact(built: Built, info: tcc.ModelInfo, backend: str) -> tuple[bool, float]:
    """Whether the uncached plan gives the bits of the model, both under one backend; and that backend's own error.

    Both get contiguous inputs, the one layout that tcc compiles for, and Dynamo breaks no graph where the data decide
    about sizes: kernels for other strides, or for half a graph, round in other places. Of ONNX Runtime there is no
    model to compare with: what counts is that the error is small.
    """
    found, wanted = under(built, info, tcc.plans.full(info, num_steps=1), backend), outputs(built.model, built, 1)
    if backend == ONNX:
        error = _distance(outputs(found, built, 1), wanted)
        return error <= TOLERANCE, error
    expected = _compiled(built, backend)
    same = all(torch.equal(a, b) for a, b in zip(outputs(found, built, 1), expected, strict=True))
    return same, _distance(expected, wanted)


def _compiled(built: Built, backend: str) -> list[Tensor]:
    """The outputs of the model itself, compiled by torch."""
    call = pytree.tree_map_only(Tensor, Tensor.contiguous, built.call(1))
    whole = {"capture_scalar_outputs": True, "capture_dynamic_output_shape_ops": True}
    with torch.no_grad(), torch._dynamo.config.patch(whole):
        original: Any = built.model if backend == "eager" else torch.compile(built.model, backend=backend)
        try:
            return [leaf for leaf in pytree.tree_leaves(original(**call)) if isinstance(leaf, Tensor)]
        except Exception as error:
            raise RuntimeError(f"torch.compile of the model itself fails: {one_line(error)}") from error


def compare(built: Built, found: Callable[..., Any], reference: tcc.Reference) -> tuple[list[float], float]:
    """The error of every step, and how far the plan's outputs are from the uncached model's at most."""
    errors, effect = [], 0.0
    for step in range(STEPS):
        expected = outputs(reference, built, step)
        errors.append(_distance(outputs(found, built, step), expected))
        effect = max(effect, _distance(outputs(built.model, built, step), expected))
    return errors, effect


def _distance(results: Sequence[Tensor], expected: Sequence[Tensor]) -> float:
    found = [
        float((a - b).abs().max() / b.abs().max().clamp_min(1e-30)) for a, b in zip(results, expected, strict=True)
    ]
    return max((e if e == e else float("inf")) for e in found)  # not a number is no match


def one_line(error: BaseException) -> str:
    """The first line of its message, and not too much of it."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return without_folders(lines[0]).partition(". The forward must not")[0][:300] if lines else ""


def without_folders(text: str) -> str:
    """`text` with the paths of files cut to what is the same on every machine."""
    text = re.sub(rf"{re.escape(tempfile.gettempdir())}/[^/\s]*/", "", text)
    return re.sub(r"[^\s\"(]*/site-packages/", "", text).replace(f"{Path(__file__).parents[1]}/", "")
