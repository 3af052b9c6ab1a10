"""Give each part of a fused projection its own product, where one part is pruned and another is not."""

from __future__ import annotations

import operator
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

from tcc.passes.attention import find_attention
from tcc.passes.base import Pass
from tcc.passes.graph import emit, shape, sized_by_data
from tcc.passes.paths import substitute
from tcc.passes.prune_tokens import Whole, rows_beside
from tcc.passes.token_axis import NotTokenLocal, narrowing
from tcc.passes.tokens import Axis, gather_tokens, scatter_tokens

__all__ = ["CUTS", "SPLITS", "SplitProjections", "find_parts", "split"]

aten = torch.ops.aten
SPLITS = {aten.split.Tensor, aten.split_with_sizes.default, aten.chunk.default, aten.unbind.int}
CUTS = {aten.select.int, aten.slice.Tensor}
_TURNS = {aten.view.default, aten.reshape.default, aten.permute.default, aten.transpose.int}


@dataclass(frozen=True)
class SplitProjections(Pass):
    """Split `qkv = linear(x, W)` where the queries are needed for the kept tokens and keys and values for all.

    Before: `q, k, v = unbind(view(linear(x, W), [B, S, 3, H, d]), 2)`
    After:  `q = select(view(linear(x, W[0:D]), [B, S, 1, H, d]), 2, 0)`, and so on for k and v

    1. It applies to attention whose output is only read through gathers and whose keys are not gathered or scattered.
    2. The parts are rows of the weight, contiguous or not; any views and permutations between stay.
    3. A part that is split again is split first. In joint attention every stream's projection is split.
    """

    def run(self, gm: fx.GraphModule) -> int:
        """Edit `gm`; see the class."""
        if not any(node.target is gather_tokens for node in gm.graph.nodes):
            return 0
        whole = Whole(gm.graph, {cut.node for cut in rows_beside(gm.graph)})
        edits = 0
        for node, attention in find_attention(gm.graph).items():
            query, keys = attention.query.node, attention.key.node
            if node in whole.nodes or keys.target in (gather_tokens, scatter_tokens):
                continue
            common = _bases_above(query) & _bases_above(keys)
            edits += sum(split(gm.graph, base) for base in sorted(common, reverse=True))
        return edits


@dataclass(frozen=True)
class Part:
    """Entries `start` to `start + count` along `dim` of a value; `drops` that dimension where there is one entry."""

    node: fx.Node
    dim: int
    start: int
    count: int
    drops: bool


def _bases_above(node: fx.Node) -> set[fx.Node]:
    """The values above `node`, up to the nearest products, that are taken apart."""
    found: set[fx.Node] = set()
    todo, seen = [node], set()
    while todo:
        here = todo.pop()
        if here in seen or here.op != "call_function" or here.target in (gather_tokens, scatter_tokens):
            continue
        seen.add(here)
        if here.target in SPLITS | CUTS:
            found.add(here.args[0])  # type: ignore[arg-type]
        if here.target is not aten.linear.default:
            todo += here.all_input_nodes
    return found


def split(graph: fx.Graph, base: fx.Node) -> int:
    """Replace every part of `base` by a product of its own; the number of values split."""
    parts = find_parts(base)
    edits, way = _way_to_linear(graph, base)
    if parts is None or way is None or len({part.dim for part in parts}) != 1:
        return edits
    if not any(part.node.users for part in parts):  # split already, as a part of another value's way
        return edits
    (linear, *turns), axes = way, [Axis(parts[0].dim)]
    try:
        for turn in reversed(turns):
            axes.insert(0, narrowing(turn, axes[0], 1).operands[(0,)])
    except NotTokenLocal:
        return edits
    if axes[0].dim != len(shape(linear)) - 1:
        return edits
    for part in parts:
        with graph.inserting_before(part.node):
            rows = _rows(graph, linear, axes[0], part)
            part.node.replace_all_uses_with(_rebuilt(graph, rows, turns, axes[1:], part))
    return edits + 1


