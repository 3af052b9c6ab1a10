"""Multiply-accumulates of a graph: matrix products, convolutions and attention products.

Counted as in DESIGN: the adaLN projections are in, normalisations and pointwise work are not. One multiply and one add
are one MAC.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any

import torch
from torch import fx

from tcc.passes.graph import UNKNOWN, shape
from tcc.passes.paths import at
from tcc.passes.products import product

__all__ = ["count", "node_macs"]

aten = torch.ops.aten


#: Products of two computed values: attention, whole or written out.
_PRODUCTS = {
    aten.scaled_dot_product_attention.default,
    aten.bmm.default,
    aten.baddbmm.default,
    aten.matmul.default,
    aten.einsum.default,
}
#: Products whose first factor has the summed dimension last.
_ROWS_FIRST = {aten.linear.default, aten.mm.default, aten.bmm.default, aten.matmul.default}
_ADDED_TO = {aten.addmm.default, aten.baddbmm.default}
_CONVOLUTIONS = {aten.conv1d.default, aten.conv2d.default, aten.conv3d.default, aten.convolution.default}
_COUNTED = _PRODUCTS | _ROWS_FIRST | _ADDED_TO | _CONVOLUTIONS


def count(nodes: Iterable[fx.Node], *, products: bool = True) -> int:
    """The MACs of `nodes`, for the whole batch that the graph was captured with.

    Args:
        nodes: nodes of a graph.
        products: count products of two computed values too. Without them it is the convention of counters that watch
            layers (pytorch-OpCounter: Learning-to-Cache's tables).
    """
    return sum(node_macs(node) for node in nodes if products or node.target not in _PRODUCTS)


def node_macs(node: fx.Node) -> int:
    """The MACs of one node; 0 for everything that is not a product, and for sizes that depend on the data."""
    if node.target not in _COUNTED or any(UNKNOWN in shape(n) for n in (node, *node.all_input_nodes)):
        return 0
    args: Any = node.args
    if node.target in _ROWS_FIRST:
        return math.prod(shape(node)) * shape(args[0])[-1]
    if node.target in _ADDED_TO:
        return math.prod(shape(node)) * shape(args[1])[-1]
    if node.target is aten.einsum.default:
        return _einsum_macs(node)
    if node.target is aten.scaled_dot_product_attention.default:
        scores = math.prod(shape(args[0])[:-1]) * shape(args[1])[-2]
        return scores * (shape(args[0])[-1] + shape(args[2])[-1])
    return math.prod(shape(node)) * math.prod(shape(args[1])[1:])


def _einsum_macs(node: fx.Node) -> int:
    """One multiplication for every element of every factor after the first, over all labels."""
    labels = product(node)
    if labels is None:
        return 0
    sizes: dict[str, int] = {}
    for path, own in labels.factors.items():
        for label, size in zip(own, shape(at(node, path)), strict=True):
            sizes[label] = max(size, sizes.get(label, 1))
    return math.prod(sizes.values()) * (len(labels.factors) - 1)
