"""TokenCache and Learning-to-Cache on the families that their papers and ours name: compiled equals the reference."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

import tcc
from tcc.learned import Importance
from tcc.plan import Reuse, Update
from tests.running import CLOSE, call, session
from tests.tiny_models import Case, case, relative_error, uvit

STEPS = 4


def assert_equal_the_reference(which: Case, plan: tcc.CachePlan, runs: int = 2) -> None:
    """Compiled without a backend, on `runs` images."""
    compiled, reference = session(which, plan), tcc.Reference(which.model, plan, which.info)
    for step in range(runs * plan.num_steps):
        assert relative_error(call(compiled, which, step), call(reference, which, step)) < CLOSE, step


@pytest.mark.parametrize(
    "options",
    [
        {"select": "grid", "share": False, "attention": "cached"},
        {"select": "global", "share": True, "attention": "kept", "level": "block", "rotate": 1.0},
        {"select": "global", "share": False, "attention": "current", "pruned": 2, "scores": "norm"},
    ],
    ids=["cell by cell", "shared and rotated", "ranked in the graph"],
)
@pytest.mark.parametrize("name", ["dit", "mdt", "mdtv2"])
def test_tokencache(name: str, options: dict[str, Any]) -> None:
    """On DiT and both versions of MDT, whose blocks lie before and behind a decoder's positions and long skips."""
    info = case(name).info
    draw = torch.Generator().manual_seed(3)
    learned = Importance(torch.rand(STEPS, len(info.blocks), info.num_tokens, generator=draw))
    plan = tcc.plans.tokencache(info, num_steps=STEPS, importance=learned, k1=1, k2=1, keep=0.5, **options)
    pruned = {info.sites[site].block for (_, site), action in plan.actions.items() if isinstance(action, Update)}
    assert len(pruned) == options.get("pruned", len(info.blocks))
    assert_equal_the_reference(case(name), plan)


def write_router(path: Path, steps: int, units: int, seed: int = 0) -> Path:
    """A router as Learning-to-Cache's authors publish those of U-ViT: a vector of logits per solver step."""
    logits = torch.randn(units, generator=torch.Generator().manual_seed(seed))
    torch.save({f"{i}.prob": logits.roll(i // 8) for i in range(steps)}, path)
    return path


@pytest.mark.parametrize(("name", "shifted"), [("dit", False), ("uvit", True), ("uvit", False), ("mdtv2", False)])
def test_learning_to_cache(tmp_path: Path, name: str, shifted: bool) -> None:
    """From a router file; on U-ViT behind long skips, also for a solver that takes two evaluations per step."""
    info = case(name).info
    path = write_router(tmp_path / "router.pth", 6, 2 * len(info.blocks))
    plan = tcc.plans.l2c(info, num_steps=6, router=path, theta=0.5, shifted=shifted)
    reused = [site for (_, site), action in plan.actions.items() if action == Reuse()]
    assert 0 < len(reused) < len(plan.actions)
    assert_equal_the_reference(case(name), plan)


def test_a_router_of_u_vit_h_2(tmp_path: Path) -> None:
    """29 blocks, 58 units, 20 evaluations: the shape of the published router, on a narrow U-ViT of that depth."""
    which = uvit(batch=1, depth=28, hidden_size=8, num_heads=1)
    assert len(which.info.blocks) == 29
    path = write_router(tmp_path / "router.pth", 20, 58)
    plan = tcc.plans.l2c(which.info, num_steps=20, router=path, theta=0.5, shifted=True)
    assert [step for step in range(20) if any(a == Reuse() for a in plan.at(step).values())] == list(range(2, 20, 2))
    assert_equal_the_reference(which, plan, runs=1)
