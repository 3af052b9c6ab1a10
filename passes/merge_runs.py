"""Neighbouring spans with one token set: gather once, scatter once."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import fx

from tcc.passes.base import Pass
from tcc.passes.graph import emit
from tcc.passes.tokens import gather_tokens, scatter_tokens

__all__ = ["MergeRuns"]

aten = torch.ops.aten


@dataclass(frozen=True)
class MergeRuns(Pass):
    """Cancel a gather against a scatter of the same token set, and rows that are written twice.

    1. `gather(scatter(base, rows, T), T)`               -> `rows`
    2. `scatter(scatter(base, old, T) + s, rows, T)`     -> `scatter(base + s, rows, T)`: the old rows are overwritten
    """

    def run(self, gm: fx.GraphModule) -> int:
        """Edit `gm`; see the class."""
        edits = 0
        for node in list(gm.graph.nodes):
            if node.target is gather_tokens and _same_set(node, node.args[0], kept=1):
                node.replace_all_uses_with(node.args[0].args[1])
                gm.graph.erase_node(node)
                edits += 1
            elif node.target is scatter_tokens:
                edits += _drop_overwritten(gm.graph, node)
        return edits


def _drop_overwritten(graph: fx.Graph, outer: fx.Node) -> int:
    """Rule 2, through sums with one scattered operand."""
    base = outer.args[0]
    assert isinstance(base, fx.Node)
    if _same_set(outer, base, kept=2):
        outer.update_arg(0, base.args[0])
        return 1
    if base.target is not aten.add.Tensor:
        return 0
    for position, operand in enumerate(base.args[:2]):
        if isinstance(operand, fx.Node) and _same_set(outer, operand, kept=2):
            args = list(base.args)
            args[position] = operand.args[0]
            with graph.inserting_before(outer):
                new = emit(graph, base.target, tuple(args), dict(base.kwargs), like=base)
            outer.update_arg(0, new)
            return 1
    return 0


def _same_set(node: fx.Node, inner: object, *, kept: int) -> bool:
    """Whether `inner` scatters the token set that `node` names in argument `kept`, along the same dimensions."""
    if not isinstance(inner, fx.Node) or inner.target is not scatter_tokens:
        return False
    dims = node.args[2:] if node.target is gather_tokens else node.args[4:]
    return bool(inner.args[2] is node.args[kept] and inner.args[4:] == dims)
