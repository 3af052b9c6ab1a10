"""Follow tokens or samples from any value up to another one, op by op."""

from __future__ import annotations

from collections.abc import Collection, Iterator

import torch
from torch import fx

from tcc.passes.dataflow import Dataflow
from tcc.passes.graph import shape, source_line
from tcc.passes.paths import Path, operands
from tcc.passes.products import product
from tcc.passes.token_axis import NotTokenLocal, is_pointwise, narrowing
from tcc.passes.tokens import Axis

__all__ = ["batch_axis", "follow", "mixes_by_product"]

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
            if any(_left_out(node, wanted.keys() | keys.get(node, set()), origin, flow)):
                if product(node) is not None:
                    known = "attention is recognised as product, softmax and product, or as torch's own operator"
                    return found, node, f"{node.target} ('{node.name}') mixes tokens; {known}"
                if is_pointwise(node):
                    return found, node, f"{node.target} ('{node.name}') takes what is computed from all tokens"
            todo += [(operand, wanted[path]) for path, operand in operands(node) if path in wanted]
    return found, None, ""


def _left_out(node: fx.Node, known: Collection[Path], origin: fx.Node, flow: Dataflow) -> Iterator[bool]:
    """For every operand but the `known` ones, whether it is computed from `origin`."""
    return (o is origin or flow.depends(o, origin) for path, o in operands(node) if path not in known)


def batch_axis(stream: fx.Node, axis: Axis) -> Axis | None:
    """Where the samples of a stream lie: its first dimension, or the second where the first counts tokens."""
    dim = 0 if axis.dim else 1
    return Axis(dim) if len(shape(stream)) > 2 and shape(stream)[dim] > 1 else None
