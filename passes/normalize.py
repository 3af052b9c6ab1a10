"""Remove what has no effect at inference, so that the analyses see the arithmetic alone."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import fx

from tcc.passes.base import Pass
from tcc.passes.graph import value

__all__ = ["Normalize"]

aten = torch.ops.aten
_CHECKS = {aten._assert_tensor_metadata.default, aten._assert_async.msg, aten._assert_scalar.default}
_SAME = {aten.alias.default, aten.detach.default, aten.lift_fresh_copy.default}


@dataclass(frozen=True)
class Normalize(Pass):
    """Drop run-time assertions, dropout at inference, aliases, and casts to the dtype and device a value already has.

    Before: `c = clone(x); d = dropout(c, 0.1, False); e = _to_copy(d, dtype=float32)` with `x` in float32
    After:  `x`
    """

    def run(self, gm: fx.GraphModule) -> int:
        """Edit `gm`; see the class."""
        edits = 0
        for node in list(gm.graph.nodes):
            if node.target in _CHECKS:
                gm.graph.erase_node(node)
            elif _is_identity(node):
                node.replace_all_uses_with(node.args[0])
                gm.graph.erase_node(node)
            else:
                continue
            edits += 1
        return edits


def _is_identity(node: fx.Node) -> bool:
    if node.op != "call_function" or not node.args or not isinstance(node.args[0], fx.Node):
        return False
    if node.target in _SAME:
        return True
    if node.target is aten.dropout.default:
        return node.args[2] is False or bool(node.args[1] == 0)
    if node.target in (aten._to_copy.default, aten.clone.default):
        return _same_tensor(value(node.args[0]), value(node))
    return False


def _same_tensor(a: torch.Tensor, b: torch.Tensor) -> bool:
    """Same dtype, device and strides, so that later views stay valid."""
    return a.dtype == b.dtype and a.device == b.device and a.stride() == b.stride()
