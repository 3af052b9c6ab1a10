"""Rows of several streams in one value, such as attention over image and text tokens, and who reads which."""

from __future__ import annotations

import operator
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

from tcc.passes.graph import emit, shape, sized_by_data
from tcc.passes.tokens import Axis

__all__ = ["Cut", "find_cuts", "move_cut"]

aten = torch.ops.aten
_SPLITS = {aten.split_with_sizes.default, aten.split.Tensor, aten.chunk.default}


@dataclass(frozen=True)
class Cut:
    """`node` is rows `start` to `stop` of `source`, along `dim`."""

    node: fx.Node
    source: fx.Node
    dim: int
    start: int
    stop: int

    def beside(self, axis: Axis, count: int) -> bool:
        """Whether these rows are others that are joined to the `count` tokens along `axis`."""
        here = axis.plain and axis.dim == self.dim
        return here and (self.stop <= axis.before or self.start >= axis.before + count)


def find_cuts(graph: fx.Graph) -> dict[fx.Node, list[Cut]]:
    """The values that are read by nothing but cuts along one dimension, with these."""
    found: dict[fx.Node, list[Cut]] = {}
    for source in graph.nodes:
        cuts = [cut for user in source.users for cut in _cuts(user, source)] if shape(source) else []
        readers = {cut.node if cut.node in source.users else cut.node.args[0] for cut in cuts}
        if len(cuts) > 1 and readers == set(source.users) and len({cut.dim for cut in cuts}) == 1:
            found[source] = cuts
    return found


def _cuts(user: fx.Node, source: fx.Node) -> Iterable[Cut]:
    if (user.target is not aten.slice.Tensor and user.target not in _SPLITS) or sized_by_data(user):
        return
    args: list[Any] = [*user.args[1:], *[None] * 4]
    rank = len(shape(source))
    if user.target is aten.slice.Tensor and user.args[0] is source and args[3] in (None, 1):
        dim = (args[0] or 0) % rank
        start, stop, _ = slice(args[1], args[2]).indices(shape(source)[dim])
        yield Cut(user, source, dim, start, stop)
    elif user.target is not aten.slice.Tensor:
        along: Any = args[1] if args[1] is not None else user.kwargs.get("dim", 0)
        dim = int(along) % rank
        starts = [0]
        for part in user.meta["val"]:
            starts.append(starts[-1] + int(part.shape[dim]))
        for item in user.users:
            number: Any = item.args[1]
            if item.target is operator.getitem:
                yield Cut(item, source, dim, starts[number], starts[number + 1])


def move_cut(graph: fx.Graph, cut: Cut, fewer: fx.Node, axis: Axis, count: int) -> bool:
    """Read the rows of `cut` from `fewer`, which has fewer tokens along `axis` than the source has; say if it was done.

    Args:
        graph: the graph.
        cut: rows of others beside the tokens.
        fewer: the source for some tokens, and for all others.
        axis: where the tokens lie in the source.
        count: how many tokens the source has.
    """
    if any(user < fewer for user in cut.node.users):  # a set that is chosen later
        return False
    shift = shape(fewer)[cut.dim] - shape(cut.source)[cut.dim] if cut.start >= axis.before + count else 0
    with graph.inserting_before(max(cut.node, fewer).next):
        args = (fewer, cut.dim, cut.start + shift, cut.stop + shift)
        cut.node.replace_all_uses_with(emit(graph, aten.slice.Tensor, args, like=cut.node))
    return True
