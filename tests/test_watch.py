"""What a session notices of a caller that is at another step, by the inputs alone."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from tcc.errors import CallError
from tcc.runtime.watch import Watch
from tests.tiny_models import noise

COUNT = 4


class Caller:
    """Calls a watched session of four steps."""

    def __init__(self, level: int | None = 1, start: int = 0, samples: tuple[int, ...] = (0,)) -> None:
        self.watch = Watch(level, samples, start, COUNT)
        self.start = self.step = start

    def __call__(self, *tensors: Tensor) -> None:
        """The next step."""
        self.watch.check(list(tensors), self.step)
        self.step = self.step + 1 if self.step + 1 < COUNT else self.start

    def levels(self, *levels: float) -> None:
        """Calls at these noise levels, each with another sample."""
        for number, level in enumerate(levels):
            self(noise(2, 3, seed=number), torch.tensor([level, level]))


@pytest.fixture(params=["host", "device"])
def where(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Where the inputs are: what is on a device is not read but at the ends of a run."""
    if request.param == "device":
        monkeypatch.setattr("tcc.runtime.watch.is_readable", lambda tensor: False)
    name: str = request.param
    return name


RUNS = {
    "falling": (9, 6, 3, 1, 9, 6, 3, 1),
    "rising": (0.0, 0.3, 0.6, 0.9, 0.0, 0.3, 0.6, 0.9),
    "twice at a level": (9, 6, 6, 3, 9, 6, 6, 3),
    "one level": (5,) * 8,
    "another schedule after it": (9, 6, 3, 1, 8, 7, 6, 5),
}


@pytest.mark.parametrize("run", RUNS)
def test_whole_runs_are_fine(run: str, where: str) -> None:
    """Two of them, in either direction."""
    Caller().levels(*RUNS[run])


@pytest.mark.parametrize("levels", [(9, 6, 9, 6), (0, 3, 0, 3), (9, 6, 3, 9)])
def test_a_run_that_begins_before_the_last_has_ended_is_refused(levels: tuple[float, ...], where: str) -> None:
    """At its first call; on a device, at the plan's last step at the latest."""
    caller = Caller()
    with pytest.raises(CallError, match="the noise level went back, from"):
        caller.levels(*levels)
    assert caller.step == (COUNT - 1 if where == "device" else levels.index(levels[0], 1))


def test_a_run_that_goes_on_after_the_last_step_is_refused(where: str) -> None:
    """The level goes on in the direction that it had."""
    caller = Caller()
    with pytest.raises(CallError, match=r"the plan's 4 steps are over, and the noise level goes on from 3 to 1"):
        caller.levels(9, 7, 5, 3, 1)
    assert caller.step == 0


def test_a_run_that_goes_on_at_its_last_level_is_refused(where: str) -> None:
    """A solver of second order calls twice at one level: a plan that counts its steps ends between the two."""
    caller = Caller()
    with pytest.raises(CallError, match=r"goes on from 5 to 5: .*solver of second order calls it twice"):
        caller.levels(9, 7, 7, 5, 5, 3, 3)
    assert caller.step == 0


def test_what_is_forgotten_is_not_compared(where: str) -> None:
    """A reset in the middle of a run, and after one."""
    caller = Caller()
    caller.levels(9, 7)
    caller.watch.forget()
    caller.step = 0
    caller.levels(9, 7, 5, 3)
    caller.watch.forget()
    caller.levels(1)


def test_a_run_may_begin_at_a_later_step(where: str) -> None:
    """The first step of such a run is the one it starts at."""
    Caller(start=2).levels(3, 1, 3, 1)
    with pytest.raises(CallError, match="goes on from 5 to 3"):
        Caller(start=2).levels(7, 5, 3, 1)


def written(x: Tensor) -> Tensor:
    """The same tensor, written to in between."""
    return x.add_(1)


SAMPLES: dict[str, tuple[Callable[[Tensor], Tensor], bool, bool]] = {
    # what becomes of the sample, whether that is another branch, and whether it is on a device
    "the same tensor": (lambda x: x, True, True),
    "a copy": (Tensor.clone, True, False),
    "written in between": (written, False, False),
    "another": (lambda x: x + 1, False, False),
}


@pytest.mark.parametrize("kind", SAMPLES)
@pytest.mark.parametrize("level", [1, None])
def test_another_condition_on_the_same_sample_is_another_branch(kind: str, level: int | None, where: str) -> None:
    """Whether the noise level is known or not; a copy on a device would have to be read."""
    change, refused, refused_on_device = SAMPLES[kind]
    caller, x, t = Caller(level), noise(2, 3), torch.tensor([5.0, 5.0])
    caller(x, t, torch.tensor([1]))
    if refused_on_device if where == "device" else refused:
        with pytest.raises(CallError, match="Two guidance branches share one session"):
            caller(change(x), t.clone(), torch.tensor([2]))
    else:
        caller(change(x), t.clone(), torch.tensor([2]))


def test_what_is_no_other_branch(where: str) -> None:
    """The same call again, another noise level, or a new run."""
    x, t, y = noise(2, 3), torch.tensor([5.0, 5.0]), torch.tensor([1])
    again = Caller()
    again(x, t, y)
    again(x, t, y)
    again(x, t - 1, y + 1)
    again(noise(2, 3, seed=1), t - 1, y)
    again(noise(2, 3, seed=1), t, y + 1)


def test_the_sample_may_be_any_input() -> None:
    """A model of (t, x, y): the level alone does not make a branch."""
    x, t, y = noise(2, 3), torch.tensor([5.0, 5.0]), torch.tensor([1])
    caller = Caller(level=0, samples=(1,))
    caller(t, x, y)
    caller(t, x + 1, y + 1)
    with pytest.raises(CallError, match="Two guidance branches share one session"):
        caller(t, x + 1, y)


def test_inference_tensors_count_as_not_written() -> None:
    """They have no version; loops make a new sample at each step."""
    caller, y = Caller(), torch.tensor([1])
    with torch.inference_mode():
        x, t = noise(2, 3), torch.tensor([7.0, 7.0])
        caller(x, t, y)
        caller(x + 1, t, y)
        with pytest.raises(CallError, match="Two guidance branches share one session"):
            caller(x + 1, t, y + 1)
