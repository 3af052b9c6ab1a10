"""Blocks in other styles: found, pruned with exactly the MACs that the plan allows, and equal to the reference."""

from __future__ import annotations

import functools
from collections.abc import Sequence

import pytest
import torch
from torch import Tensor, nn

import tcc
from tcc.lowering import lower
from tcc.plan import Action, Attention, CachePlan, Hold, Reuse, TopK, Update
from tcc.plan.scores import Norm, Score
from tcc.program import build_program
from tcc.runtime import Session
from tests.block_styles import BATCH, STYLES, TOKENS, convolved
from tests.running import CLOSE
from tests.tiny_models import Block, Case, Tokens, relative_error, tensor_of, tokens_case

KEPT = [0, 3, 4, 7, 10]
ATTENTION: tuple[Attention, ...] = ("cached", "current", "kept")  # keys that later steps compute need no store
CHOSEN = TopK("s", len(KEPT))
#: Every mode with one token set for all samples, and with one for each.
UPDATES = [(mode, tokens) for mode in ATTENTION for tokens in ("some", CHOSEN)]


@functools.cache
def styled(name: str) -> Case:
    """The case of a style, captured once."""
    return STYLES[name].case()


def every_update(info: tcc.ModelInfo, sets: Sequence[str | TopK] = ("some", CHOSEN)) -> CachePlan:
    """All computed; a step for each of `UPDATES`; a block reused beside updated tokens; the stream held.

    What is not prunable is computed.
    """
    kinds = {"block" if any(s.kind == "block" and s.prunable for s in info.sites.values()) else "delta"}
    updated = [site for site in info.sites.values() if site.kind in kinds and site.prunable]
    keys = [site for site in info.sites.values() if site.kind == "kv" and site.prunable]
    actions: dict[tuple[int, str], Action] = {}
    updates = [update for update in UPDATES if update[1] in sets]
    for step, (mode, tokens) in enumerate(updates, 1):
        for site in [*updated, *(keys if mode == "cached" else [])]:
            cached = {name for key in keys for name in key.attention} >= set(site.attention)
            actions[step, site.name] = Update(tokens, mode if cached or mode != "cached" else "current")
    last = len(updates) + 1
    for site in updated:
        actions[last, site.name] = Reuse() if site.block == 0 else Update(sets[-1], "kept")
    actions[last + 1, "out.stream"] = Hold()
    first, end = info.analysis.image_tokens
    kept = torch.tensor([*range(first), *(first + place for place in KEPT), *range(end, info.num_tokens)])
    scores = {"s": Score(((1.0, Norm(next(s.name for s in info.sites.values() if s.kind == "stream"))),))}
    return CachePlan(last + 2, actions, {"some": kept}, scores=scores if CHOSEN in sets else {})


def run(which: Case, plan: CachePlan, check: bool = False) -> list[int]:
    """The MACs of every step; every call must agree with the reference, and the first has the model's own bits."""
    program = build_program(which.info.captured, which.info.analysis, plan, check=check)
    session, reference = Session(lower(program, "eager", check=check)), tcc.Reference(which.model, plan, which.info)
    for step in range(plan.num_steps + 1):
        args, kwargs = which.inputs(step)
        result, expected = (tensor_of(f(*args, **kwargs)) for f in (session, reference))
        assert relative_error(result, expected) < CLOSE, step
        if step == 0:  # all is computed, and nothing was rewritten for it
            with torch.no_grad():
                assert torch.equal(result, tensor_of(which.model(*args, **kwargs)))
    return [program.variants[binding.variant].macs for binding in program.bindings]


@pytest.mark.parametrize("name", STYLES)
def test_a_style_is_pruned_to_the_last_mac(name: str) -> None:
    """Reused, held and pruned steps agree with the reference, and a pruned step costs what its tokens cost.

    Tokens that every sample chooses cost the same, and the choice itself nothing.
    """
    which, costs = styled(name), STYLES[name].costs
    assert which.info.macs * BATCH == costs.step("current", TOKENS)
    assert all(site.prunable for site in which.info.sites.values() if site.kind not in ("stream", "skip"))
    macs = run(which, every_update(which.info))
    assert macs[1:7] == [costs.step(mode, len(KEPT)) for mode, _ in UPDATES]
    assert macs[7] == costs.step("kept", len(KEPT), blocks=1)


def test_a_convolution_over_tokens_can_be_reused_but_not_pruned() -> None:
    """The reason names the operator; the other branch of the block is pruned as usual."""
    which = convolved()
    sites = which.info.sites
    assert "aten.conv1d.default convolves over" in sites["blocks.0.mlp.delta"].reason
    assert sites["blocks.0.attn.delta"].prunable
    actions: dict[tuple[int, str], Action] = {}
    for block in ("blocks.0", "blocks.1"):
        actions |= {(1, f"{block}.mlp.delta"): Reuse(), (1, f"{block}.attn.delta"): Update("some")}
    assert len(set(run(which, CachePlan(2, actions, tokens={"some": torch.tensor(KEPT)})))) == 2


class Odd(nn.Module):
    """Attention written out whose weights something else takes part in, or reads: `sink`, `first`, `reader`."""

    def __init__(self, kind: str, width: int = 16) -> None:
        super().__init__()
        self.kind, self.qkv, self.sink = kind, nn.Linear(width, 3 * width), nn.Parameter(torch.zeros(1))

    def forward(self, x: Tensor) -> Tensor:
        """Attend over `[B, S, D]`."""
        q, k, v = self.qkv(x).chunk(3, dim=-1)
        logits = q @ k.transpose(1, 2)
        sink = self.sink.expand(*logits.shape[:2], 1)
        if self.kind == "sink":
            return torch.cat([logits, sink], -1).softmax(-1)[..., :-1] @ v
        if self.kind == "first":
            return torch.cat([sink, logits], -1).softmax(-1)[..., 1:] @ v
        weights = logits.softmax(-1)
        return weights @ v + (weights * weights).sum(-1, keepdim=True)


@pytest.mark.parametrize("kind", ["sink", "first", "reader"])
def test_weights_that_others_share_or_read_are_not_pruned(kind: str) -> None:
    """Keys that are left out would change what a sink takes, and what else reads the weights: reused, not pruned."""
    blocks: list[nn.Module] = []
    for _ in range(2):
        block = Block(16)
        block.attn = Odd(kind)  # type: ignore[assignment]
        blocks.append(block)
    which = tokens_case(Tokens(blocks))
    sites = which.info.sites
    assert not any(site.kind == "kv" for site in sites.values())
    assert all(sites[f"blocks.{i}.attn.delta"].reason and sites[f"blocks.{i}.mlp.delta"].prunable for i in range(2))
    actions: dict[tuple[int, str], Action] = {
        (1, "blocks.0.mlp.delta"): Update("some"),
        (1, "blocks.1.attn.delta"): Reuse(),
    }
    run(which, CachePlan(2, actions, tokens={"some": torch.tensor(KEPT)}))
