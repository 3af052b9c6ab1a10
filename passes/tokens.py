"""The two token operators that the passes move around before they are lowered to ATen.

They are plain functions, so a graph that holds them runs as it is: every stage of the pipeline can be
compared with the reference.
"""

from __future__ import annotations

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


def gather_tokens(x: torch.Tensor, kept: torch.Tensor, dim: int) -> torch.Tensor:
    """The kept tokens of `x`: `[..., n, ...]` -> `[..., k, ...]` along `dim`.

    Args:
        x: any value with one row per token along `dim`.
        kept: `[k]` int64, the kept token positions.
        dim: the token dimension.
    """
    gathered: torch.Tensor = torch.ops.aten.index_select.default(x, dim, kept)
    return gathered


def scatter_tokens(
    base: torch.Tensor, rows: torch.Tensor, kept: torch.Tensor, place: torch.Tensor, dim: int
) -> torch.Tensor:
    """`base` with the kept tokens replaced by `rows`.

    Written as a gather and a choice rather than as a scatter: it fuses with the pointwise work around it, and every
    export target has it.

    Args:
        base: `[..., n, ...]`, the values of the dropped tokens.
        rows: `[..., k, ...]`, the values of the kept ones.
        kept: `[k]` int64, the kept token positions (the name of the token set; `place` says the same).
        place: `[n]` int64, where each token stands among the kept ones; -1 for dropped tokens.
        dim: the token dimension.
    """
    aten = torch.ops.aten
    is_kept = aten.view.default(aten.ge.Scalar(place, 0), broadcast_shape(base.dim(), dim, place.shape[0]))
    spread = aten.index_select.default(rows, dim, aten.clamp.default(place, 0))
    replaced: torch.Tensor = aten.where.self(is_kept, spread, base)
    return replaced


def broadcast_shape(rank: int, dim: int, size: int) -> list[int]:
    """The shape that lines a vector of `size` up with dimension `dim` of a tensor of `rank`."""
    return [size if i == dim else 1 for i in range(rank)]
