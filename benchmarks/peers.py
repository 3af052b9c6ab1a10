"""tcc beside other caches, each from its own package: one process, one model, the same noise, steps in turns.

    python benchmarks/peers.py --model reference --steps 20 --batch 4 --threads 1
    python benchmarks/peers.py --model pixart --only FirstBlock,DBCache --json peers.json --results benchmarks/results

Needs the extra `bench` (diffusers, cache-dit). Rows: the uncached model eager, under `torch.compile` and through tcc;
fewer steps; tcc's plans; diffusers' FirstBlockCache, TaylorSeer, MagCache, PyramidAttentionBroadcast and FasterCache
and cache-dit's DBCache with and without TaylorSeer, each eager, under `torch.compile`, and with compiled blocks. A peer
that cannot be attached to the model, or raises, has a row without numbers, and the reason stands below the table.

`torch.compile` sees the whole model after a cache is attached, and no other row's code (`isolate_recompiles`). With
compiled blocks, each block is compiled before a cache is attached to it, as in diffusers' regional compilation: a cache
that switches the compiler off around the blocks loses nothing so. All blocks share what was compiled. Either may
recompile 64 times, more than the default 8; cache-dit's rows are compiled with what `cache_dit.set_compile_configs`
sets. Every row is run twice before it is timed; seconds are the medians of every step, summed. Speedups are over the
uncached model under `torch.compile`. MACs of peers are counted while they run eagerly, since they decide as they go;
compiled they are taken to decide alike. Cache bytes of peers are the tensors that are alive between steps beyond those
of the uncached run; of tcc's plans, their slots. Random weights (dit-s, pixart) are for speed alone, and what a
threshold decides on them says little.
"""

from __future__ import annotations

import argparse
import functools
import inspect
import json
import os
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

os.environ.setdefault("CACHE_DIT_LOG_LEVEL", "error")

import peers_report
import torch
from peers_methods import PEERS, Model, NotApplicable, Peer
from peers_models import SUBJECTS, Subject, target
from peers_probe import Compilation, Work, eager_work, peak_bytes, run, watched_compilation
from peers_report import Line
from provenance import provenance
from quality_rows import Missing, comparison
from quality_rows import Row as PlanRow
from rich.console import Console
from torch import nn

import tcc
from tcc import plans, timing
from tcc.cli.compare import Method, compare, of_executable, warm_up
from tcc.errors import TccError
from tcc.metrics import Statistics, feature_network, frechet_distance, real_statistics
from tcc.passes.pipeline import StepKind
from tcc.plan import CachePlan
from tcc.program import Variant, build_program
from tcc.runtime import Compiled, Executable, lower

EAGER, COMPILED, BLOCKS, TCC = "eager", "torch.compile", "compiled blocks", "tcc"
UNCACHED = "uncached"
FEWER = (0.7, 0.5, 0.35, 0.25)  # of the steps
#: Rows of `quality_rows.py`.
PLANS = ("FORA N=2", "FORA N=3", "forecast 50%", "forecast 34%", "forecast 26%", "forecast 34%, steps searched",
         "TaylorSeer N=3 O=2", "TaylorSeer N=6 O=2", "L2C theta=0.1", "uniform tokens 1.5x", "ToCa N=3")  # fmt: skip
LIMIT = {"recompile_limit": 64}
ISOLATED = {"isolate_recompiles": True, **LIMIT}


@dataclass(frozen=True)
class Entry:
    """A method that ran, and what its first runs told; `line` has all but what is timed."""

    method: Method
    line: Line


