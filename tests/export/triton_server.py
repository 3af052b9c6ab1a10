"""A stand-in for Triton Inference Server: what its documents and its ONNX Runtime backend ask of a model.

It reads `config.pbtxt` by the schema, refuses what the backend refuses, and carries implicit state from one request
of a sequence to the next. Sources: `model_config.proto`, `implicit_state_management.md`, and the backend's checks of
inputs, outputs and controls (`onnxruntime.cc`).
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import torch
from google.protobuf import descriptor_pb2, descriptor_pool, message_factory, text_format

__all__ = ["Server", "parse"]

#: The part of `model_config.proto` that tcc writes: messages with their fields as name, number, kind; * is repeated.
_SCHEMA = """
ModelConfig: name 1 string; backend 17 string; max_batch_size 4 int32; input 5 *ModelInput; output 6 *ModelOutput;
    sequence_batching 13 SequenceBatching
ModelInput: name 1 string; data_type 2 DataType; dims 4 *int64
ModelOutput: name 1 string; data_type 2 DataType; dims 3 *int64
SequenceBatching: max_sequence_idle_microseconds 1 uint64; control_input 2 *ControlInput; oldest 4 Oldest;
    state 5 *State
Oldest: max_candidate_sequences 1 int32
ControlInput: name 1 string; control 2 *Control
Control: kind 1 Kind; int32_false_true 2 *int32
State: input_name 1 string; output_name 2 string; data_type 3 DataType; dims 4 *int64; initial_state 5 *InitialState
InitialState: data_type 1 DataType; dims 2 *int64; zero_data 3 bool; name 5 string
"""
_ENUMS = {
    "DataType": ("INVALID", "BOOL", "UINT8", "UINT16", "UINT32", "UINT64", "INT8", "INT16", "INT32", "INT64", "FP16",
                 "FP32", "FP64"),
    "Kind": ("CONTROL_SEQUENCE_START", "CONTROL_SEQUENCE_READY", "CONTROL_SEQUENCE_END", "CONTROL_SEQUENCE_CORRID"),
}  # fmt: skip
#: Numbers of data types in the configuration, and what ONNX Runtime and NumPy call them; bfloat16 is not among them.
_TYPES = {
    1: ("bool", np.bool_), 2: ("uint8", np.uint8), 6: ("int8", np.int8), 7: ("int16", np.int16), 8: ("int32", np.int32),
    9: ("int64", np.int64), 10: ("float16", np.float16), 11: ("float", np.float32), 12: ("double", np.float64),
}  # fmt: skip


def _schema() -> Any:
    file = descriptor_pb2.FileDescriptorProto(name="tcc_test_model_config.proto", package="tcc_test", syntax="proto3")
    for name, values in _ENUMS.items():
        enum = file.enum_type.add(name=name)
        for number, value in enumerate(values):
            enum.value.add(name=f"TYPE_{value}" if name == "DataType" else value, number=number)
    kinds = descriptor_pb2.FieldDescriptorProto
    for line in _SCHEMA.replace("\n    ", " ").strip().splitlines():
        name, _, fields = line.partition(": ")
        message = file.message_type.add(name=name)
        for field in fields.split("; "):
            label, number, kind = field.split()
            new = message.field.add(name=label, number=int(number))
            new.label = kinds.LABEL_REPEATED if kind.startswith("*") else kinds.LABEL_OPTIONAL
            kind = kind.removeprefix("*")
            new.type = getattr(kinds, f"TYPE_{kind.upper()}", kinds.TYPE_MESSAGE)
            if new.type == kinds.TYPE_MESSAGE:
                new.type = kinds.TYPE_ENUM if kind in _ENUMS else kinds.TYPE_MESSAGE
                new.type_name = f".tcc_test.{kind}"
    pool = descriptor_pool.DescriptorPool()
    pool.Add(file)
    return message_factory.GetMessageClass(pool.FindMessageTypeByName("tcc_test.ModelConfig"))


def parse(path: Path) -> Any:
    """The configuration in a file; raises where a field is not in the schema, or has another type."""
    return text_format.Parse(path.read_text(), _schema()())


class Server:
    """One model of a repository, as an instance on the CPU; a request is a call of `infer`."""

    def __init__(self, folder: Path) -> None:
        self.config = parse(folder / "config.pbtxt")
        assert self.config.backend == "onnxruntime"
        (version,) = [path for path in folder.iterdir() if path.is_dir()]
        assert int(version.name) > 0
        options = onnxruntime.SessionOptions()
        options.log_severity_level, options.intra_op_num_threads = 3, 1
        self.session = onnxruntime.InferenceSession(version / "model.onnx", options, providers=["CPUExecutionProvider"])
        self.batching = self.config.sequence_batching
        self._check()
        self.states: dict[int, dict[str, Any]] = {}

    def _check(self) -> None:
        """What the backend refuses to load: other inputs, types or shapes than the graph's."""
        inputs = {value.name: value for value in self.session.get_inputs()}
        outputs = {value.name: value for value in self.session.get_outputs()}
        (control,) = self.batching.control_input
        assert (tuple(inputs[control.name].shape), inputs[control.name].type) == ((1,), "tensor(int32)")
        states = self.batching.state
        assert len(inputs) == len(self.config.input) + len(states) + 1  # all of them, and no other
        for spec in self.config.input:
            self._same(spec, inputs[spec.name])
        for spec in self.config.output:
            self._same(spec, outputs[spec.name])
        for state in states:
            self._same(state, inputs[state.input_name])
            self._same(state, outputs[state.output_name])
            (initial,) = state.initial_state
            assert (initial.data_type, list(initial.dims)) == (state.data_type, list(state.dims))
            assert initial.name
        # the server pairs the k-th input name with the k-th output name, both sorted
        pairs = zip(sorted(s.input_name for s in states), sorted(s.output_name for s in states), strict=True)
        assert set(pairs) == {(s.input_name, s.output_name) for s in states}
        assert self.batching.oldest.max_candidate_sequences > 1

    @staticmethod
    def _same(spec: Any, value: Any) -> None:
        assert value.type == f"tensor({_TYPES[spec.data_type][0]})"
        assert list(spec.dims) == (list(value.shape) or [1])

    def infer(self, tensors: list[torch.Tensor], *, sequence_id: int, start: bool, end: bool) -> list[torch.Tensor]:
        """Answer one request of a sequence.

        A request for a sequence that has not started is an error, and the end of one frees its state.
        """
        if start:
            states = self.batching.state
            self.states[sequence_id] = {s.input_name: np.zeros(s.dims, _TYPES[s.data_type][1]) for s in states}
        feeds = dict(zip((spec.name for spec in self.config.input), (t.numpy() for t in tensors), strict=True))
        control = self.batching.control_input[0]
        feeds[control.name] = np.array([control.control[0].int32_false_true[start]], np.int32)
        names = [spec.name for spec in self.config.output] + [state.output_name for state in self.batching.state]
        found = dict(zip(names, self.session.run(names, feeds | self.states[sequence_id]), strict=True))
        self.states[sequence_id] = {state.input_name: found[state.output_name] for state in self.batching.state}
        if end:
            del self.states[sequence_id]
        return [torch.from_numpy(found[spec.name]) for spec in self.config.output]
