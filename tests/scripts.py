"""The scripts in benchmarks/ as modules, for their tests."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

BENCHMARKS = Path(__file__).parent.parent / "benchmarks"
#: The comparison of policies.
QUALITY = ("quality_rows", "quality_store", "quality_measured", "quality_report", "quality", "quality_learn")


@contextmanager
def imported(names: Sequence[str]) -> Iterator[dict[str, ModuleType]]:
    """The scripts of these names; they import each other by name, as when one is run."""
    sys.path.insert(0, str(BENCHMARKS))
    try:
        yield {name: __import__(name) for name in names}
    finally:
        sys.path.remove(str(BENCHMARKS))
        for name in names:
            sys.modules.pop(name, None)


def modules_of(*names: str) -> Any:
    """A fixture: the scripts of these names as modules, by name."""

    @pytest.fixture(scope="module")
    def scripts() -> Iterator[dict[str, ModuleType]]:
        with imported(names) as modules:
            yield modules

    return scripts
