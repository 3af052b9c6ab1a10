"""Who depends on whom in a graph, and where its attention is."""

from __future__ import annotations

from collections.abc import Iterable

from torch import fx

from tcc.passes.attention import find_attention

__all__ = ["Dataflow"]


class Dataflow:
    """Who depends on whom in a graph, as bit sets over the graph's order; and its attention."""

    def __init__(self, graph: fx.Graph) -> None:
        self.nodes = list(graph.nodes)
        self.index = {node: i for i, node in enumerate(self.nodes)}
        self.attention = find_attention(graph)
        self._above = [0] * len(self.nodes)
        for i, node in enumerate(self.nodes):
            for source in node.all_input_nodes:
                j = self.index[source]
                self._above[i] |= self._above[j] | (1 << j)

    def depends(self, node: fx.Node, on: fx.Node) -> bool:
        """Whether `node` is computed from `on` (a node does not depend on itself)."""
        return bool(self._above[self.index[node]] >> self.index[on] & 1)

    def comes_from(self, node: fx.Node, source: fx.Node) -> bool:
        """Whether `node` is `source`, or computed from it."""
        return node is source or self.depends(node, source)

    def is_self_attention(self, node: fx.Node, stream: fx.Node) -> bool:
        """Whether keys or values of the attention `node` are those of the value `stream`, or computed from it."""
        attention = self.attention[node]
        return any(self.comes_from(rows.node, stream) for rows in (attention.key, attention.value))

    def between(self, source: fx.Node, targets: Iterable[fx.Node]) -> list[fx.Node]:
        """The nodes computed from `source` that `targets` are computed from, `targets` included, in order."""
        above = 0
        for target in targets:
            above |= self._above[self.index[target]] | (1 << self.index[target])
        return [n for i, n in enumerate(self.nodes) if above >> i & 1 and self.depends(n, source)]
