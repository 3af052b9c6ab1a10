"""Blocks in other styles: found, pruned with exactly the MACs that the plan allows, and equal to the reference."""

from __future__ import annotations

import functools

import pytest
import torch
from torch import Tensor, nn

import tcc
from tcc.plan import Action, Attention, CachePlan, Compute, Hold, Reuse, TopK, Update
from tcc.program import build_program
from tcc.runtime import Session, lower
from tcc.scores import Norm, Score
from tests.block_styles import BATCH, STYLES, TOKENS, convolved
from tests.running import CLOSE
from tests.tiny_models import Block, Case, Tokens, relative_error, tensor_of, tokens_case

KEPT = [0, 3, 4, 7, 10]
ATTENTION: tuple[Attention, ...] = ("kept", "current", "cached")
#: What attention sees and how its parts are written meet in these; the others take one mode each.
EVERY_MODE = ("qkv by head", "matmul", "baddbmm", "einsum", "mask and bias, written out", "one product for both")


def modes(every: tuple[str, ...]) -> list[tuple[str, Attention]]:
    """Styles with modes: all three for `every`, one by turns for the others."""
    turns = {name: (ATTENTION[i % 3],) for i, name in enumerate(STYLES)}
    return [(name, mode) for name in STYLES for mode in (ATTENTION if name in every else turns[name])]


@functools.cache
def styled(name: str) -> Case:
    """The case of a style, captured once."""
    return STYLES[name].case()


def mixed_plan(info: tcc.ModelInfo, attention: Attention, tokens: str | TopK = "some") -> CachePlan:
    """All computed, tokens updated twice, one block reused beside updated tokens, the stream held, tokens again."""
    whole = "block" if any(site.kind == "block" for site in info.sites.values()) else "delta"
    kinds = {whole, "kv"} if attention == "cached" else {whole}
    actions: dict[tuple[int, str], Action] = {}
    for site in (s for s in info.sites.values() if s.kind in kinds and "@" not in s.name):
        update = Update(tokens, attention)
        for step, action in enumerate([Compute(), update, update, update, Compute(), update]):
            reused = step == 3 and site.block == 0
            actions[step, site.name] = Reuse() if reused else action
    actions |= {(step, "out.stream"): Hold() if step == 4 else Compute() for step in range(6)}
    scores = {"s": Score(((1.0, Norm("blocks.0.stream")),))}
    first, last = info.analysis.image_tokens
    kept = torch.tensor([*range(first), *(first + place for place in KEPT), *range(last, info.num_tokens)])
    given = {"tokens": {"some": kept}} if isinstance(tokens, str) else {"scores": scores}
    return CachePlan(6, actions, **given)  # type: ignore[arg-type]


def run(which: Case, plan: CachePlan, calls: int, check: bool = False) -> list[int]:
    """The MACs of every step; every call must agree with the reference, and the first has the model's own bits."""
    program = build_program(which.info.captured, which.info.analysis, plan, check=check)
    session, reference = Session(lower(program, "eager", check=check)), tcc.Reference(which.model, plan, which.info)
    for step in range(calls):
        args, kwargs = which.inputs(step)
        result, expected = (tensor_of(f(*args, **kwargs)) for f in (session, reference))
        assert relative_error(result, expected) < CLOSE, step
        if step == 0:  # all is computed, and nothing was rewritten for it
            with torch.no_grad():
                assert torch.equal(result, tensor_of(which.model(*args, **kwargs)))
    return [program.variants[binding.variant].macs for binding in program.bindings]


@pytest.mark.parametrize(("name", "attention"), modes(EVERY_MODE))
def test_a_style_is_pruned_to_the_last_mac(name: str, attention: Attention) -> None:
    """Reused, held and pruned steps agree with the reference, and a pruned step costs what its tokens cost."""
    which, costs = styled(name), STYLES[name].costs
    assert which.info.macs * BATCH == costs.step("current", TOKENS)
    assert all(site.prunable for site in which.info.sites.values() if site.kind not in ("stream", "skip"))
    macs = run(which, mixed_plan(which.info, attention), 7)
    assert macs[1] == costs.step(attention, len(KEPT))
    assert macs[3] == costs.step(attention, len(KEPT), blocks=1)


@pytest.mark.parametrize(("name", "attention"), [("matmul", "kept"), *modes(())])
def test_samples_choose_tokens_of_their_own(name: str, attention: Attention) -> None:
    """A dynamic set costs what a static one of its size does, and the choice itself nothing."""
    which = styled(name)
    macs = run(which, mixed_plan(which.info, attention, TopK("s", len(KEPT))), 4)
    assert macs[1] == STYLES[name].costs.step(attention, len(KEPT))


def test_a_convolution_over_tokens_can_be_reused_but_not_pruned() -> None:
    """The reason names the operator; the other branch of the block is pruned as usual."""
    which = convolved()
    sites = which.info.sites
    assert "no token rule for aten.conv1d" in sites["blocks.0.mlp.delta"].reason
    assert sites["blocks.0.attn.delta"].prunable
    actions: dict[tuple[int, str], Action] = {}
    for block in ("blocks.0", "blocks.1"):
        actions |= {(1, f"{block}.mlp.delta"): Reuse(), (1, f"{block}.attn.delta"): Update("some")}
    assert len(set(run(which, CachePlan(2, actions, tokens={"some": torch.tensor(KEPT)}), 4))) == 2


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
    assert all(sites[f"blocks.{i}.mlp.delta"].reason and sites[f"blocks.{i}.mlp2.delta"].prunable for i in range(2))
    actions: dict[tuple[int, str], Action] = {
        (1, "blocks.0.mlp2.delta"): Update("some"),
        (1, "blocks.1.mlp.delta"): Reuse(),
    }
    run(which, CachePlan(2, actions, tokens={"some": torch.tensor(KEPT)}), calls=2)
