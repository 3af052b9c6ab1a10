"""The waterfall of rewrites: on a tiny random model, not compiled by Inductor."""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from tests.scripts import imported
from tests.tiny_models import case

NAMES = ["FORA, N=2", "a quarter of the tokens, kept", "a half to an eighth of the tokens, by depth"]


@pytest.fixture(scope="module")
def ablation() -> Iterator[ModuleType]:
    """The script as a module."""
    with imported(("provenance", "step_speed", "peers_models", "ablation")) as found:
        yield found["ablation"]


@pytest.fixture(scope="module")
def results(ablation: ModuleType, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What the command writes, on a tiny model."""
    folder = tmp_path_factory.mktemp("waterfall")
    patch = pytest.MonkeyPatch()
    tiny = ablation.Subject("tiny", case("dit").model, (4, 8, 8), 10, "blocks", False)
    patch.setitem(ablation.MODELS, ablation.DEFAULT, lambda: tiny)
    words = ["--steps", "4", "--rounds", "1", "--backend", "eager", "--threads", "1"]
    patch.setattr(sys, "argv", ["ablation.py", *words, "--plans", *NAMES, "--results", str(folder)])
    ablation.main()
    patch.undo()
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
    """To float32 rounding; only narrow slots change values, which the error shows."""
    for (plan, label), row in rows.items():
        if plan != "uncached":
            assert 1e-5 < row["error"] < 1e-1 if label == "+ bfloat16 slots" else row["error"] < 2e-5


def test_slots_become_fewer_and_narrower(rows: dict[tuple[str, str], Any]) -> None:
    """Two blocks of two branches: a slot each, then one for the sum; half the bytes in bfloat16."""
    one = 2 * 16 * 32 * 4  # two samples, 16 tokens, width 32, float32
    tokens = {label: row["slot_bytes"] / one for (plan, label), row in rows.items() if plan == NAMES[1]}
    assert tokens["+ slots, pruned tokens"] == tokens["+ merged runs"] == 2
    assert tokens["+ summed slots"] == tokens["+ timesteps folded"] == 1
    assert tokens["+ bfloat16 slots"] == 0.5
    assert {row["folded_bytes"] > 0 for (_, label), row in rows.items() if "timesteps" in label} == {True}


def test_the_table_and_the_plot_are_written(ablation: ModuleType, results: Path) -> None:
    """Beside the JSON, which says where it comes from."""
    text = (results / "waterfall.md").read_text()
    assert all(f"| {name} |" in text for name in (*ablation.COLUMNS[:3], *(row.label for row in ablation.ROWS)))
    assert (results / "waterfall.png").read_bytes().startswith(b"\x89PNG")
    assert {"command", "commit", "processor", "threads"} <= set(json.loads((results / "waterfall.json").read_text()))
