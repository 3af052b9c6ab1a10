"""The tables of the README and of benchmarks/README.md say what the results files say, to the digits that they show."""

from __future__ import annotations

import json
import statistics
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[1]
MEASURED = (ROOT / "README.md").read_text() + (ROOT / "benchmarks" / "README.md").read_text()


def table(head: str) -> list[list[str]]:
    """The cells of the table whose header begins so, without the header."""
    lines = MEASURED[MEASURED.index(f"| {head} |") :].split("\n\n")[0].splitlines()[2:]
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]


def results(name: str, part: str = "rows") -> list[dict[str, Any]]:
    """The rows of a results file."""
    rows: list[dict[str, Any]] = json.loads((ROOT / "benchmarks" / "results" / name).read_text())[part]
    return rows


def says(cell: str, value: float | None) -> bool:
    """Whether a cell is the value, rounded to the digits that it shows; `reference` where there is none."""
    if value is None:
        return cell == "reference"
    text = cell.removesuffix("x")
    return text == f"{value:.{len(text.partition('.')[2])}f}"


def unmatched(rows: Iterable[Sequence[str]], known: Sequence[Sequence[Any]]) -> list[Sequence[str]]:
    """The rows of which no known row has all numbers."""
    return [
        row for row in rows if not any(all(says(cell, v) for cell, v in zip(row, one, strict=True)) for one in known)
    ]


def mean(by_seed: dict[str, float | None]) -> float | None:
    """Over the seeds; None for the uncached run, which is the reference."""
    found = [value for value in by_seed.values() if value is not None]
    return statistics.fmean(found) if found else None


def test_a_cell_is_compared_to_its_digits() -> None:
    """Rounded, not cut off; and what does not match is found."""
    assert says("1.27x", 1.2651)
    assert not says("1.26x", 1.2651)
    assert says("303", 302.9)
    assert not says("reference", 1.0)
    assert says("reference", None)
    assert unmatched([["1.0", "2.0"], ["1.0", "3.0"]], [[1.0, 2.0]]) == [["1.0", "3.0"]]


def test_fifty_steps() -> None:
    """Milliseconds, speedup, bound, PSNR and FD of policies at 50 steps."""
    known = [
        [row["seconds_per_image"] * 1e3, row["speedup"], row["bound"], mean(row["psnr"]), mean(row["fd"])]
        for row in results("quality-core.json")
        if row["steps"] == 50
    ]
    found = table("plan, of 50 steps")
    assert len(found) > 15
    assert not unmatched([row[1:6] for row in found], known)


def test_twenty_steps() -> None:
    """Speedup, measured in float32; bound, PSNR, FD and its range over the seeds, of bfloat16."""
    timed = {row["row"]: row["speedup"] for row in results("quality-core.json") if row["steps"] == 20}
    known = [
        [timed[row["row"]], row["bound"], mean(row["psnr"]), mean(row["fd"]), *ends(row["fd"])]
        for row in results("quality-core-bfloat16.json")
        if row["steps"] == 20 and row["row"] in timed
    ]
    found = table("plan, of 20 steps")
    assert len(found) > 20
    assert not unmatched([[*row[1:5], *row[5].split("..")] for row in found], known)


def test_fifty_steps_of_more_images() -> None:
    """Speedup, measured in float32; of bfloat16 the bound, PSNR, and FD seed by seed, of all seeds that there are."""
    timed = {row["row"]: row["speedup"] for row in results("quality-core.json") if row["steps"] == 50}
    known: dict[str, list[Any]] = {}
    psnr: dict[str, dict[str, float | None]] = {}
    for part in ("rows", "other_seeds"):
        for row in results("quality-core-bfloat16.json", part):
            if row["steps"] == 50:
                assert row["samples"] == 5000
                psnr.setdefault(row["row"], {}).update(row["psnr"])
                known.setdefault(row["row"], [timed[row["row"]], row["bound"], None]).extend(row["fd"].values())
    for name, numbers in known.items():
        numbers[2] = mean(psnr[name])
    found = [[*row[1:4], *row[4].split(", ")] for row in table("plan, of 50 steps, 5,000 images")]
    assert len(found) == len(known)
    for seeds in (1, 2, 3):
        alike = [numbers for numbers in known.values() if len(numbers) == 3 + seeds]
        assert not unmatched([row for row in found if len(row) == 3 + seeds], alike)


def ends(by_seed: dict[str, float]) -> tuple[float, float]:
    """The least and the most."""
    return min(by_seed.values()), max(by_seed.values())


@pytest.mark.parametrize("name", ["ablation.json"])
def test_the_ablation(name: str) -> None:
    """PSNR and FD of every option."""
    known = [[mean(row["psnr"]), mean(row["fd"])] for row in results(name)]
    found = table("option")
    assert len(found) > 20
    assert not unmatched([row[1:3] for row in found], known)


@pytest.mark.parametrize(
    ("head", "name"),
    [
        ("cache | error, both", "peers-pixart-1x10-alike.json"),
        ("cache, reference model | error, both", "peers-reference-4x20-alike.json"),
    ],
)
def test_what_peers_decided(head: str, name: str) -> None:
    """Of every peer the error and the bound, its fastest mode, and the plan that repeats its decisions."""
    rows = [row for row in results(name) if row["seconds"]]
    found = table(head)
    assert len(found) > 5
    for cache, error, bound, fastest, plan in found:
        own = [row for row in rows if row["method"] == cache and row["package"] != "tcc"]
        (twin,) = (row for row in rows if row["method"].startswith(f"{cache}, ") and row["method"].endswith(" steps"))
        assert says(fastest, max(row["speedup"] for row in own))
        assert says(plan, twin["speedup"])
        assert all(says(bound, row["bound"]) for row in own)
        assert {error} == {f"{row['error']:.1e}" for row in (*own, twin)}


