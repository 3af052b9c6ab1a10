"""Running the TensorRT engines of a bundle on torch's own memory and stream."""

from __future__ import annotations

import threading
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from tcc.errors import BundleError
from tcc.export.machine import refuse_other
from tcc.export.manifest import Graph, Manifest, TensorSpec, next_of
from tcc.export.slots import Slots
from tcc.export.tensorrt import input_name, output_name, require_tensorrt

__all__ = ["TensorrtEngine", "open_tensorrt"]


def open_tensorrt(folder: Path, manifest: Manifest, device: torch.device) -> list[TensorrtEngine]:
    """Every engine, with one memory for the activations of all.

    Raises:
        ExportError: TensorRT is missing.
        BundleError: the engines are for another GPU or version, or are not what the manifest describes.
    """
    trt = require_tensorrt(manifest.target)
    refuse_other(str(folder), manifest.arch, manifest.tools, device, tensorrt=trt.__version__)
    runtime = trt.Runtime(trt.Logger(trt.Logger.ERROR))
    loaded: dict[str, Any] = {}
    for file in dict.fromkeys(graph.file for graph in manifest.graphs):
        loaded[file] = runtime.deserialize_cuda_engine((folder / file).read_bytes())
        if loaded[file] is None:
            raise BundleError(f"{folder / file}: TensorRT cannot load the engine: export the bundle anew")
    shared = Activations(max(engine.device_memory_size_v2 for engine in loaded.values()), device)
    return [TensorrtEngine(trt, loaded[graph.file], graph, manifest, shared, keep=runtime) for graph in manifest.graphs]


class Activations:
    """Device memory that engines use in turn, whatever streams they run on.

    Args:
        size: its bytes.
        device: where it lies.
    """

    def __init__(self, size: int, device: torch.device) -> None:
        self.memory = torch.empty(max(size, 1), dtype=torch.uint8, device=device)
        self.lock = threading.Lock()
        self._free: Any = torch.cuda.Event()  # type: ignore[no-untyped-call]

    def give(self, context: Any) -> None:
        """Let an execution context use it."""
        context.set_device_memory(self.memory.data_ptr(), self.memory.nbytes)

    def run(self, context: Any, file: str) -> None:
        """Enqueue on torch's current stream, behind whoever uses the memory now."""
        stream = torch.cuda.current_stream(self.memory.device)
        stream.wait_event(self._free)
        if not context.execute_async_v3(stream.cuda_stream):
            raise BundleError(f"{file}: TensorRT refused to run the engine: its log says why")
        self._free.record(stream)


