"""Find attention: torch's `scaled_dot_product_attention`, and attention written out as products and a softmax.

Attention written out is left as it is written: a plan that only computes must give the model's own bits. It is known
by its dataflow, `product(softmax(... product(query, key) ...), value)`, whatever scales, masks, casts and views stand
between. The softmax stands for it, as the one node does for torch's: that is where keys compete.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

from tcc.passes.graph import shape
from tcc.passes.macs import node_macs
from tcc.passes.paths import Path, at, operands
from tcc.passes.products import Product, product
from tcc.passes.token_axis import NotTokenLocal, narrowing
from tcc.passes.tokens import Axis

__all__ = ["SOFTMAX", "WHOLE", "Attention", "Rows", "find_attention"]

aten = torch.ops.aten
WHOLE = aten.scaled_dot_product_attention.default
SOFTMAX = {aten.softmax.int, aten._softmax.default}


@dataclass(frozen=True)
class Rows:
    """A value that has one row per query or per key, along `axis`."""

    node: fx.Node
    axis: Axis


@dataclass(frozen=True)
class Attention:
    """Where queries meet keys.

    Attributes:
        node: torch's attention, or the softmax over the keys.
        query: the queries.
        key: the keys, as a `kv` site keeps them.
        value: the values, likewise.
        written: how it is written out, None for torch's.
    """

    node: fx.Node
    query: Rows
    key: Rows
    value: Rows
    written: Written | None = None

    @property
    def values(self) -> tuple[fx.Node, ...]:
        """What the plan's keys are taken from: the values, and the weights where they can be had."""
        return (self.value.node,) if self.written is None else (at(self.written.last, self.written.value), self.node)

    @property
    def whole(self) -> set[tuple[fx.Node, Path]]:
        """The operands of its products that rows of queries need whole: keys and values."""
        if self.written is None:
            return {(self.node, (1,)), (self.node, (2,))}
        return {(self.written.first, self.written.key), (self.written.last, self.written.value)}

    @property
    def same_layout(self) -> bool:
        """Whether keys and values have their tokens at one place, as a `kv` site needs it."""
        return self.key.axis == self.value.axis and self.key.axis.plain


@dataclass(frozen=True)
class Written:
    """Attention written out.

    Attributes:
        axis: the keys in the softmax and its input.
        way: the nodes from below the softmax to the last product, each with the place of its operand that comes from
            the softmax, and with the axis of the keys in its value; None in the last, which sums over them.
        first: the product of queries and keys.
        key: where the keys stand in it.
        last: the product of weights and values.
        value: where the values stand in it.
        value_axis: the keys in the latter.
    """

    axis: Axis
    way: tuple[tuple[fx.Node, Path, Axis | None], ...]
    first: fx.Node
    key: Path
    last: fx.Node
    value: Path
    value_axis: Axis


def find_attention(graph: fx.Graph) -> dict[fx.Node, Attention]:
    """All attention of `graph`, by the node that stands for it, in order."""
    found: dict[fx.Node, list[Attention]] = {}
    for node in graph.nodes:
        if node.target is WHOLE:
            query, key, val = (Rows(n, Axis(len(shape(n)) - 2)) for n in node.args[:3])
            found[node] = [Attention(node, query, key, val)]
        else:
            for one in _written_out(node):
                found.setdefault(one.node, []).append(one)
    return {node: ones[0] for node, ones in found.items() if len(ones) == 1}


def _written_out(last: fx.Node) -> Iterator[Attention]:
    """The attention whose last product is `last`: at most one."""
    labels = product(last)
    if labels is None or len(labels.factors) != 2 or len(labels.summed()) != 1:
        return
    (summed,) = labels.summed()
    for path, other in (tuple(labels.factors), tuple(labels.factors)[::-1]):
        below = _to_softmax(last, path, Axis(labels.factors[path].index(summed)))
        scores = _product_above(below[0]) if below else None
        if below and scores and _read_once(*below):
            (softmax, way), (first, query, key, place) = below, scores
            factor = Rows(at(last, other), Axis(labels.factors[other].index(summed)))
            written = Written(softmax.axis, way, first, place, last, other, factor.axis)
            yield Attention(softmax.node, query, *_alike(key, factor), written)


