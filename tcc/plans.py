"""Policies: functions `(info, ...) -> CachePlan`, one per method, all with one signature style.

Each docstring names the method and its source. `info` is what `tcc.inspect` returns.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from typing import Any, Literal

import numpy as np
import torch

from tcc.errors import PlanError
from tcc.info import ModelInfo
from tcc.plan import Action, Attention, CachePlan, Compute, Reuse, Update

__all__ = ["choose_tokens", "fora", "full", "tprr", "tprr_steps"]

Cycle = Literal["p_steps", "length"]
Choice = Literal["uniform", "random", "checkerboard"]


def full(info: ModelInfo, *, num_steps: int) -> CachePlan:
    """Compute everything at every step: the uncached model, as a plan.

    Args:
        info: the model.
        num_steps: denoising steps.
    """
    return info.count(CachePlan(num_steps=num_steps, actions={}, policy={"name": "full"}))


def fora(info: ModelInfo, *, num_steps: int, interval: int = 3, sites: Literal["out", "delta"] = "out") -> CachePlan:
    """FORA (Selvaraju et al., 2024): compute every `interval`-th step, reuse all branch outputs in between.

    Steps are counted as in the paper's code: the descending index `num_steps - 1 - step` is a multiple of `interval`,
    or it is the first step.

    Args:
        info: the model.
        num_steps: denoising steps.
        interval: steps from one computed step to the next, N in the paper.
        sites: `out` keeps the branch outputs before the gate (the paper; the gate is recomputed), `delta` after it.

    Raises:
        PlanError: the interval is below 1, or the sites are unknown.
    """
    if interval < 1:
        raise PlanError(f"fora(interval={interval}): the interval is at least 1 (1 computes every step)")
    if sites not in ("out", "delta"):
        raise PlanError(f"fora(sites={sites!r}): use 'out' or 'delta'")
    computed = {s for s in range(num_steps) if s == 0 or (num_steps - 1 - s) % interval == 0}
    names = [name for name, site in info.sites.items() if site.kind == sites]
    actions: dict[tuple[int, str], Action] = {
        (step, name): Compute() if step in computed else Reuse() for step in range(num_steps) for name in names
    }
    policy = {"name": "fora", "interval": interval, "sites": sites}
    return info.count(CachePlan(num_steps=num_steps, actions=actions, policy=policy))


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
    chosen = _blocks(info, blocks)
    i_steps = set(tprr_steps(num_steps, k1, k2, boundary, cycle))
    names = _delta_sites(info, chosen, level)
    _check_keep(keep)
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


def choose_tokens(
    info: ModelInfo, keep: float, tokens: Choice | torch.Tensor, *, cell: int = 2, seed: int = 0, turn: int = 0
) -> torch.Tensor:
    """The kept tokens of one P-step, `[k]` int64, sorted.

    Args:
        info: the model.
        keep: keep ratio in (0, 1].
        tokens: see `tprr`.
        cell: the side of a grid cell.
        seed: seed of `random`.
        turn: 0, 1, ...: shifts the choice, so that successive turns keep different tokens.

    Raises:
        PlanError: the ratio or the cell is out of range, or the scores are unusable.
    """
    n = info.num_tokens
    _check_keep(keep)
    count = max(1, round(keep * n))
    if isinstance(tokens, torch.Tensor):
        return _best_per_cell(info, _scores(tokens, n), keep, cell)
    if tokens == "uniform":
        places = (np.floor(np.arange(count) * n / count).astype(np.int64) + turn) % n
        return torch.from_numpy(np.sort(places))
    if tokens == "random":
        order = np.random.default_rng([seed, turn]).permutation(n)
        return torch.from_numpy(np.sort(order[:count]))
    if tokens == "checkerboard":
        return _best_per_cell(info, _checkerboard(info, cell, turn), keep, cell)
    raise PlanError(f"tokens={tokens!r}: use 'uniform', 'random', 'checkerboard' or a score per token")


def _check_keep(keep: float) -> None:
    if not 0 < keep <= 1:
        raise PlanError(f"keep={keep}: the keep ratio is in (0, 1]; to reuse all tokens use a reuse plan such as fora")


def _scores(scores: torch.Tensor, n: int) -> np.ndarray[Any, Any]:
    if tuple(scores.shape) != (n,):
        raise PlanError(f"scores have shape {list(scores.shape)}, expected one per token: [{n}]")
    if not bool(torch.isfinite(scores).all()):
        bad = int((~torch.isfinite(scores)).nonzero()[0])
        raise PlanError(f"the score of token {bad} is {float(scores[bad])}: scores must be finite")
    return scores.detach().double().cpu().numpy()


def _grid2d(info: ModelInfo, cell: int) -> tuple[int, int, int]:
    """Frames, height and width of the token grid."""
    grid = info.grid
    if len(grid) not in (2, 3) or math.prod(grid) != info.num_tokens:
        raise PlanError(
            f"the model's token grid is {grid or 'unknown'} for {info.num_tokens} tokens: grid cells need an image "
            "grid; use tokens='uniform' or 'random'"
        )
    frames, h, w = (1, *grid) if len(grid) == 2 else grid
    if cell < 1 or h % cell or w % cell:
        raise PlanError(f"cell={cell}: the grid is {h} x {w}; the cell's side must divide both")
    return frames, h, w


def _checkerboard(info: ModelInfo, cell: int, turn: int) -> np.ndarray[Any, Any]:
    """Scores that rank the places of a cell by a bit-reversed (Bayer-like) order, shifted by `turn`."""
    frames, h, w = _grid2d(info, cell)
    side = cell * cell
    places = sorted(range(side), key=lambda p: ((p // cell + p % cell) % 2, p))
    rank = np.empty(side, dtype=np.int64)
    rank[places] = np.arange(side)
    rank = (rank - turn) % side
    tile = -rank.reshape(cell, cell).astype(np.float64)
    return np.tile(tile, (frames, h // cell, w // cell)).reshape(-1)


def _best_per_cell(info: ModelInfo, scores: np.ndarray[Any, Any], keep: float, cell: int) -> torch.Tensor:
    """The same number of tokens in every cell: the highest scores (grid-based pruning, TokenCache v1)."""
    frames, h, w = _grid2d(info, cell)
    count = max(1, round(keep * cell * cell))
    index = np.arange(info.num_tokens).reshape(frames, h // cell, cell, w // cell, cell)
    cells = index.transpose(0, 1, 3, 2, 4).reshape(-1, cell * cell)
    order = np.argsort(-scores[cells], axis=1, kind="stable")[:, :count]
    return torch.from_numpy(np.sort(np.take_along_axis(cells, order, axis=1).reshape(-1)))


def _blocks(info: ModelInfo, blocks: Iterable[int] | None) -> tuple[int, ...]:
    total = len(info.blocks)
    chosen = tuple(range(total)) if blocks is None else tuple(blocks)
    for block in chosen:
        if not 0 <= block < total:
            raise PlanError(f"blocks: there is no block {block}; the model has blocks 0..{total - 1}")
    return chosen


def _delta_sites(info: ModelInfo, blocks: Sequence[int], level: str) -> list[str]:
    kind = {"block": "block", "branch": "delta", "out": "out"}.get(level)
    if kind is None:
        raise PlanError(f"level={level!r}: use 'block', 'branch' or 'out'")
    sites = [site for site in info.sites.values() if site.kind == kind and site.block in blocks]
    for site in sites:
        if not site.prunable:
            raise PlanError(f"site '{site.name}' cannot be pruned: {site.reason}. Leave its block out of `blocks`")
    for block in sorted(set(blocks) - {site.block for site in sites}):
        raise PlanError(
            f"block '{info.blocks[block]}' has no delta of its own, because more than its branches changes the stream "
            "in it: use level='branch', or leave it out of `blocks`"
        )
    return [site.name for site in sites]
