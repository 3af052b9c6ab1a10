"""Interleaved timing, on a clock that the tests wind."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest
import torch

from tcc import timing
from tcc.errors import CallError
from tcc.timing import Allocations, Run, RunTiming, Timing, allocations, time_calls, time_runs


class Clock:
    """Stands in for `time.perf_counter`; work moves it on."""

    def __init__(self) -> None:
        self.now = 0.0
        self.log: list[str] = []

    def __call__(self) -> float:
        return self.now

    def work(self, name: str, *durations: float) -> Callable[[], str]:
        """A call that takes the given durations in turn, the last one ever after."""
        left = list(durations)

        def call() -> str:
            self.now += left.pop(0) if len(left) > 1 else left[0]
            self.log.append(name)
            return name

        return call

    def run(self, name: str, *durations: float) -> Callable[[], Iterator[str]]:
        """A run with one step per duration."""

        def start() -> Iterator[str]:
            for number, duration in enumerate(durations):
                self.now += duration
                self.log.append(name)
                yield f"{name}{number}"

        return start


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    """The clock that `tcc.timing` reads."""
    clock = Clock()
    monkeypatch.setattr(timing.time, "perf_counter", clock)
    return clock


def test_median_and_percentile() -> None:
    """The median ignores an outlier; the 90th percentile is interpolated; one sample is both."""
    samples = Timing((1.0, 2.0, 3.0, 4.0, 100.0))

    assert samples.median == 3.0
    assert samples.p90 == pytest.approx(61.6)
    assert Timing((2.0,)).p90 == 2.0


def test_calls_take_turns_and_start_in_turn(clock: Clock) -> None:
    """Every round calls each once, beginning with another one; the warm-up is not counted."""
    calls = {"a": clock.work("a", 9, 1), "b": clock.work("b", 9, 2)}

    timings = time_calls(calls, rounds=3)

    assert clock.log == ["a", "b", "b", "a", "a", "b", "b", "a"]
    assert timings["a"].samples == (1, 1, 1)
    assert timings["b"].median == 2


def test_no_round_begins_after_the_limit(clock: Clock) -> None:
    """The first round always runs; later ones only while there is time."""
    calls = {"a": clock.work("a", 5)}

    assert len(time_calls(calls, rounds=9, warmup=1, at_most=1)["a"].samples) == 1
    assert len(time_calls(calls, rounds=9, warmup=0, at_most=12)["a"].samples) == 3


def test_runs_advance_in_proportion(clock: Clock) -> None:
    """A run of four steps and one of two are halfway together."""
    runs = {"long": Run("IPIP", clock.run("l", 4, 1, 4, 1)), "short": Run("II", clock.run("s", 2, 2))}

    timings = time_runs(runs, rounds=1)

    assert "".join(clock.log) == "lsllsl"
    assert timings["long"].result == "l3"
    assert timings["short"].result == "s1"


def test_seconds_are_medians_per_kind_summed(clock: Clock) -> None:
    """One disturbed step does not change the seconds of the run."""
    run = Run("IPPPI", clock.run("r", 4, 1, 50, 1, 4))

    found = time_runs({"r": run}, rounds=1)["r"]

    assert found.seconds == 4 + 1 + 1 + 1 + 4
    assert found.by_kind["P"].samples == (1, 50, 1)


def test_rounds_stop_at_the_limit_and_report_progress(clock: Clock) -> None:
    """No round begins after `at_most`; progress counts all steps."""
    seen: list[tuple[int, int]] = []

    found = time_runs(
        {"r": Run("II", clock.run("r", 3, 3))}, rounds=5, at_most=7, progress=lambda *now: seen.append(now)
    )["r"]

    assert found.rounds == ((3, 3), (3, 3))
    assert seen == [(1, 10), (2, 10), (3, 10), (4, 10)]


def test_median_is_over_all_rounds() -> None:
    """Samples of a kind are gathered from every round."""
    found = RunTiming(kinds=("I", "P"), rounds=((4.0, 1.0), (6.0, 1.0), (5.0, 9.0)), result=None)

    assert found.by_kind["I"].samples == (4.0, 6.0, 5.0)
    assert found.seconds == 6.0


def test_more_threads_are_taken_where_they_help(clock: Clock, monkeypatch: pytest.MonkeyPatch) -> None:
    """All threads on an idle machine, one where they would wait for each other; torch's setting is left alone."""
    threads = {"now": 4}
    monkeypatch.setattr(timing.torch, "get_num_threads", lambda: threads["now"])
    monkeypatch.setattr(timing.torch, "set_num_threads", lambda count: threads.update(now=count))

    def call_taking(seconds: dict[int, float]) -> Callable[[], None]:
        def call() -> None:
            clock.now += seconds[threads["now"]]

        return call

    assert timing.faster_threads(call_taking({1: 4.0, 4: 1.5})) == 4
    assert timing.faster_threads(call_taking({1: 4.0, 4: 9.0})) == 1
    assert threads["now"] == 4


def test_machine_names_what_a_number_depends_on() -> None:
    """Processor, threads and versions; no host name."""
    found = timing.machine()

    assert found["threads"] >= 1
    assert found["processor"]
    assert set(found) == {"processor", "cores", "threads", "accelerator", "torch", "python"}


def test_runs_are_timed_by_the_clock_that_is_given(clock: Clock) -> None:
    """The one given ticks once per reading; the default one, which the work moves, is not read."""
    readings = iter(range(100))
    run = Run(("I", "P"), clock.run("r", 40, 50))

    times = time_runs({"r": run}, rounds=2, clock=lambda: float(next(readings)))

    assert times["r"].rounds == ((1, 1), (1, 1))


def _squares(count: int) -> torch.Tensor:
    """Allocates 4, 8 and 2 times `count` bytes; the first is freed before the last comes, and the last is left."""
    first = torch.empty(count)
    second = torch.empty(2 * count)
    del first
    third = torch.empty(count // 2)
    del second
    return third


def _takes(device: str) -> None:
    assert allocations(lambda: None, device) == Allocations(0, 0, 0)
    with torch.device(device):
        kept = torch.zeros(4096)
        assert allocations(lambda: _squares(1024), device) == Allocations(3 * 4096, 2048, 3)
        assert allocations(lambda: kept.relu_(), device) == Allocations(0, 0, 0)
        assert allocations(lambda: (kept + kept).sum(), device).peak >= kept.nbytes


def test_allocations_are_those_of_the_call() -> None:
    """Peak, rest and number, to the byte; what was there before does not count."""
    _takes("cpu")


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="counts the memory of a CUDA device, and there is none")
def test_allocations_on_a_gpu() -> None:
    """The same; the sizes are multiples of the allocator's 512 bytes."""
    _takes("cuda")


def test_allocations_elsewhere_are_refused() -> None:
    """In words."""
    with pytest.raises(CallError, match="on meta cannot be watched: measure on cpu or cuda"):
        allocations(lambda: None, "meta")
