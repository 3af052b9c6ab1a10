"""A variant's graph in the forms that exporters take: weights as inputs, or weights under their own names."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import fx, nn

from tcc.errors import ExportError
from tcc.export.weights import Weights
from tcc.passes.graph import output_values, value
from tcc.program import Variant

__all__ = ["example", "input_names", "model_outputs", "output_names", "with_weight_inputs", "with_weights"]


aten = torch.ops.aten


def input_names(variant: Variant) -> tuple[str, ...]:
    """The names of a graph's inputs: the model's by name, then slots and the others, as a program names them."""
    inputs = (node for node in variant.gm.graph.nodes if node.op == "placeholder")
    return tuple(str(node.meta.get("input", node.target)) for node in inputs)


def model_outputs(variant: Variant) -> dict[str, fx.Node]:
    """The tensors that the model returns by name: `output`, or `output_0` and so on where there are several.

    What it returns is flattened, and values that are None are left out.

    Raises:
        ExportError: a value is neither a tensor nor None.
    """
    values = output_values(variant.gm.graph)
    own = values[: len(values) - len(variant.stores)]
    for number, node in enumerate(own):
        if not isinstance(node, fx.Node) and node is not None:
            raise ExportError(
                f"value {number} of the {len(own)} that the model returns is {node!r:.40}, not a tensor: export a "
                "model that returns tensors, in a module of your own around this one for example"
            )
    tensors = [node for node in own if node is not None]
    names = ["output"] if len(tensors) == 1 else [f"output_{number}" for number in range(len(tensors))]
    return dict(zip(names, tensors, strict=True))


def output_names(variant: Variant) -> tuple[str, ...]:
    """The names of a graph's outputs: the model's, then `next:<slot>` for every slot that it stores."""
    return (*model_outputs(variant), *(f"next:{slot}" for slot in variant.stores))


def with_weight_inputs(variant: Variant, weights: Weights) -> tuple[fx.GraphModule, tuple[str, ...]]:
    """The graph with its weights as inputs after all others, and their names.

    An exporter then neither copies a weight nor folds it into a new constant. Queries that may attend to nothing have
    zeros, as in torch: ONNX's attention has the mean of all values there, or no number.
    """
    used: dict[str, fx.Node] = {}

    def weight(graph: fx.Graph, name: str, node: fx.Node) -> fx.Node:
        if name not in used:
            last = [n for n in graph.nodes if n.op == "placeholder"][-1]
            with graph.inserting_after(last):
                used[name] = graph.placeholder("weight_" + "".join(c if c.isalnum() else "_" for c in name))
            used[name].meta["val"] = value(node)
        return used[name]

    graph = _copy(variant, weights, weight)
    for node in graph.find_nodes(op="call_function", target=aten.scaled_dot_product_attention.default):
        _empty_where_all_is_masked(graph, node)
    return fx.GraphModule(nn.Module(), graph), tuple(used)


def with_weights(variant: Variant, weights: Weights) -> fx.GraphModule:
    """The graph in a module that holds its weights under their parameter names, contiguous."""
    root = fx.GraphModule(nn.Module(), fx.Graph())

    def weight(graph: fx.Graph, name: str, node: fx.Node) -> fx.Node:
        path, _, leaf = name.rpartition(".")
        if path:
            root.add_submodule(path, _existing(root, path))
        _existing(root, path).register_buffer(leaf, weights.tensors[name])
        new = graph.get_attr(name)
        new.meta["val"] = value(node)
        return new

    return fx.GraphModule(root, _copy(variant, weights, weight))


def example(node: fx.Node) -> torch.Tensor:
    """Zeros like the value of an input."""
    val = value(node)
    return torch.zeros(tuple(val.shape), dtype=val.dtype, device=val.device)


def _copy(variant: Variant, weights: Weights, weight: Callable[[fx.Graph, str, fx.Node], fx.Node]) -> fx.Graph:
    """A copy of the graph in which `weight(graph, name, node)` makes what stands for a weight."""
    graph = fx.Graph()
    new: dict[fx.Node, fx.Node] = {}
    for node in variant.gm.graph.nodes:
        if node.target is aten.einsum.default and (order := _permutation(*node.args[:2])):
            new[node] = graph.call_function(aten.permute.default, (new[node.args[1][0]], order))
            new[node].meta = dict(node.meta)
        elif node.op == "get_attr":
            new[node] = weight(graph, weights.names[str(node.target)], node)
        elif node.op == "output":
            values = [value for value in output_values(variant.gm.graph) if isinstance(value, fx.Node)]
            graph.output(tuple(new[value] for value in values))
        else:
            new[node] = graph.node_copy(node, new.__getitem__)
    return graph


def _empty_where_all_is_masked(graph: fx.Graph, attention: fx.Node) -> None:
    mask = attention.args[3] if len(attention.args) > 3 else attention.kwargs.get("attn_mask")
    if not isinstance(mask, fx.Node):
        return
    with graph.inserting_after(attention):
        zero = graph.call_function(aten.where.ScalarOther, (attention, attention, 0.0))
    attention.replace_all_uses_with(zero, delete_user_cb=lambda user: user is not zero)
    with graph.inserting_before(zero):
        if value(mask).dtype != torch.bool:
            mask = graph.call_function(aten.gt.Scalar, (mask, -math.inf))
        zero.update_arg(0, graph.call_function(aten.any.dim, (mask, -1, True)))


def _permutation(equation: str, operands: list[fx.Node]) -> list[int]:
    """The order of dimensions, [] where it is no permutation. ONNX's Einsum is for few dtypes."""
    source, _, target = equation.replace(" ", "").partition("->")
    if len(operands) > 1 or len(set(source)) != len(source) or sorted(source) != sorted(target) or "." in source:
        return []
    return [source.index(letter) for letter in target]


def _existing(root: nn.Module, path: str) -> nn.Module:
    """The module at `path`; a new one where there is none."""
    for name in path.split(".") if path else ():
        root = getattr(root, name, None) or nn.Module()
    return root
