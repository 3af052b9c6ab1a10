"""A sampling run on a GPU, step by step, with a CUDA graph per kind of step, and as one CUDA graph of all steps.

    python benchmarks/whole_run.py --model DiT-XL/2 --batch 2 --dtype bfloat16 --device cuda --json whole_run.json

The same plan, weights and noise, DDIM with guidance; medians of whole runs in turns. Random weights: this is about
speed alone. On a CPU there are no graphs, and only the first column is measured.
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
import json
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from provenance import provenance
from rich.console import Console
from rich.table import Table
from step_speed import build_model
from torch import Tensor

import tcc
from tcc.runtime import Session
from tcc.runtime.cuda_graphs import Graphs
from tcc.samplers import DDIM, sample
from tcc.timing import time_calls

PLANS: dict[str, Callable[..., tcc.CachePlan]] = {
    "uncached": tcc.plans.full,
    "fora interval=2": functools.partial(tcc.plans.fora, interval=2),
    "tokens, half of them": functools.partial(
        tcc.plans.tprr, k1=1, k2=1, keep=0.5, attention="cached", level="out", rotate=True
    ),
}


def measure(args: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """A row for every plan."""
    device, dtype = torch.device(args.device), getattr(torch, args.dtype)
    model = build_model(args.model)[0].to(device, dtype)
    images = args.batch // 2
    labels = torch.arange(images, device=device)
    start = torch.randn(images, 4, 32, 32, generator=torch.Generator().manual_seed(0)).to(device, dtype)
    steps = torch.full((2 * images,), 500, device=device)
    inputs = (torch.cat([start, start]), steps, torch.cat([labels, torch.full_like(labels, 1000)]))

    def loop(call: Any, start: Tensor, labels: Tensor) -> Tensor:
        return sample(call, start, labels, num_steps=args.steps, cfg_scale=1.5, null_class=1000)

    given: dict[str, Any] = {"example_inputs": (inputs, {}), "backend": args.backend, "regional": args.regional}
    if args.fold_timesteps:
        given["timesteps"] = [evaluation.timestep for evaluation in DDIM().evaluations(args.steps)]
    first = tcc.compile(model, functools.partial(PLANS["uncached"], num_steps=args.steps), **given)
    for name, policy in PLANS.items():
        compiled = first.with_plan(functools.partial(policy, num_steps=args.steps)).prepare(*inputs)
        executable = compiled.new_session().executable
        row: dict[str, Any] = {"plan": name, "model": args.model, "batch": args.batch, "bound": compiled.plan.bound}
        ways = {"by steps": functools.partial(loop, Session(executable), start, labels)}
        if device.type == "cuda":
            replayed = Session(dataclasses.replace(executable, recorder=functools.partial(Graphs, device)))
            whole = compiled.whole_run(loop)
            whole(start, labels)  # both ways are compared, and the faster one is kept
            row |= {f"{way}, at first": seconds for way, seconds in whole.seconds.items()}
            ways |= {"graph per variant": functools.partial(loop, replayed, start, labels)}
            ways |= {"whole_run": functools.partial(whole, start, labels)}
        times = time_calls(ways, rounds=args.rounds, warmup=2)
        yield row | {way: timing.median for way, timing in times.items()}


def parse(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="DiT-S/2", help="a published size")
    parser.add_argument("--batch", type=int, default=2, help="rows of a call: images, times two")
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--dtype", choices=["float32", "bfloat16", "float16"], default="float32")
    parser.add_argument("--backend", default="inductor")
    parser.add_argument("--regional", action="store_true", help="compile a block once for all of its copies")
    parser.add_argument("--fold-timesteps", action="store_true", help="compute once what depends on timesteps alone")
    parser.add_argument("--json", type=Path, help="write the rows and the machine here")
    return parser.parse_args(arguments)


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure, print, write."""
    args = parse(arguments)
    torch.set_num_threads(args.threads)
    rows = []
    for row in measure(args):
        rows.append(row)
        if args.json is not None:  # after every row: a run that is stopped leaves what it has
            args.json.write_text(json.dumps({**provenance(), "rows": rows}, indent=1) + "\n")
    table = Table(*rows[0], title=f"seconds of a run of {args.steps} steps", box=None)
    for row in rows:
        table.add_row(*(f"{cell:.4f}" if isinstance(cell, float) else str(cell) for cell in row.values()))
    Console(width=160).print(table)
    return 0


if __name__ == "__main__":
    sys.exit(main())
