"""Stand-ins for the modules `tensorrt` and `torch_tensorrt`, where they cannot be installed.

They have the part of the documented API that tcc calls, on the CPU: an "engine" is an ONNX model, run by ONNX Runtime
on the addresses that it was given. They tell whether tcc calls in the right order, with the right settings, and binds
every tensor where it belongs. They tell nothing about TensorRT.
"""

from __future__ import annotations

import importlib.machinery
import json
import types
import warnings
from typing import Any

import onnx
import onnxruntime
import torch

__all__ = ["CALLS", "Event", "Stream", "modules"]

#: What was called, with what.
CALLS: list[tuple[Any, ...]] = []
MAGIC = b"stand-in engine"
NAMES = {
    onnx.TensorProto.FLOAT: "FLOAT", onnx.TensorProto.FLOAT16: "HALF", onnx.TensorProto.INT64: "INT64",
    onnx.TensorProto.BFLOAT16: "BF16", onnx.TensorProto.BOOL: "BOOL",
}  # fmt: skip


class Logger:
    ERROR = 1

    def __init__(self, severity: int) -> None:
        CALLS.append(("Logger", severity))


class Network:
    model: onnx.ModelProto


class Profile:
    def __init__(self) -> None:
        self.shapes: dict[str, tuple[int, ...]] = {}

    def set_shape(self, name: str, least: tuple[int, ...], best: tuple[int, ...], most: tuple[int, ...]) -> None:
        assert least == best == most
        self.shapes[name] = best


class Config:
    def __init__(self) -> None:
        self.flags = {"TF32"}
        self.profiles: list[Profile] = []

    def add_optimization_profile(self, profile: Profile) -> int:
        self.profiles.append(profile)
        return len(self.profiles) - 1

    def clear_flag(self, flag: str) -> None:
        self.flags.discard(flag)

    def set_flag(self, flag: str) -> None:
        self.flags.add(flag)


class Builder:
    def __init__(self, logger: Logger) -> None:
        self.network = Network()

    def create_network(self, flags: int) -> Network:
        CALLS.append(("create_network", flags))
        return self.network

    def create_builder_config(self) -> Config:
        return Config()

    def create_optimization_profile(self) -> Profile:
        return Profile()

    def build_serialized_network(self, network: Network, config: Config) -> memoryview | None:
        CALLS.append(("build", frozenset(config.flags)))
        if "refuse" in network.model.doc_string:
            return None
        profiles = json.dumps([profile.shapes for profile in config.profiles])
        network.model.metadata_props.add(key="profiles", value=profiles)
        return memoryview(MAGIC + network.model.SerializeToString())


class OnnxParser:
    num_errors = 5

    def __init__(self, network: Network, logger: Logger) -> None:
        self.network = network

    def parse_from_file(self, path: str) -> bool:
        try:
            self.network.model = onnx.load(path)
        except Exception:
            return False
        return True

    def get_error(self, index: int) -> str:
        return f"error {index}"


class Context:
    def __init__(self, engine: Engine) -> None:
        self.engine, self.addresses, self.memory = engine, dict[str, int](), (0, 0)
        self.profile, self.shapes = 0, dict[str, tuple[int, ...]]()

    def set_optimization_profile_async(self, profile: int, stream: int) -> bool:
        self.profile = profile
        CALLS.append(("profile", profile))
        return True

    def set_input_shape(self, name: str, shape: tuple[int, ...]) -> bool:
        self.shapes[name] = shape
        return self.engine.profiles[0][self.profile].get(name) == list(shape)

    def set_device_memory(self, memory: int, size: int) -> None:
        self.memory = (memory, size)
        CALLS.append(("memory", memory, size))

    def set_tensor_address(self, name: str, address: int) -> bool:
        self.addresses[name] = address
        return name in self.engine.tensors

    def execute_async_v3(self, stream: int) -> bool:
        assert self.memory[1] >= self.engine.device_memory_size_v2
        binding = self.engine.session.io_binding()
        for name, (mode, shape, kind) in self.engine.tensors.items():
            bind = binding.bind_input if mode == "INPUT" else binding.bind_output
            bind(name, "cpu", 0, kind, self.shapes.get(name, shape), self.addresses[name])
        self.engine.session.run_with_iobinding(binding)
        CALLS.append(("execute", stream))
        return True


