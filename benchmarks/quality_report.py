"""Tables, plots and JSON from the store of `benchmarks/quality.py`."""

from __future__ import annotations

import argparse
import json
import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter
from provenance import provenance
from quality_rows import FEWER, MULTISTEP, UNCACHED, Row
from quality_store import Store
from rich.console import Console
from rich.table import Table

from tcc import timing
from tcc.metrics import Statistics, frechet_distance, real_statistics
from tcc.plan import CachePlan

COLUMNS = (
    "row", "steps", "GMAC", "bound", "ms per image", "speedup", "PSNR dB", "FD", "FD min..max", "seeds x samples",
    "PSNR, fewer steps", "FD, fewer steps", "front",
)  # fmt: skip
MARKERS = "osD^v<>Pp*Xh8d"


@dataclass(frozen=True)
class Measured:
    """What is known of a row.

    Attributes:
        row: the row.
        steps: the steps of the run that it is compared with.
        plan: its plan.
        samples: how many images of every seed the numbers are of.
        psnr: by seed, dB, mean over the images.
        fd: by seed.
        seconds: per image; None where a row of the tables has not been timed.
        speedup: measured; None likewise: costs are never times for some rows and MACs for others.
        timing: the raw times.
    """

    row: Row
    steps: int
    plan: CachePlan
    samples: int
    psnr: dict[int, float]
    fd: dict[int, float]
    seconds: float | None
    speedup: float | None
    timing: dict[str, Any] | None

    @property
    def bound(self) -> float:
        """The speedup that its MACs allow."""
        return self.steps * self.plan.bound / self.plan.num_steps

    @property
    def cost(self) -> float:
        """Time of an image over that of the uncached run; by MACs where there are no times."""
        return 1 / (self.speedup or self.bound)

    @property
    def mean_psnr(self) -> float:
        """Mean over the seeds."""
        return statistics.fmean(self.psnr.values())

    @property
    def mean_fd(self) -> float:
        """Mean over the seeds."""
        return statistics.fmean(self.fd.values())

    def as_dict(self) -> dict[str, Any]:
        """For the JSON file."""
        return {
            "row": self.row.name, "family": self.row.family, "steps": self.steps, "run_steps": self.plan.num_steps,
            "control_of": self.row.control or None, "policy": dict(self.plan.policy), "sampler": self.row.sampler,
            "macs": self.plan.macs, "bound": self.bound, "samples": self.samples,
            "seconds_per_image": self.seconds, "speedup": self.speedup,
            "psnr": {s: v if math.isfinite(v) else None for s, v in self.psnr.items()}, "fd": self.fd,
            "timing": self.timing,
        }  # fmt: skip


def measured(
    entries: Sequence[Any], samples: int | None, chunk: int, seeds: Sequence[int] | None = None
) -> list[Measured]:
    """The numbers of all rows, those of one table of the same images.

    Args:
        entries: the rows.
        samples: images of every seed; by default as many as every row with any has.
        chunk: images per file of the store.
        seeds: whose images; by default the seeds that every row of a table has, of those with any.
    """
    counted = {entry.folder: Store.counted(entry.folder) for entry in entries}
    most = [max(found.values(), default=0) for found in counted.values()]
    chunks = samples // chunk if samples else min((n for n in most if n), default=0)
    full = {folder: {s for s, n in found.items() if chunks and n >= chunks} for folder, found in counted.items()}
    some = [(entry, full[entry.folder]) for entry in entries if full[entry.folder]]
    shown: list[tuple[Any, list[int]]] = []
    for steps in dict.fromkeys(entry.steps for entry, _ in some):
        own = [(entry, found) for entry, found in some if entry.steps == steps]
        common = set(seeds or set.intersection(*(found for _, found in own)))
        shown += [(entry, sorted(common)) for entry, found in own if common and common <= found]
    times = [Store.seconds(entry.folder) for entry, _ in shown]
    paces = [t["uncached_seconds"] / t["images"] / e.steps for (e, _), t in zip(shown, times, strict=True) if t]
    pace, real = statistics.median(paces) if all(times) and times else None, real_statistics()
    return [
        _measured(entry, common, chunks, chunks * chunk, time, pace, real)
        for (entry, common), time in zip(shown, times, strict=True)
    ]


