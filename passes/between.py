"""Find what stands between the sub-graphs that a graph calls."""

from __future__ import annotations

import functools
import operator
from collections import Counter
from collections.abc import Iterator

import torch
from torch import fx

from tcc.passes.outline_repeats import invoke_subgraph
from tcc.passes.repeats import Stretch, digest, has_plain_values, inputs_of
from tcc.passes.views import owner

__all__ = ["stretches_between"]


def stretches_between(graph: fx.Graph) -> list[Stretch]:
    """Calls with no call of a sub-graph between them, as functions of tensors, which may write to what they are given.

    Left out are calls that no such function can make, or whose memory such a function would not see: those with values
    that are no tensors, or of sizes that depend on the data, and writes to memory that is read by another name too.
    """
    return [stretch for nodes in _runs(graph) if (stretch := _stretch(nodes)) is not None]


def _runs(graph: fx.Graph) -> Iterator[list[fx.Node]]:
    run: list[fx.Node] = []
    for node in graph.nodes:
        if node.op in ("placeholder", "get_attr") or _is_result(node):
            continue  # of no sub-graph, and needed before the next one
        if _is_call_of_tensors(node):
            run.append(node)
        elif run:
            yield run
            run = []


def _is_result(node: fx.Node) -> bool:
    """Whether the node is one of the values that a sub-graph returns."""
    return node.target is operator.getitem and getattr(node.args[0], "target", None) is invoke_subgraph


def _is_call_of_tensors(node: fx.Node) -> bool:
    schema = getattr(node.target, "_schema", None)
    known = schema is not None or node.target is operator.getitem
    return known and not (_written(node) and node.users) and has_plain_values(node)


def _written(node: fx.Node) -> list[fx.Node]:
    """The operands that a call writes to."""
    schema = getattr(node.target, "_schema", None)
    operands = zip(schema.arguments, node.args, strict=False) if schema is not None and schema.is_mutable else ()
    return [arg for known, arg in operands if known.is_write and isinstance(arg, fx.Node)]


def _stretch(nodes: list[fx.Node]) -> Stretch | None:
    owned_by = functools.cache(owner)
    inside = set(nodes)
    inputs = inputs_of(nodes)
    used = tuple(node for node in nodes if any(user not in inside for user in node.users))
    outputs = tuple(dict.fromkeys(own for own in map(owned_by, used) if own in inside))
    memory = Counter(map(owned_by, (*inputs, *used)))
    written = {owned_by(operand) for node in nodes for operand in _written(node)}
    tensors = all(isinstance(node.meta.get("val"), torch.Tensor) for node in (*inputs, *outputs))
    if not tensors or any(memory[own] > 1 for own in written):
        return None
    return Stretch(tuple(nodes), used, outputs, f"between_{digest(nodes)}")
