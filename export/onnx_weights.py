"""The weights that an ONNX graph declares. ONNX Runtime is given their memory, and checks no shape or dtype."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import torch

from tcc.errors import BundleError
from tcc.export.manifest import WEIGHTS
from tcc.export.onnx_file import NUMBERS, Contents

__all__ = ["check_weights"]


def check_weights(path: Path, graph: Contents, names: tuple[str, ...], weights: Mapping[str, torch.Tensor]) -> None:
    """Raise where a graph declares other weights than it is given, or reads some from elsewhere.

    Args:
        path: the ONNX file.
        graph: what it holds.
        names: the weights that it is given.
        weights: all weights by name.

    Raises:
        BundleError: names the weight.
    """
    if missing := set(names) - weights.keys():
        raise BundleError(f"{path}: reads {min(missing)!r:.80}, which {WEIGHTS} does not have: export the bundle anew")
    for tensor in graph.tensors:
        if tensor.name not in names:
            if tensor.outside:
                raise BundleError(
                    f"{path}: {tensor.name!r:.80} lies in a file that the manifest does not give to the graph"
                )
            continue
        given = weights[tensor.name]
        if (NUMBERS.get(given.dtype), tuple(given.shape)) != (tensor.number, tensor.shape):
            raise BundleError(
                f"{path}: the weight {tensor.name!r:.80} is {given.dtype} {list(given.shape)}, and the graph declares "
                f"{list(tensor.shape)[:16]} of ONNX's dtype {tensor.number}: export the bundle anew"
            )
    if missing := set(names) - {tensor.name for tensor in graph.tensors}:
        raise BundleError(f"{path}: the graph has no weight {min(missing)!r:.80}, and the manifest gives it one")
