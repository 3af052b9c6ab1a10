"""Which dimension of a value counts tokens, op by op: the rules that let a gather move above an op.

A rule answers one local question. Given a node and the token axis of its output, which operands carry the tokens too,
along which axis, such that the node computed on those operands' kept tokens alone gives its own kept tokens? Operands
that the answer leaves out are used whole. A rule that cannot answer raises `NotTokenLocal` with the reason, and the
sites behind the node are then not prunable.

Rules for the tensor operators that are marked pointwise are generic; the other families are below. `rule` registers
one for a custom operator (passes/README.md has an example).
"""

from __future__ import annotations

import math
import operator
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import fx

from tcc.passes.graph import operators_of, shape, sized_by_data, value
from tcc.passes.paths import Path, at, operands
from tcc.passes.products import product
from tcc.passes.tokens import Axis

__all__ = ["Narrowing", "NotTokenLocal", "Path", "narrowing", "operands", "rule"]

aten = torch.ops.aten


class NotTokenLocal(Exception):  # noqa: N818 - an answer, not a failure
    """The node's kept tokens need more than the kept tokens of its operands; the message says why."""


@dataclass(frozen=True)
class Narrowing:
    """What computing a node for the kept tokens only needs.

    Attributes:
        operands: the operands to restrict to the kept tokens, with their token axis. The others are used whole.
        literals: literal arguments (target shapes) with their value for `size` kept tokens.
    """

    operands: dict[Path, Axis]
    literals: dict[Path, Any] = field(default_factory=dict)


Rule = Callable[[fx.Node, Axis, int], Narrowing]
_RULES: dict[Any, Rule] = {}


def rule(*targets: Any) -> Callable[[Rule], Rule]:
    """Register a rule for operators: `rule(node, axis, size) -> Narrowing`.

    Args:
        targets: operators that it answers for: `torch.ops.aten.linear.default`, all overloads of
            `torch.ops.mylib.scale`, or what `torch.library.custom_op` returned.

    The rule gets a node, its token axis and the number of kept tokens; it raises `NotTokenLocal` where tokens mix.
    """
    found = [one for target in targets for one in operators_of(target)]

    def register(function: Rule) -> Rule:
        _RULES.update(dict.fromkeys(found, function))
        return function

    return register


def narrowing(node: fx.Node, axis: Axis, size: int) -> Narrowing:
    """How `node` is computed for `size` kept tokens along `axis` of its output.

    Raises:
        NotTokenLocal: the node mixes tokens, or no rule is known for its operator.
    """
    if sized_by_data(node):
        raise NotTokenLocal(f"{node.target} has a size that depends on the data")
    found = _RULES.get(node.target)
    if found is None and torch.Tag.pointwise in getattr(node.target, "tags", ()):
        found = _pointwise
    if found is None:
        raise NotTokenLocal(f"no token rule for {node.target} (register one with tcc.passes.token_axis.rule)")
    return found(node, axis, size)


def _arg(node: fx.Node, position: int, name: str, default: Any = None) -> Any:
    return node.args[position] if len(node.args) > position else node.kwargs.get(name, default)


def _dim(index: int, rank: int) -> int:
    return index % rank if rank else 0


def _refuse_own(node: fx.Node, axis: Axis, dims: set[int], verb: str) -> None:
    if axis.dim in dims:
        raise NotTokenLocal(f"{node.target} {verb} the token axis")


def _resized(sizes: tuple[int, ...], axis: Axis, size: int) -> list[int]:
    new = list(sizes)
    new[axis.dim] = axis.size(size)
    return new


@rule(aten._to_copy.default, aten.clone.default, aten.contiguous.default, aten.alias.default, aten.dropout.default,
      aten.zeros_like.default, aten.ones_like.default, aten.empty_like.default, aten.full_like.default,
      aten.polar.default, aten.complex.default)  # fmt: skip
