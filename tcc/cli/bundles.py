"""A bundle's manifest as tables."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from itertools import groupby

from rich.markup import escape
from rich.table import Table

from tcc.export.manifest import Input, Manifest, TensorSpec

__all__ = ["bundle_tables", "made_for", "ranges"]


def bundle_tables(name: str, manifest: Manifest) -> Iterator[Table]:
    """What a bundle takes, returns and keeps; its graphs; which step runs which."""
    tools = ", ".join(f"{tool} {version}" for tool, version in manifest.tools.items())
    yield _tensors(
        f"{name}: {made_for(manifest)}, {manifest.bytes / 2**20:.1f} MiB ({tools})",
        [("input", manifest.inputs), ("output", manifest.outputs), ("slot", manifest.slots)],
    )
    calls = manifest.calls_per_step
    branches = f", {calls} calls each: a session (new_session) for each guidance branch" if calls > 1 else ""
    table = Table(title=f"{len(manifest.graphs)} graphs for {len(manifest.steps)} steps{branches}")
    for column in ("graph", "file", "operators", "GMAC", "reads", "stores", "steps"):
        table.add_column(column, justify="left" if column in ("file", "steps") else "right")
    slots = {spec.name for spec in manifest.slots}
    for number, graph in enumerate(manifest.graphs):
        steps = [index for index, step in enumerate(manifest.steps) if step.graph == number]
        file = f"{graph.file}:{graph.entry}" if graph.entry else graph.file
        counts = (f"{graph.macs / 1e9:.4g}", str(len(slots & set(graph.inputs))), str(len(graph.stores)))
        table.add_row(str(number), escape(file), str(graph.operators), *counts, ranges(steps))
    yield table


def made_for(manifest: Manifest) -> str:
    """The target and what runs it; engines have weights of their own."""
    if manifest.arch:
        return f"{manifest.target} for {manifest.arch}, weights in each engine"
    return f"{manifest.target} for {manifest.device}"


def ranges(numbers: Iterable[int]) -> str:
    """`0-2, 5` for 0, 1, 2, 5."""
    parts = []
    for _, group in groupby(enumerate(sorted(numbers)), key=lambda pair: pair[1] - pair[0]):
        run = [number for _, number in group]
        parts.append(str(run[0]) if len(run) == 1 else f"{run[0]}-{run[-1]}")
    return ", ".join(parts)


def _tensors(title: str, groups: list[tuple[str, tuple[TensorSpec, ...]]]) -> Table:
    table = Table(title=escape(title))
    for column in ("what", "name", "shape", "dtype", "KiB", "meaning"):
        table.add_column(column, justify="right" if column == "KiB" else "left")
    for what, specs in groups:
        for spec in specs:
            cells = (what, spec.name, " x ".join(map(str, spec.shape)), spec.dtype, f"{spec.bytes / 1024:.1f}")
            table.add_row(*map(escape, (*cells, _meaning(spec) if isinstance(spec, Input) else "")))
    return table


def _meaning(spec: Input) -> str:
    """What an input means, its range, and the names of its dimensions."""
    bounds = f", 0 to {spec.values - 1}" if spec.values else ""
    axes = ", ".join(axis or "?" for axis in spec.axes)
    return f"{spec.meaning}{bounds} [{axes}]"
