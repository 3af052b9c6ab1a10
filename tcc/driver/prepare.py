"""What is made of a model for its calls: a graph and a plan per set of shapes, programs, compiled steps."""

from __future__ import annotations

import functools
import threading
import time
import warnings
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any, Literal, NamedTuple

import torch
from torch import nn
from torch.export import ExportedProgram

from tcc.capture import Captured, capture
from tcc.driver.parts import Parts
from tcc.errors import CallError, PlanError, ShapeError
from tcc.info import ModelInfo
from tcc.lowering import Backend, Compiled, Known, lower
from tcc.passes.sites import analyse
from tcc.plan import CachePlan
from tcc.plan.checks import check_model
from tcc.plan.start import check_start, start_at
from tcc.program import Program
from tcc.runtime import Executable
from tcc.runtime.folding import Folding, find_folding

__all__ = ["OnShapeChange", "Options", "Policy", "Prepared", "Ready"]

Policy = Callable[[ModelInfo], CachePlan]
OnShapeChange = Literal["error", "recapture"]


class Options(NamedTuple):
    """How to compile, and what to do with calls of other shapes; see `tcc.compile`."""

    backend: str | Backend
    options: dict[str, Any] | None
    progress: Callable[[str], None] | None
    mode: str
    on_shape_change: OnShapeChange
    max_shapes: int
    noise_level: str | None
    max_slot_bytes: int | None
    calls_per_step: int
    slot_dtype: torch.dtype | None
    regional: bool
    timesteps: torch.Tensor | None


@dataclass(eq=False)
class _Shape:
    """The model at one set of input shapes, with what was made of it; the plans of a model share it."""

    info: ModelInfo
    parts: Parts
    runners: dict[Known, Compiled] = field(default_factory=dict)


