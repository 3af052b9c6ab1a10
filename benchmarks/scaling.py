"""How time and memory grow with a model and its plan.

    python benchmarks/scaling.py planning --results benchmarks/results
    python benchmarks/scaling.py running --threads 1 --results benchmarks/results

`planning`: what tcc does before anything is compiled, for models of growing depth, plans of more steps, and plans of
more distinct variants: `capture` is torch.export, `analyse` finds streams, blocks and sites, `plan` makes the plan and
counts it on the rewritten graphs, which it builds with every check (what `tcc plan` does), `program` is what
`tcc.compile` then still does before its backend: a plan that it is given in place of a policy is rewritten there, once
too. Seconds of processor time, one thread: what else runs on the machine counts only as far as it takes caches away.

`running`: one step that computes everything and one that keeps half of the tokens, beside the bound, against tokens,
batch and blocks; a whole run against its steps; and compiling against the number of distinct variants, each compiled
once for all rows. Medians of interleaved calls, slot bytes, and the most bytes that an uncached step and a planned run
allocate, slots included and weights not.

A DiT and a model of two streams (diffusers' Flux). Widths are tiny in `planning` (they do not matter there) and
weights are random everywhere: this is about time and memory alone. `--results FOLDER` writes `scaling-planning.json`
and `.png`, or those of `running`.
"""

from __future__ import annotations

import argparse
import functools
import json
import resource
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import EngFormatter, LogLocator, NullFormatter, ScalarFormatter
from provenance import provenance
from rich.console import Console
from rich.table import Table
from torch import nn

import tcc
from tcc.capture import capture
from tcc.models import DiT
from tcc.passes.sites import analyse
from tcc.plan import Action, CachePlan, Compute, Reuse
from tcc.timing import allocations, time_calls

Row = dict[str, Any]
Call = tuple[nn.Module, tuple[Any, ...], dict[str, Any]]
TEXT = 16  # text tokens of the model of two streams


