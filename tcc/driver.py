"""`tcc.compile`: from a model and a plan to a compiled model."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

from torch import nn
from torch.export import ExportedProgram

from tcc.checks import check_model
from tcc.errors import CallError, PlanError
from tcc.info import ModelInfo, inspect
from tcc.passes.pipeline import StepKind
from tcc.plan import CachePlan
from tcc.program import Program, Variant, build_program
from tcc.runtime import Backend, Compiled, Executable, Session, lower

__all__ = ["CompiledModel", "compile"]

Policy = Callable[[ModelInfo], CachePlan]


class CompiledModel(nn.Module):
    """A model that runs a plan; called like the model it was made from, once per denoising step.

    Attributes that it does not have itself (`config`, `dtype`, ...) are the original model's. The weights stay the
    original model's alone: move or cast that one first; `to()`, `parameters()` and `state_dict()` find none here.
    """

    def __init__(
        self,
        model: nn.Module | ExportedProgram,
        plan: CachePlan | Policy,
        *,
        backend: str | Backend,
        options: dict[str, Any] | None,
        progress: Callable[[str], None] | None,
        mode: str,
    ) -> None:
        super().__init__()
        self._model = [model]  # in a list: the weights are not registered, saved or moved a second time
        self._request = plan
        self._lowering = (backend, options, progress, mode)
        self._executable: Executable | None = None
        self._sessions: dict[str, Session] = {}
        self._context = ""
        self._info: ModelInfo | None = None
        self._plan: CachePlan | None = plan if isinstance(plan, CachePlan) else None
        self._variants: dict[StepKind, Variant] = {}
        self._runners: dict[StepKind, Compiled] = {}

    def with_plan(self, plan: CachePlan | Policy) -> CompiledModel:
        """The same model under another plan: capture, analysis and the variants that both plans have are shared.

        Sessions are not shared. After the first call of this model or `prepare`, nothing is captured again.
        """
        backend, options, progress, mode = self._lowering
        other = CompiledModel(self._model[0], plan, backend=backend, options=options, progress=progress, mode=mode)
        other._info, other._variants, other._runners = self._info, self._variants, self._runners
        return other

    def prepare(self, *args: Any, **kwargs: Any) -> CompiledModel:
        """Capture, rewrite and compile now, for calls like this one."""
        if self._executable is None:
            backend, options, progress, mode = self._lowering
            info = self._info = self._info or inspect(self._model[0], *args, **kwargs)
            plan = self._request if isinstance(self._request, CachePlan) else self._request(info)
            check_model(plan, info.key)
            program = build_program(info.captured, info.analysis, plan, progress=progress, known=self._variants)
            self._executable = lower(program, backend, options, progress, mode=mode, known=self._runners)
            self._plan = plan
        return self

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Run the next step of the current session.

        Raises:
            CaptureError, AnalysisError, PlanError: on the first call, which captures and compiles.
            CallError: the call differs from the captured one.
        """
        return self.prepare(*args, **kwargs).session(*args, **kwargs)

    @property
    def session(self) -> Session:
        """The session that calls go to: one per `cache_context`."""
        if self._context not in self._sessions:
            self._sessions[self._context] = self.new_session()
        return self._sessions[self._context]

    def new_session(self) -> Session:
        """Own slots and own step counter, for another image or thread at the same time; the code is shared.

        Raises:
            PlanError: nothing is compiled yet.
        """
        if self._executable is None:
            raise PlanError("nothing is compiled yet: call the model once, or pass example_inputs to tcc.compile")
        return Session(self._executable)

    def reset(self) -> None:
        """Start a new image: the next call is step 0, in every session of this model."""
        for session in self._sessions.values():
            session.reset()

    @contextlib.contextmanager
    def cache_context(self, name: str) -> Iterator[None]:
        """Calls inside go to the session `name`: pipelines that call once per guidance branch use one each."""
        before, self._context = self._context, name
        try:
            yield
        finally:
            self._context = before

    @property
    def plan(self) -> CachePlan:
        """The plan that runs.

        Raises:
            PlanError: a policy was given and the model has not been called yet.
        """
        if self._plan is None:
            raise PlanError("the policy makes its plan at the first call: call the model once, or pass example_inputs")
        return self._plan

    @property
    def num_steps(self) -> int | None:
        """The steps of the plan; None where a policy will make it at the first call."""
        return None if self._plan is None else self._plan.num_steps

    @property
    def info(self) -> ModelInfo | None:
        """What tcc sees in the model; None before the first call."""
        return self._info

    @property
    def program(self) -> Program | None:
        """The variants and the step table; None before the first call."""
        return None if self._executable is None else self._executable.program

    @property
    def compile_seconds(self) -> tuple[float, ...]:
        """Seconds spent compiling each variant; () before the first call."""
        return () if self._executable is None else self._executable.compile_seconds

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(self.__dict__["_model"][0], name)


def compile(
    model: nn.Module | ExportedProgram,
    plan: CachePlan | Policy,
    *,
    example_inputs: tuple[tuple[Any, ...], dict[str, Any]] | None = None,
    backend: str | Backend = "inductor",
    mode: str = "default",
    options: dict[str, Any] | None = None,
    progress: Callable[[str], None] | None = None,
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

    Returns:
        A model with the same forward signature.

    Raises:
        CaptureError, AnalysisError, PlanError: with `example_inputs`; else at the first call.
    """
    if not callable(plan) and not isinstance(plan, CachePlan):
        raise PlanError(f"plan={plan!r} is neither a plan nor a policy: read a file with tcc.CachePlan.load(path)")
    if example_inputs is not None and [type(part) for part in example_inputs] != [tuple, dict]:
        raise CallError("example_inputs is a pair (args, kwargs), a tuple and a dict: write ((x, t, y), {})")
    compiled = CompiledModel(model, plan, backend=backend, options=options, progress=progress, mode=mode)
    if example_inputs is not None:
        args, kwargs = example_inputs
        compiled.prepare(*args, **kwargs)
    return compiled
