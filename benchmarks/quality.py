"""What caching costs in quality, and what it saves in time: every policy on the trained reference model.

    python benchmarks/quality.py run --out RUN --samples 5000        sample; stop and continue at any time
    python benchmarks/quality.py time --out RUN                      measure seconds; on a quiet machine
    python benchmarks/quality.py report --out RUN --results benchmarks/results

DDIM, or the solver that the row names, with guidance 1.5 as a doubled batch, pixels clipped, in float32 (`--dtype`
chooses what the model computes in, the solver stays in float32; `--freeze` packs the weights, which samples bfloat16
1.6 times as fast on one core). Every row sees the same noise and the same labels (balanced classes). PSNR is counted
from the uncached DDIM images in the same noise and dtype: dB of every image, mean over images. The Frechet distance is
FD (Fashion-MNIST CNN), from the 10,000 test images; see `tcc.metrics`. Seconds are those of a row beside the compiled
uncached model, their steps interleaved in one process; medians per kind of step.

`report --earlier FILE` counts rows and seeds of an earlier results file too: a seed can be sampled on any machine, and
its numbers are all that is left of it. A table counts the seeds that all of its rows have; others wait in the file
(`other_seeds`) until the rest is there.

`run` goes breadth first: all rows at few samples before any row at many. What is measured is kept in RUN, chunk by
chunk, and never measured again. Several processes may share RUN if each has its own `--seeds`.
"""

from __future__ import annotations

import argparse
import contextlib
import hashlib
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import quality_report
import torch
from provenance import commit
from quality_rows import CORE, UNCACHED, Missing, Row, Visits, ablation, comparison
from quality_store import Store, digest
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn
from torch import Tensor

import tcc
from tcc import plans, timing
from tcc.cli.compare import Method, Task, compare, of_executable, warm_up
from tcc.errors import CallError, PlanError
from tcc.lowering import Compiled, Known, lower
from tcc.metrics import feature_network, psnr
from tcc.models import DiT, load_dit, reference_model
from tcc.passes.pipeline import StepKind
from tcc.plan import CachePlan
from tcc.program import Variant, build_program
from tcc.runtime import Executable, Session
from tcc.samplers import DDIM, Sampler

CHUNK, CFG = 250, 1.5
LEVELS = (250, 500, 1000, 2000, 5000)  # samples of all rows before any row has more


@dataclass(frozen=True)
class Entry:
    """A row that can be run: its plan, what draws with it, and where its numbers are kept."""

    row: Row
    steps: int
    plan: CachePlan
    folder: Path
    sampler: Sampler

    @property
    def work(self) -> float:
        """MACs of an image over those of one uncached step."""
        return self.plan.num_steps / self.plan.bound

    @property
    def visited(self) -> tuple[int, ...] | None:
        """The steps of the longer run that it visits, where those are not spread evenly."""
        places = self.sampler.diffusion if isinstance(self.sampler, DDIM) else None
        return places.visited if isinstance(places, Visits) else None