def _measured(
    entry: Any, seeds: Sequence[int], chunks: int, samples: int, time: dict[str, Any] | None, pace: float | None,
    real: Statistics,
) -> Measured:  # fmt: skip
    """One row; its time counts where all rows have one, and with it the uncached pace in seconds per step."""
    parts = {seed: Store.gathered(entry.folder, seed, chunks) for seed in seeds}
    fd = {s: frechet_distance(Statistics.of(features), real) for s, (features, _) in parts.items()}
    quality = {s: float(values.mean()) for s, (_, values) in parts.items()}
    speedup = time["speedup"] if time and pace else None
    seconds = pace * entry.steps / speedup if pace and speedup else None
    return Measured(entry.row, entry.steps, entry.plan, samples, quality, fd, seconds, speedup, time)


def at_equal_cost(rows: Sequence[Measured], wanted: Measured, field: str) -> float | None:
    """What fewer steps reach in a row's time, between the two nearest counts; None outside the curve."""
    curve = sorted(
        (m.cost, getattr(m, field))
        for m in rows
        if m.row.family == FEWER and m.steps == wanted.steps and math.isfinite(getattr(m, field))
    )
    costs, values = [c for c, _ in curve], [v for _, v in curve]
    if not curve or not costs[0] <= wanted.cost <= costs[-1]:
        return None
    return float(np.interp(wanted.cost, costs, values))


def on_front(rows: Sequence[Measured], wanted: Measured, field: str) -> bool:
    """Whether no other row is both cheaper and better."""
    sign = 1 if field == "mean_fd" else -1
    own = sign * getattr(wanted, field)
    others = [m for m in rows if m.steps == wanted.steps and m.cost < wanted.cost]
    return all(sign * getattr(m, field) > own for m in others)


def cells(rows: Sequence[Measured], m: Measured) -> list[str]:
    """One line of the table."""
    fewer = (None if m.row.family == FEWER else at_equal_cost(rows, m, field) for field in ("mean_psnr", "mean_fd"))
    return [
        m.row.name,
        str(m.plan.num_steps),
        f"{m.plan.macs * 2 / 1e9:.2f}",
        f"{m.bound:.2f}x",
        f"{m.seconds * 1e3:.1f}" if m.seconds else "",
        f"{m.speedup:.2f}x" if m.speedup else "",
        f"{m.mean_psnr:.2f}" if math.isfinite(m.mean_psnr) else "reference",
        f"{m.mean_fd:.3f}",
        f"{min(m.fd.values()):.3f}..{max(m.fd.values()):.3f}",
        f"{len(m.fd)} x {m.samples}",
        *("" if value is None else f"{value:.{digits}f}" for digits, value in zip((2, 3), fewer, strict=True)),
        ", ".join(name for name, field in (("PSNR", "mean_psnr"), ("FD", "mean_fd")) if on_front(rows, m, field)),
    ]


def ordered(rows: Sequence[Measured], steps: int) -> list[Measured]:
    """The rows of one table, the dearest first; the uncached run on top."""
    return sorted((m for m in rows if m.steps == steps), key=lambda m: (m.row != UNCACHED, -m.cost))


def rich_table(rows: Sequence[Measured], steps: int) -> Table:
    """The table for the terminal."""
    table = Table(title=f"DDIM {steps} steps, guidance 1.5; FD (Fashion-MNIST CNN)")
    for column in COLUMNS:
        table.add_column(column, justify="left" if column == "row" else "right", no_wrap=column == "row")
    for m in ordered(rows, steps):
        table.add_row(*cells(rows, m))
    return table


def markdown(rows: Sequence[Measured], steps: int) -> str:
    """The table for a document."""
    lines = [COLUMNS, ("---", *["---:"] * (len(COLUMNS) - 1)), *(cells(rows, m) for m in ordered(rows, steps))]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def notes(rows: Sequence[Measured], arithmetic: str) -> str:
    """How the numbers came about; below every table."""
    where = timing.machine()
    curve = "in the row’s measured time" if all(m.speedup for m in rows) else "with the row’s MACs"
    return (
        "GMAC per image, both guidance branches. PSNR from the uncached images in the same noise: mean over "
        "images. FD (Fashion-MNIST CNN) from the 10,000 test images: mean over the seeds, the same for all rows "
        f"of a table. PSNR and FD, fewer steps: what plain DDIM reaches {curve}, between the two nearest counts. "
        "Milliseconds: the median pace of the uncached runs that rows were measured beside, over a row's speedup. "
        "Front: no cheaper row is as good. DPM-Solver++ converges to other images than DDIM's, so FD tells how "
        "good it is. "
        f"{arithmetic}, {where['processor']}, {where['threads']} thread(s), torch {where['torch']}."
    )


