"""Two-phase round-robin schedule with tokens chosen by position or by given scores (TokenCache v1)."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from tcc.errors import PlanError
from tcc.info import ModelInfo
from tcc.plan import Action, CachePlan, Compute, Update
from tcc.plans.checks import check_keep
from tcc.plans.options import plain_options
from tcc.plans.placement import Cycle, tprr_steps
from tcc.plans.tokens import (
    Choice,
    Level,
    TokenAttention,
    choose_blocks,
    choose_tokens,
    count_turns,
    pruned_sites,
    token_actions,
)

__all__ = ["tprr"]


@plain_options
def tprr(
    info: ModelInfo,
    *,
    num_steps: int,
    k1: int = 1,
    k2: int = 1,
    boundary: float = 0.5,
    cycle: Cycle = "p_steps",
    keep: float = 0.5,
    keep_last: float | None = None,
    attention: TokenAttention = "cached",
    blocks: Sequence[int] | None = None,
    level: Level = "out",
    tokens: Choice | torch.Tensor = "checkerboard",
    cell: int = 2,
    seed: int = 0,
    rotate: bool = False,
) -> CachePlan:
    """Two-phase round-robin token plan (TokenCache v1, Lou et al. 2024, arXiv 2409.18523).

    The superposition `w f(z_t) + (1 - w) f(z_(t+1))` with weights 0 and 1, and the schedule of section TPRR.
    I-steps compute and store everything; P-steps recompute the kept tokens of the chosen blocks, and reuse what is
    stored for the others. The defaults of the schedule, `attention` and `level` are what the ablation gave `tokencache`
    (benchmarks/results/ablation.md); `tokens="checkerboard"`, its `cell` and `rotate` were not compared. What the paper
    describes, long intervals first and one delta per block, from tokens that only see each other, is `k1=3, k2=1,
    attention="kept", level="block"`; its values of k1 and k2 are not known.

    Args:
        info: the model.
        num_steps: denoising steps.
        k1: caching interval of the first phase, see `tprr_steps`.
        k2: caching interval of the second phase.
        boundary: share of the steps in the first phase.
        cycle: reading of the interval, see `tprr_steps`.
        keep: keep ratio r in (0, 1]: kept image tokens / all image tokens on P-steps, rounded to whole tokens (per
            cell, where tokens are chosen by cell). Other tokens are always kept; `plan.summary()` shows the share of
            all tokens that comes out.
        keep_last: the share that the last of the chosen blocks keeps; those before it keep shares that fall evenly
            from `keep`, each some of the tokens of the one before. With `attention="kept"` or `"cached"` and a delta
            per block or branch, all of them share one slot where they keep the same tokens until the next I-step. All
            keep `keep`, if None.
        attention: what kept queries see, see `Update`; or `reused`, the self-attention branches are reused whole.
        blocks: indices of the blocks to prune; the others are computed at every step. All, if None.
        level: `block` keeps one delta per block, `branch` one per residual branch, `out` every branch's output before
            its gate, which is then recomputed for all tokens.
        tokens: how tokens are chosen: `uniform` (every 1/r-th), `random` (from `seed`), `checkerboard` (the same count
            in each `cell x cell` cell of the grid), or scores `[S]`: the highest are kept, cell by cell.
        cell: the side of a grid cell, k in the paper.
        seed: seed of `random`.
        rotate: choose other tokens at every P-step of a cycle, so that each token's turn comes: those that come next
            in the same order.

    Raises:
        PlanError: an option is out of range, the scores are not finite, a chosen block cannot be pruned, or blocks
            would keep tokens that the one before has not.
    """
    chosen = choose_blocks(info, blocks)
    i_steps = set(tprr_steps(num_steps, k1, k2, boundary, cycle))
    sites = pruned_sites(info, chosen, level, attention)
    check_keep(keep)
    shares = _shares(chosen, keep, keep_last, tokens)
    turns = range(count_turns(info, keep, tokens, cell) if rotate else 1)
    sets = {
        _name(turn, share, keep): choose_tokens(info, share, tokens, cell=cell, seed=seed, turn=turn, turn_keep=keep)
        for turn in turns
        for share in dict.fromkeys(shares.values())
    }
    p_steps = [step for step in range(num_steps) if step not in i_steps]
    turn_of = {step: turn % len(turns) for turn, step in enumerate(p_steps)}

    def row(step: int, block: int) -> Action:
        return Update(_name(turn_of[step], shares[block], keep)) if step in turn_of else Compute()

    actions = token_actions(sites, num_steps, attention, row)
    policy = {
        "name": "tprr", "k1": k1, "k2": k2, "boundary": boundary, "cycle": cycle, "keep": keep,
        "keep_last": keep_last, "attention": attention, "blocks": list(chosen), "level": level,
        "tokens": tokens if isinstance(tokens, str) else "scores", "cell": cell, "seed": seed, "rotate": rotate,
    }  # fmt: skip
    return info.count(CachePlan(num_steps=num_steps, actions=actions, tokens=sets, policy=policy))


def _shares(
    blocks: Sequence[int], keep: float, keep_last: float | None, tokens: Choice | torch.Tensor
) -> dict[int, float]:
    """The keep ratio of every block, falling evenly."""
    if keep_last is None:
        return dict.fromkeys(blocks, keep)
    check_keep(keep_last, "keep_last")
    if keep_last > keep:
        raise PlanError(f"keep_last={keep_last}: the last block keeps no more than the first, and keep={keep}")
    if isinstance(tokens, str) and tokens == "uniform":
        raise PlanError(
            "keep_last with tokens='uniform': the tokens of a smaller share are not among those of a larger one; use "
            "'checkerboard', 'random' or scores"
        )
    steps = max(1, len(blocks) - 1)
    return {block: keep + (keep_last - keep) * number / steps for number, block in enumerate(blocks)}


def _name(turn: int, share: float, keep: float) -> str:
    """The name of a token set."""
    return f"kept{turn}" if share == keep else f"kept{turn} x {share:.4g}"
