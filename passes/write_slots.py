"""Make the slots buffers that are written in place, for backends that run in this process."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

from tcc.passes.base import Pass
from tcc.passes.graph import emit, fake_mode_of, output_values, value
from tcc.passes.views import owner, viewed

__all__ = ["WriteSlots", "additions"]

aten = torch.ops.aten


@dataclass(frozen=True)
class WriteSlots(Pass):
    """Turn stored outputs into writes to the slot inputs; the outputs left are the model's own.

    Before: `return y, slot_a_new`
    After:  `copy_(slot_a, slot_a_new); return y`

    1. Older values of a history are written before the newer ones that they are read from. They also come first among
       the inputs: AOTAutograd writes mutated inputs in that order, whatever the order of the calls.
    2. A model output that is a slot itself or what is computed once per run, or a view of one, is cloned: the next step
       or run would overwrite it.
    3. A value is written as soon as it exists and nobody reads the old one any more, so that it is not kept twice.
    4. A sum is added up in the slot: `slot <- a + b + c` becomes `copy_(slot, a); add_(slot, b); add_(slot, c)`, where
       nobody else reads it. (Backends that make the graph functional first undo this.)
    """

    def run(self, gm: fx.GraphModule) -> int:
        """Edit `gm`; see the class."""
        stores: tuple[str, ...] = gm.meta.get("stores", ())
        values = output_values(gm.graph)
        own = values[: len(values) - len(stores)]
        output = gm.graph.output_node()
        with gm.graph.inserting_before(output):
            own, edits = _without_aliases(gm.graph, own)
        pairs = dict(zip(stores, values[len(own) :], strict=True))
        ages = {name: _age(name, pairs) for name in pairs}
        for name in sorted(pairs, key=ages.__getitem__, reverse=True):
            sums = additions(pairs[name]) if values.count(pairs[name]) == 1 else []
            _write(gm.graph, _slot(gm.graph, name, pairs[name]), pairs[name], sums)
        if edits or stores:
            output.args = (tuple(own),)
            gm.meta["stores"] = ()
        if any(ages.values()):
            _oldest_first(gm.graph, ages)
        return edits + len(stores)


def _write(graph: fx.Graph, slot: fx.Node, val: fx.Node, sums: Sequence[fx.Node]) -> None:
    """Write `val` to the slot: at once, or addition by addition of `sums`."""
    last, todo = slot, [slot]
    while todo:  # what reads the slot, or a view of it, comes first
        node = todo.pop()
        for user in (user for user in node.users if user.op != "output"):
            last = max(last, user)
            if viewed(user) is node:
                todo.append(user)
    sums = sums if sums and last < sums[0] else ()
    first = sums[0].all_input_nodes[0] if sums else val
    last = max(last, first)
    if last.op == "placeholder":
        last = [n for n in graph.nodes if n.op == "placeholder"][-1]
    with graph.inserting_after(last):
        emit(graph, aten.copy_.default, (slot, first))
    for add in sums:
        with graph.inserting_before(add):
            emit(graph, aten.add_.Tensor, (slot, add.args[1]))


def additions(val: fx.Node) -> list[fx.Node]:
    """The additions that `val` is made by, first to last, each of which is read by the next one alone."""
    found: list[fx.Node] = []
    while val.target is aten.add.Tensor and not val.kwargs and len(val.users) == 1:
        if not all(isinstance(term, fx.Node) and _made(term) == _made(val) for term in val.args):
            break
        found.append(val)
        val = val.args[0]  # type: ignore[assignment]
    return found[::-1]


def _made(node: fx.Node) -> tuple[torch.Size, torch.dtype]:
    return value(node).shape, value(node).dtype


def _age(name: str, pairs: Mapping[str, fx.Node]) -> int:
    """How many slots hand their old values on to `name`, one to the next; slots that share a buffer share its name."""
    age = 0
    read: Any = pairs[name].meta.get("slot")
    while read in pairs and age < len(pairs):
        age, read = age + 1, pairs[read].meta.get("slot")
    return age


def _oldest_first(graph: fx.Graph, ages: Mapping[str, int]) -> None:
    inputs = [n for n in graph.nodes if n.op == "placeholder"]
    last = inputs[-1]
    for node in sorted(
        (n for n in inputs if "slot" in n.meta), key=lambda n: ages.get(n.meta["slot"], 0), reverse=True
    ):
        if node is not last:
            last.append(node)
        last = node


def _without_aliases(graph: fx.Graph, values: tuple[fx.Node, ...]) -> tuple[tuple[fx.Node, ...], int]:
    new = tuple(
        emit(graph, aten.clone.default, (val,)) if isinstance(val, fx.Node) and "input" in owner(val).meta else val
        for val in values
    )
    return new, sum(a is not b for a, b in zip(new, values, strict=True))


def _slot(graph: fx.Graph, name: str, val: fx.Node) -> fx.Node:
    node: fx.Node
    for node in graph.nodes:
        if node.meta.get("slot") == name:
            return node
    last = [n for n in graph.nodes if n.op == "placeholder"][-1]
    with graph.inserting_after(last):
        node = graph.placeholder("slot_" + "".join(c if c.isalnum() else "_" for c in name))
    with fake_mode_of(graph):
        like = value(val)
        node.meta["val"] = torch.empty(tuple(like.shape), dtype=like.dtype, device=like.device)
    node.meta |= {"slot": name, "input": f"slot:{name}"}
    return node
