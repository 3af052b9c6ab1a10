"""Which input of a captured graph says how noisy the sample is: the timestep."""

from __future__ import annotations

import torch
from torch import fx

from tcc.passes.graph import shape
from tcc.passes.macs import node_macs

__all__ = ["noise_level"]

aten = torch.ops.aten

_WAVES = {aten.sin.default, aten.cos.default}
_LOOKUPS = {aten.embedding.default, aten.index.Tensor, aten.index_select.default}


def noise_level(graph: fx.Graph) -> int | None:
    """The position, among the graph's inputs, of the noise level; None where the model does not embed one by waves.

    It is the input of fewest dimensions, the first among equals, whose sine or cosine is taken before anything is
    multiplied or looked up. Token positions, which rotary embeddings treat alike, have more dimensions; a guidance
    strength stands after the timestep.
    """
    inputs = [node for node in graph.nodes if node.op == "placeholder"]
    found = [(len(shape(node)), position) for position, node in enumerate(inputs) if _reaches_wave(node)]
    return min(found)[1] if found else None


def _reaches_wave(start: fx.Node) -> bool:
    seen, todo = {start}, [start]
    while todo:
        for user in todo.pop().users:
            if user.target in _WAVES:
                return True
            if user not in seen and not node_macs(user) and user.target not in _LOOKUPS:
                seen.add(user)
                todo.append(user)
    return False
