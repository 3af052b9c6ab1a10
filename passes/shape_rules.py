"""Token rules of operators that cut, join, turn and re-shape values."""

from __future__ import annotations

import math
import operator
from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import fx

from tcc.passes.graph import shape
from tcc.passes.paths import Path, operands
from tcc.passes.token_axis import Narrowing, NotTokenLocal, argument, own_dim, pointwise, refuse_own, resized, rule
from tcc.passes.tokens import Axis

aten = torch.ops.aten


@rule(aten.transpose.int, aten.permute.default, aten.t.default)
def _permute(node: fx.Node, axis: Axis, size: int) -> Narrowing:
    rank = len(shape(node))
    order = list(range(rank))
    if node.target == aten.permute.default:
        order = [own_dim(d, rank) for d in node.args[1]]  # type: ignore[union-attr, arg-type]
    else:
        a, b = (0, 1) if node.target == aten.t.default else (own_dim(node.args[1], rank), own_dim(node.args[2], rank))  # type: ignore[arg-type]
        order[a], order[b] = order[b], order[a]
    return Narrowing({(0,): axis.at(order[axis.dim])})


@rule(aten.unsqueeze.default, aten.squeeze.default, aten.squeeze.dim, aten.squeeze.dims, aten.select.int,
      aten.unbind.int)  # fmt: skip
def _add_or_drop_dims(node: fx.Node, axis: Axis, size: int) -> Narrowing:
    rank = len(shape(node.args[0]))  # type: ignore[arg-type]
    where = argument(node, 1, "dim", 0)
    if node.target == aten.unsqueeze.default:
        new = own_dim(where, rank + 1)
        refuse_own(node, axis, {new}, "makes")
        dim = axis.dim - (axis.dim > new)
    else:
        named = set(range(rank))
        if node.target != aten.squeeze.default:
            named = {own_dim(d, rank) for d in ([where] if isinstance(where, int) else where)}
        squeezes = node.target in (aten.squeeze.default, aten.squeeze.dim, aten.squeeze.dims)
        dims = {d for d in named if not squeezes or shape(node.args[0])[d] == 1}  # type: ignore[arg-type]
        dim = [d for d in range(rank) if d not in dims][axis.dim]
        if dim in named and axis.size(size) == 1:
            raise NotTokenLocal(f"{node.target} would drop the token axis of a single token")
    return Narrowing({(0,): axis.at(dim)})


@rule(aten.slice.Tensor, aten.split.Tensor, aten.split_with_sizes.default, aten.chunk.default,
      aten.index_select.default, aten.constant_pad_nd.default, aten.pad.default, aten.unsafe_split.Tensor,
      aten.glu.default)  # fmt: skip