def dit(depth: int, side: int = 4, width: int = 32, batch: int = 2) -> Call:
    """A DiT with `side ** 2` tokens, and one call's inputs."""
    torch.manual_seed(0)
    model = DiT(
        input_size=2 * side, patch_size=2, in_channels=4, hidden_size=width, depth=depth, num_classes=10,
        num_heads=max(2, width // 64),
    )  # fmt: skip
    for parameter in model.parameters():
        parameter.data.normal_(0, 0.02)
    labels = torch.arange(batch) % 10
    return model.eval(), (torch.randn(batch, 4, 2 * side, 2 * side), torch.full((batch,), 500), labels), {}


def two_streams(depth: int, side: int = 8, width: int = 32, batch: int = 1) -> Call:
    """Diffusers' Flux with `side ** 2` image tokens, a third of its blocks of two streams, and one call's inputs."""
    from diffusers import FluxTransformer2DModel  # here: the rest needs no diffusers

    torch.manual_seed(0)
    heads = max(2, width // 64)
    head = width // heads
    place = 3 * head // 16 * 2  # rotary channels of a row, and of a column
    model = FluxTransformer2DModel(
        patch_size=1, in_channels=4, num_layers=depth // 3, num_single_layers=depth - depth // 3,
        attention_head_dim=head, num_attention_heads=heads, joint_attention_dim=32, pooled_projection_dim=32,
        axes_dims_rope=(head - 2 * place, place, place),
    )  # fmt: skip
    rows = torch.arange(float(side))
    inputs = {
        "hidden_states": torch.randn(batch, side**2, 4), "encoder_hidden_states": torch.randn(batch, TEXT, 32),
        "pooled_projections": torch.randn(batch, 32), "timestep": torch.rand(batch),
        "img_ids": torch.cartesian_prod(torch.zeros(1), rows, rows), "txt_ids": torch.zeros(TEXT, 3),
    }  # fmt: skip
    return model.eval(), (), inputs


BUILDERS: dict[str, Callable[..., Call]] = {"dit": dit, "two streams": two_streams}


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


def planning(quick: bool) -> Iterator[Row]:
    """By blocks, by steps, by variants."""
    models = [("dit", 7), ("dit", 14), ("dit", 28), ("two streams", 57)]
    for name, depth in models[:1] if quick else models:
        model, args, kwargs = BUILDERS[name](depth)
        captured, first = took(functools.partial(capture, model, args, kwargs))
        analysis, second = took(functools.partial(analyse, captured.gm.graph))
        before = {"capture": first, "analyse": second}
        plans = [(policy, steps, 2) for policy in ("reuse", "tokens") for steps in ((10,) if quick else (10, 50, 250))]
        plans += [("routers", 250, count) for count in ((2, 5) if quick else (2, 10, 30, 100))]
        for policy, steps, variants in plans:
            yield planned(name, tcc.ModelInfo(captured, analysis), before, policy, steps, variants)


def planned(name: str, info: tcc.ModelInfo, before: dict[str, float], policy: str, steps: int, variants: int) -> Row:
    """One row; of earlier plans, nothing is known but which calls are alike."""
    made: dict[str, Callable[[], CachePlan]] = {
        "reuse": lambda: reuse(info, steps),
        "tokens": lambda: tokens(info, steps),
        "routers": lambda: routers(info, steps, variants),
    }
    plan, seconds = took(made[policy])
    program, found = took(lambda: info.program(plan))
    return {
        "model": name, "blocks": len(info.blocks), "operators": len(info.captured.gm.graph.nodes), "policy": policy,
        "steps": steps, "variants": len(program.variants), **before, "plan": seconds, "program": found,
        "plan + program": seconds + found, "slot bytes": program.slot_bytes,
    }  # fmt: skip


def took(call: Callable[[], Any]) -> tuple[Any, float]:
    """What a call returns, and its seconds of processor time."""
    start = time.process_time()
    result = call()
    return result, time.process_time() - start


def running(args: argparse.Namespace) -> Iterator[Row]:
    """By tokens, batch and blocks, one at a time; by steps; by variants."""
    base = {"tokens": 256, "batch": 1, "blocks": 4}
    factors = {"tokens": args.tokens, "batch": args.batch, "blocks": args.blocks}
    for name in args.models:
        done: dict[tuple[int, ...], Row] = {}
        for factor, values in factors.items():
            for value in values:
                at = {**base, factor: value}
                key = tuple(at.values())
                if key not in done:
                    build = functools.partial(BUILDERS[name], at["blocks"], round(at["tokens"] ** 0.5), args.width)
                    done[key] = run(build(batch=at["batch"]), args)
                yield {"by": factor, "model": name, **at, **done[key]}
    yield from by_steps(dit(base["blocks"], 8, args.width, 1), args)
    yield from by_variants(dit(base["blocks"], 8, args.width, 1), args)


def moved(call: Call, options: argparse.Namespace) -> Call:
    """The model and its inputs on the device, in the dtype."""
    model, args, kwargs = call
    device, dtype = options.device, getattr(torch, options.dtype)

    def at(x: torch.Tensor) -> torch.Tensor:
        return x.to(device, dtype if x.is_floating_point() else x.dtype)

    return model.to(device, dtype), tuple(map(at, args)), {name: at(x) for name, x in kwargs.items()}


def run(call: Call, options: argparse.Namespace) -> Row:
    """A full step, a step that keeps half of the tokens, and what both kinds of step take together in memory."""
    model, args, kwargs = moved(call, options)
    policy = functools.partial(
        tcc.plans.tprr, num_steps=2, k1=1, k2=1, keep=0.5, attention="kept", level="block", tokens="uniform"
    )
    given: dict[str, Any] = {"example_inputs": (args, kwargs), "backend": options.backend}
    compiled = tcc.compile(model, policy, **given)
    plain = compiled.with_plan(lambda info: tcc.plans.full(info, num_steps=2)).prepare(*args, **kwargs)
    session, cost = compiled.new_session(), compiled.plan.cost
    assert cost is not None

    def half() -> Any:
        session.step = 1
        return session(*args, **kwargs)

    def whole() -> None:
        started = compiled.new_session()
        for _ in range(2):
            started(*args, **kwargs)

    session(*args, **kwargs)
    times = time_calls({"full": lambda: plain(*args, **kwargs), "half": half}, rounds=options.rounds, warmup=2)
    speedup = times["full"].median / times["half"].median
    bound = cost.full_macs / cost.step_macs[1]
    full_peak = allocations(lambda: plain(*args, **kwargs), options.device).peak
    run_peak = allocations(whole, options.device).peak
    return {
        "full ms": times["full"].median * 1e3, "half ms": times["half"].median * 1e3, "bound": bound,
        "speedup": speedup, "realised share": speedup / bound, "slot bytes": session.slot_bytes,
        "full peak": full_peak, "run peak": run_peak, "peak ratio": run_peak / (full_peak + session.slot_bytes),
        "compile s": sum(compiled.compile_seconds),
    }  # fmt: skip


def by_steps(call: Call, options: argparse.Namespace) -> Iterator[Row]:
    """Whole runs of more and more steps, all compiled once: milliseconds of a step, and of opening a session."""
    model, args, kwargs = moved(call, options)
    compiled = tcc.compile(
        model, functools.partial(tokens, steps=2), example_inputs=(args, kwargs), backend=options.backend
    )
    for steps in options.steps:
        longer = compiled.with_plan(functools.partial(tokens, steps=steps)).prepare(*args, **kwargs)
        assert longer.program is not None
        variants = len(longer.program.variants)
        yield {"by": "steps", "model": "dit", "steps": steps, "variants": variants, **whole_run(longer, call, options)}


def whole_run(compiled: tcc.CompiledModel, call: Call, options: argparse.Namespace) -> Row:
    """Milliseconds of a step within a run, and of opening a session; what a session keeps, and what a run takes."""
    _, args, kwargs = moved(call, options)

    def run_all() -> None:
        session = compiled.new_session()
        for step in range(compiled.plan.num_steps):
            session.run_step(step, *args, **kwargs)

    run_all()
    times = time_calls({"run": run_all, "open": compiled.new_session}, rounds=options.rounds)
    return {
        "ms per step": times["run"].median * 1e3 / compiled.plan.num_steps, "open ms": times["open"].median * 1e3,
        "slot bytes": compiled.new_session().slot_bytes, "run peak": allocations(run_all, options.device).peak,
    }  # fmt: skip


def by_variants(call: Call, options: argparse.Namespace) -> Iterator[Row]:
    """Plans of more and more variants, each compiled once: seconds of all that is compiled so far; as `by_steps`."""
    model, args, kwargs = moved(call, options)
    compiled: tcc.CompiledModel | None = None
    seconds = 0.0
    for count in options.variants:
        policy = functools.partial(routers, steps=2 * count, variants=count)
        if compiled is None:
            compiled = tcc.compile(model, policy, example_inputs=(args, kwargs), backend=options.backend)
        else:
            compiled = compiled.with_plan(policy).prepare(*args, **kwargs)
        seconds += sum(compiled.compile_seconds)
        assert compiled.program is not None
        yield {
            "by": "variants", "model": "dit", "variants": len(compiled.program.variants), "compile s": seconds,
            "resident bytes": resident_bytes(), **whole_run(compiled, call, options),
        }  # fmt: skip


def resident_bytes() -> int | None:
    """What the process holds in memory; None where there is no /proc."""
    path = Path("/proc/self/statm")
    return int(path.read_text().split()[1]) * resource.getpagesize() if path.is_file() else None


def show(rows: Sequence[Row], console: Console) -> None:
    """One table for each kind of row."""
    for by in dict.fromkeys(row.get("by") for row in rows):
        found = [row for row in rows if row.get("by") == by]
        table = Table(title=f"by {by}" if by else "planning", box=None)
        for column in (name for name in found[0] if name != "by"):
            table.add_column(column, justify="right" if isinstance(found[0][column], (int, float)) else "left")
        for row in found:
            cells = (value for name, value in row.items() if name != "by")
            table.add_row(*(f"{cell:.3g}" if isinstance(cell, float) else str(cell) for cell in cells))
        console.print(table)


def draw(axes: Axes, rows: Sequence[Row], x: str, y: dict[str, str], group: Sequence[str], log: str = "xy") -> None:
    """Columns `y` (with their line styles) against column `x`, a colour for each value of `group`."""
    for number, key in enumerate(dict.fromkeys(tuple(row[name] for name in group) for row in rows)):
        mine = [row for row in rows if tuple(row[name] for name in group) == key]
        for column, style in y.items():
            values, label = [row[column] for row in mine], ", ".join(map(str, (*key, column)))
            axes.plot([row[x] for row in mine], values, f"{style}o", ms=4, color=f"C{number}", label=label)
    axes.set_xlabel(x)
    if "x" in log:
        axes.set_xscale("log", base=2)
        axes.set_xticks(sorted({row[x] for row in rows}))
        axes.xaxis.set_major_formatter(ScalarFormatter())
    if "y" in log:
        axes.set_yscale("log")
        axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        axes.yaxis.set_major_formatter(lambda value, _: f"{value:g}" if value < 1000 else EngFormatter(sep="")(value))
        axes.yaxis.set_minor_formatter(NullFormatter())
    axes.grid(alpha=0.25)
    if axes.lines:
        axes.legend(fontsize=7, framealpha=0.6, handlelength=4)


def plot_planning(rows: Sequence[Row], path: Path) -> None:
    """Seconds before anything is compiled: against blocks, steps and variants."""
    figure = Figure(figsize=(13, 4), layout="constrained")
    left, middle, right = figure.subplots(1, 3)
    most = max(row["steps"] for row in rows)
    draw(left, [r for r in rows if r["steps"] == most and r["policy"] == "tokens"], "blocks",
         {"plan + program": "-", "capture": ":"}, ("model",), log="")  # fmt: skip
    draw(
        middle, [r for r in rows if r["policy"] == "tokens"], "steps", {"plan + program": "-"}, ("model", "blocks"), "x"
    )
    draw(
        right,
        [r for r in rows if r["policy"] == "routers"],
        "variants",
        {"plan + program": "-"},
        ("model", "blocks"),
        "x",
    )
    for axes in (left, middle, right):
        axes.set_ylabel("seconds of processor time")
    figure.savefig(path, dpi=120)


def plot_running(rows: Sequence[Row], path: Path) -> None:
    """Time above and memory below, of a step against tokens, batch and blocks, of a run against steps and variants."""
    figure = Figure(figsize=(16, 7.5), layout="constrained")
    ms, memory = {"full ms": "-", "half ms": "--"}, {"full peak": "-", "run peak": "--", "slot bytes": ":"}
    run_ms, run_memory = {"ms per step": "-", "open ms": ":"}, {"run peak": "--", "slot bytes": ":"}
    shown = {
        "tokens": (ms, memory), "batch": (ms, memory), "blocks": (ms, memory), "steps": (run_ms, run_memory),
        "variants": ({"compile s": "-", "ms per step": "--"}, run_memory),
    }  # fmt: skip
    for (above, below), (factor, (times, sizes)) in zip(figure.subplots(2, 5).T, shown.items(), strict=True):
        mine = [row for row in rows if row["by"] == factor]
        draw(above, mine, factor, times, ("model",))
        draw(below, mine, factor, sizes, ("model",))
        above.set_ylabel("ms per step" if factor != "variants" else "s, and ms per step")
        below.set_ylabel("bytes allocated")
    figure.savefig(path, dpi=120)


def parse(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("part", choices=["planning", "running"])
    parser.add_argument("--results", type=Path, help="a folder for JSON and plot")
    parser.add_argument("--quick", action="store_true", help="planning: a few rows, to see that it works")
    parser.add_argument("--models", nargs="+", choices=list(BUILDERS), default=list(BUILDERS), help="running")
    parser.add_argument("--tokens", type=int, nargs="+", default=[64, 256, 1024, 4096], help="running: squares")
    parser.add_argument("--batch", type=int, nargs="+", default=[1, 2, 8, 16], help="running")
    parser.add_argument("--blocks", type=int, nargs="+", default=[2, 4, 8], help="running")
    parser.add_argument("--steps", type=int, nargs="+", default=[10, 50, 250], help="running")
    parser.add_argument("--variants", type=int, nargs="+", default=[2, 5, 10], help="running")
    parser.add_argument("--width", type=int, default=128, help="running: channels")
    parser.add_argument("--rounds", type=int, default=7, help="running")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--device", default="cpu", help="running: such as cuda")
    parser.add_argument("--dtype", choices=["float32", "bfloat16", "float16"], default="float32", help="running")
    parser.add_argument("--backend", default="inductor", help="running")
    return parser.parse_args(arguments)


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure, print, write."""
    args, console, rows = parse(arguments), Console(width=180, highlight=False), []
    torch.set_num_threads(args.threads)
    path = None if args.results is None else args.results / f"scaling-{args.part}.json"
    if path is not None:
        path.parent.mkdir(parents=True, exist_ok=True)
    for row in planning(args.quick) if args.part == "planning" else running(args):
        console.print(f"[dim]{', '.join(f'{name} {value}' for name, value in list(row.items())[:6])}[/]")
        rows.append(row)
        if path is not None:  # after every row: a run that is stopped leaves what it has
            path.write_text(json.dumps({**provenance(), "rows": rows}, indent=1) + "\n")
    show(rows, console)
    if path is not None:
        (plot_planning if args.part == "planning" else plot_running)(rows, path.with_suffix(".png"))
    return 0


if __name__ == "__main__":
    sys.exit(main())
