"""`tcc demo`: the trained model, uncached and through several plans: seconds, error, pictures."""

from __future__ import annotations

import functools
import math
import time
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from rich.table import Table

from tcc import plans, timing
from tcc.cli import options, record, screen
from tcc.cli.compare import Method, Row, Task, compare, of_executable, warm_up
from tcc.cli.compile_bar import executables
from tcc.cli.sample import class_names, seeded_noise
from tcc.cli.sheet import SheetRow, draw_sheet
from tcc.cli.subjects import load_pixel_dit, look
from tcc.info import ModelInfo
from tcc.models import DiT
from tcc.plan import CachePlan
from tcc.plan.picture import facts
from tcc.runtime import Executable

__all__ = ["demo"]

_EAGER, _COMPILED = "uncached, eager", "uncached, compiled"

Out = Annotated[
    Path,
    typer.Option(
        metavar="FILE", callback=options.picture_file, help="The picture to write: a row of images per method."
    ),
]
Steps = Annotated[int, typer.Option(min=2, max=1000, help="DDIM steps.")]


def demo(
    out: Out = Path("demo.png"),
    json: options.Json = None,
    steps: Steps = 50,
    cfg: options.Cfg = 1.5,
    seed: options.Seed = 0,
    rounds: options.Rounds = 3,
    seconds: options.Seconds = 60.0,
    threads: options.Threads = None,
    backend: options.Backend = "inductor",
    regional: options.Regional = False,
    slot_dtype: options.SlotDtype = None,
    model: options.WeightsName = "reference",
) -> None:
    """Show what tcc does: one image per class, uncached and through several plans, in the same noise.

    Every method is compiled the same way and timed in turns with the others.
    Speedups are [bold]measured[/], over the compiled uncached model; the [bold]bound[/] is
    what the plan's MACs allow; the [bold]realised share[/] is one over the other.
    Beside each plan stands plain DDIM with as many steps as fit its time.

    [bold]Examples[/]

      tcc demo
      tcc demo --threads 2 --json demo.json
      tcc demo --backend eager --rounds 1      a quick look, not compiled
    """
    options.check_apart({"--out": out, "--json": json})
    began = time.perf_counter()
    dit = load_pixel_dit(model)
    labels = torch.arange(min(10, dit.config.num_classes))
    task = Task(seeded_noise(dit, len(labels), seed), labels, dit.config.num_classes, cfg)
    with torch.no_grad():
        torch.set_num_threads(threads or timing.faster_threads(lambda: dit(*task.inputs(task.noise, 0))))
    info = look(dit, task.inputs(task.noise, 0), {}, model)
    with screen.status("planning"):
        made = make_plans(info, steps)
        if slot_dtype is not None:
            dtype = getattr(torch, slot_dtype)
            made = {name: info.count(replace(plan, slot_dtype=dtype)) for name, plan in made.items()}
    rows = _measure(task, dit, made, executables(info, made, backend, regional=regional), rounds, seconds)
    caption = _caption(rows, steps, cfg, seed, backend)
    screen.out().print(_table(rows, backend))
    screen.note(caption)
    draw_sheet(out, [SheetRow(r.method.name, _detail(r), r.images) for r in rows], class_names(dit, labels), caption)
    settings = {"cfg": cfg, "seed": seed, "backend": backend, "regional": regional, "model": model}
    screen.write_json(json, _record(rows, made, settings))
    screen.note(f"wrote {out}; {time.perf_counter() - began:.0f} s in all")


