"""Timing that survives a busy machine: interleaved calls in one process, medians; what a call allocates and compiles.

What is compared is run in turns, so that a drift of the machine meets every candidate alike, and a median per kind of
step drops the moments when another process had the core.
"""

from __future__ import annotations

import contextlib
import itertools
import os
import platform
import statistics
import time
from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch.autograd.profiler import profile

from tcc.errors import CallError

__all__ = [
    "Allocations", "Compilation", "Run", "RunTiming", "Timing", "allocations", "faster_threads", "machine",
    "time_calls", "time_runs", "watched_compilation",
]  # fmt: skip

Progress = Callable[[int, int], None]


@dataclass(frozen=True)
class Timing:
    """The durations of one call, in seconds."""

    samples: tuple[float, ...]

    @property
    def median(self) -> float:
        """The median."""
        return statistics.median(self.samples)

    @property
    def p90(self) -> float:
        """The 90th percentile, interpolated."""
        if len(self.samples) < 2:
            return self.median
        return statistics.quantiles(self.samples, n=10, method="inclusive")[-1]


@dataclass(frozen=True)
class Run:
    """Something that takes a fixed number of steps, to be timed step by step.

    Attributes:
        kinds: the kind of every step; steps of one kind do the same work.
        start: begins the run; each `next` of what it returns does one step, and what that yields is kept.
    """

    kinds: Sequence[Hashable]
    start: Callable[[], Iterator[Any]]


@dataclass(frozen=True)
class RunTiming:
    """The durations of one run's steps.

    Attributes:
        kinds: the kind of every step.
        rounds: for every round, the seconds of every step.
        result: what the last step of the last round yielded.
    """

    kinds: tuple[Hashable, ...]
    rounds: tuple[tuple[float, ...], ...]
    result: Any

    @property
    def by_kind(self) -> dict[Hashable, Timing]:
        """The durations of each kind of step, over all rounds."""
        samples: dict[Hashable, list[float]] = {}
        for seconds in self.rounds:
            for kind, duration in zip(self.kinds, seconds, strict=True):
                samples.setdefault(kind, []).append(duration)
        return {kind: Timing(tuple(found)) for kind, found in samples.items()}

    @property
    def seconds(self) -> float:
        """Seconds of a whole run: for every step the median of its kind, summed."""
        medians = {kind: timing.median for kind, timing in self.by_kind.items()}
        return sum(medians[kind] for kind in self.kinds)


def time_calls(
    calls: Mapping[str, Callable[[], object]],
    *,
    rounds: int,
    warmup: int = 1,
    at_most: float = float("inf"),
    progress: Progress | None = None,
) -> dict[str, Timing]:
    """Time every call once per round, in turns; each round starts with another call.

    Args:
        calls: what to time, by name.
        rounds: samples per call.
        warmup: rounds whose times are dropped.
        at_most: seconds after which no further round begins; warm-up and the first round always run.
        progress: called as `progress(rounds_done, all_rounds)`.
    """
    samples: dict[str, list[float]] = {name: [] for name in calls}
    names, began = list(calls), time.perf_counter()
    for number in range(warmup + rounds):
        if number > warmup and time.perf_counter() - began > at_most:
            break
        turn = number % len(names) if names else 0
        for name in names[turn:] + names[:turn]:
            seconds, _ = _timed(calls[name])
            if number >= warmup:
                samples[name].append(seconds)
        if progress is not None:
            progress(number + 1, warmup + rounds)
    return {name: Timing(tuple(found)) for name, found in samples.items()}


def time_runs(
    runs: Mapping[str, Run],
    *,
    rounds: int,
    at_most: float = float("inf"),
    progress: Progress | None = None,
    clock: Callable[[], float] | None = None,
) -> dict[str, RunTiming]:
    """Time runs of many steps, their steps interleaved in proportion: all runs are halfway at the same moment.

    Warm the runs up before: every step counts.

    Args:
        runs: what to time, by name.
        rounds: how often every run is run.
        at_most: seconds after which no further round begins; the first always runs.
        progress: called as `progress(steps_done, all_steps)`, counted over all runs and rounds.
        clock: what seconds are read from, by default `time.perf_counter`; `time.process_time` leaves out the time that
            a busy machine gives to others.
    """
    order = sorted(((i + 0.5) / len(run.kinds), name) for name, run in runs.items() for i in range(len(run.kinds)))
    samples: dict[str, list[tuple[float, ...]]] = {name: [] for name in runs}
    results: dict[str, Any] = {}
    began, done = time.perf_counter(), 0
    for _ in range(rounds):
        started = {name: run.start() for name, run in runs.items()}
        seconds: dict[str, list[float]] = {name: [] for name in runs}
        for _, name in order:
            duration, results[name] = _timed(started[name].__next__, clock)
            seconds[name].append(duration)
            done += 1
            if progress is not None:
                progress(done, rounds * len(order))
        for name, found in seconds.items():
            samples[name].append(tuple(found))
        if time.perf_counter() - began > at_most:
            break
    return {name: RunTiming(tuple(run.kinds), tuple(samples[name]), results[name]) for name, run in runs.items()}


