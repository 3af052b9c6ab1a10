"""`tcc.compile`: from a model and a plan to a compiled model."""

from __future__ import annotations

import contextlib
import threading
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any, Literal, NamedTuple, get_args

from torch import nn
from torch.export import ExportedProgram

from tcc.checks import check_model
from tcc.errors import CallError, PlanError, ShapeError
from tcc.info import ModelInfo, inspect
from tcc.passes.pipeline import StepKind
from tcc.plan import CachePlan
from tcc.plan_start import start_at
from tcc.program import Program, Variant, build_program
from tcc.runtime import Backend, Compiled, Executable, Session, lower
from tcc.stand_in import StandIn

__all__ = ["CompiledModel", "compile"]

Policy = Callable[[ModelInfo], CachePlan]
OnShapeChange = Literal["error", "recapture"]


class _Options(NamedTuple):
    """How to compile, and what to do with calls of other shapes."""

    backend: str | Backend
    options: dict[str, Any] | None
    progress: Callable[[str], None] | None
    mode: str
    on_shape_change: OnShapeChange


@dataclass(frozen=True)
class _Shape:
    """The model at one set of input shapes, with what was made of it; the plans of a model share it."""

    info: ModelInfo
    weights: tuple[int, ...]
    variants: dict[StepKind, Variant] = field(default_factory=dict)
    runners: dict[StepKind, Compiled] = field(default_factory=dict)


@dataclass(frozen=True)
class _Ready:
    """One plan at one set of input shapes; the programs of its runs, by the step that they start at."""

    shape: _Shape
    plan: CachePlan
    executables: dict[int, Executable] = field(default_factory=dict)


class _Place(NamedTuple):
    """Where a caller says that it is: the context's name, the step, and the number of steps."""

    context: str = ""
    step: int | None = None
    num_steps: int | None = None


