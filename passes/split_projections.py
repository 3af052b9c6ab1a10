"""Give each part of a fused projection its own product, where one part is pruned and another is not."""

from __future__ import annotations

import math
import operator
from dataclasses import dataclass
from typing import cast

import torch
from torch import fx

from tcc.passes.base import Pass
from tcc.passes.graph import emit, shape
from tcc.passes.prune_tokens import Whole
from tcc.passes.tokens import gather_tokens, scatter_tokens

__all__ = ["SplitProjections"]

aten = torch.ops.aten
_SPLITS = {aten.split.Tensor, aten.split_with_sizes.default, aten.chunk.default, aten.unbind.int}


@dataclass(frozen=True)
class SplitProjections(Pass):
    """Split `qkv = linear(x, W)` where the queries are needed for the kept tokens and keys and values for all.

    Before: `q, k, v = unbind(view(linear(x, W), [B, S, 3, H, d]), 2)`
    After:  `q = view(linear(x, W[0:D]), [B, S, H, d])`, and so on for k and v

    1. It applies to attention whose output is only read through gathers and whose keys are not gathered or scattered.
    2. The parts must be contiguous rows of the weight; any permutation after the view is kept.
    """

    def run(self, gm: fx.GraphModule) -> int:
        """Edit `gm`; see the class."""
        whole = Whole(gm.graph)
        edits = 0
        for node in list(gm.graph.nodes):
            if node.target is not aten.scaled_dot_product_attention.default or node in whole.nodes:
                continue
            query, keys = node.args[0], node.args[1]
            if keys.target in (gather_tokens, scatter_tokens):
                continue
            split = _split_above(query)
            if split is not None and _split_above(keys) is split:
                edits += _split(gm.graph, split)
        return edits


def _split_above(node: fx.Node) -> fx.Node | None:
    """The split that `node` is a part of, through single-input shape operators and norms."""
    while node.op == "call_function" and isinstance(node.args[0], fx.Node):
        if node.target is operator.getitem and node.args[0].target in _SPLITS:
            return node.args[0]
        node = node.args[0]
    return None


def _split(graph: fx.Graph, split: fx.Node) -> int:
    """Replace every part of `split` by a product of its own; 0 where the form is not known."""
    chain = _chain_to_linear(split)
    if chain is None:
        return 0
    linear, views = chain
    parts = [user for user in split.users if user.target is operator.getitem]
    rows = _rows(split, linear, views)
    if rows is None or len(parts) != len(split.users):
        return 0
    for part in parts:
        start, stop = rows[part.args[1]]  # type: ignore[index]
        with graph.inserting_before(part):
            part.replace_all_uses_with(_part(graph, linear, views, split, part, start, stop))
    return 1


def _chain_to_linear(split: fx.Node) -> tuple[fx.Node, list[fx.Node]] | None:
    """The linear above `split` and the view and permutation between them, top first."""
    views: list[fx.Node] = []
    node = split.args[0]
    while isinstance(node, fx.Node) and node.target in (aten.view.default, aten.reshape.default, aten.permute.default):
        views.insert(0, node)
        node = node.args[0]
    if not isinstance(node, fx.Node) or node.target is not aten.linear.default or len(node.users) != 1:
        return None
    known: list[list[object]] = [[], [aten.permute.default]]
    unbinds = split.target is aten.unbind.int
    targets = [v.target for v in views]
    if not unbinds:
        return (node, []) if not views else None
    if not targets or targets[0] is aten.permute.default or targets[1:] not in known:
        return None
    return node, views


def _rows(split: fx.Node, linear: fx.Node, views: list[fx.Node]) -> list[tuple[int, int]] | None:
    """The weight rows of every part, or None where they are not contiguous."""
    width = shape(linear)[-1]
    dim = cast("int", split.args[1]) if split.target is aten.unbind.int and len(split.args) > 1 else 0
    if not views:
        sizes = [int(v.shape[-1]) for v in split.meta["val"]]
        along = split.args[2] if len(split.args) > 2 else 0
        if along % len(shape(linear)) != len(shape(linear)) - 1:  # type: ignore[operator]
            return None
        starts = [sum(sizes[:i]) for i in range(len(sizes))]
        return [(start, start + size) for start, size in zip(starts, sizes, strict=True)]
    sizes_after = shape(views[0])
    lead = len(shape(linear)) - 1
    order = list(views[1].args[1]) if len(views) > 1 else list(range(len(sizes_after)))  # type: ignore[arg-type]
    if order[dim] != lead or math.prod(sizes_after[lead:]) != width or sizes_after[:lead] != shape(linear)[:lead]:
        return None
    step = width // sizes_after[lead]
    return [(i * step, (i + 1) * step) for i in range(sizes_after[lead])]


def _part(
    graph: fx.Graph, linear: fx.Node, views: list[fx.Node], split: fx.Node, part: fx.Node, start: int, stop: int
) -> fx.Node:
    """One part, computed by its own rows of the weight."""
    x, weight, *bias = linear.args
    rows = [emit(graph, aten.slice.Tensor, (w, 0, start, stop), like=linear) for w in (weight, *bias) if w is not None]
    new = emit(graph, aten.linear.default, (x, *rows), like=linear)
    if not views:
        return new
    lead = len(shape(linear)) - 1
    sizes = shape(views[0])
    new = emit(graph, aten.view.default, (new, [*sizes[:lead], *sizes[lead + 1 :]]), like=views[0])
    if len(views) > 1:
        order = [d - (d > lead) for d in views[1].args[1] if d != lead]  # type: ignore[union-attr, operator]
        new = emit(graph, aten.permute.default, (new, order), like=views[1])
    return new