class TensorrtEngine:
    """One engine, or one optimisation profile of it; called with the values of its inputs by name, and the slots.

    Args:
        trt: the module `tensorrt`.
        engine: a `tensorrt.ICudaEngine`.
        graph: what the manifest says about it.
        manifest: the manifest.
        shared: the memory of all engines' activations.
        keep: what must live as long as the engine.

    Raises:
        BundleError: inputs or outputs are not as the manifest says, or there is no such profile.
    """

    def __init__(
        self, trt: Any, engine: Any, graph: Graph, manifest: Manifest, shared: Activations, *, keep: object
    ) -> None:
        self._keep = (engine, keep)
        self._graph, self._shared, self._outputs = graph, shared, manifest.outputs
        self._slots = frozenset(spec.name for spec in manifest.slots)
        inputs, outputs = manifest.inputs_of(graph), manifest.outputs_of(graph)
        numbers = manifest.target == "tensorrt"
        self._names = {name: input_name(i) if numbers else name for i, name in enumerate(graph.inputs)}
        self._names |= {name: output_name(i) if numbers else name for i, name in enumerate(outputs)}
        found = self._tensors(trt, engine, trt.TensorIOMode.INPUT)
        self._inputs = [name for name in graph.inputs if self._names[name] in found]  # without those it has no use for
        self._check(
            found, {self._names[name]: _described(trt, inputs[name]) for name in self._inputs if name in inputs}
        )
        found = self._tensors(trt, engine, trt.TensorIOMode.OUTPUT)
        self._check(found, {self._names[name]: _described(trt, spec) for name, spec in outputs.items()})
        self._context = engine.create_execution_context(trt.ExecutionContextAllocationStrategy.USER_MANAGED)
        self._profile(engine, graph.entry, {name: inputs[name].shape for name in self._inputs if name in inputs})
        shared.give(self._context)

    def __call__(self, feeds: Mapping[str, torch.Tensor], slots: Slots) -> list[torch.Tensor]:
        """Run the engine on torch's current stream: read `feeds` and the slots, write the outputs and spare slots.

        Args:
            feeds: contiguous tensors on the device, for all inputs but the slots.
            slots: the slots; those that the graph stores are swapped.
        """
        device = self._shared.memory.device
        outputs = [torch.empty(spec.shape, dtype=spec.torch_dtype, device=device) for spec in self._outputs]
        with self._shared.lock, _current(device):  # a context has one set of addresses
            for name in self._inputs:
                self._bind(name, slots.current[name] if name in self._slots else feeds[name])
            for spec, tensor in zip(self._outputs, outputs, strict=True):
                self._bind(spec.name, tensor)
            for name in self._graph.stores:
                self._bind(next_of(name), slots.spare(name))
            self._shared.run(self._context, self._graph.file)
        for name in self._graph.stores:
            slots.swap(name)
        return outputs

    def _profile(self, engine: Any, entry: str, shapes: dict[str, tuple[int, ...]]) -> None:
        """Choose an optimisation profile, for good, and give open inputs their shapes."""
        if not entry:
            return
        if not entry.isdecimal() or int(entry) >= engine.num_optimization_profiles:
            raise BundleError(f"{self._graph.file}: the engine has no optimisation profile {entry!r:.40}")
        stream = torch.cuda.current_stream(self._shared.memory.device)
        accepted = self._context.set_optimization_profile_async(int(entry), stream.cuda_stream)
        stream.synchronize()
        for name, shape in shapes.items():
            if -1 in tuple(engine.get_tensor_shape(self._names[name])):
                accepted = self._context.set_input_shape(self._names[name], shape) and accepted
        if not accepted:
            raise BundleError(f"{self._graph.file}: the optimisation profile {entry} is for other shapes")

    def _bind(self, name: str, tensor: torch.Tensor) -> None:
        if not self._context.set_tensor_address(self._names[name], tensor.data_ptr()):
            raise BundleError(f"{self._graph.file}: the engine does not take the tensor {name!r:.80}")

    @staticmethod
    def _tensors(trt: Any, engine: Any, mode: Any) -> dict[str, tuple[Any, ...]]:
        names = [engine.get_tensor_name(index) for index in range(engine.num_io_tensors)]
        return {
            name: (tuple(engine.get_tensor_shape(name)), engine.get_tensor_dtype(name))
            for name in names
            if engine.get_tensor_mode(name) == mode
        }

    def _check(self, found: dict[str, tuple[Any, ...]], wanted: dict[str, tuple[Any, ...]]) -> None:
        """Raise where the engine's inputs or outputs are not what the manifest says; -1 is an open dimension."""
        differ = found.keys() ^ wanted.keys()
        for name in found.keys() & wanted.keys():
            (shape, kind), (sizes, expected) = found[name], wanted[name]
            fits = len(shape) == len(sizes) and all(a in (-1, b) for a, b in zip(shape, sizes, strict=True))
            if not fits or kind != expected:
                differ |= {name}
        if differ:
            file = self._graph.file
            raise BundleError(f"{file}: the engine has other tensors than the manifest says: {sorted(differ)[:5]}")


def _current(device: torch.device) -> torch.cuda.device:
    """The GPU that TensorRT works on, as long as the context lasts."""
    return torch.cuda.device(-1 if device.index is None else device.index)


def _described(trt: Any, spec: TensorSpec) -> tuple[Any, ...]:
    """A tensor's shape, and its dtype as TensorRT names it; None for a dtype that engines do not have."""
    names = {
        torch.float32: "FLOAT", torch.float16: "HALF", torch.bfloat16: "BF16", torch.int64: "INT64",
        torch.int32: "INT32", torch.int8: "INT8", torch.uint8: "UINT8", torch.bool: "BOOL",
    }  # fmt: skip
    return spec.shape, getattr(trt.DataType, names.get(spec.torch_dtype, ""), None)