def _pointwise(node: fx.Node, axis: Axis, size: int) -> Narrowing:
    """Broadcasting: an operand carries the tokens where its aligned dimension is not of size 1."""
    rank, found = len(shape(node)), {}
    for path, operand in operands(node):
        sizes = shape(operand)
        dim = axis.dim - (rank - len(sizes))
        if dim >= 0 and sizes[dim] != 1:
            found[path] = axis.at(dim)
    return Narrowing(found)


@rule(aten.linear.default, aten.view_as_complex.default, aten.view_as_real.default)
def _linear(node: fx.Node, axis: Axis, size: int) -> Narrowing:
    _refuse_own(node, axis, {len(shape(node)) - 1}, "mixes")
    return Narrowing({(0,): axis})


@rule(aten.mm.default, aten.bmm.default, aten.matmul.default, aten.addmm.default, aten.baddbmm.default,
      aten.outer.default, aten.einsum.default)  # fmt: skip
def _product(node: fx.Node, axis: Axis, size: int) -> Narrowing:
    """A factor carries the tokens where its label is that of the result's token dimension."""
    labels = product(node)
    if labels is None:
        raise NotTokenLocal(f"{node.target} '{node.args[0]}' takes a diagonal")
    label, found = labels.result[axis.dim], {}
    for path, own in (labels.factors | labels.addend).items():
        dim = own.find(label)
        if dim >= 0 and shape(at(node, path))[dim] != 1:
            found[path] = axis.at(dim)
    return Narrowing(found)


@rule(aten.layer_norm.default, aten.rms_norm.default, aten.group_norm.default)
def _norm(node: fx.Node, axis: Axis, size: int) -> Narrowing:
    rank = len(shape(node))
    first = 1 if node.target == aten.group_norm.default else rank - len(node.args[1])  # type: ignore[arg-type]
    _refuse_own(node, axis, set(range(first, rank)), "normalises over")
    return Narrowing({(0,): axis})


@rule(aten.softmax.int, aten._softmax.default, aten.log_softmax.int, aten.cumsum.default, aten.flip.default,
      aten.roll.default)  # fmt: skip
def _along_dim(node: fx.Node, axis: Axis, size: int) -> Narrowing:
    """Operators that mix one dimension, the last positional of (x, ..., dim)."""
    where: Any = _arg(node, 2, "dims", ()) if node.target == aten.roll.default else node.args[1]
    # a roll without dims is one of all elements
    dims = [where] if isinstance(where, int) else list(where) or [axis.dim]
    _refuse_own(node, axis, {_dim(d, len(shape(node))) for d in dims}, "mixes")
    return Narrowing({(0,): axis})


@rule(aten.mean.dim, aten.sum.dim_IntList, aten.amax.default, aten.amin.default, aten.var.correction,
      aten.linalg_vector_norm.default, aten.std.correction, aten.logsumexp.default, aten.prod.dim_int,
      aten.max.dim, aten.min.dim, aten.argmax.default, aten.argmin.default)  # fmt: skip
def _reduce(node: fx.Node, axis: Axis, size: int) -> Narrowing:
    rank = len(shape(node.args[0]))  # type: ignore[arg-type]
    dims = _arg(node, 2 if node.target == aten.linalg_vector_norm.default else 1, "dim")
    if dims is None or dims == []:
        raise NotTokenLocal(f"{node.target} reduces over all dimensions")
    gone = {_dim(d, rank) for d in ([dims] if isinstance(dims, int) else dims)}
    result = value(node)
    if (result[0] if isinstance(result, tuple) else result).dim() == rank:
        _refuse_own(node, axis, gone, "reduces over")
        return Narrowing({(0,): axis})
    kept = [d for d in range(rank) if d not in gone]
    return Narrowing({(0,): axis.at(kept[axis.dim])})


@rule(aten.transpose.int, aten.permute.default, aten.t.default)
def _permute(node: fx.Node, axis: Axis, size: int) -> Narrowing:
    rank = len(shape(node))
    order = list(range(rank))
    if node.target == aten.permute.default:
        order = [_dim(d, rank) for d in node.args[1]]  # type: ignore[union-attr, arg-type]
    else:
        a, b = (0, 1) if node.target == aten.t.default else (_dim(node.args[1], rank), _dim(node.args[2], rank))  # type: ignore[arg-type]
        order[a], order[b] = order[b], order[a]
    return Narrowing({(0,): axis.at(order[axis.dim])})


