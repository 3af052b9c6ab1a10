"""The waterfall's table: on the terminal, as Markdown, as JSON and as a plot."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure
from rich.console import Console
from rich.table import Table

COLUMNS = (
    "plan", "row", "I ms", "P ms", "run", "bound", "realised share", "compile s", "slot KiB", "folded KiB", "error",
)  # fmt: skip


def cells(line: dict[str, Any]) -> list[str]:
    """A row as text."""
    if line["as"]:
        return [line["plan"], line["row"], "as above", *[""] * (len(COLUMNS) - 3)]
    share = "" if line["plan"] == "uncached" else f"{line['realised share']:.3f}"
    seconds = f"{line['compile_seconds']:.1f}" if line["compile_seconds"] else ""
    return [
        line["plan"], line["row"], f"{line['I ms']:.1f}", "" if line["P ms"] is None else f"{line['P ms']:.1f}",
        f"{line['run']:.3f}x", f"{line['bound']:.3f}x", share, seconds, f"{line['slot_bytes'] / 1024:.0f}",
        f"{line['folded_bytes'] / 1024:.0f}", f"{line['error']:.0e}" if line["error"] else "",
    ]  # fmt: skip


def markdown(found: list[dict[str, Any]]) -> str:
    """The table for a document."""
    grid = [COLUMNS, ("---", "---", *["---:"] * (len(COLUMNS) - 2)), *map(cells, found)]
    return "\n".join(f"| {' | '.join(row)} |" for row in grid) + "\n"


def plot(found: list[dict[str, Any]], title: str, path: Path) -> None:
    """For every plan the realised share of its bound, rewrite by rewrite; a marker where there was something to do."""
    figure = Figure(figsize=(9, 5.2), dpi=110, layout="constrained")
    axes = figure.subplots()
    for plan in dict.fromkeys(line["plan"] for line in found if line["plan"] != "uncached"):
        own = [line for line in found if line["plan"] == plan]
        measured = [number for number, line in enumerate(own) if not line["as"]]
        shares = [line["realised share"] for line in own]
        axes.plot([line["row"] for line in own], shares, "o-", label=plan, markevery=measured)
    axes.axhline(1, color="k", lw=0.8, ls=":")
    axes.set_ylabel("speedup over compiled uncached / bound")
    for label in axes.get_xticklabels():
        label.set(rotation=25, ha="right", rotation_mode="anchor")
    axes.grid(alpha=0.25)
    figure.legend(fontsize=8, ncols=3, loc="outside lower center", frameon=False)
    figure.suptitle(title, fontsize=10)
    figure.savefig(path, facecolor="white")


def earlier_rows(path: Path, head: dict[str, Any], plans: list[str]) -> list[dict[str, Any]]:
    """The rows that the file at `path` has of other plans, where it tells the same commit, settings and machine."""
    if not path.exists() or head["commit"].endswith(("-changed", "unknown")):  # the code may be any
        return []
    known = json.loads(path.read_text())
    rows: list[dict[str, Any]] = known.pop("rows")
    alike = {**known, "command": ""} == {**head, "command": ""}
    return [row for row in rows if row["plan"] not in ("uncached", *plans)] if alike else []


def write(found: list[dict[str, Any]], head: dict[str, Any], title: str, path: Path) -> None:
    """JSON, Markdown and the plot."""
    path.with_suffix(".json").write_text(json.dumps({**head, "rows": found}, indent=1) + "\n")
    path.with_suffix(".md").write_text(f"{title}\n\n{markdown(found)}")
    plot(found, title, path.with_suffix(".png"))


def show(found: list[dict[str, Any]], title: str) -> None:
    """The table on the terminal."""
    table = Table(title=title)
    for column in COLUMNS:
        table.add_column(column, justify="left" if column in ("plan", "row") else "right")
    for line in found:
        table.add_row(*cells(line))
    Console(width=170).print(table)
