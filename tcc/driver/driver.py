"""`tcc.compile`: from a model and a plan to a compiled model."""

from __future__ import annotations

import contextlib
import copy
import threading
import warnings
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import nn
from torch.export import ExportedProgram

from tcc.driver.arguments import check_arguments, check_plan, numbers
from tcc.driver.prepare import OnShapeChange, Options, Policy, Prepared, Ready
from tcc.driver.stand_in import StandIn
from tcc.errors import CallError, PlanError, ShapeError
from tcc.info import ModelInfo
from tcc.lowering import Backend
from tcc.plan import CachePlan
from tcc.plan.start import check_start
from tcc.program import Program
from tcc.runtime import Executable, Session
from tcc.runtime.image import Image, Images
from tcc.runtime.whole_run import Loop, WholeRun

__all__ = ["CompiledModel", "compile"]


class _Place(NamedTuple):
    """Where a caller says that it is: the context's name, the step, and the number of steps."""

    context: str = ""
    step: int | None = None
    num_steps: int | None = None


class CompiledModel(StandIn):
    """A model that runs a plan; called like the model it was made from, once per denoising step.

    It has the attributes of the original model, and keeps it: see `tcc.driver.stand_in.StandIn`.
    """

    def __init__(self, prepared: Prepared) -> None:
        super().__init__(prepared.model)
        self._prepared = prepared
        self._images = Images()
        self._places: dict[int, _Place] = {}
        self._start = 0

    def extra_repr(self) -> str:
        """What `print` shows: the plan, or the policy that will make one."""
        known = self.num_steps is not None
        return repr(self.plan) if known else "a policy, which makes its plan at the first call"

    def with_plan(self, plan: CachePlan | Policy) -> CompiledModel:
        """The same model under another plan: capture, analysis and the variants that both plans have are shared.

        Sessions are not shared. After the first call of this model or `prepare`, nothing is captured again.
        """
        check_plan(plan)
        return CompiledModel(self._prepared.with_plan(plan))

    def __deepcopy__(self, memo: dict[int, Any]) -> CompiledModel:
        """A copy of the model under the same plan, not compiled yet."""
        prepared = self._prepared
        return CompiledModel(Prepared(copy.deepcopy(prepared.model, memo), prepared.request, prepared.options))

    def __copy__(self) -> CompiledModel:
        """The same compiled model with sessions of its own."""
        return CompiledModel(self._prepared)

    def prepare(self, *args: Any, **kwargs: Any) -> CompiledModel:
        """Capture, rewrite and compile now, for calls like this one."""
        with self._prepared.lock:
            ready, _ = self._prepared.match(args, kwargs)
            ready.executable(self._start)
        return self

    @torch.compiler.disable  # type: ignore[untyped-decorator] # there is nothing left for torch.compile to do
    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Run the next step of the current session.

        Raises:
            CaptureError, AnalysisError, PlanError: on the first call, which captures and compiles.
            CallError: the call differs from the captured one, or the caller is at another step than the session.
        """
        if torch.compiler.is_exporting():
            raise CallError(
                "a compiled model cannot be exported by torch.export: tcc.export.bundle writes it to a folder"
            )
        with self._images.working() as image:
            with self._prepared.lock:
                place, options = self._place, self._prepared.options
                ready, tensors = self._match(image, place.context, args, kwargs)
                uniform = ready.executable(self._start).alike
                level = None if uniform or place.step is not None else ready.noise_level(tensors)
                if not uniform and not place.context and options.calls_per_step > 1:
                    place = _Place(image.next_call(level, options.calls_per_step))
                step, new = (self._start, False) if uniform else self._step(image, place, ready, level)
                before = image.sessions.get(place.context)
                if before is None or new or (uniform and before.step == before.start):
                    self._prepared.check_parts(ready, args, kwargs)
                session = self._session_at(image, place, ready, step, new=new, uniform=uniform)
            output = session.run(tensors, begin=not uniform and step == session.start)
            if uniform:
                image.sessions[place.context] = session
            else:
                image.note(place.context, session, step, level, new=new, told=place.step is not None)
        return output

    def _match(
        self, image: Image, context: str, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[Ready, list[torch.Tensor]]:
        """The plan for calls like this one. In the middle of an image, only one that there is."""
        session = image.sessions.get(context)
        busy = session is not None and image.is_amid(context, session.num_steps)
        try:
            return self._prepared.match(args, kwargs, busy=busy)
        except ShapeError as error:
            if session is None or self._prepared.options.on_shape_change == "error":
                raise
            raise ShapeError(_other_shape(session, str(error).partition(": ")[0])) from error

    def _step(self, image: Image, place: _Place, ready: Ready, level: torch.Tensor | None) -> tuple[int, bool]:
        """The step of the plan that a call is at, and whether it begins a new image."""
        count = ready.plan.num_steps
        if place.num_steps not in (None, count - self._start):
            raise CallError(
                f"the pipeline runs {place.num_steps} steps, but the model's plan has {count - self._start}: call it "
                f"with num_inference_steps={count - self._start}, or make the plan with num_steps={place.num_steps}"
            )
        if place.step is not None:
            return self._start + place.step, image.begins(place.context, self._start + place.step, count)
        found = image.find_step(place.context, level, count)
        if image.step is None:
            self._images.check_thread(image, place.context, level)
        return (self._start, True) if found is None else (found, False)

    def _session_at(self, image: Image, place: _Place, ready: Ready, step: int, *, new: bool, uniform: bool) -> Session:
        """The session of the context at `step`: the one there is, or one that begins there."""
        session = image.sessions.get(place.context)
        same = session is not None and session.executable is ready.executables.get(session.start)
        if session is not None and not new and not uniform and session.step == step != session.start and not same:
            raise ShapeError(_other_shape(session, "the call's inputs have other shapes than those of the call before"))
        if session is not None and same and (session.start == step or (session.step == step and not new)):
            return session
        return Session(ready.executable(step), start=step, watched=place.step is None)

    @property
    def session(self) -> Session:
        """The session that this thread's calls go to: one per `cache_context`."""
        sessions = self._images.mine().sessions
        if self._place.context not in sessions:
            sessions[self._place.context] = self.new_session(start_step=self._start)
        return sessions[self._place.context]

    def new_session(self, *, start_step: int = 0) -> Session:
        """Own slots and own step counter, for another image or thread at the same time; the code is shared.

        Args:
            start_step: the step that its runs begin at, see `reset`.

        Raises:
            PlanError: nothing is compiled yet, or the plan has no such step.
        """
        return Session(self._executable(start_step), start=start_step, watched=True)

    def whole_run(self, loop: Loop) -> WholeRun:
        """A sampling loop around this plan, on CUDA devices as one CUDA graph of all steps where that is faster.

        Args:
            loop: called as `loop(model, *inputs)`; see `tcc.runtime.whole_run.WholeRun` for what it may do.

        Raises:
            PlanError: nothing is compiled yet, or the last `reset` named a step that the plan does not have.
            CallError: the loop cannot be called.
        """
        if not callable(loop):
            raise CallError(f"loop={loop!r:.60} cannot be called: give a function, called as loop(model, *inputs)")
        return WholeRun(self._executable(self._start), loop, start=self._start)

    def _executable(self, start_step: int) -> Executable:
        if self._prepared.last is None:
            raise PlanError("nothing is compiled yet: call the model once, or pass example_inputs to tcc.compile")
        with self._prepared.lock:
            return self._prepared.last.executable(start_step)

    def reset(self, *, start_step: int = 0) -> None:
        """Start a new image in every context; what other threads are in the middle of goes on.

        Args:
            start_step: the step of the plan that this image, and all after it in any thread until the next `reset`,
                begin at: for image-to-image, which leaves out the first steps of the schedule. What later steps read is
                computed at the first one: see `tcc.plan.start.start_at`.

        Raises:
            PlanError: the plan has no such step. Where a policy has not made its plan yet, a step after its last one
                is refused at the first call.
        """
        check_start(start_step, self.num_steps)
        self._images.reset(drop=start_step != self._start)
        self._start = start_step

    def _reset_stateful_cache(self, recurse: bool = True) -> None:
        """What diffusers' pipelines call when an image is done: the next one starts anew, finished or not."""
        image, count = self._images.mine(), self.num_steps
        if image.step is not None and count is not None and image.step < count - 1 and not image.told:
            ran = image.step + 1 - image.start
            warnings.warn(
                f"the run ended after step {image.step}, but the model's plan has {count} steps: unless it was "
                "interrupted, make the plan with as many steps as the pipeline runs; where it left out the first "
                f"steps (image-to-image), call reset(start_step={count - ran}) before",
                stacklevel=3,
            )
        self._images.reset()

    @contextlib.contextmanager
    def cache_context(
        self, name: str, *, step_index: int | None = None, num_inference_steps: int | None = None, **where: Any
    ) -> Iterator[None]:
        """Calls inside go to the session `name`: pipelines that call once per guidance branch use one each.

        The contexts of a thread belong to one image. One that is not called at every step (guidance in an interval)
        goes on at the step that the others are at, and computes there what it would have stored before. Where the
        others are is told by `step_index`, else by the noise level.

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
            if before == _Place():
                del self._places[thread]

    @property
    def _place(self) -> _Place:
        """Where this thread's calls go: threads that are in different contexts do not disturb each other."""
        return self._places.get(threading.get_ident(), _Place())

    @property
    def _is_fixed(self) -> bool:
        return super()._is_fixed or bool(self._prepared.shapes)

    @property
    def plan(self) -> CachePlan:
        """The plan that runs.

        Raises:
            PlanError: a policy was given and the model has not been called yet.
        """
        if self._prepared.last is not None:
            return self._prepared.last.plan
        if isinstance(self._prepared.request, CachePlan):
            return self._prepared.request
        raise PlanError("the policy makes its plan at the first call: call the model once, or pass example_inputs")

    @property
    def num_steps(self) -> int | None:
        """The steps of the plan; None where a policy will make it at the first call."""
        known = self._prepared.last is not None or isinstance(self._prepared.request, CachePlan)
        return self.plan.num_steps if known else None

    @property
    def calls_per_step(self) -> int:
        """How many calls a loop makes at a step outside of `cache_context`, see `compile`."""
        return self._prepared.options.calls_per_step

    @property
    def info(self) -> ModelInfo | None:
        """What tcc sees in the model; None before the first call."""
        last, shapes = self._prepared.last, self._prepared.shapes
        shape = last.shape if last else (shapes[0] if shapes else None)
        return shape.info if shape else None

    @property
    def program(self) -> Program | None:
        """The variants and the step table; None before the first call."""
        return self._compiled.program if self._compiled else None

    def whole_program(self) -> Program:
        """The program of a run from the plan's first step, whatever step `reset` has chosen, to be written elsewhere.

        Raises:
            CallError: the model is not the one that was captured, or nothing is compiled yet.
        """
        if self._prepared.last is None:
            raise CallError("nothing is compiled yet: call the model once, or pass example_inputs to tcc.compile")
        return self._prepared.whole_program(self._prepared.last)

    @property
    def compile_seconds(self) -> tuple[float, ...]:
        """Seconds spent compiling each variant; () before the first call.

        What several variants need (`regional=True`) counts for the first of them.
        """
        return self._compiled.compile_seconds if self._compiled else ()

    @property
    def _compiled(self) -> Executable | None:
        return self._prepared.last.executables.get(self._start) if self._prepared.last else None


