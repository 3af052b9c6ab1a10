"""What is known of the rows of `benchmarks/quality.py`: from its store, from an earlier results file, or from both."""

from __future__ import annotations

import json
import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from provenance import provenance
from quality_store import Store, digest

from tcc.metrics import Statistics, frechet_distance, real_statistics


@dataclass(frozen=True, kw_only=True)
class Measured:
    """What is known of a row.

    Attributes:
        row: its name.
        family: what it counts as in the plot.
        steps: the steps of the run that it is compared with.
        run_steps: the steps that it runs.
        control_of: the row whose counts it has, dealt out at random.
        policy: how its plan was made.
        plan: its plan's digest; None in files that do not tell.
        sampler: the name of its sampler.
        visited: the steps of the longer run that it visits, where those are not spread evenly.
        macs: of one image in one guidance branch.
        bound: the speedup that its MACs allow.
        samples: how many images of every seed the numbers are of.
        psnr: by seed, dB, mean over the images; infinite for the uncached run.
        fd: by seed.
        sampled: by seed, on what the images were sampled.
        seconds_per_image: None where a row of the tables has not been timed.
        speedup: measured; None likewise: costs are never times for some rows and MACs for others.
        timing: the raw times.
    """

    row: str
    family: str
    steps: int
    run_steps: int
    macs: int
    bound: float
    samples: int
    psnr: Mapping[str, float]
    fd: Mapping[str, float]
    sampled: Mapping[str, Any]
    control_of: str | None = None
    policy: Mapping[str, Any] | None = None
    plan: str | None = None
    sampler: str = "ddim"
    visited: Sequence[int] | None = None
    seconds_per_image: float | None = None
    speedup: float | None = None
    timing: Mapping[str, Any] | None = None

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

    @property
    def work(self) -> tuple[Any, ...]:
        """What must be equal for two measurements to be of the same row."""
        return self.row, self.steps, self.run_steps, self.macs, self.policy, self.sampler

    def of_seeds(self, seeds: set[str]) -> Measured:
        """The numbers of these seeds alone."""
        parts = {name: {s: v for s, v in getattr(self, name).items() if s in seeds} for name in _BY_SEED}
        return replace(self, **parts)

    def as_dict(self) -> dict[str, Any]:
        """For the JSON file, which knows no infinity."""
        return {**asdict(self), "psnr": {s: v if math.isfinite(v) else None for s, v in self.psnr.items()}}


_BY_SEED = ("psnr", "fd", "sampled")


def from_store(entries: Sequence[Any], samples: int | None, chunk: int) -> list[Measured]:
    """The numbers of all rows in a store, those of one table of the same number of images.

    Args:
        entries: the rows.
        samples: images of every seed; by default as many as every row with any has.
        chunk: images per file of the store.
    """
    counted = {entry.folder: Store.counted(entry.folder) for entry in entries}
    most = [max(found.values(), default=0) for found in counted.values()]
    chunks = samples // chunk if samples else min((n for n in most if n), default=0)
    full = {folder: sorted(s for s, n in found.items() if chunks and n >= chunks) for folder, found in counted.items()}
    here = {key: provenance()[key] for key in ("processor", "commit")}
    return [_measured(e, full[e.folder], chunks, chunks * chunk, here) for e in entries if full[e.folder]]


def _measured(entry: Any, seeds: Sequence[int], chunks: int, samples: int, here: Mapping[str, Any]) -> Measured:
    """One row."""
    parts = {str(seed): Store.gathered(entry.folder, seed, chunks) for seed in seeds}
    row, plan, real = entry.row, entry.plan, real_statistics()
    return Measured(
        row=row.name, family=row.family, steps=entry.steps, run_steps=plan.num_steps, control_of=row.control or None,
        policy=json.loads(json.dumps(dict(plan.policy))), plan=digest(plan), sampler=row.sampler,
        visited=entry.visited, macs=plan.macs, bound=entry.steps * plan.bound / plan.num_steps, samples=samples,
        psnr={seed: float(values.mean()) for seed, (_, values) in parts.items()},
        fd={seed: frechet_distance(Statistics.of(features), real) for seed, (features, _) in parts.items()},
        sampled=dict.fromkeys(parts, here), timing=Store.seconds(entry.folder),
    )  # fmt: skip


