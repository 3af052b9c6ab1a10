"""Running the package of an AOTInductor bundle."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file

from tcc.errors import BundleError
from tcc.export.manifest import WEIGHTS, Graph, Manifest
from tcc.export.slots import Slots

__all__ = ["AotiEngine", "open_aoti"]


def open_aoti(folder: Path, manifest: Manifest, device: torch.device) -> list[AotiEngine]:
    """Every variant of the package; all read one copy of the weights.

    Raises:
        BundleError: a variant is not in the package, or reads other weights than the manifest says.
    """
    from torch._inductor.package.package import load_package  # imported here: it is slow

    weights = load_file(folder / WEIGHTS, device=str(device))
    engines = []
    for graph in manifest.graphs:
        try:
            model: Any = load_package(
                str(folder / graph.file), graph.entry, device_index=-1 if device.index is None else device.index
            )
            names = set(model.get_constant_fqns())
        except Exception as error:  # torch raises RuntimeError, KeyError and others
            raise BundleError(f"{folder / graph.file}: cannot load {graph.entry!r} ({error})") from error
        if names != set(graph.weights) or not names <= weights.keys():
            raise BundleError(f"{folder / graph.file}: {graph.entry!r} reads other weights than the manifest says")
        model.load_constants({name: weights[name] for name in names}, check_full_update=True, user_managed=True)
        engines.append(AotiEngine(model, graph, manifest, keep=weights))
    return engines


class AotiEngine:
    """One variant; called with the values of its inputs by name, and the slots, which it writes in place.

    Args:
        model: what `load_package` returned.
        graph: what the manifest says about it.
        manifest: the manifest.
        keep: what must live as long: the memory of the weights.
    """

    def __init__(self, model: Any, graph: Graph, manifest: Manifest, *, keep: object) -> None:
        self._model, self._keep = model, keep
        self._inputs, self._slots = graph.inputs, frozenset(spec.name for spec in manifest.slots)

    def __call__(self, feeds: Mapping[str, torch.Tensor], slots: Slots) -> list[torch.Tensor]:
        """Run the variant.

        Args:
            feeds: contiguous tensors on the device, for all inputs but the slots.
            slots: the slots; those that the graph stores are written in place.
        """
        flat = [slots.current[name] if name in self._slots else feeds[name] for name in self._inputs]
        outputs: list[torch.Tensor] = self._model.loader.boxed_run(flat)
        return outputs
