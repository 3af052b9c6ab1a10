"""Methods measured side by side, row by row: the uncached model in each of its ways to run, fewer steps, and plans."""

from __future__ import annotations

import contextlib
import gc
import inspect
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from tcc import plans
from tcc.cli.compare import Job, Method, Model, compare, of_executable, warm_up
from tcc.cli.lines import UNCACHED, Line
from tcc.errors import CallError, PlanError, TccError
from tcc.info import ModelInfo
from tcc.lowering import Compiled, Known, lower
from tcc.plan import CachePlan
from tcc.runtime import Executable, Session
from tcc.runtime.folding import Folding, find_folding
from tcc.timing import Compilation, Progress, allocations, watched_compilation

__all__ = ["COMPILED", "EAGER", "TCC", "Harness", "device_named", "known_options", "run"]

EAGER, COMPILED, TCC = "eager", "torch.compile", "tcc"
#: Many rows are compiled in one process: none may use up the recompiles of another, or lose its code to a limit.
ISOLATED: dict[str, Any] = {"isolate_recompiles": True, "recompile_limit": 64}
#: Where rows cannot be isolated: all of them together, so that none falls back to eager.
TOGETHER = 4096


@dataclass(frozen=True)
class Entry:
    """A method that ran, and what its first runs told; `line` has all but what is timed."""

    method: Method
    line: Line


