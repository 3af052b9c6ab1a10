"""The coverage of diffusers' transformer classes as tables: for a terminal, a file, and the README.

Everything is made from `coverage.json`, and from the files of other backends where these were run too.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich.table import Table

COLUMNS = ("captured", "sites", "plan", "matches")
HEADS = ("class", "captured", "blocks", "prunable", "plan (MACs)", "matches", "why not; what is left out")
#: The backends with a column of their own, and its head.
OTHERS = {"inductor": "Inductor: same bits, error", "onnx": "ONNX Runtime: error"}
BEGIN, END = "<!-- coverage: begin -->", "<!-- coverage: end -->"
#: How much of a reason the README shows.
LONG = 160

Rows = dict[str, Any]


def results_name(backend: str) -> str:
    """The file of a backend's rows."""
    return "coverage.json" if backend == "eager" else f"coverage-{backend}.json"


def read(folder: Path, backend: str = "eager") -> dict[str, Any]:
    """The rows of a backend with versions and commit; {} where it was not run."""
    path = folder / results_name(backend)
    found: dict[str, Any] = json.loads(path.read_text()) if path.is_file() else {}
    return found


def whole(row: Rows) -> bool:
    """Whether all four columns hold."""
    return all(row[column] for column in COLUMNS)


def summary(rows: Sequence[Rows]) -> str:
    """How many classes hold in each column."""
    counts = ", ".join(f"{column} {sum(row[column] for row in rows)}" for column in COLUMNS)
    return f"{sum(map(whole, rows))} of {len(rows)} classes through all four columns ({counts})"


def cells(row: Rows) -> list[str]:
    """The row as text."""
    d = row["details"]
    plan = ", ".join(d.get("actions", ())) + (f" ({d['pruned_macs']:.2f})" if "pruned_macs" in d else "")
    sites, matches = f"{_mark(row['sites'])} {_blocks(d)}", f"{_mark(row['matches'])} {_error(d)}"
    planned = f"{_mark(row['plan'])} {plan}"
    return [row["name"], _mark(row["captured"]), sites, _prunable(d), planned, matches, _why(row)]


def _mark(good: bool) -> str:
    return "yes" if good else "no"


def _blocks(d: dict[str, Any]) -> str:
    return f"{d['found']}/{d['blocks']}" if "found" in d else ""


def _prunable(d: dict[str, Any]) -> str:
    return f"{d['prunable']}/{d['branches']}" if "prunable" in d else ""


def _error(d: dict[str, Any]) -> str:
    return f"{d['error']:.0e}" if "error" in d else ""


def _why(row: Rows) -> str:
    return "; ".join(filter(None, (row["why"], row["note"])))


def table(rows: Sequence[Rows]) -> Table:
    """The table for a terminal."""
    found = Table(*HEADS, "s", title=summary(rows))
    for row in rows:
        found.add_row(*cells(row), f"{row['seconds']:.1f}")
    return found


def markdown(eager: dict[str, Any], others: dict[str, dict[str, Any]]) -> str:
    """The table as a file."""
    about = [line for found in (eager, *others.values()) if found for line in (_about(found), "")]
    title = "# Which transformer classes of diffusers run with a plan"
    note = "Small random models; the columns are explained in the script."
    return "\n".join([title, "", *about, note, "", *_lines(HEADS, map(cells, eager["rows"])), ""])


def _about(found: dict[str, Any]) -> str:
    backend = "" if found["backend"] == "eager" else f" --backend {found['backend']}"
    command = f"python benchmarks/model_coverage.py{backend}"
    versions = f"diffusers {found['diffusers']}, torch {found['torch']}, backend `{found['backend']}`, float32"
    return f"`{command}`, {versions}, commit {found['commit']}: {found['summary']}."


def _lines(heads: Sequence[str], rows: Any) -> list[str]:
    texts = [[cell.replace("|", "\\|") for cell in row] for row in rows]
    return [f"| {' | '.join(row)} |" for row in (heads, ["---"] * len(heads), *texts)]


def block(eager: dict[str, Any], others: dict[str, dict[str, Any]]) -> str:
    """The table for the README, in a block that opens at a click.

    Of each class: its blocks that were found, the branches whose tokens can be pruned, the MACs of a step that prunes
    half of their tokens, the error, and what is missing. Of Inductor: whether the uncached plan has the bits of the
    compiled original, and the error. Of ONNX Runtime: the error.
    """
    heads = ["class", "blocks", "prunable branches", "pruned MACs", "error", "why not; what is left out"]
    rows = [[*_short(row), _shortened(_why(row))] for row in eager["rows"]]
    for backend, found in others.items():
        if not found:
            continue
        known = {row["name"]: row for row in found["rows"]}
        heads.insert(-1, OTHERS[backend])
        for row in rows:
            row.insert(-1, _other(backend, known.get(row[0])))
    title = f"All {len(rows)} classes, {sum(map(whole, eager['rows']))} of them through all columns"
    lines = [BEGIN, "<details>", f"<summary>{title}</summary>", "", *_lines(heads, rows), "", "</details>", END]
    return "\n".join(lines)


def _short(row: Rows) -> list[str]:
    d = row["details"]
    share = f"{d['pruned_macs']:.2f}" if "pruned_macs" in d else ""
    return [row["name"], _blocks(d), _prunable(d), share, _error(d)]


def _other(backend: str, row: Rows | None) -> str:
    if row is None:
        return ""
    error = _error(row["details"])
    if backend == "onnx":
        return error if row["matches"] else f"no, {error or row['stage']}"
    return f"{_mark(row['captured'])}, {error or row['stage']}"


def _shortened(text: str) -> str:
    return text if len(text) <= LONG else f"{text[:LONG]} ..."


def write_readme(path: Path, eager: dict[str, Any], others: dict[str, dict[str, Any]]) -> None:
    """Put the table between its two marks."""
    before, _, rest = path.read_text().partition(BEGIN)
    _, end, after = rest.partition(END)
    if not end:
        raise ValueError(f"{path} has no place for the table: {BEGIN} and {END}")
    path.write_text(before + block(eager, others) + after)
