"""The contexts of one image, and the step of the loop that they share."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterator

import torch

from tcc.errors import CallError
from tcc.runtime.session import Session
from tcc.runtime.watch import is_readable

__all__ = ["Image", "Images"]

_UNKNOWN = (
    "step {step} of {count}: context '{context}' was not called at all steps before, and the inputs do not tell which "
    "step it is at, since no noise level was found among them. Name it, tcc.compile(..., noise_level='timestep'); or "
    "say the step, model.cache_context('{context}', step_index=...); or take a session that begins there, "
    "model.new_session(start_step=...). If a new image begins here, call reset() before it"
)
_BACK = (
    "step {step} of {count}: context '{context}' is called at the noise level {now:g}, but the image's loop has gone "
    "from {first:g} to {level:g}. After an interrupted image call reset(). The contexts are the guidance branches of "
    "one image: for another one at the same time take model.new_session()"
)


class Image:
    """One image in the making: a session for each of its contexts, and the step that its loop has come to.

    A loop may call a context at some of its steps only (guidance in an interval). Which step a call is at follows by
    counting for the context that is called first, and by the noise level for the others. On devices other than CPUs,
    where reading waits, a context's noise level is read at its first call, and then only when it was left out or is not
    first any more; the others follow the first one in turn.

    Attributes:
        sessions: the session of each context.
        start: the step of the first call.
        step: the step of the last call; None before the first.
        first: the noise level of the first call, if it is known.
        told: whether the steps are said by the caller.
        thread: the thread that the calls come from.
        working: whether a call is being made.
        fresh: whether this thread has said that its next image is a new one.
    """

    def __init__(self) -> None:
        self.sessions: dict[str, Session] = {}
        self.thread: threading.Thread | None = None
        self.told = self.working = self.fresh = False
        self._forget(0, None)

    def _forget(self, start: int, first: torch.Tensor | None) -> None:
        self.start, self.first = start, first
        self.step: int | None = None
        self._ran: dict[str, int] = {}
        self._level: torch.Tensor | None = None
        self._led: dict[str, int] = {}
        self._last = ""

    def reset(self) -> None:
        """The next call begins a new image."""
        for session in self.sessions.values():
            session.reset()
        self._forget(0, None)

    def is_amid(self, context: str, count: int) -> bool:
        """Whether `context` was called in this image, and its loop has steps to come."""
        return context in self._ran and self.step != count - 1

    @property
    def idle(self) -> bool:
        """Whether nobody is at it: all of its contexts are done, or none has begun; or its thread is gone."""
        over = not self.working and all(step == self.sessions[name].num_steps - 1 for name, step in self._ran.items())
        return over or self.thread is None or not self.thread.is_alive()

    def begins(self, context: str, told: int, count: int) -> bool:
        """Whether a call that says that it is at step `told` begins a new image.

        Raises:
            CallError: the context was at that step before.
        """
        last = self._ran.get(context)
        if self.step is None or told < self.step or told == self.start == last:
            return True
        if told == last:
            raise CallError(
                f"the pipeline is at step {told}, but the model's next step is {told + 1} of {count}: call the model "
                "once per step and context, in order, and reset() before a new image"
            )
        return False

    def next_call(self, level: torch.Tensor | None, count: int) -> str:
        """The context of a call that says none, in a loop that makes up to `count` of them at every step.

        They are numbered, and the numbers begin again at another noise level.
        """
        names = [f"call {number}" for number in range(count)]
        last = names.index(self._last) if self._last in names else -1
        if level is not None and self._level is not None and float(level) != float(self._level):
            return names[0]
        return names[(last + 1) % count]

    def find_step(self, context: str, level: torch.Tensor | None, count: int) -> int | None:
        """The step of a call that does not say it; None where it begins a new image.

        Raises:
            CallError: the step cannot be known.
        """
        session = self.sessions.get(context)
        if session is not None and self._ran.keys() <= {context}:
            return None if session.step == session.start else session.step
        if self.step is None or (self._ran.get(context) == self.step == count - 1):
            return None
        if self._ran.get(context) == self.step:
            return self.step + 1
        return self._step_behind(context, self.step, level, count)

    def _step_behind(self, context: str, step: int, level: torch.Tensor | None, count: int) -> int | None:
        """The step of a call in a context that another one has left behind, at `step`."""
        last = self._ran.get(context, self.start - 1)
        in_turn = last == step - 1
        if level is None or self._level is None:
            if in_turn and self._led.get(context) != last:
                return step
            if in_turn or step < count - 1:  # in turn, but the first one at the step before: late, or a step further
                raise CallError(_UNKNOWN.format(step=step, count=count, context=context))
            return None
        if in_turn and last >= self.start and self._led.get(context) != last and not is_readable(level):
            return step
        now, there = float(level), float(self._level)
        if now == there:
            return step
        if step == count - 1:
            return None
        first = there if self.first is None else float(self.first)
        if (now - there) * (there - first) < 0:
            raise CallError(_BACK.format(step=step, count=count, context=context, now=now, first=first, level=there))
        return step + 1

    def note(
        self, context: str, session: Session, step: int, level: torch.Tensor | None, *, new: bool, told: bool
    ) -> None:
        """A call was made."""
        self.told = told
        if new:
            for other in self.sessions.values():
                if other is not session:
                    other.reset()
            self._forget(step, level)
        self.sessions[context] = session
        self._ran[context], self._last = step, context
        if step != self.step:
            self.step, self._level, self._led[context] = step, level, step


_MOVED = (
    "context '{context}': this thread begins at the noise level {now:g}, where an image that is in progress in another "
    "thread began at {first:g}. If this is the same image, keep it in one thread, or take model.new_session(), which "
    "any thread may call. If it is another one, call reset() before it"
)


class Images:
    """The images that are made with a model: one at a time in each thread.

    A thread that begins takes over the sessions of one that is done, so that there are as many as images in progress.
    """

    def __init__(self) -> None:
        self._made: list[Image] = []
        self._lock = threading.Lock()

    def mine(self, *, working: bool = False) -> Image:
        """This thread's image, in which a call is being made from now on if `working`."""
        me = threading.current_thread()
        with self._lock:
            image = next((image for image in self._made if image.thread is me), None)
            if image is None:
                image = next((image for image in self._made if image.idle), None)
                if image is None:
                    self._made.append(image := Image())
                elif image.step is not None:
                    image.reset()
                image.thread, image.fresh = me, False
            image.working = working
        return image

    @contextlib.contextmanager
    def working(self) -> Iterator[Image]:
        """This thread's image, while a call is made."""
        image = self.mine(working=True)
        try:
            yield image
        finally:
            image.working = False

    def reset(self, *, drop: bool = False) -> None:
        """This thread begins a new image, with sessions to make if `drop`; the images of others go on."""
        mine = self.mine()
        mine.fresh = True
        mine.reset()
        if drop:
            mine.sessions.clear()

    def check_thread(self, mine: Image, context: str, level: torch.Tensor | None) -> None:
        """An image that begins in this thread does not go on with one that another thread has begun.

        Raises:
            CallError: it begins at another noise level than all those that are in progress.
        """
        firsts = [other.first for other in self._made if other is not mine and not other.idle]
        known = [float(first) for first in firsts if first is not None]
        if not mine.fresh and level is not None and known and float(level) not in known:
            raise CallError(_MOVED.format(context=context, now=float(level), first=known[0]))