class CompiledModel(StandIn):
    """A model that runs a plan; called like the model it was made from, once per denoising step.

    It has the attributes of the original model, and keeps it: see `tcc.stand_in.StandIn`.
    """

    def __init__(self, model: nn.Module | ExportedProgram, plan: CachePlan | Policy, options: _Options) -> None:
        super().__init__(model)
        self._request = plan
        self._options = options
        self._shapes: list[_Shape] = []
        self._readies: list[_Ready] = []
        self._ready: _Ready | None = None  # what ran last
        self._sessions: dict[str, Session] = {}
        self._places: dict[int, _Place] = {}
        self._start = 0

    def with_plan(self, plan: CachePlan | Policy) -> CompiledModel:
        """The same model under another plan: capture, analysis and the variants that both plans have are shared.

        Sessions are not shared. After the first call of this model or `prepare`, nothing is captured again.
        """
        other = CompiledModel(self._model[0], plan, self._options)
        other._shapes = self._shapes
        return other

    def prepare(self, *args: Any, **kwargs: Any) -> CompiledModel:
        """Capture, rewrite and compile now, for calls like this one."""
        self._executable(self._get_ready(args, kwargs), self._start)
        return self

    def _get_ready(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> _Ready:
        """The plan for calls like this one. Where other shapes are errors there is one, and the call will say so."""
        fixed = self._options.on_shape_change == "error"
        found = [r for r in self._readies if fixed or r.shape.info.captured.fits(args, kwargs)]
        if not found:
            shape = self._get_shape(args, kwargs, fixed)
            plan = self._request if isinstance(self._request, CachePlan) else self._request(shape.info)
            self._check_model(plan, shape)
            found = [_Ready(shape, plan)]
            self._readies += found
        self._ready = found[0]
        return found[0]

    def _get_shape(self, args: tuple[Any, ...], kwargs: dict[str, Any], fixed: bool) -> _Shape:
        found = [s for s in self._shapes if fixed or s.info.captured.fits(args, kwargs)]
        if not found:
            found = [_Shape(inspect(self._model[0], *args, **kwargs), self._identities())]
            self._shapes += found
        return found[0]

    def _check_model(self, plan: CachePlan, shape: _Shape) -> None:
        try:
            check_model(plan, shape.info.key)
        except PlanError as error:
            if not self._readies:
                raise
            raise PlanError(f"{error}; or give tcc.compile a policy, which makes a plan for each shape") from error

    def _executable(self, ready: _Ready, start: int) -> Executable:
        """The program of the runs that start at `start`, compiled."""
        if start not in ready.executables:
            plan, shape, options = start_at(ready.plan, start), ready.shape, self._options
            captured, analysis, progress = shape.info.captured, shape.info.analysis, options.progress
            program = build_program(captured, analysis, plan, progress=progress, known=shape.variants)
            ready.executables[start] = lower(
                program, options.backend, options.options, progress, mode=options.mode, known=shape.runners
            )
        return ready.executables[start]

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Run the next step of the current session.

        Raises:
            CaptureError, AnalysisError, PlanError: on the first call, which captures and compiles.
            CallError: the call differs from the captured one, or the caller is at another step than the session.
        """
        session = self._session_for(args, kwargs)
        try:
            return session(*args, **kwargs)
        except ShapeError as error:
            if self._options.on_shape_change == "error":
                raise
            raise ShapeError(
                f"step {session.step} of {session.num_steps}: {str(error).partition(': ')[0]}: shapes may change when "
                "an image begins. Call reset() after an interrupted one, and use one cache_context per guidance branch"
            ) from error

    def _session_for(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Session:
        """The session that a call goes to, at the step that the caller says it is at, if it says so."""
        place, session = self._place, self._sessions.get(self._place.context)
        told = None if place.step is None or self._is_uniform(session) else self._start + place.step
        if session is not None and told in (self._start, session.start):
            session.reset()
        if session is None or session.step == session.start:
            session = self._begin(session, self._start if told is None else told, args, kwargs)
        if not self._is_uniform(session):
            self._check_place(session, told)
        return session

    def _is_uniform(self, session: Session | None) -> bool:
        """Whether no call can be at a wrong step, because the plan has the same one over and over."""
        return session is not None and session.start == self._start and session.alike

    def _begin(self, session: Session | None, start: int, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Session:
        """The session for a run that begins with this call: the one there is, if it is for such calls."""
        fixed = self._options.on_shape_change == "error"
        if session is None or session.start != start or not (fixed or session.fits(args, kwargs)):
            executable = self._executable(self._get_ready(args, kwargs), start)
            session = Session(executable, start=start, watched=self._place.step is None)
            self._sessions[self._place.context] = session
        if self._shapes[0].weights != self._identities():
            raise CallError(
                "layers or weights of the model were replaced after it was compiled, by an adapter for example, and "
                "the compiled steps do not have them: call tcc.compile anew, or load adapters before the first call"
            )
        return session

    def _check_place(self, session: Session, told: int | None) -> None:
        """The pipeline runs the plan's steps, and is at the session's."""
        count, given = session.num_steps - self._start, self._place.num_steps
        if given not in (None, count):
            raise CallError(
                f"the pipeline runs {given} steps, but the model's plan has {count}: call it with "
                f"num_inference_steps={count}, or make the plan with num_steps={given}"
            )
        if told not in (None, session.step):
            raise CallError(
                f"the pipeline is at step {told}, but the model's next step is {session.step} of {session.num_steps}: "
                "call the model once per step and context, in order, and reset() before a new image"
            )

    def _identities(self) -> tuple[int, ...]:
        """Which weights the model has; that they are others, not that their values are."""
        model = self._model[0]
        return tuple(id(weight) for weight in model.parameters()) if isinstance(model, nn.Module) else ()

    @property
    def session(self) -> Session:
        """The session that calls go to: one per `cache_context`."""
        if self._place.context not in self._sessions:
            self._sessions[self._place.context] = self.new_session(start_step=self._start)
        return self._sessions[self._place.context]

    def new_session(self, *, start_step: int = 0) -> Session:
        """Own slots and own step counter, for another image or thread at the same time; the code is shared.

        Args:
            start_step: the step that its runs begin at, see `reset`.

        Raises:
            PlanError: nothing is compiled yet, or the plan has no such step.
        """
        if self._ready is None:
            raise PlanError("nothing is compiled yet: call the model once, or pass example_inputs to tcc.compile")
        return Session(self._executable(self._ready, start_step), start=start_step, watched=True)

    def reset(self, *, start_step: int = 0) -> None:
        """Start a new image in every session of this model.

        Args:
            start_step: the step of the plan that this image, and all after it until the next `reset`, begin at: for
                image-to-image, which leaves out the first steps of the schedule. What later steps read is computed
                at the first one: see `tcc.plan_start.start_at`.

        Raises:
            PlanError: the plan has no such step.
        """
        if self._ready is not None:
            start_at(self._ready.plan, start_step)
        if start_step != self._start:
            self._start = start_step
            self._sessions.clear()
        for session in self._sessions.values():
            session.reset()

    def _reset_stateful_cache(self, recurse: bool = True) -> None:
        """What diffusers' pipelines call when an image is done: the next one starts anew, finished or not."""
        for session in self._sessions.values():
            ran = session.step - session.start
            if session.watched and ran:
                warnings.warn(
                    f"the run ended after step {session.step - 1}, but the model's plan has {session.num_steps} steps: "
                    "unless it was interrupted, make the plan with as many steps as the pipeline runs; where it left "
                    f"out the first steps (image-to-image), call reset(start_step={session.num_steps - ran}) before",
                    stacklevel=3,
                )
            session.reset()

    @contextlib.contextmanager
    def cache_context(
        self, name: str, *, step_index: int | None = None, num_inference_steps: int | None = None, **where: Any
    ) -> Iterator[None]:
        """Calls inside go to the session `name`: pipelines that call once per guidance branch use one each.

        Args:
            name: the name of the session.
            step_index: the step that the pipeline is at, if it says so; 0 starts a new image, and a run that begins at
                another step begins in the middle of the plan.
            num_inference_steps: how many steps the pipeline runs; must be those of the plan.
            where: other things that pipelines say, and that no plan depends on (`sigma`, `timestep`).
        """
        before, thread = self._place, threading.get_ident()
        self._places[thread] = _Place(name, step_index, num_inference_steps)
        try:
            yield
        finally:
            self._places[thread] = before

    @property
    def _place(self) -> _Place:
        """Where this thread's calls go: threads that are in different contexts do not disturb each other."""
        return self._places.get(threading.get_ident(), _Place())

    @property
    def _is_fixed(self) -> bool:
        return super()._is_fixed or bool(self._shapes)

    @property
    def plan(self) -> CachePlan:
        """The plan that runs.

        Raises:
            PlanError: a policy was given and the model has not been called yet.
        """
        if self._ready is not None:
            return self._ready.plan
        if isinstance(self._request, CachePlan):
            return self._request
        raise PlanError("the policy makes its plan at the first call: call the model once, or pass example_inputs")

    @property
    def num_steps(self) -> int | None:
        """The steps of the plan; None where a policy will make it at the first call."""
        if self._ready is None and not isinstance(self._request, CachePlan):
            return None
        return self.plan.num_steps

    @property
    def info(self) -> ModelInfo | None:
        """What tcc sees in the model; None before the first call."""
        shape = self._ready.shape if self._ready else next(iter(self._shapes), None)
        return shape.info if shape else None

    @property
    def program(self) -> Program | None:
        """The variants and the step table; None before the first call."""
        return self._compiled.program if self._compiled else None

    @property
    def compile_seconds(self) -> tuple[float, ...]:
        """Seconds spent compiling each variant; () before the first call."""
        return self._compiled.compile_seconds if self._compiled else ()

    @property
    def _compiled(self) -> Executable | None:
        return self._ready.executables.get(self._start) if self._ready else None


def compile(
    model: nn.Module | ExportedProgram,
    plan: CachePlan | Policy,
    *,
    example_inputs: tuple[tuple[Any, ...], dict[str, Any]] | None = None,
    backend: str | Backend = "inductor",
    mode: str = "default",
    options: dict[str, Any] | None = None,
    progress: Callable[[str], None] | None = None,
    on_shape_change: OnShapeChange = "error",
) -> CompiledModel:
    """Compile `model` to run `plan`.

    Args:
        model: a diffusion transformer in eval mode, or an `ExportedProgram` of one.
        plan: a plan, or a policy: a function of a `ModelInfo` that returns a plan (`functools.partial(tcc.plans.fora,
            num_steps=50, interval=3)`), called when the model is captured.
        example_inputs: `(args, kwargs)` of a call; given, capture and compilation happen now, else at the first call.
        backend: `inductor`, `eager` (no compilation, for debugging), or any backend that `torch.compile` takes.
        mode: `default`, or `reduce-overhead`: on CUDA devices, replay every step variant as a CUDA graph.
        options: Inductor options, such as `{"freezing": True}`: on CPUs, pack the weights of matrix products (a copy
            per variant; later changes of the model's weights are not seen).
        progress: called with a line of text as the work goes on.
        on_shape_change: what a call with another resolution, prompt length or batch does when a new image begins:
            `error`, or `recapture`: the model is captured, the policy asked and the result compiled again, once for
            each set of shapes. Within an image, it is an error.

    Returns:
        A model with the same forward signature.

    Raises:
        CaptureError, AnalysisError, PlanError: with `example_inputs`; else at the first call.
    """
    if not callable(plan) and not isinstance(plan, CachePlan):
        raise PlanError(f"plan={plan!r} is neither a plan nor a policy: read a file with tcc.CachePlan.load(path)")
    if example_inputs is not None and [type(part) for part in example_inputs] != [tuple, dict]:
        raise CallError("example_inputs is a pair (args, kwargs), a tuple and a dict: write ((x, t, y), {})")
    if on_shape_change not in get_args(OnShapeChange):
        raise CallError(f"on_shape_change={on_shape_change!r}: use 'error' or 'recapture'")
    compiled = CompiledModel(model, plan, _Options(backend, options, progress, mode, on_shape_change))
    if example_inputs is not None:
        args, kwargs = example_inputs
        compiled.prepare(*args, **kwargs)
    return compiled
