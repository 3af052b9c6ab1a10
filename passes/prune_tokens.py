"""Move gathers up, above everything that can be computed for the kept tokens alone."""

from __future__ import annotations

import logging
from collections.abc import Collection
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import fx

from tcc.passes.base import Pass
from tcc.passes.gathers import gather
from tcc.passes.graph import emit, shape, value
from tcc.passes.joined_rows import Cut, find_cuts, move_cut
from tcc.passes.paths import Path, at, operands, substitute
from tcc.passes.products import with_dimension
from tcc.passes.token_axis import NotTokenLocal, broadcasts, narrowing
from tcc.passes.tokens import Axis, gather_tokens, scatter_tokens

__all__ = ["PruneTokens", "Whole", "rows_beside"]

aten = torch.ops.aten
logger = logging.getLogger(__name__)
#: Free to compute again: where the tokens share a dimension below them, they may have their own above.
_VIEWS = {aten.view.default, aten.reshape.default, aten._unsafe_view.default}


@dataclass(frozen=True)
class PruneTokens(Pass):
    """Compute for the kept tokens what is only read through a gather.

    Before: `gather(linear(layer_norm(x)), T)`
    After:  `linear(layer_norm(gather(x, T)))`, with literal shapes re-sized and per-token constants gathered

    1. A gather moves above a node by the node's token rule (`token_axis`).
    2. It stops at values that are needed for all tokens anyway, at values with no rule, and at graph inputs. It moves
       above a gather along another dimension, such as one of keys.
    3. It meets a scatter of its own token set: the rows take its place.
    4. Rows of others that are joined to the tokens come along with the kept ones: who reads only them, such as the text
       stream after attention over text and image, reads them there, and nobody needs the dropped tokens.
    5. Where every sample has its own set, the samples are followed by the same rules. What all samples share (a table
       of positions) is gathered for each of them; the gather stops where the samples cannot be followed.
    """

    def run(self, gm: fx.GraphModule) -> int:
        """Edit `gm`; see the class."""
        todo = [node for node in gm.graph.nodes if node.target is gather_tokens]
        if not todo:
            return 0
        beside = rows_beside(gm.graph)
        whole = Whole(gm.graph, {cut.node for cut in beside})
        runs: dict[fx.Node, _Narrower] = {}
        edits = 0
        while todo:
            node = max(todo)  # from the last to the first: what reads a value says what is needed of it
            todo.remove(node)
            source, kept = node.args[:2]
            whole.add(kept)
            narrower = runs.setdefault(kept, _Narrower(gm.graph, kept, whole, todo))
            place = _place(*node.args[2:])
            narrower.survey(source, place)
            new = narrower.narrow(source, place)
            if new is not node and not _gathers(new, node):
                node.replace_all_uses_with(new)
                edits += 1
            else:
                narrower.done[source, place] = node
        for cut in beside:
            edits += any(narrower.move(cut) for narrower in runs.values())
        return edits


def rows_beside(graph: fx.Graph) -> list[Cut]:
    """Rows that are needed whole, of values whose other rows are only needed through gathers."""
    whole, found = Whole(graph), []
    for cuts in find_cuts(graph).values():
        needed = [cut for cut in cuts if cut.node in whole.nodes]
        found += needed if len(needed) < len(cuts) else []
    return found


@dataclass(frozen=True)
class Place:
    """Where the tokens lie in a value, and the samples, where each has its own token set."""

    tokens: Axis
    batch: Axis | None = None

    @property
    def plain(self) -> bool:
        """Whether both have a dimension of their own."""
        return self.tokens.plain and (self.batch is None or self.batch.plain)


@dataclass(frozen=True)
class Way:
    """How a node is computed for the kept tokens alone.

    Attributes:
        operands: the operands to restrict to the kept tokens, and where tokens and samples lie in them.
        shared: of these, the ones that all samples share, with the shape that gives each sample its own.
        literals: literal arguments with their new value.
    """

    operands: dict[Path, Place]
    shared: dict[Path, tuple[int, ...]]
    literals: dict[Path, Any]


def _place(dim: Any, batch: Any = None, others: Any = ()) -> Place:
    """The place that the arguments of a token operator name."""
    before, after = others or (0, 0)
    return Place(Axis(dim, before=before, after=after), None if batch is None else Axis(batch))