@rule(aten.unsqueeze.default, aten.squeeze.default, aten.squeeze.dim, aten.squeeze.dims, aten.select.int,
      aten.unbind.int)  # fmt: skip
def _add_or_drop_dims(node: fx.Node, axis: Axis, size: int) -> Narrowing:
    rank = len(shape(node.args[0]))  # type: ignore[arg-type]
    where = _arg(node, 1, "dim", 0)
    if node.target == aten.unsqueeze.default:
        new = _dim(where, rank + 1)
        _refuse_own(node, axis, {new}, "makes")
        dim = axis.dim - (axis.dim > new)
    else:
        named = set(range(rank))
        if node.target != aten.squeeze.default:
            named = {_dim(d, rank) for d in ([where] if isinstance(where, int) else where)}
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
        cut = {_dim(_arg(node, at, "dim", -1 if node.target == aten.glu.default else 0), rank)}
    if axis.dim in cut and axis.plain and node.target == aten.slice.Tensor and _arg(node, 4, "step", 1) == 1:
        return _cut_off(node, axis, size)
    if axis.dim in cut and axis.plain and node.target == aten.split_with_sizes.default:
        return _split_off(node, axis, size)
    _refuse_own(node, axis, cut, "cuts")
    return Narrowing({(0,): axis})


def _cut_off(node: fx.Node, axis: Axis, size: int) -> Narrowing:
    """A slice that leaves all tokens, and drops others that are joined to them."""
    total = shape(node.args[0])[axis.dim]  # type: ignore[arg-type]
    rows = shape(node)[axis.dim]
    start = slice(_arg(node, 2, "start"), None).indices(total)[0]
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
    dim = _dim(_arg(node, 2, "dim", 0), len(shape(node)))
    if axis.dim != dim:
        return Narrowing({(0,): axis, (1,): axis})
    if not axis.plain or not axis.others or _arg(node, 5, "step", 1) != 1:
        raise NotTokenLocal(f"{node.target} replaces a part of the token axis")
    total, rows = shape(node)[dim], shape(node.args[1])[dim]  # type: ignore[arg-type]
    start = slice(_arg(node, 3, "start"), None).indices(total)[0]
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
    dim = _dim(_arg(node, 2, "dim", 0), len(shape(node)))
    _refuse_own(node, axis, {dim}, "replaces a part of")
    return Narrowing({(0,): axis, (1,): axis.at(axis.dim - (dim < axis.dim))})


@rule(aten.index.Tensor)
def _index(node: fx.Node, axis: Axis, size: int) -> Narrowing:
    """One dimension is looked up by a table of positions, which takes its place."""
    tables = [(i, table) for i, table in enumerate(node.args[1]) if table is not None]  # type: ignore[arg-type]
    if len(tables) != 1:
        raise NotTokenLocal(f"{node.target} looks up {len(tables)} dimensions at once")
    dim, table = tables[0]
    extra = len(shape(table))
    _refuse_own(node, axis, set(range(dim, dim + extra)), "looks up")
    return Narrowing({(0,): axis if axis.dim < dim else axis.at(axis.dim - extra + 1)})


@rule(aten.zeros.default, aten.ones.default, aten.full.default, aten.empty.memory_format)
def _constant(node: fx.Node, axis: Axis, size: int) -> Narrowing:
    return Narrowing({}, {(0,): _resized(shape(node), axis, size)})


