"""ONNX: one small graph per variant, whose weights lie in the bundle's safetensors file.

A safetensors file holds plain little-endian tensors, which is what ONNX calls external data: the graphs refer to
offsets in it, so that any number of them shares one file.
"""

from __future__ import annotations

import logging
import warnings
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from tcc.errors import ExportError
from tcc.export.graphs import example, input_names, output_names, with_weight_inputs
from tcc.export.manifest import WEIGHTS
from tcc.export.onnx_operators import OPSET
from tcc.export.weights import Place, Weights
from tcc.program import Variant

__all__ = ["require_onnx", "write_onnx"]


def require_onnx() -> Any:
    """The module `onnx_ir`.

    Raises:
        ExportError: a package that exporting needs is not installed.
    """
    try:
        import onnx_ir
        import onnxscript  # noqa: F401 # the exporter needs it
    except ImportError as error:
        raise ExportError(f"ONNX export needs the package {error.name}: pip install 'tcc[onnx]'") from error
    return onnx_ir


def write_onnx(variant: Variant, weights: Weights, places: dict[str, Place], path: Path) -> int:
    """Write the graph of one variant as ONNX.

    Args:
        variant: the variant.
        weights: the weights of all variants.
        places: where they lie in the file `WEIGHTS` beside `path`.
        path: the file to write.

    Returns:
        How many operators the graph has.

    Raises:
        ExportError: the ONNX packages are missing, or an operator has no ONNX form.
    """
    ir = require_onnx()
    _check_names(variant, weights)
    gm, names = with_weight_inputs(variant, weights)
    inputs = [node for node in gm.graph.nodes if node.op == "placeholder"]
    count = len(inputs) - len(names)
    examples = [*map(example, inputs[:count]), *(weights.tensors[name] for name in names)]
    model = _converted(gm, tuple(examples), [*input_names(variant), *names], list(output_names(variant)))
    by_name = {value.name: value for value in model.graph.inputs}
    for name in names:
        value, place, tensor = by_name[name], places[name], weights.tensors[name]
        value.const_value = ir.ExternalTensor(
            WEIGHTS, place.offset, place.length, value.dtype, shape=ir.Shape(tensor.shape), name=name
        )
        model.graph.inputs.remove(value)
        model.graph.register_initializer(value)
    _make_loadable(ir, model.graph)
    path.write_bytes(_declared(ir.serde.serialize_model(model)).SerializeToString())
    return len(list(model.graph))


def _make_loadable(ir: Any, graph: Any) -> None:
    """Write what some loader has no implementation of in other operators."""
    for node in list(graph):
        node.metadata_props.clear()  # stack traces, longer than the graph
        if node.op_type == "Clip" and len(node.inputs) == 2 and node.inputs[0].dtype == ir.DataType.INT64:
            node.op_type = "Max"  # the same with a lower bound alone, and TensorRT clips real numbers only
        if node.op_type == "Where" and ir.DataType.BOOL in (node.inputs[1].dtype, node.inputs[2].dtype):
            condition, first, second = node.inputs  # ONNX Runtime chooses between numbers only, on a CPU
            chosen, inverse = ir.node("And", [condition, first]), ir.node("Not", [condition])
            other = ir.node("And", [inverse.outputs[0], second])
            either = ir.node("Or", [chosen.outputs[0], other.outputs[0]])
            new = [chosen, inverse, other, either]
            ir.convenience.replace_nodes_and_values(graph, node, [node], new, node.outputs, either.outputs)
        if node.op_type in ("GatherND", "ScatterND") and node.inputs[1].dtype == ir.DataType.INT32:
            _cast(ir, graph, node, 1, ir.DataType.INT64)  # they take positions in int64 alone
        if node.op_type == "Einsum":
            for position, value in enumerate(node.inputs):
                if value.dtype != node.outputs[0].dtype:  # torch widens one of them
                    _cast(ir, graph, node, position, node.outputs[0].dtype)


def _cast(ir: Any, graph: Any, node: Any, position: int, dtype: Any) -> None:
    """Give `node` one of its inputs in another type."""
    cast = ir.node("Cast", [node.inputs[position]], {"to": dtype})
    graph.insert_before(node, cast)
    node.replace_input_with(position, cast.outputs[0])


def _check_names(variant: Variant, weights: Weights) -> None:
    """A graph of ONNX has one name for everything."""
    read = {weights.names[str(node.target)] for node in variant.gm.graph.nodes if node.op == "get_attr"}
    counted = Counter([*input_names(variant), *read, *output_names(variant)])
    if twice := [name for name, count in counted.items() if count > 1]:
        raise ExportError(
            f"'{twice[0]}' is the name of more than one input, weight or output of the graph (the model's result is "
            "'output'): rename the argument of forward, or the parameter"
        )


def _declared(proto: Any) -> Any:
    """The model with the shapes of all of its values, as a loader wants them."""
    import onnx

    try:
        return onnx.shape_inference.infer_shapes(proto)
    except onnx.shape_inference.InferenceError as error:  # of complex numbers for example, that it takes for pairs
        raise ExportError(f"the graph has no valid ONNX form: {str(error).strip().splitlines()[0]}") from error


def _reason(error: BaseException) -> str:
    """Where the exporter failed, and why: the first lines of its outermost cause and of the innermost one."""
    causes: list[BaseException] = [error]
    while (cause := causes[-1].__cause__) is not None:
        causes.append(cause)
    lines = [(str(each).strip().splitlines() or [type(each).__name__])[0] for each in causes[1:2] + causes[-1:]]
    return ": ".join(dict.fromkeys(line.replace(" See the stack trace for more information.", "") for line in lines))


def _converted(gm: torch.fx.GraphModule, examples: tuple[Any, ...], inputs: list[str], outputs: list[str]) -> Any:
    """`gm` as an optimised ONNX model."""
    try:
        with torch.no_grad(), torch.autocast(examples[0].device.type, enabled=False), _quiet():
            exported = torch.export.export(gm, examples, strict=False)
            program = torch.onnx.export(
                exported, input_names=inputs, output_names=outputs, opset_version=OPSET, dynamo=True, verbose=False
            )
            assert program is not None
            program.optimize()
    except torch.onnx.errors.OnnxExporterError as error:
        raise ExportError(f"the graph has no ONNX form: {_reason(error)}") from error
    return program.model


@contextmanager
def _quiet() -> Iterator[None]:
    """Without what exporters say about packages that tcc does not use, constant outputs, and torch's own tree specs."""
    names = (
        "torch.onnx._internal.exporter._registration",
        "onnx_ir.passes.common.initializer_deduplication",
        "onnxscript.optimizer._constant_folding",
    )
    levels = {logging.getLogger(name): logging.getLogger(name).level for name in names}
    for logger in levels:
        logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message=".*LeafSpec", category=FutureWarning)
            warnings.filterwarnings("ignore", category=DeprecationWarning, module="torch|onnx|onnxscript")
            yield
    finally:
        for logger, level in levels.items():
            logger.setLevel(level)