class Whole:
    """The values that are needed for all tokens whatever the gathers do.

    Rows `beside` the tokens do not count: they come along with the kept ones.
    """

    def __init__(self, graph: fx.Graph, beside: Collection[fx.Node] = ()) -> None:
        self.nodes: set[fx.Node] = set()
        self.beside = beside
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
            elif here not in self.beside:
                todo += here.all_input_nodes


@dataclass
class _Narrower:
    """Builds values restricted to one token set, each at most once."""

    graph: fx.Graph
    kept: fx.Node
    whole: Whole
    todo: list[fx.Node]
    done: dict[tuple[fx.Node, Place], fx.Node] = field(default_factory=dict)
    spread: dict[tuple[fx.Node, Place, tuple[int, ...]], fx.Node] = field(default_factory=dict)
    ways: dict[tuple[fx.Node, Place], Way] = field(default_factory=dict)
    behind: int = 0

    def survey(self, node: fx.Node, place: Place) -> None:
        """Note what is needed for all tokens on the way up from `node`, so that nothing of it is narrowed too."""
        todo, seen = [(node, place, True)], set()
        while todo:
            node, place, known = todo.pop()
            if (node, place) in seen or (node, place) in self.done or self._rows(node, place) is not None:
                continue
            seen.add((node, place))
            if node.target is gather_tokens and self._crosses(node, place):
                todo.append((node.args[0], place, False))  # type: ignore[arg-type]
                continue
            found = self._way_up(node, place)
            if found is None:
                self.whole.add(node)
                continue
            for path, operand in operands(node):
                if path in found.operands and path not in found.shared:
                    todo.append((operand, found.operands[path], known))
                elif known or path in found.shared:
                    self.whole.add(operand)

    def narrow(self, node: fx.Node, place: Place) -> fx.Node:
        """`node` for the kept tokens alone."""
        key = (node, place)
        if key not in self.done:
            self.done[key] = self._narrow(node, place)
        return self.done[key]

    def _narrow(self, node: fx.Node, place: Place) -> fx.Node:
        rows = self._rows(node, place)
        if rows is not None:
            return rows
        if node.target is gather_tokens and self._crosses(node, place):
            return self._above(node, place)
        found = self._way_up(node, place)
        if found is None:
            return self._gather(node, place)
        for path, operand in operands(node):
            if path not in found.operands and not self.behind:
                self.whole.add(operand)
        new: dict[Path, Any] = {}
        for path, operand in operands(node):
            if path in found.shared:
                new[path] = self._gather_spread(operand, found.operands[path], found.shared[path])
            elif path in found.operands:
                new[path] = self.narrow(operand, found.operands[path])
        args, kwargs = substitute(node, {**new, **found.literals})
        with self.graph.inserting_before(max([node, *new.values()]).next):
            # fewer tokens may come out of attention in another layout, in which the same view does not exist
            target = aten.reshape.default if node.target is aten.view.default else node.target
            return emit(self.graph, target, args, kwargs, like=node)  # type: ignore[arg-type]

    def _rows(self, node: fx.Node, place: Place) -> fx.Node | None:
        """The rows of a scatter of this very token set."""
        if node.target is scatter_tokens and node.args[2] is self.kept and _place(*node.args[4:]) == place:
            return node.args[1]  # type: ignore[return-value]
        return None

    def move(self, cut: Cut) -> bool:
        """Read rows beside the tokens from a value that has been narrowed to this token set; say if there is one."""
        for (node, place), new in list(self.done.items()):
            count = place.tokens.count(shape(node)) if node is cut.source else 0
            if count and new.target is not gather_tokens and cut.beside(place.tokens, count):
                return move_cut(self.graph, cut, new, place.tokens, count)
        return False

    def _crosses(self, other: fx.Node, place: Place) -> bool:
        """Whether gather `other` is along another dimension, and nobody needs its result for all tokens of `place`."""
        return other not in self.whole.nodes and place.tokens.plain and place.tokens.dim not in other.args[2:]

    def _above(self, other: fx.Node, place: Place) -> fx.Node:
        """The gather of the other dimension, below this one."""
        source, *rest = other.args
        self.behind += 1  # what is needed of the other operands is not known before that gather has moved
        new = self.narrow(source, place)  # type: ignore[arg-type]
        self.behind -= 1
        with self.graph.inserting_before(max(other, new).next):
            self.todo.append(emit(self.graph, gather_tokens, (new, *rest), like=other))
        return self.todo[-1]

    def _way_up(self, node: fx.Node, place: Place) -> Way | None:
        """How `node` is computed for the kept tokens alone, or None where the gather must stop at `node`."""
        if node.op != "call_function" or node.target is gather_tokens:
            return None
        if node in self.whole.nodes and (place.plain or node.target not in _VIEWS):
            return None
        try:
            key = (node, place)
            if key not in self.ways:
                self.ways[key] = _way(node, place, shape(self.kept)[-1])
            found = self.ways[key]
        except NotTokenLocal as blocked:
            logger.debug("a gather stops at %s: %s", node.name, blocked)
            return None
        if not (found.operands or found.literals) or (place.plain and self._frees(node, found)):
            return None
        if found.shared and node.target is aten.expand.default:  # the samples begin here
            return None
        for path, operand in operands(node):  # a list of tensors cannot be gathered: stop at its elements
            if path in found.operands and isinstance(value(operand), (list, tuple)):
                return found if self._way_up(operand, found.operands[path]) else None
        return found

    def _frees(self, node: fx.Node, found: Way) -> bool:
        """Whether `node` is a view that gives the tokens of a whole value a dimension of their own."""
        if node.target not in _VIEWS:
            return False
        source: Any = node.args[0]
        return source in self.whole.nodes and not found.operands[(0,)].plain

    def _gather(self, node: fx.Node, place: Place) -> fx.Node:
        """The gather stops here: `node` is needed for all tokens."""
        self.whole.add(node)
        with self.graph.inserting_before(self._after(node)):
            return gather(self.graph, node, self.kept, place.tokens, place.batch, node)

    def _gather_spread(self, node: fx.Node, place: Place, sizes: tuple[int, ...]) -> fx.Node:
        """The gather stops here: all samples share `node`, and each takes its own tokens of it."""
        key = (node, place, sizes)
        if key not in self.spread:
            self.whole.add(node)
            with self.graph.inserting_before(self._after(node)):
                each = emit(self.graph, aten.expand.default, (node, list(sizes)), like=node)
                self.spread[key] = gather(self.graph, each, self.kept, place.tokens, place.batch, node)
        return self.spread[key]

    def _after(self, node: fx.Node) -> fx.Node:
        """What to insert before, for a value that is computed from `node` and the kept positions."""
        return max(node if node.op != "placeholder" else self._last_input(), self.kept).next

    def _last_input(self) -> fx.Node:
        inputs: list[fx.Node] = [n for n in self.graph.nodes if n.op == "placeholder"]
        return inputs[-1]


