"""Remove what has no effect at inference, so that the analyses see the arithmetic alone."""

from __future__ import annotations

import operator
import sys
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

from tcc.passes.base import Pass
from tcc.passes.graph import UNKNOWN, cat_dim, emit, shape, value
from tcc.passes.views import owner, viewed

__all__ = ["Normalize"]

aten = torch.ops.aten
_CHECKS = {aten._assert_tensor_metadata.default, aten._assert_async.msg, aten._assert_scalar.default}
_LIKE: dict[Any, Any] = {
    aten.type_as.default: None,
    aten.copy.default: aten.expand.default,
    aten.expand_as.default: aten.expand.default,
    aten.view_as.default: aten.reshape.default,
    aten.reshape_as.default: aten.reshape.default,
}
_MADE: dict[Any, Any] = {
    aten.new_zeros.default: aten.zeros.default,
    aten.new_ones.default: aten.ones.default,
    aten.new_full.default: aten.full.default,
    aten.new_empty.default: aten.empty.memory_format,
}
_VIEWS = {aten.view.default, aten._unsafe_view.default}
#: Of a dimension that is not 1, nothing is squeezed.
_SQUEEZES = {aten.squeeze.dim, aten.squeeze.dims}
_COPIES = {aten.clone.default, aten._to_copy.default, aten.lift_fresh_copy.default, aten.cat.default}
_SAME = {aten.alias.default, aten.detach.default, aten.lift_fresh_copy.default}


@dataclass(frozen=True)
class Normalize(Pass):
    """Drop assertions, dropout at inference, aliases, casts to the present dtype and device, squeezes of nothing.

    Before: `c = clone(x); d = dropout(c, 0.1, False); e = _to_copy(d, dtype=float32)` with `x` in float32
    After:  `x`

    1. What reads another value for its dtype or shape alone no longer reads it: `type_as(x, y)` and `copy(y, x)` become
       casts, `expand_as(x, y)` an expansion, `new_zeros(y, s)` zeros, so that nobody seems to need all of `y`.
    2. A copy stays that the caller gets beside what it is a copy of: who writes to one means one alone.
    3. Bounds that a slice leaves open are written out: Inductor wants numbers where the data decide the other one.
    4. A view becomes a reshape, which is one wherever it can be: views are captured for the layouts that values have in
       the model, and what a plan makes of a value (a slot, a scatter) need not have the same one.

    So is a value that is cut in parts and joined again, as streams are between two blocks:

    Before: `cat([slice(x, 1, 0, 5), slice(x, 1, 5, 21)], 1)` with `x` of shape `[2, 21, 32]`
    After:  `x`
    """

    def run(self, gm: fx.GraphModule) -> int:
        """Edit `gm`; see the class."""
        edits = 0
        for node in list(gm.graph.nodes):
            if node.target in _CHECKS:
                gm.graph.erase_node(node)
            elif node.target in _LIKE:
                _replace(gm.graph, node)
            elif node.target in _MADE:
                _make(gm.graph, node)
            elif node.target in _VIEWS:
                node.target = aten.reshape.default
            elif node.target is aten.slice.Tensor and None in node.args:
                _bound(node)
            elif (same := _same(node)) is not None and not _keeps_apart(node, same):
                node.replace_all_uses_with(same)
                gm.graph.erase_node(node)
            else:
                continue
            edits += 1
        return edits


def _replace(graph: fx.Graph, node: fx.Node) -> None:
    """Write the dtype or shape of a value in place of the value."""
    x, like = node.args[1::-1] if node.target is aten.copy.default else node.args
    assert isinstance(x, fx.Node)
    assert isinstance(like, fx.Node)
    with graph.inserting_before(node):
        new = x
        if shape(new) != shape(node):
            new = emit(graph, _LIKE[node.target], (new, list(shape(node))), like=node)
        if value(new).dtype != value(node).dtype or value(new).device != value(node).device:
            kinds = {"dtype": value(node).dtype, "device": value(node).device}
            new = emit(graph, aten._to_copy.default, (new,), kinds, like=node)
    node.replace_all_uses_with(new)
    graph.erase_node(node)


