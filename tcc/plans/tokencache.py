"""TokenCache: token plans from learned importance, and the controls with the same counts.

What the papers leave open is an option of `tokencache`. Its default is what was best in PSNR in the ablation on the
reference model (benchmarks/results/ablation.md: 50 DDIM steps, one option changed at a time at the MACs of half of the
tokens at every second step): `attention="cached"` over `current` (3.3 dB less), `reused` (5.8) and `kept` (21);
`level="out"` over what is after the gate (6.1); learned scores over `norm` (2.2), `random` (4.4) and `uniform` (5.0);
`share=True` (2.8, but own sets have a better Frechet distance); `rotate=0` (2.9); `select="global"` over cells of 2
(2.9) and of 4 (0.5); `schedule="tprr"` over `even` (0.7); `k1=k2=1` over 2 (2.0), where `refresh=True` (0.2) and
`sets="step"` (0.3) are ahead by little. Long intervals first, as in the paper, lose 3.3 dB, and nothing with
`boundary=0.25`; long ones last lose as much, and in Frechet distance too. `cycle` only names intervals: K as `length`
is K - 1 as `p_steps`. A table trained on pairs of steps is ahead of one trained on whole runs (0.7), a network (1.1), a
price instead of a mean (1.4), the final stream as the target (1.5) and probes of each sample (2.9). Pruning all blocks
is ahead of the 9 or 7 of least importance of 12 (2.3, 3.7) and of `last_full=2` (2.2); own sets gain by `adapt="step"`
(1.9, with a variant for every step); with a price, `schedule="percentile"` is far behind `tprr` (11.2).
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import Literal

from tcc.info import ModelInfo
from tcc.learned import Importance, Probes
from tcc.plan import CachePlan
from tcc.plans.draft import Draft, Options, Ranks
from tcc.plans.options import plain_options
from tcc.plans.placement import Cycle
from tcc.plans.tokens import Level, TokenAttention

__all__ = ["tokencache"]


@plain_options
def tokencache(
    info: ModelInfo,
    *,
    num_steps: int,
    importance: Importance | Probes | str | os.PathLike[str] | None = None,
    scores: Ranks = "learned",
    schedule: Literal["tprr", "percentile", "even"] = "tprr",
    k1: int = 1,
    k2: int = 1,
    boundary: float = 0.5,
    cycle: Cycle = "p_steps",
    i_steps: int | Sequence[int] | None = None,
    attention: TokenAttention = "cached",
    level: Level = "out",
    keep: float | None = None,
    pruned: int | None = None,
    blocks: Sequence[int] | None = None,
    last_full: int = 0,
    select: Literal["grid", "global"] = "global",
    cell: int | None = None,
    adapt: Literal["run", "step"] = "run",
    sets: Literal["step", "cycle"] = "step",
    share: bool = True,
    refresh: bool = True,
    rotate: float = 0.0,
    budget: float | None = None,
    seed: int = 0,
) -> CachePlan:
    """A token plan from learned importance (TokenCache, Lou et al. 2024, arXiv 2409.18523, and its 2025 revision).

    `f^_l = w_l f_l(z_l^t) + (1 - w_l) f_l(z_l^(t+1))`; w is 1, but 0 for the tokens that pruned blocks do not keep. All
    P-steps share one variant, unless `adapt="step"`: counts are fixed, tokens are inputs. The papers leave most options
    open; the defaults come from the ablation on the reference model (`benchmarks/results/ablation.md`).

    Args:
        info: the model.
        num_steps: denoising steps.
        importance: what `tcc train predictor` learned, or its file. `Probes` rank each sample's tokens in the graph.
        scores: how tokens are ranked. `learned`, or a control with the same counts: `random` (from `seed`, anew for
            every block and P-step), `uniform` (spread evenly), `norm` (norm of the stored change, per sample, in the
            graph). Blocks and I-steps still follow the importance, where one is given.
        schedule: where I-steps are: `tprr`, see `tprr_steps`; `percentile`, see `percentile_steps` (the revision), for
            an importance learned with a price; `even`, spread evenly from the first step to the last.
        k1: caching interval of the first phase.
        k2: caching interval of the second phase.
        boundary: share of the steps in the first phase.
        cycle: reading of the interval.
        i_steps: how many I-steps `percentile` and `even` place, by default as many as `tprr` has; or the steps
            themselves, whatever the schedule (`tcc train steps` searches them).
        attention: what kept queries see, see `Update`; `reused`: self-attention is reused whole (ToCa).
        level: what is stored: a delta per `block`, one per `branch`, or branch outputs before the gate (`out`).
        keep: share of the tokens that a pruned block recomputes, in (0, 1], rounded to whole tokens (per cell with
            `grid`). 0.5, unless `budget` solves for it.
        pruned: how many blocks are pruned, those of least mean importance (adaptive block selection). By default all.
        blocks: the indices of the blocks that may be pruned. By default all whose tokens can be.
        last_full: so many of the last blocks are never pruned (the revision).
        select: `grid`, the same number in each cell of the grid; `global`, the highest wherever they are: as many in
            every block, or with `share=False` as many as it has of the highest pairs of block and token (the revision).
        cell: the side of a cell. By default 4 where the grid has several such cells (in the ablation 2.4 dB ahead of
            2), else 2.
        adapt: whether blocks and counts are chosen once for the `run` or at every `step`.
        sets: whether every P-step has its own tokens, or the P-steps of a cycle share them.
        share: whether all pruned blocks keep the same tokens, of highest mean importance; `kept` then merges blocks.
        refresh: whether recomputed tokens replace what is stored.
        rotate: what a token's rank loses each time it is kept; 1 or more lets all tokens take turns. With ranks from
            the graph: what it gains at each step that it waits after an I-step.
        budget: the bound to reach (uncached MACs / planned MACs). Solves for `keep`, or for `pruned` where `keep` is
            given: the most expensive plan that reaches it.
        seed: seed of `random`.

    Raises:
        PlanError: an option is out of range or lacks what it needs, the importance does not fit or ranks all alike, no
            block can be pruned, or the budget is out of reach; the message then names the nearest bound within reach.
    """
    options = Options(
        num_steps=num_steps, scores=scores, schedule=schedule, k1=k1, k2=k2, boundary=boundary, cycle=cycle,
        i_steps=i_steps, attention=attention, level=level, last_full=last_full, select=select, cell=cell, adapt=adapt,
        sets=sets, share=share, refresh=refresh, rotate=rotate, seed=seed,
    )  # fmt: skip
    return Draft(info, options, importance, blocks).solve(budget, keep, pruned)
