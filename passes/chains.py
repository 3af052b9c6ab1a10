"""Find the residual adds of a graph, and the chains they form: one chain per stream.

A *residual add* is an add whose one operand, the stream, is an ancestor of the other, the branch. Each add's stream is
followed up to the add that it comes from, through whatever keeps tokens apart: casts, norms, linear maps, long skips,
joins with the tokens of another stream, and cuts. So a chain may change its shape on the way: image tokens alone in
some blocks, text and image tokens in one sequence in others.
"""

from __future__ import annotations

import heapq
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import fx

from tcc.passes.dataflow import Dataflow
from tcc.passes.graph import cat_dim, output_values, shape, size, value
from tcc.passes.macs import node_macs
from tcc.passes.residual_adds import Add, Link, base_of, guess_axis, residual_add
from tcc.passes.token_axis import NotTokenLocal, narrowing, operands
from tcc.passes.tokens import Axis

__all__ = ["Chain", "find_chains"]

aten = torch.ops.aten


@dataclass(frozen=True)
class Chain:
    """The adds of one stream, in order.

    Attributes:
        adds: the adds.
        others: for every add, how many rows before and after the stream's tokens belong to others; None where the
            tokens could not be followed.
        roots: the graph's inputs that the tokens of its first value come from.
        rows_out: the rows of the last add that the output is made of; None where it is made of all, or is not reached.
    """

    adds: tuple[Add, ...]
    others: tuple[tuple[int, int] | None, ...]
    roots: tuple[fx.Node, ...] = ()
    rows_out: tuple[int, int] | None = None


def find_chains(graph: fx.Graph, flow: Dataflow) -> tuple[list[Chain], int]:
    """The chains of residual adds, the one that the output is computed from first; and the number of residual adds.

    A chain has at least two adds. The first is the longest one where the output tells nothing.
    """
    search = _Search(flow)
    for node in graph.nodes:
        found = residual_add(node, flow)
        if found is not None:
            search.accept(found)
    return search.chains(output_values(graph)), len(search.adds)


@dataclass(frozen=True, order=True)
class _At:
    """Rows on their way up: where they are, and what they cost so far."""

    cost: int
    order: int
    node: fx.Node = field(compare=False)
    axis: Axis | None = field(compare=False)
    start: int = field(compare=False)

    @property
    def count(self) -> int:
        return self.axis.count(shape(self.node)) if self.axis else 0


@dataclass(frozen=True)
class _Step:
    """An add of a path.

    Attributes:
        number: the add.
        stretch: the adds of one stretch have their rows in one order.
        offset: where its rows begin, counted from those of the last add of the stretch.
    """

    number: int
    stretch: int
    offset: int


