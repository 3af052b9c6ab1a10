"""Find the residual stream of a captured graph, its blocks and its branches, from dataflow alone.

A *residual add* is an add whose one operand, the stream, is an ancestor of the other, the branch. The stream is the
longest run of residual adds of one shape in which each add depends on the one before it. Adds made by the same block
(the module path up to its last number) form a block. Between two blocks something else may make the stream anew, such
as a linear map of the stream and of an earlier one: the latter is a long skip. No class is known by name.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise

import networkx as nx
import torch
from torch import fx

from tcc.errors import AnalysisError
from tcc.passes.graph import module_path, shape, value
from tcc.passes.macs import node_macs

__all__ = ["Block", "Branch", "Dataflow", "Skip", "Stream", "find_stream"]

aten = torch.ops.aten


class Dataflow:
    """Who depends on whom in a graph, as bit sets over the graph's order."""

    def __init__(self, graph: fx.Graph) -> None:
        self.nodes = list(graph.nodes)
        self.index = {node: i for i, node in enumerate(self.nodes)}
        self._above = [0] * len(self.nodes)
        for i, node in enumerate(self.nodes):
            for source in node.all_input_nodes:
                j = self.index[source]
                self._above[i] |= self._above[j] | (1 << j)

    def depends(self, node: fx.Node, on: fx.Node) -> bool:
        """Whether `node` is computed from `on` (a node does not depend on itself)."""
        return bool(self._above[self.index[node]] >> self.index[on] & 1)

    def between(self, source: fx.Node, targets: Iterable[fx.Node]) -> list[fx.Node]:
        """The nodes computed from `source` that `targets` are computed from, `targets` included, in order."""
        above = 0
        for target in targets:
            above |= self._above[self.index[target]] | (1 << self.index[target])
        return [n for i, n in enumerate(self.nodes) if above >> i & 1 and self.depends(n, source)]


@dataclass(frozen=True)
class Branch:
    """One residual branch: `out = stream_in + delta`.

    Attributes:
        kind: `attn`, `cross` or `mlp`.
        add: the residual add.
        stream_in: the add's stream operand.
        origin: the stream value that the branch reads (`stream_in`, or an earlier one for parallel branches).
        delta: the add's branch operand, after the gate.
        out: the branch's output before its gate; `delta` where there is none.
        nodes: the nodes that are computed for this branch alone.
        attention: its attention nodes.
    """

    kind: str
    add: fx.Node
    stream_in: fx.Node
    origin: fx.Node
    delta: fx.Node
    out: fx.Node
    nodes: tuple[fx.Node, ...]
    attention: tuple[fx.Node, ...]


@dataclass(frozen=True)
class Skip:
    """A long skip: an earlier value of the stream that enters again between two blocks.

    Attributes:
        value: what enters, of the stream's shape.
        reader: the node that takes it in.
        beside: the operand of `reader` that comes from the block before, of the stream's shape; None if there is none.
    """

    value: fx.Node
    reader: fx.Node
    beside: fx.Node | None


@dataclass(frozen=True)
class Block:
    """A transformer block: consecutive branches on the stream, under one name, and the long skips that enter it."""

    name: str
    branches: tuple[tuple[str, Branch], ...]
    skips: tuple[Skip, ...] = ()

    @property
    def entry(self) -> fx.Node:
        """The stream entering the block, before any long skip is joined to it, `[B, S, D]`."""
        beside = self.skips[0].beside if self.skips else None
        return self.stream_in if beside is None else beside

    @property
    def stream_in(self) -> fx.Node:
        """The stream that the first branch is added to, after all long skips, `[B, S, D]`."""
        return self.branches[0][1].stream_in

    @property
    def stream_out(self) -> fx.Node:
        """The stream leaving the block, `[B, S, D]`."""
        return self.branches[-1][1].add

    @property
    def continuous(self) -> bool:
        """Whether nothing but the branches changes the stream inside the block."""
        parts = [branch for _, branch in self.branches]
        return all(b.stream_in is a.add for a, b in pairwise(parts))


@dataclass(frozen=True)
class Stream:
    """The residual stream and its blocks, in order."""

    shape: tuple[int, ...]
    blocks: tuple[Block, ...]


def find_stream(graph: fx.Graph) -> Stream:
    """The residual stream of `graph`.

    Raises:
        AnalysisError: no chain of at least two residual adds around matrix products exists.
    """
    flow = Dataflow(graph)
    adds = [found for node in graph.nodes if (found := _residual_add(node, flow)) is not None]
    chain = _longest_chain(adds, flow)
    if len(chain) < 2:
        raise AnalysisError(
            "no residual stream found: tcc looks for a chain of `x = x + f(x)` with matrix products in f and one "
            f"shape throughout, and found {len(chain)} such add(s) in {len(flow.nodes)} graph nodes. "
            "Check that the whole model was captured and that its blocks add to their input"
        )
    branches = _branches(chain, flow)
    return Stream(shape(chain[0].add), _with_skips(_blocks(branches), flow))


@dataclass(frozen=True)
class _Add:
    add: fx.Node
    stream_in: fx.Node
    delta: fx.Node


def _residual_add(node: fx.Node, flow: Dataflow) -> _Add | None:
    if node.target is not aten.add.Tensor or node.kwargs.get("alpha", 1) != 1:
        return None
    a, b = node.args[0], node.args[1]
    if not (isinstance(a, fx.Node) and isinstance(b, fx.Node)) or not shape(node) == shape(a) == shape(b):
        return None
    if len(shape(node)) < 2 or not value(node).dtype.is_floating_point:
        return None
    for stream_in, delta in ((a, b), (b, a)):
        if flow.depends(delta, stream_in) and _has_product(flow.between(stream_in, [delta])):
            return _Add(node, stream_in, delta)
    return _parallel_add(node, a, b, flow)


