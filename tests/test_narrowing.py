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
