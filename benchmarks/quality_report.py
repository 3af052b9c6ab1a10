"""Tables, plots and JSON from the store of `benchmarks/quality.py`."""

from __future__ import annotations

import argparse
import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, NullLocator
from provenance import provenance
from quality_measured import Measured, from_file, from_store, joined, left_out, of_same_seeds, timed
from quality_rows import FEWER, MULTISTEP, RANDOM, UNCACHED, ablation, comparison
from rich.console import Console
from rich.table import Table

from tcc import timing

COLUMNS = (
    "row", "steps", "GMAC", "bound", "ms per image", "speedup", "PSNR dB", "PSNR min..max", "FD", "FD min..max",
    "seeds x samples", "PSNR, fewer steps", "FD, fewer steps", "front",
)  # fmt: skip
MARKERS = "osD^v<>Pp*Xhd"  # 13, and 10 colours: no two methods have both


def at_equal_cost(rows: Sequence[Measured], wanted: Measured, field: str) -> float | None:
    """What fewer steps reach in a row's time, between the two nearest counts; None outside the curve."""
    curve = sorted(
        (m.cost, getattr(m, field))
        for m in rows
        if m.family == FEWER and m.steps == wanted.steps and math.isfinite(getattr(m, field))
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
    fewer = (None if m.family == FEWER else at_equal_cost(rows, m, field) for field in ("mean_psnr", "mean_fd"))
    return [
        m.row,
        str(m.run_steps),
        f"{m.macs * 2 / 1e9:.2f}",
        f"{m.bound:.2f}x",
        f"{m.seconds_per_image * 1e3:.1f}" if m.seconds_per_image else "",
        f"{m.speedup:.2f}x" if m.speedup else "",
        f"{m.mean_psnr:.2f}" if math.isfinite(m.mean_psnr) else "reference",
        spread(m.psnr, 2) if math.isfinite(m.mean_psnr) else "",
        f"{m.mean_fd:.3f}",
        spread(m.fd, 3),
        f"{len(m.fd)} x {m.samples}",
        *("" if value is None else f"{value:.{digits}f}" for digits, value in zip((2, 3), fewer, strict=True)),
        ", ".join(name for name, field in (("PSNR", "mean_psnr"), ("FD", "mean_fd")) if on_front(rows, m, field)),
    ]


def spread(by_seed: Mapping[str, float], digits: int) -> str:
    """The least and the most of the seeds."""
    return f"{min(by_seed.values()):.{digits}f}..{max(by_seed.values()):.{digits}f}"


def ordered(rows: Sequence[Measured], steps: int) -> list[Measured]:
    """The rows of one table, the dearest first; the uncached run on top."""
    return sorted((m for m in rows if m.steps == steps), key=lambda m: (m.row != UNCACHED.name, -m.cost))


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
    processors = ", ".join(sorted({made["processor"] for m in rows for made in m.sampled.values()}))
    curve = "in the row’s measured time" if all(m.speedup for m in rows) else "with the row’s MACs"
    return (
        "GMAC per image, both guidance branches. PSNR from the uncached images in the same noise: mean over "
        "images. FD (Fashion-MNIST CNN) from the 10,000 test images: mean over the seeds, the same for all rows "
        f"of a table. PSNR and FD, fewer steps: what plain DDIM reaches {curve}, between the two nearest counts. "
        "Milliseconds: the median pace of the uncached runs that rows were measured beside, over a row's speedup. "
        "Front: no cheaper row is as good. DPM-Solver++ converges to other images than DDIM's, so FD tells how "
        "good it is. "
        f"{arithmetic}, {processors}, {where['threads']} thread(s), torch {where['torch']}."
    )


def plot(rows: Sequence[Measured], steps: int, path: Path) -> None:
    """Time against FD and against PSNR; fewer steps as a line."""
    own = [m for m in rows if m.steps == steps]
    figure = Figure(figsize=(15, 6.5), dpi=110, layout="constrained")
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
    looks, lines = _looks(rows), 0
    for family in dict.fromkeys(m.family for m in rows):
        members = sorted((m for m in rows if m.family == family), key=lambda m: m.cost)
        shown = [m for m in members if math.isfinite(getattr(m, field))]
        lists = [m.cost for m in shown], [getattr(m, field) for m in shown]
        at = list(zip(*lists, strict=True))
        marker, color = looks[_method(family)]
        if family == FEWER or family.startswith(MULTISTEP):
            color, style = ("k", "-") if family == FEWER else (color, "--")
            axes.plot(*lists, color=color, ls=style, marker=".", lw=1, ms=4, label=family)
            _write(axes, [str(m.run_steps) for m in shown], at, color, ((0, -9), (9, 2), (-9, -6))[lines % 3])
            lines += 1
        else:
            hollow = {"fillstyle": "none"} if family.endswith(RANDOM) else {"alpha": 0.85}
            axes.plot(*lists, marker=marker, color=color, ls="none", ms=6, label=family, **hollow)
            _write(axes, [] if hollow.get("fillstyle") else [_setting(m) for m in shown], at, color, (0, 6))
    if field == "mean_fd":
        for m in rows:
            axes.plot([m.cost] * 2, [min(m.fd.values()), max(m.fd.values())], color="#999999", lw=0.8, zorder=0)
        axes.set_yscale("log")
        axes.yaxis.set_major_locator(LogLocator(subs=(1, 1.5, 2, 3, 4, 5, 6, 8)))
        axes.yaxis.set_minor_locator(NullLocator())
        axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:.3g}"))
    axes.grid(alpha=0.25)