@dataclass
class _Search:
    flow: Dataflow
    adds: list[Add] = field(default_factory=list)
    places: dict[fx.Node, int] = field(default_factory=dict)

    def accept(self, found: Add) -> None:
        """Take an add into its chain, unless it is a skip around two or more others."""
        axis = guess_axis(found.add)
        links = self._links(found.stream_in, axis)
        before = max((self.adds[link.source].depth for link in links), default=0)
        if self._nested(found, axis) - before >= 2:
            return
        self.places[found.add] = len(self.adds)
        self.adds.append(replace(found, links=tuple(links), depth=before + 1))

    def chains(self, outputs: Sequence[object]) -> list[Chain]:
        """Every chain: the output's, then the longest among the adds that are left, and so on."""
        found: list[Chain] = []
        used: dict[int, range] = {}
        top, rows = self._top(outputs)
        while top is not None:
            path = self._path(top, rows, used)
            chain = self._chain(path, rows)
            for step, others in zip(path, chain.others, strict=True):
                before, after = others or (0, 0)
                used[step.number] = range(before, self.adds[step.number].rows - after)
            if len(path) > 1:
                found.append(chain)
            left = [i for i in range(len(self.adds)) if i not in used]
            top, rows = max(left, key=lambda i: (self.adds[i].depth, i), default=None), None
        return found

    def _links(self, node: fx.Node, axis: Axis | None) -> list[Link]:
        """The adds that the rows of `node` come from; where several could be meant, the one with the least between."""
        total = axis.count(shape(node)) if axis else 0
        found = []
        for at in self._walk(node, axis):
            if at.node in self.places:
                source = self.places[at.node]
                rows = (at.start, at.start + at.count) if at.axis else (0, total)
                start = at.axis.before if at.axis and at.axis.dim == guess_axis(at.node).dim else None
                found.append(Link(source, rows, start, at.cost))
        found.sort(key=lambda link: (link.cost, -self.adds[link.source].depth, -link.source))
        chosen: list[Link] = []
        for link in found:
            if not any((link.rows[0] < c.rows[1] and c.rows[0] < link.rows[1]) or c.rows == link.rows for c in chosen):
                chosen.append(link)
        return chosen

    def _nested(self, found: Add, axis: Axis) -> int:
        """The depth of the deepest add that the branch of `found` is made of."""
        base = base_of(found.stream_in)
        flow, delta = self.flow, found.delta
        inside = {n for n in self.places if flow.depends(n, base) and (n is delta or flow.depends(delta, n))}
        if not inside:
            return 0
        reached = (self.places[at.node] for at in self._walk(found.delta, axis, queries=True) if at.node in inside)
        return max((self.adds[number].depth for number in reached), default=0)

    def _walk(self, node: fx.Node, axis: Axis | None, *, queries: bool = False) -> Iterator[_At]:
        """Follow the tokens of `node` up; stop at residual adds. Cheapest ways first."""
        todo, seen, count = [_At(0, 0, node, axis, 0)], set(), 0
        while todo:
            at = heapq.heappop(todo)
            if (at.node, at.axis, at.start) in seen:
                continue
            seen.add((at.node, at.axis, at.start))
            yield at
            if at.node in self.places or at.node.op != "call_function":
                continue
            if at.node in self.flow.attention and not queries:
                continue
            cost = at.cost + (1 if node_macs(at.node) else 0)
            for operand, where, start in _above(at):
                count += 1
                heapq.heappush(todo, _At(cost, count, operand, where, start))

    def _top(self, outputs: Sequence[object]) -> tuple[int | None, tuple[int, int] | None]:
        """The add that the first output is computed from most directly, and its rows that reach the output."""
        for output in outputs:
            links = self._links(output, None) if isinstance(output, fx.Node) else []
            if links:
                return links[0].source, self._rows_out(links[0].source, output)  # type: ignore[arg-type]
        return max(range(len(self.adds)), key=lambda i: self.adds[i].depth, default=None), None

    def _rows_out(self, number: int, output: fx.Node) -> tuple[int, int] | None:
        """The rows of an add that are cut out on the way to `output`; None where all go on."""
        axis, todo = guess_axis(self.adds[number].add), [self.adds[number].add]
        while todo:
            here = todo.pop()
            for user in _readers(here):
                if user is not output and not self.flow.depends(output, user):
                    continue
                try:
                    source = narrowing(user, axis, 1).operands.get((0,))
                except (NotTokenLocal, IndexError):
                    continue
                if source is not None and source.others:
                    return source.before, self.adds[number].rows - source.after
                if source == axis and shape(user)[axis.dim] == self.adds[number].rows:
                    todo.append(user)
        return None

    def _path(self, top: int, rows: tuple[int, int] | None, used: Mapping[int, range]) -> list[_Step]:
        """The adds from the beginning of a stream up to `top`.

        Adds of another chain, `used` with the rows that it owns, are passed where the rows are none of its own.
        """
        path = [_Step(top, 0, 0)]
        here, stretch, offset = top, 0, 0
        lane = rows or (0, self.adds[top].rows)
        while self.adds[here].links:
            links = self.adds[here].links
            link = self._choose(links, lane, used)
            if link is None or (here not in used and link.source not in used and self._joins(links, used)):
                break
            low, high = max(lane[0], link.rows[0]), min(lane[1], link.rows[1])
            if link.start is None:
                stretch, offset, lane = stretch + 1, 0, (0, self.adds[link.source].rows)
            else:
                offset += link.rows[0] - link.start
                lane = (low - link.rows[0] + link.start, high - link.rows[0] + link.start)
            here = link.source
            if here not in used:
                path.append(_Step(here, stretch, offset))
            elif lane[0] < used[here].stop and used[here].start < lane[1]:
                break
        return path[::-1]

    def _joins(self, links: Iterable[Link], used: Mapping[int, range]) -> bool:
        """Whether some of the rows are another chain's own: an add of such rows is a part of one of its branches."""
        for link in links:
            start, rows = link.start or 0, used.get(link.source, range(0))
            if start < rows.stop and rows.start < start + link.rows[1] - link.rows[0]:
                return True
        return False

    def _choose(self, links: Iterable[Link], lane: tuple[int, int], used: Mapping[int, range]) -> Link | None:
        """The link that the rows of a lane come by; where they come by several, the one to the longest chain."""
        found = [link for link in links if link.rows[0] < lane[1] and lane[0] < link.rows[1]]
        return max(found, key=lambda link: (link.source not in used, self.adds[link.source].depth), default=None)

    def _chain(self, path: Sequence[_Step], rows_out: tuple[int, int] | None) -> Chain:
        """The chain of a path, with the rows that belong to others: all but those of its narrowest adds.

        Rows are compared where they are known to be the same; where they are re-arranged on the way, that is on the
        stretch with the most adds, and on others of the same shapes.
        """
        adds = [self.adds[step.number] for step in path]
        shapes: dict[int, set[tuple[int, ...]]] = {}
        for add, step in zip(adds, path, strict=True):
            shapes.setdefault(step.stretch, set()).add(shape(add.add))
        weights = {stretch: sum(shape(add.add) in found for add in adds) for stretch, found in shapes.items()}
        best = max(weights, key=lambda stretch: (weights[stretch], -stretch))
        known = [(add.rows, step.offset) for add, step in zip(adds, path, strict=True) if step.stretch == best]
        least, first = min(known)
        others: dict[tuple[int, ...], tuple[int, int]] = {}
        for add, step in zip(adds, path, strict=True):
            before = first - step.offset
            after = add.rows - before - least
            if step.stretch == best and before >= 0 <= after:
                others[shape(add.add)] = (before, after)
        found = tuple(others.get(shape(add.add)) for add in adds)
        return Chain(tuple(adds), found, self._roots(adds[0], found[0] or (0, 0)), rows_out)

    def _roots(self, first: Add, others: tuple[int, int]) -> tuple[fx.Node, ...]:
        axis = replace(guess_axis(first.add), before=others[0], after=others[1])
        ways = self._walk(first.stream_in, axis)
        return tuple(dict.fromkeys(at.node for at in ways if at.node.op == "placeholder"))


