"""The scripts that measure compile time and the order of tokens: what they compare is what they say."""

from __future__ import annotations

from collections.abc import Iterator
from types import ModuleType
from typing import Any

import pytest
import torch

import tcc
from tests.scripts import imported


@pytest.fixture(scope="module")
def scripts() -> Iterator[dict[str, ModuleType]]:
    """The scripts as modules."""
    with imported(["provenance", "step_speed", "peers_models", "ablation", "token_order", "compile_time"]) as modules:
        yield modules


@pytest.mark.parametrize("keep", [64, 128])
def test_all_ways_to_gather_and_scatter_do_the_same(
    scripts: dict[str, ModuleType], keep: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Apart and fused to the bit; slices do as much, on the tokens that stand first."""

    def uncompiled(function: Any, **_: object) -> Any:
        return function

    monkeypatch.setattr(torch, "compile", uncompiled)
    made: dict[str, Any] = {name: call() for name, call in scripts["token_order"].ends_of_a_run(keep).items()}
    assert list(made["gather, fused"].shape) == [2, keep, 384]
    for end in ("gather", "scatter"):
        assert torch.equal(made[f"{end}, apart"], made[f"{end}, fused"])
        assert made[f"{end}, slices"].shape == made[f"{end}, fused"].shape


@pytest.mark.parametrize(("name", "variants"), [("plain", 1), ("plan", 2), ("2 variants", 2), ("5 variants", 5)])
def test_plans_have_the_variants_of_their_names(scripts: dict[str, ModuleType], name: str, variants: int) -> None:
    """So the seconds of five variants are of five."""
    model, inputs = scripts["compile_time"].build(3, 32)
    info = tcc.inspect(model, *inputs)
    program = info.program(scripts["compile_time"].policy_of(name)(info))
    assert len(program.variants) == variants
