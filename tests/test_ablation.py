"""The waterfall of rewrites: on a tiny random model, not compiled by Inductor."""

from __future__ import annotations

import json
import math
import os
import sys
import time
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

from tcc.program import build_program
from tests.scripts import modules_of
from tests.tiny_models import case

NAMES = [
    "FORA, N=2",
    "a quarter of the tokens, kept",
    "half of the tokens, cached",
    "a half to an eighth of the tokens, by depth",
    "Delta-DiT, N=2",
]
NARROW = ("+ bfloat16 slots", "+ float8 slots")
SLOT = 2 * 16 * 32 * 4  # bytes: two samples, 16 tokens, width 32, float32


scripts = modules_of("provenance", "step_speed", "peers_models", "compile_time", "ablation_table", "ablation")


@pytest.fixture(scope="module")
def ablation(scripts: dict[str, ModuleType]) -> ModuleType:
    """The script as a module."""
    return scripts["ablation"]


def run(
    ablation: ModuleType, folder: Path, *plans: str, rounds: int = 1, backend: str = "eager", commit: str = "abc"
) -> dict[str, Any]:
    """What the command writes there, on a tiny model."""
    tiny = ablation.Subject("tiny", case("dit").model, (4, 8, 8), 10, "blocks", False)
    words = ["--steps", "4", "--rounds", str(rounds), "--backend", backend, "--threads", "1"]
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(ablation.MODELS, ablation.DEFAULT, lambda: tiny)
        told = ablation.provenance()
        patch.setattr(ablation, "provenance", lambda: told | {"commit": commit})
        patch.setattr(sys, "argv", ["ablation.py", *words, "--plans", *plans, "--results", str(folder)])
        ablation.main()
    found: dict[str, Any] = json.loads((folder / "waterfall.json").read_text())
    return found