@dataclass(frozen=True, eq=False)
class Ready:
    """One plan at one set of input shapes; the programs of its runs, by the step that they start at."""

    shape: _Shape
    plan: CachePlan
    options: Options
    executables: dict[int, Executable] = field(default_factory=dict)

    def flatten(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> list[torch.Tensor]:
        """The tensor inputs of a call.

        Raises:
            CallError: the call differs from the captured one, see `Captured.flatten`.
        """
        return self.shape.info.captured.flatten(args, kwargs)

    def noise_level(self, tensors: list[torch.Tensor]) -> torch.Tensor | None:
        """The noise level of a call; None where it is not known."""
        level = self.shape.info.captured.noise_level
        return tensors[level].detach().max() if level is not None and tensors[level].numel() else None

    def executable(self, start: int) -> Executable:
        """The program of the runs that start at step `start`, compiled.

        Raises:
            PlanError: the plan has no such step, or a session would keep more than `max_slot_bytes`.
        """
        check_start(start, self.plan.num_steps)  # before it is looked up: 0.0 is found as 0
        if start not in self.executables:
            shape, options = self.shape, self.options
            self.executables[start] = lower(
                self.program(start_at(self.plan, start)), options.backend, options.options, options.progress,
                mode=options.mode, regional=options.regional, folding=self.folding, known=shape.runners,
            )  # fmt: skip
        return self.executables[start]

    def program(self, plan: CachePlan) -> Program:
        """The rewritten graphs; where the budget is short, with as few slots as it takes."""
        make = functools.partial(self.shape.info.program, plan, progress=self.options.progress)
        budget, folding = self.options.max_slot_bytes, self.folding
        if budget is None or folding is None:
            return make(max_slot_bytes=budget)
        try:
            return make(max_slot_bytes=budget - folding.bytes)
        except PlanError as error:
            slots = make(max_slot_bytes=budget).slot_bytes  # says what to save where slots alone are too much
            raise folding.over_budget(slots, budget) from error

    @functools.cached_property
    def folding(self) -> Folding | None:
        """What its runs compute once; None without timesteps.

        Raises:
            PlanError: the timesteps do not fit the model or the plan.
        """
        info, timesteps = self.shape.info, self.options.timesteps
        return None if timesteps is None else find_folding(info.captured, info.analysis, self.plan, timesteps)


class Prepared:
    """A model and a plan, with all that was made of them.

    Args:
        model: the model.
        plan: the plan, or the policy that makes one for each set of shapes.
        options: how to compile.
        shapes: what was made of the model for other plans; the one that was used last is the last.

    Attributes:
        lock: held while something is made, so that threads make it once.
        last: what ran last; None before the first call.
    """

    def __init__(
        self, model: nn.Module | ExportedProgram, plan: CachePlan | Policy, options: Options,
        shapes: list[_Shape] | None = None,
    ) -> None:  # fmt: skip
        self.model, self.request, self.options = model, plan, options
        self.shapes: list[_Shape] = [] if shapes is None else shapes
        self.readies: list[Ready] = []
        self.last: Ready | None = None
        self.lock = threading.RLock()

    def with_plan(self, plan: CachePlan | Policy) -> Prepared:
        """The same model under another plan."""
        return Prepared(self.model, plan, self.options, self.shapes)

    def match(
        self, args: tuple[Any, ...], kwargs: dict[str, Any], *, busy: bool = False
    ) -> tuple[Ready, list[torch.Tensor]]:
        """The plan for calls like this one, and the call's tensors; captured if there is none yet.

        Args:
            args: the call's positional arguments.
            kwargs: its keyword arguments.
            busy: an image has begun in the call's context, so that nothing is captured.

        Raises:
            ShapeError: the shapes are new, and may not be.
            CallError: the call differs from the captured one in something else.
            CaptureError, AnalysisError, PlanError: no plan can be made for such calls.
        """
        error = None
        for ready in reversed(self.readies):
            try:
                tensors = ready.flatten(args, kwargs)
            except ShapeError as other:
                error = error or other
                continue
            self._use(ready)
            return ready, tensors
        if error is not None and (busy or self.options.on_shape_change == "error"):
            raise error
        ready = self._make(args, kwargs)
        return ready, ready.flatten(args, kwargs)

    def _make(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Ready:
        shape = self._shape(args, kwargs)
        plan = self.request if isinstance(self.request, CachePlan) else self.request(shape.info)
        if not isinstance(plan, CachePlan):
            raise PlanError(f"the policy gave {plan!r}: it must return a tcc.CachePlan")
        try:
            check_model(plan, shape.info.key)
        except PlanError as error:
            if not self.readies:
                raise
            raise PlanError(f"{error}; or give tcc.compile a policy, which makes a plan for each shape") from error
        if self.options.slot_dtype is not None:
            plan = shape.info.count(replace(plan, slot_dtype=self.options.slot_dtype))
        ready = Ready(shape, plan, self.options)
        self.readies = [known for known in self.readies if known.shape in self.shapes] + [ready]
        self._use(ready)
        return ready

    def _shape(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> _Shape:
        """The model at the shapes of this call: known from another plan, or captured now."""
        for shape in self.shapes:
            try:
                shape.info.captured.flatten(args, kwargs)
            except ShapeError:
                if self.options.on_shape_change == "error":
                    return shape  # the call will say so
                continue
            return shape
        if self.shapes:
            Parts.of(self.model).check(self.shapes[0].parts)
        captured = self._capture(args, kwargs)
        self.shapes.append(_Shape(ModelInfo(captured, analyse(captured.gm.graph)), Parts.of(self.model)))
        if len(self.shapes) > self.options.max_shapes:
            self._drop(self.shapes.pop(0))
        return self.shapes[-1]

    def _drop(self, shape: _Shape) -> None:
        sizes = ", ".join(f"{spec.name} {list(spec.shape)}" for spec in shape.info.captured.inputs)
        warnings.warn(
            f"the model has been called with more than max_shapes={self.options.max_shapes} sets of input shapes; what "
            f"was compiled for the one not used for longest ({sizes}) is dropped, and will be compiled again if it "
            "comes back: pad prompts to a few lengths, or raise tcc.compile(..., max_shapes=...)",
            stacklevel=2,
        )

    def _use(self, ready: Ready) -> None:
        """`ready` is what was used last."""
        self.last = ready
        _move_to_end(self.shapes, ready.shape)
        _move_to_end(self.readies, ready)

    def _capture(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Captured:
        return capture(self.model, args, kwargs, level=self.options.noise_level)

    def check_parts(self, ready: Ready, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """The model is the one that was captured for calls like this one.

        Raises:
            CallError: it has other parts, or computes something else since its attributes were set.
        """
        now, shape = Parts.of(self.model), ready.shape
        now.check(shape.parts)
        changed = now.changed(shape.parts)
        if changed:
            self._look_again(shape, f"{', '.join(changed[:3])}{', ...' if changed[3:] else ''}", args, kwargs)
        shape.parts = now

    def whole_program(self, ready: Ready) -> Program:
        """The program of a run of the whole plan.

        Raises:
            CallError: the model has other parts or settings than when it was captured.
        """
        now = Parts.of(self.model)
        now.check(ready.shape.parts)
        if changed := now.changed(ready.shape.parts):
            raise CallError(
                f"{', '.join(changed[:3])} of the model changed after it was compiled: call it once more, which finds "
                "out whether it computes the same, or call tcc.compile anew"
            )
        return ready.program(ready.plan)

    def _look_again(self, shape: _Shape, changed: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """The model computes what it did, although attributes `changed`: capturing it again tells.

        Raises:
            CallError: it computes something else.
        """
        begun = time.perf_counter()
        if not self._capture(args, kwargs).is_same(shape.info.captured):
            raise CallError(
                f"the model computes something else since {changed} changed, after it was compiled (an adapter's "
                "scale, for example): call tcc.compile anew, or do that before the first call"
            )
        warnings.warn(
            f"{changed} of the model changed after it was compiled, and it took {time.perf_counter() - begun:.1f} s to "
            "see that it still computes the same: set attributes before the first call",
            stacklevel=2,
        )


def _move_to_end(known: list[Any], used: Any) -> None:
    if known[-1] is not used and used in known:
        known.remove(used)
        known.append(used)