class Engine:
    def __init__(self, content: bytes) -> None:
        proto = onnx.load_from_string(content)
        options = onnxruntime.SessionOptions()
        options.log_severity_level = 3
        self.session = onnxruntime.InferenceSession(content, options, providers=["CPUExecutionProvider"])
        self.profiles = [json.loads(entry.value) for entry in proto.metadata_props if entry.key == "profiles"]
        self.num_optimization_profiles = max(len(self.profiles[0]), 1) if self.profiles else 1
        self.device_memory_size_v2 = 1000 * len(proto.graph.node)
        self.tensors: dict[str, tuple[str, tuple[int, ...], int]] = {}
        for mode, values in (("INPUT", proto.graph.input), ("OUTPUT", proto.graph.output)):
            for value in values:
                kind = value.type.tensor_type
                self.tensors[value.name] = (mode, tuple(dim.dim_value or -1 for dim in kind.shape.dim), kind.elem_type)

    @property
    def num_io_tensors(self) -> int:
        return len(self.tensors)

    def get_tensor_name(self, index: int) -> str:
        return list(self.tensors)[index]

    def get_tensor_mode(self, name: str) -> str:
        return self.tensors[name][0]

    def get_tensor_shape(self, name: str) -> tuple[int, ...]:
        return self.tensors[name][1]

    def get_tensor_dtype(self, name: str) -> str:
        return NAMES[self.tensors[name][2]]

    def create_execution_context(self, strategy: str) -> Context:
        CALLS.append(("context", strategy))
        return Context(self)


class Runtime:
    def __init__(self, logger: Logger) -> None: ...

    def deserialize_cuda_engine(self, content: bytes) -> Engine | None:
        return Engine(content[len(MAGIC) :]) if content.startswith(MAGIC) else None


class Stream:
    """For `torch.cuda.Stream`: says what waits for what."""

    cuda_stream = 7

    def synchronize(self) -> None: ...

    def wait_event(self, event: Event) -> None:
        CALLS.append(("wait", id(event)))


class Event:
    """For `torch.cuda.Event`."""

    def record(self, stream: Stream) -> None:
        CALLS.append(("record", id(self)))


def convert(exported: torch.export.ExportedProgram, **settings: Any) -> bytes:
    """For `torch_tensorrt.dynamo.convert_exported_program_to_serialized_trt_engine`."""
    CALLS.append(("convert", settings))
    names = exported.graph_signature.user_inputs
    outputs = [f"output{number}" for number in range(len(exported.graph_signature.user_outputs))]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        program = torch.onnx.export(
            exported, input_names=list(names), output_names=outputs, dynamo=True, verbose=False, opset_version=22
        )
    assert program is not None
    return MAGIC + program.model_proto.SerializeToString()


def modules() -> dict[str, types.ModuleType]:
    """The two modules by name."""
    tensorrt, torch_tensorrt = types.ModuleType("tensorrt"), types.ModuleType("torch_tensorrt")
    for module in (tensorrt, torch_tensorrt):
        module.__spec__ = importlib.machinery.ModuleSpec(module.__name__, None)  # torch looks for it
    enum = types.SimpleNamespace
    vars(tensorrt).update(
        __version__="11.0.0.stand.in", Logger=Logger, Builder=Builder, OnnxParser=OnnxParser, Runtime=Runtime,
        NetworkDefinitionCreationFlag=enum(STRONGLY_TYPED=1), BuilderFlag=enum(TF32="TF32", REFIT="REFIT"),
        TensorIOMode=enum(INPUT="INPUT", OUTPUT="OUTPUT"), DataType=enum(**{name: name for name in NAMES.values()}),
        ExecutionContextAllocationStrategy=enum(USER_MANAGED="USER_MANAGED"),
    )  # fmt: skip
    vars(torch_tensorrt).update(dynamo=enum(convert_exported_program_to_serialized_trt_engine=convert))
    return {"tensorrt": tensorrt, "torch_tensorrt": torch_tensorrt}
