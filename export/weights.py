"""The weights of a program in one safetensors file that the graphs of all variants refer to."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file

from tcc.errors import BundleError, ExportError
from tcc.program import Variant
from tcc.tensors_file import save_tensors

__all__ = ["Place", "Weights", "collect", "load_tensors", "places"]


@dataclass(frozen=True)
class Weights:
    """Every weight of some graphs once.

    Attributes:
        tensors: contiguous tensors by parameter name.
        names: the parameter name of each graph attribute; several attributes may share a tensor.
    """

    tensors: dict[str, torch.Tensor]
    names: dict[str, str]

    def save(self, path: Path) -> None:
        """Write them as safetensors."""
        save_tensors({name: tensor.detach().cpu() for name, tensor in self.tensors.items()}, path)


@dataclass(frozen=True)
class Place:
    """Where a tensor's bytes lie in a file."""

    offset: int
    length: int


def collect(variants: Sequence[Variant]) -> Weights:
    """The weights that the graphs read; tensors that share all their memory are one.

    Raises:
        ExportError: a graph has functions of its own, which operators such as `flex_attention` call.
    """
    found: dict[tuple[object, ...], str] = {}
    tensors: dict[str, torch.Tensor] = {}
    names: dict[str, str] = {}
    for variant in variants:
        for node in variant.gm.graph.nodes:
            if node.op != "get_attr" or str(node.target) in names:
                continue
            tensor = getattr(variant.gm, str(node.target))
            if not isinstance(tensor, torch.Tensor):
                reader = next(iter(node.users)).target
                raise ExportError(
                    f"the graph hands {reader} a function of its own, and bundles hold tensors alone: export a model "
                    "that calls another operator in its place, such as scaled_dot_product_attention"
                )
            name = str(node.meta.get("weight", node.target))
            key = (tensor.data_ptr(), tensor.dtype, tuple(tensor.shape), tensor.stride()) if tensor.numel() else (name,)
            if key not in found:
                found[key] = name
                tensors[name] = _alone(tensor.detach().contiguous())
            names[str(node.target)] = found[key]
    return Weights(tensors, names)


def _alone(tensor: torch.Tensor) -> torch.Tensor:
    """`tensor`, copied if it is a part of another: safetensors refuses tensors that share memory."""
    return tensor if tensor.untyped_storage().nbytes() == tensor.nbytes else tensor.clone()


def places(path: Path) -> dict[str, Place]:
    """Where each tensor of a safetensors file lies in it."""
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        header = json.loads(file.read(length))
    header.pop("__metadata__", None)
    return {
        name: Place(8 + length + entry["data_offsets"][0], entry["data_offsets"][1] - entry["data_offsets"][0])
        for name, entry in header.items()
    }


def load_tensors(path: Path, device: torch.device | str = "cpu") -> dict[str, torch.Tensor]:
    """The tensors of a safetensors file of a bundle; on a CPU they are a view of the file, read where they are used.

    Raises:
        BundleError: the file is none, or its header and its size do not fit.
    """
    try:
        return load_file(path, device=str(device))
    except (SafetensorError, OSError, ValueError, TypeError, KeyError) as error:
        raise BundleError(f"{path}: cannot be read as safetensors ({error}): export the bundle anew") from error
