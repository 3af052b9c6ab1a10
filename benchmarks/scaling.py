"""How time and memory grow with a model and its plan.

    python benchmarks/scaling.py --json benchmarks/results/scaling.json --plot benchmarks/results/scaling.png
    python benchmarks/scaling.py --only planning

`planning`: what tcc does before anything is compiled, for models of growing depth, plans of more steps, and plans of
more distinct variants: `capture` is torch.export, `analyse` finds streams, blocks and sites, `plan` makes the plan and
counts it on the rewritten graphs (what `tcc plan` does), `rewrite` builds the variants with every check (what
`tcc.compile` does before its backend). Seconds of processor time, one thread: other work on the machine does not count.

`runtime`: one step that computes everything and one that keeps half of the tokens, against tokens and batch: medians of
interleaved calls, slot bytes, and on a GPU the peak memory of a run beside that of the uncached model.

Widths are tiny in `planning` (they do not matter there) and weights are random everywhere: this is about time and
memory alone.
"""

from __future__ import annotations

import argparse
import functools
import json
import time
from collections.abc import Callable, Iterable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from matplotlib.figure import Figure
from provenance import provenance
from rich.console import Console
from rich.table import Table
from torch import nn

import tcc
from tcc.capture import capture
from tcc.models import DiT
from tcc.passes.sites import analyse
from tcc.plan import Action, CachePlan, Compute, Reuse
from tcc.program import build_program
from tcc.timing import time_calls

Row = dict[str, Any]
Call = tuple[nn.Module, tuple[Any, ...], dict[str, Any]]
TIMES = ("capture", "analyse", "plan", "rewrite")


def dit(depth: int, side: int = 8, width: int = 32, heads: int = 2, batch: int = 2) -> Call:
    """A DiT with `(side / 2) ** 2` tokens, and one call's inputs."""
    torch.manual_seed(0)
    model = DiT(
        input_size=side, patch_size=2, in_channels=4, hidden_size=width, depth=depth, num_heads=heads, num_classes=10
    )
    for parameter in model.parameters():
        parameter.data.normal_(0, 0.02)
    labels = torch.arange(batch) % 10
    return model.eval(), (torch.randn(batch, 4, side, side), torch.full((batch,), 500), labels), {}


def two_streams(double: int, single: int) -> Call:
    """Diffusers' Flux with image and text streams, tiny in width, and one call's inputs."""
    from diffusers import FluxTransformer2DModel  # here: the rest needs no diffusers

    torch.manual_seed(0)
    model = FluxTransformer2DModel(
        patch_size=1, in_channels=4, num_layers=double, num_single_layers=single, attention_head_dim=16,
        num_attention_heads=2, joint_attention_dim=32, pooled_projection_dim=32, axes_dims_rope=(4, 4, 8),
    )  # fmt: skip
    places = torch.cartesian_prod(torch.zeros(1), torch.arange(8.0), torch.arange(8.0))
    inputs = {
        "hidden_states": torch.randn(1, 64, 4), "encoder_hidden_states": torch.randn(1, 16, 32),
        "pooled_projections": torch.randn(1, 32), "timestep": torch.rand(1), "img_ids": places,
        "txt_ids": torch.zeros(16, 3),
    }  # fmt: skip
    return model.eval(), (), inputs


def reuse(info: tcc.ModelInfo, steps: int) -> CachePlan:
    """FORA: everything reused at two steps of three."""
    return tcc.plans.fora(info, num_steps=steps, interval=3)


def tokens(info: tcc.ModelInfo, steps: int) -> CachePlan:
    """Half of the tokens at every other step, other ones in turn."""
    return tcc.plans.tprr(
        info, num_steps=steps, k1=1, k2=1, keep=0.5, attention="cached", level="out", tokens="uniform", rotate=True
    )


