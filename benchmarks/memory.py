"""Peak memory of plans beside the uncached model and the slots that they declare, and what a step leaves behind.

A DiT and a model of two streams (diffusers' Flux) with random weights, of 64 to 1024 tokens, one or 8 images in two
guidance branches; all plans on the small DiT, some on the others; and a run of 50 steps whose timesteps are known. The
allocator's events of every step, so a busy machine changes nothing. All weights and what the plan declares are there
before; `peak` is the most that a step takes beyond them, `uncached` the same of the uncached model through tcc, and
`without tcc` that of the model itself, under `torch.compile` where the backend is Inductor.

    python benchmarks/memory.py --json benchmarks/results/memory.json

`ratio` is (peak + kept) / (uncached + kept) and must be 1.05 at most, where `kept` is what the plan declares: its
slots, and what is computed once where timesteps are known; `left` are the bytes that a run leaves behind, its outputs
aside.
"""

from __future__ import annotations

import argparse
import functools
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from provenance import provenance
from rich.console import Console
from rich.progress import track
from rich.table import Table
from scaling import BUILDERS

import tcc
from tcc.runtime import Session
from tcc.timing import allocations

TOKENS = functools.partial(tcc.plans.tprr, num_steps=4, k1=1, k2=1, keep=0.5, tokens="uniform", level="block")
PLANS: dict[str, Any] = {
    "FORA": functools.partial(tcc.plans.fora, num_steps=4, interval=2),
    "TaylorSeer, order 2": functools.partial(tcc.plans.taylorseer, num_steps=7, interval=2, order=2),
    "forecast, one sum": functools.partial(tcc.plans.forecast, num_steps=4, i_steps=[0, 1]),
    "tokens, keys kept": functools.partial(TOKENS, attention="kept"),
    "tokens, keys current": functools.partial(TOKENS, attention="current"),
    "tokens, keys stored": functools.partial(TOKENS, attention="cached", rotate=True),
    "tokens, before the gate": functools.partial(TOKENS, attention="cached", level="out"),
}
KNOWN = "FORA, timesteps known"
PLANS[KNOWN] = functools.partial(tcc.plans.fora, num_steps=50, interval=2)
SOME = ("FORA", KNOWN, "tokens, keys kept", "tokens, keys stored")
#: Model, side of the grid of tokens, images, plans.
CASES: tuple[tuple[str, int, int, tuple[str, ...]], ...] = (
    ("dit", 8, 1, tuple(PLANS)), ("dit", 32, 1, SOME), ("dit", 16, 8, SOME),
    ("two streams", 8, 1, SOME), ("two streams", 32, 1, SOME), ("two streams", 16, 8, SOME),
)  # fmt: skip


def measure(compiled: tcc.CompiledModel, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[int, int]:
    """The largest peak of a step, and what a run leaves behind beside its outputs; after a run that warms up."""
    session = Session(compiled.new_session().executable)
    outputs: list[torch.Tensor] = []

    def run() -> None:
        outputs.extend(tensor_of(session(*args, **kwargs)) for _ in range(session.num_steps))

    run()
    outputs.clear()
    kept = allocations(run).kept - sum(output.nbytes for output in outputs)
    return max(allocations(lambda: session(*args, **kwargs)).peak for _ in range(session.num_steps)), kept


def tensor_of(output: Any) -> torch.Tensor:
    """A model's output: a tensor, or diffusers' class with one."""
    found: torch.Tensor = output if isinstance(output, torch.Tensor) else output.sample
    return found


def without_tcc(model: torch.nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], backend: str) -> int:
    """The peak of the model itself, under `torch.compile` where the backend is Inductor."""
    run = torch.compile(model) if backend == "inductor" else model
    with torch.no_grad():
        for _ in range(2):
            run(*args, **kwargs)
        return allocations(lambda: run(*args, **kwargs)).peak


def rows(backend: str, depth: int, width: int) -> Iterator[dict[str, Any]]:
    """One row per case and plan."""
    for name, side, images, plans in CASES:
        model, args, kwargs = one_level(*BUILDERS[name](depth, side, width, 2 * images))
        policy = functools.partial(tcc.plans.full, num_steps=1)
        plain = tcc.compile(model, policy, example_inputs=(args, kwargs), backend=backend)
        uncached, _ = measure(plain, args, kwargs)
        alone = without_tcc(model, args, kwargs, backend)
        for plan in track(plans, description=f"{backend}, {name}, {side**2} tokens"):
            if plan == KNOWN:
                levels = [level_of(args, kwargs).flatten()[0].item()] * PLANS[plan].keywords["num_steps"]
                given: dict[str, Any] = {"example_inputs": (args, kwargs), "backend": backend, "timesteps": levels}
                compiled = tcc.compile(model, PLANS[plan], **given)
            else:
                compiled = plain.with_plan(PLANS[plan]).prepare(*args, **kwargs)
            session = compiled.new_session()
            kept = session.slot_bytes + session.folded_bytes
            peak, left = measure(compiled, args, kwargs)
            ratio = (peak + kept) / (uncached + kept)
            row = {"backend": backend, "model": name, "tokens": side**2, "images": images, "plan": plan, "peak": peak}
            yield row | {"uncached": uncached, "without tcc": alone, "kept": kept, "ratio": ratio, "left": left}


def level_of(args: tuple[Any, ...], kwargs: dict[str, Any]) -> torch.Tensor:
    """The timesteps `[B]` among a call's inputs."""
    found: torch.Tensor = kwargs["timestep"] if "timestep" in kwargs else args[1]
    return found


def one_level(
    model: torch.nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[torch.nn.Module, tuple[Any, ...], dict[str, Any]]:
    """The call with the timestep of its first sample for all of them, as in a run."""
    level_of(args, kwargs).fill_(level_of(args, kwargs)[0])
    return model, args, kwargs


def main() -> None:
    """Measure, print the table, and write it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--backends", nargs="+", default=["eager", "inductor"])
    parser.add_argument("--depth", type=int, default=6, help="blocks")
    parser.add_argument("--width", type=int, default=128, help="channels")
    parser.add_argument("--json", type=Path, help="write the numbers here")
    args = parser.parse_args()
    torch.set_num_threads(1)
    measured = [row for backend in args.backends for row in rows(backend, args.depth, args.width)]
    table = Table(*measured[0], title="Peak memory, bytes")
    for row in measured:
        table.add_row(*(f"{cell:.3f}" if isinstance(cell, float) else str(cell) for cell in row.values()))
    Console(width=140).print(table)
    if args.json:
        settings = {"depth": args.depth, "width": args.width}
        args.json.write_text(json.dumps({**provenance(), **settings, "rows": measured}, indent=1) + "\n")


if __name__ == "__main__":
    main()
