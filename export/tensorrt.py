"""TensorRT: each graph as a serialised engine, made by TensorRT's parser of ONNX or by Torch-TensorRT.

An engine is built on the GPU that it is for. It cannot be refitted: its weights are its own, and it is as fast as it
gets. Networks are strongly typed, and float32 means float32 (no TF32).
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from tcc.errors import ExportError
from tcc.export.graphs import example, with_weights
from tcc.export.machine import Machine, gpu_arch, versions
from tcc.export.onnx import require_onnx
from tcc.export.weights import Weights
from tcc.program import Variant

__all__ = [
    "compile_onnx",
    "compile_program",
    "input_name",
    "output_name",
    "require_tensorrt",
    "tensorrt_machine",
    "torch_tensorrt_machine",
]


def require_tensorrt(target: str) -> Any:
    """The module `tensorrt`.

    Raises:
        ExportError: it is not installed.
    """
    try:
        import tensorrt
    except ImportError as error:
        raise ExportError(f"target={target!r} needs the package {error.name}: pip install 'tcc[gpu]'") from error
    return tensorrt


def tensorrt_machine(arch: str | None) -> Machine:
    """What engines from ONNX are built for and with.

    Raises:
        ExportError: a package or a GPU is missing, or the GPU is not of the architecture `arch`.
    """
    require_onnx()
    version = require_tensorrt("tensorrt-onnx").__version__
    return Machine(gpu_arch("tensorrt-onnx", arch), versions("torch", "onnxscript") | {"tensorrt": version})


def torch_tensorrt_machine(arch: str | None) -> Machine:
    """What engines from Torch-TensorRT are built for and with.

    Raises:
        ExportError: a package or a GPU is missing, or the GPU is not of the architecture `arch`.
    """
    version = require_tensorrt("tensorrt").__version__
    _torch_tensorrt()
    return Machine(gpu_arch("tensorrt", arch), versions("torch", "torch-tensorrt") | {"tensorrt": version})


def compile_onnx(
    source: Path, out: Path, machine: Machine, profiles: Sequence[dict[str, tuple[int, ...]]] = ()
) -> None:
    """Build the engine of an ONNX graph.

    Args:
        source: the graph; its weights lie beside it.
        out: the file to write.
        machine: what the engine is built for; TensorRT builds for the GPU at hand.
        profiles: the shapes that open inputs can have; each becomes an optimisation profile for exactly these shapes.

    Raises:
        ExportError: TensorRT refuses the graph; says at which node.
    """
    trt = require_tensorrt("tensorrt-onnx")
    logger = trt.Logger(trt.Logger.ERROR)
    builder = trt.Builder(logger)
    network = builder.create_network(1 << int(trt.NetworkDefinitionCreationFlag.STRONGLY_TYPED))
    parser = trt.OnnxParser(network, logger)
    if not parser.parse_from_file(str(source)):
        reasons = "; ".join(str(parser.get_error(index)) for index in range(min(parser.num_errors, 3)))
        raise ExportError(f"TensorRT cannot read the graph: {reasons}")
    config = builder.create_builder_config()  # the flag REFIT stays off
    config.clear_flag(trt.BuilderFlag.TF32)
    for shapes in profiles:
        profile = builder.create_optimization_profile()
        for name, shape in shapes.items():
            profile.set_shape(name, shape, shape, shape)
        if config.add_optimization_profile(profile) < 0:
            raise ExportError(f"TensorRT refuses an optimisation profile for the shapes {shapes}")
    engine = builder.build_serialized_network(network, config)
    if engine is None:
        raise ExportError("TensorRT cannot build an engine of the graph: its log says why")
    out.write_bytes(engine)


def compile_program(variant: Variant, weights: Weights, device: torch.device) -> bytes:
    """Build the engine of a variant with Torch-TensorRT, on `device`.

    Its inputs are `input_name(0)`, ... in the graph's order, its outputs `output_name(0)`, ...

    Raises:
        ExportError: Torch-TensorRT refuses the graph, or names its inputs and outputs otherwise.
    """
    from torch.export.passes import move_to_device_pass

    torch_tensorrt = _torch_tensorrt()
    exported = move_to_device_pass(numbered(variant, weights), device)
    inputs = tuple(tensor.to(device) for tensor in exported.example_inputs[0])
    try:
        engine = torch_tensorrt.dynamo.convert_exported_program_to_serialized_trt_engine(
            exported,
            arg_inputs=inputs,
            device=device,
            require_full_compilation=True,
            min_block_size=1,
            immutable_weights=True,  # no refit
            disable_tf32=True,
            use_explicit_typing=True,  # strongly typed: the default of new versions, and not of old ones
            attn_bias_is_causal=False,  # the default takes every mask for a causal one
        )
    except Exception as error:  # its converters raise what they like
        raise ExportError(f"Torch-TensorRT cannot compile the graph: {str(error).strip().splitlines()[0]}") from error
    _check_names(bytes(engine), len(inputs), len(exported.graph_signature.user_outputs))
    return bytes(engine)


def numbered(variant: Variant, weights: Weights) -> torch.export.ExportedProgram:
    """A variant as an exported program whose inputs are named by number, as engines made of it name theirs."""
    gm = with_weights(variant, weights)
    inputs = [node for node in gm.graph.nodes if node.op == "placeholder"]
    for number, node in enumerate(inputs):
        node.target = node.name = input_name(number)
    gm.recompile()
    with warnings.catch_warnings(), torch.no_grad():
        warnings.filterwarnings("ignore", message=".*LeafSpec", category=FutureWarning)
        return torch.export.export(gm, tuple(map(example, inputs)), strict=False)


def input_name(number: int) -> str:
    """The name that Torch-TensorRT's engines have for an input."""
    return f"input{number}"


def output_name(number: int) -> str:
    """The name that Torch-TensorRT's engines have for an output."""
    return f"output{number}"


def _check_names(engine: bytes, inputs: int, outputs: int) -> None:
    """Raise where an engine does not have the inputs and outputs that it should."""
    trt = require_tensorrt("tensorrt")
    loaded = trt.Runtime(trt.Logger(trt.Logger.ERROR)).deserialize_cuda_engine(engine)
    found = {loaded.get_tensor_name(index) for index in range(loaded.num_io_tensors)}
    results = set(map(output_name, range(outputs)))
    if not results <= found <= results | set(map(input_name, range(inputs))):
        raise ExportError(f"Torch-TensorRT made an engine with other tensors ({sorted(found)}): use tensorrt-onnx")


def _torch_tensorrt() -> Any:
    try:
        import torch_tensorrt
    except ImportError as error:
        raise ExportError(f"target='tensorrt' needs the package {error.name}: pip install 'tcc[gpu]'") from error
    return torch_tensorrt
