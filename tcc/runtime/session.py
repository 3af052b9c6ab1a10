"""Running a program: compiled variants, slots, and the step counter of a session."""

from __future__ import annotations

import functools
import weakref
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from tcc.errors import CallError
from tcc.program import Program
from tcc.runtime.cuda_graphs import Record, Replay, settle
from tcc.runtime.folding import Folded, Folding
from tcc.runtime.watch import Watch

__all__ = ["Executable", "Runner", "Session"]

Runner = Callable[..., Sequence[torch.Tensor]]


@dataclass(frozen=True, eq=False)
class Buffers:
    """What one session at a time writes to, and what was recorded on it.

    Attributes:
        slots: the slots and what is folded, by the names of the variants' inputs.
        folded: what is computed once per run.
        record: what records variants, where they are replayed.
        replays: what was recorded, by variant.
    """

    slots: dict[str, torch.Tensor]
    folded: Folded | None
    record: Record | None
    replays: dict[int, Replay] = field(default_factory=dict)


@dataclass(frozen=True)
class Executable:
    """A program whose variants are compiled.

    Attributes:
        program: the program.
        runners: one function per variant, called with the model's inputs and then `extras`.
        extras: per variant, the names of the inputs after the model's own, in order.
        compile_seconds: what compiling took, per variant.
        recorder: makes what records the variants of a session, which then replays them (CUDA graphs); None: they are
            called.
        folding: what sessions compute once per run.
    """

    program: Program
    runners: tuple[Runner, ...]
    extras: tuple[tuple[str, ...], ...]
    compile_seconds: tuple[float, ...]
    recorder: Callable[[], Record] | None = None
    folding: Folding | None = None
    _idle: list[Buffers] = field(default_factory=list, init=False, repr=False, compare=False)

    @functools.cached_property
    def alike(self) -> bool:
        """Whether all steps do the same and keep nothing, so that none can be run in place of another."""
        same = len({binding.variant for binding in self.program.bindings}) == 1
        return same and not self.program.slots and self.folding is None

    @functools.cached_property
    def tensors(self) -> list[dict[str, torch.Tensor]]:
        """What every step is given beside inputs and slots, on the model's device: copied once for all sessions."""
        device = self.program.captured.inputs[0].device
        copies: dict[int, torch.Tensor] = {}

        def copy(tensor: torch.Tensor) -> torch.Tensor:
            if id(tensor) not in copies:
                copies[id(tensor)] = tensor.to(device)
            return copies[id(tensor)]

        with torch.inference_mode(False):
            return [{name: copy(t) for name, t in binding.tensors.items()} for binding in self.program.bindings]

    def buffers(self, session: object) -> Buffers:
        """What `session` writes to until it is gone.

        Where variants are recorded, the next session takes it up: recording takes longer than many steps. The most that
        there were at one time stay allocated as long as the executable.
        """
        if self.recorder is None:
            return self._new_buffers()
        try:
            taken = self._idle.pop()
        except IndexError:
            taken = self._new_buffers()
        else:
            settle(self.program.captured.inputs[0].device)  # the last session may have been on another stream
        weakref.finalize(session, self._idle.append, taken).atexit = False
        return taken

    @torch.inference_mode(False)  # what is allocated in inference mode cannot be written to outside of it
    def _new_buffers(self) -> Buffers:
        slots = {f"slot:{s.name}": torch.zeros(s.shape, dtype=s.dtype, device=s.device) for s in self.program.slots}
        folded = Folded(self.folding) if self.folding else None
        if folded is not None:  # like slots: their addresses stay
            slots |= folded.tensors
        return Buffers(slots, folded, self.recorder() if self.recorder else None)


