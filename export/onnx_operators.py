"""What a graph of ONNX may do: a closed set of operators, on values whose sizes are declared.

ONNX is a language: a graph may loop 2**40 times, or ask for a constant of a terabyte. The graphs that tcc writes do
neither. They run each operator once, on shapes that the file declares for every value, and where a shape follows from
numbers (the target of a reshape), these are constants of the file. So whoever reads a file can tell how large its
values get, and ONNX Runtime, told to, refuses a graph whose operators make other shapes than it declares
(`session.strict_shape_type_inference`).
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from pathlib import Path

from tcc.errors import BundleError, ExportError
from tcc.export.decode import Malformed
from tcc.export.manifest import COUNTER, Graph, Manifest
from tcc.export.onnx_file import NUMBERS, Contents, Node, read_model

__all__ = ["OPERATORS", "OPSET", "check_operators", "largest_value", "open_file"]

#: The first whose operators all take bfloat16.
OPSET = 22
#: The operators that graphs may have: each runs once, and makes no more than its shapes say. TensorRT 10.15's parser
#: lists all of them (onnx-tensorrt, docs/operators.md). Loops, sequences, and what makes much of nothing
#: (ConstantOfShape, random numbers) are not among them.
OPERATORS = frozenset({
    "Abs", "Add", "And", "ArgMax", "AveragePool", "Cast", "Ceil", "Celu", "Clip", "Concat", "Conv", "ConvTranspose",
    "Cos", "CumSum", "DepthToSpace", "Div", "Einsum", "Elu", "Equal", "Erf", "Exp", "Expand", "Floor", "Gather",
    "GatherElements", "GatherND", "Gelu", "Gemm", "GlobalAveragePool", "Greater", "GreaterOrEqual",
    "GroupNormalization", "HardSigmoid", "HardSwish", "Identity", "InstanceNormalization", "IsNaN",
    "LayerNormalization", "LeakyRelu", "Less", "LessOrEqual", "Log", "LogSoftmax", "MatMul", "Max", "MaxPool", "Min",
    "Mish", "Mod", "Mul", "Neg", "Not", "Or", "PRelu", "Pad", "Pow", "Reciprocal", "ReduceL1", "ReduceL2", "ReduceMax",
    "ReduceMean", "ReduceMin", "ReduceProd", "ReduceSum", "Relu", "Reshape", "Resize", "Round", "ScatterElements",
    "ScatterND", "Selu", "Sigmoid", "Sign", "Sin", "Slice", "Softmax", "Softplus", "SpaceToDepth", "Split", "Sqrt",
    "Squeeze", "Sub", "Sum", "Tan", "Tanh", "Tile", "TopK", "Transpose", "Trilu", "Unsqueeze", "Where", "Xor",
})  # fmt: skip
#: The inputs that say how large a result is: constants of the file.
_SIZES = {
    "Expand": (1,), "Pad": (1, 3), "Reshape": (1,), "Resize": (1, 2, 3), "Slice": (1, 2, 3, 4), "Split": (1,),
    "Squeeze": (1,), "Tile": (1,), "TopK": (1,), "Unsqueeze": (1,),
} | dict.fromkeys((name for name in OPERATORS if name.startswith("Reduce")), (1,))  # fmt: skip
#: What chooses between two graphs: only in a graph that counts its steps itself.
_CHOICE = "If"
_BYTES = {number: dtype.itemsize for dtype, number in NUMBERS.items()}


def open_file(path: Path) -> Contents:
    """The graph in a file of a bundle.

    Raises:
        BundleError: it is no ONNX, or has parts that no export writes.
    """
    try:
        contents, opsets = read_model(path.read_bytes())
        if opsets != [("", OPSET)]:
            raise Malformed(f"its operators are of {opsets[:3]!r:.80}, not of ONNX's opset {OPSET} alone")
    except Malformed as error:
        raise BundleError(f"{path}: not a graph of ONNX that tcc wrote ({error}): export the bundle anew") from error
    return contents


def check_operators(path: Path, contents: Contents, graph: Graph, manifest: Manifest) -> None:
    """Raise where a graph does what no export writes, or more than the manifest says.

    Args:
        path: the file, for messages.
        contents: what it holds.
        graph: what the manifest says of it.
        manifest: the manifest; with the slot `COUNTER`, the graph may choose between graphs.

    Raises:
        BundleError: names the operator or the value.
    """
    chooses = any(slot.name == COUNTER for slot in manifest.slots)
    try:
        count, largest = _measure(contents, frozenset(), frozenset(graph.weights), chooses)
    except Malformed as error:
        raise BundleError(f"{path}: {error}, which no export writes: do not use this bundle") from error
    for what, found, said in (
        ("operators", count, graph.operators),
        ("bytes in its largest value", largest, graph.largest),
    ):
        if found != said:
            raise BundleError(
                f"{path}: the graph has {found} {what}, and the manifest says {said}: the bundle was altered; export "
                "it anew"
            )


def largest_value(path: Path, *, chooses: bool = False) -> int:
    """The bytes of the largest value that a graph computes, for its manifest.

    Raises:
        ExportError: the graph does what a loader would refuse.
    """
    contents = open_file(path)
    outside = frozenset(tensor.name for tensor in contents.tensors if tensor.outside)
    try:
        return _measure(contents, frozenset(), outside, chooses)[1]
    except Malformed as error:
        raise ExportError(
            f"the graph's ONNX form has {error}; bundles are bounded, and hold nothing that is not: use the target "
            "aoti, or write that part of the model otherwise"
        ) from error


def _measure(contents: Contents, around: frozenset[str], weights: frozenset[str], chooses: bool) -> tuple[int, int]:
    """How many operators there are, and the bytes of the largest value.

    Args:
        contents: a graph.
        around: the constants that it sees around it.
        weights: constants whose values are not in the file.
        chooses: whether it may choose between graphs.
    """
    known = around | {tensor.name for tensor in contents.tensors} - weights
    known -= {*contents.inputs}  # a caller may give another value
    count = largest = 0
    for node in contents.nodes:
        _check_node(node, known, chooses)
        parts = [_measure(inner, known, weights, chooses) for inner in node.graphs]
        count += 1 + sum(part[0] for part in parts)
        largest = max(largest, *(part[1] for part in parts), *_bytes(contents, node, known), 0)
    return count, largest


def _check_node(node: Node, constants: frozenset[str], chooses: bool) -> None:
    name = f"{node.domain}::{node.operator}" if node.domain else node.operator
    if name not in OPERATORS and not (name == _CHOICE and chooses):
        raise Malformed(f"an operator {name!r:.60}")
    if node.graphs and name != _CHOICE:
        raise Malformed(f"an operator {name} with a graph in it")
    for place in _SIZES.get(name, ()):
        if any(given and given not in constants for given in node.inputs[place : place + 1]):
            raise Malformed(f"an operator {name} whose result is as large as the data say")


def _bytes(contents: Contents, node: Node, constants: frozenset[str]) -> Iterator[int]:
    """The bytes of what an operator makes, as the graph declares it."""
    for name in filter(None, node.outputs):
        number, shape = contents.values.get(name, (0, None))
        if number not in _BYTES or shape is None:
            raise Malformed(f"a value {name!r:.80} of unknown size")
        if name in constants:
            raise Malformed(f"a value {name!r:.80} that is a constant, too")
        yield math.prod(shape) * _BYTES[number]