class Bench:
    """The model, captured once for one batch, and everything compiled so far.

    Args:
        model: a class-conditional DiT on pixels.
        batch: images per call; the model sees twice as many.
        backend: see `tcc.compile`.
    """

    def __init__(self, model: DiT, *, batch: int, backend: str) -> None:
        self.model, self.batch, self.backend = model, batch, backend
        self.network = feature_network()
        task = self.task(*noise(model, 0, 0, batch))
        self.info = tcc.inspect(model, *task.inputs(task.noise, 0))
        self._compiled: dict[str, Executable] = {}
        self._variants: dict[StepKind, Variant] = {}
        self._runners: dict[Known, Compiled] = {}

    def task(self, noise: Tensor, labels: Tensor) -> Task:
        """What every method does with one batch."""
        assert self.model.config.null_class is not None
        return Task(noise, labels, self.model.config.null_class, CFG, next(self.model.parameters()).dtype)

    def executable(self, plan: CachePlan) -> Executable:
        """The compiled plan; compiled once."""
        key = digest(plan)
        if key not in self._compiled:
            program = build_program(self.info.captured, self.info.analysis, plan, known=self._variants)
            self._compiled[key] = lower(program, self.backend, known=self._runners)
        return self._compiled[key]

    def open(self, entry: Entry) -> Callable[..., Tensor]:
        """A model whose next call is step 0. Uncached runs of all lengths share one compiled step."""
        if entry.row.policy == UNCACHED.policy:
            session = Session(self.executable(plans.full(self.info, num_steps=1)))
            return lambda x, t, y: session(x, t, y)
        return Session(self.executable(entry.plan))

    def images(self, entry: Entry, seed: int, chunk: int, size: int) -> Tensor:
        """The images `[size, C, H, W]` of one chunk."""
        batches = zip(*(part.split(self.batch) for part in noise(self.model, seed, chunk, size)), strict=True)
        model, made = self.open(entry), []
        for started, labels in batches:
            *_, images = self.task(started, labels).denoise(model, entry.plan.num_steps, entry.sampler)
            made.append(images)
        return torch.cat(made)


def shape(model: DiT) -> tuple[int, int, int]:
    """(C, H, W) of the model's images."""
    return model.config.in_channels, *model.config.input_size


def noise(model: DiT, seed: int, chunk: int, size: int) -> tuple[Tensor, Tensor]:
    """The noise `[size, C, H, W]` and the labels `[size]` of a chunk: the same for every row and number of steps."""
    generator = torch.Generator().manual_seed(seed * 1_000_003 + chunk)
    return torch.randn(size, *shape(model), generator=generator), torch.arange(size) % model.config.num_classes


def entries(
    bench: Bench, store: Store, rows: Sequence[Row], steps: int, learned: Path, console: Console
) -> list[Entry]:
    """The rows that can be run, with their plans; says which cannot, and why."""
    found: dict[Path, Entry] = {}
    for row in rows:
        try:
            plan, (sampler, drawn) = row.plan(bench.info, steps, learned), row.drawn_by(steps, learned)
        except (Missing, PlanError, CallError) as error:
            console.print(f"[dim]left out at {steps} steps: {row.name}: {error}[/]")
            continue
        folder = store.row(steps, row.name, plan, drawn)
        found[folder] = Entry(row, steps, plan, folder, sampler)
    return list(found.values())


