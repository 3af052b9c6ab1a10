"""Move gathers up, above everything that can be computed for the kept tokens alone."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import fx

from tcc.passes.base import Pass
from tcc.passes.graph import emit, shape, value
from tcc.passes.token_axis import Narrowing, NotTokenLocal, Path, narrowing, operands
from tcc.passes.tokens import Axis, gather_tokens, scatter_tokens

__all__ = ["PruneTokens", "Whole"]

aten = torch.ops.aten
#: Free to compute again: where the tokens share a dimension below them, they may have their own above.
_VIEWS = {aten.view.default, aten.reshape.default, aten._unsafe_view.default}


@dataclass(frozen=True)
class PruneTokens(Pass):
    """Compute for the kept tokens what is only read through a gather.

    Before: `gather(linear(layer_norm(x)), T)`
    After:  `linear(layer_norm(gather(x, T)))`, with literal shapes re-sized and per-token constants gathered

    1. A gather moves above a node by the node's token rule (`token_axis`).
    2. It stops at values that are needed for all tokens anyway, at values with no rule, and at graph inputs.
    3. It meets a scatter of its own token set: the rows take its place.
    """

    def run(self, gm: fx.GraphModule) -> int:
        """Edit `gm`; see the class."""
        whole = Whole(gm.graph)
        runs: dict[fx.Node, _Narrower] = {}
        edits = 0
        for node in list(gm.graph.nodes):
            if node.target is not gather_tokens:
                continue
            source, kept, dim = node.args
            narrower = runs.setdefault(kept, _Narrower(gm.graph, kept, whole))
            new = narrower.narrow(source, Axis(dim))
            if new is not node and not _gathers(new, source, node):
                node.replace_all_uses_with(new)
                edits += 1
            else:
                narrower.done[source, Axis(dim)] = node
        return edits


class Whole:
    """The values that are needed for all tokens whatever the gathers do."""

    def __init__(self, graph: fx.Graph) -> None:
        self.nodes: set[fx.Node] = set()
        self.add(graph.output_node())

    def add(self, node: fx.Node) -> None:
        """`node` and everything it is computed from, down to the next gather."""
        todo = [node]
        while todo:
            here = todo.pop()
            if here in self.nodes:
                continue
            self.nodes.add(here)
            if here.target is gather_tokens:
                todo.append(here.args[1])  # type: ignore[arg-type]
            else:
                todo += here.all_input_nodes


@dataclass
class _Narrower:
    """Builds values restricted to one token set, each at most once."""

    graph: fx.Graph
    kept: fx.Node
    whole: Whole
    done: dict[tuple[fx.Node, Axis], fx.Node] = field(default_factory=dict)

    def narrow(self, node: fx.Node, axis: Axis) -> fx.Node:
        """`node` for the kept tokens alone."""
        key = (node, axis)
        if key not in self.done:
            self.done[key] = self._narrow(node, axis)
        return self.done[key]

    def _narrow(self, node: fx.Node, axis: Axis) -> fx.Node:
        if node.target is scatter_tokens and node.args[2] is self.kept and Axis(node.args[4]) == axis:  # type: ignore[arg-type]
            return node.args[1]  # type: ignore[return-value]
        found = self._way_up(node, axis)
        if found is None:
            return self._gather(node, axis)
        for path, operand in operands(node):
            if path not in found.operands:
                self.whole.add(operand)
        new = {
            path: self.narrow(operand, found.operands[path])
            for path, operand in operands(node)
            if path in found.operands
        }
        args, kwargs = _substitute(node, {**new, **found.literals})
        with self.graph.inserting_after(node):
            # fewer tokens may come out of attention in another layout, in which the same view does not exist
            target = aten.reshape.default if node.target is aten.view.default else node.target
            return emit(self.graph, target, args, kwargs, like=node)  # type: ignore[arg-type]

    def _way_up(self, node: fx.Node, axis: Axis) -> Narrowing | None:
        """How `node` is computed for the kept tokens alone, or None where the gather must stop at `node`."""
        if node.op != "call_function" or node.target is gather_tokens:
            return None
        if node in self.whole.nodes and (axis.plain or node.target not in _VIEWS):
            return None
        try:
            found = narrowing(node, axis, shape(self.kept)[0])
        except NotTokenLocal:
            return None
        if not found.operands or (axis.plain and self._frees(node, found)):
            return None
        for path, operand in operands(node):  # a list of tensors cannot be gathered: stop at its elements
            if path in found.operands and isinstance(value(operand), (list, tuple)):
                return found if self._way_up(operand, found.operands[path]) else None
        return found

    def _frees(self, node: fx.Node, found: Narrowing) -> bool:
        """Whether `node` is a view that gives the tokens of a whole value a dimension of their own."""
        if node.target not in _VIEWS:
            return False
        source: Any = node.args[0]
        return source in self.whole.nodes and not found.operands[(0,)].plain

    def _gather(self, node: fx.Node, axis: Axis) -> fx.Node:
        """The gather stops here: `node` is needed for all tokens."""
        self.whole.add(node)
        above = node if node.op != "placeholder" else self._last_input()
        with self.graph.inserting_before(above.next):
            if axis.plain:
                return emit(self.graph, gather_tokens, (node, self.kept, axis.dim), like=node)
            return self._gather_shared(node, axis)

    def _gather_shared(self, node: fx.Node, axis: Axis) -> fx.Node:
        """Tokens that share their dimension: split it, gather, merge it again."""
        sizes, at, count = list(shape(node)), axis.dim, shape(self.kept)[0]
        tokens = sizes[at] // (axis.outer * axis.inner)
        apart = [*sizes[:at], axis.outer, tokens, axis.inner, *sizes[at + 1 :]]
        merged = [*sizes[:at], axis.outer * count * axis.inner, *sizes[at + 1 :]]
        rows = emit(self.graph, aten.view.default, (node, apart), like=node)
        rows = emit(self.graph, gather_tokens, (rows, self.kept, at + 1), like=node)
        return emit(self.graph, aten.view.default, (rows, merged), like=node)

    def _last_input(self) -> fx.Node:
        inputs: list[fx.Node] = [n for n in self.graph.nodes if n.op == "placeholder"]
        return inputs[-1]


def _substitute(node: fx.Node, changes: dict[Path, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
    args: list[Any] = [list(a) if isinstance(a, (list, tuple)) else a for a in node.args]
    kwargs: dict[str, Any] = dict(node.kwargs)
    for path, new in changes.items():
        holder: Any = args if isinstance(path[0], int) else kwargs
        if len(path) == 1:
            holder[path[0]] = new
        else:
            inner = list(holder[path[0]])
            inner[path[1]] = new  # type: ignore[index]
            holder[path[0]] = inner
    return tuple(args), kwargs


def _gathers(new: fx.Node, source: fx.Node, old: fx.Node) -> bool:
    """Whether `new` is the very gather that `old` is."""
    return new.target is gather_tokens and new.args == old.args
