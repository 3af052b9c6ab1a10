"""All graphs of an ONNX bundle as one that finds out by itself which step it is at.

For servers that keep the state of a sequence of requests, but run one model for all of them. The graph counts steps in
a slot of its own, picks the step's variant by `If`, and looks token sets and coefficients up in tables.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, TypeVar

import torch
from safetensors.torch import load_file

from tcc.errors import ExportError
from tcc.export.manifest import COUNTER, TENSORS, Graph, Manifest, TensorSpec, next_of
from tcc.export.onnx_operators import OPSET

__all__ = ["START", "one_graph", "wire"]

Spec = TypeVar("Spec", bound=TensorSpec)
#: The input that says that a run begins.
START = "START"


def wire(spec: Spec) -> Spec:
    """A tensor as it enters and leaves the graph: servers have no bfloat16, and float32 holds all its values."""
    return replace(spec, dtype="float32") if spec.dtype == "bfloat16" else spec


def one_graph(folder: Path, manifest: Manifest) -> Any:
    """The graphs of the bundle in `folder` as one, an `onnx.ModelProto`.

    Its inputs are the model's, `START` (int32 `[1]`, 1 at the first step), `COUNTER` (int64 `[1]`) and the slots; its
    outputs the model's and `next:<slot>` of the counter and of every slot. Weights stay offsets into the weights' file.

    Raises:
        ExportError: the ONNX packages are missing.
    """
    try:
        import onnx
    except ImportError as error:
        raise ExportError(f"ONNX export needs the package {error.name}: pip install 'tcc[onnx]'") from error
    protos = [onnx.load(folder / graph.file, load_external_data=False) for graph in manifest.graphs]
    maker = _Maker(onnx, manifest, load_file(folder / TENSORS), [proto.graph for proto in protos])
    model = onnx.helper.make_model(
        maker.graph(), opset_imports=[onnx.helper.make_opsetid("", OPSET)], ir_version=protos[0].ir_version
    )
    return onnx.shape_inference.infer_shapes(model)  # a loader wants the shapes of all values


@dataclass(frozen=True)
class _Maker:
    """Makes the graph.

    Values have one name each in the whole graph, because a branch sees all names around it: those of variant 3 begin
    with `3/`, and what a branch returns ends with the variants that it stands for, as in `output@2-4`.
    """

    onnx: Any
    manifest: Manifest
    tensors: Mapping[str, torch.Tensor]
    variants: Sequence[Any]

    def graph(self) -> Any:
        """The graph."""
        inputs = (*self.manifest.inputs, *self.manifest.slots)
        results = (*self.manifest.outputs, *map(_next, self.manifest.slots))
        weights = {w.name: w for graph in self.variants for w in graph.initializer if w.external_data}
        nodes, constants = self._counted()
        nodes += [self._cast(spec.name, _inner(spec), spec) for spec in inputs if _inner(spec) != spec.name]
        chosen, more = self._choose(0, len(self.variants), {spec.name: _inner(spec) for spec in results})
        nodes += [*chosen, *(self._cast(_inner(s), s.name, wire(s)) for s in results if _inner(s) != s.name)]
        counter, started = TensorSpec(COUNTER, (1,), "int64"), TensorSpec(START, (1,), "int32")
        takes = (*self.manifest.inputs, started, counter, *self.manifest.slots)
        gives = (*self.manifest.outputs, *map(_next, (counter, *self.manifest.slots)))
        return self.onnx.helper.make_graph(
            nodes,
            "steps",
            [self._typed(wire(spec)) for spec in takes],
            [self._typed(wire(spec)) for spec in gives],
            [*weights.values(), *constants, *more],
        )

    def _counted(self) -> tuple[list[Any], list[Any]]:
        """The step and its variant as scalars, and the next step: after the last one the first."""
        steps = self.manifest.steps
        node = self.onnx.helper.make_node
        constants = {
            "tcc/zero": torch.zeros(1, dtype=torch.int64),
            "tcc/one": torch.ones(1, dtype=torch.int64),
            "tcc/steps": torch.tensor([len(steps)]),
            "tcc/variants": torch.tensor([step.graph for step in steps]),
        }
        nodes = [
            node("Cast", [START], ["tcc/starts"], to=self.onnx.TensorProto.BOOL),
            node("Where", ["tcc/starts", "tcc/zero", COUNTER], ["tcc/step"]),
            node("Add", ["tcc/step", "tcc/one"], ["tcc/after"]),
            node("Mod", ["tcc/after", "tcc/steps"], [next_of(COUNTER)]),
            node("Squeeze", ["tcc/step", "tcc/zero"], ["tcc/index"]),
            node("Gather", ["tcc/variants", "tcc/index"], ["tcc/variant"]),
        ]
        return nodes, [self._constant(name, tensor) for name, tensor in constants.items()]

    def _choose(self, first: int, last: int, names: Mapping[str, str]) -> tuple[list[Any], list[Any]]:
        """Nodes and constants that run the step's variant, one of `first` to `last - 1`, and give its results `names`.

        A tree of comparisons: its depth is the logarithm of the number of variants.
        """
        if last == first + 1:
            return self._variant(first, names)
        middle, node = (first + last) // 2, self.onnx.helper.make_node
        limit, is_lower = f"limit@{first}-{last}", f"lower@{first}-{last}"
        branches = {"then_branch": self._branch(first, middle, names), "else_branch": self._branch(middle, last, names)}
        nodes = [
            node("Less", ["tcc/variant", limit], [is_lower]),
            node("If", [is_lower], list(names.values()), **branches),
        ]
        return nodes, [self._constant(limit, torch.tensor(middle))]

    def _branch(self, first: int, last: int, names: Mapping[str, str]) -> Any:
        results = (*self.manifest.outputs, *map(_next, self.manifest.slots))
        own = {name: f"{name}@{first}-{last}" for name in names}
        nodes, constants = self._choose(first, last, own)
        outputs = [self._typed(TensorSpec(own[spec.name], spec.shape, spec.dtype)) for spec in results]
        return self.onnx.helper.make_graph(nodes, f"variants {first} to {last - 1}", [], outputs, constants)

    def _variant(self, number: int, names: Mapping[str, str]) -> tuple[list[Any], list[Any]]:
        """The nodes and constants of one variant; slots that it does not store keep their values."""
        graph, described = self.variants[number], self.manifest.graphs[number]
        made = {name for node in graph.node for name in node.output}
        new = {spec.name: _inner(spec) for spec in (*self.manifest.inputs, *self.manifest.slots)}
        new |= {w.name: w.name for w in graph.initializer if w.external_data} | {"": ""}
        new |= {name: names[name] for name in names if name in made}
        nodes, constants = self._step_tensors(number, described)
        for tensor in graph.initializer:
            if not tensor.external_data:
                constants.append(self.onnx.TensorProto.FromString(tensor.SerializeToString()))
                constants[-1].name = f"{number}/{tensor.name}"
        for old in graph.node:
            node = self.onnx.NodeProto.FromString(old.SerializeToString())
            node.name = f"{number}/{old.name}"
            node.input[:] = [new.get(name, f"{number}/{name}") for name in old.input]
            node.output[:] = [new.get(name, f"{number}/{name}") for name in old.output]
            nodes.append(node)
        returned = {value.name for value in graph.output}
        kept = {next_of(slot.name): _inner(slot) for slot in self.manifest.slots}
        for name in names.keys() - made:  # a branch must make what it returns: a value from around it is passed on
            source = new.get(name, f"{number}/{name}") if name in returned else kept[name]
            nodes.append(self.onnx.helper.make_node("Identity", [source], [names[name]]))
        return nodes, constants

    def _step_tensors(self, number: int, graph: Graph) -> tuple[list[Any], list[Any]]:
        """What the steps of a variant give it: a constant if it is the same at all of them, else a row of a table."""
        steps = [(i, step) for i, step in enumerate(self.manifest.steps) if step.graph == number]
        nodes, constants = [], []
        for name in graph.inputs:
            if name not in steps[0][1].tensors:
                continue
            keys = list(dict.fromkeys(step.tensors[name] for _, step in steps))
            value = f"{number}/{name}"
            if len(keys) == 1:
                constants.append(self._constant(value, self.tensors[keys[0]]))
                continue
            rows = torch.zeros(len(self.manifest.steps), dtype=torch.int64)
            for i, step in steps:
                rows[i] = keys.index(step.tensors[name])
            constants.append(self._constant(f"{value} rows", rows))
            constants.append(self._constant(f"{value} table", torch.stack([self.tensors[key] for key in keys])))
            nodes.append(self.onnx.helper.make_node("Gather", [f"{value} rows", "tcc/index"], [f"{value} row"]))
            nodes.append(self.onnx.helper.make_node("Gather", [f"{value} table", f"{value} row"], [value]))
        return nodes, constants

    def _typed(self, spec: TensorSpec) -> Any:
        return self.onnx.helper.make_tensor_value_info(spec.name, self._number(spec), spec.shape)

    def _cast(self, source: str, name: str, to: TensorSpec) -> Any:
        return self.onnx.helper.make_node("Cast", [source], [name], to=self._number(to))

    def _constant(self, name: str, tensor: torch.Tensor) -> Any:
        return self.onnx.numpy_helper.from_array(tensor.numpy(), name)

    def _number(self, spec: TensorSpec) -> int:
        """ONNX's number for a dtype."""
        names = {"float32": "FLOAT", "float64": "DOUBLE"}
        return int(getattr(self.onnx.TensorProto, names.get(spec.dtype, spec.dtype.upper())))


def _inner(spec: TensorSpec) -> str:
    """The name inside the graph of a tensor that has another dtype outside."""
    return spec.name if wire(spec) == spec else f"{spec.name}:{spec.dtype}"


def _next(slot: TensorSpec) -> TensorSpec:
    return TensorSpec(next_of(slot.name), slot.shape, slot.dtype)
