r"""tcc beside other caches, each from its own package: one process, one model, the same noise, steps in turns.

    python benchmarks/peers.py --model reference --steps 20 --threads 1 --only FORA,forecast,DBCache --results results
    python benchmarks/peers.py --model reference --steps 20 --threads 1 --only FirstBlock,MagCache --results results \
        --with results/peers-reference-4x20.json
    python benchmarks/peers.py --model dit-s --batch 1 2 8 16 --steps 10 --rounds 3

Needs the extra `bench` (diffusers, cache-dit). Rows: the uncached model eager, under `torch.compile` and through tcc;
fewer steps; tcc's plans; diffusers' FirstBlockCache, TaylorSeer, MagCache, PyramidAttentionBroadcast and FasterCache
and cache-dit's DBCache with and without TaylorSeer, each eager, under `torch.compile`, and with compiled blocks; and of
each peer, what it decided in its eager run as a plan of tcc's ("diffusers' steps": `peers_plans.py`). A peer that
cannot be attached to the model, or raises, has a row without numbers, and the reason stands below the table.

`torch.compile` sees the whole model after a cache is attached, and no other row's code (`isolate_recompiles`). With
compiled blocks, each block is compiled before a cache is attached to it, as in diffusers' regional compilation: a cache
that switches the compiler off around the blocks loses nothing so. All blocks share what was compiled. Either may
recompile 64 times, more than the default 8; cache-dit's rows are compiled with what `cache_dit.set_compile_configs`
sets. Every row is run twice before it is timed; seconds are the medians of every step, summed. Speedups are over the
uncached model under `torch.compile`. MACs of peers are counted while they run eagerly, since they decide as they go;
compiled they are taken to decide alike. Cache bytes of peers are the tensors that are alive between steps beyond those
of the uncached run; of tcc's plans, their slots, and what known timesteps fold (`--fold-timesteps`), which no bound
counts: rows with "timesteps known" may have a realised share above 1. Peak bytes are weights and what a run allocates
at most. Compile seconds are with an empty cache on disk, unless TORCHINDUCTOR_CACHE_DIR is set; what one row compiled,
later rows with the same code do not compile again. Random weights (dit-*, pixart) are for speed alone, and what a
threshold decides on them says little. `--with` puts rows of earlier runs, which had their own uncached rows, into one
table with the new, and a column says which process measured what.
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import json
import os
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

os.environ.setdefault("CACHE_DIT_LOG_LEVEL", "error")

import torch
from peers_methods import PEERS, Model, NotApplicable, Peer
from peers_models import SUBJECTS, Subject, target
from peers_plans import Twin
from peers_probe import Work, eager_work
from provenance import provenance
from quality_rows import Missing, comparison
from rich.console import Console
from rich.markup import escape
from torch import nn

import tcc
from tcc import timing
from tcc.cli.compare import Method
from tcc.cli.harness import COMPILED, EAGER, TCC, Harness, device_named, known_options, run, with_compilation
from tcc.cli.lines import UNCACHED, Line, failures, markdown, plot, table
from tcc.errors import CallError, TccError
from tcc.metrics import Statistics, feature_network, frechet_distance, real_statistics
from tcc.plan import CachePlan

BLOCKS = "compiled blocks"
OWNERS = {"diffusers": "diffusers'", "cache_dit": "cache-dit's"}
LIMIT = {"recompile_limit": 64}
FEWER = (0.7, 0.5, 0.35, 0.25)  # of the steps
#: Rows of `quality_rows.py`.
PLANS = ("FORA N=2", "FORA N=3", "forecast 50%", "forecast 34%", "forecast 26%", "forecast 34%, steps searched",
         "TaylorSeer N=3 O=2", "TaylorSeer N=6 O=2", "L2C theta=0.1", "uniform tokens 1.5x", "ToCa N=3")  # fmt: skip


class Bench(Harness):
    """The harness with the peers, each on a copy of the model of its own.

    Args:
        subject: the model.
        batch: images.
        seed: of the noise.
        seconds: no further peer is compiled after so many.
        options: those of `Harness`.
    """

    def __init__(
        self, subject: Subject, *, batch: int, seed: int, seconds: float = float("inf"), **options: Any
    ) -> None:
        self.until = time.monotonic() + seconds
        self.subject, self.other = subject, subject.task(batch, seed + 1)
        task = subject.task(batch, seed)
        args, kwargs = task.first_call()
        with torch.no_grad():
            info = tcc.inspect(subject.model, *args, **kwargs)
        super().__init__(subject.model, task, info, images=subject.trained, **options)
        self.batch = batch
        self._work: Work | None = None

    @property
    def uncached_work(self) -> Work:
        """What an uncached run does, counted as peers are."""
        if self._work is None:
            line = Line(method=UNCACHED, family=UNCACHED, package="torch", mode=EAGER, steps=self.steps)
            self._work = eager_work(self.own(line, lambda: self.model), self.task)
        return self._work

    def add_plans(self, wanted: Callable[[str], bool], *, fold: bool = False) -> None:
        """Fewer steps and tcc's plans, with `fold` also where timesteps are known; refused ones have the reason."""
        counts = {max(1, round(share * self.steps)) for share in FEWER} - {self.steps}
        self.add_fewer([count for count in counts if wanted(f"{count} steps")])
        for name, (method, make) in self._plans().items():
            if not wanted(name):
                continue
            family = f"{TCC}: {method}"
            try:
                plan = make()
                self.add_plan(name, family, plan)
            except (TccError, Missing) as error:
                line = Line(method=name, family=family, package=TCC, mode=TCC, steps=self.steps)
                self.refuse(line, _reason(error))
                continue
            if fold:
                self.add_folded(name, family, plan)

    def _plans(self) -> dict[str, tuple[str, Callable[[], CachePlan]]]:
        """By name: the method, and what makes the plan."""
        rows = {row.name: row for row in comparison(self.steps)}
        return {
            name: (rows[name].family, functools.partial(rows[name].plan, self.info, self.steps, Path()))
            for name in PLANS
        }

    def add_peer(self, peer: Peer) -> None:
        """A peer, eager and compiled both ways, each on a copy of its own. Whatever it raises becomes the reason."""
        work: Work | None = None
        for mode in (EAGER, COMPILED, BLOCKS):
            line = Line(method=peer.name, family=peer.family, package=peer.package, mode=mode, steps=self.steps)
            if time.monotonic() > self.until:
                self.refuse(line, "no time was left (--deadline)")
                continue
            self.say(line.key)
            try:
                work = self._add_peer(peer, line, work)
            except Exception as error:  # of another package: it is the result
                self.refuse(line, _reason(error))
        if work is not None and peer.twin is not None:
            self._add_twin(peer, peer.twin, work)

    def _add_twin(self, peer: Peer, twin: Twin, work: Work) -> None:
        """The plan that repeats what a peer decided."""
        timesteps = self.task.timesteps(self.steps)
        name, family = f"{peer.name}, {OWNERS[peer.package]} steps", f"{TCC}: {peer.family}"
        try:
            self.add_plan(name, family, twin(self.info, work.step_macs, timesteps))
        except TccError as error:
            self.refuse(Line(method=name, family=family, package=TCC, mode=TCC, steps=self.steps), _reason(error))

    def fd(self, images: int) -> Callable[[Method], float] | None:
        """Measures the Frechet distance of so many images, of all classes in turn, to the test images.

        It is biased upwards, the more the fewer they are. None where none are asked for, or the model draws none.
        """
        if not images or not self.subject.trained:
            return None
        network = feature_network()
        tasks = [self.subject.task(self.batch, 2 + first, first=first) for first in range(0, images, self.batch)]

        def distance(method: Method) -> float:
            with torch.no_grad():
                features = torch.cat([network(run(method, task).cpu()) for task in tasks])
            return frechet_distance(Statistics.of(features[:images]), real_statistics())

        return distance

    def _add_peer(self, peer: Peer, line: Line, work: Work | None) -> Work:
        compile_block = functools.partial(nn.Module.compile, backend=self.backend, **known_options(LIMIT))
        model = target(self.subject, self.steps, self._draw_other, compile_block if line.mode == BLOCKS else None)
        attached = peer.attach(model)
        runner: Model = self.compile(model.model) if line.mode == COMPILED else model.model
        call = attached.around(runner)

        def open_model() -> Model:
            attached.reset()
            return call

        if work is None:  # compiled rows take that of the eager one: what is decided is the same
            if line.mode != EAGER:
                raise RuntimeError("it did not run eagerly")
            work = eager_work(self.own(line, open_model), self.task)
        bound = self.uncached_work.macs / work.macs
        cached = max(0, work.live_bytes - self.uncached_work.live_bytes)
        line = replace(line, macs=work.macs / self.batch, bound=bound, cache_bytes=cached)
        with peer.settings():
            method, done = self.warm(self.own(line, open_model))
        self.add(method, with_compilation(line, done))
        return work

    def _draw_other(self, model: Model) -> None:
        """A run on noise that no method is measured on."""
        for _ in self.other.denoise(model, self.steps):
            pass