def _looks(rows: Sequence[Measured]) -> dict[str, tuple[str, str]]:
    """Marker and colour of every method, the same in all pictures."""
    planned = (row.family for row in (*comparison(50), *ablation(50)))
    methods = dict.fromkeys(map(_method, (*planned, *(m.family for m in rows))))
    return {method: (MARKERS[number % len(MARKERS)], f"C{number % 10}") for number, method in enumerate(methods)}


def _method(family: str) -> str:
    """What a control at random stands beside."""
    return family.removesuffix(RANDOM)


def _setting(m: Measured) -> str:
    """What tells a row from others of its family: the words with numbers."""
    words = (word.strip(",") for word in m.row.split() if word not in m.family.split())
    return " ".join(word for word in words if any(map(str.isdigit, word)))


def _write(
    axes: Axes, texts: Sequence[str], at: Sequence[tuple[float, float]], color: str, offset: tuple[int, int]
) -> None:
    for text, point in zip(texts, at, strict=False):
        axes.annotate(
            text, point, offset, textcoords="offset points", fontsize=6, color=color, ha="center", va="center"
        )


def report(entries: Sequence[Any], args: argparse.Namespace, console: Console) -> None:
    """Print the tables; with a folder for results, write tables, plots and numbers there too."""
    arithmetic = f"{args.dtype}, packed weights" if args.freeze else args.dtype
    wanted = (args.samples, args.seeds) if args.what == "report" else (None, None)
    settings = json.loads((args.out / "settings.json").read_text())
    rows = from_store(entries, wanted[0], args.chunk)
    for path in args.earlier:
        rows = joined(from_file(path, settings), rows)
    known = [m for m in rows if m.steps in args.steps]
    rows = timed(of_same_seeds(known, wanted[1]))
    for steps in args.steps:
        console.print(rich_table(rows, steps))
    missing = {(e.steps, e.row.name) for e in entries} - {(m.steps, m.row) for m in rows}
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
        "settings": settings,
        "rows": [m.as_dict() for m in rows],
        "other_seeds": [m.as_dict() for m in left_out(known, rows)],
    }
    (args.results / f"{stem}.json").write_text(json.dumps(record, indent=1) + "\n")
    console.print(f"wrote {stem}.md, {stem}.json and the plots to {args.results}")