def todo(todays: Sequence[Entry], seeds: Sequence[int], samples: int, chunk: int) -> Iterator[tuple[Entry, int, int]]:
    """The missing chunks `(entry, seed, chunk)`, breadth first."""
    levels = [level for level in LEVELS if level < samples] + [samples]
    planned = set()
    for level in levels:
        for entry in todays:
            for seed in seeds:
                for number in range(-(-level // chunk)):
                    item = (entry, seed, number)
                    key = (entry.folder, seed, number)
                    if key not in planned and not Store.has(entry.folder, seed, number):
                        planned.add(key)
                        yield item


class Bar(contextlib.AbstractContextManager["Bar"]):
    """A progress bar with the time that is left; where there is no terminal, a line per minute on stdout.

    Args:
        what: its title.
        total: the work.
    """

    def __init__(self, what: str, total: float) -> None:
        columns = (TextColumn("{task.description}"), BarColumn(), TextColumn("{task.percentage:.1f} %"))
        self._progress = Progress(*columns, TimeElapsedColumn(), TextColumn("{task.fields[left]} left"))
        self._plain = not self._progress.console.is_terminal
        self._task = self._progress.add_task(what, total=total, left="?")
        self._total, self._done, self._began, self._told = total, 0.0, time.monotonic(), 0.0

    def __enter__(self) -> Bar:
        if not self._plain:
            self._progress.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._progress.stop()

    def line(self, text: str) -> None:
        """Print a line."""
        self._progress.console.print(text, highlight=False)

    def begin(self, text: str) -> None:
        """Say what is done now."""
        seconds = time.monotonic() - self._began
        left = seconds / self._done * (self._total - self._done) if self._done else float("nan")
        told = f"{left / 3600:.2f} h" if self._done else "?"
        self._progress.update(self._task, description=text, left=told)
        if self._plain and time.monotonic() - self._told > 60:
            self._told = time.monotonic()
            self.line(f"{self._done / self._total:6.1%}  {told} left  {text}")

    def advance(self, work: float) -> None:
        """So much more is done."""
        self._done += work
        self._progress.advance(self._task, work)


def run_chunk(bench: Bench, entry: Entry, reference: Entry, seed: int, chunk: int, size: int) -> None:
    """Sample one chunk of a row and keep its features and its PSNR."""
    images = bench.images(entry, seed, chunk, size)
    with torch.no_grad():
        features = torch.cat([bench.network(part) for part in images.split(bench.batch)])
    first = entry.row == UNCACHED
    wanted = images if first else Store.read(reference.folder, seed, chunk)["images"]
    content = {"features": features, "psnr": psnr(images, wanted), **({"images": images} if first else {})}
    Store.write(entry.folder, seed, chunk, content)


def run(bench: Bench, todays: Sequence[Entry], seeds: Sequence[int], samples: int, chunk: int, hours: float) -> None:
    """Sample what is missing, until it is done or the hours are over."""
    reference = {entry.steps: entry for entry in todays if entry.row == UNCACHED}
    missing = list(todo(todays, seeds, samples, chunk))
    total, began = sum(entry.work for entry, _, _ in missing) * chunk, time.monotonic()
    with Bar("sampling", total) as bar:
        for entry, seed, number in missing:
            if time.monotonic() - began > hours * 3600:
                bar.line(f"stopped after {hours:g} hours; start again to go on")
                return
            bar.begin(f"{entry.steps} {entry.row.name}, seed {seed}, from {number * chunk}")
            run_chunk(bench, entry, reference[entry.steps], seed, number, chunk)
            bar.advance(entry.work * chunk)


def time_rows(bench: Bench, todays: Sequence[Entry], rounds: int, at_most: float) -> None:
    """Measure the seconds of every row that has none yet, interleaved with the uncached run."""
    task = bench.task(*noise(bench.model, 0, 0, bench.batch))
    missing = [entry for entry in todays if Store.seconds(entry.folder) is None]
    with Bar("timing", len(missing)) as bar:
        for entry in missing:
            bar.begin(f"{entry.steps} {entry.row.name}")
            full = bench.executable(plans.full(bench.info, num_steps=entry.steps))
            baseline = of_executable("baseline", full, 1.0)
            method = _method(bench, entry, full)
            warm_up(task, [full] if entry.row.policy == UNCACHED.policy else [full, bench.executable(entry.plan)])
            _, row = compare(task, [baseline, method], baseline="baseline", rounds=rounds, at_most=at_most)
            content = {**row.as_dict(), "uncached_seconds": row.seconds * row.speedup, "images": bench.batch}
            Store.write_seconds(entry.folder, {**content, "commit": commit(), "machine": timing.machine()})
            bar.advance(1)


def _method(bench: Bench, entry: Entry, full: Executable) -> Method:
    bound = entry.steps / entry.work
    if entry.row.policy == UNCACHED.policy:
        method = of_executable("row", full, bound, entry.plan.num_steps)
    else:
        method = of_executable("row", bench.executable(entry.plan), bound)
    return replace(method, sampler=entry.sampler)


def settings(args: argparse.Namespace, model: DiT) -> dict[str, Any]:
    """What all numbers in a store depend on."""
    weights = hashlib.sha256(b"".join(t.numpy().tobytes() for t in model.state_dict().values())).hexdigest()[:12]
    # the first stores were of float32 and do not say so
    dtype = ({} if args.dtype == "float32" else {"dtype": args.dtype}) | ({"freezing": True} if args.freeze else {})
    features = feature_network().state_dict().values()
    network = hashlib.sha256(b"".join(t.numpy().tobytes() for t in features)).hexdigest()[:12]
    return {"model": weights, "classifier": network, "cfg": CFG, "chunk": args.chunk, "sampler": "ddim", **dtype}


def parse(arguments: list[str] | None) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=["run", "time", "report", "list"])
    parser.add_argument("--out", type=Path, required=True, help="folder of the measurements")
    parser.add_argument("--steps", type=int, nargs="+", default=[50, 20])
    parser.add_argument("--seeds", type=int, nargs="+", help="run [default: 0 1 2]; report [default: what all have]")
    parser.add_argument("--samples", type=int, help="samples per row and seed; report: count so many [default: all]")
    parser.add_argument("--ablation", action="store_true", help="the rows that differ from a base in one option")
    parser.add_argument("--core", action="store_true", help="only the rows that the claims rest on")
    parser.add_argument("--only", nargs="+", default=[], help="rows whose name holds one of these words")
    parser.add_argument("--learned", type=Path, default=Path("learned"), help="folder of trained routers, importances")
    parser.add_argument("--model", help="a weights file [default: the reference model]")
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], default="float32", help="of the model")
    parser.add_argument("--freeze", action="store_true", help="pack the weights (Inductor's freezing): faster sampling")
    parser.add_argument("--batch", type=int, default=50, help="images per call; the model sees twice as many")
    parser.add_argument("--chunk", type=int, default=CHUNK, help="images per file of the store")
    parser.add_argument("--backend", default="inductor")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--hours", type=float, default=float("inf"), help="run: begin nothing after so many hours")
    parser.add_argument("--rounds", type=int, default=3, help="time: runs of every row")
    parser.add_argument("--seconds", type=float, default=60.0, help="time: no further round of a row after so many")
    parser.add_argument("--earlier", type=Path, nargs="+", default=[], help="report: results to count too (JSON)")
    parser.add_argument("--results", type=Path, help="report: also write the table, the plots and the numbers here")
    return parser.parse_args(arguments)


