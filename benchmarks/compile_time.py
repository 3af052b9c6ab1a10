"""How long it takes to compile a plan: cold and from Inductor's cache, block by block or regionally.

A deep DiT (28 blocks as DiT-XL, narrow so that the code generator is what takes the time), random weights, a plan with
an I- and a P-step of pruned tokens. Every measurement is a process of its own with a cache folder of its own, after
Inductor has compiled something small, which builds its headers; `warm` is a second process with the same folder.
Seconds are from the captured model to compiled variants; `plain` is `torch.compile` of the uncached model and its first
call.

    python benchmarks/compile_time.py --json benchmarks/results/compile_time.json

What more variants cost, measured once, by processor time (one thread; a DiT of 8 blocks of width 80, regional; every
variant reuses other branches, as routers choose them): one takes 17.8 seconds, 13.6 of them in the C++ compiler; two
29.3; five 49.6, 2.8 times one. Ten were not measured so. Nested regions are compiled with the variant that they are in:
Inductor's cache of graphs missed every variant, and all but the C++ compiler took 2.3 to 3.1 seconds for each again.
Loops that are the same to the letter are shared by all variants, through Inductor's cache of sources: of 15 runs of the
C++ compiler for the first variant, 10, 5, 7 and 1 were left for the others.
"""

from __future__ import annotations

import argparse
import functools
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from provenance import provenance
from rich.console import Console
from rich.progress import track
from rich.table import Table

import tcc
from tcc.models import DiT

WHAT = {
    "plain": "uncached model, torch.compile",
    "plan": "I- and P-step",
    "regional plain": "uncached model, regional",
    "regional plan": "I- and P-step, regional",
}


def build(depth: int, width: int) -> tuple[DiT, tuple[torch.Tensor, ...]]:
    """The model with random weights, and one call's inputs: 64 tokens, batch 2."""
    torch.manual_seed(0)
    model = DiT(input_size=16, patch_size=2, hidden_size=width, depth=depth, num_heads=4, num_classes=10).eval()
    for parameter in model.parameters():
        parameter.data.normal_(0, 0.02)
    return model, (torch.randn(2, 4, 16, 16), torch.tensor([500, 500]), torch.tensor([1, 2]))


def compile_one(what: str, depth: int, width: int) -> float:
    """Seconds of one compilation in this process."""
    torch.compile(torch.nn.Sequential(torch.nn.Linear(8, 8), torch.nn.GELU()), fullgraph=True)(torch.randn(2, 8))
    model, inputs = build(depth, width)
    if what == "plain":
        start = time.perf_counter()
        with torch.no_grad():
            torch.compile(model, fullgraph=True)(*inputs)
        return time.perf_counter() - start
    policies = {
        "plan": functools.partial(tcc.plans.tprr, num_steps=2, k1=1, k2=1, keep=0.5, attention="cached", level="block"),
        "plain": functools.partial(tcc.plans.full, num_steps=1),
    }
    compiled = tcc.compile(model, policies[what.split()[-1]], regional=what.startswith("regional"))
    compiled.prepare(*inputs)
    return sum(compiled.compile_seconds)


def in_process(what: str, cache: Path, args: argparse.Namespace) -> float:
    """The same in a process of its own, with that cache folder."""
    command = [sys.executable, __file__, "--only", what, "--depth", str(args.depth), "--width", str(args.width)]
    environment = {**os.environ, "TORCHINDUCTOR_CACHE_DIR": str(cache), "OMP_NUM_THREADS": str(args.threads)}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(f"{what}: {done.stderr[-2000:]}")
    return float(done.stdout.splitlines()[-1])


def measure(args: argparse.Namespace) -> list[dict[str, Any]]:
    """One row per kind, cold and warm."""
    rows: list[dict[str, Any]] = []
    for what in track(WHAT, "compiling"):
        with tempfile.TemporaryDirectory() as folder:
            cold, warm = (in_process(what, Path(folder), args) for _ in range(2))
        rows.append({"what": what, "cold_s": cold, "warm_s": warm})
    for row in rows:
        row["cold_over_plain"] = row["cold_s"] / rows[0]["cold_s"]
    return rows


def main() -> None:
    """Measure, print, write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--depth", type=int, default=28, help="blocks")
    parser.add_argument("--width", type=int, default=128)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--only", choices=list(WHAT), help=argparse.SUPPRESS)
    parser.add_argument("--json", type=Path, help="write the rows and the machine here")
    args = parser.parse_args()
    if args.only:
        print(compile_one(args.only, args.depth, args.width))
        return
    rows = measure(args)
    table = Table("what", "cold s", "warm s", "cold / plain", title=f"DiT, {args.depth} blocks of width {args.width}")
    for row in rows:
        table.add_row(
            WHAT[row["what"]], f"{row['cold_s']:.1f}", f"{row['warm_s']:.1f}", f"{row['cold_over_plain']:.2f}"
        )
    Console().print(table)
    if args.json:
        args.json.write_text(json.dumps({**provenance(), "depth": args.depth, "rows": rows}, indent=1) + "\n")


if __name__ == "__main__":
    main()
