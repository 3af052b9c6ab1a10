"""A whole sampling run as one CUDA graph: every step of a plan, and the arithmetic of the sampler between them."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable

import torch
from torch import Tensor

from tcc.errors import CallError
from tcc.runtime.cuda_graphs import Graphs, Record, Replay
from tcc.runtime.session import Executable, Session
from tcc.timing import time_calls

__all__ = ["WholeRun"]

#: `loop(model, *inputs)`: a whole run.
Loop = Callable[..., Tensor]


class WholeRun:
    """A sampling loop around a compiled plan, called with the tensors that it begins with.

    A plan leaves no decision to the host. So on a CUDA device the loop is captured, with the sampler's arithmetic, as
    one CUDA graph. The first call does that, times it against the loop step by step, and keeps the faster one. On
    other devices the loop runs as it is.

    The loop may read no tensor's value (`float(x)`, `if x > 0`), copy nothing from the host to the device, and draw
    noise from the device's default generator only. Python values in it, such as the number of steps and the guidance
    scale, are those of the first call. It works on copies of the inputs, and may write to them.

    Args:
        executable: the compiled plan.
        loop: called as `loop(model, *inputs)`; calls `model` once per step, and returns a tensor.
        start: the step that the loop begins at: the executable is that of `start_at(plan, start)`.
        recorder: what captures a run; by default, a CUDA graph where the model is on a CUDA device.

    Attributes:
        seconds: of a run, by the way it is run, once both were timed.
    """

    def __init__(self, executable: Executable, loop: Loop, *, start: int = 0, recorder: Record | None = None) -> None:
        self._device = executable.program.captured.inputs[0].device
        self._executable, self._loop, self._start = executable, loop, start
        self._recorder = recorder or (Graphs(self._device) if self._device.type == "cuda" else None)
        self._way: Callable[..., Tensor] | None = None
        self._form: list[tuple[torch.Size, torch.dtype, torch.device]] = []
        self.seconds: dict[str, float] = {}

    def __call__(self, *inputs: Tensor) -> Tensor:
        """Run the loop.

        Raises:
            CallError: the inputs are not tensors, or have other shapes, dtypes or devices than those of the first call;
                the loop does not call the model once per step, returns no tensor, or cannot be captured.
        """
        for number, x in enumerate(inputs):
            if not isinstance(x, Tensor):
                raise CallError(
                    f"input {number} of the run is {x!r}: a run is called with tensors alone, and Python values stay "
                    "those of the first call. Write them into the loop, as functools.partial does by keyword"
                )
        form = [(x.shape, x.dtype, x.device) for x in inputs]
        if self._way is None:
            devices = [self._device] if self._device.type == "cuda" else []
            with torch.random.fork_rng(devices):  # what is timed draws noise, and the run has yet to come
                self._way, self._form = self._choose(inputs), form
        if form != self._form:
            raise CallError(
                f"the run's inputs are {form}, and those of the first call were {self._form}: a run is captured for "
                "one set of shapes. Make another one with whole_run"
            )
        return self._way(*inputs)

    def _choose(self, inputs: tuple[Tensor, ...]) -> Callable[..., Tensor]:
        watched = Session(self._executable, start=self._start, watched=True)  # the first run, and this way, are checked
        by_steps = functools.partial(self._run, watched)
        if self._recorder is None:
            return by_steps
        bare = dataclasses.replace(self._executable, recorder=None)  # no graphs of variants inside a graph
        session = Session(bare, start=self._start)
        graph = Replay(lambda *tensors: [self._run(session, *tensors)], [False] * len(inputs), self._recorder, 1)
        ways: dict[str, Callable[..., Tensor]] = {"by steps": by_steps, "one graph": lambda *x: graph(*x)[0]}
        times = time_calls({name: functools.partial(way, *inputs) for name, way in ways.items()}, rounds=3)
        self.seconds = {name: timing.median for name, timing in times.items()}
        return ways[min(self.seconds, key=self.seconds.__getitem__)]

    def _run(self, session: Session, *inputs: Tensor) -> Tensor:
        session.reset()
        with torch.no_grad():
            result = self._loop(session, *(x.clone() for x in inputs))
        steps = session.num_steps - session.start
        if session.step != session.start and not self._executable.alike:
            raise CallError(
                f"the loop ended after {session.step - session.start} of the plan's {steps} steps: make the plan with "
                "as many steps as the loop calls the model"
            )
        if not isinstance(result, Tensor):
            raise CallError(f"the loop returned a {type(result).__name__}: return the one tensor that a run makes")
        return result
