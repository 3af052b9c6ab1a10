"""Find what graphs repeat: stretches of calls that compute the same from other values."""

from __future__ import annotations

import functools
import hashlib
import operator
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import fx

from tcc.passes.fake_values import refresh_strides
from tcc.passes.graph import sized_by_data
from tcc.passes.macs import count
from tcc.passes.views import owner

__all__ = ["Stretch", "find_repeats", "inputs_of"]

_Numbers = np.ndarray[Any, np.dtype[np.int64]]
_Fingerprints = np.ndarray[Any, np.dtype[np.uint64]]
#: A length, and where stretches of that length begin.
_Repeat = tuple[int, list[int]]
#: Of a call, the value whose memory its own is in.
_Owner = Callable[[fx.Node], fx.Node]
#: Shorter stretches are left: calling them would cost more than their code.
SHORTEST = 12
#: MACs per element that goes in or out. Sparser stretches are left, to be fused with their neighbours.
SPARSEST = 16


@dataclass(frozen=True)
class Stretch:
    """Neighbouring calls.

    Attributes:
        nodes: the calls, in the graph's order.
        used: the calls whose values are used outside.
        outputs: what the stretch returns: those of `used` that own their memory, and the owners of the views.
        form: what is computed from the inputs: equal for copies.
    """

    nodes: tuple[fx.Node, ...]
    used: tuple[fx.Node, ...]
    outputs: tuple[fx.Node, ...]
    form: tuple[Any, ...]

    @property
    def name(self) -> str:
        """A name for what it computes: the same in every process, and of copies."""
        given = [_made(node.meta["val"]) for node in inputs_of(self.nodes)]
        return "repeated_" + hashlib.sha256(repr((self.form, given)).encode()).hexdigest()[:16]

    @property
    def width(self) -> int:
        """How many values go in and out, without weights."""
        return len(self.outputs) + sum(n.op != "get_attr" for n in inputs_of(self.nodes))

    @property
    def pays(self) -> bool:
        """Whether it can be a function of tensors, and computes so much that their way through memory costs nothing."""
        inputs = inputs_of(self.nodes)
        around = [*(n for n in inputs if n.op != "get_attr"), *self.outputs]
        tensors = all(isinstance(n.meta.get("val"), torch.Tensor) for n in (*inputs, *self.outputs))
        return tensors and count(self.nodes) >= SPARSEST * sum(n.meta["val"].numel() for n in around)


def find_repeats(graphs: Sequence[fx.Graph]) -> list[list[Stretch]]:
    """What is repeated within and between `graphs`; of each graph, in the order in which it was found.

    The stretch that covers most of the graphs is taken first. Where it follows itself it could begin anywhere: it
    begins where the fewest values go in and out, which is between two blocks. Strides are noted down anew in the
    graphs: of copies, all values must lie alike, or no code serves them all.
    """
    calls = list[fx.Node]()
    for graph in graphs:
        refresh_strides(graph)
        calls += [n for n in graph.nodes if n.op == "call_function"] + [graph.output_node()]  # nothing goes on in the next one
    owner_of = functools.cache(owner)  # it may call operators to see what they return
    alike = _numbered([_key(node) for node in calls])
    found: dict[fx.Graph, list[Stretch]] = {graph: [] for graph in graphs}
    at = {node: position for position, node in enumerate(calls)}
    while copies := _best(calls, alike, owner_of):
        for stretch in copies:
            found[stretch.nodes[0].graph].append(stretch)
            start, length = at[stretch.nodes[0]], len(stretch.nodes)
            alike[start : start + length] = alike.max() + 1 + np.arange(length)  # like nothing else
    return list(found.values())


def inputs_of(nodes: Sequence[fx.Node]) -> tuple[fx.Node, ...]:
    """The values from outside that `nodes` read, in the order of their first use."""
    inside = set(nodes)
    return tuple(dict.fromkeys(read for node in nodes for read in node.all_input_nodes if read not in inside))


def _key(node: fx.Node) -> object:
    """What a call does, whatever values it is given; the call itself if it is like no other, and stays."""
    vals = _flat(node.meta.get("val"))
    schema = getattr(node.target, "_schema", None)
    if (schema is None and node.target is not operator.getitem) or sized_by_data(node):
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


def _best(calls: Sequence[fx.Node], alike: _Numbers, owner_of: _Owner) -> list[Stretch]:
    """The copies of the stretch that saves the most calls, then has the fewest values in and out; or none."""
    by_bound: dict[int, list[_Repeat]] = defaultdict(list)
    for length, places in _repeats(alike):
        by_bound[length * (len(places) - 1)].append((length, places))
    saved, best = 0, list[Stretch]()
    for bound in sorted(by_bound, reverse=True):
        if bound <= saved:
            break
        firsts = [(_stretch(calls[at[0] : at[0] + length], owner_of), length, at) for length, at in by_bound[bound]]
        for first, length, places in sorted(firsts, key=lambda each: each[0].width):
            if bound > saved and first.pays:
                copies = _copies([calls[at : at + length] for at in places], owner_of)
                if length * (len(copies) - 1) > saved:
                    saved, best = length * (len(copies) - 1), copies
    return best


def _repeats(alike: _Numbers) -> Iterator[_Repeat]:
    """Stretches that look alike and do not overlap: those that save at least half as much as the best one before."""
    most = 2 * SHORTEST
    for length in sorted(_lengths(alike)) if len(alike) >= 2 * SHORTEST else ():
        prints = _fingerprints(alike, length)
        order = np.argsort(prints, kind="stable")
        in_order = prints[order]
        starts = np.flatnonzero(np.concatenate([[True], in_order[1:] != in_order[:-1]]))
        counts = np.diff(starts, append=len(order))
        for group in np.flatnonzero(length * (counts - 1) * 2 >= most):
            places = _apart(order[starts[group] : starts[group] + counts[group]].tolist(), length)
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


def _copies(stretches: Sequence[Sequence[fx.Node]], owner_of: _Owner) -> list[Stretch]:
    """The largest group that computes the same."""
    forms: dict[object, list[Stretch]] = defaultdict(list)
    for nodes in stretches:
        stretch = _stretch(nodes, owner_of)
        forms[stretch.form].append(stretch)
    return max(forms.values(), key=len, default=[])


def _stretch(nodes: Sequence[fx.Node], owner_of: _Owner) -> Stretch:
    inside = {node: position for position, node in enumerate(nodes)}
    outside: dict[fx.Node, int] = {}

    def named(node: fx.Node) -> str:
        return f"call {inside[node]}" if node in inside else f"input {outside.setdefault(node, len(outside))}"

    calls = tuple((node.target, repr(fx.map_arg((node.args, node.kwargs), named))) for node in nodes)
    used = tuple(node for node in nodes if any(user not in inside for user in node.users))
    outputs = tuple(dict.fromkeys(own for own in map(owner_of, used) if own in inside))
    return Stretch(tuple(nodes), used, outputs, (calls, tuple(inside[node] for node in used)))
