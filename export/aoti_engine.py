"""Running the package of an AOTInductor bundle."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from tcc.errors import BundleError
from tcc.export.manifest import WEIGHTS, Graph, Manifest
from tcc.export.slots import Slots
from tcc.export.stamp import compare, expected, package_stamps
from tcc.export.weights import load_tensors

__all__ = ["AotiEngine", "open_aoti"]


def open_aoti(folder: Path, manifest: Manifest, device: torch.device) -> list[AotiEngine]:
    """Every variant of the packages; all read one copy of the weights.

    Nothing of a package is unpacked or opened before its list of files and its stamps have been checked.

    Raises:
        BundleError: a package is none of tcc's, a variant is not in it, or was compiled for something else than the
            manifest says.
    """
    weights = load_tensors(folder / WEIGHTS, device)
    stamps = {file: package_stamps(folder / file) for file in {graph.file for graph in manifest.graphs}}
    for number, graph in enumerate(manifest.graphs):
        where = f"{folder / graph.file}: {graph.entry!r:.40}"
        if graph.entry not in stamps[graph.file]:
            raise BundleError(f"{where} is not in the package: the manifest was altered; export the bundle anew")
        compare(where, stamps[graph.file][graph.entry], expected(manifest, number, weights))
    models = {file: _models(folder / file, device) for file in stamps}
    return [
        AotiEngine(_model(folder, graph, models, weights), graph, manifest, keep=weights) for graph in manifest.graphs
    ]


def _models(path: Path, device: torch.device) -> dict[str, Any]:
    """The compiled variants of a package by name."""
    from torch.export.pt2_archive._package import load_pt2  # imported here: it is slow

    # compiled code then checks shapes, dtypes and strides itself, too: some microseconds per input
    os.environ.setdefault("AOTI_RUNTIME_CHECK_INPUTS", "1")
    try:
        return dict(load_pt2(str(path), device_index=-1 if device.index is None else device.index).aoti_runners)
    except Exception as error:  # torch raises RuntimeError, KeyError and others
        raise BundleError(f"{path}: torch cannot load the package ({error}): export the bundle anew") from error


def _model(
    folder: Path, graph: Graph, models: Mapping[str, Mapping[str, Any]], weights: dict[str, torch.Tensor]
) -> Any:
    """A compiled variant, with its weights."""
    model = models[graph.file].get(graph.entry)
    if model is None or {*model.get_constant_fqns()} != {*graph.weights}:
        raise BundleError(f"{folder / graph.file}: {graph.entry!r:.40} reads other weights than the manifest says")
    constants = {name: weights[name] for name in graph.weights}
    model.load_constants(constants, check_full_update=True, user_managed=True)
    return model


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