def _read_once(softmax: Rows, way: Sequence[tuple[fx.Node, Path, Axis | None]]) -> bool:
    """Whether nothing but the last product reads the weights: what else does would see those of the keys left out."""
    return all(len(node.users) == 1 for node in (softmax.node, *(node for node, _, axis in way if axis is not None)))


def _is_softmax(node: fx.Node, axis: Axis) -> bool:
    if node.target not in SOFTMAX or not axis.plain or axis.others:  # others in a softmax take weight: a sink
        return False
    dim: Any = node.args[1]
    return bool(dim % len(shape(node)) == axis.dim)


def _to_softmax(last: fx.Node, path: Path, axis: Axis) -> tuple[Rows, tuple[Any, ...]] | None:
    """The softmax above a factor of `last`, and the way down from it."""
    way: list[tuple[fx.Node, Path, Axis | None]] = [(last, path, None)]
    node = at(last, path)
    while node.op == "call_function":
        if _is_softmax(node, axis):
            return Rows(node, axis), tuple(reversed(way))
        inputs = list(operands(node))
        try:
            above = narrowing(node, axis, 1).operands
        except NotTokenLocal:
            return None
        if len(inputs) != 1 or inputs[0][0] not in above:
            return None
        way.append((node, inputs[0][0], axis))
        node, axis = inputs[0][1], above[inputs[0][0]]
    return None


def _product_above(softmax: Rows) -> tuple[fx.Node, Rows, Rows, Path] | None:
    """The one product of queries and keys that a softmax is computed from, by operators that are local to the keys."""
    todo: list[Rows] = [Rows(softmax.node.args[0], softmax.axis)]  # type: ignore[arg-type]
    seen: set[Rows] = set()
    found: list[tuple[fx.Node, Rows, Rows, Path]] = []
    beside: list[fx.Node] = []
    while todo:
        here = todo.pop()
        if here in seen or here.node.op != "call_function":
            continue
        seen.add(here)
        labels = product(here.node)
        if labels is not None and here.axis.plain:
            found += _queries_and_keys(here, labels)
            continue
        if node_macs(here.node):  # scores do not go through products with weights
            continue
        try:
            above = narrowing(here.node, here.axis, 1).operands
        except NotTokenLocal:
            continue
        todo += [Rows(operand, above[path]) for path, operand in operands(here.node) if path in above]
        beside += [operand for path, operand in operands(here.node) if path not in above]
    return found[0] if len(found) == 1 and not _come_from(beside, found[0][0]) else None


def _come_from(nodes: Sequence[fx.Node], source: fx.Node) -> bool:
    """Whether one of `nodes` is computed from `source`: from the scores of all keys, such as the largest of them."""
    todo, seen = list(nodes), set[fx.Node]()
    while todo:
        node = todo.pop()
        if node is source:
            return True
        if node not in seen and source < node:
            seen.add(node)
            todo += node.all_input_nodes
    return False


def _queries_and_keys(scores: Rows, labels: Product) -> Iterator[tuple[fx.Node, Rows, Rows, Path]]:
    keys = labels.result[scores.axis.dim]
    holders = [path for path, found in labels.factors.items() if keys in found]
    if len(holders) != 1 or len(labels.factors) != 2:
        return
    (other,) = (path for path in labels.factors if path not in holders)
    queries = [c for c in labels.factors[other] if c in labels.result and c not in labels.factors[holders[0]]]
    if len(queries) == 1:
        query = Rows(at(scores.node, other), Axis(labels.factors[other].index(queries[0])))
        key = Rows(at(scores.node, holders[0]), Axis(labels.factors[holders[0]].index(keys)))
        yield scores.node, query, key, holders[0]


def _alike(key: Rows, val: Rows) -> tuple[Rows, Rows]:
    """The lowest keys and values of one shape and axis, above the transpositions and views that the products need."""
    for one in _up(key):
        for other in _up(val):
            if one.axis == other.axis and shape(one.node) == shape(other.node):
                return one, other
    return key, val


def _up(rows: Rows) -> Iterator[Rows]:
    """`rows`, and the same rows above operators that only turn or re-shape them."""
    turns = {aten.transpose.int, aten.permute.default, aten.view.default, aten.reshape.default, aten.t.default}
    yield rows
    while rows.node.target in turns:
        try:
            above = narrowing(rows.node, rows.axis, 1).operands
        except NotTokenLocal:
            return
        rows = Rows(rows.node.args[0], above[(0,)])  # type: ignore[arg-type]
        yield rows
