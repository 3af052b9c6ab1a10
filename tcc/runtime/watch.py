"""What tells a session that its caller is not at the step that it is at.

A session counts calls. A caller that makes more or fewer calls than the plan has steps would silently get the actions
of other steps. The inputs give it away: the noise level goes one way within an image and back at the next one, and two
calls on one sample at one noise level are two guidance branches.
"""

from __future__ import annotations

import itertools
from dataclasses import asdict, dataclass

import torch

from tcc.errors import CallError

__all__ = ["Advice", "Watch", "is_readable", "version_of"]

_SHARED = (
    "step {step} of {count}: this call has the sample and the noise level of the call before it, and other conditions. "
    "Two guidance branches share one session, so that one would reuse what the other stored, and each call would count "
    "as a step: {branches}"
)
_BACK = (
    "step {step} of {count}: the noise level went back, from {before:g} to {now:g}: a new image began before the "
    "plan's last step. After an interrupted run call reset(); a scheduler with fewer steps needs a plan with as many; "
    "where steps are repeated on purpose, say which one runs: {run_step}(step, ...)"
)
_MORE = (
    "the plan's {count} steps are over, and the noise level goes on from {before:g} to {now:g}: the scheduler has more "
    "steps than the plan. Make the plan with as many steps as the scheduler calls the model (a solver of second order "
    "calls it twice per step; guidance branches need {own}, and images made at the same time a new_session() each), or "
    "reset() to start a new image"
)


@dataclass(frozen=True)
class Advice:
    """What a caller can do, in the words of what is called.

    Attributes:
        branches: where two guidance branches share a session.
        own: what each branch needs.
        run_step: the method that runs a step by its number.
    """

    branches: str
    own: str
    run_step: str


_COMPILED = Advice(
    "call each branch in a context of its own, `with model.cache_context('cond'):` and "
    "`with model.cache_context('uncond'):`, or both in one call as a doubled batch; if the calls are a pipeline's, "
    "compile with calls_per_step=2",
    "`cache_context`",
    "model.session.run_step",
)


class Watch:
    """Compares every call of a run with the one before it.

    On a CPU each call is checked. On other devices reading a value would wait for the device. There noise levels are
    read at the first and the last step of a run, and a sample is the same if it is the same tensor, not written since.

    Args:
        level: the position of the noise level among the inputs, or None.
        samples: the positions of the inputs that may be the sample.
        first: the number of a run's first step.
        count: the number of the plan's steps.
        advice: what messages tell the caller to do; by default, the caller of a compiled model.
    """

    def __init__(
        self, level: int | None, samples: tuple[int, ...], first: int, count: int, advice: Advice = _COMPILED
    ) -> None:
        self._advice = asdict(advice)
        self._level, self._samples, self._first, self._count = level, samples, first, count
        self.forget()

    def forget(self) -> None:
        """Nothing is known about earlier calls."""
        self._last: list[torch.Tensor] = []
        self._versions: list[int | None] = []
        self._levels: list[torch.Tensor] = []
        self._way = 0.0

    def check(self, tensors: list[torch.Tensor], step: int) -> None:
        """Compare the inputs of the call that is to run `step` with those of the calls before.

        Raises:
            CallError: the caller is at another step; nothing is noted down.
        """
        if step > self._first and self._is_other_branch(tensors):
            raise CallError(self._told(_SHARED, step=step))
        if self._level is not None and tensors[self._level].numel():
            self._check_level(tensors[self._level], step)
        self._last, self._versions = tensors, [version_of(t) for t in tensors]

    def _told(self, message: str, **where: float) -> str:
        return message.format(count=self._count, **where, **self._advice)

    def _is_other_branch(self, tensors: list[torch.Tensor]) -> bool:
        """Whether sample and noise level are the last call's, and something else is not."""
        if not self._last or not self._samples or not all(self._same(tensors, sample) for sample in self._samples):
            return False
        same = [torch.equal(old, new) for old, new in zip(self._last, tensors, strict=True)]
        return not all(same) and (self._level is None or same[self._level])

    def _same(self, tensors: list[torch.Tensor], sample: int) -> bool:
        old, new = self._last[sample], tensors[sample]
        if old is new:
            return self._versions[sample] == version_of(new)
        return is_readable(new) and torch.equal(old, new)

    def _check_level(self, given: torch.Tensor, step: int) -> None:
        """The noise level goes one way from step to step, and back at a run's first step."""
        level = given.detach().max()  # of the samples, or of the tokens where some are given without noise
        if step == self._first:
            if self._levels and self._way:
                before, now = float(self._levels[-1]), float(level)
                if (now - before) * self._way >= 0:  # a run that went one way cannot begin where it ended
                    raise CallError(self._told(_MORE, before=before, now=now))
            self._levels, self._way = [level], 0.0
            return
        self._levels = self._follow([*self._levels, level], step)

    def _follow(self, levels: list[torch.Tensor], step: int) -> list[torch.Tensor]:
        """Read the levels, where that costs nothing or the run ends; what the next step is compared with."""
        if not is_readable(levels[-1]) and step < self._count - 1:
            return levels
        way = self._way
        for before, now in itertools.pairwise(float(level) for level in levels):
            way = way or now - before
            if (now - before) * way < 0:
                raise CallError(self._told(_BACK, step=step, before=before, now=now))
        self._way = way
        return levels[-1:]


def is_readable(tensor: torch.Tensor) -> bool:
    """Whether reading values waits for nothing."""
    return tensor.device.type == "cpu"


def version_of(tensor: torch.Tensor) -> int | None:
    """How often the tensor was written to; None where nobody counts."""
    return None if tensor.is_inference() else tensor._version
