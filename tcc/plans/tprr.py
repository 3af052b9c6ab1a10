"""Two-phase round-robin schedule with tokens chosen by position or by given scores (TokenCache v1)."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Literal

import torch

from tcc.errors import PlanError
from tcc.info import ModelInfo
from tcc.plan import Action, Attention, CachePlan, Compute, Update
from tcc.plans.tokens import Choice, check_keep, choose_blocks, choose_tokens, delta_sites

__all__ = ["Cycle", "tprr", "tprr_steps"]

Cycle = Literal["p_steps", "length"]


def tprr_steps(num_steps: int, k1: int, k2: int, boundary: float, cycle: Cycle = "p_steps") -> tuple[int, ...]:
    """The I-steps of the two-phase round-robin schedule (TokenCache, Lou et al. 2024, arXiv 2409.18523, section TPRR).

    Args:
        num_steps: denoising steps.
        k1: caching interval of the first phase (noisy steps, large).
        k2: caching interval of the second phase.
        boundary: the share of the steps that the first phase takes, 0..1.
        cycle: how to read the interval: `p_steps`, K P-steps after each I-step; `length`, one I-step every K steps.

    Raises:
        PlanError: an interval or the boundary is out of range.
    """
    least = 0 if cycle == "p_steps" else 1
    if min(k1, k2) < least or not 0 <= boundary <= 1:
        raise PlanError(
            f"tprr(k1={k1}, k2={k2}, boundary={boundary}): intervals are at least {least} with cycle='{cycle}', and "
            "the boundary is a share of the steps, 0..1"
        )
    steps, step = [], 0
    while step < num_steps:
        steps.append(step)
        k = k1 if step < round(boundary * num_steps) else k2
        step += k + 1 if cycle == "p_steps" else k
    return tuple(steps)


def tprr(
    info: ModelInfo,
    *,
    num_steps: int,
    k1: int = 3,
    k2: int = 1,
    boundary: float = 0.5,
    cycle: Cycle = "p_steps",
    keep: float = 0.5,
    attention: Attention = "kept",
    blocks: Sequence[int] | None = None,
    level: Literal["block", "branch", "out"] = "block",
    tokens: Choice | torch.Tensor = "checkerboard",
    cell: int = 2,
    seed: int = 0,
    rotate: bool = False,
) -> CachePlan:
    """Two-phase round-robin token plan (TokenCache v1, Lou et al. 2024, arXiv 2409.18523).

    I-steps compute and store every block's change of the stream; P-steps recompute it for the kept tokens of the chosen
    blocks and reuse it for the others.

    Args:
        info: the model.
        num_steps: denoising steps.
        k1: caching interval of the first phase.
        k2: caching interval of the second phase.
        boundary: share of the steps in the first phase.
        cycle: reading of the interval, see `tprr_steps`.
        keep: keep ratio r in (0, 1]: kept tokens / all tokens on P-steps, rounded to whole tokens (per cell, where
            tokens are chosen by cell); `plan.summary()` shows the share that comes out.
        attention: what kept queries see, see `Update`.
        blocks: indices of the blocks to prune; the others are computed at every step. All, if None.
        level: `block` keeps one delta per block, `branch` one per residual branch, `out` every branch's output before
            its gate, which is then recomputed for all tokens.
        tokens: how tokens are chosen: `uniform` (every 1/r-th), `random` (from `seed`), `checkerboard` (the same count
            in each `cell x cell` cell of the grid), or scores `[S]`: the highest are kept, cell by cell.
        cell: the side of a grid cell, k in the paper.
        seed: seed of `random`.
        rotate: choose other tokens at every P-step of a cycle, so that each token's turn comes.

    Raises:
        PlanError: an option is out of range, the scores are not finite, or a chosen block cannot be pruned.
    """
    chosen = choose_blocks(info, blocks)
    i_steps = set(tprr_steps(num_steps, k1, k2, boundary, cycle))
    names = delta_sites(info, chosen, level)
    check_keep(keep)
    turns = range(min(info.num_tokens, math.ceil(1 / keep)) if rotate else 1)
    sets = {f"kept{t}": choose_tokens(info, keep, tokens, cell=cell, seed=seed, turn=t) for t in turns}
    keys = [n for n, s in info.sites.items() if s.kind == "kv" and s.block in chosen] if attention == "cached" else []
    actions: dict[tuple[int, str], Action] = {}
    turn = 0
    for step in range(num_steps):
        kept = f"kept{turn % len(turns)}"
        turn += step not in i_steps
        for name in [*keys, *names]:
            actions[step, name] = Compute() if step in i_steps else Update(kept, attention)
    policy = {
        "name": "tprr", "k1": k1, "k2": k2, "boundary": boundary, "cycle": cycle, "keep": keep, "attention": attention,
        "blocks": list(chosen), "level": level, "tokens": tokens if isinstance(tokens, str) else "scores", "cell": cell,
        "seed": seed, "rotate": rotate,
    }  # fmt: skip
    return info.count(CachePlan(num_steps=num_steps, actions=actions, tokens=sets, policy=policy))
