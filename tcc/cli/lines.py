"""The rows of `tcc bench` and `benchmarks/peers.py`: what is known of a method, as table, JSON and plot."""

from __future__ import annotations

import math
import re
import textwrap
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from rich.markup import escape
from rich.table import Table

__all__ = ["Line", "failures", "front", "markdown", "plot", "table"]

UNCACHED = "uncached"
_MARKERS = "osD^v<>Pp*Xh8d"
_FILLED: dict[str, Literal["none", "left"]] = {"eager": "none", "compiled blocks": "left"}


@dataclass(frozen=True, kw_only=True)
class Line:
    """One row: what was measured of a method, or why nothing was. None is what is not known.

    Attributes:
        method: its name, without its mode.
        family: what it counts as in the plot.
        package: whose it is.
        mode: how it runs: `eager`, `torch.compile`, `compiled blocks` or `tcc`.
        steps: its denoising steps.
        seconds: for the batch; medians of every step, summed.
        seconds_p90: the same of 90th percentiles.
        speedup: over the uncached model under `torch.compile`.
        macs: of one image (or row), all steps, both guidance branches where there are two.
        bound: the speedup that the MACs allow; what folded timesteps save is not in it.
        psnr: dB to the uncached images in the same noise, mean over images; infinite where they are identical.
        error: relative distance from the uncached result: the norm of the difference over that of the result.
        fd: Frechet distance in the shipped classifier.
        cache_bytes: what it keeps from step to step, for the batch: slots, and what is folded, of tcc's plans.
        peak_bytes: weights, and the most that a run allocated beyond what was there before.
        compile_seconds: what compiling took; what an earlier row compiled is not compiled again.
        graph_breaks: of `torch.compile`.
        recompiles: of `torch.compile`.
        rounds: how often it was run for its time.
        reason: why it was not measured.
        process: which one measured it, where a table has rows of several: their seconds do not compare, and speedups
            are over the uncached model of the same process.
    """

    method: str
    family: str
    package: str
    mode: str
    steps: int
    seconds: float | None = None
    seconds_p90: float | None = None
    speedup: float | None = None
    macs: float | None = None
    bound: float | None = None
    psnr: float | None = None
    error: float | None = None
    fd: float | None = None
    cache_bytes: int | None = None
    peak_bytes: int | None = None
    compile_seconds: float | None = None
    graph_breaks: int | None = None
    recompiles: int | None = None
    rounds: int = 0
    reason: str | None = None
    process: int | None = None

    @property
    def key(self) -> str:
        """What tells it from the other rows of its table."""
        return f"{self.method}, {self.mode}"

    @property
    def realised_share(self) -> float | None:
        """Measured speedup / bound."""
        return self.speedup / self.bound if self.speedup and self.bound else None

    @property
    def closeness(self) -> float | None:
        """How close to the uncached result, in dB: the PSNR of images, else the ratio of the result to its error."""
        if self.psnr is not None or self.error is None:
            return self.psnr
        return -20 * math.log10(self.error) if self.error else math.inf

    def as_dict(self) -> dict[str, Any]:
        """The row for programs: the attributes, `realised_share` and `identical`; JSON has no infinity."""
        identical = self.psnr is not None and math.isinf(self.psnr)
        found = asdict(self) | {"realised_share": self.realised_share, "identical": identical}
        return found | {"psnr": None if identical else self.psnr}

    @classmethod
    def of_dict(cls, row: dict[str, Any]) -> Line:
        """The row that `as_dict` wrote."""
        given = {name: value for name, value in row.items() if name not in ("realised_share", "identical")}
        return cls(**given | ({"psnr": math.inf} if row["identical"] else {}))


def _number(form: str, scale: float = 1.0, unit: str = "") -> Callable[[float | None], str]:
    return lambda value: "" if value is None else format(value / scale, form) + unit


def _decibels(value: float | None) -> str:
    return "identical" if value is not None and math.isinf(value) else _number(".1f")(value)


#: The columns after method, mode and steps: heading, attribute, how it is written.
_COLUMNS: tuple[tuple[str, str, Callable[[float | None], str]], ...] = (
    ("process", "process", _number(".0f")),
    ("s per batch", "seconds", _number(".3f")),
    ("p90", "seconds_p90", _number(".3f")),
    ("speedup", "speedup", _number(".2f", unit="x")),
    ("GMAC", "macs", _number(".2f", 1e9)),
    ("bound", "bound", _number(".2f", unit="x")),
    ("realised share", "realised_share", _number(".2f")),
    ("PSNR dB", "psnr", _decibels),
    ("error", "error", _number(".1e")),
    ("FD", "fd", _number(".2f")),
    ("cache MiB", "cache_bytes", _number(".1f", 2**20)),
    ("peak MiB", "peak_bytes", _number(".0f", 2**20)),
    ("compile s", "compile_seconds", _number(".1f")),
    ("graph breaks", "graph_breaks", _number(".0f")),
    ("recompiles", "recompiles", _number(".0f")),
)


