"""Holding a bundle against the compiled model, step by step."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch.utils import _pytree as pytree  # no public pytree module in torch 2.11-2.13

from tcc.export.runner import Runner

__all__ = ["StepError", "verify"]


@dataclass(frozen=True)
class StepError:
    """How far a bundle is from the compiled model at one step.

    Attributes:
        step: the step.
        graph: the number of the graph that it runs.
        largest: the largest difference of any output.
        relative: the same over the largest magnitude of that output.
    """

    step: int
    graph: int
    largest: float
    relative: float


def verify(
    runner: Runner, compiled: Callable[..., Any], inputs: Callable[[int], list[torch.Tensor]]
) -> Iterator[StepError]:
    """Run a bundle and the compiled model beside it over the whole schedule; both start a new run.

    Args:
        runner: the bundle.
        compiled: a fresh session of the model that was compiled with the same plan, called with flat tensors.
        inputs: the inputs of a step, in the manifest's order.

    Yields:
        The error of every step, as it is done.
    """
    runner.reset()
    for step in range(runner.num_steps):
        tensors = inputs(step)
        specs = runner.manifest.inputs  # of other dtypes than the model's where Triton has no bfloat16
        found = runner(*(t.to(runner.device, spec.torch_dtype) for t, spec in zip(tensors, specs, strict=True)))
        expected = [leaf for leaf in pytree.tree_leaves(compiled(*tensors)) if isinstance(leaf, torch.Tensor)]
        found = [found] if isinstance(found, torch.Tensor) else list(found)
        errors = [_error(a, b) for a, b in zip(found, expected, strict=True)]
        largest = max(errors, key=lambda pair: pair[1])
        yield StepError(step, runner.manifest.steps[step].graph, *largest)


def _error(found: torch.Tensor, expected: torch.Tensor) -> tuple[float, float]:
    """The largest difference, and the same over the largest magnitude; infinite where a value is no number."""
    found = found.to(expected.device)
    difference = float((found.double() - expected.double()).abs().max()) if found.numel() else 0.0
    largest = float(expected.double().abs().max()) if expected.numel() else 0.0
    if not (math.isfinite(difference) and math.isfinite(largest)):
        return math.inf, math.inf
    return difference, difference / max(largest, 1e-30)
