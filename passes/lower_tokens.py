"""Write the token operators in ATen, so that any backend or exporter can take the graph."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import fx

from tcc.passes.base import Pass
from tcc.passes.graph import emit, shape
from tcc.passes.tokens import broadcast_shape, gather_tokens, scatter_tokens

__all__ = ["LowerTokens"]

aten = torch.ops.aten


@dataclass(frozen=True)
class LowerTokens(Pass):
    """Replace `gather_tokens` and `scatter_tokens` by ATen operators.

    Before: `gather_tokens(x, kept, 1)`, `scatter_tokens(base, rows, kept, place, 1)`
    After:  `index_select(x, 1, kept)`, `where(place >= 0, index_select(rows, 1, clamp(place, 0)), base)`

    Where every sample has its own set, `gather` with the positions expanded over the other dimensions takes the place
    of `index_select`.
    """

    def run(self, gm: fx.GraphModule) -> int:
        """Edit `gm`; see the class."""
        edits = 0
        for node in list(gm.graph.nodes):
            if node.target not in (gather_tokens, scatter_tokens):
                continue
            with gm.graph.inserting_before(node):
                new = _gather(gm.graph, node, *node.args) if node.target is gather_tokens else _scatter(gm.graph, node)
            node.replace_all_uses_with(new)
            gm.graph.erase_node(node)
            edits += 1
        return edits


def _gather(graph: fx.Graph, like: fx.Node, x: fx.Node, index: fx.Node, dim: int, batch: int | None = None) -> fx.Node:
    if batch is None:
        return emit(graph, aten.index_select.default, (x, dim, index), like=like)
    count = shape(index)[1]
    sizes = [count if i == dim else size for i, size in enumerate(shape(x))]
    aligned = _aligned(graph, index, broadcast_shape(sizes, dim, batch), dim, batch, like)
    return emit(graph, aten.gather.default, (x, dim, emit(graph, aten.expand.default, (aligned, sizes))), like=like)


def _scatter(graph: fx.Graph, node: fx.Node) -> fx.Node:
    base, rows, _, place, dim, *rest = node.args
    sizes = broadcast_shape(shape(base), dim, *rest)  # type: ignore[arg-type]
    is_kept = emit(graph, aten.ge.Scalar, (place, 0), like=node)
    is_kept = _aligned(graph, is_kept, sizes, dim, rest[0] if rest else None, node)  # type: ignore[arg-type]
    clamped = emit(graph, aten.clamp.default, (place, 0), like=node)
    spread = _gather(graph, node, rows, clamped, dim, *rest)  # type: ignore[arg-type]
    return emit(graph, aten.where.self, (is_kept, spread, base), like=node)


def _aligned(graph: fx.Graph, x: fx.Node, sizes: list[int], dim: int, batch: int | None, like: fx.Node) -> fx.Node:
    """`x`, `[n]` or `[B, n]`, as a value of shape `sizes`."""
    if batch is None:
        return emit(graph, aten.view.default, (x, sizes), like=like)
    x = x if batch < dim else emit(graph, aten.transpose.int, (x, 0, 1), like=like)
    return emit(graph, aten.reshape.default, (x, sizes), like=like)