def _reason(error: Exception) -> str:
    """One line: the error's kind, unless it is ours, and the first line of what it says."""
    said = next(iter(str(error).strip().splitlines()), "")
    ours = isinstance(error, (TccError, Missing, NotApplicable))
    return said if ours else f"{type(error).__name__}: {said}"[:300]


def chosen(only: str) -> Callable[[str], bool]:
    """Whether a name has one of the comma-separated words in it; all have, where there are none."""
    words = [word.strip().lower() for word in only.split(",") if word.strip()]
    return lambda name: not words or any(word in name.lower() for word in words)


def measure(args: argparse.Namespace, subject: Subject, batch: int, console: Console) -> list[Line]:
    """All rows for the options, at one batch size."""

    def say(text: str) -> None:
        console.print(f"[dim]{escape(text)}[/]")

    torch.compiler.reset()  # else what was compiled for another batch size makes this one's graph dynamic
    given = {name: getattr(args, name) for name in ("steps", "seed", "backend", "mode", "regional")}
    bench, wanted = Bench(subject, batch=batch, seconds=args.deadline, say=say, **given), chosen(args.only)
    bench.add_uncached()
    bench.add_plans(wanted, fold=args.fold_timesteps)
    for peer in PEERS:
        if wanted(peer.name):
            bench.add_peer(peer)
    say("timing, all methods in turns")
    return bench.measure(args.rounds, args.seconds, distance=bench.fd(args.fd_images))


