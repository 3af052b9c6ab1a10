"""An ONNX bundle as a model in the repository of a Triton Inference Server.

Triton keeps the slots: they are the implicit state of a sequence of requests, one sequence per image. Implicit state
belongs to one model, so the graphs of all variants become one (`one_graph.py`). The version folder `1/` is a bundle of
one graph, so that everything that reads bundles reads it.

Sources: `docs/user_guide/implicit_state_management.md` and `protobuf/model_config.proto` of Triton Inference Server.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from tcc.export import manifest as manifests
from tcc.export.manifest import (
    COUNTER,
    MANIFEST,
    PLAN,
    TENSORS,
    WEIGHTS,
    FileEntry,
    Graph,
    Manifest,
    Step,
    TensorSpec,
    next_of,
)
from tcc.export.one_graph import START, one_graph, wire
from tcc.export.onnx_operators import largest_value
from tcc.export.stamp import stamp
from tcc.tensors_file import save_tensors

__all__ = ["CONFIG", "MODEL", "VERSION", "config", "lay_out"]

#: The names that Triton looks for: the configuration, the first version's folder, the graph in it.
CONFIG, VERSION, MODEL = "config.pbtxt", "1", "model.onnx"
#: A sequence that sends nothing for so long is dropped; Triton's own 1 s is less than a slow sampler takes for a step.
_IDLE_MICROSECONDS = 60_000_000
#: How many images a model instance works at by turns; the slots of each are in memory.
_SEQUENCES = 8
_TYPES = {"float64": "FP64", "float32": "FP32", "float16": "FP16"}


def lay_out(folder: Path, old: Manifest) -> Manifest:
    """Turn the ONNX bundle in `folder` into a Triton model: `config.pbtxt`, and the bundle, now of one graph, in `1/`.

    Returns:
        The manifest of the bundle in `1/`.
    """
    proto = one_graph(folder, old)
    version = folder / VERSION
    version.mkdir()
    for name in (PLAN, WEIGHTS):
        (folder / name).rename(version / name)
    for name in (MANIFEST, TENSORS, *(graph.file for graph in old.graphs)):
        (folder / name).unlink()
    (version / MODEL).write_bytes(proto.SerializeToString())
    starts = {name: torch.tensor([number], dtype=torch.int32) for name, number in (("start.0", 1), ("start.1", 0))}
    save_tensors(starts, version / TENSORS)
    files = {name: old.files[name] for name in (PLAN, WEIGHTS)} | {TENSORS: manifests.file_entry(version / TENSORS)}
    operators, largest = (
        sum(len(graph.node) for graph in _graphs(proto.graph)),
        largest_value(version / MODEL, chooses=True),
    )
    new = stamp(version, _bundle(old, files, operators, largest))
    manifests.write(new, version)
    (folder / CONFIG).write_text(config(new))
    return new


def config(manifest: Manifest) -> str:
    """The text of `config.pbtxt`: full shapes, sequences of requests with the slots as their state."""
    states = "".join(_state(slot) for slot in manifest.slots)
    control = f'{{ name: "{START}" control {{ kind: CONTROL_SEQUENCE_START int32_false_true: [ 0, 1 ] }} }}'
    return (
        'backend: "onnxruntime"\n'
        "max_batch_size: 0\n"
        + "".join(f"input {{ {_tensor(spec)} }}\n" for spec in manifest.inputs)
        + "".join(f"output {{ {_tensor(spec)} }}\n" for spec in manifest.outputs)
        + "sequence_batching {\n"
        f"  max_sequence_idle_microseconds: {_IDLE_MICROSECONDS}\n"
        f"  oldest {{ max_candidate_sequences: {_SEQUENCES} }}\n"
        f"  control_input {control}\n"
        f"{states}}}\n"
    )


def _state(slot: TensorSpec) -> str:
    """A slot as state. Triton pairs inputs and outputs in the order of their names: only `slot:` and `next:` differ."""
    kind = _kind(slot)
    return (
        f'  state {{\n    input_name: "{slot.name}" output_name: "{next_of(slot.name)}" {kind}\n'
        f'    initial_state {{ name: "zeros" {kind} zero_data: true }}\n  }}\n'
    )


def _tensor(spec: TensorSpec) -> str:
    return f'name: "{spec.name}" {_kind(spec)}'


def _kind(spec: TensorSpec) -> str:
    dims = spec.shape or (1,)  # a scalar, as Triton writes it
    return f"data_type: TYPE_{_TYPES.get(spec.dtype, spec.dtype.upper())} dims: [ {', '.join(map(str, dims))} ]"


def _bundle(old: Manifest, files: dict[str, FileEntry], operators: int, largest: int) -> Manifest:
    """The manifest of the bundle of one graph; its MACs are those of a step in the mean."""
    counter = TensorSpec(COUNTER, (1,), "int64", "kept from step to step: the number of the next step")
    slots = tuple(wire(slot) for slot in (counter, *old.slots))
    inputs = tuple(map(wire, old.inputs))
    names = tuple(spec.name for spec in (*inputs, TensorSpec(START, (1,), "int32"), *slots))
    weights = tuple(dict.fromkeys(name for graph in old.graphs for name in graph.weights))
    macs = sum(old.graphs[step.graph].macs for step in old.steps) // len(old.steps)
    return replace(
        old,
        inputs=inputs,
        outputs=tuple(map(wire, old.outputs)),
        slots=slots,
        tensors=tuple(
            TensorSpec(name, (1,), "int32", "1 at the first step of a run, else 0") for name in ("start.0", "start.1")
        ),
        graphs=(Graph(MODEL, "", names, tuple(slot.name for slot in slots), weights, macs, operators, largest),),
        steps=tuple(Step(0, {START: "start.1" if number else "start.0"}) for number in range(len(old.steps))),
        files=files,
    )


def _graphs(graph: Any) -> Iterator[Any]:
    """An ONNX graph and all graphs in it."""
    yield graph
    for node in graph.node:
        for attribute in node.attribute:
            if attribute.HasField("g"):
                yield from _graphs(attribute.g)