def _grid(lines: Sequence[Line]) -> tuple[list[str], list[list[str]]]:
    """Headings and cells; columns without a number are left out."""
    known = [column for column in _COLUMNS if any(getattr(line, column[1]) is not None for line in lines)]
    rows = [
        [line.method, line.mode, str(line.steps), *(show(getattr(line, name)) for _, name, show in known)]
        for line in lines
    ]
    return ["method", "mode", "steps", *(heading for heading, _, _ in known)], rows


def table(lines: Sequence[Line], title: str) -> Table:
    """The table for the terminal; a row that was not measured is empty: `failures` says why."""
    headings, rows = _grid(lines)
    shown = Table(title=title, box=None, padding=(0, 1, 0, 0))
    for heading in headings:
        words, broken = heading in ("method", "mode"), heading.replace(" ", "\n")
        shown.add_column(broken, justify="left" if words else "right", no_wrap=heading != "method")
    for line, row in zip(lines, rows, strict=True):
        shown.add_row(escape(row[0]), *row[1:], style="" if line.reason is None else "dim")
    return shown


def markdown(lines: Sequence[Line]) -> str:
    """The table for a document, and why rows have no numbers."""
    headings, rows = _grid([line for line in lines if line.reason is None])
    grid = [headings, ["---", "---", *["---:"] * (len(headings) - 2)], *rows]
    return "\n".join(f"| {' | '.join(row)} |" for row in grid) + "\n\n" + failures(lines)


def failures(lines: Sequence[Line]) -> str:
    """Below the table: what was not measured, and why. One line for all methods with the same reason."""
    reasons: dict[str, list[str]] = {}
    for line in lines:
        if line.reason is not None:
            reasons.setdefault(line.reason, []).append(f"{line.method} ({line.mode})")
    return "\n".join(f"not measured: {', '.join(names)}: {reason}" for reason, names in reasons.items())


def front(lines: Sequence[Line]) -> list[Line]:
    """The rows that no other row beats in both speedup and closeness, the slowest first."""
    known = [(line.speedup, line.closeness, line) for line in lines]
    found = [(speed, close, line) for speed, close, line in known if speed is not None and close is not None]
    best = [
        (speed, line)
        for speed, close, line in found
        if not any(s >= speed and c >= close and (s, c) != (speed, close) for s, c, _ in found)
    ]
    return [line for _, line in sorted(best, key=lambda pair: pair[0])]


def plot(lines: Sequence[Line], title: str, path: Path) -> None:
    """Speedup against closeness: hollow where eager, half filled where blocks are compiled; the front as a line.

    What a row has beside its family's name stands at its fastest mode.
    """
    figure = Figure(figsize=(11, 6), dpi=110, layout="constrained")
    axes = figure.subplots()
    shown = [
        line
        for line in lines
        if line.family != UNCACHED and line.speedup is not None and math.isfinite(line.closeness or math.inf)
    ]
    for number, family in enumerate(dict.fromkeys(line.family for line in shown)):
        for mode in dict.fromkeys(line.mode for line in shown if line.family == family):
            members = [line for line in shown if (line.family, line.mode) == (family, mode)]
            color = f"C{number % 10}"
            axes.plot(
                *_points(members), ls="none", ms=7, marker=_MARKERS[number % len(_MARKERS)], color=color,
                fillstyle=_FILLED.get(mode, "full"), label=f"{family}, {mode}",
            )  # fmt: skip
        _write_settings(axes, [line for line in shown if line.family == family], f"C{number % 10}")
    if len(best := front(shown)) > 1:
        axes.plot(*_points(best), "k:", lw=1, zorder=0, label="front")
    images = any(line.psnr is not None for line in shown)
    axes.set_xlabel("speedup over the uncached model under torch.compile")
    axes.set_ylabel("PSNR to the uncached images, dB" if images else "norm of the uncached result over its error's, dB")
    axes.set_title(textwrap.fill(title, 100), fontsize=9)
    axes.grid(alpha=0.25)
    figure.legend(loc="outside right upper", fontsize=7, frameon=False)
    figure.savefig(path, facecolor="white")


def _write_settings(axes: Axes, lines: Sequence[Line], color: str) -> None:
    """What tells the rows of a family apart, once for all modes of a method."""
    fastest = {line.method: line for line in sorted(lines, key=lambda line: line.speedup or 0.0)}
    for line, x, y in zip(fastest.values(), *_points(list(fastest.values())), strict=True):
        axes.annotate(
            textwrap.shorten(_own_part(line), 32), (x, y), (0, 7),
            textcoords="offset points", fontsize=6, color=color, ha="center",
        )  # fmt: skip


def _own_part(line: Line) -> str:
    """What a method's name has beside its family's, which also says whether it repeats another package's steps."""
    name = re.sub(r", \S+'s? steps$", "", line.method)
    family = re.split(r"[\s,]+", line.family)
    return " ".join(word for word in name.split() if word.rstrip(",") not in family).rstrip(",")


def _points(lines: Sequence[Line]) -> tuple[list[float], list[float]]:
    """Where the rows stand in the plot."""
    return [line.speedup or 0.0 for line in lines], [line.closeness or 0.0 for line in lines]
