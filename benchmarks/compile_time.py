"""How long it takes to compile a plan: cold and from Inductor's cache, block by block or regionally.

A deep DiT (28 blocks as DiT-XL, narrow so that the code generator is what takes the time), random weights, a plan with
an I- and a P-step of pruned tokens. Every measurement is a process of its own with a cache folder of its own, after
Inductor has compiled something small, which builds its headers; `warm` is a second process with the same folder.
Seconds are from the model to compiled variants: capture, plan, passes, compilation. `plain` is `torch.compile` of the
uncached model and its first call.

    python benchmarks/compile_time.py --json benchmarks/results/compile_time.json

Routers make a variant per P-step: an I-step and 1, 4, 9 or 29 P-steps, each of which reuses another half of the
branches, stand for them. Compiled regionally, branches are compiled once for all variants, which are left with calls of
them.
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
from collections.abc import Callable
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
    "5 variants": "I-step and 4 P-steps that reuse other branches",
    "regional 2 variants": "I-step and a P-step that reuses branches, regional",
    "regional 5 variants": "I-step and 4 P-steps that reuse other branches, regional",
    "regional 10 variants": "I-step and 9 P-steps that reuse other branches, regional",
    "regional 30 variants": "I-step and 29 P-steps that reuse other branches, regional",
}
COLUMNS = ("what", "cold s", "warm s", "cold / plain", "cold / one variant so compiled")


def build(depth: int, width: int) -> tuple[DiT, tuple[torch.Tensor, ...]]:
    """The model with random weights, and one call's inputs: 64 tokens, batch 2."""
    torch.manual_seed(0)
    model = DiT(input_size=16, patch_size=2, hidden_size=width, depth=depth, num_heads=4, num_classes=10).eval()
    for parameter in model.parameters():
        parameter.data.normal_(0, 0.02)
    return model, (torch.randn(2, 4, 16, 16), torch.tensor([500, 500]), torch.tensor([1, 2]))


def build_headers() -> None:
    """Inductor compiles something small: it loads, and builds its headers, which stay on disk beside its caches."""
    torch.compile(torch.nn.Sequential(torch.nn.Linear(8, 8), torch.nn.GELU()), fullgraph=True)(torch.randn(2, 8))


def compile_one(what: str, depth: int, width: int) -> float:
    """Seconds of one compilation in this process."""
    build_headers()
    model, inputs = build(depth, width)
    start = time.perf_counter()
    if what == "plain":
        with torch.no_grad():
            torch.compile(model, fullgraph=True)(*inputs)
    else:
        policy, regional = policy_of(what.removeprefix("regional ")), what.startswith("regional")
        tcc.compile(model, policy, regional=regional).prepare(*inputs)
    return time.perf_counter() - start


def policy_of(name: str) -> Callable[..., tcc.CachePlan]:
    """What is planned: nothing, tokens, or so many variants."""
    if name == "plan":
        return functools.partial(tcc.plans.tprr, num_steps=2, k1=1, k2=1, keep=0.5, attention="cached", level="block")
    if name == "plain":
        return functools.partial(tcc.plans.full, num_steps=1)
    variants = int(name.split()[0])
    return functools.partial(tcc.plans.random_units, num_steps=variants, interval=variants, share=0.5, sites="delta")


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
    cold = {row["what"]: row["cold_s"] for row in rows}
    for row in rows:
        one = cold["regional plain" if row["what"].startswith("regional") else "plain"]
        row |= {"cold_over_plain": row["cold_s"] / cold["plain"], "cold_over_one_variant": row["cold_s"] / one}
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
    table = Table(*COLUMNS, title=f"DiT, {args.depth} blocks of width {args.width}")
    for row in rows:
        over = (f"{row[name]:.2f}" for name in ("cold_over_plain", "cold_over_one_variant"))
        table.add_row(WHAT[row["what"]], f"{row['cold_s']:.1f}", f"{row['warm_s']:.1f}", *over)
    Console().print(table)
    if args.json:
        args.json.write_text(json.dumps({**provenance(), "depth": args.depth, "rows": rows}, indent=1) + "\n")


if __name__ == "__main__":
    main()
