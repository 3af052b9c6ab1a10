"""What the inputs of a captured graph are: their part in sampling, their axes, and the range of whole numbers."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

from tcc.passes.attention import SOFTMAX, WHOLE
from tcc.passes.graph import shape, value
from tcc.passes.macs import node_macs
from tcc.passes.noise_level import is_single, reaches_wave
from tcc.passes.sites import Analysis

__all__ = ["InputFacts", "input_facts"]

aten = torch.ops.aten

#: Operators whose results are values of their first operand.
_KEEPS = {
    aten.alias.default, aten.clone.default, aten.contiguous.default, aten.expand.default, aten.flatten.using_ints,
    aten.permute.default, aten.repeat.default, aten.reshape.default, aten.select.int, aten.slice.Tensor,
    aten.squeeze.default, aten.squeeze.dim, aten.squeeze.dims, aten.to.dtype, aten.to.dtype_layout,
    aten.transpose.int, aten.unsqueeze.default, aten.view.default, aten._to_copy.default,
}  # fmt: skip
#: Names of dimensions after the batch, by role and how many there are.
_AXES = {
    ("embedding", 1): ("channels",), ("embedding", 2): ("rows", "channels"), ("positions", 2): ("rows", "coordinates"),
    ("mask", 1): ("rows",), ("ids", 1): ("rows",),
}  # fmt: skip
_PLACES = {2: ("height", "width"), 3: ("frames", "height", "width")}


@dataclass(frozen=True)
class InputFacts:
    """What is known about an input.

    Attributes:
        role: `sample`, `timestep`, `label` (a whole number for each sample that is looked up in a table), `ids` (more
            of them), `mask` (what attention adds before its softmax, or booleans), `number` (one for each sample, such
            as a guidance strength), `positions` (turned into waves) or `embedding`.
        axes: the name of each dimension, "" where it is not known.
        values: a whole number that is looked up lies in 0 to `values` - 1; 0 where it is not looked up.
    """

    role: str
    axes: tuple[str, ...]
    values: int


def input_facts(
    graph: fx.Graph, analysis: Analysis, level: int | None, samples: tuple[int, ...]
) -> tuple[InputFacts, ...]:
    """What the inputs of the graph are, in order.

    Args:
        graph: a captured graph.
        analysis: what the analyses found out about it.
        level: the position of the noise level among the inputs, None where it is not known.
        samples: the positions of the inputs that may be the sample.
    """
    found = []
    for position, node in enumerate(node for node in graph.nodes if node.op == "placeholder"):
        values = min(_table_sizes(node), default=0)
        role = "timestep" if position == level else "sample" if position in samples else _role(node, values)
        found.append(InputFacts(role, _axes(shape(node), role, analysis), values))
    return tuple(found)


def _role(node: fx.Node, values: int) -> str:
    kind = value(node).dtype
    if kind == torch.bool or _reaches_softmax(node):
        return "mask"
    if values:
        return "label" if is_single(node) else "ids"
    if is_single(node):
        return "number"
    return "positions" if reaches_wave(node) or not kind.is_floating_point else "embedding"


def _table_sizes(start: fx.Node) -> Iterator[int]:
    """The sizes of the tables that the input is looked up in."""
    if value(start).dtype.is_floating_point or value(start).dtype == torch.bool:
        return
    seen, todo = {start}, [start]
    while todo:
        node = todo.pop()
        for user in node.users:
            yield from _table_size(user, node)
            if user.target in _KEEPS and user.args[0] is node and user not in seen:
                seen.add(user)
                todo.append(user)


def _table_size(lookup: fx.Node, index: fx.Node) -> Iterator[int]:
    arguments: tuple[Any, ...] = (*lookup.args, None)
    table, *others = arguments
    if lookup.target is aten.embedding.default and others[0] is index:
        yield shape(table)[0]
    elif lookup.target in (aten.index_select.default, aten.gather.default) and others[1] is index:
        yield shape(table)[others[0]]
    elif lookup.target is aten.index.Tensor:
        yield from (shape(table)[dim] for dim, one in enumerate(others[0]) if one is index)


def _reaches_softmax(start: fx.Node) -> bool:
    """Whether the input is among what a softmax sees, without a matrix product or a table between."""
    seen, todo = {start}, [start]
    while todo:
        node = todo.pop()
        for user in node.users:
            if user.target in SOFTMAX or (user.target is WHOLE and node not in user.args[:3]):
                return True
            ends = user.op != "call_function" or node_macs(user) or any(_table_size(user, node))
            if user not in seen and not ends:
                seen.add(user)
                todo.append(user)
    return False


def _axes(sizes: tuple[int, ...], role: str, analysis: Analysis) -> tuple[str, ...]:
    """A name for each dimension; the first is the batch where it has its size."""
    first = ("batch",) if sizes and sizes[0] == analysis.batch else ()
    rest = sizes[len(first) :]
    if role == "sample":
        return first + _sample_axes(rest, analysis)
    return first + _AXES.get((role, len(rest)), ("",) * len(rest))


def _sample_axes(sizes: tuple[int, ...], analysis: Analysis) -> tuple[str, ...]:
    """Where the grid of the tokens lies in a sample; what is left are its channels.

    A token covers a patch, so a dimension of the sample is a multiple of the grid's; patches are as high as wide where
    the sizes leave a choice, and the later dimensions are taken then, as most models have their channels first.
    """
    grid, tokens = analysis.grid, analysis.image_tokens[1] - analysis.image_tokens[0]
    names = [""] * len(sizes)
    if len(sizes) == 2 and sizes[0] in (tokens, math.prod(grid or (0,))):
        return "tokens", "channels"
    choices = []
    for dims in itertools.combinations(range(len(sizes)), len(grid) or len(sizes)):
        if grid and all(sizes[dim] % side == 0 for dim, side in zip(dims, grid, strict=True)):
            patch = [sizes[dim] // side for dim, side in zip(dims, grid, strict=True)]
            choices.append((patch[-1] == patch[-2], dims))
    if choices:
        for dim, name in zip(max(choices)[1], _PLACES.get(len(grid), ("",) * len(grid)), strict=True):
            names[dim] = name
        if names.count("") == 1:
            names[names.index("")] = "channels"
    return tuple(names)
