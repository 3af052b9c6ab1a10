"""Of a value some of whose tokens are updated, write those tokens alone."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

from tcc.passes.base import Pass
from tcc.passes.graph import emit, fake_mode_of, output_values, shape, value

__all__ = ["WriteRows"]

aten = torch.ops.aten


@dataclass(frozen=True)
class WriteRows(Pass):
    """Write the kept tokens of a value, in place of choosing between old and new for all of them.

    Before: `new = where(view(place >= 0, [1, n, 1]), index_select(rows, 1, clamp(place, 0)), old)`
    After:  `new = index_copy(old, 1, kept, rows)`

    What comes before is a copy, which a compiler leaves out where nobody else reads `old`: it writes the rows where
    they are. So two kinds of values are meant, and only sets that all samples share.

    1. `new` is stored in the slot `old` that has no other reader, such as keys and values.
    2. `new` is what the next block writes rows over, as where blocks keep fewer and fewer tokens. A compiler would
       choose between the rows of all blocks at the end of the run, and keep them until then.
    """

    def run(self, gm: fx.GraphModule) -> int:
        """Edit `gm`; see the class."""
        stores: tuple[str, ...] = gm.meta.get("stores", ())
        values = output_values(gm.graph)
        stored = dict(zip(values[len(values) - len(stores) :], stores, strict=True))
        edits = 0
        for new in [n for n in gm.graph.nodes if n.target is aten.where.self]:
            found = _rows(new)
            if found is None:
                continue
            rows, dim, place, old = found
            if not (_is_slot(old, stored.get(new)) or _is_written_over(new)):
                continue
            kept = _kept(gm.graph, place, shape(rows)[dim])
            with gm.graph.inserting_before(new):
                written = emit(gm.graph, aten.index_copy.default, (old, dim, kept, rows), like=new)
            new.replace_all_uses_with(written)
            edits += 1
        return edits


def _is_slot(old: fx.Node, slot: str | None) -> bool:
    return slot is not None and old.meta.get("slot") == slot and len(old.users) == 1


def _is_written_over(new: fx.Node) -> bool:
    """Whether nobody reads `new` but who writes other rows over it."""
    readers = [_rows(user) for user in new.users if user.target is aten.where.self]
    return len(new.users) == 1 and any(found is not None and found[-1] is new for found in readers)


def _rows(new: fx.Node) -> tuple[fx.Node, int, fx.Node, fx.Node] | None:
    """The rows that `new` has for some tokens, along which dimension, their places, and what it has for the others."""
    mask, spread, base = (_node(arg) for arg in new.args)
    if spread.target is not aten.index_select.default:
        return None
    rows, dim, clamped = _node(spread.args[0]), spread.args[1], _node(spread.args[2])
    is_kept = _node(mask.args[0]) if mask.target is aten.view.default else mask
    place = _node(clamped.args[0]) if clamped.target is aten.clamp.default else clamped
    named = str(place.meta.get("input", "")).startswith("place_")
    if not named or is_kept.target is not aten.ge.Scalar or is_kept.args[0] is not place:
        return None
    assert isinstance(dim, int)
    return rows, dim, place, base


def _node(arg: Any) -> fx.Node:
    assert isinstance(arg, fx.Node)
    return arg


def _kept(graph: fx.Graph, place: fx.Node, count: int) -> fx.Node:
    """The input with the kept positions of the set that `place` describes."""
    name = "kept_" + place.meta["input"].removeprefix("place_")
    node: fx.Node
    for node in graph.nodes:
        if node.meta.get("input") == name:
            return node
    with graph.inserting_after(place):
        node = graph.placeholder(name)
    with fake_mode_of(graph):
        node.meta["val"] = torch.empty(count, dtype=value(place).dtype, device=value(place).device)
    node.meta["input"] = name
    return node
