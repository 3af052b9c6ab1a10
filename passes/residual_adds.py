"""Residual adds: an add whose one operand, the stream, is an ancestor of the other, the branch."""

from __future__ import annotations

import operator
from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import fx

from tcc.passes.dataflow import Dataflow
from tcc.passes.graph import shape, value
from tcc.passes.macs import node_macs
from tcc.passes.tokens import Axis

__all__ = ["Add", "Link", "base_of", "guess_axis", "residual_add"]

aten = torch.ops.aten
_COPIES = {aten._to_copy.default, aten.clone.default, aten.contiguous.default, aten.alias.default}
_CUTS = {aten.slice.Tensor: 1, aten.split_with_sizes.default: 2, aten.split.Tensor: 2, aten.chunk.default: 2}


@dataclass(frozen=True)
class Link:
    """Where the stream of an add comes from.

    Attributes:
        source: the number of the add that it comes from.
        rows: which of its rows do, from and up to but not including; they are followed along its token axis.
        start: where these rows begin in the source; None where rows were re-arranged on the way.
        cost: the products on the way.
    """

    source: int
    rows: tuple[int, int]
    start: int | None
    cost: int


@dataclass(frozen=True)
class Add:
    """A residual add, `add = stream_in + delta`.

    Attributes:
        add: the add.
        stream_in: its stream operand.
        delta: its branch operand.
        links: where its stream comes from; () where it begins.
        depth: how many adds there are up to this one, on the longest way.
    """

    add: fx.Node
    stream_in: fx.Node
    delta: fx.Node
    links: tuple[Link, ...] = ()
    depth: int = 1

    @property
    def rows(self) -> int:
        """The size of its token dimension."""
        return shape(self.add)[guess_axis(self.add).dim]


def guess_axis(node: fx.Node) -> Axis:
    """The token axis of a stream, before attention tells: the last dimension but one."""
    return Axis(max(0, len(shape(node)) - 2))


def base_of(node: fx.Node) -> fx.Node:
    """What `node` is a copy or a stretch of rows of."""
    source = _copied(node)
    while source is not None:
        node, source = source, _copied(source)
    return node


def _copied(node: fx.Node) -> fx.Node | None:
    source = node
    if node.target not in _COPIES:
        source = node.args[0] if node.target is operator.getitem else node  # type: ignore[assignment]
        if not isinstance(source, fx.Node) or source.target not in _CUTS or not _cuts_rows(source):
            return None
    return source.args[0]  # type: ignore[return-value]


def _cuts_rows(cut: fx.Node) -> bool:
    at, rank = _CUTS[cut.target], len(shape(cut.args[0]))  # type: ignore[index, arg-type]
    dim = cut.args[at] if len(cut.args) > at else cut.kwargs.get("dim", 0)
    return isinstance(dim, int) and dim % rank != rank - 1


def residual_add(node: fx.Node, flow: Dataflow) -> Add | None:
    """`node` as a residual add; None if it is none."""
    if node.target is not aten.add.Tensor or node.kwargs.get("alpha", 1) != 1:
        return None
    a, b = node.args[0], node.args[1]
    if not (isinstance(a, fx.Node) and isinstance(b, fx.Node)) or not shape(node) == shape(a) == shape(b):
        return None
    if len(shape(node)) < 2 or not value(node).dtype.is_floating_point:
        return None
    for stream_in, delta in ((a, b), (b, a)):
        base = base_of(stream_in)
        if flow.depends(delta, base) and _has_product(flow.between(base, [delta])):
            return Add(node, stream_in, delta)
    return _parallel_add(node, a, b, flow)


def _parallel_add(node: fx.Node, a: fx.Node, b: fx.Node, flow: Dataflow) -> Add | None:
    """`(x + f(x)) + g(x)`: the second branch reads the stream before the first add."""
    for stream_in, delta in ((a, b), (b, a)):
        if stream_in.target is aten.add.Tensor:
            for earlier in stream_in.all_input_nodes:
                if (
                    shape(earlier) == shape(node)
                    and all(flow.depends(other, earlier) for other in (delta, stream_in))
                    and any(flow.depends(o, earlier) for o in stream_in.all_input_nodes if o is not earlier)
                    and _has_product(flow.between(earlier, [delta]))
                ):
                    return Add(node, stream_in, delta)
    return None


def _has_product(nodes: Iterable[fx.Node]) -> bool:
    return any(node_macs(node) for node in nodes)