@dataclass(frozen=True)
class Allocations:
    """What a call allocated on a device, beyond what was there before.

    Attributes:
        peak: the most bytes at once.
        kept: the bytes that are left when it has returned, its result among them.
        count: how often something was allocated.
    """

    peak: int
    kept: int
    count: int


def allocations(call: Callable[[], object], device: torch.device | str = "cpu") -> Allocations:
    """Run `call` once and watch torch's allocator: tensors, and what operators and compiled code allocate in between.

    What libraries allocate by themselves (the packed matrices of a BLAS) is not seen. On CPUs torch's profiler tells,
    and memory from before that is freed meanwhile does not count; on CUDA the allocator's counters tell.

    Raises:
        CallError: a device of another kind.
    """
    device = torch.device(device)
    if device.type == "cuda":
        return _allocations_on_cuda(call, device)
    if device.type != "cpu":
        raise CallError(f"allocations on {device} cannot be watched: measure on cpu or cuda")
    with profile(profile_memory=True) as watched:
        result = call()
    assert watched.kineto_results is not None
    sizes = [event.nbytes() for event in watched.kineto_results.events() if event.name() == "[memory]"]
    del result
    alive = [0, *itertools.accumulate(sizes)]
    return Allocations(max(alive), alive[-1], sum(size > 0 for size in sizes))


def _allocations_on_cuda(call: Callable[[], object], device: torch.device) -> Allocations:
    torch.cuda.synchronize(device)
    torch.cuda.reset_peak_memory_stats(device)
    before = torch.cuda.memory_stats(device)
    result = call()
    torch.cuda.synchronize(device)
    after = torch.cuda.memory_stats(device)
    del result
    alive, count = "allocated_bytes.all", "allocation.all.allocated"
    return Allocations(
        after[f"{alive}.peak"] - before[f"{alive}.current"],
        after[f"{alive}.current"] - before[f"{alive}.current"],
        after[count] - before[count],
    )


def faster_threads(call: Callable[[], object], rounds: int = 5) -> int:
    """How many CPU threads to measure with: all of torch's, or 1 where `call` is faster so.

    A parallel region ends when its last thread does. Where other work holds a core, every one of them waits for that
    thread's turn, and more threads are slower than one, by a factor that says nothing about what is measured.
    """
    every = torch.get_num_threads()
    seconds: dict[int, float] = {}
    for count in {every, 1}:
        torch.set_num_threads(count)
        seconds[count] = time_calls({"call": call}, rounds=rounds)["call"].median
    torch.set_num_threads(every)
    return min(seconds, key=seconds.__getitem__)


@dataclass(frozen=True)
class Compilation:
    """What `torch.compile` did while something ran.

    Attributes:
        seconds: in Dynamo and its backend.
        graph_breaks: how often a graph ended before its function did.
        recompiles: how often a function was compiled again, because a guard failed.
    """

    seconds: float
    graph_breaks: int
    recompiles: int


@contextlib.contextmanager
def watched_compilation() -> Iterator[list[Compilation]]:
    """Fills the list when the block ends."""
    from torch._dynamo import utils as dynamo  # here: it is slow to import

    found: list[Compilation] = []
    breaks = sum(dynamo.counters["graph_break"].values())
    dynamo.clear_compilation_metrics()
    dynamo.set_compilation_metrics_limit(100_000)
    try:
        yield found
    finally:
        metrics = dynamo.get_compilation_metrics()
        found.append(
            Compilation(
                sum(m.entire_frame_compile_time_s or 0.0 for m in metrics),
                sum(dynamo.counters["graph_break"].values()) - breaks,
                sum(bool(m.recompile_reason) for m in metrics),
            )
        )


def machine() -> dict[str, Any]:
    """What a measurement must be published with: processor, cores, threads, accelerator, versions."""
    return {
        "processor": _processor(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "accelerator": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        "torch": torch.__version__,
        "python": platform.python_version(),
    }


def _timed(call: Callable[[], Any], clock: Callable[[], float] | None = None) -> tuple[float, Any]:
    """Seconds of one call, accelerator work included, and its result."""
    clock = clock or time.perf_counter
    _synchronize()
    start = clock()
    result = call()
    _synchronize()
    return clock() - start, result


def _synchronize() -> None:
    if torch.cuda.is_initialized():  # type: ignore[no-untyped-call]
        torch.cuda.synchronize()


def _processor() -> str:
    """The processor's name; Linux keeps it in a file, elsewhere the platform tells."""
    info = Path("/proc/cpuinfo")
    if info.is_file():
        for line in info.read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()
