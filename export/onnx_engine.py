"""Running the ONNX graphs of a bundle with ONNX Runtime, on the caller's own memory."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from tcc.errors import BundleError, ExportError
from tcc.export.manifest import WEIGHTS, Graph, Manifest, TensorSpec, next_of
from tcc.export.onnx_file import NUMBERS
from tcc.export.onnx_operators import check_operators, open_file
from tcc.export.onnx_weights import check_weights
from tcc.export.slots import Slots
from tcc.export.stamp import KEY, compare, expected, read_stamp
from tcc.export.weights import load_tensors

__all__ = ["OnnxEngine", "has_cuda", "open_onnx"]

CUDA = "CUDAExecutionProvider"
#: What ONNX Runtime says where it may not run on the CPU what CUDA does not run.
_ON_CPU = "fallback to CPU EP has been explicitly disabled"

#: ONNX Runtime's names for dtypes, where they are not torch's.
_NAMES = {torch.float32: "float", torch.float64: "double"}


def has_cuda() -> bool:
    """Whether ONNX Runtime has its provider for CUDA.

    Raises:
        ExportError: ONNX Runtime is missing.
    """
    return CUDA in _onnxruntime().get_available_providers()


def _onnxruntime() -> Any:
    try:
        import onnxruntime
    except ImportError as error:
        raise ExportError(
            "running an ONNX bundle needs ONNX Runtime: pip install onnxruntime (or onnxruntime-gpu)"
        ) from error
    return onnxruntime


def open_onnx(folder: Path, manifest: Manifest, device: torch.device, *, prepack: bool = True) -> list[OnnxEngine]:
    """A session of ONNX Runtime for every graph; on a CPU all read one copy of the weights.

    Args:
        folder: the bundle.
        manifest: its manifest.
        device: where to run.
        prepack: whether each session may keep a copy of the weights that is laid out for its matrix products.

    Raises:
        ExportError: ONNX Runtime is missing, or has no provider for the device.
        BundleError: a graph cannot be read, or is not the one that the manifest describes.
    """
    onnxruntime = _onnxruntime()
    provider = CUDA if device.type == "cuda" else "CPUExecutionProvider"
    if provider not in onnxruntime.get_available_providers():
        raise ExportError(
            f"device {device}: this ONNX Runtime has no {provider}: pip install onnxruntime-gpu, or load on the CPU"
        )
    weights = load_tensors(folder / WEIGHTS)
    values = {name: _shared(onnxruntime, tensor) for name, tensor in weights.items()}
    engines = []
    for number, graph in enumerate(manifest.graphs):
        wanted = expected(manifest, number, weights)
        contents = open_file(folder / graph.file)
        check_weights(folder / graph.file, contents, graph.weights, weights)
        check_operators(folder / graph.file, contents, graph, manifest)
        try:
            shared = {name: values[name] for name in graph.weights}
            session = _session(onnxruntime, folder / graph.file, shared, provider, device, prepack)
            stamp = str(session.get_modelmeta().custom_metadata_map.get(KEY, ""))
        except Exception as error:  # ONNX Runtime has a dozen exception types without a common base
            if _ON_CPU in str(error):
                raise ExportError(_not_loaded(folder / graph.file, provider, device)) from error
            if type(error).__name__ == "NotImplemented":  # the graph is right: bfloat16 on a CPU for example
                raise ExportError(
                    f"{folder / graph.file}: this ONNX Runtime cannot run the graph on {device} ({error}): "
                    + _instead(manifest, device)
                ) from error
            raise BundleError(f"{folder / graph.file}: ONNX Runtime cannot read the graph ({error})") from error
        if provider not in session.get_providers():  # it goes on without a provider that it cannot load
            raise ExportError(_not_loaded(folder / graph.file, provider, device))
        compare(str(folder / graph.file), read_stamp(str(folder / graph.file), stamp), wanted)
        engines.append(OnnxEngine(session, graph, manifest, device, keep=(weights, values)))
    return engines


def _instead(manifest: Manifest, device: torch.device) -> str:
    half = any(spec.torch_dtype in (torch.bfloat16, torch.float16) for spec in (*manifest.inputs, *manifest.outputs))
    ways = ["export the model in float32"] if half else ["export with target='aoti'"]
    return ", or ".join((["load it on a GPU"] if device.type == "cpu" else []) + ways)


def _not_loaded(path: Path, provider: str, device: torch.device) -> str:
    return (
        f"{path}: {provider} was asked for on {device}, and ONNX Runtime would run the graph, or a part of it, on the "
        "CPU: mostly the CUDA or cuDNN libraries that this onnxruntime-gpu was built for were not found. Install them "
        "(its log says which), or load the bundle with device='cpu'"
    )


class OnnxEngine:
    """One graph; called with the values of its inputs by name, and the slots.

    Args:
        session: an `onnxruntime.InferenceSession`.
        graph: what the manifest says about it.
        manifest: the manifest.
        device: where all tensors live.
        keep: what must live as long as the session: the memory of weights.

    Raises:
        BundleError: inputs or outputs are not as the manifest says.
    """

    def __init__(self, session: Any, graph: Graph, manifest: Manifest, device: torch.device, *, keep: object) -> None:
        self._session, self._graph, self._device, self._keep = session, graph, device, keep
        self._outputs = manifest.outputs
        self._slots = frozenset(spec.name for spec in manifest.slots)
        _check(graph.file, "input", session.get_inputs(), graph.inputs, manifest.inputs_of(graph))
        outputs = manifest.outputs_of(graph)
        _check(graph.file, "output", session.get_outputs(), tuple(outputs), outputs)

    def __call__(self, feeds: Mapping[str, torch.Tensor], slots: Slots) -> list[torch.Tensor]:
        """Run the graph: read `feeds` and the slots, write new buffers for the outputs and the spare ones of the slots.

        Args:
            feeds: contiguous tensors on the device, for all inputs but the slots.
            slots: the slots; those that the graph stores are swapped.
        """
        binding = self._session.io_binding()
        for name in self._graph.inputs:
            self._bind(binding.bind_input, name, slots.current[name] if name in self._slots else feeds[name])
        outputs = [torch.empty(spec.shape, dtype=spec.torch_dtype, device=self._device) for spec in self._outputs]
        for spec, tensor in zip(self._outputs, outputs, strict=True):
            self._bind(binding.bind_output, spec.name, tensor)
        for name in self._graph.stores:
            self._bind(binding.bind_output, next_of(name), slots.spare(name))
        if self._device.type == "cuda":  # ONNX Runtime has a stream of its own, and waits for that one alone
            torch.cuda.current_stream(self._device).synchronize()
        self._session.run_with_iobinding(binding)
        for name in self._graph.stores:
            slots.swap(name)
        return outputs

    def _bind(self, bind: Any, name: str, tensor: torch.Tensor) -> None:
        kind = NUMBERS[tensor.dtype]
        bind(name, tensor.device.type, tensor.device.index or 0, kind, tuple(tensor.shape), tensor.data_ptr())


def _shared(onnxruntime: Any, tensor: torch.Tensor) -> Any:
    """A weight as a value of ONNX Runtime on the same memory."""
    if tensor.dtype == torch.bfloat16:
        kind = NUMBERS[tensor.dtype]
        return onnxruntime.OrtValue.ortvalue_from_numpy_with_onnx_type(tensor.view(torch.int16).numpy(), kind)
    return onnxruntime.OrtValue.ortvalue_from_numpy(tensor.numpy())


def _session(
    onnxruntime: Any, path: Path, weights: dict[str, Any], provider: str, device: torch.device, prepack: bool
) -> Any:
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3  # errors: warnings are about what its optimiser did not use
    options.intra_op_num_threads = torch.get_num_threads()
    # a graph whose operators make other shapes than it declares is refused: see onnx_operators.py
    options.add_session_config_entry("session.strict_shape_type_inference", "1")
    settings = {}
    if device.type == "cuda":
        settings = {"device_id": device.index or 0}
        options.add_external_initializers(list(weights), list(weights.values()))
        options.add_session_config_entry("session.disable_cpu_ep_fallback", "1")  # else it may run there, unsaid
    else:
        _share(onnxruntime, options, weights, prepack)
    return onnxruntime.InferenceSession(str(path), options, providers=[(provider, settings)])


def _share(onnxruntime: Any, options: Any, weights: dict[str, Any], prepack: bool) -> None:
    """Let a session on a CPU read the weights where they are, and use the memory of other sessions for its values."""
    for name, weight in weights.items():
        options.add_initializer(name, weight)
    # These turn weights inside the graph, which is then given the ones that lie here. The second one runs later.
    left_out = ["TransposeOptimizer", "TransposeOptimizer_CPUExecutionProvider"]
    if all(weight.data_type() == "tensor(float)" for weight in weights.values()):
        # it would make a transposed copy of most weights; half precision is computed in float32, and needs the copies
        left_out.append("ConstantFolding")
    options.add_session_config_entry("optimization.disable_specified_optimizers", ";".join(left_out))
    if not prepack:
        options.add_session_config_entry("session.disable_prepacking", "1")
    _one_arena(onnxruntime)
    options.add_session_config_entry("session.use_env_allocators", "1")


@functools.cache
def _one_arena(onnxruntime: Any) -> None:
    """Register an allocator that sessions of this process share."""
    arena, default = onnxruntime.OrtAllocatorType.ORT_ARENA_ALLOCATOR, onnxruntime.OrtMemType.DEFAULT
    with contextlib.suppress(Exception):  # the process has one already
        onnxruntime.create_and_register_allocator(onnxruntime.OrtMemoryInfo("Cpu", arena, 0, default), None)


def _check(file: str, what: str, found: Sequence[Any], names: Sequence[str], specs: Mapping[str, TensorSpec]) -> None:
    """Raise where a graph's inputs or outputs are not what the manifest says."""
    try:
        described = {value.name: (tuple(value.shape), value.type) for value in found}
    except UnicodeDecodeError as error:
        raise BundleError(f"{file}: the name of an {what} is no text: the graph was altered; export it anew") from error
    for name, spec in specs.items():
        expected = (spec.shape, f"tensor({_NAMES.get(spec.torch_dtype, spec.dtype)})")
        if described.get(name) != expected:
            raise BundleError(f"{file}: the {what} {name!r} is {described.get(name)}, and the manifest says {expected}")
    if len(described) != len(names):
        raise BundleError(f"{file}: {len(described)} {what}s, and the manifest says {len(names)}")