def _readers(node: fx.Node) -> list[fx.Node]:
    """The calls that read `node` first, or a part of it."""
    first = [user for user in node.users if user.op == "call_function" and user.args[0] is node]
    return [part for user in first for part in (user.users if isinstance(value(user), (list, tuple)) else [user])]


def _above(at: _At) -> list[tuple[fx.Node, Axis | None, int]]:
    """The operands that the rows at a node come from, the rows' axis in them, and the number of their first row."""
    node, axis = at.node, at.axis
    if axis is None:
        return [(operand, None, 0) for operand in _largest(node)]
    if node.target is aten.cat.default and axis.plain and axis.dim == cat_dim(node):
        return _parts(node, axis, at.start)
    try:
        wanted = narrowing(node, axis, 1).operands
    except NotTokenLocal:
        return [(operand, None, 0) for operand in _largest(node)]
    return [(operand, wanted[path], at.start) for path, operand in operands(node) if path in wanted]


def _parts(node: fx.Node, axis: Axis, start: int) -> list[tuple[fx.Node, Axis | None, int]]:
    """The operands of a join of tokens, each with those of the rows that it holds."""
    found: list[tuple[fx.Node, Axis | None, int]] = []
    low, high, offset = axis.before, axis.before + axis.count(shape(node)), 0
    for _, part in operands(node):
        size = shape(part)[axis.dim]
        first, last = max(low, offset), min(high, offset + size)
        if first < last:
            where = replace(axis, before=first - offset, after=offset + size - last)
            found.append((part, where, start + first - low))
        offset += size
    return found


def _largest(node: fx.Node) -> list[fx.Node]:
    """The operands with the most elements, parameters left out; what else a call takes is beside the tokens."""
    found = [operand for _, operand in operands(node) if operand.op != "get_attr"]
    sizes = {operand: _elements(operand) for operand in found}
    return [operand for operand in found if sizes[operand] == max(sizes.values())]


def _elements(node: fx.Node) -> int:
    val = value(node)
    found = [v for v in (val if isinstance(val, (list, tuple)) else [val]) if isinstance(v, torch.Tensor)]
    return sum(math.prod(map(size, v.shape)) for v in found)