def make_plans(info: ModelInfo, steps: int) -> dict[str, CachePlan]:
    """The plans of the demo. The token plans' options are the best of a search by PSNR at equal bound."""
    third = -(-steps // 3) + 1 if steps > 2 else steps  # as many as FORA computes
    tokens = functools.partial(plans.tprr, num_steps=steps, k1=1, k2=1, attention="cached", level="out", rotate=True)
    return {
        _COMPILED: plans.full(info, num_steps=steps),
        "FORA, every 3rd step": plans.fora(info, num_steps=steps, interval=3),
        "forecast, every 3rd step": plans.forecast(info, num_steps=steps, i_steps=third),
        "tokens, keep 1/2": tokens(info, keep=0.5),
        "tokens, keep 1/4": tokens(info, keep=0.25),
    }


def _measure(
    task: Task, dit: DiT, made: Mapping[str, CachePlan], compiled: Mapping[str, Executable], rounds: int, seconds: float
) -> list[Row]:
    """The rows of the table: uncached, then every plan, with fewer steps in its time below it."""
    steps, full = made[_COMPILED].num_steps, compiled[_COMPILED]
    with screen.bar("warming up") as bar:
        warm_up(task, list(compiled.values()), bar)
    methods = [Method(_EAGER, lambda: dit, ("eager",) * steps)]
    methods += [of_executable(name, compiled[name], plan.bound) for name, plan in made.items()]
    with screen.bar("sampling, all methods in turns") as bar:
        rows = compare(task, methods, baseline=_COMPILED, rounds=rounds, at_most=seconds, progress=bar)
    fewer = {row.method.name: max(1, round(steps / row.speedup)) for row in rows[2:]}
    counts = sorted({count for count in fewer.values() if count < steps})
    methods = [of_executable(_COMPILED, full, 1.0)]
    methods += [of_executable(_fewer(count), full, steps / count, count) for count in counts]
    with screen.bar("sampling with fewer steps") as bar:
        short = compare(
            task,
            methods,
            baseline=_COMPILED,
            reference=rows[0].images,
            rounds=rounds,
            at_most=seconds / 2,
            progress=bar,
        )
    pace = rows[1].seconds / short[0].seconds  # the machine's drift from the one part to the other, on the same code
    found = {row.method.name: replace(row, seconds=row.seconds * pace) for row in short[1:]}
    table = rows[:2]
    for row in rows[2:]:
        beside = found.pop(_fewer(fewer[row.method.name]), None)
        table += [row] if beside is None else [row, beside]
    return table


def _fewer(count: int) -> str:
    return f"uncached, {count} steps"


def _table(rows: list[Row], backend: str) -> Table:
    compiler = "same compiler" if backend == "inductor" else f"backend {backend}: nothing is compiled"
    table = Table(title=f"Same noise, {compiler}")
    for column in ("method", "steps", "s per batch", "speedup", "bound", "realised share", "PSNR dB", "slots MiB"):
        table.add_column(column, justify="left" if column == "method" else "right")
    for row in rows:
        eager = row.method.name == _EAGER
        table.add_row(
            row.method.name,
            str(row.method.num_steps),
            f"{row.seconds:.2f}",
            f"{row.speedup:.2f}x",
            "" if eager else f"{row.method.bound:.2f}x",
            "" if eager else f"{row.realised_share:.2f}",
            _error(row),
            f"{row.method.slot_bytes / 2**20:.1f}",
        )
    return table


def _detail(row: Row) -> str:
    return f"{row.seconds:.2f} s   {row.speedup:.2f}x   {_error(row)}" + (" dB" if math.isfinite(row.psnr) else "")


def _error(row: Row) -> str:
    if row.method.name == _EAGER:
        return "reference"
    return f"{row.psnr:.1f}" if math.isfinite(row.psnr) else "identical"


def _caption(rows: list[Row], steps: int, cfg: float, seed: int, backend: str) -> str:
    """How the numbers came about."""
    where, images = timing.machine(), rows[0].images
    rounds = len(rows[0].timing.rounds)
    device = where["accelerator"] or f"{where['processor']}, {where['threads']} thread{'s' * (where['threads'] != 1)}"
    how = "" if backend == "inductor" else f" (backend {backend}, not compiled)"
    return (
        f"{len(images)} images of {images.shape[-2]}x{images.shape[-1]}, DDIM {steps} steps, guidance {cfg:g}, "
        f"seed {seed}; float32 on {device}, torch {where['torch']}{how}; {rounds} interleaved rounds, "
        "medians per kind of step"
    )


def _record(rows: list[Row], made: Mapping[str, CachePlan], settings: dict[str, Any]) -> dict[str, Any]:
    """Everything that is needed to repeat the table, and the table."""
    return {
        **record.head(),
        **settings,
        "rows": [row.as_dict() for row in rows],
        "plans": {name: facts(plan) for name, plan in made.items()},
    }
