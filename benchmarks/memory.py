"""Peak memory of plans beside the uncached model and the slots that they declare, and what a step leaves behind.

A DiT with random weights; the allocator's events of every step, so a busy machine changes nothing. All weights and the
slots are there before; `peak` is what a step takes beyond them.

    python benchmarks/memory.py --json benchmarks/results/memory.json

Columns: the largest peak of a step, that of the uncached model, the declared slots, `ratio`, which is (peak + slots) /
(uncached peak + slots) and must be 1.05 at most, and `left`: bytes that a run leaves behind, its outputs aside.
"""

from __future__ import annotations

import argparse
import functools
import json
from pathlib import Path
from typing import Any

import torch
from provenance import provenance
from rich.console import Console
from rich.progress import track
from rich.table import Table

import tcc
from tcc.models import DiT
from tcc.runtime import Session
from tcc.timing import allocations

TOKENS = functools.partial(tcc.plans.tprr, num_steps=4, k1=1, k2=1, keep=0.5, level="block")
PLANS: dict[str, Any] = {
    "FORA": functools.partial(tcc.plans.fora, num_steps=4, interval=2),
    "TaylorSeer, order 2": functools.partial(tcc.plans.taylorseer, num_steps=7, interval=2, order=2),
    "forecast, one sum": functools.partial(tcc.plans.forecast, num_steps=4, i_steps=[0, 1]),
    "tokens, keys kept": functools.partial(TOKENS, attention="kept"),
    "tokens, keys current": functools.partial(TOKENS, attention="current"),
    "tokens, keys stored": functools.partial(TOKENS, attention="cached", rotate=True),
    "tokens, before the gate": functools.partial(TOKENS, attention="cached", level="out"),
}


def build_model(depth: int) -> tuple[DiT, tuple[torch.Tensor, ...]]:
    """A DiT of width 64 with 64 tokens, and one call's inputs, batch 2."""
    torch.manual_seed(0)
    model = DiT(input_size=16, patch_size=2, hidden_size=64, depth=depth, num_heads=4, num_classes=10).eval()
    for parameter in model.parameters():
        parameter.data.normal_(0, 0.1)
    return model, (torch.randn(2, 4, 16, 16), torch.tensor([500, 500]), torch.tensor([1, 2]))


def measure(compiled: tcc.CompiledModel, inputs: tuple[torch.Tensor, ...]) -> tuple[int, int]:
    """The largest peak of a step, and what a run leaves behind beside its outputs; after a run that warms up."""
    session = Session(compiled.new_session().executable)
    outputs: list[torch.Tensor] = []

    def run() -> None:
        outputs.extend(session(*inputs) for _ in range(session.num_steps))

    run()
    outputs.clear()
    kept = allocations(run).kept - sum(output.nbytes for output in outputs)
    return max(allocations(lambda: session(*inputs)).peak for _ in range(session.num_steps)), kept


def rows(backend: str, depth: int) -> list[dict[str, Any]]:
    """One row per plan."""
    model, inputs = build_model(depth)
    plain = tcc.compile(
        model, functools.partial(tcc.plans.full, num_steps=1), example_inputs=(inputs, {}), backend=backend
    )
    uncached, _ = measure(plain, inputs)
    found = []
    for name, policy in track(PLANS.items(), description=backend):
        compiled = plain.with_plan(policy).prepare(*inputs)
        assert compiled.info is not None
        slots = compiled.plan.memory(compiled.info).total
        peak, left = measure(compiled, inputs)
        ratio = (peak + slots) / (uncached + slots)
        found.append({"backend": backend, "plan": name, "peak": peak, "uncached": uncached, "slots": slots})
        found[-1] |= {"ratio": ratio, "left": left}
    return found


def main() -> None:
    """Measure, print the table, and write it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--backends", nargs="+", default=["eager", "inductor"])
    parser.add_argument("--depth", type=int, default=8, help="blocks")
    parser.add_argument("--json", type=Path, help="write the numbers here")
    args = parser.parse_args()
    torch.set_num_threads(1)
    measured = [row for backend in args.backends for row in rows(backend, args.depth)]
    table = Table("backend", "plan", "peak KiB", "uncached KiB", "slots KiB", "ratio", "left", title="Peak memory")
    for row in measured:
        sizes = (f"{row[key] / 1024:.1f}" for key in ("peak", "uncached", "slots"))
        table.add_row(row["backend"], row["plan"], *sizes, f"{row['ratio']:.3f}", str(row["left"]))
    Console().print(table)
    if args.json:
        args.json.write_text(json.dumps({**provenance(), "depth": args.depth, "rows": measured}, indent=1) + "\n")


if __name__ == "__main__":
    main()
