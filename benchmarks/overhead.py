"""What a step costs beside its graph: a compiled model whose variants return at once.

Everything else is as in earnest: a plan whose steps differ, so that each call is checked and matched to its step, the
slots, and the model's output structure. Minima and medians of many runs, on one thread.

    python benchmarks/overhead.py --json benchmarks/results/overhead.json

Rows: `model` is a call of what `tcc.compile` returns, `context` the same under `cache_context`, as pipelines call it,
`session` a call of `new_session()`, `run_step` one with its step named.
"""

from __future__ import annotations

import argparse
import functools
import json
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from provenance import provenance
from rich.console import Console
from rich.table import Table
from torch import Tensor, fx

import tcc
from tcc.models import DiT

NUM_STEPS = 20


def empty(gm: fx.GraphModule, inputs: list[Tensor]) -> Callable[..., Any]:
    """A backend whose code is a constant: the outputs for these inputs."""
    outputs = gm(*inputs)
    return lambda *_: outputs


def build() -> tuple[tcc.CompiledModel, list[tuple[Tensor, ...]]]:
    """The compiled model, and the calls of one run."""
    torch.manual_seed(0)
    model = DiT(input_size=4, patch_size=2, hidden_size=8, depth=2, num_heads=2, num_classes=4).eval()
    label = torch.tensor([1])
    calls = [(torch.randn(1, 4, 4, 4), torch.tensor([900 - 40 * step]), label) for step in range(NUM_STEPS)]
    policy = functools.partial(tcc.plans.fora, num_steps=NUM_STEPS, interval=2)
    return tcc.compile(model, policy, example_inputs=(calls[0], {}), backend=empty), calls


def microseconds(step: Callable[[int], Any], rounds: int) -> list[float]:
    """The time of every step of so many runs."""
    taken = []
    for _ in range(rounds):
        for number in range(NUM_STEPS):
            start = time.perf_counter_ns()
            step(number)
            taken.append((time.perf_counter_ns() - start) / 1e3)
    return taken


def measure(rounds: int) -> list[dict[str, Any]]:
    """One row per way to call."""
    compiled, calls = build()
    session, named = compiled.new_session(), compiled.new_session()

    def in_context(step: int) -> Any:
        with compiled.cache_context("cond"):
            return compiled(*calls[step])

    ways: dict[str, Callable[[int], Any]] = {
        "model": lambda step: compiled(*calls[step]),
        "context": in_context,
        "session": lambda step: session(*calls[step]),
        "run_step": lambda step: named.run_step(step, *calls[step]),
    }
    rows = []
    for name, step in ways.items():
        microseconds(step, 5)
        taken = microseconds(step, rounds)
        rows.append({"call": name, "min_us": min(taken), "median_us": statistics.median(taken)})
    return rows


def main() -> None:
    """Measure, print the table, and write it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=200, help="runs of 20 steps")
    parser.add_argument("--json", type=Path, help="write the numbers here")
    args = parser.parse_args()
    torch.set_num_threads(1)
    rows = measure(args.rounds)
    table = Table("call", "min us", "median us", title=f"A step beside its graph, {args.rounds * NUM_STEPS} calls each")
    for row in rows:
        table.add_row(row["call"], f"{row['min_us']:.1f}", f"{row['median_us']:.1f}")
    Console().print(table)
    if args.json:
        args.json.write_text(json.dumps({**provenance(), "rows": rows}, indent=1) + "\n")


if __name__ == "__main__":
    main()
