"""Gathers and scatters of values in which tokens or samples share their dimension with something else."""

from __future__ import annotations

from typing import Any

import torch
from torch import fx

from tcc.passes.graph import emit, shape, value
from tcc.passes.tokens import Axis, gather_tokens, scatter_tokens

__all__ = ["apart", "clear", "gather", "own_sets", "scatter"]

aten = torch.ops.aten


def own_sets(kept: fx.Node) -> bool:
    """Whether every sample has its own token set: `kept` is `[B, k]`."""
    return len(shape(kept)) == 2


def apart(sizes: tuple[int, ...], *axes: Axis) -> tuple[list[int], list[int]]:
    """The shape that gives each of `axes` a dimension of its own, in row-major order, and those dimensions.

    A dimension that an axis has for itself stays one dimension; others become `outer, count, inner`. The number of
    tokens or samples on an axis is what is left of its dimension.

    >>> apart((6, 12), Axis(1, outer=2, inner=3))
    ([6, 2, 2, 3], [2])
    """
    new: list[int] = []
    found: dict[Axis, int] = {}
    for dim, size in enumerate(sizes):
        here = sorted((axis for axis in axes if axis.dim == dim), key=lambda axis: axis.outer)
        if len(here) <= 1 and all(axis.plain for axis in here):
            found |= dict.fromkeys(here, len(new))
            new.append(size)
            continue
        before = 1
        for axis in here:
            count = size // (axis.outer * axis.inner)
            found[axis] = len(new) + 1
            new += [axis.outer // before, count]
            before = axis.outer * count
        new.append(size // before)
    return new, [found[axis] for axis in axes]


def gather(graph: fx.Graph, x: fx.Node, kept: fx.Node, axis: Axis, batch: Axis | None, like: fx.Node) -> fx.Node:
    """`gather_tokens` of `x` along `axis`, with views around it where axes share a dimension."""
    axes = _axes(kept, axis, batch)
    sizes, dims = apart(shape(x), *axes)
    args = (_view(graph, x, sizes, like), kept, *_where(dims, axis))
    fewer = list(shape(x))
    fewer[axis.dim] = axis.size(shape(kept)[-1])
    return _view(graph, emit(graph, gather_tokens, args, like=like), fewer, like)


def clear(
    graph: fx.Graph, x: fx.Node, tokens: tuple[fx.Node, fx.Node], axis: Axis, batch: Axis | None, like: fx.Node
) -> fx.Node:
    """`x` with zeros in place of the kept tokens; arguments as of `scatter`."""
    fewer, val = list(shape(x)), value(x)
    fewer[axis.dim] = axis.size(shape(tokens[0])[-1])
    fill = {"dtype": val.dtype, "device": val.device}
    zeros = emit(graph, aten.full.default, (fewer, 0), fill, like=like)
    return scatter(graph, x, zeros, tokens, axis, batch, like)


def scatter(
    graph: fx.Graph,
    base: fx.Node,
    rows: fx.Node,
    tokens: tuple[fx.Node, fx.Node],
    axis: Axis,
    batch: Axis | None,
    like: fx.Node,
) -> fx.Node:
    """`scatter_tokens` of `rows` into `base` along `axis`, with views around it where axes share a dimension.

    Args:
        graph: the graph, with its insertion point set.
        base: the values of the dropped tokens.
        rows: the values of the kept ones, in the same layout.
        tokens: the kept positions, and the place of every token.
        axis: where the tokens lie in both.
        batch: where the samples lie in both; needed where every sample has its own set.
        like: whose module path and source line the new nodes take over.
    """
    kept, place = tokens
    sizes, dims = apart(shape(base), *_axes(kept, axis, batch))
    few = list(sizes)
    few[dims[0]] = axis.before + shape(kept)[-1] + axis.after
    args = (_view(graph, base, sizes, like), _view(graph, rows, few, like), kept, place, *_where(dims, axis))
    return _view(graph, emit(graph, scatter_tokens, args, like=like), list(shape(base)), like)


def _where(dims: list[int], axis: Axis) -> tuple[Any, ...]:
    """The arguments that say where the tokens lie: their dimension, the samples', and the others joined to them."""
    return (dims[0], dims[1] if len(dims) > 1 else None, axis.others) if axis.others else tuple(dims)


def _axes(kept: fx.Node, axis: Axis, batch: Axis | None) -> tuple[Axis, ...]:
    if not own_sets(kept):
        return (axis,)
    assert batch is not None  # checked with the plan
    return axis, batch


def _view(graph: fx.Graph, x: fx.Node, sizes: list[int], like: fx.Node) -> fx.Node:
    return x if list(shape(x)) == sizes else emit(graph, aten.reshape.default, (x, sizes), like=like)
