"""Tokens that take turns: each is kept as soon as the counts allow."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch

from tcc import plans
from tcc.plan import CachePlan, Update
from tests.tiny_models import case, dit

SCORES = torch.from_numpy(np.random.default_rng(3).permutation(16).astype(np.float32))


def turns(plan: CachePlan, block: int = 0) -> list[list[int]]:
    """What the P-steps keep, in order."""
    column = (action for _, action in plan.column(f"blocks.{block}.delta"))
    return [plan.tokens[str(action.tokens)].tolist() for action in column if isinstance(action, Update)]


@pytest.mark.parametrize("keep", [0.2, 0.25, 0.4, 0.5, 0.75])
@pytest.mark.parametrize("cell", [2, 4])
@pytest.mark.parametrize(
    "tokens", ["checkerboard", "random", "uniform", SCORES], ids=["cells", "random", "even", "scores"]
)
def test_every_token_has_its_turn(tokens: Any, cell: int, keep: float) -> None:
    """Within as few P-steps as there must be, and no token twice before the others, but in the last one."""
    plan = plans.tprr(
        case("dit").info, num_steps=13, k1=12, keep=keep, rotate=True, tokens=tokens, cell=cell, level="block"
    )
    kept = turns(plan)
    needed = math.ceil(16 / len(kept[0]))
    assert set().union(*kept[:needed]) == set(range(16))
    assert tokens == "uniform" or len(set().union(*kept[: needed - 1])) == sum(map(len, kept[: needed - 1]))
    assert kept[0] == kept[len(plan.tokens)]


@pytest.mark.parametrize("tokens", ["checkerboard", "random", SCORES], ids=["cells", "random", "scores"])
def test_turns_of_blocks_that_keep_fewer_and_fewer(tokens: Any) -> None:
    """At every turn, a later block keeps some of the tokens of the one before."""
    plan = plans.tprr(
        case("dit").info, num_steps=9, k1=8, keep=0.5, keep_last=0.25, rotate=True, tokens=tokens, level="block"
    )
    for first, last in zip(turns(plan), turns(plan, 1), strict=True):
        assert len(last) < len(first)
        assert set(last) < set(first)


@pytest.mark.parametrize("options", [{"scores": "uniform"}, {"scores": "random"}], ids=["even", "random"])
@pytest.mark.parametrize("cell", [2, 4])
def test_ranks_in_cells_take_turns(options: dict[str, Any], cell: int) -> None:
    """What a token loses by being kept is more than it can be ahead."""
    info = dit(input_size=16, hidden_size=16, depth=2, num_heads=1).info
    plan = plans.tokencache(
        info, num_steps=5, k1=5, k2=5, keep=0.25, rotate=1.0, select="grid", cell=cell, level="block", **options
    )
    kept = turns(plan)
    assert [len(tokens) for tokens in kept] == [16] * 4
    assert set().union(*kept) == set(range(64))
