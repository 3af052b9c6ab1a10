"""The two token operators that the passes move around before they are lowered to ATen.

They are plain functions, so a graph that holds them runs as it is: every stage of the pipeline can be
compared with the reference.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

__all__ = ["Axis", "gather_tokens", "scatter_tokens"]


@dataclass(frozen=True)
class Axis:
    """Where the tokens lie in a value: dimension `dim` has size `outer * (before + n + after) * inner`, row-major.

    A plain token dimension has `outer == inner == 1`; `[B * n, D]` has `Axis(0, outer=B)`. Where tokens of another
    stream are joined in, `[B, text + n, D]`, they are no tokens of this one: `Axis(1, before=text)`. A gather takes
    all of them along.
    """

    dim: int
    outer: int = 1
    inner: int = 1
    before: int = 0
    after: int = 0

    @property
    def plain(self) -> bool:
        """Whether the tokens, and others that are joined to them, have the dimension for themselves."""
        return self.outer == self.inner == 1

    @property
    def others(self) -> tuple[int, ...]:
        """`(before, after)` where others are joined to the tokens, else ()."""
        return (self.before, self.after) if self.before or self.after else ()

    def at(self, dim: int, outer: int | None = None, inner: int | None = None) -> Axis:
        """The same tokens in another dimension, or sharing it with something else."""
        return Axis(
            dim, self.outer if outer is None else outer, self.inner if inner is None else inner, self.before, self.after
        )

    def count(self, sizes: Sequence[int]) -> int:
        """How many tokens a value of shape `sizes` has along this axis, n."""
        return sizes[self.dim] // (self.outer * self.inner) - self.before - self.after

    def size(self, count: int) -> int:
        """The size of the dimension for `count` tokens."""
        return self.outer * (self.before + count + self.after) * self.inner


def gather_tokens(
    x: torch.Tensor, kept: torch.Tensor, dim: int, batch: int | None = None, others: Sequence[int] = (0, 0)
) -> torch.Tensor:
    """The kept tokens of `x`: `[..., n, ...]` -> `[..., k, ...]` along `dim`.

    Args:
        x: any value with one row per token along `dim`.
        kept: `[k]` int64, the kept token positions; `[B, k]` where every sample has its own.
        dim: the token dimension.
        batch: the samples' dimension, for `[B, k]`.
        others: how many rows before and after the tokens belong to others; they are all taken along.
    """
    kept = _among_others(kept, x.shape[dim], others)
    if batch is None:
        selected: torch.Tensor = torch.ops.aten.index_select.default(x, dim, kept)
        return selected
    sizes = [kept.shape[1] if i == dim else size for i, size in enumerate(x.shape)]
    gathered: torch.Tensor = torch.ops.aten.gather.default(x, dim, _aligned(kept, sizes, dim, batch).expand(sizes))
    return gathered


def scatter_tokens(
    base: torch.Tensor,
    rows: torch.Tensor,
    kept: torch.Tensor,
    place: torch.Tensor,
    dim: int,
    batch: int | None = None,
    others: Sequence[int] = (0, 0),
) -> torch.Tensor:
    """`base` with the kept tokens replaced by `rows`.

    Written as a gather and a choice rather than as a scatter: it fuses with the pointwise work around it, and every
    export target has it.

    Args:
        base: `[..., n, ...]`, the values of the dropped tokens.
        rows: `[..., k, ...]`, the values of the kept ones.
        kept: `[k]` or `[B, k]` int64, the kept token positions (the name of the token set; `place` says the same).
        place: `[n]` or `[B, n]` int64, where each token stands among the kept ones; -1 for dropped tokens.
        dim: the token dimension.
        batch: the samples' dimension, for `[B, k]`.
        others: how many rows before and after the tokens belong to others; they are all replaced.
    """
    place = _places_among_others(place, rows.shape[dim], others)
    is_kept = _aligned(place >= 0, list(base.shape), dim, batch)
    spread = gather_tokens(rows, place.clamp(min=0), dim, batch)
    replaced: torch.Tensor = torch.ops.aten.where.self(is_kept, spread, base)
    return replaced


def _among_others(kept: torch.Tensor, rows: int, others: Sequence[int]) -> torch.Tensor:
    """Kept positions `[..., k]` among all `rows` of a dimension that holds others too; the others are kept."""
    before, after = others
    first, last = _numbers(kept, 0, before), _numbers(kept, rows - after, rows)
    return torch.cat([first, kept + before, last], -1) if before or after else kept


def _places_among_others(place: torch.Tensor, count: int, others: Sequence[int]) -> torch.Tensor:
    """Places `[..., n]` among the kept ones of a dimension that holds others too, of which `count` in all are kept."""
    before, after = others
    first, last = _numbers(place, 0, before), _numbers(place, count - after, count)
    moved = torch.where(place >= 0, place + before, place)
    return torch.cat([first, moved, last], -1) if before or after else place


def _numbers(like: torch.Tensor, start: int, stop: int) -> torch.Tensor:
    return torch.arange(start, stop, device=like.device).expand(*like.shape[:-1], stop - start)


def broadcast_shape(sizes: Sequence[int], *dims: int) -> list[int]:
    """`sizes` with 1 in all dimensions but `dims`."""
    return [size if i in dims else 1 for i, size in enumerate(sizes)]


def _aligned(x: torch.Tensor, sizes: Sequence[int], dim: int, batch: int | None) -> torch.Tensor:
    """`x`, `[n]` or `[B, n]`, lined up with the dimensions of `sizes`."""
    dims = (dim,) if batch is None else (dim, batch)
    return (x if batch is None or batch < dim else x.T).reshape(broadcast_shape(sizes, *dims))
