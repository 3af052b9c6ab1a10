"""The rows of `benchmarks/peers.py`: table, JSON and plot."""

from __future__ import annotations

import math
import textwrap
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure
from rich.markup import escape
from rich.table import Table

MARKERS = "osD^v<>Pp*Xh8d"
COLUMNS = (
    "method", "mode", "steps", "s per batch", "p90", "speedup", "GMAC", "bound", "realised share", "PSNR dB", "FD",
    "cache MiB", "peak MiB", "compile s", "graph breaks", "recompiles",
)  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class Line:
    """One row: what was measured of a method, or why nothing was. None is what is not known.

    Attributes:
        method: its name, without its mode.
        family: what it counts as in the plot.
        package: whose it is.
        mode: `eager`, `torch.compile` or `tcc`.
        steps: its denoising steps.
        seconds: for the batch; medians of every step, summed.
        seconds_p90: the same of 90th percentiles.
        speedup: over the uncached model under `torch.compile`.
        macs: of one image, all steps and both guidance branches.
        bound: the speedup that the MACs allow.
        psnr: dB to the uncached images in the same noise, mean over images; infinite where they are identical.
        fd: Frechet distance in the shipped classifier.
        cache_bytes: what it keeps from step to step, for the batch.
        peak_bytes: of the accelerator, weights included.
        compile_seconds: what compiling took.
        graph_breaks: of `torch.compile`.
        recompiles: of `torch.compile`.
        rounds: how often it was run for its time.
        reason: why it was not measured.
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
    fd: float | None = None
    cache_bytes: int | None = None
    peak_bytes: int | None = None
    compile_seconds: float | None = None
    graph_breaks: int | None = None
    recompiles: int | None = None
    rounds: int = 0
    reason: str | None = None

    @property
    def realised_share(self) -> float | None:
        """Measured speedup / bound."""
        return self.speedup / self.bound if self.speedup and self.bound else None

    def as_dict(self) -> dict[str, Any]:
        """The row for programs: the attributes, `realised_share` and `identical`; JSON has no infinity."""
        identical = self.psnr is not None and math.isinf(self.psnr)
        found = asdict(self) | {"realised_share": self.realised_share, "identical": identical}
        return found | {"psnr": None if identical else self.psnr}


def table(lines: Sequence[Line], title: str) -> Table:
    """The table for the terminal; a row that was not measured says why in place of its numbers."""
    shown = Table(title=title)
    for column in COLUMNS:
        text = column in ("method", "mode")
        shown.add_column(column, justify="left" if text else "right", no_wrap=column == "method")
    for line in lines:
        if line.reason is None:
            shown.add_row(line.method, line.mode, str(line.steps), *_numbers(line))
        else:
            shown.add_row(line.method, line.mode, str(line.steps), *[""] * (len(COLUMNS) - 3), style="dim")
    return shown


def failures(lines: Sequence[Line]) -> str:
    """Below the table: what was not measured, and why. One line for all methods with the same reason."""
    reasons: dict[str, list[str]] = {}
    for line in lines:
        if line.reason is not None:
            reasons.setdefault(line.reason, []).append(f"{line.method} ({line.mode})")
    return "\n".join(f"not measured: {', '.join(names)}: {reason}" for reason, names in reasons.items())


def _numbers(line: Line) -> list[str]:
    def show(value: float | None, form: str, scale: float = 1.0) -> str:
        return "" if value is None else format(value / scale, form)

    return [
        show(line.seconds, ".3f"),
        show(line.seconds_p90, ".3f"),
        show(line.speedup, ".2f") + ("x" if line.speedup else ""),
        show(line.macs, ".2f", 1e9),
        show(line.bound, ".2f") + ("x" if line.bound else ""),
        show(line.realised_share, ".2f"),
        "identical" if line.psnr is not None and math.isinf(line.psnr) else show(line.psnr, ".1f"),
        show(line.fd, ".2f"),
        show(line.cache_bytes, ".1f", 2**20),
        show(line.peak_bytes, ".0f", 2**20),
        show(line.compile_seconds, ".1f"),
        show(line.graph_breaks, ".0f"),
        show(line.recompiles, ".0f"),
    ]


def markdown(lines: Sequence[Line]) -> str:
    """The table for a document, and why rows have no numbers."""
    rows = [[line.method, line.mode, str(line.steps), *_numbers(line)] for line in lines if line.reason is None]
    grid = [COLUMNS, ("---", "---", *["---:"] * (len(COLUMNS) - 2)), *rows]
    return "\n".join(f"| {' | '.join(row)} |" for row in grid) + "\n\n" + failures(lines)


def front(lines: Sequence[Line]) -> list[Line]:
    """The rows that no other row beats in both speedup and PSNR, the slowest first."""
    known = [(line.speedup, line.psnr, line) for line in lines if line.speedup is not None and line.psnr is not None]
    best = [
        (speedup, line)
        for speedup, psnr, line in known
        if not any(s >= speedup and p >= psnr and (s, p) != (speedup, psnr) for s, p, _ in known)
    ]
    return [line for _, line in sorted(best, key=lambda pair: pair[0])]


def plot(lines: Sequence[Line], title: str, path: Path) -> None:
    """Speedup against PSNR: filled where compiled, hollow where eager; the front as a line. Nothing uncached."""
    figure = Figure(figsize=(9.5, 5.6), dpi=110, layout="constrained")
    axes = figure.subplots()
    known = [line for line in lines if line.psnr is not None and math.isfinite(line.psnr) and line.speedup is not None]
    shown = [line for line in known if line.family != "uncached"]
    for number, family in enumerate(dict.fromkeys(line.family for line in shown)):
        for mode in dict.fromkeys(line.mode for line in shown if line.family == family):
            members = [line for line in shown if (line.family, line.mode) == (family, mode)]
            color = f"C{number % 10}"
            axes.plot(
                [line.speedup for line in members], [line.psnr for line in members], ls="none", ms=7,
                marker=MARKERS[number % len(MARKERS)], color=color, mfc="none" if mode == "eager" else color,
                label=f"{family}, {mode}",
            )  # fmt: skip
    best = front(shown)
    axes.plot([line.speedup for line in best], [line.psnr for line in best], "k:", lw=1, zorder=0, label="front")
    axes.set_xlabel("speedup over the uncached model under torch.compile")
    axes.set_ylabel("PSNR to the uncached images, dB")
    figure.suptitle(textwrap.fill(title, 100), fontsize=9)
    axes.grid(alpha=0.25)
    figure.legend(loc="outside right upper", fontsize=7, frameon=False)
    figure.savefig(path, facecolor="white")


def escaped(text: str) -> str:
    """Text in which rich sees no markup."""
    return escape(text)