@contextlib.contextmanager
def empty_compiler_cache() -> Iterator[None]:
    """Inductor finds nothing on disk that an earlier process compiled, unless its folder was named."""
    name = "TORCHINDUCTOR_CACHE_DIR"
    if name in os.environ:
        yield
        return
    with tempfile.TemporaryDirectory() as folder:
        os.environ[name] = folder
        try:
            yield
        finally:
            del os.environ[name]


def caption(args: argparse.Namespace, batch: int) -> str:
    """How the numbers came about."""
    where = timing.machine()
    on_gpu = torch.device(args.device).type == "cuda"
    device = where["accelerator"] if on_gpu else f"{where['processor']}, {where['threads']} thread(s)"
    backend = args.backend if args.mode == "default" else f"{args.backend}, {args.mode}"
    return (
        f"{args.model}: batch {batch}, doubled for guidance 1.5; DDIM {args.steps} steps; {args.dtype} on {device}, "
        f"torch {where['torch']}, backend {backend}"
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


def head(args: argparse.Namespace, batch: int) -> dict[str, Any]:
    """What is needed to repeat the rows."""
    names = ("model", "steps", "seed", "backend", "mode", "regional", "dtype", "rounds")
    settings = {**{name: getattr(args, name) for name in names}, "batch": batch}
    return {**provenance(), "packages": versions(), "settings": settings}


def joined(earlier: Sequence[Path], lines: Sequence[Line], now: dict[str, Any]) -> tuple[dict[str, Any], list[Line]]:
    """The file's content: the rows of earlier files, then those measured now that they do not have.

    Raises:
        SystemExit: a file is of other settings.
    """
    parts: list[dict[str, Any]] = []
    found: dict[str, tuple[int, Line]] = {}
    for path in earlier:
        content = json.loads(path.read_text())
        for part in content["parts"]:
            differ = {k for k, v in part["settings"].items() if k != "rounds" and v != now["settings"][k]}
            if differ:
                raise SystemExit(f"{path}: measured with other settings ({', '.join(sorted(differ))})")
        for row in content["rows"]:
            line = Line.of_dict({k: v for k, v in row.items() if k != "part"})
            found.setdefault(line.key, (len(parts) + row["part"], line))
        parts += content["parts"]
    for line in lines:
        found.setdefault(line.key, (len(parts), line))
    rows = [{**line.as_dict(), "part": part} for part, line in found.values()]
    shown = [replace(line, process=part + 1 if parts else None) for part, line in found.values()]
    return {"parts": [*parts, now], "rows": rows}, shown


def write(args: argparse.Namespace, batch: int, content: dict[str, Any], lines: Sequence[Line], folder: Path) -> None:
    """JSON, table and plot of one batch size."""
    stem = f"peers-{args.model}-{batch}x{args.steps}"
    (folder / f"{stem}.json").write_text(json.dumps(content, indent=1) + "\n")
    (folder / f"{stem}.md").write_text(f"{markdown(lines)}\n\n{caption(args, batch)}\n{_processes(lines)}")
    plot(lines, caption(args, batch), folder / f"{stem}.png")


def _processes(lines: Sequence[Line]) -> str:
    """What is to be said of a table whose rows were not all measured in one process."""
    if all(line.process is None for line in lines):
        return ""
    return "Seconds compare within a process alone; speedups are over that process's own compiled uncached model.\n"


def parse(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", choices=list(SUBJECTS), default="reference")
    parser.add_argument("--batch", type=int, nargs="+", default=[4], help="images; the model sees twice as many")
    parser.add_argument("--steps", type=int, default=50)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--rounds", type=int, default=5, help="how often every method is run")
    parser.add_argument("--seconds", type=float, default=600.0, help="no further round begins after so many")
    parser.add_argument("--deadline", type=float, default=float("inf"), metavar="SECONDS",
                        help="peers that would be begun later are left out")  # fmt: skip
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--device", default="cpu", help="where the model runs, such as cuda")
    parser.add_argument("--dtype", choices=["float32", "bfloat16", "float16"], default="float32")
    parser.add_argument("--backend", default="inductor", help="of torch.compile and of tcc; eager for a quick look")
    parser.add_argument("--mode", choices=["default", "reduce-overhead"], default="default",
                        help="of torch.compile (whole model) and of tcc: reduce-overhead for CUDA graphs")  # fmt: skip
    parser.add_argument("--regional", action="store_true", help="through tcc, compile blocks once")
    parser.add_argument("--only", default="", help="words, by commas: only methods with one of them in their name")
    parser.add_argument("--fold-timesteps", action="store_true", help="also tcc's plans where timesteps are known")
    parser.add_argument("--fd-images", type=int, default=0, help="also draw so many images for FD (trained models)")
    parser.add_argument("--results", type=Path, help="a folder for JSON, table and plot")
    parser.add_argument("--with", dest="earlier", type=Path, nargs="+", default=[], metavar="JSON",
                        help="rows measured before with the same settings: they stand in the same table")  # fmt: skip
    args = parser.parse_args(arguments)
    if args.seconds < 0:
        parser.error(f"--seconds {args.seconds:g}: give 0 or more")
    if len(args.batch) > 1 and args.earlier:
        parser.error("--with is for one batch size")
    return args


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure, print, write."""
    args, console = parse(arguments), Console(width=200, highlight=False)
    try:
        device_named(args.device)
    except CallError as error:
        print(f"peers: {error}", file=sys.stderr)
        return 2
    torch.set_num_threads(args.threads)
    subject = SUBJECTS[args.model]()
    subject.model.to(device=args.device, dtype=getattr(torch, args.dtype))
    with empty_compiler_cache():
        for batch in args.batch:
            report(args, batch, measure(args, subject, batch, console), console)
    return 0


def report(args: argparse.Namespace, batch: int, measured: Sequence[Line], console: Console) -> None:
    """The table and the files of one batch size."""
    content, lines = joined(args.earlier, measured, head(args, batch))
    console.print(table(lines, caption(args, batch)))
    console.print(escape(failures(lines)), _processes(lines))
    if args.results is not None:
        args.results.mkdir(parents=True, exist_ok=True)
        write(args, batch, content, lines, args.results)
        console.print(f"wrote peers-{args.model}-{batch}x{args.steps}.* to {args.results}")


if __name__ == "__main__":
    sys.exit(main())