class Bench:
    """The methods that run, and the rows of those that do not.

    Args:
        subject: the model.
        steps: denoising steps.
        batch: images.
        seed: of the noise.
        backend: of `torch.compile` and of tcc.
        console: where it says what it does.
    """

    def __init__(self, subject: Subject, *, steps: int, batch: int, seed: int, backend: str, console: Console) -> None:
        self.subject, self.steps, self.backend, self.console = subject, steps, backend, console
        self.task, self.other = subject.task(batch, seed), subject.task(batch, seed + 1)
        self.entries: list[Entry] = []
        self.failed: list[Line] = []
        self._variants: dict[StepKind, Variant] = {}
        self._runners: dict[StepKind, Compiled] = {}
        self._uncached = Work(0.0, 0)

    def add_uncached(self) -> None:
        """The model itself: eager, and under `torch.compile`, which must be able to."""
        model = self.subject.model
        line = Line(method=UNCACHED, family=UNCACHED, package="torch", mode=EAGER, steps=self.steps, bound=1.0)
        method = self._own(line, lambda: model)
        self._uncached = eager_work(method, self.task)
        line = replace(line, macs=self._uncached.macs / len(self.task.noise), cache_bytes=0)
        self._add(replace(method, bound=1.0), replace(line, compile_seconds=0.0, graph_breaks=0, recompiles=0))
        compiled = self._compile(model)
        method, done = self._warm(self._own(replace(line, mode=COMPILED), lambda: compiled))
        self._add(method, _with_compilation(replace(line, mode=COMPILED), done))

    def add_plans(self, wanted: Callable[[str], bool]) -> None:
        """The uncached model through tcc, fewer steps, and tcc's plans."""
        with torch.no_grad():
            info = tcc.inspect(self.subject.model, *self.task.inputs(self.task.noise, 0))
        full = plans.full(info, num_steps=self.steps)
        rows = {row.name: row for row in comparison(self.steps)}
        executable, done = self._executable(info, full)
        line = self._plan_line(UNCACHED, UNCACHED, full, done)
        self._add(of_executable(_key(line), executable, 1.0), line)
        for count in sorted({max(1, round(share * self.steps)) for share in FEWER} - {self.steps}, reverse=True):
            name = f"{count} steps"
            if wanted(name):
                macs = full.cost.full_macs * 2 * count  # type: ignore[union-attr] # a policy counts it
                short = replace(line, method=name, family="fewer steps", steps=count, macs=macs)
                short = replace(short, bound=self.steps / count)
                self._add(of_executable(_key(short), executable, self.steps / count, count), short)
        for name in filter(wanted, PLANS):
            self._add_plan(info, rows[name])

    def add_peer(self, peer: Peer) -> None:
        """A peer, eager and compiled both ways, each on a copy of its own. Whatever it raises becomes the reason."""
        work: Work | None = None
        for mode in (EAGER, COMPILED, BLOCKS):
            line = Line(method=peer.name, family=peer.family, package=peer.package, mode=mode, steps=self.steps)
            self.console.print(f"[dim]{peers_report.escaped(_key(line))}[/]")
            try:
                work = self._add_peer(peer, line, work)
            except Exception as error:  # of another package: it is the result
                self.failed.append(replace(line, reason=_reason(error)))

    def measure(self, rounds: int, at_most: float, fd_images: int) -> list[Line]:
        """Time all methods in turns: their rows, and those without numbers."""
        baseline = _key(next(e.line for e in self.entries if (e.line.method, e.line.mode) == (UNCACHED, COMPILED)))
        methods = [entry.method for entry in self.entries]
        found = compare(self.task, methods, baseline=baseline, rounds=rounds, at_most=at_most)
        lines = []
        for entry, row in zip(self.entries, found, strict=True):
            p90 = {kind: samples.p90 for kind, samples in row.timing.by_kind.items()}
            lines.append(
                replace(
                    entry.line,
                    seconds=row.seconds,
                    seconds_p90=sum(p90[kind] for kind in row.timing.kinds),
                    speedup=row.speedup,
                    psnr=row.psnr if self.subject.trained else None,
                    fd=self._fd(entry.method, fd_images) if fd_images and self.subject.trained else None,
                    peak_bytes=peak_bytes(entry.method, self.task),
                    rounds=len(row.timing.rounds),
                )
            )
        return [*lines, *self.failed]

    def _add_peer(self, peer: Peer, line: Line, work: Work | None) -> Work:
        compile_block = functools.partial(nn.Module.compile, backend=self.backend, **_known(LIMIT))
        model = target(self.subject, self.steps, self._draw_other, compile_block if line.mode == BLOCKS else None)
        attached = peer.attach(model)
        runner: Model = self._compile(model.model) if line.mode == COMPILED else model.model
        call = attached.around(runner)

        def open_model() -> Model:
            attached.reset()
            return call

        method = self._own(line, open_model)
        if work is None:  # compiled rows take that of the eager one: what is decided is the same
            if line.mode != EAGER:
                raise RuntimeError("it did not run eagerly")
            work = eager_work(method, self.task)
        with peer.settings():
            method, done = self._warm(method)
        bound = self._uncached.macs / work.macs
        cached = max(0, work.live_bytes - self._uncached.live_bytes)
        line = replace(line, macs=work.macs / len(self.task.noise), bound=bound, cache_bytes=cached)
        self._add(replace(method, bound=bound, slot_bytes=cached), _with_compilation(line, done))
        return work

    def _draw_other(self, model: Model) -> None:
        """A run on noise that no method is measured on."""
        for _ in self.other.denoise(model, self.steps):
            pass

    def _add_plan(self, info: tcc.ModelInfo, row: PlanRow) -> None:
        """One plan; a policy that refuses the model has a row without numbers."""
        self.console.print(f"[dim]tcc: {peers_report.escaped(row.name)}[/]")
        try:
            plan = row.plan(info, self.steps, Path())
            executable, done = self._executable(info, plan)
        except (TccError, Missing) as error:
            line = Line(method=row.name, family=row.family, package=TCC, mode=TCC, steps=self.steps)
            self.failed.append(replace(line, reason=_reason(error)))
            return
        line = self._plan_line(row.name, row.family, plan, done)
        self._add(of_executable(_key(line), executable, plan.bound), line)

    def _plan_line(self, name: str, family: str, plan: CachePlan, done: Compilation) -> Line:
        """What is known of a plan before it is timed."""
        assert plan.cost is not None
        family = family if family == UNCACHED else f"tcc: {family}"
        line = Line(method=name, family=family, package=TCC, mode=TCC, steps=plan.num_steps, bound=plan.bound)
        line = replace(line, macs=sum(plan.cost.step_macs) * 2, cache_bytes=plan.cost.slot_bytes)
        return _with_compilation(line, done)

    def _executable(self, info: tcc.ModelInfo, plan: CachePlan) -> tuple[Executable, Compilation]:
        """The compiled plan, warmed up; variants that another plan has are compiled once."""
        program = build_program(info.captured, info.analysis, plan, known=self._variants)
        with watched_compilation() as found:
            executable = lower(program, self.backend, known=self._runners)
            warm_up(self.task, [executable])
        return executable, replace(found[0], seconds=sum(executable.compile_seconds))

    def _own(self, line: Line, open_model: Callable[[], Model]) -> Method:
        """A method that is not tcc's."""
        return Method(_key(line), open_model, tuple(range(line.steps)))

    def _warm(self, method: Method) -> tuple[Method, Compilation]:
        """Two runs; what compiling they caused."""
        with watched_compilation() as found:
            for _ in range(2):
                run(method, self.task)
        return replace(method, compile_seconds=found[0].seconds), found[0]

    def _compile(self, model: nn.Module) -> Model:
        compiled: Model = torch.compile(model, backend=self.backend, **_known(ISOLATED))
        return compiled

    def _add(self, method: Method, line: Line) -> None:
        """Keep a method. Every step is a kind of its own: a peer's steps may all differ, and all are treated alike."""
        kinds = tuple(range(method.num_steps))
        self.entries.append(Entry(replace(method, kinds=kinds), line))

    def _fd(self, method: Method, images: int) -> float:
        """Frechet distance of so many images to the test images; biased upwards, the more the fewer."""
        network, batch = feature_network(), len(self.task.noise)
        with torch.no_grad():
            parts = [
                network(run(method, self.subject.task(batch, seed)).cpu()) for seed in range(2, 2 + -(-images // batch))
            ]
        return frechet_distance(Statistics.of(torch.cat(parts)[:images]), real_statistics())


def _known(options: dict[str, Any]) -> dict[str, Any]:
    """The options that this torch's compiler has."""
    return {name: value for name, value in options.items() if name in inspect.signature(torch.compile).parameters}


def _key(line: Line) -> str:
    return f"{line.method}, {line.mode}"


def _with_compilation(line: Line, done: Compilation) -> Line:
    return replace(line, compile_seconds=done.seconds, graph_breaks=done.graph_breaks, recompiles=done.recompiles)


def _reason(error: Exception) -> str:
    """One line: the error's kind, unless it is ours, and the first line of what it says."""
    said = next(iter(str(error).strip().splitlines()), "")
    ours = isinstance(error, (TccError, Missing, NotApplicable))
    return said if ours else f"{type(error).__name__}: {said}"[:300]


def chosen(only: str) -> Callable[[str], bool]:
    """Whether a name has one of the comma-separated words in it; all have, where there are none."""
    words = [word.strip().lower() for word in only.split(",") if word.strip()]
    return lambda name: not words or any(word in name.lower() for word in words)


def measure(args: argparse.Namespace, console: Console) -> list[Line]:
    """All rows for the options."""
    subject, wanted = SUBJECTS[args.model](), chosen(args.only)
    subject.model.to(args.device)
    bench = Bench(subject, steps=args.steps, batch=args.batch, seed=args.seed, backend=args.backend, console=console)
    bench.add_uncached()
    bench.add_plans(wanted)
    for peer in PEERS:
        if wanted(peer.name):
            bench.add_peer(peer)
    console.print("[dim]timing, all methods in turns[/]")
    return bench.measure(args.rounds, args.seconds, args.fd_images)


def caption(args: argparse.Namespace) -> str:
    """How the numbers came about."""
    where = timing.machine()
    device = where["accelerator"] or f"{where['processor']}, {where['threads']} thread(s)"
    return (
        f"{args.model}: batch {args.batch}, doubled for guidance 1.5; DDIM {args.steps} steps; float32 on {device}, "
        f"torch {where['torch']}, backend {args.backend}"
    )


def versions() -> dict[str, str | None]:
    """Of the packages that the peers are of."""
    from importlib import metadata

    def version(name: str) -> str | None:
        try:
            return metadata.version(name)
        except metadata.PackageNotFoundError:
            return None

    return {name: version(name) for name in ("diffusers", "cache-dit")}


def record(args: argparse.Namespace, lines: Sequence[Line]) -> dict[str, Any]:
    """Everything that is needed to repeat the table, and the table."""
    return {
        **provenance(),
        "packages": versions(),
        "settings": {name: getattr(args, name) for name in ("model", "batch", "steps", "seed", "backend", "rounds")},
        "rows": [line.as_dict() for line in lines],
    }


def write(args: argparse.Namespace, lines: Sequence[Line], console: Console) -> None:
    """The files that were asked for."""
    content = json.dumps(record(args, lines), indent=1) + "\n"
    if args.json is not None:
        args.json.write_text(content)
    if args.results is not None:
        args.results.mkdir(parents=True, exist_ok=True)
        stem = f"peers-{args.model}-{args.batch}x{args.steps}"
        (args.results / f"{stem}.json").write_text(content)
        (args.results / f"{stem}.md").write_text(f"{peers_report.markdown(lines)}\n\n{caption(args)}\n")
        if any(line.psnr is not None for line in lines):
            peers_report.plot(lines, caption(args), args.results / f"{stem}.png")
        console.print(f"wrote {stem}.* to {args.results}")


def parse(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", choices=list(SUBJECTS), default="reference")
    parser.add_argument("--batch", type=int, default=4, help="images; the model sees twice as many")
    parser.add_argument("--steps", type=int, default=50)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--rounds", type=int, default=5, help="how often every method is run")
    parser.add_argument("--seconds", type=float, default=600.0, help="no further round begins after so many")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--device", default="cpu", help="where the model runs, such as cuda")
    parser.add_argument("--backend", default="inductor", help="of torch.compile and of tcc; eager for a quick look")
    parser.add_argument("--only", default="", help="words, by commas: only methods with one of them in their name")
    parser.add_argument("--fd-images", type=int, default=0, help="also draw so many images for FD (trained models)")
    parser.add_argument("--json", type=Path, help="write the rows and the machine here")
    parser.add_argument("--results", type=Path, help="a folder for JSON, table and plot")
    return parser.parse_args(arguments)


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure, print, write."""
    args, console = parse(arguments), Console(width=220)
    torch.set_num_threads(args.threads)
    lines = measure(args, console)
    console.print(peers_report.table(lines, caption(args)))
    console.print(peers_report.escaped(peers_report.failures(lines)))
    write(args, lines, console)
    return 0


if __name__ == "__main__":
    sys.exit(main())