class Session:
    """One run at a time through a program: its own slots and its own step counter.

    Call it like the model, once per step. After the last step it starts again by itself.

    Attributes:
        start: the step that runs begin at: the program is that of `start_at(plan, start)`.
        step: the step that the next call runs.
        executable: the compiled program.
    """

    def __init__(self, executable: Executable, *, start: int = 0, watched: bool = False) -> None:
        self.executable = executable
        self._captured = executable.program.captured
        self._buffers = executable.buffers(self)
        self._slots, self._folded = self._buffers.slots, self._buffers.folded
        self.start = self.step = start
        numbers = torch.arange(start, self.num_steps, device=self._captured.inputs[0].device)[:, None]
        # copies: compiled code may want memory that is aligned
        self._steps = [self._bind(step, number.clone()) for step, number in enumerate(numbers.unbind())]
        seen = self._captured
        watched = watched and not executable.alike
        self._watch = Watch(seen.noise_level, seen.samples, start, self.num_steps) if watched else None
        self._failed: int | None = None

    def __repr__(self) -> str:
        """Where it is."""
        return f"<Session: step {self.step} of {self.num_steps} is next>"

    def _bind(self, step: int, number: torch.Tensor) -> tuple[Runner, list[torch.Tensor]]:
        """The function and the extra inputs of `step`, looked up once so that a step only calls."""
        variant = self.executable.program.bindings[step].variant
        given = {**self.executable.tensors[step], "step": number, **self._slots}
        return self._runner(variant), [given[name] for name in self.executable.extras[variant]]

    def _runner(self, variant: int) -> Runner:
        runner, replays = self.executable.runners[variant], self._buffers.replays
        if self._buffers.record is None:
            return runner
        if variant not in replays:
            names = self.executable.extras[variant]
            is_slot = [False] * len(self._captured.inputs) + [name in self._slots for name in names]
            replays[variant] = Replay(runner, is_slot, self._buffers.record)
        return replays[variant]

    @property
    def num_steps(self) -> int:
        """The steps of the plan; those before `start` are not run."""
        return self.start + len(self.executable.program.bindings)

    @property
    def slot_bytes(self) -> int:
        """The bytes of this session's slots."""
        return sum(tensor.nbytes for name, tensor in self._slots.items() if name.startswith("slot:"))

    @property
    def folded_bytes(self) -> int:
        """The bytes of what this session computes once per run, where timesteps were given."""
        return sum(tensor.nbytes for name, tensor in self._slots.items() if not name.startswith("slot:"))

    def reset(self) -> None:
        """Start a new run: the next call is its first step."""
        self.step = self.start
        if self._watch is not None:
            self._watch.forget()

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Run the next step.

        Raises:
            CallError: the call differs from the captured one in structure, shape (ShapeError), dtype or device; the
                caller is at another step, where sessions are watched (see `tcc.runtime.watch`); or the step before
                failed.
        """
        return self.run(self._captured.flatten(args, kwargs))

    def run(self, tensors: list[torch.Tensor], *, begin: bool = False) -> Any:
        """Run the next step, or the first one of a new run.

        Args:
            tensors: the model's inputs, as `Captured.flatten` returns them.
            begin: start a new run.

        Raises:
            CallError: the caller is at another step, where sessions are watched, or the step before failed; nothing was
                run.
        """
        step = self.start if begin else self.step
        self._check(tensors, step)
        if self._watch is not None:
            self._watch.check(tensors, step)
        self.step = step
        return self._run(tensors)

    def run_step(self, step: int, *args: Any, **kwargs: Any) -> Any:
        """Run step `step`, which must be the next one (or `start`, which starts a new run).

        Raises:
            CallError: `step` is not the next step, the plan has no such step, or the call differs from the captured
                one; a run in progress goes on where it was. Or the step before failed.
        """
        if step >= self.num_steps:
            raise CallError(
                f"step {step} was called but the plan has {self.num_steps} steps, 0..{self.num_steps - 1}: make the "
                "plan with the number of steps you run"
            )
        if step not in (self.start, self.step):
            raise CallError(
                f"step {step} was called but the next step is {self.step} of {self.num_steps}: a plan's steps run in "
                "order. Call reset() to start a new run, and new_session() for a second run at the same time"
            )
        tensors = self._captured.flatten(args, kwargs)  # before the reset: a refused call changes nothing
        self._check(tensors, step)
        self.step = step
        return self._run(tensors)

    def _check(self, tensors: list[torch.Tensor], step: int) -> None:
        """Refuse what this run cannot go on with."""
        if self._failed is not None and step != self.start and self._slots:
            raise CallError(
                f"step {self._failed} of {self.num_steps} failed while it ran, so that slots may hold values of two "
                "steps: call reset() and begin the run anew"
            )
        if self._folded is not None:
            self._folded.check(tensors, step, first=step == self.start, last=step == self.num_steps - 1)

    def _run(self, tensors: list[torch.Tensor]) -> Any:
        runner, extras = self._steps[self.step - self.start]
        self._failed = self.step
        with torch.no_grad():
            if self._folded is not None and self.step == self.start:
                self._folded.begin(tensors)
            outputs = runner(*tensors, *extras)
        self._failed = None
        self.step = self.step + 1 if self.step + 1 < self.num_steps else self.start
        return self._captured.unflatten(list(outputs))
