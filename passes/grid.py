"""Find the image grid: how the image tokens lie in rows and columns, and where they stand in the stream."""

from __future__ import annotations

import math

import torch
from torch import fx

from tcc.passes.graph import shape
from tcc.passes.token_axis import NotTokenLocal, narrowing, operands
from tcc.passes.tokens import Axis

__all__ = ["find_grid"]

aten = torch.ops.aten
_VIEWS = (aten.view.default, aten.reshape.default, aten._unsafe_view.default)

#: The grid, and the position of its first token in the stream; the grid is () where none is found.
Grid = tuple[tuple[int, ...], int]
_NONE: Grid = ((), 0)


def find_grid(first: fx.Node, first_axis: Axis | None, last: fx.Node, last_axis: Axis) -> Grid:
    """The dimensions that a view merges into the token axis above the blocks, or splits from it below them.

    Other tokens may be joined to the image's before the blocks and cut off after them.

    Args:
        first: the stream entering the first block.
        first_axis: where its tokens lie in it, if that is known.
        last: the stream leaving the last block.
        last_axis: where its tokens lie in it.
    """
    above = _above(first, first_axis) if first_axis else _NONE
    return above if above[0] else _below(last, last_axis)


def _above(node: fx.Node, axis: Axis) -> Grid:
    """Walk up to the view that merges the token axis; where tokens are joined, each part is a way up."""
    todo, seen = [(node, axis)], set()
    while todo:
        here, at = todo.pop()
        if here in seen or here.op != "call_function":
            continue
        seen.add(here)
        try:
            wanted = narrowing(here, at, 1).operands
        except NotTokenLocal:
            if here.target is aten.cat.default and at.plain:
                return _above_joined(here, at)
            if here.target in _VIEWS and at.plain and not at.others:
                source = here.args[0]
                assert isinstance(source, fx.Node)
                return _split(shape(source), math.prod(shape(here)[: at.dim]), shape(here)[at.dim]), 0
            continue
        todo += [(operand, wanted[path]) for path, operand in operands(here) if path in wanted]
    return _NONE


def _above_joined(node: fx.Node, axis: Axis) -> Grid:
    start = 0
    for _, part in operands(node):
        grid, offset = _above(part, axis)
        if grid:
            return grid, start + offset
        start += shape(part)[axis.dim]
    return _NONE


def _below(node: fx.Node, axis: Axis) -> Grid:
    """Walk down through values that keep the token axis where it is, or a stretch of it, to the view that splits it."""
    todo, seen = [(node, 0)], set()
    while todo:
        here, start = todo.pop(0)
        tokens = shape(here)[axis.dim]
        for user in here.users:
            if user in seen:
                continue
            seen.add(user)
            sizes = shape(user)
            if len(sizes) > axis.dim and sizes[axis.dim] == tokens:
                todo.append((user, start))
            elif user.target is aten.slice.Tensor and len(sizes) > axis.dim:
                todo.append((user, start + _slice_start(user, tokens)))
            elif user.target in _VIEWS:
                grid = _split(sizes, math.prod(shape(here)[: axis.dim]), tokens)
                if grid and start >= axis.before:
                    return grid, start - axis.before
    return _NONE


def _slice_start(node: fx.Node, size: int) -> int:
    """Where a slice of the token axis begins; one of another dimension would have left the tokens as they are."""
    begin = node.args[2] if len(node.args) > 2 else None
    return max(0, begin + size if begin < 0 else begin) if isinstance(begin, int) else 0


def _split(sizes: tuple[int, ...], before: int, tokens: int) -> tuple[int, ...]:
    """The run of dimensions in `sizes` that starts after `before` elements and multiplies to `tokens`."""
    for start in range(len(sizes)):
        if math.prod(sizes[:start]) == before:
            for stop in range(start + 1, len(sizes) + 1):
                if math.prod(sizes[start:stop]) == tokens:
                    found = tuple(s for s in sizes[start:stop] if s > 1)
                    return found if len(found) > 1 else ()
    return ()