def find_parts(base: fx.Node) -> list[Part] | None:
    """The parts of `base`, or None where it is read in any other way, or the data decide about their sizes."""
    parts: list[Part] = []
    for user in base.users:
        rank = len(shape(base))
        if sized_by_data(user):
            return None
        if user.target in SPLITS:
            if any(item.target is not operator.getitem for item in user.users):
                return None
            unbinds = user.target is aten.unbind.int
            at = 1 if unbinds else 2
            along: Any = user.args[at] if len(user.args) > at else user.kwargs.get("dim", 0)
            dim = int(along) % rank
            counts = [1] * len(user.meta["val"]) if unbinds else [int(v.shape[dim]) for v in user.meta["val"]]
            items: list[Any] = list(user.users)
            parts += [Part(i, dim, sum(counts[: i.args[1]]), counts[i.args[1]], unbinds) for i in items]
        elif user.target in CUTS and user.args[0] is base:
            args: list[Any] = [*user.args[1:], *[None] * 4]
            dim, size = (args[0] or 0) % rank, shape(base)[(args[0] or 0) % rank]
            if user.target is aten.select.int:
                parts.append(Part(user, dim, args[1] % size, 1, True))
            elif args[3] in (None, 1):
                start, _, _ = slice(args[1], args[2]).indices(size)
                parts.append(Part(user, dim, start, shape(user)[dim], False))
            else:
                return None
        else:
            return None
    return parts


def _way_to_linear(graph: fx.Graph, base: fx.Node) -> tuple[int, list[fx.Node] | None]:
    """The linear above `base` and what turns it, top first; a part of another value on the way is split before."""
    edits, turns, node = 0, [base], base
    while node.target in _TURNS:
        node = node.args[0]  # type: ignore[assignment]
        if node.target is operator.getitem or node.target in CUTS:
            source = node.args[0].args[0] if node.target is operator.getitem else node.args[0]  # type: ignore[union-attr]
            edits += split(graph, source)  # type: ignore[arg-type]
            node = turns[0].args[0]  # type: ignore[assignment]
        turns.insert(0, node)
    if node.target is not aten.linear.default or len(shape(node.args[1])) != 2:  # type: ignore[arg-type]
        return edits, None  # by a vector, no dimension of the result is channels
    if any(len(turn.users) != 1 for turn in turns[:-1]):
        return edits, None
    return edits, turns


def _rows(graph: fx.Graph, linear: fx.Node, axis: Axis, part: Part) -> fx.Node:
    """The product of `linear` with the rows of its weight that make `part`."""
    x, *weights = linear.args
    rows = []
    for weight in (w for w in weights if isinstance(w, fx.Node)):
        size, *width = shape(weight)
        apart = [axis.outer, size // (axis.outer * axis.inner), axis.inner]
        if axis.outer == 1:
            bounds = (part.start * axis.inner, (part.start + part.count) * axis.inner)
            rows.append(emit(graph, aten.slice.Tensor, (weight, 0, *bounds), like=linear))
            continue
        blocks = emit(graph, aten.view.default, (weight, [*apart, *width]), like=linear)
        blocks = emit(graph, aten.slice.Tensor, (blocks, 1, part.start, part.start + part.count), like=linear)
        rows.append(emit(graph, aten.reshape.default, (blocks, [-1, *width]), like=linear))
    return emit(graph, aten.linear.default, (x, *rows), like=linear)


def _rebuilt(graph: fx.Graph, new: fx.Node, turns: list[fx.Node], axes: list[Axis], part: Part) -> fx.Node:
    """`turns` on fewer channels: as many as `part` has of the dimension that `axes` follow."""
    for turn, axis in zip(turns, axes, strict=True):
        args, kwargs = substitute(turn, {(0,): new, **narrowing(turn, axis, part.count).literals})
        new = emit(graph, turn.target, args, kwargs, like=turn)  # type: ignore[arg-type]
    return emit(graph, aten.select.int, (new, part.dim, 0), like=part.node) if part.drops else new
