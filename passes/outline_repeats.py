"""Make one sub-graph of what a graph repeats, so that a compiler generates its code once."""

from __future__ import annotations

import operator
from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import fx

from tcc.passes.base import Pass
from tcc.passes.fake_values import refresh_strides
from tcc.passes.macs import count
from tcc.passes.views import owner

__all__ = ["OutlineRepeats"]

_Numbers = np.ndarray[Any, np.dtype[np.int64]]
_Fingerprints = np.ndarray[Any, np.dtype[np.uint64]]
#: A length, and where stretches of that length begin.
_Repeat = tuple[int, list[int]]
#: Of every call, the value whose memory its own is in.
_Owners = dict[fx.Node, fx.Node]
invoke_subgraph = torch.ops.higher_order.invoke_subgraph
#: Shorter stretches are left: calling them would cost more than their code.
SHORTEST = 12
#: MACs per element that goes in or out. Sparser stretches are left, to be fused with their neighbours.
SPARSEST = 16


@dataclass(frozen=True)
class OutlineRepeats(Pass):
    """Replace all copies of a stretch of calls, as the blocks of a transformer are, by calls of one sub-graph.

    Before: `a1 = f(x, w1); b1 = g(a1); a2 = f(b1, w2); b2 = g(a2)`
    After:  `b1 = sub(x, w1); b2 = sub(b1, w2)`

    Copies differ in nothing but the values that they are given. The stretch that covers most of the graph is taken
    first. Where it follows itself it could begin anywhere: it begins where the fewest values go in and out, which is
    between two blocks.
    """

    def run(self, gm: fx.GraphModule) -> int:
        """Edit `gm`; see the class."""
        refresh_strides(gm.graph)  # of copies, all values must lie alike, or no code serves them all
        calls = [n for n in gm.graph.nodes if n.op == "call_function"]
        alike, number = _numbered([_key(n) for n in calls]), 0
        owners = {node: owner(node) for node in calls}  # once: it may call operators to see what they return
        while copies := _best(calls, alike, owners):
            name = f"repeated_{number}"
            gm.add_submodule(name, _sub_graph(gm, copies[0]))
            for segment in copies:
                at = calls.index(segment.nodes[0])
                calls[at : at + len(segment.nodes)] = [_call(gm.graph, name, segment.nodes, owners)]
            alike, number = _numbered([_key(n) for n in calls]), number + 1
        return number


@dataclass(frozen=True)
class _Segment:
    """Neighbouring calls.

    Attributes:
        nodes: the calls, in the graph's order.
        inputs: the values from outside, in the order of their first use.
        used: the calls whose values are used outside.
        outputs: what the segment returns: those of `used` that own their memory, and the owners of the views.
        form: what is computed from the inputs: equal for copies.
    """

    nodes: tuple[fx.Node, ...]
    inputs: tuple[fx.Node, ...]
    used: tuple[fx.Node, ...]
    outputs: tuple[fx.Node, ...]
    form: tuple[Any, ...]

    @property
    def width(self) -> int:
        """How many values go in and out, without weights."""
        return len(self.outputs) + sum(n.op != "get_attr" for n in self.inputs)

    @property
    def pays(self) -> bool:
        """Whether it can be a function of tensors, and computes so much that their way through memory costs nothing."""
        around = [*(n for n in self.inputs if n.op != "get_attr"), *self.outputs]
        tensors = all(isinstance(n.meta.get("val"), torch.Tensor) for n in (*self.inputs, *self.outputs))
        return tensors and count(self.nodes) >= SPARSEST * sum(n.meta["val"].numel() for n in around)


def _key(node: fx.Node) -> object:
    """What a call does, whatever values it is given; the call itself if it is like no other, and stays."""
    vals = _flat(node.meta.get("val"))
    schema = getattr(node.target, "_schema", None)
    if schema is None and node.target is not operator.getitem:
        return node
    if (schema is not None and schema.is_mutable) or not all(isinstance(v, torch.Tensor) for v in vals):
        return node
    args = fx.map_arg((node.args, node.kwargs), lambda n: repr([_made(v) for v in _flat(n.meta.get("val"))]))
    return (node.target, repr(args), tuple(_made(v) for v in vals))


def _flat(val: Any) -> Sequence[Any]:
    return val if isinstance(val, (tuple, list)) else (val,)


def _made(val: Any) -> object:
    return (tuple(val.shape), val.stride(), val.dtype, val.device) if isinstance(val, torch.Tensor) else val


def _numbered(keys: Sequence[object]) -> _Numbers:
    numbers: dict[object, int] = {}
    return np.array([numbers.setdefault(key, len(numbers)) for key in keys], dtype=np.int64)


def _best(calls: Sequence[fx.Node], alike: _Numbers, owners: _Owners) -> list[_Segment]:
    """The copies of the stretch that saves the most calls, then has the fewest values in and out; or none."""
    by_bound: dict[int, list[_Repeat]] = defaultdict(list)
    for length, places in _repeats(alike):
        by_bound[length * (len(places) - 1)].append((length, places))
    saved, best = 0, list[_Segment]()
    for bound in sorted(by_bound, reverse=True):
        if bound <= saved:
            break
        firsts = [(_segment(calls[at[0] : at[0] + length], owners), length, at) for length, at in by_bound[bound]]
        for first, length, places in sorted(firsts, key=lambda each: each[0].width):
            if bound > saved and first.pays:
                copies = _copies([calls[at : at + length] for at in places], owners)
                if length * (len(copies) - 1) > saved:
                    saved, best = length * (len(copies) - 1), copies
    return best