def _parallel_add(node: fx.Node, a: fx.Node, b: fx.Node, flow: Dataflow) -> _Add | None:
    """`(x + f(x)) + g(x)`: the second branch reads the stream before the first add."""
    for stream_in, delta in ((a, b), (b, a)):
        if stream_in.target is aten.add.Tensor:
            for earlier in stream_in.all_input_nodes:
                if (
                    shape(earlier) == shape(node)
                    and all(flow.depends(other, earlier) for other in (delta, stream_in))
                    and any(flow.depends(o, earlier) for o in stream_in.all_input_nodes if o is not earlier)
                    and _has_product(flow.between(earlier, [delta]))
                ):
                    return _Add(node, stream_in, delta)
    return None


def _has_product(nodes: Iterable[fx.Node]) -> bool:
    return any(node_macs(node) for node in nodes)


def _longest_chain(adds: Sequence[_Add], flow: Dataflow) -> list[_Add]:
    """The longest sequence of adds of one shape in which each one's stream comes from the add before."""
    order = nx.DiGraph()
    order.add_nodes_from(range(len(adds)))
    for j, later in enumerate(adds):
        for i, earlier in enumerate(adds[:j]):
            if shape(earlier.add) != shape(later.add):
                continue
            if later.stream_in is earlier.add or flow.depends(later.stream_in, earlier.add):
                order.add_edge(i, j)
    return [adds[i] for i in nx.dag_longest_path(order)]


def _branches(chain: Sequence[_Add], flow: Dataflow) -> list[Branch]:
    streams = [chain[0].stream_in]
    found = []
    for item in chain:
        if item.stream_in is not streams[-1]:
            streams.append(item.stream_in)
        origin = next(s for s in reversed(streams) if flow.depends(item.delta, s))
        nodes = tuple(flow.between(origin, [item.delta]))
        found.append(_branch(item, origin, nodes, flow))
        streams.append(item.add)
    return found


def _branch(item: _Add, origin: fx.Node, nodes: tuple[fx.Node, ...], flow: Dataflow) -> Branch:
    attention = tuple(n for n in nodes if n.target is aten.scaled_dot_product_attention.default)
    own = [n for n in attention if flow.depends(_operand(n, 1), origin)]
    kind = "attn" if own else ("cross" if attention else "mlp")
    out = _before_gate(item.delta, origin, flow)
    return Branch(kind, item.add, item.stream_in, origin, item.delta, out, nodes, attention)


def _operand(node: fx.Node, position: int) -> fx.Node:
    found = node.args[position]
    assert isinstance(found, fx.Node)
    return found


def _before_gate(delta: fx.Node, origin: fx.Node, flow: Dataflow) -> fx.Node:
    """The factor of `delta = gate * out` that comes from the stream, where the gate is the same for all tokens."""
    if delta.target is not aten.mul.Tensor:
        return delta
    for gate, out in (delta.args, delta.args[::-1]):
        if not (isinstance(gate, fx.Node) and isinstance(out, fx.Node)):
            continue
        if flow.depends(out, origin) and not flow.depends(gate, origin) and shape(out) == shape(delta):
            return out
    return delta


def _blocks(branches: Sequence[Branch]) -> tuple[Block, ...]:
    """Group branches by module path; where one module holds all of them, a block starts at each attention."""
    groups: list[tuple[str, list[Branch]]] = []
    for branch in branches:
        path = _block_path(module_path(branch.add))
        same = bool(groups) and groups[-1][0] == path
        if same and (_numbered(path) or branch.kind != "attn"):
            groups[-1][1].append(branch)
        else:
            groups.append((path, [branch]))
    names = _unique([path for path, _ in groups])
    return tuple(Block(name, _named(parts)) for name, (_, parts) in zip(names, groups, strict=True))


def _with_skips(blocks: Sequence[Block], flow: Dataflow) -> tuple[Block, ...]:
    """Find the long skips of every block: what enters between it and the block before, and is not from that block."""
    first, found = blocks[0].stream_in, [blocks[0]]
    for before, block in pairwise(blocks):
        way = [before.stream_out, *flow.between(before.stream_out, [block.stream_in])]
        skips = [
            Skip(entering, reader, next((n for n in reader.all_input_nodes if n in way and _alike(n, first)), None))
            for reader in way[1:]
            for entering in reader.all_input_nodes
            if entering not in way and _alike(entering, first) and (entering is first or flow.depends(entering, first))
        ]
        found.append(replace(block, skips=tuple(skips)))
    return tuple(found)


def _alike(a: fx.Node, b: fx.Node) -> bool:
    return shape(a) == shape(b)


def _block_path(path: str) -> str:
    """`path` up to its last number: `blocks.3.attn` -> `blocks.3`."""
    parts = path.split(".")
    last = max((i for i, part in enumerate(parts) if part.isdigit()), default=None)
    return path if last is None else ".".join(parts[: last + 1])


def _numbered(path: str) -> bool:
    return path.rsplit(".", 1)[-1].isdigit()


def _unique(paths: Sequence[str]) -> list[str]:
    if len(set(paths)) == len(paths) and all(paths):
        return list(paths)
    return [f"{path}.block{i}" if path else f"block{i}" for i, path in enumerate(paths)]


def _named(parts: Sequence[Branch]) -> tuple[tuple[str, Branch], ...]:
    seen: dict[str, int] = {}
    named = []
    for branch in parts:
        seen[branch.kind] = seen.get(branch.kind, 0) + 1
        number = seen[branch.kind]
        named.append((branch.kind if number == 1 else f"{branch.kind}{number}", branch))
    return tuple(named)
