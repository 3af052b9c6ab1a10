"""Exported bundles beside the compiled model: the same images? how fast? how large?

    python benchmarks/export.py --threads 1 --results benchmarks/results

The shipped reference model draws 10 images by DDIM with guidance, in 20 and in 50 steps, under a forecast and under a
plan that prunes tokens: compiled by Inductor, from an ONNX bundle in ONNX Runtime, and from an AOTInductor bundle. All
run in this process, warm, their steps interleaved; a time is the median of the calls of one kind of step. With one
thread it is CPU time, which other work on the machine does not lengthen.

`PSNR` is that of the bundle's images against the compiled model's in the same noise, the lowest of the ten. `allowed`
is 1.1 times the weights, plus the plan, plus 2 MB per graph. Seconds are those of exporting one graph, the slowest.
"""

from __future__ import annotations

import argparse
import functools
import json
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

import torch
from provenance import provenance, results_folder
from rich.console import Console

import tcc
from tcc import timing
from tcc.export import Written, bundle
from tcc.metrics import psnr
from tcc.models import DiT, reference_model
from tcc.plan import CachePlan
from tcc.samplers import DDIM, Evaluation, denoise, guide

IMAGES, GUIDANCE = 10, 1.5
POLICIES: dict[str, Callable[..., Callable[..., CachePlan]]] = {
    "forecast": lambda steps: functools.partial(
        tcc.plans.forecast, num_steps=steps, i_steps=(steps + 2) // 3, order=2, level="block"
    ),
    "tokens, keep 1/2": lambda steps: functools.partial(
        tcc.plans.tprr, num_steps=steps, k1=1, k2=1, keep=0.5, attention="cached", level="out", rotate=True
    ),
}


@dataclass(frozen=True)
class Row:
    """One bundle under one plan.

    Attributes:
        plan: the policy's name.
        steps: the steps of a run.
        target: `onnx` or `aoti`.
        psnr: dB, the lowest of all images, against the compiled model's.
        milliseconds: of a step, by kind: how many steps are of the kind, the bundle's median, the compiled model's.
        bytes: of all files.
        allowed: what the bundle may take at most.
        seconds: of exporting, per graph.
    """

    plan: str
    steps: int
    target: str
    psnr: float
    milliseconds: tuple[tuple[int, float, float], ...]
    bytes: int
    allowed: int
    seconds: tuple[float, ...]


def drawing(model: Any, null_class: int, steps: int) -> Callable[[], Iterator[torch.Tensor]]:
    """Start a run that yields after every step; the last yield is the images."""
    labels = torch.arange(IMAGES)
    y = torch.cat([labels, torch.full_like(labels, null_class)])
    noise = torch.randn(IMAGES, 1, 32, 32, generator=torch.Generator().manual_seed(0))

    def evaluate(x: torch.Tensor, evaluation: Evaluation) -> torch.Tensor:
        t = torch.full((len(y),), evaluation.timestep, dtype=torch.int64)
        return guide(model(torch.cat([x, x]), t, y), GUIDANCE, x.shape[1])

    def start() -> Iterator[torch.Tensor]:
        model.reset()
        return denoise(DDIM(), evaluate, noise, steps)

    return start


