"""What a file of ONNX holds, read without a library: running a bundle takes ONNX Runtime alone.

A file is a message of protocol buffers (https://protobuf.dev/programming-guides/encoding); the numbers of its fields
are onnx.proto3's. Fields that no export writes are refused: what is not read here nobody has looked at.
"""

from __future__ import annotations

from collections.abc import Container, Iterator
from dataclasses import dataclass, field

import torch

from tcc.export.decode import Malformed

__all__ = ["NUMBERS", "Contents", "Node", "Tensor", "read_model"]

#: ONNX's numbers for dtypes (onnx.TensorProto.DataType).
NUMBERS = {
    torch.float32: 1, torch.uint8: 2, torch.int8: 3, torch.int16: 5, torch.int32: 6, torch.int64: 7, torch.bool: 9,
    torch.float16: 10, torch.float64: 11, torch.bfloat16: 16,
}  # fmt: skip

#: ModelProto: all fields that an export writes; functions (25) and training (20) are not among them.
_MODEL, _MODEL_GRAPH, _MODEL_OPSET = (1, 2, 3, 4, 5, 6, 7, 8, 14), 7, 8
#: GraphProto, without sparse tensors (15) and quantisation (14).
_NODE, _INITIALIZER, _INPUT, _OUTPUT, _VALUE = 1, 5, 11, 12, 13
_GRAPH = (_NODE, 2, _INITIALIZER, 10, _INPUT, _OUTPUT, _VALUE, 16)
#: NodeProto and AttributeProto; an attribute is a number, text, a list of them, a tensor, or a graph.
_INPUTS, _OUTPUTS, _OPERATOR, _ATTRIBUTE, _DOMAIN, _OVERLOAD = 1, 2, 4, 5, 7, 8
_NODES = (_INPUTS, _OUTPUTS, 3, _OPERATOR, _ATTRIBUTE, 6, _DOMAIN, _OVERLOAD, 9)
_SUBGRAPH = 6
_ATTRIBUTES = (1, 2, 3, 4, 5, _SUBGRAPH, 7, 8, 9, 13, 20)
#: TensorProto.
_DIMS, _DTYPE, _NAME, _LOCATION, _EXTERNAL = 1, 2, 8, 14, 1
#: Graphs in graphs: a tree of choices among variants is as deep as the logarithm of their number.
_DEPTH = 32


@dataclass(frozen=True)
class Tensor:
    """A constant: its name, the number of its dtype, its shape, and whether its data lie in another file."""

    name: str
    number: int
    shape: tuple[int, ...]
    outside: bool


@dataclass(frozen=True)
class Node:
    """An operator, its domain, the names of what it reads and makes, and the graphs that it may run."""

    operator: str
    domain: str
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    graphs: tuple[Contents, ...]


@dataclass
class Contents:
    """A graph.

    Attributes:
        nodes: its operators.
        tensors: its constants.
        inputs: the names of its inputs.
        values: what it declares of its values by name: the number of the dtype, and the shape; None where it is open.
    """

    nodes: list[Node] = field(default_factory=list)
    tensors: list[Tensor] = field(default_factory=list)
    inputs: list[str] = field(default_factory=list)
    values: dict[str, tuple[int, tuple[int, ...] | None]] = field(default_factory=dict)


def read_model(data: bytes) -> tuple[Contents, list[tuple[str, int]]]:
    """The graph of a file, and the domains and versions of the operators that it asks for.

    Raises:
        Malformed: it is no ONNX, or has parts that no export writes.
    """
    graphs, opsets = [], []
    try:
        for number, value in _fields(memoryview(data), _MODEL, "model"):
            if number == _MODEL_GRAPH:
                graphs.append(_graph(_message(value), 0))
            elif number == _MODEL_OPSET:
                opsets.append(_opset(_message(value)))
    except UnicodeDecodeError as error:
        raise Malformed(f"a name is no text ({error})") from error
    if len(graphs) != 1:
        raise Malformed(f"{len(graphs)} graphs")
    return graphs[0], opsets


def _graph(data: memoryview, depth: int) -> Contents:
    if depth > _DEPTH:
        raise Malformed("graphs in graphs without end")
    found = Contents()
    for number, value in _fields(data, _GRAPH, "graph"):
        if number == _NODE:
            found.nodes.append(_node(_message(value), depth))
        elif number == _INITIALIZER:
            found.tensors.append(_tensor(_message(value)))
        elif number in (_INPUT, _OUTPUT, _VALUE):
            name, kind = _value(_message(value))
            if number == _INPUT:
                found.inputs.append(name)
            if found.values.setdefault(name, kind) != kind:
                raise Malformed(f"the value {name!r:.80} is declared twice")
    return found


