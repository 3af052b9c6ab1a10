"""What gathers and scatters cost, and what a contiguous order of the tokens would save of that.

A run of pruned blocks begins with a gather, whose rows are normalised and modulated, and ends with a scatter of rows,
after which the whole stream is normalised. Three ways to do each, on the stream of DiT-S/2 (`[2, 256, 384]`, float32):

- `apart`: the gather or scatter is a call of its own, as in code that is not compiled as one graph;
- `fused`: what tcc gives to Inductor, which makes one loop of it and its neighbours;
- `slices`: what would be left if kept tokens were a prefix of the stream (a permutation before the first block), so
  that gathers were slices.

    python benchmarks/token_order.py --threads 1 --json benchmarks/results/token_order.json

Medians of interleaved rounds in milliseconds, beside a compiled P-step of DiT-S/2 that recomputes as many tokens in
every block (attention `kept`, one merged run: one gather and one scatter). `share` is what both ends, with
their norms, are of that step; a contiguous order would save the difference of `fused` and `slices`.
"""

from __future__ import annotations

import argparse
import functools
import itertools
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from ablation import setting_of
from peers_models import dit
from provenance import provenance
from rich.console import Console
from rich.table import Table
from torch import Tensor
from torch.nn.functional import layer_norm

import tcc
from tcc.lowering import lower
from tcc.program import build_program
from tcc.runtime import Session
from tcc.timing import time_calls

SHAPE = (2, 256, 384)
WARMUP = 2
WAYS = ("apart", "fused", "slices")


def normalised(x: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
    """The norm of a DiT block; `x` is `[B, S, D]`, the others `[B, 1, D]`."""
    return layer_norm(x, x.shape[-1:]) * (1 + scale) + shift


def gather(x: Tensor, kept: Tensor) -> Tensor:
    """As `LowerTokens` writes it."""
    return x.index_select(1, kept)


def scatter(base: Tensor, rows: Tensor, place: Tensor) -> Tensor:
    """As `LowerTokens` writes it."""
    return torch.where((place >= 0).view(1, -1, 1), rows.index_select(1, place.clamp(0)), base)


def ends_of_a_run(keep: int) -> dict[str, Callable[[], object]]:
    """Both ends of a run of blocks that recompute `keep` tokens, in three ways."""
    generator = torch.Generator().manual_seed(0)
    draw = functools.partial(torch.randn, generator=generator)
    x, branch, one = draw(SHAPE), draw(SHAPE[0], keep, SHAPE[2]), (SHAPE[0], 1, SHAPE[2])
    shift, scale, gate = draw(one), draw(one), draw(one)
    kept = torch.randperm(SHAPE[1], generator=generator)[:keep].sort().values
    place = torch.full((SHAPE[1],), -1).index_copy(0, kept, torch.arange(keep))
    rows = gather(x, kept)
    compiled = functools.partial(torch.compile, fullgraph=True, dynamic=False)
    norm, alone = compiled(normalised), compiled(gather)
    added, spread = compiled(lambda rows: rows + gate * branch), compiled(scatter)
    fused = compiled(lambda x: normalised(gather(x, kept), shift, scale))
    sliced = compiled(lambda x: normalised(x[:, :keep], shift, scale))
    ends = compiled(lambda x, rows: normalised(scatter(x, rows + gate * branch, place), shift, scale))
    joined = compiled(lambda x, rows: normalised(torch.cat([rows + gate * branch, x[:, keep:]], 1), shift, scale))
    return {
        "gather, apart": lambda: norm(alone(x, kept), shift, scale),
        "gather, fused": lambda: fused(x),
        "gather, slices": lambda: sliced(x),
        "scatter, apart": lambda: norm(spread(x, added(rows), place), shift, scale),
        "scatter, fused": lambda: ends(x, rows),
        "scatter, slices": lambda: joined(x, rows),
    }


def p_step(keep: int, count: int) -> Callable[[], object]:
    """The P-steps of a compiled DiT-S/2 that recompute so many tokens, `count` of them in turn."""
    setting = setting_of(dit("DiT-S/2"), count + 1)
    policy = functools.partial(tcc.plans.tprr, k1=count, k2=count, attention="kept", level="block")
    plan = policy(setting.info, num_steps=count + 1, keep=keep / SHAPE[1])
    session = Session(lower(build_program(setting.info.captured, setting.info.analysis, plan), "inductor"))
    steps = itertools.count()

    def call() -> None:
        session(*setting.call(next(steps)))

    call()
    return call


def measure(keep: int, rounds: int, inner: int) -> dict[str, Any]:
    """Milliseconds of everything, at `keep` tokens; what is short is called `inner` times per sample."""
    short, step = ends_of_a_run(keep), p_step(keep, rounds + WARMUP)

    def repeated(call: Callable[[], object]) -> None:
        for _ in range(inner):
            call()

    timed = {name: functools.partial(repeated, call) for name, call in short.items()} | {"P-step": step}
    with torch.no_grad():
        found = time_calls(timed, rounds=rounds, warmup=WARMUP)
    ms = {name: timing.median * 1e3 / (inner if name in short else 1) for name, timing in found.items()}
    total = {way: ms[f"gather, {way}"] + ms[f"scatter, {way}"] for way in WAYS}
    return {"tokens": keep, "ms": ms, "share": {way: value / ms["P-step"] for way, value in total.items()}}


def main() -> None:
    """Measure, print, write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, nargs="+", default=[64, 128], help="of 256, how many are recomputed")
    parser.add_argument("--rounds", type=int, default=21, help="samples per call")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--json", type=Path, help="write the rows and the machine here")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    rows, table = [measure(keep, args.rounds, 50) for keep in args.tokens], Table()
    for name in ("tokens", "what", *WAYS):
        table.add_column(name, justify="left" if name == "what" else "right")
    for row in rows:
        for what in ("gather", "scatter"):
            table.add_row(
                str(row["tokens"]), f"{what} and norm, ms", *(f"{row['ms'][f'{what}, {way}']:.3f}" for way in WAYS)
            )
        table.add_row("", f"of a P-step of {row['ms']['P-step']:.1f} ms", *(f"{row['share'][way]:.2%}" for way in WAYS))
    Console(width=110).print(table)
    if args.json:
        args.json.write_text(json.dumps({**provenance(), "rows": rows}, indent=1) + "\n")


if __name__ == "__main__":
    main()
