"""Write the token operators in ATen, so that any backend or exporter can take the graph."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import fx

from tcc.passes.base import Pass
from tcc.passes.graph import emit, shape, value
from tcc.passes.tokens import broadcast_shape, gather_tokens, scatter_tokens

__all__ = ["LowerTokens"]

aten = torch.ops.aten


@dataclass(frozen=True)
class LowerTokens(Pass):
    """Replace `gather_tokens` and `scatter_tokens` by ATen operators.

    Before: `gather_tokens(x, kept, 1)`, `scatter_tokens(base, rows, kept, place, 1)`
    After:  `index_select(x, 1, kept)`, `where(place >= 0, index_select(rows, 1, clamp(place, 0)), base)`

    Where every sample has its own set, `gather` with the positions expanded over the other dimensions takes the place
    of `index_select`. Where others are joined to the tokens, their positions are joined to the kept ones.
    """

    def run(self, gm: fx.GraphModule) -> int:
        """Edit `gm`; see the class."""
        edits = 0
        for node in list(gm.graph.nodes):
            if node.target not in (gather_tokens, scatter_tokens):
                continue
            with gm.graph.inserting_before(node):
                lower = _gather if node.target is gather_tokens else _scatter
                new = lower(gm.graph, node, *node.args)
            node.replace_all_uses_with(new)
            gm.graph.erase_node(node)
            edits += 1
        return edits


def _gather(
    graph: fx.Graph,
    like: fx.Node,
    x: fx.Node,
    kept: fx.Node,
    dim: int,
    batch: int | None = None,
    others: tuple[int, int] = (0, 0),
) -> fx.Node:
    before, after = others
    if before or after:
        rows, moved = shape(x)[dim], emit(graph, aten.add.Tensor, (kept, before), like=like)
        kept = _between(graph, moved, (0, before), (rows - after, rows), like)
    return _select(graph, like, x, kept, dim, batch)


def _select(graph: fx.Graph, like: fx.Node, x: fx.Node, index: fx.Node, dim: int, batch: int | None) -> fx.Node:
    if batch is None:
        return emit(graph, aten.index_select.default, (x, dim, index), like=like)
    count = shape(index)[1]
    sizes = [count if i == dim else size for i, size in enumerate(shape(x))]
    aligned = _aligned(graph, index, broadcast_shape(sizes, dim, batch), dim, batch, like)
    return emit(graph, aten.gather.default, (x, dim, emit(graph, aten.expand.default, (aligned, sizes))), like=like)


def _scatter(
    graph: fx.Graph,
    like: fx.Node,
    base: fx.Node,
    rows: fx.Node,
    _: fx.Node,
    place: fx.Node,
    dim: int,
    batch: int | None = None,
    others: tuple[int, int] = (0, 0),
) -> fx.Node:
    before, after = others
    if before or after:
        count = shape(rows)[dim]
        moved = emit(graph, aten.add.Tensor, (place, before), like=like)
        moved = emit(graph, aten.where.self, (emit(graph, aten.ge.Scalar, (place, 0), like=like), moved, place))
        place = _between(graph, moved, (0, before), (count - after, count), like)
    dims = (dim,) if batch is None else (dim, batch)
    is_kept = emit(graph, aten.ge.Scalar, (place, 0), like=like)
    is_kept = _aligned(graph, is_kept, broadcast_shape(shape(base), *dims), dim, batch, like)
    clamped = emit(graph, aten.clamp.default, (place, 0), like=like)
    spread = _select(graph, like, rows, clamped, dim, batch)
    return emit(graph, aten.where.self, (is_kept, spread, base), like=like)


def _between(graph: fx.Graph, x: fx.Node, first: tuple[int, int], last: tuple[int, int], like: fx.Node) -> fx.Node:
    """Positions `x`, `[k]` or `[B, k]`, between two ranges of positions that are the same for all samples."""
    parts = []
    for start, stop in (first, last):
        numbers = emit(graph, aten.arange.start, (start, stop), {"device": value(x).device}, like=like)
        parts.append(emit(graph, aten.expand.default, (numbers, [*shape(x)[:-1], stop - start]), like=like))
    return emit(graph, aten.cat.default, ([parts[0], x, parts[1]], -1), like=like)


def _aligned(graph: fx.Graph, x: fx.Node, sizes: list[int], dim: int, batch: int | None, like: fx.Node) -> fx.Node:
    """`x`, `[n]` or `[B, n]`, as a value of shape `sizes`."""
    if batch is None:
        return emit(graph, aten.view.default, (x, sizes), like=like)
    x = x if batch < dim else emit(graph, aten.transpose.int, (x, 0, 1), like=like)
    return emit(graph, aten.reshape.default, (x, sizes), like=like)
