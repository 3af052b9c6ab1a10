"""TokenCache plans on a small model, for tests."""

from __future__ import annotations

import functools
from typing import Any

import torch

from tcc import plans
from tcc.learned import Importance
from tcc.plan import CachePlan
from tests.tiny_models import Case, dit

__all__ = ["BLOCKS", "P_STEPS", "STEPS", "TOKENS", "by_block", "deep", "importance", "plan"]

STEPS, BLOCKS, TOKENS = 6, 4, 16
P_STEPS = (1, 3, 5)


@functools.cache
def deep() -> Case:
    """A DiT of four blocks, 16 tokens on a 4 x 4 grid."""
    return dit(depth=BLOCKS)


def importance(seed: int = 0) -> Importance:
    """Importances without ties."""
    draw = torch.Generator().manual_seed(seed)
    return Importance(torch.rand(STEPS, BLOCKS, TOKENS, generator=draw))


def plan(**options: Any) -> CachePlan:
    """A TokenCache plan of six steps, every second one an I-step, with tokens chosen cell by cell in each block."""
    given = {"importance": importance(), "k1": 1, "k2": 1, "select": "grid", "share": False} | options
    return plans.tokencache(deep().info, num_steps=STEPS, **given)


def by_block(*means: float) -> Importance:
    """Importances with these means over the tokens."""
    spread = torch.linspace(-0.05, 0.05, TOKENS)
    return Importance((torch.tensor(means)[:, None] + spread).expand(STEPS, -1, -1).clone())
