"""Which values are views of others: in the same memory, so that who writes to one changes the other."""

from __future__ import annotations

import operator

import torch
from torch import fx
from torch.utils import _pytree as pytree

from tcc.passes.graph import fake_mode_of, sized_by_data
from tcc.passes.macs import node_macs
from tcc.passes.paths import operands

__all__ = ["owner", "viewed"]


def owner(node: fx.Node) -> fx.Node:
    """The value whose memory `node` is in: itself, or what it is a view of a view of."""
    while (source := viewed(node)) is not None:
        node = source
    return node


def viewed(node: fx.Node) -> fx.Node | None:
    """The operand that `node` is a view, or a part, of; None where it has memory of its own."""
    if node.op != "call_function":
        return None
    schema = getattr(node.target, "_schema", None)
    returns = schema.returns if schema is not None else ()
    marked = bool(returns) and all(r.alias_info is not None and not r.alias_info.is_write for r in returns)
    if node.target is torch.ops.aten.reshape.default:  # or a copy: that depends on how the operand lies
        return node.all_input_nodes[0]
    if node.target is operator.getitem:  # a part of what a split returned, or one of several new values
        source = node.args[0]
        return source if isinstance(source, fx.Node) and viewed(source) is not None else None
    if marked:
        return node.all_input_nodes[0]
    return _found_in(node) if _is_made_of_others(node) and not sized_by_data(node) else None


def _is_made_of_others(node: fx.Node) -> bool:
    """Whether the operator is a function of other operators, whose schema does not tell of views, as of `einsum`.

    Products have memory of their own, and are most of the calls that are made of others.
    """
    return isinstance(node.target, torch._ops.OpOverload) and node.target._can_decompose() and not node_macs(node)


def _found_in(node: fx.Node) -> fx.Node | None:
    """The operand in whose memory the value is, by calling the operator."""
    args, kwargs = fx.map_arg((node.args, node.kwargs), lambda n: n.meta["val"])
    with fake_mode_of(node.graph):
        made = pytree.tree_leaves(node.target(*args, **kwargs))  # type: ignore[operator]
    places = {_place(each) for each in made} - {None}
    return next((operand for _, operand in operands(node) if _place(operand.meta["val"]) in places), None)


def _place(val: object) -> int | None:
    return val.untyped_storage()._cdata if isinstance(val, torch.Tensor) else None
