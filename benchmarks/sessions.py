"""ONNX Runtime's sessions of one bundle on a CPU: their memory and their time, with packed weights and without.

    python benchmarks/sessions.py --threads 1 --results benchmarks/results

The shipped reference model under a plan with full steps and steps that prune half of the tokens: two graphs on one copy
of the weights. `tcc.load` is called with `prepack=True` (the default) and `prepack=False`. Memory is what a process of
its own has written to for the sessions and their slots, when it loads the bundle a second time and holds both. Steps of
both are interleaved; with one thread they are CPU time.
"""

from __future__ import annotations

import argparse
import functools
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from importlib import metadata
from pathlib import Path

import torch
from provenance import provenance, results_folder

import tcc
from tcc import timing
from tcc.export import Runner, bundle
from tcc.models import DiT, reference_model

LOAD = """
import sys
from pathlib import Path
import tcc

def written():
    lines = Path("/proc/self/smaps_rollup").read_text().splitlines()
    return 1024 * sum(int(line.split()[1]) for line in lines if line.startswith("Private_Dirty:"))

first = tcc.load(sys.argv[1], device="cpu", prepack=len(sys.argv) > 2)
before = written()
second = tcc.load(sys.argv[1], device="cpu", prepack=len(sys.argv) > 2)
print(written() - before)
"""


@dataclass(frozen=True)
class Row:
    """One way to load a bundle.

    Attributes:
        rows: the batch.
        prepack: whether weights are packed for each session.
        weights: bytes of the weights.
        memory: bytes that the sessions and slots took beside the weights, which are mapped from their file.
        milliseconds: of a full step and of a step that prunes, medians.
    """

    rows: int
    prepack: bool
    weights: int
    memory: int
    milliseconds: tuple[float, ...]


def measure(model: DiT, rows: int, steps: int, rounds: int, folder: Path) -> list[Row]:
    """Export for a batch, load both ways, and run both in turns."""
    labels = torch.arange(rows) % 10
    inputs = (torch.randn(rows, 1, 32, 32), torch.full((rows,), 500), labels)
    policy = functools.partial(
        tcc.plans.tprr, num_steps=steps, k1=1, k2=1, keep=0.5, attention="cached", level="out", rotate=True
    )
    written = bundle(model, policy, (inputs, {}), folder)
    kinds = [step.graph for step in written.manifest.steps]
    runs = {}
    for prepack in (True, False):
        runner = tcc.load(folder, device="cpu", prepack=prepack)
        runs[str(prepack)] = timing.Run(kinds, functools.partial(steps_of, runner, inputs))
    for run in runs.values():
        for _ in run.start():
            pass
    clock = time.process_time if torch.get_num_threads() == 1 else time.perf_counter
    times = timing.time_runs(runs, rounds=rounds, clock=clock)
    weights = written.manifest.files["weights.safetensors"].bytes
    medians = {key: tuple(1e3 * one.median for one in found.by_kind.values()) for key, found in times.items()}
    return [Row(rows, prepack, weights, memory(folder, prepack), medians[str(prepack)]) for prepack in (True, False)]


def steps_of(runner: Runner, inputs: tuple[torch.Tensor, ...]) -> Iterator[torch.Tensor]:
    """One run, step by step."""
    runner.reset()
    for _ in range(runner.num_steps):
        yield runner(*inputs)


def memory(folder: Path, prepack: bool) -> int:
    """What a second load of the bundle takes, in a process of its own."""
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", LOAD, str(folder), *["prepack"] * prepack],
        capture_output=True, text=True, check=True,
    )  # fmt: skip
    return int(done.stdout)


def table(rows: list[Row]) -> str:
    """The results as Markdown."""
    head = "| rows | packed | memory, MiB (weights: MiB) | full step ms | step that prunes ms |"
    lines = [head, "|---:|---|---:|---:|---:|"]
    for row in rows:
        memory = f"{row.memory / 2**20:.0f} ({row.weights / 2**20:.0f})"
        times = " | ".join(f"{value:.1f}" for value in row.milliseconds)
        lines.append(f"| {row.rows} | {'yes' if row.prepack else 'no'} | {memory} | {times} |")
    return "\n".join(lines) + "\n"


def main(arguments: list[str] | None = None) -> int:
    """Measure, print, write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--rows", type=int, nargs="+", default=[2, 20])
    parser.add_argument("--steps", type=int, default=10)
    parser.add_argument("--rounds", type=int, default=5, help="runs of each that are timed")
    parser.add_argument("--results", type=results_folder, help="also write sessions.md and sessions.json here")
    args = parser.parse_args(arguments)
    torch.set_num_threads(args.threads)
    torch.manual_seed(0)
    model, found = reference_model(), []
    with tempfile.TemporaryDirectory() as folder:
        for rows in args.rows:
            found += measure(model, rows, args.steps, args.rounds, Path(folder, str(rows)))
    print(table(found))
    if args.results:
        versions = {"onnxruntime": metadata.version("onnxruntime")}
        content = {**provenance(), **versions, "rows": [asdict(row) for row in found]}
        (args.results / "sessions.md").write_text(table(found))
        (args.results / "sessions.json").write_text(json.dumps(content, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