class Harness:
    """The methods that run, and the rows of those that do not. Uncached comes first.

    Args:
        model: the model, called as `task` calls it.
        task: what every method does.
        info: what tcc sees in the model, for a call of the task.
        steps: denoising steps.
        branches: guidance branches of an image, each a row of the model's batch.
        images: whether results are images, with a PSNR.
        backend: of `torch.compile` and of tcc.
        mode: likewise: `reduce-overhead` for CUDA graphs.
        regional: whether tcc compiles what a variant repeats once.
        say: called with what is done next.
    """

    def __init__(
        self,
        model: nn.Module,
        task: Job,
        info: ModelInfo,
        *,
        steps: int,
        branches: int = 2,
        images: bool = True,
        backend: str = "inductor",
        mode: str = "default",
        regional: bool = False,
        say: Callable[[str], None] = lambda text: None,
    ) -> None:
        self.model, self.task, self.info, self.steps, self.branches = model, task, info, steps, branches
        self.images, self.backend, self.mode, self.regional, self.say = images, backend, mode, regional, say
        self.entries: list[Entry] = []
        self.failed: list[Line] = []
        self.full = plans.full(info, num_steps=steps)
        self._runners: dict[Known, Compiled] = {}
        self._uncached: Executable | None = None

    def add_uncached(self) -> None:
        """The model itself: eager, under `torch.compile`, and through tcc."""
        line = Line(method=UNCACHED, family=UNCACHED, package="torch", mode=EAGER, steps=self.steps, bound=1.0)
        line = replace(line, macs=self._macs(self.full), cache_bytes=0)
        self.say(line.key)
        eager = replace(line, compile_seconds=0.0, graph_breaks=0, recompiles=0)
        self.add(self.own(eager, lambda: self.model), eager)
        line = replace(line, mode=COMPILED)
        self.say(line.key)
        compiled = self.compile(self.model)
        method, done = self.warm(self.own(line, lambda: compiled))
        self.add(method, with_compilation(line, done))
        self._uncached = self.add_plan(UNCACHED, UNCACHED, self.full)

    def add_fewer(self, counts: Sequence[int]) -> None:
        """The uncached model with fewer steps, which is compiled already."""
        line = next(entry.line for entry in self.entries if (entry.line.method, entry.line.mode) == (UNCACHED, TCC))
        assert self._uncached is not None
        for count in sorted(set(counts), reverse=True):
            short = replace(line, method=f"{count} steps", family="fewer steps", steps=count, compile_seconds=0.0)
            short = replace(short, macs=self._macs(self.full) * count / self.steps, bound=self.steps / count)
            warm_up(self.task, [self._uncached])
            self.add(of_executable(short.key, self._uncached, self.steps / count, count), short)

    def add_plan(self, name: str, family: str, plan: CachePlan) -> Executable:
        """A plan through tcc, warmed up; variants that another plan has are compiled once.

        Raises:
            TccError: tcc refuses the plan.
        """
        return self._add_plan(self._line(name, family, plan), plan, None)

    def add_folded(self, name: str, family: str, plan: CachePlan) -> None:
        """The same plan where timesteps are known, as `tcc.compile(timesteps=...)` has it; else a row with the reason.

        What depends on timesteps and unchanging inputs alone is computed once per run. The bound stays the plan's: it
        counts this work at every step, on both sides, so that a realised share may be above 1 here.
        """
        line = self._line(f"{name}, timesteps known", family, plan)
        try:
            timesteps = self.task.timesteps(plan.num_steps)
            if timesteps is None:
                raise PlanError("the calls have no noise level that is one number at every step")
            folding = find_folding(self.info.captured, self.info.analysis, plan, timesteps)
            if folding is None:
                raise PlanError("nothing in the model depends on timesteps and unchanging inputs alone")
            self._add_plan(line, plan, folding)
        except TccError as error:
            self.refuse(line, str(error).splitlines()[0])

    def _line(self, name: str, family: str, plan: CachePlan) -> Line:
        return Line(method=name, family=family, package=TCC, mode=TCC, steps=plan.num_steps, bound=plan.bound)

    def _add_plan(self, line: Line, plan: CachePlan, folding: Folding | None) -> Executable:
        self.say(line.key)
        options: dict[str, Any] = {"mode": self.mode, "regional": self.regional, "known": self._runners}
        with watched_compilation() as found:
            executable = lower(self.info.program(plan), self.backend, folding=folding, **options)
            warm_up(self.task, [executable])
        done = replace(found[0], seconds=sum(executable.compile_seconds))
        method = of_executable(line.key, executable, plan.bound)
        line = replace(line, macs=self._macs(plan), cache_bytes=kept_bytes(method.open()))
        self.add(method, with_compilation(line, done))
        return executable

    def refuse(self, line: Line, reason: str) -> None:
        """A row without numbers."""
        self.failed.append(replace(line, reason=reason))

    def own(self, line: Line, open_model: Callable[[], Model]) -> Method:
        """A method that is not tcc's."""
        return Method(line.key, open_model, tuple(range(line.steps)), bound=line.bound or 1.0)

    def compile(self, model: nn.Module) -> Model:
        """The model under `torch.compile`, with code of its own."""
        options = known_options(ISOLATED)
        if self.backend == "inductor" and self.mode != "default":
            options["mode"] = self.mode
        compiled: Model = torch.compile(model, backend=self.backend, **options)
        return compiled

    def warm(self, method: Method) -> tuple[Method, Compilation]:
        """Two runs; what compiling they caused."""
        with watched_compilation() as found:
            for _ in range(2):
                run(method, self.task)
        return replace(method, compile_seconds=found[0].seconds), found[0]

    def add(self, method: Method, line: Line) -> None:
        """Keep a method. Every step is a kind of its own: a peer's steps may all differ, and all are treated alike."""
        self.entries.append(Entry(replace(method, kinds=tuple(range(method.num_steps))), line))

    def measure(
        self,
        rounds: int,
        at_most: float,
        *,
        distance: Callable[[Method], float] | None = None,
        progress: Progress | None = None,
    ) -> list[Line]:
        """Time all methods in turns: their rows, and those without numbers.

        Args:
            rounds: how often each is run.
            at_most: seconds after which no further round begins.
            distance: the FD of a method, where one is asked for.
            progress: called as `progress(steps_done, all_steps)`.
        """
        baseline = Line(method=UNCACHED, family="", package="", mode=COMPILED, steps=self.steps).key
        methods = [entry.method for entry in self.entries]
        found = compare(self.task, methods, baseline=baseline, rounds=rounds, at_most=at_most, progress=progress)
        fds = {} if distance is None else self._distances([row.seconds for row in found], distance)
        lines = []
        for entry, row in zip(self.entries, found, strict=True):
            p90 = {kind: samples.p90 for kind, samples in row.timing.by_kind.items()}
            lines.append(
                replace(
                    entry.line,
                    seconds=row.seconds,
                    seconds_p90=sum(p90[kind] for kind in row.timing.kinds),
                    speedup=row.speedup,
                    psnr=row.psnr if self.images else None,
                    error=relative_error(row.images, found[0].images),
                    fd=fds.get((entry.line.package, entry.line.method)),
                    peak_bytes=self._peak(entry.method),
                    rounds=len(row.timing.rounds),
                )
            )
        return [*lines, *self.failed]

    def _distances(self, seconds: Sequence[float], distance: Callable[[Method], float]) -> dict[tuple[str, str], float]:
        """By package and method: of its fastest mode alone, since all draw the same images up to rounding."""
        fds: dict[tuple[str, str], float] = {}
        for number in sorted(range(len(seconds)), key=seconds.__getitem__):
            entry = self.entries[number]
            name = (entry.line.package, entry.line.method)
            if name not in fds:
                fds[name] = distance(entry.method)
        return fds

    def _macs(self, plan: CachePlan) -> float:
        """Of one image: all steps and branches."""
        assert plan.cost is not None  # the policies and `info.count` fill it in
        return float(sum(plan.cost.step_macs) * self.branches)

    def _peak(self, method: Method) -> int:
        """Weights, what tcc's session keeps, and the most that a run allocates; peers forget the run before first.

        What CUDA graphs keep for themselves is not seen, be they tcc's or `torch.compile`'s.
        """
        kept = kept_bytes(method.open())
        weights = {p.untyped_storage().data_ptr(): p.untyped_storage().nbytes() for p in self.model.parameters()}
        gc.collect()
        with _quiet():
            return kept + sum(weights.values()) + allocations(lambda: run(method, self.task), self.task.device).peak