@pytest.fixture(scope="module")
def results(ablation: ModuleType, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder with what the command writes."""
    folder = tmp_path_factory.mktemp("waterfall")
    run(ablation, folder, *NAMES)
    return folder


@pytest.fixture
def rows(results: Path) -> dict[tuple[str, str], dict[str, Any]]:
    """The rows, by plan and label."""
    found = json.loads((results / "waterfall.json").read_text())["rows"]
    return {(row["plan"], row["row"]): row for row in found}


def test_every_rewrite_has_a_row_for_every_plan(ablation: ModuleType, rows: dict[tuple[str, str], Any]) -> None:
    """Below the uncached model, eager and compiled, in the order in which they are added."""
    wanted = [("uncached", "eager"), ("uncached", "compiled")]
    assert list(rows) == wanted + [(plan, row.label) for plan in NAMES for row in ablation.ROWS]
    assert rows[wanted[1]]["run"] == 1.0
    for (plan, _), row in rows.items():
        assert all(math.isfinite(row[name]) and row[name] > 0 for name in ("I ms", "run", "bound", "realised share"))
        assert (row["P ms"] is None) == (plan == "uncached")
        assert row["realised share"] == pytest.approx(row["run"] / row["bound"])


def test_all_rows_of_a_plan_compute_the_same(rows: dict[tuple[str, str], Any]) -> None:
    """To float32 rounding; only narrow slots change values, and the narrower the more, which the error shows."""
    for (plan, label), row in rows.items():
        if plan != "uncached" and label not in NARROW:
            assert row["error"] < 2e-5
    for plan in NAMES:
        half, quarter = (rows[plan, label]["error"] for label in NARROW)
        assert 1e-5 < half < torch.finfo(torch.bfloat16).eps
        assert half < quarter < torch.finfo(torch.float8_e4m3fn).eps


def test_slots_become_fewer_and_narrower(rows: dict[tuple[str, str], Any]) -> None:
    """Two blocks of two branches: a slot each, then one for the sum; half the bytes in bfloat16."""
    tokens = {label: row["slot_bytes"] / SLOT for (plan, label), row in rows.items() if plan == NAMES[1]}
    assert tokens["+ slots, pruned tokens"] == tokens["+ merged runs"] == 2
    assert tokens["+ summed slots"] == tokens["+ timesteps folded"] == tokens["+ regional compilation"] == 1
    assert tokens["+ bfloat16 slots"] == 0.5
    assert tokens["+ float8 slots"] == 0.25
    assert {row["folded_bytes"] > 0 for (_, label), row in rows.items() if "timesteps" in label} == {True}


def test_slots_share_a_buffer_in_time(rows: dict[tuple[str, str], Any]) -> None:
    """Delta-DiT keeps the last block first and the first one later: one buffer. Others have no two such slots."""
    shares = ("+ own variants for stores", "+ buffers shared")
    bytes_of = {plan: tuple(rows[plan, label]["slot_bytes"] for label in shares) for plan in NAMES}
    assert bytes_of["Delta-DiT, N=2"] == (2 * SLOT, SLOT)
    assert all(apart == shared for plan, (apart, shared) in bytes_of.items() if plan != "Delta-DiT, N=2")


def test_own_variants_are_those_that_a_budget_asks_for(ablation: ModuleType) -> None:
    """The row stands for `max_slot_bytes`, and every plan of the file has both or neither of its rows' bytes."""
    info = case("dit").info
    for name, policy in ablation.PLANS.items():
        plan = policy(info, num_steps=4)
        own = build_program(info.captured, info.analysis, plan, check=False, rewrites=ablation.OWN)
        asked = info.program(plan, max_slot_bytes=own.slot_bytes)
        assert {slot.name for slot in asked.slots} == {slot.name for slot in own.slots}
        assert (own.slot_bytes < plan.slot_bytes) == (name == "Delta-DiT, N=2")


def test_seconds_are_from_cold(ablation: ModuleType) -> None:
    """Every time another cache folder of Inductor's, which is empty; the one from before comes back."""
    before = os.environ.get("TORCHINDUCTOR_CACHE_DIR")

    def make() -> tuple[Path, list[Path]]:
        time.sleep(0.01)
        folder = Path(os.environ["TORCHINDUCTOR_CACHE_DIR"])
        return folder, list(folder.rglob("*"))

    (first, held), seconds = ablation.from_cold(make)
    (second, later), _ = ablation.from_cold(make)
    assert seconds >= 0.01
    assert first != second
    assert held == later == []
    assert os.environ.get("TORCHINDUCTOR_CACHE_DIR") == before


def test_every_row_tells_what_compiling_took(rows: dict[tuple[str, str], Any]) -> None:
    """Building counts, so that it is more than nothing without a compiler too; the eager model alone has none."""
    for (_, label), row in rows.items():
        assert (row["compile_seconds"] > 0) == (label != "eager")


def test_a_rewrite_with_nothing_to_do_has_the_row_above(rows: dict[tuple[str, str], Any], results: Path) -> None:
    """Whole branches are left out by FORA: no tokens, no rows; slots are merged where tokens are."""
    same = {plan: [label for (p, label), row in rows.items() if p == plan and row["as"]] for plan in NAMES}
    assert "+ rows written in place" in same["FORA, N=2"]
    assert "+ summed slots" in same["FORA, N=2"]
    assert "+ summed slots" not in same["a quarter of the tokens, kept"]
    assert "+ rows written in place" not in same["half of the tokens, cached"]
    numbers = ("I ms", "P ms", "run", "slot_bytes", "error", "compile_seconds")
    for plan in NAMES:
        for label in same[plan]:
            row, above = rows[plan, label], rows[plan, rows[plan, label]["as"]]
            assert [row[name] for name in numbers] == [above[name] for name in numbers]
    assert f"| FORA, N=2 | + summed slots | as above |{'  |' * 8}" in (results / "waterfall.md").read_text()


def test_plans_that_were_measured_before_stay(ablation: ModuleType, tmp_path: Path) -> None:
    """In their place, where settings and commit are the same, and known; others go."""
    first = run(ablation, tmp_path, "Delta-DiT, N=2")["rows"]
    second = run(ablation, tmp_path, "FORA, N=2")["rows"]
    assert [row["plan"] for row in second] == 2 * ["uncached"] + 12 * ["FORA, N=2"] + 12 * ["Delta-DiT, N=2"]
    assert second[-12:] == first[-12:]

    for other in ({"rounds": 2}, {"backend": "aot_eager"}, {"commit": "def"}, {"commit": "abc-changed"}):
        kept = tmp_path / "waterfall.json"
        before = kept.read_text()
        found = run(ablation, tmp_path, "FORA, N=2", **other)["rows"]
        assert {row["plan"] for row in found} == {"uncached", "FORA, N=2"}
        kept.write_text(before)


def test_the_table_and_the_plot_are_written(
    scripts: dict[str, ModuleType], ablation: ModuleType, results: Path
) -> None:
    """Beside the JSON, which says where it comes from."""
    ablation_table = scripts["ablation_table"]
    text = (results / "waterfall.md").read_text()
    assert f"| {' | '.join(ablation_table.COLUMNS)} |" in text
    assert "compile s" in ablation_table.COLUMNS
    assert all(f"| {row.label} |" in text for row in ablation.ROWS)
    widths = {line.count(" | ") for line in text.splitlines() if line.startswith("|")}
    assert widths == {len(ablation_table.COLUMNS) - 1}
    assert (results / "waterfall.png").read_bytes().startswith(b"\x89PNG")
    assert {"command", "commit", "processor", "threads"} <= set(json.loads((results / "waterfall.json").read_text()))