def _node(data: memoryview, depth: int) -> Node:
    text = {_OPERATOR: "", _DOMAIN: "", _OVERLOAD: ""}
    lists: dict[int, list[str]] = {_INPUTS: [], _OUTPUTS: []}
    graphs = []
    for number, value in _fields(data, _NODES, "node"):
        if number in text:
            text[number] = _text(value)
        elif number in lists:
            lists[number].append(_text(value))
        elif number == _ATTRIBUTE:
            inner = _fields(_message(value), _ATTRIBUTES, "attribute")
            graphs += [_graph(_message(part), depth + 1) for number, part in inner if number == _SUBGRAPH]
    if text[_OVERLOAD]:
        raise Malformed(f"an operator of the kind {text[_OVERLOAD]!r:.40}")
    return Node(text[_OPERATOR], text[_DOMAIN], tuple(lists[_INPUTS]), tuple(lists[_OUTPUTS]), tuple(graphs))


def _tensor(data: memoryview) -> Tensor:
    name, kind, outside = "", 0, False
    shape: list[int] = []
    for number, value in _fields(data):
        if number == _DIMS:
            shape += [value] if isinstance(value, int) else _packed(value)
        elif number == _NAME:
            name = _text(value)
        elif number == _DTYPE and isinstance(value, int):
            kind = value
        elif number == _LOCATION:
            outside = value == _EXTERNAL
    return Tensor(name, kind, tuple(shape), outside)


def _value(data: memoryview) -> tuple[str, tuple[int, tuple[int, ...] | None]]:
    """ValueInfoProto: name (1) and type (2), of a tensor (1): the number of its dtype (1) and its shape (2)."""
    name, kind = "", 0
    shape: list[int] | None = None
    for number, value in _fields(data, (1, 2, 3, 4), "value"):
        if number == 1:
            name = _text(value)
        for _, tensor in _fields(_message(value), (1, 6), "type") if number == 2 else ():
            for what, part in _fields(_message(tensor)) if not isinstance(tensor, int) else ():
                if what == 1 and isinstance(part, int):
                    kind = part
                elif what == 2:
                    shape = [*(shape or []), *(_size(_message(dim)) for number, dim in _fields(_message(part)))]
    return name, (kind, None if shape is None or -1 in shape else tuple(shape))


def _size(data: memoryview) -> int:
    """The size of a dimension, -1 where it is open."""
    size = -1
    for number, value in _fields(data):
        size = value if number == 1 and isinstance(value, int) else -1
    return size


def _opset(data: memoryview) -> tuple[str, int]:
    domain, version = "", 0
    for number, value in _fields(data, (1, 2), "opset"):
        if number == 1:
            domain = _text(value)
        elif isinstance(value, int):
            version = value
    return domain, version


def _fields(
    data: memoryview, known: Container[int] | None = None, of: str = ""
) -> Iterator[tuple[int, int | memoryview]]:
    """The fields of a message: numbers, and the bytes of everything else.

    Raises:
        Malformed: it is none, or has a field that is not among the `known` ones.
    """
    at = 0
    while at < len(data):
        key, at = _varint(data, at)
        kind = key & 7
        if known is not None and key >> 3 not in known:
            raise Malformed(f"the {of} has the field {key >> 3}")
        if kind == 0:
            value, at = _varint(data, at)
            yield key >> 3, value
            continue
        size = {1: 8, 5: 4}.get(kind, 0)
        if kind == 2:
            size, at = _varint(data, at)
        if kind not in (1, 2, 5) or at + size > len(data):
            raise Malformed(f"a field of kind {kind} and {size} bytes")
        yield key >> 3, data[at : at + size]
        at += size


def _packed(data: memoryview) -> list[int]:
    found, at = [], 0
    while at < len(data):
        value, at = _varint(data, at)
        found.append(value)
    return found


def _varint(data: memoryview, at: int) -> tuple[int, int]:
    """A number at a place, seven bits in a byte, and the place after it."""
    value = 0
    for count, byte in enumerate(data[at : at + 10]):
        value |= (byte & 127) << (7 * count)
        if byte < 128:
            return value, at + count + 1
    raise Malformed("a number without an end")


def _message(value: int | memoryview) -> memoryview:
    if isinstance(value, int):
        raise Malformed("a number where a message is expected")
    return value


def _text(value: int | memoryview) -> str:
    return bytes(_message(value)).decode()