def from_file(path: Path, settings: Mapping[str, Any]) -> list[Measured]:
    """The rows of an earlier results file, with the seeds that its tables leave out.

    Args:
        path: written by `report`.
        settings: of the store that they are put beside.

    Raises:
        ValueError: there is no such file, or it was made with other settings.
    """
    if not path.is_file():
        raise ValueError(f"there is no {path}")
    record = json.loads(path.read_text())
    if record.get("settings") != settings:
        raise ValueError(f"{path} is of other settings: {record.get('settings')} instead of {settings}")
    here = {key: record.get(key) for key in ("processor", "commit")}
    shown, others = (
        [_read({"sampled": dict.fromkeys(row["fd"], here), **row}) for row in record.get(name, ())]
        for name in ("rows", "other_seeds")
    )
    return joined(shown, others)


def _read(row: Mapping[str, Any]) -> Measured:
    return Measured(**{**row, "psnr": {seed: math.inf if v is None else v for seed, v in row["psnr"].items()}})


def joined(earlier: Sequence[Measured], now: Sequence[Measured]) -> list[Measured]:
    """All rows of both, each with the seeds of both; a seed that both have counts as it is now.

    Raises:
        ValueError: a row is of another plan or of another number of images in each.
    """
    found = {(m.steps, m.row): m for m in earlier}
    for m in now:
        old = found.get((m.steps, m.row))
        if old is None:
            found[m.steps, m.row] = m
            continue
        if old.work != m.work or (old.plan and old.plan != m.plan):
            raise ValueError(f"{m.row}, {m.steps} steps, has another plan in the earlier results: leave one out")
        if old.samples != m.samples:
            raise ValueError(
                f"{m.row}, {m.steps} steps, has {old.samples} images per seed in the earlier results, "
                f"and {m.samples} here: pass --samples {old.samples}"
            )
        parts = {name: {**getattr(old, name), **getattr(m, name)} for name in _BY_SEED}
        found[m.steps, m.row] = replace(m, **parts, timing=m.timing or old.timing)
    return list(found.values())


def of_same_seeds(rows: Sequence[Measured], seeds: Sequence[int] | None = None) -> list[Measured]:
    """The rows of every table counted over the same seeds.

    Args:
        rows: of all tables.
        seeds: these, and rows that lack one are left out; by default those that all rows of a table have.
    """
    shown = []
    for steps in dict.fromkeys(m.steps for m in rows):
        own = [m for m in rows if m.steps == steps]
        common = {str(seed) for seed in seeds} if seeds else set.intersection(*(set(m.fd) for m in own))
        shown += [m.of_seeds(common) for m in own if common and common <= set(m.fd)]
    return shown


def left_out(rows: Sequence[Measured], shown: Sequence[Measured]) -> list[Measured]:
    """The seeds of `rows` that are not in `shown`, for the file alone: other rows may come to have them later."""
    seeds = {(m.steps, m.row): set(m.fd) for m in shown}
    rest = [m.of_seeds(set(m.fd) - seeds.get((m.steps, m.row), set())) for m in rows]
    return [m for m in rest if m.fd]


def timed(rows: Sequence[Measured]) -> list[Measured]:
    """The rows with their times, where all have one: every row's at the median uncached pace."""
    if not all(m.timing for m in rows):
        return [replace(m, seconds_per_image=None, speedup=None) for m in rows]
    times = [m.timing for m in rows if m.timing]
    paces = [t["uncached_seconds"] / t["images"] / m.steps for m, t in zip(rows, times, strict=True)]
    speedups = [t["speedup"] for t in times]
    pace = statistics.median(paces) if paces else 0.0
    return [
        replace(m, seconds_per_image=pace * m.steps / speedup, speedup=speedup)
        for m, speedup in zip(rows, speedups, strict=True)
    ]