def kept_bytes(model: Model) -> int:
    """What a session of tcc keeps from step to step, in buffers that stay; 0 of other models."""
    return model.slot_bytes + model.folded_bytes if isinstance(model, Session) else 0


def device_named(text: str) -> torch.device:
    """The device of that name, such as `cpu`, `cuda` or `cuda:1`.

    Raises:
        CallError: there is none, or this torch sees none.
    """
    try:
        device = torch.device(text)
    except RuntimeError as error:
        raise CallError(f"--device {text}: torch knows no such device: give cpu, cuda or cuda:1") from error
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise CallError(f"--device {text}: torch sees {torch.cuda.device_count()} CUDA devices here: give cpu")
    return device


def run(method: Method, task: Job) -> Tensor:
    """One run: the result of its last step."""
    *_, result = task.denoise(method.open(), method.num_steps, method.sampler)
    return result


def relative_error(result: Tensor, expected: Tensor) -> float:
    """The norm of the difference, over that of what is expected."""
    wanted = expected.double()
    return float((result.double() - wanted).norm() / wanted.norm())


def known_options(options: dict[str, Any]) -> dict[str, Any]:
    """Those of the options that this version's `torch.compile` has; without a limit of its own, the process's rises."""
    known = inspect.signature(torch.compile).parameters
    if "recompile_limit" not in known:  # torch 2.11
        from torch._dynamo import config  # here: it is slow to import

        config.recompile_limit = max(config.recompile_limit, TOGETHER)
        config.accumulated_recompile_limit = max(config.accumulated_recompile_limit, TOGETHER)
    return {name: value for name, value in options.items() if name in known}


def with_compilation(line: Line, done: Compilation) -> Line:
    """The row with what compiling it took.

    Where rows cannot be isolated, the first code of a row counts as a recompile of another's: the number says nothing.
    """
    isolated = line.mode == TCC or "isolate_recompiles" in inspect.signature(torch.compile).parameters
    recompiles = done.recompiles if isolated else None
    return replace(line, compile_seconds=done.seconds, graph_breaks=done.graph_breaks, recompiles=recompiles)


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Nothing reaches the process's stderr: the profiler, which is not Python, says there that it begins and ends."""
    sys.stderr.flush()
    kept, null = os.dup(2), os.open(os.devnull, os.O_WRONLY)
    os.dup2(null, 2)
    try:
        yield
    finally:
        os.dup2(kept, 2)
        os.close(kept)
        os.close(null)
