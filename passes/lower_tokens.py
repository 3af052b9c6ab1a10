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
    """

    def run(self, gm: fx.GraphModule) -> int:
        """Edit `gm`; see the class."""
        edits = 0
        for node in list(gm.graph.nodes):
            if node.target is gather_tokens:
                x, kept, dim = node.args
                with gm.graph.inserting_before(node):
                    new = emit(gm.graph, aten.index_select.default, (x, dim, kept), like=node)
            elif node.target is scatter_tokens:
                with gm.graph.inserting_before(node):
                    new = _scatter(gm.graph, node)
            else:
                continue
            node.replace_all_uses_with(new)
            gm.graph.erase_node(node)
            edits += 1
        return edits


def _scatter(graph: fx.Graph, node: fx.Node) -> fx.Node:
    base, rows, _, place, dim = node.args
    sizes = broadcast_shape(len(shape(base)), dim, shape(place)[0])  # type: ignore[arg-type]
    is_kept = emit(graph, aten.ge.Scalar, (place, 0), like=node)
    is_kept = emit(graph, aten.view.default, (is_kept, sizes), like=node)
    clamped = emit(graph, aten.clamp.default, (place, 0), like=node)
    spread = emit(graph, aten.index_select.default, (rows, dim, clamped), like=node)
    return emit(graph, aten.where.self, (is_kept, spread, base), like=node)