def plot(rows: Sequence[Measured], steps: int, path: Path) -> None:
    """Time against FD and against PSNR; fewer steps as a line."""
    own = [m for m in rows if m.steps == steps]
    figure = Figure(figsize=(13, 5.6), dpi=110, layout="constrained")
    panels = figure.subplots(1, 2)
    cost = "measured time" if all(m.speedup for m in own) else "MACs"
    labels = {"mean_fd": "FD (Fashion-MNIST CNN): lower is better", "mean_psnr": "PSNR, dB: higher is better"}
    for axes, (field, label) in zip(panels, labels.items(), strict=True):
        _panel(axes, own, field)
        axes.set_ylabel(label)
        axes.set_xlabel(f"{cost}, share of the uncached run")
    figure.legend(*panels[0].get_legend_handles_labels(), loc="outside right upper", fontsize=8, frameon=False)
    samples = max((m.samples for m in own), default=0)
    figure.suptitle(f"Reference model, DDIM {steps} steps, guidance 1.5: {samples} samples per seed", fontsize=11)
    figure.savefig(path, facecolor="white")


def _panel(axes: Axes, rows: Sequence[Measured], field: str) -> None:
    for number, family in enumerate(dict.fromkeys(m.row.family for m in rows)):
        members = sorted((m for m in rows if m.row.family == family), key=lambda m: m.cost)
        shown = [m for m in members if math.isfinite(getattr(m, field))]
        x, y = [m.cost for m in shown], [getattr(m, field) for m in shown]
        if family == FEWER or family.startswith(MULTISTEP):
            axes.plot(x, y, "k.-" if family == FEWER else f"C{number % 10}.--", lw=1, ms=4, label=family)
            for m, *at in zip(shown, x, y, strict=True):
                axes.annotate(str(m.plan.num_steps), at, (0, -9), textcoords="offset points", fontsize=6.5, ha="center")
        else:
            style = {"marker": MARKERS[number % len(MARKERS)], "color": f"C{number % 10}", "ls": "none", "ms": 6}
            axes.plot(x, y, **style, alpha=0.85, label=family)
    if field == "mean_fd":
        for m in rows:
            axes.plot([m.cost] * 2, [min(m.fd.values()), max(m.fd.values())], color="#999999", lw=0.8, zorder=0)
        axes.set_yscale("log")
        for axis_part in ("major", "minor"):
            getattr(axes.yaxis, f"set_{axis_part}_formatter")(FuncFormatter(lambda value, _: f"{value:.3g}"))
    axes.grid(alpha=0.25, which="both")


def report(entries: Sequence[Any], args: argparse.Namespace, console: Console) -> None:
    """Print the tables; with a folder for results, write tables, plots and numbers there too."""
    arithmetic = f"{args.dtype}, packed weights" if args.freeze else args.dtype
    wanted = (args.samples, args.seeds) if args.what == "report" else (None, None)
    rows = measured(entries, wanted[0], args.chunk, wanted[1])
    for steps in args.steps:
        console.print(rich_table(rows, steps))
    missing = {(e.steps, e.row.name) for e in entries} - {(m.steps, m.row.name) for m in rows}
    if missing:
        names = ", ".join(f"{name} ({steps})" for steps, name in sorted(missing))
        console.print(f"not in the tables, for want of images: {names}")
    console.print(notes(rows, arithmetic), style="dim")
    if args.results is None:
        return
    args.results.mkdir(parents=True, exist_ok=True)
    stem = "ablation" if args.ablation else "quality-core" if args.core else "quality"
    stem += "" if args.dtype == "float32" else f"-{args.dtype}"
    for steps in args.steps:
        plot(rows, steps, args.results / f"{stem}-{steps}.png")
    text = "\n\n".join(f"## {steps} steps\n\n{markdown(rows, steps)}" for steps in args.steps)
    (args.results / f"{stem}.md").write_text(f"{text}\n\n{notes(rows, arithmetic)}\n")
    record = {
        **provenance(),
        "settings": json.loads((args.out / "settings.json").read_text()),
        "rows": [m.as_dict() for m in rows],
    }
    (args.results / f"{stem}.json").write_text(json.dumps(record, indent=1) + "\n")
    console.print(f"wrote {stem}.md, {stem}.json and the plots to {args.results}")