def _make(graph: fx.Graph, node: fx.Node) -> None:
    """Write out the dtype and device of a constant that are another value's."""
    kinds = {"dtype": value(node).dtype, "device": value(node).device}
    with graph.inserting_before(node):
        new = emit(graph, _MADE[node.target], node.args[1:], kinds, like=node)
    node.replace_all_uses_with(new)
    graph.erase_node(node)


def _bound(node: fx.Node) -> None:
    """Write out where a slice that says `None` begins or ends."""
    x, dim, *bounds = node.args
    given = [default if bound is None else bound for bound, default in zip(bounds, (0, sys.maxsize, 1), strict=False)]
    node.args = (x, dim, *given)


def _same(node: fx.Node) -> fx.Node | None:
    """The operand that `node` is equal to."""
    if node.target is aten.cat.default:
        return _whole(node)
    return node.args[0] if _is_identity(node) else None  # type: ignore[return-value]


def _keeps_apart(node: fx.Node, same: fx.Node) -> bool:
    """Whether `node` is a copy that the caller gets, of an input, a weight, or something else that the caller gets."""
    if node.target not in _COPIES or not _is_handed_out(node):
        return False
    source = owner(same)
    return source.op in ("placeholder", "get_attr") or _is_handed_out(source)


def _is_handed_out(node: fx.Node) -> bool:
    """Whether the graph returns the value, or a view of it."""
    return any(user.op == "output" or (viewed(user) is node and _is_handed_out(user)) for user in node.users)


def _whole(node: fx.Node) -> fx.Node | None:
    """The value whose consecutive parts `node` joins."""
    dim = cat_dim(node)
    parts = [_part(part, dim) for part in node.args[0]]  # type: ignore[union-attr, arg-type]
    source, at = parts[0][0], 0
    for found, start, stop in parts:
        if found is None or found is not source or start != at:
            return None
        at = stop
    if source is None or at != shape(source)[dim] or not _same_tensor(value(source), value(node)):
        return None
    return source


def _part(node: fx.Node, dim: int) -> tuple[fx.Node | None, int, int]:
    """The value that `node` is a stretch of along `dim`, from and up to but not including."""
    cut = node.args[0] if node.target is operator.getitem else node
    if not isinstance(cut, fx.Node) or cut.target not in (aten.slice.Tensor, aten.split_with_sizes.default):
        return None, 0, 0
    args: Any = cut.args
    source: fx.Node = args[0]
    if cut.target is aten.slice.Tensor:
        given: list[Any] = list(args[1:])
        along, start, _, step = given + [0, None, None, 1][len(given) :]
        if isinstance(start, fx.Node) or UNKNOWN in (*shape(source), *shape(node)):
            return None, 0, 0
        fits = along % len(shape(source)) == dim and step == 1
        first = slice(start, None).indices(shape(source)[dim])[0]
        return (source if fits else None), first, first + shape(node)[dim]
    sizes, number = args[1], int(node.args[1])  # type: ignore[arg-type]
    if not all(isinstance(size, int) for size in sizes):
        return None, 0, 0
    fits = (args[2] if len(args) > 2 else 0) % len(shape(source)) == dim
    first = sum(sizes[:number])
    return (source if fits else None), first, first + sizes[number]


def _is_identity(node: fx.Node) -> bool:
    if node.op != "call_function" or not node.args or not isinstance(node.args[0], fx.Node):
        return False
    if node.target in _SAME:
        return True
    if node.target is aten.dropout.default:
        return node.args[2] is False or bool(node.args[1] == 0)
    if node.target in _SQUEEZES:
        return UNKNOWN not in shape(node) and shape(node.args[0]) == shape(node)
    if node.target in (aten._to_copy.default, aten.clone.default):
        return _same_tensor(value(node.args[0]), value(node))
    return False


def _same_tensor(a: torch.Tensor, b: torch.Tensor) -> bool:
    """Same dtype, device and strides, so that later views stay valid."""
    return a.dtype == b.dtype and a.device == b.device and a.stride() == b.stride()
