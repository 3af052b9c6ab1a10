"""Graphs that differ only in how many tokens they keep, as one graph with those dimensions left open.

TensorRT makes one engine of it, with one copy of the weights and an optimisation profile for each count. Such graphs
have the same nodes and weights; what differs is the shape of some inputs, and one number in the targets of some
reshapes. That number becomes -1: a reshape keeps the volume, so it can be nothing else.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

__all__ = ["Merged", "merge"]


@dataclass(frozen=True)
class Merged:
    """Some graphs as one.

    Attributes:
        numbers: which of the graphs.
        model: an `onnx.ModelProto`.
        shapes: what each graph gives the inputs whose shape is open; none where there is one graph.
    """

    numbers: tuple[int, ...]
    model: Any
    shapes: tuple[dict[str, tuple[int, ...]], ...]


def merge(models: Sequence[Any]) -> list[Merged]:
    """Every graph (`onnx.ModelProto`, without the data of its weights) once, together with those like it."""
    like: dict[bytes, list[int]] = {}
    for number, model in enumerate(models):
        like.setdefault(_skeleton(model), []).append(number)
    made = []
    for numbers in like.values():
        merged = _merged([models[number] for number in numbers]) if len(numbers) > 1 else None
        if merged is not None:
            shapes = tuple({name: _shape(models[n].graph.input, name) for name in merged[1]} for n in numbers)
            made.append(Merged(tuple(numbers), merged[0], shapes))
        else:
            made += [Merged((number,), models[number], ()) for number in numbers]
    return made


def _merged(models: list[Any]) -> tuple[Any, list[str]] | None:
    """The graphs as one, and its open inputs; None where a reshape differs in more than one number."""
    first = _copy(models[0])
    for tensor in first.graph.initializer:
        if tensor.name not in _targets(first):
            continue
        target = _open([_target(model, tensor.name) for model in models])
        if target is None:
            return None
        tensor.CopyFrom(_tensor(target, tensor.name))
    inputs = []
    for value in first.graph.input:
        shapes = {_shape(model.graph.input, value.name) for model in models}
        for place, dim in enumerate(value.type.tensor_type.shape.dim):
            if len({shape[place] for shape in shapes}) > 1:
                dim.dim_param = f"{value.name}.{place}"
        if len(shapes) > 1:
            inputs.append(value.name)
    del first.graph.value_info[:]
    return first, inputs


def _open(targets: list[list[int]]) -> list[int] | None:
    """The target of a reshape, with -1 where graphs differ; None where they differ in more than one number."""
    places = [place for place, sizes in enumerate(zip(*targets, strict=True)) if len(set(sizes)) > 1]
    if len(places) > 1 or (places and -1 in targets[0]):
        return None
    return [-1 if place in places else size for place, size in enumerate(targets[0])]


def _target(model: Any, name: str) -> list[int]:
    """The target of the reshapes that read the constant `name`; a -1 in it replaced by what it stands for, if known."""
    import onnx

    sizes = [int(size) for size in onnx.numpy_helper.to_array(_named(model.graph.initializer, name))]
    outputs = [node.output[0] for node in model.graph.node if node.op_type == "Reshape" and node.input[1] == name]
    known = {_shape(values, output) for output in outputs for values in (model.graph.value_info, model.graph.output)}
    known.discard(())
    if -1 in sizes and len(known) == 1:
        return list(known.pop())
    return sizes


def _skeleton(model: Any) -> bytes:
    """What graphs must have in common: all but the shapes of inputs, and the numbers in the targets of reshapes."""
    copy = _copy(model)
    targets = _targets(copy)
    for tensor in copy.graph.initializer:
        if tensor.name in targets:
            tensor.raw_data = b""
            del tensor.int64_data[:]
    for value in copy.graph.input:
        for dim in value.type.tensor_type.shape.dim:
            dim.Clear()
    del copy.graph.value_info[:]
    content: bytes = copy.SerializeToString(deterministic=True)
    return content


def _targets(model: Any) -> set[str]:
    """The constants that are targets of reshapes, and nothing else."""
    import onnx

    read = [(name, node.op_type, place) for node in model.graph.node for place, name in enumerate(node.input)]
    others = {name for name, kind, place in read if (kind, place) != ("Reshape", 1)}
    kinds = {tensor.name for tensor in model.graph.initializer if tensor.data_type == onnx.TensorProto.INT64}
    return ({name for name, _, _ in read} & kinds) - others


def _shape(values: Any, name: str) -> tuple[int, ...]:
    """The shape of a value; () where it is not known whole."""
    found = [value for value in values if value.name == name]
    dims = found[0].type.tensor_type.shape.dim if found else ()
    return tuple(dim.dim_value for dim in dims) if all(dim.HasField("dim_value") for dim in dims) else ()


def _named(tensors: Any, name: str) -> Any:
    return next(tensor for tensor in tensors if tensor.name == name)


def _tensor(sizes: list[int], name: str) -> Any:
    import onnx

    return onnx.helper.make_tensor(name, onnx.TensorProto.INT64, [len(sizes)], sizes)


def _copy(model: Any) -> Any:
    copy = type(model)()
    copy.CopyFrom(model)
    return copy