@rule(operator.getitem)
def _getitem(node: fx.Node, axis: Axis, size: int) -> Narrowing:
    """A part of a split; where that cuts the token dimension, the other parts are joined to the tokens."""
    split, part = node.args
    if isinstance(split, fx.Node) and split.target == aten.split_with_sizes.default and isinstance(part, int):
        sizes: list[int] = list(split.args[1])  # type: ignore[arg-type]
        if axis.plain and axis.dim == _dim(_arg(split, 2, "dim", 0), len(shape(node))):
            before, after = sum(sizes[:part]), sum(sizes[part + 1 :])
            axis = replace(axis, before=axis.before + before, after=axis.after + after)
    return Narrowing({(0,): axis})


@rule(aten.cat.default, aten.stack.default)
def _join(node: fx.Node, axis: Axis, size: int) -> Narrowing:
    new = _dim(_arg(node, 1, "dim", 0), len(shape(node)))
    if axis.dim == new and axis.plain and axis.others and node.target == aten.cat.default:
        return _joined(node, axis)
    _refuse_own(node, axis, {new}, "joins along")
    dim = axis.dim - (axis.dim > new if node.target == aten.stack.default else 0)
    return Narrowing({path: axis.at(dim) for path, _ in operands(node)})


def _joined(node: fx.Node, axis: Axis) -> Narrowing:
    """One operand of a concatenation holds all tokens, and perhaps others; the rest are others."""
    parts = list(operands(node))
    sizes = [shape(part)[axis.dim] for _, part in parts]
    found = _part_of(sizes, axis, axis.count(shape(node)))
    before, after = axis.before - sum(sizes[:found]), axis.after - sum(sizes[found + 1 :])
    return Narrowing({parts[found][0]: replace(axis, before=before, after=after)})


@rule(aten.expand.default)
def _expand(node: fx.Node, axis: Axis, size: int) -> Narrowing:
    return Narrowing(_pointwise(node, axis, size).operands, {(1,): _resized(shape(node), axis, size)})


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
            return Narrowing({(0,): found}, {(1,): _resized(sizes, axis, size)})
    raise NotTokenLocal(f"{node.target} {list(source)} -> {list(sizes)} merges or splits the token axis")


@rule(aten.repeat.default, aten.tile.default)
def _repeat(node: fx.Node, axis: Axis, size: int) -> Narrowing:
    rank, times = len(shape(node)), list(node.args[1])  # type: ignore[arg-type]
    if ([1] * (rank - len(times)) + times)[axis.dim] != 1:
        raise NotTokenLocal(f"{node.target} repeats the token axis")
    return Narrowing({(0,): axis.at(axis.dim - rank + len(shape(node.args[0])))})  # type: ignore[arg-type]


@rule(aten.repeat_interleave.self_int)
def _repeat_interleave(node: fx.Node, axis: Axis, size: int) -> Narrowing:
    dim = _arg(node, 2, "dim")
    if dim is None:
        raise NotTokenLocal(f"{node.target} flattens the token axis")
    _refuse_own(node, axis, {_dim(dim, len(shape(node)))}, "repeats")
    return Narrowing({(0,): axis})


@rule(aten.embedding.default)
def _embedding(node: fx.Node, axis: Axis, size: int) -> Narrowing:
    _refuse_own(node, axis, {len(shape(node)) - 1}, "makes")
    return Narrowing({(1,): axis})


@rule(aten.scaled_dot_product_attention.default)
def _attention(node: fx.Node, axis: Axis, size: int) -> Narrowing:
    """Queries are token-local: keys and values are used whole."""
    rank = len(shape(node))
    mask = _arg(node, 3, "attn_mask")
    mask_path: Path = (3,) if len(node.args) > 3 else ("attn_mask",)
    _refuse_own(node, axis, {rank - 1}, "makes")
    found: dict[Path, Axis] = {(0,): axis}
    if axis.dim == rank - 2:
        if _arg(node, 5, "is_causal", False):
            raise NotTokenLocal("causal attention depends on the positions of the tokens")
    else:
        found |= {(1,): axis, (2,): axis}
    if isinstance(mask, fx.Node):
        dim = axis.dim - (rank - len(shape(mask)))
        if dim >= 0 and shape(mask)[dim] != 1:
            found[mask_path] = axis.at(dim)
    return Narrowing(found)