def test_from_the_bound_to_the_clock() -> None:
    """Milliseconds, bounds, speedups and realised shares of `step_speed.py`."""
    known = [
        [
            row["I"], row["P"], row["P bound"], row["P speedup"], row["plan bound"], row["plan speedup"],
            row["plan realised"], row["plan realised, 2 P"], row["plan realised, 3 P"],
        ]
        for row in results("step_speed.json")
        if "P" in row
    ]  # fmt: skip
    found = [row for row in table("model | plan") if row[1] != "uncached"]
    assert len(found) > 10
    numbers = [[*row[2:4], *row[4].split(", ")[:2], row[5], row[6], *row[7].split(" / ")] for row in found]
    assert not unmatched(numbers, known)


def test_from_the_bound_to_the_clock_with_timesteps() -> None:
    """The same of two runs, for every model and plan with and without known timesteps."""
    names = ("step_speed-timesteps-layers.json", "step_speed-timesteps.json")
    rows = [row for name in names for row in results(name) if "P" in row]
    found = table("model | plan, with and without `timesteps=`")
    assert len(found) == len(rows)
    plans = {
        "FORA": "FORA",
        "half of the b": "half of the branches",
        "half of the t": "keep 0.5",
        "a quarter": "keep 0.25",
    }
    shares = ("plan realised", "plan realised, 2 P", "plan realised, 3 P")
    for model, told, i_step, p_step, step, realised, error in found:
        plan = next(name for words, name in plans.items() if told.startswith(words))
        label = "timesteps" if told.endswith("`timesteps=`") else "default"
        row = next(r for r in rows if (r["model"], r["plan"], r["options"]) == (model, plan, label))
        known = [row[name] for name in ("I", "P", "P bound", "P speedup", "P realised", *shares)]
        cells = [i_step, p_step, *step.split(", "), *realised.split(" / ")]
        if cells[4] == "-":
            del cells[4], known[4]
        assert not unmatched([cells], [known])
        assert error == f"{row['error']:.0e}"


def test_the_demo() -> None:
    """Seconds, speedup, bound, share, PSNR and slots of `tcc demo`, row by row."""
    found = table("method | steps | s per batch")
    rows = results("demo.json")
    assert [row[:2] for row in found] == [[row["method"], str(row["steps"])] for row in rows]
    for cells, row in zip(found, rows, strict=True):
        values = [row["seconds"], row["speedup"], row["bound"], row["realised_share"], row["psnr"]]
        if row["method"] == "uncached, eager":  # a bound is over the compiled model
            values[2:4], cells[4:6] = [None, None], ["reference", "reference"]
        assert not unmatched([cells[2:]], [[*values, row["slot_bytes"] / 2**20]])


def test_what_each_rewrite_is_worth() -> None:
    """Bounds and realised shares after each group of rewrites, and what they do to compiling and slots."""
    rows = results("waterfall.json")
    shares, rest = table("plan | bound | slots"), table("plan | compile s, whole")
    assert [row[0] for row in shares] == [row[0] for row in rest]
    assert {row[0] for row in shares} == {row["plan"] for row in rows} - {"uncached"}
    for (plan, *cells), (_, *others) in zip(shares, rest, strict=True):
        own = {row["row"].removeprefix("+ "): row for row in rows if row["plan"] == plan}
        first, default, shared = (own[name] for name in ("slots, pruned tokens", "timesteps folded", "buffers shared"))
        merged = [own[name] for name in ("summed slots", "dead parts dropped", "rows written in place")]
        regional = own["regional compilation"]
        in_order = [first, *merged, default, shared, regional]
        assert not unmatched([cells], [[first["bound"], *(row["realised share"] for row in in_order)]])
        compiled = [row["compile_seconds"] for row in (shared, regional)]
        assert not unmatched([others], [[*compiled, *(row["slot_bytes"] / 1024 for row in (first, default, shared))]])


def test_compiling() -> None:
    """Seconds, cold and warm, and the share of the plain model's."""
    known = [[row["cold_s"], row["warm_s"], row["cold_over_plain"]] for row in results("compile_time.json")]
    found = table("what | cold s")
    assert len(found) == len(known)
    assert not unmatched([row[1:] for row in found], known)


def test_caches_beside_each_other() -> None:
    """Speedup, bound, share, PSNR, bytes, graph breaks and recompiles of methods in the mode that is named."""
    rows = [row for row in results("peers-reference-4x20.json") if row["seconds"]]
    found = table("method | package | speedup")
    assert len(found) > 10
    for method, _, *cells in found:
        cells[5:] = cells[5].split(", ")
        names = ("speedup", "bound", "realised_share", "psnr")
        known = [
            [*(row[name] for name in names), row["cache_bytes"] / 2**20, row["graph_breaks"], row["recompiles"]]
            for row in rows
            if row["method"] == method
        ]
        assert not unmatched([cells], known)


def test_caches_beside_each_other_in_fd() -> None:
    """Speedup, PSNR and FD of methods in their fastest mode."""
    rows = [row for row in results("peers-reference-4x20-fd.json") if row["seconds"]]
    found = table("method, FD beside speed")
    assert len(found) > 10
    for method, _, *cells in found:
        known = [[row["speedup"], row["psnr"], row["fd"]] for row in rows if row["method"] == method]
        assert not unmatched([cells], known)