def _repeats(alike: _Numbers) -> Iterator[_Repeat]:
    """Stretches that look alike and do not overlap: those that save at least half as much as the best one before."""
    most = 2 * SHORTEST
    for length in sorted(_lengths(alike)) if len(alike) >= 2 * SHORTEST else ():
        _, number, counts = np.unique(_fingerprints(alike, length), return_inverse=True, return_counts=True)
        starts = np.split(np.argsort(number, kind="stable"), np.cumsum(counts)[:-1])
        for group in np.flatnonzero(length * (counts - 1) * 2 >= most):
            places = _apart(starts[group].tolist(), length)
            if (saved := length * (len(places) - 1)) * 2 >= most:
                most = max(most, saved)
                yield length, places


def _lengths(alike: _Numbers) -> set[int]:
    """How long stretches can be: as far as two neighbouring ones go on alike, and do not overlap."""
    found: dict[int, int] = {}
    lengths = set()
    for at, seed in enumerate(_fingerprints(alike, SHORTEST).tolist()):
        if (before := found.get(seed)) is not None:
            apart = (at - before) * -(-SHORTEST // (at - before))  # several turns of what turns fast
            ahead = np.full(apart, -1)
            ahead[: len(alike) - at] = alike[at : at + apart]
            differ = np.flatnonzero(alike[before : before + apart] != ahead)
            lengths.add(int(differ[0]) if len(differ) else apart)
        found[seed] = at
    return lengths


def _fingerprints(alike: _Numbers, length: int) -> _Fingerprints:
    """A number for every stretch of that length: equal for equal ones (and, hardly ever, for others)."""
    base, inverse = 0x9E3779B97F4A7C15, pow(0x9E3779B97F4A7C15, -1, 2**64)
    powers = np.cumprod(np.full(len(alike), base, dtype=np.uint64))
    sums = np.concatenate([np.zeros(1, dtype=np.uint64), np.cumsum((alike.astype(np.uint64) + 1) * powers)])
    shifts = np.cumprod(np.full(len(sums) - length, inverse, dtype=np.uint64))
    return np.asarray((sums[length:] - sums[:-length]) * shifts, dtype=np.uint64)


def _apart(places: Sequence[int], length: int) -> list[int]:
    """Of places in order, those that are at least `length` apart, from the first."""
    kept: list[int] = []
    for at in places:
        if not kept or at - kept[-1] >= length:
            kept.append(at)
    return kept


def _copies(stretches: Sequence[Sequence[fx.Node]], owners: _Owners) -> list[_Segment]:
    """The largest group that computes the same."""
    forms: dict[object, list[_Segment]] = defaultdict(list)
    for nodes in stretches:
        segment = _segment(nodes, owners)
        forms[segment.form].append(segment)
    return max(forms.values(), key=len, default=[])


def _segment(nodes: Sequence[fx.Node], owners: _Owners) -> _Segment:
    inside = {node: position for position, node in enumerate(nodes)}
    outside: dict[fx.Node, int] = {}

    def named(node: fx.Node) -> str:
        return f"call {inside[node]}" if node in inside else f"input {outside.setdefault(node, len(outside))}"

    calls = tuple((node.target, repr(fx.map_arg((node.args, node.kwargs), named))) for node in nodes)
    used = tuple(node for node in nodes if any(user not in inside for user in node.users))
    outputs = tuple(dict.fromkeys(own for own in map(owners.__getitem__, used) if own in inside))
    form = (calls, tuple(inside[node] for node in used))
    return _Segment(tuple(nodes), tuple(outside), used, outputs, form)


def _sub_graph(gm: fx.GraphModule, segment: _Segment) -> fx.GraphModule:
    graph = fx.Graph()
    made: dict[fx.Node, fx.Node] = {}
    for number, node in enumerate(segment.inputs):
        made[node] = graph.placeholder(f"input_{number}")
        made[node].meta["val"] = node.meta["val"]
    for node in segment.nodes:
        made[node] = graph.node_copy(node, made.__getitem__)
    graph.output(tuple(made[node] for node in segment.outputs))
    return fx.GraphModule(gm, graph)


def _call(graph: fx.Graph, name: str, nodes: Sequence[fx.Node], owners: _Owners) -> fx.Node:
    """Replace the calls by one of the sub-graph; returns it."""
    segment = _segment(nodes, owners)  # anew: what it is given may have been replaced by a call meanwhile
    inside = set(nodes)
    with graph.inserting_after(nodes[-1]):
        call = graph.create_node("call_function", invoke_subgraph, ())
    with graph.inserting_before(call):
        sub = graph.get_attr(name)
        sub.meta["val"] = getattr(graph.owning_module, name)
        call.args = (sub, name, *segment.inputs)
    call.meta["val"] = tuple(node.meta["val"] for node in segment.outputs)
    made: dict[fx.Node, fx.Node] = {}
    with graph.inserting_before(call.next):
        for number, node in enumerate(segment.outputs):
            made[node] = graph.call_function(operator.getitem, (call, number))
            made[node].meta["val"] = node.meta["val"]

        def outside(node: fx.Node) -> fx.Node:
            if node in inside and node not in made:  # a view: of a result, or of what the segment was given
                made[node] = graph.node_copy(node, outside)
            return made.get(node, node)

        for node in segment.used:
            node.replace_all_uses_with(outside(node), delete_user_cb=lambda user: user not in inside)
    for node in reversed(nodes):
        graph.erase_node(node)
    owners[call] = call
    return call