def routers(info: tcc.ModelInfo, steps: int, variants: int) -> CachePlan:
    """Every other step reuses branches drawn at random, of `variants - 1` draws in turn: as learned routers do."""
    names = [site.name for site in info.sites.values() if site.kind == "out"]
    drawn = torch.rand(max(1, variants - 1), len(names), generator=torch.Generator().manual_seed(0)) < 0.4
    actions: dict[tuple[int, str], Action] = {}
    for step in range(steps):
        row = drawn[step // 2 % len(drawn)].tolist()
        actions |= {(step, n): Reuse() if step % 2 and r else Compute() for n, r in zip(names, row, strict=True)}
    return info.count(CachePlan(steps, actions, policy={"name": "routers"}))


def planning(quick: bool, models: Iterable[str]) -> Iterable[Row]:
    """The rows of planning: by blocks, by steps, by variants."""
    deep: list[tuple[str, Callable[[], Call]]] = [("dit", functools.partial(dit, d)) for d in (7, 14, 28)]
    deep.append(("two streams", functools.partial(two_streams, 19, 38)))
    for name, build in deep[:1] if quick else [entry for entry in deep if entry[0] in models]:
        model, args, kwargs = build()
        found, seconds = prepared(model, args, kwargs)
        counts = (2, 5) if quick else (2, 10, 30, 100)
        by_steps = [
            (policy, steps, 2) for policy in ("reuse", "tokens") for steps in ((10,) if quick else (10, 50, 250))
        ]
        for policy, steps, variants in [*by_steps, *(("routers", 250, count) for count in counts)]:
            yield measured(name, found, seconds, policy, steps, variants)


def prepared(model: nn.Module, args: Any, kwargs: Any) -> tuple[tcc.ModelInfo, dict[str, float]]:
    """What tcc sees in the model, and how long that took."""
    captured, first = took(lambda: capture(model, args, kwargs))
    analysis, second = took(lambda: analyse(captured.gm.graph))
    return tcc.ModelInfo(captured, analysis), {"capture": first, "analyse": second}


def measured(name: str, found: tcc.ModelInfo, before: dict[str, float], policy: str, steps: int, variants: int) -> Row:
    """One row of planning; of earlier plans, nothing is known but which calls are alike."""
    info = replace(found)
    made: dict[str, Callable[[], CachePlan]] = {
        "reuse": lambda: reuse(info, steps),
        "tokens": lambda: tokens(info, steps),
        "routers": lambda: routers(info, steps, variants),
    }
    plan, planned = took(made[policy])
    program, rewritten = took(lambda: build_program(info.captured, info.analysis, plan))
    return {
        "part": "planning", "model": name, "blocks": len(info.blocks), "operators": len(info.captured.gm.graph.nodes),
        "policy": policy, "steps": steps, "variants": len(program.variants), **before, "plan": planned,
        "rewrite": rewritten,
    }  # fmt: skip


def took(call: Callable[[], Any]) -> tuple[Any, float]:
    """What a call returns, and its seconds of processor time."""
    start = time.process_time()
    result = call()
    return result, time.process_time() - start


def runtime(sides: Iterable[int], batches: Iterable[int], depth: int, width: int, backend: str) -> Iterable[Row]:
    """The rows of running: by tokens and batch."""
    for side in sides:
        for batch in batches:
            yield run(dit(depth, side, width, max(1, width // 64), batch), backend)


def run(call: Call, backend: str) -> Row:
    """One row of running: a full step and a step that keeps half of the tokens."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    model, args = call[0].to(device), tuple(x.to(device) for x in call[1])
    policy = functools.partial(tcc.plans.tprr, num_steps=2, k1=1, k2=1, keep=0.5, attention="kept")
    began = time.perf_counter()
    compiled = tcc.compile(model, policy, example_inputs=(args, {}), backend=backend)
    seconds = time.perf_counter() - began
    session, memory = compiled.new_session(), compiled.plan.memory(compiled.info)  # type: ignore[arg-type]
    plain = tcc.compile(model, tcc.plans.full(compiled.info, num_steps=2), example_inputs=(args, {}), backend=backend)  # type: ignore[arg-type]

    def p_step() -> Any:
        session.step = 1
        return session(*args)

    session(*args)
    times = time_calls({"full": lambda: plain(*args), "half": p_step}, rounds=7, warmup=2)
    cost = compiled.plan.cost
    assert cost is not None
    row = {
        "part": "runtime", "tokens": compiled.info.num_tokens, "batch": args[0].shape[0],  # type: ignore[union-attr]
        "blocks": len(compiled.info.blocks), "compile s": seconds,  # type: ignore[union-attr]
        "full ms": times["full"].median * 1e3, "half ms": times["half"].median * 1e3,
        "bound": cost.full_macs / cost.step_macs[1], "slot bytes": memory.total,
    }  # fmt: skip
    if device == "cuda":
        row |= {"full peak": peak(lambda: plain(*args)), "half peak": peak(lambda: session(*args))}
    return row


def peak(call: Callable[[], Any]) -> int:
    """The most bytes that are allocated on the GPU during a call."""
    torch.cuda.reset_peak_memory_stats()
    call()
    return torch.cuda.max_memory_allocated()


def show(rows: list[Row], console: Console) -> None:
    """One table for each part."""
    for part in dict.fromkeys(row["part"] for row in rows):
        found = [row for row in rows if row["part"] == part]
        table = Table(title=part)
        for column in found[0]:
            if column != "part":
                table.add_column(column, justify="right" if isinstance(found[0][column], (int, float)) else "left")
        for row in found:
            cells = (value for key, value in row.items() if key != "part")
            table.add_row(*(f"{cell:.3g}" if isinstance(cell, float) else str(cell) for cell in cells))
        console.print(table)


def plot(rows: list[Row], path: Path) -> None:
    """Planning against steps and variants, running against tokens; what was measured."""
    found = [row for row in rows if row["part"] == "planning"]
    ran = [row for row in rows if row["part"] == "runtime"]
    figure = Figure(figsize=(13, 4), layout="constrained")
    left, middle, right = figure.subplots(1, 3)
    for axes, key, policies in ((left, "steps", ("tokens",)), (middle, "variants", ("routers",))):
        for model, blocks in dict.fromkeys((row["model"], row["blocks"]) for row in found):
            mine = [r for r in found if (r["model"], r["blocks"]) == (model, blocks) and r["policy"] in policies]
            axes.plot([r[key] for r in mine], [r["plan"] for r in mine], marker="o", label=f"{model}, {blocks} blocks")
        axes.set(xlabel=key, ylabel=f"seconds to plan ({policies[0]})", xscale="log")
    for batch in dict.fromkeys(row["batch"] for row in ran):
        mine = [row for row in ran if row["batch"] == batch]
        for key, line in (("full ms", "-"), ("half ms", "--")):
            right.plot([r["tokens"] for r in mine], [r[key] for r in mine], line, marker="o", label=f"{key}, {batch}")
    right.set(xlabel="tokens", ylabel="ms per step (batch)", xscale="log", yscale="log")
    for axes in (left, middle, right):
        if axes.lines:
            axes.legend(fontsize=7)
    figure.savefig(path, dpi=120)


def main() -> None:
    """Measure, print, write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", choices=["planning", "runtime"], help="one of the two parts")
    parser.add_argument("--models", nargs="+", default=["dit", "two streams"], help="planning")
    parser.add_argument("--quick", action="store_true", help="a few rows, to see that it works")
    parser.add_argument("--tokens", type=int, nargs="+", default=[64, 256, 1024], help="runtime: squares of even sides")
    parser.add_argument("--batch", type=int, nargs="+", default=[1, 4], help="runtime")
    parser.add_argument("--depth", type=int, default=4, help="runtime: blocks")
    parser.add_argument("--width", type=int, default=128, help="runtime: channels")
    parser.add_argument("--backend", default="inductor", help="runtime")
    parser.add_argument("--json", type=Path, help="write the rows, the machine, the command and the commit here")
    parser.add_argument("--plot", type=Path, help="draw the rows here")
    args = parser.parse_args()
    console, rows = Console(width=140), []
    if args.only != "runtime":
        for row in planning(args.quick, args.models):
            console.print(f"{row['model']}, {row['blocks']} blocks, {row['policy']}, {row['steps']} steps: "
                          f"{row['plan']:.2f} s")  # fmt: skip
            rows.append(row)
            write(rows, args.json)
    if args.only != "planning":
        sides = [2 * int(count**0.5) for count in (args.tokens[:1] if args.quick else args.tokens)]
        rows += runtime(sides, args.batch[:1] if args.quick else args.batch, args.depth, args.width, args.backend)
    show(rows, console)
    if args.plot:
        plot(rows, args.plot)
    write(rows, args.json)


def write(rows: list[Row], path: Path | None) -> None:
    """The rows so far, and how they were measured."""
    if path is None:
        return
    path.write_text(json.dumps({**provenance(), "rows": rows}, indent=1) + "\n")


if __name__ == "__main__":
    main()
