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

__all__ = ["Stretch", "digest", "find_repeats", "has_plain_values", "inputs_of"]

_Numbers = np.ndarray[Any, np.dtype[np.int64]]
_Fingerprints = np.ndarray[Any, np.dtype[np.uint64]]
#: A length, and where stretches of that length begin.
_Repeat = tuple[int, list[int]]
#: What is computed from what, and what of it is read outside; equal for stretches that compute the same.
_Form = tuple[Any, ...]
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
        name: says what is computed: of copies the same, in every process, and of all else another.
    """

    nodes: tuple[fx.Node, ...]
    used: tuple[fx.Node, ...]
    outputs: tuple[fx.Node, ...]
    name: str


def find_repeats(graphs: Sequence[fx.Graph]) -> list[list[Stretch]]:
    """What is repeated within and between `graphs`; of each graph, in the order in which it was found.

    The stretch that covers most of the graphs is taken first. Where it follows itself it could begin anywhere: it
    begins where the fewest values go in and out, which is between two blocks. Strides are noted down anew in the
    graphs: of copies, all values must lie alike, or no code serves them all.
    """
    for graph in graphs:
        refresh_strides(graph)
    calls = _Calls(graphs)
    found: dict[fx.Graph, list[Stretch]] = {graph: [] for graph in graphs}
    while best := calls.best():
        for stretch in calls.take(*best):
            found[stretch.nodes[0].graph].append(stretch)
    return list(found.values())


def inputs_of(nodes: Sequence[fx.Node]) -> tuple[fx.Node, ...]:
    """The values from outside that `nodes` read, in the order of their first use."""
    inside = set(nodes)
    return tuple(dict.fromkeys(read for node in nodes for read in node.all_input_nodes if read not in inside))


def digest(nodes: Sequence[fx.Node]) -> str:
    """Says what neighbouring calls compute: of copies the same, in every process, and of all else another."""
    inside, outside = {node: place for place, node in enumerate(nodes)}, dict[fx.Node, int]()

    def number(read: fx.Node) -> int:
        return inside[read] if read in inside else -1 - outside.setdefault(read, len(outside))

    calls = [
        (_done(node), [number(read) for read in _operands(node)], any(user not in inside for user in node.users))
        for node in nodes
    ]
    return hashlib.sha256(repr(calls).encode()).hexdigest()[:16]


def has_plain_values(node: fx.Node) -> bool:
    """Whether all that `node` makes and reads are tensors of known sizes, which are as they lie in memory."""
    return not sized_by_data(node) and all(map(_is_plain, (node, *node.all_input_nodes)))


class _Calls:
    """The calls of all graphs in a row, those that are not taken yet.

    Args:
        graphs: the graphs. After the calls of each stands its output, so that nothing goes on in the next one.
    """

    def __init__(self, graphs: Sequence[fx.Graph]) -> None:
        self._nodes = [n for graph in graphs for n in graph.nodes if n.op in ("call_function", "output")]
        self._alike = _numbered([_key(node) for node in self._nodes])
        numbers = {node: number for number, node in enumerate(self._nodes)}
        others = (node for graph in graphs for node in graph.nodes if node not in numbers)
        numbers |= {node: number for number, node in enumerate(others, start=len(numbers))}
        self._read = [[numbers[read] for read in _operands(node)] for node in self._nodes]
        last = [max((numbers[user] for user in node.users), default=-1) for node in self._nodes]
        self._last_read: _Numbers = np.array(last, dtype=np.int64)
        self._owner: Callable[[fx.Node], fx.Node] = functools.cache(owner)  # may call operators to see what they return

    def best(self) -> _Repeat | None:
        """The copies of the stretch that saves the most calls, then has the fewest values in and out; or none."""
        by_bound: dict[int, list[_Repeat]] = defaultdict(list)
        for length, places in _repeats(self._alike):
            by_bound[length * (len(places) - 1)].append((length, places))
        saved, best = 0, None
        for bound in sorted(by_bound, reverse=True):
            if bound <= saved:
                break
            for length, places in sorted(by_bound[bound], key=lambda each: self._width(each[1][0], each[0])):
                copies = self._copies(length, places) if bound > saved else []
                if length * (len(copies) - 1) > saved and self._pays(copies[0], length):
                    saved, best = length * (len(copies) - 1), (length, copies)
        return best

    def take(self, length: int, places: Sequence[int]) -> list[Stretch]:
        """The stretches there, which compute the same; from now on they are like nothing else."""
        name = f"repeated_{digest(self._nodes[places[0] : places[0] + length])}"
        numbers = int(self._alike.max()) + 1 + np.arange(length * len(places))
        for at, fresh in zip(places, numbers.reshape(len(places), length), strict=True):
            self._alike[at : at + length] = fresh
        return [
            Stretch(tuple(self._nodes[at : at + length]), self._used(at, length), self._outputs(at, length), name)
            for at in places
        ]

    def _copies(self, length: int, places: Sequence[int]) -> list[int]:
        """The largest group that computes the same."""
        alike: dict[_Form, list[int]] = defaultdict(list)
        for at in places:
            alike[self._alike[at : at + length].tobytes(), self._form(at, length)].append(at)
        return max(alike.values(), key=len)

    def _form(self, at: int, length: int) -> _Form:
        """What is read by whom: calls of the stretch by their places, values from outside by the order of first use."""
        outside: dict[int, int] = {}
        read = tuple(
            number - at if at <= number < at + length else -1 - outside.setdefault(number, len(outside))
            for reads in self._read[at : at + length]
            for number in reads
        )
        return read, tuple(self._places_used(at, length))

    def _places_used(self, at: int, length: int) -> list[int]:
        """Which calls of the stretch are read outside."""
        places: list[int] = np.flatnonzero(self._last_read[at : at + length] >= at + length).tolist()
        return places

    def _used(self, at: int, length: int) -> tuple[fx.Node, ...]:
        return tuple(self._nodes[at + place] for place in self._places_used(at, length))

    def _outputs(self, at: int, length: int) -> tuple[fx.Node, ...]:
        inside = set(self._nodes[at : at + length])
        return tuple(dict.fromkeys(own for own in map(self._owner, self._used(at, length)) if own in inside))

    def _around(self, at: int, length: int) -> list[fx.Node]:
        """The values that go in, without weights, and those that come out."""
        inputs = inputs_of(self._nodes[at : at + length])
        return [*(node for node in inputs if node.op != "get_attr"), *self._outputs(at, length)]

    def _width(self, at: int, length: int) -> int:
        return len(self._around(at, length))

    def _pays(self, at: int, length: int) -> bool:
        """Whether it can be a function of tensors, and computes so much that their way through memory costs nothing."""
        nodes, around = self._nodes[at : at + length], self._around(at, length)
        tensors = all(isinstance(n.meta.get("val"), torch.Tensor) for n in (*inputs_of(nodes), *around))
        return tensors and count(nodes) >= SPARSEST * sum(node.meta["val"].numel() for node in around)


def _key(node: fx.Node) -> object:
    """What a call does, whatever values it is given; the call itself if it is like no other, and stays."""
    schema = getattr(node.target, "_schema", None)
    if schema.is_mutable if schema is not None else node.target is not operator.getitem:
        return node
    return _done(node) if has_plain_values(node) else node


def _done(node: fx.Node) -> object:
    """What a call of plain values does, whichever they are."""
    args = fx.map_arg((node.args, node.kwargs), lambda n: repr(_made(n)))
    return (node.target, repr(args), _made(node))


def _operands(node: fx.Node) -> list[fx.Node]:
    """The values that a call reads, one as often as it is named."""
    read: list[fx.Node] = []
    fx.map_arg((node.args, node.kwargs), read.append)
    return read


def _vals(node: fx.Node) -> Sequence[Any]:
    val = node.meta.get("val")
    return val if isinstance(val, (tuple, list)) else (val,)


def _is_plain(node: fx.Node) -> bool:
    """Whether its values are tensors that are as they lie in memory."""
    return all(isinstance(val, torch.Tensor) and not (val.is_conj() or val.is_neg()) for val in _vals(node))


def _made(node: fx.Node) -> object:
    return tuple((tuple(val.shape), val.stride(), val.dtype, val.device) for val in _vals(node))


def _numbered(keys: Sequence[object]) -> _Numbers:
    numbers: dict[object, int] = {}
    return np.array([numbers.setdefault(key, len(numbers)) for key in keys], dtype=np.int64)


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
