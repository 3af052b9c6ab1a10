"""Follow tokens or samples from any value up to another one, op by op."""

from __future__ import annotations

import torch
from torch import fx

from tcc.passes.dataflow import Dataflow
from tcc.passes.graph import cat_dim, shape, source_line
from tcc.passes.paths import Path, operands
from tcc.passes.products import product
from tcc.passes.token_axis import NotTokenLocal, argument, narrowing, own_dim
from tcc.passes.tokens import Axis

__all__ = ["batch_axis", "follow", "mixes_by_product"]

aten = torch.ops.aten
_FLEX = torch.ops.higher_order.flex_attention


def follow(target: fx.Node, axis: Axis, origin: fx.Node, flow: Dataflow) -> tuple[set[Axis], str]:
    """Follow the token axis of `target` up to `origin`.

    Returns:
        The axes under which `origin` is reached, and the reason why the tokens cannot be followed ("" if they can).
    """
    found, node, reason = _follow(target, axis, origin, flow)
    return found, f"{reason} ({source_line(node)})" if node is not None else ""


def mixes_by_product(target: fx.Node, axis: Axis, origin: fx.Node, flow: Dataflow) -> bool:
    """Whether it is a product of tokens, as in attention of any kind, that the tokens cannot be followed through."""
    _, node, _ = _follow(target, axis, origin, flow)
    return node is not None and (product(node) is not None or node.target is _FLEX)


def _follow(target: fx.Node, axis: Axis, origin: fx.Node, flow: Dataflow) -> tuple[set[Axis], fx.Node | None, str]:
    """Where the tokens arrive at `origin`, and the node that they cannot be followed through, with the reason."""
    found: set[Axis] = set()
    beside: list[tuple[fx.Node, set[Axis]]] = []
    keys: dict[fx.Node, set[Path]] = {}
    for user, path in (place for attention in flow.attention.values() for place in attention.whole):
        keys.setdefault(user, set()).add(path)
    todo, seen = [(target, axis)], set()
    while todo:
        node, here = todo.pop()
        if (node, here) in seen:
            continue
        seen.add((node, here))
        if node is origin:
            found.add(here)
        elif flow.depends(node, origin):
            try:
                wanted = narrowing(node, here, 1).operands
            except NotTokenLocal as blocked:
                return found, node, str(blocked)
            left = [o for path, o in operands(node) if path not in wanted and path not in keys.get(node, ())]
            for operand in (o for o in left if flow.comes_from(o, origin)):
                if (dim := _joined(node)) is None:
                    return found, node, _mixed(node)
                # rows that are joined to the tokens: tokens of their own, which must be none of these in the stream
                others, blocked_at, reason = _follow(operand, Axis(dim), origin, flow)
                if blocked_at is not None:
                    return found, blocked_at, reason
                beside.append((node, others))
            todo += [(operand, wanted[path]) for path, operand in operands(node) if path in wanted]
    for node, others in beside:
        if any(_meet(one, other, shape(origin)) for one in found for other in others):
            return found, node, _mixed(node)
    return found, None, ""


def _joined(node: fx.Node) -> int | None:
    """The dimension along which an operator puts rows of its operands beside each other; None for other operators."""
    if node.target is aten.cat.default:
        return cat_dim(node)
    if node.target is aten.slice_scatter.default:
        return own_dim(argument(node, 2, "dim", 0), len(shape(node)))
    return None


def _mixed(node: fx.Node) -> str:
    if product(node) is None:
        return f"{node.target} ('{node.name}') takes what is computed from all tokens"
    known = "attention is recognised as product, softmax and product, or as torch's own operator"
    return f"{node.target} ('{node.name}') mixes tokens; {known}"


def _meet(one: Axis, other: Axis, sizes: tuple[int, ...]) -> bool:
    """Whether tokens on one axis may be among those on the other, in a value of these sizes."""
    rows = [range(a.before, sizes[a.dim] - a.after) for a in (one, other)]
    apart = one.dim == other.dim and (rows[0].stop <= rows[1].start or rows[1].stop <= rows[0].start)
    return not apart


def batch_axis(stream: fx.Node, axis: Axis) -> Axis | None:
    """Where the samples of a stream lie: its first dimension, or the second where the first counts tokens."""
    dim = 0 if axis.dim else 1
    return Axis(dim) if len(shape(stream)) > 2 and shape(stream)[dim] > 1 else None