def measure(model: DiT, name: str, steps: int, rounds: int, folder: Path, say: Callable[[str], None]) -> list[Row]:
    """Compile and export under one plan, run all, and compare."""
    rows = 2 * IMAGES
    inputs = (torch.randn(rows, 1, 32, 32), torch.zeros(rows, dtype=torch.int64), torch.zeros(rows, dtype=torch.int64))
    compiled = tcc.compile(model, POLICIES[name](steps), example_inputs=(inputs, {}), progress=say)
    made: dict[str, Written] = {}
    for target in ("onnx", "aoti"):
        made[target] = bundle(model, compiled.plan, (inputs, {}), folder / target, target=target, progress=say)
    kinds = [step.graph for step in made["onnx"].manifest.steps]
    runners = {"inductor": compiled} | {target: tcc.load(written.folder) for target, written in made.items()}
    null_class = model.config.null_class
    runs = {key: timing.Run(kinds, drawing(runner, null_class, steps)) for key, runner in runners.items()}
    say("measuring")
    with torch.no_grad():
        for run in runs.values():
            for _ in run.start():
                pass
        times = timing.time_runs(runs, rounds=rounds, clock=clock())
    weights = sum(tensor.nbytes for tensor in (*model.parameters(), *model.buffers()))
    found = []
    for target, written in made.items():
        plan = written.manifest.files["plan.safetensors"].bytes
        found.append(
            Row(
                name,
                steps,
                target,
                float(psnr(times[target].result, times["inductor"].result).min()),
                tuple(
                    (kinds.count(kind), 1e3 * mine.median, 1e3 * times["inductor"].by_kind[kind].median)
                    for kind, mine in times[target].by_kind.items()
                ),
                sum(path.stat().st_size for path in written.folder.iterdir()),
                int(1.1 * weights) + plan + 2 * 10**6 * len(written.manifest.graphs),
                written.seconds,
            )
        )
    return found


def clock() -> Callable[[], float]:
    """CPU time of one thread, or the time of day."""
    return time.process_time if torch.get_num_threads() == 1 else time.perf_counter


def table(rows: list[Row]) -> str:
    """The results as Markdown; times as the bundle's and Inductor's, in ms, for every kind of step."""
    head = ("plan", "steps", "target", "PSNR dB", "ms per step: bundle / Inductor", "run, against Inductor")
    lines = [
        f"| {' | '.join((*head, 'MB', 'allowed', 's per graph'))} |",
        "|---|---:|---|---:|---|---:|---:|---:|---:|",
    ]
    for row in rows:
        kinds = ", ".join(f"{count}x {mine:.1f} / {theirs:.1f}" for count, mine, theirs in row.milliseconds)
        whole = sum(n * theirs for n, _, theirs in row.milliseconds) / sum(n * mine for n, mine, _ in row.milliseconds)
        cells = (row.plan, str(row.steps), row.target, f"{row.psnr:.1f}", kinds, f"{whole:.2f}x")
        sizes = (f"{row.bytes / 1e6:.1f}", f"{row.allowed / 1e6:.1f}", f"{max(row.seconds):.1f}")
        lines.append(f"| {' | '.join((*cells, *sizes))} |")
    return "\n".join(lines) + "\n"


def main() -> int:
    """Measure, print, write; returns 1 where a bundle misses 60 dB or is too large."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=3, help="runs of every kind that are timed")
    parser.add_argument("--steps", type=int, nargs="+", default=[20, 50])
    parser.add_argument("--results", type=results_folder, help="also write export.md and export.json here")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    torch.manual_seed(0)
    model, rows, console = reference_model(), [], Console(stderr=True)
    with tempfile.TemporaryDirectory() as folder, console.status("starting") as status:
        for number, (name, steps) in enumerate((name, steps) for name in POLICIES for steps in args.steps):
            say = functools.partial(_say, status, f"{name}, {steps} steps: ")
            rows += measure(model, name, steps, args.rounds, Path(folder, str(number)), say)
    Console(width=160).print(table(rows))
    if args.results:
        versions = {name: metadata.version(name) for name in ("onnxruntime", "onnx", "onnxscript")}
        content = {
            **provenance(),
            **versions,
            "clock": clock().__name__,
            "rows": [asdict(row) for row in rows],
        }
        (args.results / "export.md").write_text(table(rows))
        (args.results / "export.json").write_text(json.dumps(content, indent=1) + "\n")
    return 0 if all(row.psnr >= 60 and row.bytes <= row.allowed for row in rows) else 1


def _say(status: Any, begin: str, line: str) -> None:
    status.update(begin + line)


if __name__ == "__main__":
    sys.exit(main())
