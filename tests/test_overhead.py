"""What a step costs beside its graph: the measurement, and the aim."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from types import ModuleType
from typing import Any

import pytest
import torch

from tests.scripts import imported

WAYS = ["model", "context", "session", "run_step"]
AIM_US = 50  # per step, on a CPU


@pytest.fixture(scope="module")
def overhead() -> Iterator[ModuleType]:
    """The script as a module."""
    with imported(("provenance", "overhead")) as found:
        yield found["overhead"]


@pytest.fixture(scope="module")
def written(overhead: ModuleType, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """What the command writes."""
    path = tmp_path_factory.mktemp("overhead") / "overhead.json"
    patch, threads = pytest.MonkeyPatch(), torch.get_num_threads()
    patch.setattr(sys, "argv", ["overhead.py", "--rounds", "20", "--json", str(path)])
    try:
        overhead.main()
    finally:
        patch.undo()
        torch.set_num_threads(threads)
    return json.loads(path.read_text())  # type: ignore[no-any-return]


def test_a_step_takes_less_than_50_microseconds_beside_its_graph(written: dict[str, Any]) -> None:
    """By the minimum: test machines are shared, and their medians are those of other work as well."""
    assert [row["call"] for row in written["rows"]] == WAYS
    for row in written["rows"]:
        assert 0 < row["min_us"] <= row["median_us"]
        assert row["min_us"] < AIM_US, f"{row['call']} takes {row['min_us']:.1f} us per step"


def test_every_way_to_call_returns_what_the_backend_gives(
    overhead: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    """At every step the very tensor that the backend made for the step's variant: no graph runs, nor another one's."""
    constants: list[torch.Tensor] = []
    returned: list[list[torch.Tensor]] = []
    empty = overhead.empty

    def seen(gm: torch.fx.GraphModule, inputs: list[torch.Tensor]) -> Any:
        run = empty(gm, inputs)
        constants.append(run()[0])
        return run

    def one_run(step: Any, _: int) -> list[float]:
        returned.append([step(number) for number in range(overhead.NUM_STEPS)])
        return [1.0]

    monkeypatch.setattr(overhead, "empty", seen)
    compiled, calls = overhead.build()
    monkeypatch.setattr(overhead, "build", lambda: (compiled, calls))
    monkeypatch.setattr(overhead, "microseconds", one_run)
    assert [row["call"] for row in overhead.measure(1)] == WAYS
    assert len({id(constant) for constant in constants}) == 2  # of an I-step and of a P-step
    expected = [constants[binding.variant] for binding in compiled.program.bindings]
    assert len(returned) == 2 * len(WAYS)  # to warm up, and to measure
    for outputs in returned:
        assert all(output is constant for output, constant in zip(outputs, expected, strict=True))


def test_the_numbers_are_written_with_where_they_come_from(written: dict[str, Any]) -> None:
    """The command without its folder, the commit, the machine."""
    assert written["command"] == "python benchmarks/overhead.py --rounds 20 --json overhead.json"
    assert {"commit", "processor", "cores", "torch", "python"} <= written.keys()
    assert written["threads"] == 1
