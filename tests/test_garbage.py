"""What making variants does to Python's garbage collector: it waits, and everything else stays as it was."""

from __future__ import annotations

import gc
from collections.abc import Iterator

import pytest

import tcc
from tcc.program import Program
from tests.tiny_models import case


@pytest.fixture(autouse=True)
def collector() -> Iterator[None]:
    """The collector as it was, afterwards."""
    enabled = gc.isenabled()
    gc.collect()
    yield
    gc.unfreeze()
    (gc.enable if enabled else gc.disable)()


def made() -> Program:
    """A program of new variants."""
    info = tcc.ModelInfo(case("dit").info.captured, case("dit").info.analysis)
    return info.program(tcc.plans.fora(info, num_steps=4, interval=2))


def young() -> set[int]:
    """The objects that the next collection would go over."""
    return {id(found) for generation in (0, 1) for found in gc.get_objects(generation)}


def test_no_collection_goes_over_variants_when_they_are_made() -> None:
    """Neither within nor right after: they live on, and to the collector they are old."""
    gc.enable()
    nodes = [node for variant in made().variants for node in variant.gm.graph.nodes]
    assert len(nodes) > 200
    assert young().isdisjoint(map(id, nodes))
    assert gc.isenabled()
    assert gc.get_freeze_count() == 0


def test_a_collector_that_is_off_stays_off() -> None:
    """The caller may have turned it off."""
    gc.disable()
    made()
    assert not gc.isenabled()


def test_what_the_caller_has_frozen_stays_frozen() -> None:
    """Servers freeze what they have loaded before they fork."""
    loaded = [[] for _ in range(3)]
    gc.freeze()
    made()
    still = {id(found) for generation in (0, 1, 2) for found in gc.get_objects(generation)}
    assert gc.get_freeze_count() > 0
    assert still.isdisjoint(map(id, loaded))
