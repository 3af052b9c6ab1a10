"""The coverage of diffusers' transformer classes: the entries, and some rows from end to end."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import pytest

pytest.importorskip("diffusers")

BENCHMARKS = Path(__file__).parents[1] / "benchmarks"
#: One stream; a text stream beside it; cross-attention inside the branch of self-attention.
WHOLE = ("DiTTransformer2DModel", "SD3Transformer2DModel", "LuminaNextDiT2DModel")


@pytest.fixture(scope="module")
def script() -> Iterator[ModuleType]:
    """The script as a module; it imports its entries by name, as when it is run."""
    before = set(sys.modules)
    sys.path.insert(0, str(BENCHMARKS))
    try:
        yield __import__("model_coverage")
    finally:
        sys.path.remove(str(BENCHMARKS))
        for name in {n for n in set(sys.modules) - before if n.startswith(("coverage_", "model_coverage"))}:
            sys.modules.pop(name)


def test_every_class_has_an_entry(script: ModuleType) -> None:
    """A class that a new version of diffusers brings shows here."""
    assert set(script.ENTRIES) == set(script.coverage_models.classes())


@pytest.mark.parametrize("name", WHOLE)
@pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::DeprecationWarning")
def test_a_class_goes_through_all_columns(script: ModuleType, name: str) -> None:
    """Captured with the model's bits, all blocks found, pruned with fewer MACs, and equal to the reference."""
    row = script.examine(name, "eager")

    assert row.whole, row.why
    assert row.details["actions"] == ["pruned", "reuse", "hold"]
    assert row.details["pruned_macs"] < 0.9
    assert row.details["found"] == row.details["blocks"]
    assert row.details["effect"] > 0.01


def test_what_fails_is_a_row(script: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    """A class that cannot be built says so, in one line and with the stage."""

    def parts() -> None:
        raise ValueError("no such size\nmore")

    monkeypatch.setitem(script.ENTRIES, "Broken", script.coverage_models.Entry("Broken", parts, (), "half of it"))
    row = script.examine("Broken", "eager")

    assert (row.whole, row.captured, row.why) == (False, False, "built: ValueError: no such size")
    assert row.cells()[-1] == "built: ValueError: no such size; half of it"


def test_a_block_is_found_by_its_path(script: ModuleType) -> None:
    """Blocks inside a module's, or around it, are that module's; a longer number is another block."""
    assert script._same("blocks.1", "blocks.1")
    assert script._same("blocks.1", "blocks.1.block3")
    assert script._same("blocks.1.layers.0", "blocks.1")
    assert not script._same("blocks.1", "blocks.10")