def _other_shape(session: Session, what: str) -> str:
    return (
        f"step {session.step} of {session.num_steps}: {what}: shapes may change when an image begins. Call reset() "
        "after an interrupted one, and use one cache_context per guidance branch"
    )


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
    max_shapes: int = 16,
    noise_level: str | None = None,
    max_slot_bytes: int | None = None,
    calls_per_step: int = 1,
    slot_dtype: torch.dtype | None = None,
    regional: bool = False,
    timesteps: Sequence[float] | torch.Tensor | None = None,
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
        max_shapes: how many sets of shapes are kept; beyond, the one not used for longest is dropped, with a warning.
        noise_level: the name of the input that is the noise level (the timestep). By default it is searched in the
            graph (`tcc.passes.noise_level`); without one, steps are counted and callers that make too many or too few
            calls are not noticed. `tcc.inspect(...).table()` says so.
        max_slot_bytes: the most bytes that one session may allocate for slots (one session per image and guidance
            branch) and for what `timesteps` has it compute once; a plan that needs more is refused.
            `plan.memory(info)` says what its slots need.
        calls_per_step: how many calls, of one guidance branch each, a loop makes at a step outside of `cache_context`.
            Pipelines that use no contexts make two. They are told apart by their order and the noise level; without a
            known one (`noise_level`), no call may be left out at any step.
        slot_dtype: keep wider values in this dtype, such as `torch.bfloat16`: half the bytes, and an error that you
            measure; see `CachePlan.slot_dtype`, which it replaces.
        regional: compile what variants repeat, also of each other, once (regional compilation): their blocks, or
            branches. Deep models and plans of many variants compile many times faster, at the price of fusions from one
            block into the next. Not with `freezing`: one code serves several blocks' weights.
        timesteps: the noise levels that every run will be called with, in order, as a scheduler's `timesteps`. What
            depends on them, and else on inputs that stay the same within a run (labels, prompts), is then computed once
            per run, for all steps together: modulations, embedded prompts, their keys and values. Each call is compared
            with them. See `tcc.runtime.folding`.

    Returns:
        A model with the same forward signature.

    Raises:
        CallError, PlanError: an argument is not what it must be.
        CaptureError, AnalysisError, PlanError: with `example_inputs`; else at the first call.
    """
    given = Options(
        backend, options, progress, mode, on_shape_change, max_shapes, noise_level, max_slot_bytes, calls_per_step,
        slot_dtype, regional, None if timesteps is None else numbers(timesteps),
    )  # fmt: skip
    check_arguments(model, plan, given, example_inputs)
    compiled = CompiledModel(Prepared(model, plan, given))
    if example_inputs is not None:
        args, kwargs = example_inputs
        compiled.prepare(*args, **kwargs)
    return compiled
