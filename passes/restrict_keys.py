"""Attention that sees the kept tokens alone: its keys, its values, and what there is for each of them."""

from __future__ import annotations

import torch
from torch import fx

from tcc.passes.attention import Attention, Written
from tcc.passes.gathers import gather, own_sets
from tcc.passes.graph import emit, shape
from tcc.passes.paths import at, substitute
from tcc.passes.token_axis import narrowing
from tcc.passes.tokens import Axis

__all__ = ["restrict_keys"]

aten = torch.ops.aten


def restrict_keys(graph: fx.Graph, attention: Attention, kept: fx.Node, keys: Axis, batch: Axis | None) -> None:
    """Let the queries of `attention` see the kept tokens alone.

    Args:
        graph: the graph.
        attention: attention over the tokens that `kept` counts.
        kept: `[k]` or `[B, k]`, the kept positions.
        keys: where the tokens lie in the keys; there may be keys of others too, which stay.
        batch: where the samples lie in keys, values and weights; needed where every sample has its own set.
    """
    if attention.written is not None:
        _restrict_written(graph, attention.node, attention.written, kept, keys, batch)
        return
    node = attention.node
    total = shape(node.args[1])[-2]  # type: ignore[arg-type]
    for position, dim in ((1, -2), (2, -2), (3, -1)):
        operand = node.args[position] if len(node.args) > position else None
        if isinstance(operand, fx.Node) and shape(operand)[dim] == total:
            node.update_arg(position, _visible(graph, node, operand, keys.at(dim), kept, batch))
    mask = node.kwargs.get("attn_mask")
    if isinstance(mask, fx.Node) and shape(mask)[-1] == total:
        node.update_kwarg("attn_mask", _visible(graph, node, mask, keys.at(-1), kept, batch))


def _visible(
    graph: fx.Graph, node: fx.Node, operand: fx.Node, axis: Axis, kept: fx.Node, batch: Axis | None
) -> fx.Node:
    """The kept tokens of an operand of attention `node`; a mask that all samples share is expanded if need be.

    `axis` counts its dimension from the last.
    """
    with graph.inserting_before(node):
        if own_sets(kept) and batch is not None:
            key = shape(node.args[1])  # type: ignore[arg-type]
            missing = len(key) - len(shape(operand))
            sizes = [*[1] * missing, *shape(operand)]
            if sizes[batch.dim] != key[batch.dim]:
                sizes[batch.dim] = key[batch.dim]
                operand = emit(graph, aten.expand.default, (operand, sizes), like=node)
        return gather(graph, operand, kept, axis.at(len(shape(operand)) + axis.dim), batch, node)


def _restrict_written(
    graph: fx.Graph, softmax: fx.Node, written: Written, kept: fx.Node, keys: Axis, batch: Axis | None
) -> None:
    """Softmax over the kept columns alone, and the last product over the kept values; the rest is dead or is pruned."""
    last, count = written.last, shape(kept)[-1]
    with graph.inserting_before(last):
        logits = gather(graph, softmax.args[0], kept, keys.at(written.axis.dim), batch, softmax)  # type: ignore[arg-type]
        new = emit(graph, softmax.target, (logits, *softmax.args[1:]), dict(softmax.kwargs), like=softmax)  # type: ignore[arg-type]
        for node, path, axis in written.way:
            changes = {path: new}
            if axis is None:
                rows = keys.at(written.value_axis.dim)
                changes[written.value] = gather(graph, at(node, written.value), kept, rows, batch, node)
                node.args, node.kwargs = substitute(node, changes)
                break
            args, kwargs = substitute(
                node, changes | narrowing(node, keys.at(axis.dim, axis.outer, axis.inner), count).literals
            )
            target = aten.reshape.default if node.target is aten.view.default else node.target
            new = emit(graph, target, args, kwargs, like=node)  # type: ignore[arg-type]
