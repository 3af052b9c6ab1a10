"""Neighbours that update fewer and fewer tokens keep one sum: for each token, of the sites that do not update it."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch

import tcc
from tcc.passes.pipeline import ALL
from tcc.plan import Action, CachePlan, Update
from tcc.program import build_program
from tests import fuzz_plans
from tests.fuzz_plans import Example, check_example
from tests.tiny_models import dit

MERGED = {"dit1", "dit3", "tokens_first", "rotary", "joint"}
OTHERS = {"uvit", "long_skip", "masked"}  # a skip or a mask may stand between
#: Three parts of a run, with an I-step first; the middle one has two P-steps.
P_STEPS = ((1,), (3, 4), (6,))


def narrowing_plan(info: tcc.ModelInfo, kind: str, attention: Any, seed: int = 0) -> CachePlan | None:
    """Every site of that kind updates some of the tokens of the one before; None where fewer than two can."""
    sites = [s for s in info.sites.values() if s.kind == kind and s.prunable]
    keys = [s for s in info.sites.values() if s.kind == "kv" and any(s.attention[0] in x.attention for x in sites)]
    if len({site.stream for site in sites}) != 1 or len(sites) < 2 or (attention == "cached" and not keys):
        return None
    draws = torch.Generator().manual_seed(seed)
    counts = torch.linspace(info.num_tokens * 3 / 4, 1, len(sites)).round().int().tolist()
    tokens: dict[str, torch.Tensor] = {}
    actions: dict[tuple[int, str], Action] = {}
    for part, steps in enumerate(P_STEPS):
        order = torch.randperm(info.num_tokens, generator=draws)
        for number, (site, count) in enumerate(zip(sites, counts, strict=True)):
            name = f"part {part}, site {number}"
            tokens[name] = order[:count].sort().values
            for step in steps:
                actions[step, site.name] = Update(name, attention)
                if attention == "cached":
                    actions |= {(step, key.name): Update(name) for key in keys if key.attention[0] in site.attention}
    return CachePlan(7, actions, tokens)


@pytest.mark.parametrize("attention", ["kept", "cached"])
@pytest.mark.parametrize("kind", ["block", "delta"])
def test_the_sum_is_what_the_reference_keeps_site_by_site(kind: str, attention: Any) -> None:
    """On small models of several styles; sites share a slot wherever the stream between them is read by nobody else."""
    merged = set()
    for name in sorted(MERGED | OTHERS):
        info = fuzz_plans.model(name).info
        plan = narrowing_plan(info, kind, attention)
        if plan is None:
            continue
        check_example(Example(name, plan, check=name == "dit1"), runs=1)
        program = build_program(info.captured, info.analysis, plan, check=False)
        merged |= {name} if any(entry.narrowing for v in program.variants for entry in v.kind.entries) else set()
    assert merged >= MERGED


def test_one_slot_takes_the_place_of_one_for_each() -> None:
    """The bytes of a block's delta, at as many variants, and the same MACs."""
    info = fuzz_plans.model("dit3").info
    plan = narrowing_plan(info, "block", "kept")
    assert plan is not None
    one, apart = (
        build_program(info.captured, info.analysis, plan, rewrites=replace(ALL, merge_spans=merge))
        for merge in (True, False)
    )
    assert [slot.name for slot in one.slots] == ["blocks.0.delta+2"]
    assert apart.slot_bytes == 3 * one.slot_bytes
    assert len(one.variants) == len(apart.variants) == 2
    assert one.cost(info.analysis).step_macs == apart.cost(info.analysis).step_macs


@pytest.mark.parametrize(
    ("tokens", "counts"), [("random", [8, 6, 4]), ("checkerboard", [8, 8, 4]), (torch.linspace(0, 1, 16), [8, 8, 4])]
)
def test_blocks_that_keep_fewer_and_fewer_tokens_share_a_slot(tokens: Any, counts: list[int]) -> None:
    """From half of the 16 tokens to a quarter over three blocks, each some of the one before's."""
    info = dit(depth=3, hidden_size=16).info
    given: dict[str, Any] = {"keep": 0.5, "keep_last": 0.25, "tokens": tokens, "num_steps": 4}
    given |= {"attention": "kept", "level": "block"}
    plan = tcc.plans.tprr(info, **given)
    kept = [set(plan.tokens[str(plan.action(1, f"blocks.{b}.delta").tokens)].tolist()) for b in range(3)]  # type: ignore[union-attr]
    assert [len(each) for each in kept] == counts
    assert kept[2] < kept[1] <= kept[0]
    assert [slot.name for slot in plan.memory(info).slots] == ["blocks.0.delta+2"]
    assert tcc.plans.tprr(info, blocks=[2, 0, 1], **given).actions == plan.actions
    assert plan.policy["keep_last"] == 0.25
