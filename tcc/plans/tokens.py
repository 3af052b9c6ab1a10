"""Which tokens and which sites a token plan acts on; shared by the policies that prune tokens."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from numbers import Integral
from typing import Any, Literal, get_args

import numpy as np
import torch

from tcc.errors import PlanError
from tcc.info import ModelInfo
from tcc.passes.sites import Site
from tcc.plan import Action, Attention, Reuse, Update
from tcc.plan.scores import Fixed, Term
from tcc.plans.checks import check_keep, check_known, check_seed, check_whole

__all__ = [
    "Choice",
    "Level",
    "TokenAttention",
    "best_per_cell",
    "checkerboard",
    "choose_blocks",
    "choose_tokens",
    "default_cell",
    "grid_cells",
    "keep_per_cell",
    "pruned_sites",
    "token_actions",
    "with_others",
]

#: What tokens that are not image tokens score, which are always kept: the terms of a score are of the order of 1.
_ALWAYS = 1e6

Choice = Literal["uniform", "random", "checkerboard"]
Level = Literal["block", "branch", "out"]
TokenAttention = Attention | Literal["reused"]


_AMONG_ALL = (
    "choose among all tokens: tokens='uniform' or 'random' of tprr, select='global' of tokencache, cell=0 of toca "
    "and duca"
)


def choose_tokens(
    info: ModelInfo,
    keep: float,
    tokens: Choice | torch.Tensor,
    *,
    cell: int = 2,
    seed: int = 0,
    turn: int = 0,
    turn_keep: float | None = None,
) -> torch.Tensor:
    """The kept tokens of one P-step, `[k]` int64, sorted: the chosen image tokens, and all tokens that are none.

    Args:
        info: the model.
        keep: keep ratio in (0, 1], of the image tokens.
        tokens: see `tprr`.
        cell: the side of a grid cell.
        seed: seed of `random`.
        turn: 0, 1, ...: successive turns keep those that come next in the same order, and the first ones after the
            last, so that each token's turn comes; see `count_turns`.
        turn_keep: the keep ratio that turns go on by, where others keep more than this choice: it then is some of
            theirs at every turn. `keep`, if None.

    Raises:
        PlanError: an option is out of range, or the scores are unusable.
    """
    check_keep(keep)
    check_seed(seed)
    check_whole("cell", cell, 1)
    check_whole("turn", turn, 0)
    start, stop = info.image_tokens
    n = stop - start
    count, skipped = max(1, round(keep * n)), turn * _turn(info, turn_keep or keep, tokens, cell)[1]
    if tokens == "uniform":
        return with_others(info, start + (np.floor(np.arange(count) * n / count).astype(np.int64) + turn) % n)
    if tokens == "random":
        order = np.random.default_rng([seed, 0]).permutation(n)
        return with_others(info, start + order[(skipped + np.arange(count)) % n])
    scores = checkerboard(info, cell) if isinstance(tokens, str) else _scores(tokens, info.num_tokens)
    return best_per_cell(info, scores, keep_per_cell(keep, cell), cell, skipped)


def count_turns(info: ModelInfo, keep: float, tokens: Choice | torch.Tensor, cell: int = 2) -> int:
    """After how many turns of `choose_tokens` every image token was kept.

    Raises:
        PlanError: an option is out of range.
    """
    check_keep(keep)
    check_whole("cell", cell, 1)
    places, kept = _turn(info, keep, tokens, cell)
    return math.ceil(places / kept)


def _turn(info: ModelInfo, keep: float, tokens: Choice | torch.Tensor, cell: int) -> tuple[int, int]:
    """Among how many places turns go round, of the image or of a cell, and how many of them one keeps."""
    n = info.image_tokens[1] - info.image_tokens[0]
    count = max(1, round(keep * n))
    if isinstance(tokens, torch.Tensor) or tokens == "checkerboard":
        return cell * cell, keep_per_cell(keep, cell)
    if tokens == "random":
        return n, count
    if tokens == "uniform":
        return math.ceil(n / count), 1  # gaps are that long at most, and all move on by one token
    raise PlanError(f"tokens={tokens!r}: use 'uniform', 'random', 'checkerboard' or a score per token")


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
    if len(grid) not in (2, 3):
        raise PlanError(
            f"the model's token grid is {grid or 'unknown'} for {info.num_tokens} tokens: grid cells need an image "
            f"grid; {_AMONG_ALL}"
        )
    frames, h, w = (1, *grid) if len(grid) == 2 else grid
    if h % cell or w % cell:
        raise PlanError(
            f"cell={cell}: the grid is {h} x {w}; the cell's side must divide both. Give another, or {_AMONG_ALL}"
        )
    return frames, h, w


def checkerboard(info: ModelInfo, cell: int) -> np.ndarray[Any, Any]:
    """Scores `[S]` that rank the places of a cell: those of one colour first, row by row, then those of the other."""
    frames, h, w = _grid2d(info, cell)
    side = cell * cell
    places = sorted(range(side), key=lambda p: ((p // cell + p % cell) % 2, p))
    rank = np.empty(side, dtype=np.int64)
    rank[places] = np.arange(side)
    scores = np.zeros(info.num_tokens)
    tile = -rank.reshape(cell, cell).astype(np.float64)
    scores[slice(*info.image_tokens)] = np.tile(tile, (frames, h // cell, w // cell)).reshape(-1)
    return scores


def keep_per_cell(keep: float, cell: int) -> int:
    """How many tokens of a cell a keep ratio leaves: at least one."""
    return max(1, round(keep * cell * cell))


def best_per_cell(
    info: ModelInfo, scores: np.ndarray[Any, Any], count: int, cell: int, skipped: int = 0
) -> torch.Tensor:
    """The `count` highest scores `[S]` of every cell, and all tokens that are not image tokens, `[k]` int64, sorted.

    Grid-based pruning, TokenCache v1. Where some are `skipped`, those that come after them, and then the highest.
    """
    cells = grid_cells(info, cell)
    order = np.argsort(-scores[cells], axis=1, kind="stable")[:, (skipped + np.arange(count)) % (cell * cell)]
    return with_others(info, np.take_along_axis(cells, order, axis=1).reshape(-1))


def with_others(info: ModelInfo, kept: np.ndarray[Any, Any]) -> torch.Tensor:
    """The kept image tokens, and all tokens that are not image tokens, `[k]` int64, sorted."""
    others = np.setdiff1d(np.arange(info.num_tokens), np.arange(*info.image_tokens))
    return torch.from_numpy(np.sort(np.concatenate([others, kept])))


def others_first(info: ModelInfo) -> tuple[dict[str, torch.Tensor], tuple[tuple[float, Term], ...]]:
    """What makes a dynamic set keep all tokens that are not image tokens: tables, and terms of its score."""
    start, stop = info.image_tokens
    if stop - start == info.num_tokens:
        return {}, ()
    others = torch.full((info.num_tokens,), _ALWAYS)
    others[start:stop] = 0.0
    return {"others": others}, ((1.0, Fixed("others")),)


def default_cell(info: ModelInfo) -> int:
    """The side of a grid cell where none is given: 4 where the grid has several such cells, else 2."""
    return 4 if math.prod(info.grid) > 4 * 4 and not any(side % 4 for side in info.grid[-2:]) else 2


def grid_cells(info: ModelInfo, cell: int) -> np.ndarray[Any, Any]:
    """The tokens of every grid cell, by their positions in the stream, `[cells, cell * cell]`.

    Raises:
        PlanError: the model's tokens lie on no image grid, or the cell's side does not divide it.
    """
    frames, h, w = _grid2d(info, cell)
    index = np.arange(*info.image_tokens).reshape(frames, h // cell, cell, w // cell, cell)
    return index.transpose(0, 1, 3, 2, 4).reshape(-1, cell * cell)


def choose_blocks(info: ModelInfo, blocks: Iterable[int] | None) -> tuple[int, ...]:
    """The block indices that a policy acts on, in order: all of them where none are given."""
    total = len(info.blocks)
    if isinstance(blocks, str) or not isinstance(blocks, Iterable | None):
        raise PlanError(f"blocks={blocks!r}: give a list of blocks, of 0..{total - 1}")
    chosen = tuple(range(total)) if blocks is None else tuple(blocks)
    for block in chosen:
        if isinstance(block, bool) or not isinstance(block, Integral) or not 0 <= block < total:
            raise PlanError(f"blocks: there is no block {block}; the model has blocks 0..{total - 1}")
    return tuple(sorted({int(block) for block in chosen}))


def pruned_sites(info: ModelInfo, blocks: Sequence[int], level: Level, attention: TokenAttention) -> list[Site]:
    """The sites that a token plan acts on: with `cached` attention the keys of the blocks, then their deltas.

    All are on the main stream; other streams are computed whole at every step.

    Raises:
        PlanError: the level is unknown, a site that would be updated cannot be, or a block has no such site.
    """
    check_known("level", level, get_args(Level))
    check_known("attention", attention, (*get_args(Attention), "reused"))
    kind = {"block": "block", "branch": "delta", "out": "out"}[level]
    if attention == "reused" and level == "block":
        raise PlanError("attention='reused' keeps the branches of a block apart: use level='branch' or 'out'")
    chosen = [site for site in info.sites.values() if site.block in blocks and not site.stream]
    sites = [site for site in chosen if site.kind == kind]
    for site in sites:
        if not site.prunable and not (attention == "reused" and site.attention):
            raise PlanError(f"site '{site.name}' cannot be pruned: {site.reason}. Leave its block out of `blocks`")
    for block in sorted(set(blocks) - {site.block for site in sites}):
        raise PlanError(
            f"block '{info.blocks[block]}' has no delta of its own, because more than its branches changes the stream "
            "in it: use level='branch', or leave it out of `blocks`"
        )
    keys = [site for site in chosen if site.kind == "kv"] if attention == "cached" else []
    return [*keys, *sites]


def token_actions(
    sites: Sequence[Site], num_steps: int, attention: TokenAttention, row: Callable[[int, int], Action]
) -> dict[tuple[int, str], Action]:
    """The table of a token plan.

    Args:
        sites: what `pruned_sites` gave.
        num_steps: denoising steps.
        attention: what kept queries see; `reused`: self-attention is reused whole where a block is updated (ToCa, Zou
            et al. 2024).
        row: the action of a block at a step, given step and block.
    """
    actions: dict[tuple[int, str], Action] = {}
    for step in range(num_steps):
        for site in sites:
            action = row(step, site.block)
            if isinstance(action, Update):
                if attention != "reused":
                    action = replace(action, attention=attention)
                elif site.attention:
                    action = Reuse()
                else:
                    action = replace(action, attention="kept")
            actions[step, site.name] = action
    return actions
