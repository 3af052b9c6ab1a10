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
    """Where the tokens lie in a value: dimension `dim` has size `outer * n * inner`, row-major.

    A plain token dimension has `outer == inner == 1`; `[B * n, D]` has `Axis(0, outer=B)`.
    """

    dim: int
    outer: int = 1
    inner: int = 1

    @property
    def plain(self) -> bool:
        """Whether the dimension counts tokens and nothing else."""
        return self.outer == self.inner == 1


def gather_tokens(x: torch.Tensor, kept: torch.Tensor, dim: int, batch: int | None = None) -> torch.Tensor:
    """The kept tokens of `x`: `[..., n, ...]` -> `[..., k, ...]` along `dim`.

    Args:
        x: any value with one row per token along `dim`.
        kept: `[k]` int64, the kept token positions; `[B, k]` where every sample has its own.
        dim: the token dimension.
        batch: the samples' dimension, for `[B, k]`.
    """
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
    """
    is_kept = _aligned(place >= 0, list(base.shape), dim, batch)
    spread = gather_tokens(rows, place.clamp(min=0), dim, batch)
    replaced: torch.Tensor = torch.ops.aten.where.self(is_kept, spread, base)
    return replaced


def broadcast_shape(sizes: Sequence[int], *dims: int) -> list[int]:
    """`sizes` with 1 in all dimensions but `dims`."""
    return [size if i in dims else 1 for i, size in enumerate(sizes)]


def _aligned(x: torch.Tensor, sizes: Sequence[int], dim: int, batch: int | None) -> torch.Tensor:
    """`x`, `[n]` or `[B, n]`, lined up with the dimensions of `sizes`."""
    dims = (dim,) if batch is None else (dim, batch)
    return (x if batch is None or batch < dim else x.T).reshape(broadcast_shape(sizes, *dims))
