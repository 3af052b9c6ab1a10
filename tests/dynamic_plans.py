"""Plans with dynamic token sets, for tests."""

from __future__ import annotations

from collections.abc import Callable

import torch

from tcc.plan import Action, Attention, CachePlan, Compute, TopK, Update
from tcc.plan.scores import Attended, Fixed, Norm, Probe, Score, Stale
from tests.tiny_models import Case, noise

STEPS = 6
#: Every term, on the first block of a model whose blocks are `blocks.0` and `blocks.1`.
SCORES: dict[str, Score] = {
    "fixed": Score(((1.0, Fixed("one")),)),
    "fixed for each sample": Score(((1.0, Fixed("each")),)),
    "norm, stored": Score(((1.0, Norm("blocks.0.mlp.out")),)),
    "norm, computed": Score(((1.0, Norm("blocks.0.stream")),)),
    "norm of values": Score(((1.0, Norm("blocks.0.attn.kv")),)),
    "attended": Score(((1.0, Attended("blocks.0.attn")),)),
    "probe": Score(((1.0, Probe("blocks.0.stream", "hidden", "offset", "weight", "one")),)),
    "stale": Score(((1.0, Norm("blocks.0.mlp.out")), (0.25, Stale("blocks.0.mlp.out")))),
}


def tables(which: Case) -> dict[str, torch.Tensor]:
    """What the scores read."""
    info = which.info
    tokens, width = info.num_tokens, info.analysis.stream_shape[-1]
    shapes = {"one": (tokens,), "each": (info.batch, tokens), "hidden": (width, 4), "offset": (4,), "weight": (4,)}
    return {name: noise(*sizes, seed=40 + i) for i, (name, sizes) in enumerate(shapes.items())}


def dynamic_plan(
    which: Case,
    score: Score,
    *,
    kind: str = "out",
    attention: Attention = "current",
    keep: Callable[[int], int] = lambda tokens: tokens // 2,
    only: str = "",
) -> CachePlan:
    """Three steps of every sort: all computed, then twice a dynamic set at all sites of a kind (with `only` in it)."""
    info = which.info
    actions: dict[tuple[int, str], Action] = {}
    for site in (s for s in info.sites.values() if s.kind == kind and only in s.name):
        keys = [s.name for s in info.sites.values() if s.kind == "kv" and s.attention[0] in site.attention]
        for name in [site.name, *(keys if attention == "cached" else [])]:
            for step in range(STEPS):
                update = Update(TopK("s", keep(info.num_tokens)), attention)
                actions[step, name] = update if step % 3 else Compute()
    return CachePlan(STEPS, actions, scores={"s": score}, tables=tables(which))