def _cut(node: fx.Node, axis: Axis, size: int) -> Narrowing:
    rank = len(shape(node.args[0]))  # type: ignore[arg-type]
    if node.target in (aten.constant_pad_nd.default, aten.pad.default):
        pads = list(node.args[1])  # type: ignore[arg-type]
        cut = {rank - 1 - i // 2 for i, pad in enumerate(pads) if pad}
    else:
        at = 1 if node.target in (aten.slice.Tensor, aten.index_select.default, aten.glu.default) else 2
        cut = {own_dim(argument(node, at, "dim", -1 if node.target == aten.glu.default else 0), rank)}
    if axis.dim in cut and axis.plain and node.target == aten.slice.Tensor and argument(node, 4, "step", 1) == 1:
        return _cut_off(node, axis, size)
    if axis.dim in cut and axis.plain and node.target == aten.split_with_sizes.default:
        return _split_off(node, axis, size)
    refuse_own(node, axis, cut, "cuts")
    return Narrowing({(0,): axis})


def _cut_off(node: fx.Node, axis: Axis, size: int) -> Narrowing:
    """A slice that leaves all tokens, and drops others that are joined to them."""
    total = shape(node.args[0])[axis.dim]  # type: ignore[arg-type]
    rows = shape(node)[axis.dim]
    start = slice(argument(node, 2, "start"), None).indices(total)[0]
    source = replace(axis, before=axis.before + start, after=axis.after + total - start - rows)
    bounds = {2: start, 3: start + axis.size(size)}
    return Narrowing({(0,): source}, {(at,): bound for at, bound in bounds.items() if len(node.args) > at})


def _split_off(node: fx.Node, axis: Axis, size: int) -> Narrowing:
    """A split, one of whose parts holds all tokens; `axis` says where they lie in the whole (see `_getitem`)."""
    sizes: list[int] = list(node.args[1])  # type: ignore[arg-type]
    part = _part_of(sizes, axis, axis.count(shape(node.args[0])))  # type: ignore[arg-type]
    sizes[part] += axis.size(size) - sum(sizes)
    return Narrowing({(0,): axis}, {(1,): sizes})


def _part_of(sizes: Sequence[int], axis: Axis, count: int) -> int:
    """Which of consecutive parts of the token dimension holds all `count` tokens.

    Raises:
        NotTokenLocal: none does.
    """
    start = 0
    for part, size in enumerate(sizes):
        if start <= axis.before and axis.before + count <= start + size:
            return part
        start += size
    raise NotTokenLocal(f"parts of {list(sizes)} divide the tokens among them")


@rule(aten.slice_scatter.default)
def _slice_scatter(node: fx.Node, axis: Axis, size: int) -> Narrowing:
    """A part of the first operand is replaced by the second; of the token axis, all tokens or only others."""
    dim = own_dim(argument(node, 2, "dim", 0), len(shape(node)))
    if axis.dim != dim:
        return Narrowing({(0,): axis, (1,): axis})
    if not axis.plain or not axis.others or argument(node, 5, "step", 1) != 1:
        raise NotTokenLocal(f"{node.target} replaces a part of the token axis")
    total, rows = shape(node)[dim], shape(node.args[1])[dim]  # type: ignore[arg-type]
    start = slice(argument(node, 3, "start"), None).indices(total)[0]
    part = _part_of([start, rows, total - start - rows], axis, axis.count(shape(node)))
    found: dict[Path, Axis] = {(0,): axis}
    fewer = axis.count(shape(node)) - size
    if part == 0:  # the tokens come before the rows that are replaced
        start -= fewer
    if part == 1:
        found[(1,)] = replace(axis, before=axis.before - start, after=axis.after - (total - start - rows))
        rows -= fewer
    bounds = {3: start, 4: start + rows}
    return Narrowing(found, {(at,): bound for at, bound in bounds.items() if len(node.args) > at})


@rule(aten.select_scatter.default)
def _select_scatter(node: fx.Node, axis: Axis, size: int) -> Narrowing:
    """One entry of another dimension is replaced, by a value without that dimension."""
    dim = own_dim(argument(node, 2, "dim", 0), len(shape(node)))
    refuse_own(node, axis, {dim}, "replaces a part of")
    return Narrowing({(0,): axis, (1,): axis.at(axis.dim - (dim < axis.dim))})


@rule(aten.index.Tensor)
def _index(node: fx.Node, axis: Axis, size: int) -> Narrowing:
    """One dimension is looked up by a table of positions, which takes its place."""
    tables = [(i, table) for i, table in enumerate(node.args[1]) if table is not None]  # type: ignore[arg-type]
    if len(tables) != 1:
        raise NotTokenLocal(f"{node.target} looks up {len(tables)} dimensions at once")
    dim, table = tables[0]
    extra = len(shape(table))
    refuse_own(node, axis, set(range(dim, dim + extra)), "looks up")
    return Narrowing({(0,): axis if axis.dim < dim else axis.at(axis.dim - extra + 1)})


@rule(aten.zeros.default, aten.ones.default, aten.full.default, aten.empty.memory_format)
def _constant(node: fx.Node, axis: Axis, size: int) -> Narrowing:
    return Narrowing({}, {(0,): resized(shape(node), axis, size)})


@rule(operator.getitem)
def _getitem(node: fx.Node, axis: Axis, size: int) -> Narrowing:
    """A part of a split; where that cuts the token dimension, the other parts are joined to the tokens."""
    split, part = node.args
    if isinstance(split, fx.Node) and split.target == aten.split_with_sizes.default and isinstance(part, int):
        sizes: list[int] = list(split.args[1])  # type: ignore[arg-type]
        if axis.plain and axis.dim == own_dim(argument(split, 2, "dim", 0), len(shape(node))):
            before, after = sum(sizes[:part]), sum(sizes[part + 1 :])
            axis = replace(axis, before=axis.before + before, after=axis.after + after)
    return Narrowing({(0,): axis})


@rule(aten.cat.default, aten.stack.default)
def _join(node: fx.Node, axis: Axis, size: int) -> Narrowing:
    new = own_dim(argument(node, 1, "dim", 0), len(shape(node)))
    if axis.dim == new and axis.plain and axis.others and node.target == aten.cat.default:
        return _joined(node, axis)
    refuse_own(node, axis, {new}, "joins along")
    dim = axis.dim - (axis.dim > new if node.target == aten.stack.default else 0)
    return Narrowing({path: axis.at(dim) for path, _ in operands(node)})


def _joined(node: fx.Node, axis: Axis) -> Narrowing:
    """One operand of a concatenation holds all tokens, and perhaps others; the rest are others."""
    parts = list(operands(node))
    sizes = [shape(part)[axis.dim] for _, part in parts]
    found = _part_of(sizes, axis, axis.count(shape(node)))
    before, after = axis.before - sum(sizes[:found]), axis.after - sum(sizes[found + 1 :])
    return Narrowing({parts[found][0]: replace(axis, before=before, after=after)})


@rule(aten.expand.default, broadcasts=True)
def _expand(node: fx.Node, axis: Axis, size: int) -> Narrowing:
    return Narrowing(pointwise(node, axis, size).operands, {(1,): resized(shape(node), axis, size)})


@rule(aten.view.default, aten.reshape.default, aten._unsafe_view.default)
def _view(node: fx.Node, axis: Axis, size: int) -> Narrowing:
    """A view keeps the row-major order, so the tokens are found by how many elements come before them."""
    sizes, source = shape(node), shape(node.args[0])  # type: ignore[arg-type]
    tokens = sizes[axis.dim] // (axis.outer * axis.inner)
    before = math.prod(sizes[: axis.dim]) * axis.outer
    for dim, extent in enumerate(source):
        prefix = math.prod(source[:dim])
        outer = before // prefix if prefix else 0
        if outer and before % prefix == 0 and extent % (outer * tokens) == 0 and extent >= tokens > 1:
            found = axis.at(dim, outer, extent // (outer * tokens))
            return Narrowing({(0,): found}, {(1,): resized(sizes, axis, size)})
    raise NotTokenLocal(f"{node.target} {list(source)} -> {list(sizes)} merges or splits the token axis")


@rule(aten.repeat.default, aten.tile.default)
def _repeat(node: fx.Node, axis: Axis, size: int) -> Narrowing:
    rank, times = len(shape(node)), list(node.args[1])  # type: ignore[arg-type]
    if ([1] * (rank - len(times)) + times)[axis.dim] != 1:
        raise NotTokenLocal(f"{node.target} repeats the token axis")
    return Narrowing({(0,): axis.at(axis.dim - rank + len(shape(node.args[0])))})  # type: ignore[arg-type]


@rule(aten.unfold.default)
def _unfold(node: fx.Node, axis: Axis, size: int) -> Narrowing:
    """Windows of one dimension, with what they hold in a new last one."""
    last = len(shape(node)) - 1
    refuse_own(node, axis, {last, own_dim(argument(node, 1, "dimension", 0), last)}, "cuts windows out of")
    return Narrowing({(0,): axis})


@rule(aten.repeat_interleave.self_int)
def _repeat_interleave(node: fx.Node, axis: Axis, size: int) -> Narrowing:
    dim = argument(node, 2, "dim")
    if dim is None:
        raise NotTokenLocal(f"{node.target} flattens the token axis")
    refuse_own(node, axis, {own_dim(dim, len(shape(node)))}, "repeats")
    return Narrowing({(0,): axis})