def _way(node: fx.Node, place: Place, count: int) -> Way:
    """How `node` is computed for `count` kept tokens, of each sample where `place` says where the samples lie.

    Raises:
        NotTokenLocal: the node mixes tokens or samples, or no rule is known for its operator.
    """
    found = narrowing(node, place.tokens, count)
    if place.batch is None:
        return Way({path: Place(axis) for path, axis in found.operands.items()}, {}, found.literals)
    samples = narrowing(node, place.batch, 1).operands
    ways = {path: Place(axis, samples[path]) for path, axis in found.operands.items() if path in samples}
    lacking = [path for path in found.operands if path not in samples]
    equation = with_dimension(node, lacking, place.batch.dim) if place.batch.plain else None
    shared: dict[Path, tuple[int, ...]] = {}
    for path in lacking:
        own, axis = shape(at(node, path)), found.operands[path]
        if equation is not None:
            shared[path], batch = (shape(node)[place.batch.dim], *own), Axis(0)
        else:
            shared[path], batch = _for_each_sample(node, path, place.batch), place.batch
        ways[path] = Place(axis.at(axis.dim + len(shared[path]) - len(own)), batch)
    return Way(ways, shared, found.literals | ({(0,): equation} if lacking and equation is not None else {}))


def _for_each_sample(node: fx.Node, path: Path, batch: Axis) -> tuple[int, ...]:
    """The shape of an operand without samples, broadcast over those of `node`."""
    own, sizes = shape(at(node, path)), list(shape(node))
    expanded = [*[1] * (len(sizes) - len(own)), *own]
    if not broadcasts(node, path, batch.dim) or len(expanded) != len(sizes) or expanded[batch.dim] != 1:
        raise NotTokenLocal(f"{node.target} takes '{at(node, path).name}' {list(own)}, which has no samples")
    expanded[batch.dim] = sizes[batch.dim]
    return tuple(expanded)


def _gathers(new: fx.Node, old: fx.Node) -> bool:
    """Whether `new` is the very gather that `old` is."""
    return new.target is gather_tokens and new.args == old.args
