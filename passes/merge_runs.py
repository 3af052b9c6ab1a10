"""Neighbouring spans with one token set, or sets within each other: gather once, scatter once."""

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
    3. `gather(scatter(base, rows, T), U)`               -> `gather(rows, place[U])`, where U is within T: `place` says
       where the tokens stand among the rows, and what a later block reads is never put back among the dropped tokens

    Attributes:
        nested: numbers of token sets, each with that of one that it is within; of sets that all samples share.
    """

    nested: frozenset[tuple[int, int]] = frozenset()

    def run(self, gm: fx.GraphModule) -> int:
        """Edit `gm`; see the class."""
        edits = 0
        for node in list(gm.graph.nodes):
            if node.target is gather_tokens and _same_set(node, node.args[0], kept=1):
                node.replace_all_uses_with(node.args[0].args[1])
                gm.graph.erase_node(node)
                edits += 1
            elif node.target is gather_tokens and self._is_within(node, node.args[0]):
                _gather_rows(gm.graph, node)
                edits += 1
            elif node.target is scatter_tokens:
                edits += _drop_overwritten(gm.graph, node)
        return edits

    def _is_within(self, node: fx.Node, inner: object) -> bool:
        """Whether `inner` scatters a token set that has all tokens that `node` gathers, along the same dimension."""
        if not isinstance(inner, fx.Node) or inner.target is not scatter_tokens or len(node.args) > 3:
            return False
        pair = (_number(node.args[1]), _number(inner.args[2]))
        return pair in self.nested and inner.args[4:] == node.args[2:]


def _number(kept: object) -> int | None:
    """The number of the token set that the input `kept` names."""
    name = str(kept.meta.get("input", "")) if isinstance(kept, fx.Node) else ""
    return int(name.removeprefix("kept_")) if name.startswith("kept_") else None


def _gather_rows(graph: fx.Graph, node: fx.Node) -> None:
    """Rule 3."""
    scattered, kept, dim = node.args
    assert isinstance(scattered, fx.Node)
    _, rows, _, place, *_ = scattered.args
    with graph.inserting_before(node):
        among = emit(graph, aten.index_select.default, (place, 0, kept), like=node)
        new = emit(graph, gather_tokens, (rows, among, dim), like=node)
    node.replace_all_uses_with(new)


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