def chosen_rows(args: argparse.Namespace, steps: int) -> list[Row]:
    """The rows that the command line asks for; the uncached run is always among them."""
    rows = ablation(steps) if args.ablation else comparison(steps)
    rows = [row for row in rows if row == UNCACHED or not args.core or row.name.startswith(CORE)]
    return [row for row in rows if row == UNCACHED or not args.only or any(word in row.name for word in args.only)]


def main(arguments: list[str] | None = None) -> int:
    """Run, time or report."""
    args, console = parse(arguments), Console(width=170)
    torch.set_num_threads(args.threads)
    torch._inductor.config.freezing = args.freeze
    model = load_dit(args.model) if args.model else reference_model()
    try:
        if args.chunk % args.batch:
            raise ValueError(f"--chunk {args.chunk} is not a multiple of --batch {args.batch}")
        store = Store(args.out, settings(args, model), reading=args.what in ("list", "report"))
    except ValueError as error:
        print(f"quality: {error}", file=sys.stderr)
        return 2
    bench = Bench(model.to(getattr(torch, args.dtype)), batch=args.batch, backend=args.backend)
    found: list[Entry] = []
    for steps in args.steps:
        found += entries(bench, store, chosen_rows(args, steps), steps, args.learned, console)
    if args.what == "run":
        run(bench, found, args.seeds or [0, 1, 2], args.samples or LEVELS[-1], args.chunk, args.hours)
    elif args.what == "time":
        time_rows(bench, found, args.rounds, args.seconds)
    elif args.what == "list":
        for entry in found:
            console.print(f"{entry.steps} {entry.row.name}: bound {entry.steps / entry.work:.2f}x")
        console.print(f"work: {sum(entry.work for entry in found):.0f} uncached steps per image, {len(found)} rows")
        return 0
    try:
        quality_report.report(found, args, console)
    except ValueError as error:
        print(f"quality: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
