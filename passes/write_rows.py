"""Of a slot some of whose tokens are updated, write those tokens alone."""

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
    """Write the kept tokens of a slot, in place of choosing between old and new for all of them.

    Before: `new = where(view(place >= 0, [1, n, 1]), index_select(rows, 1, clamp(place, 0)), slot)`, stored in `slot`
    After:  `new = index_copy(slot, 1, kept, rows)`, stored in `slot`

    What comes before the store is a copy, which a compiler leaves out: it writes the rows where they are stored. So
    only slots with no other reader are meant, such as keys and values, and only sets that all samples share.
    """

    def run(self, gm: fx.GraphModule) -> int:
        """Edit `gm`; see the class."""
        stores: tuple[str, ...] = gm.meta.get("stores", ())
        values = output_values(gm.graph)
        edits = 0
        for slot, new in zip(stores, values[len(values) - len(stores) :], strict=True):
            found = _rows(new, slot)
            if found is None:
                continue
            rows, dim, place = found
            kept = _kept(gm.graph, place, shape(rows)[dim])
            with gm.graph.inserting_before(new):
                written = emit(gm.graph, aten.index_copy.default, (new.args[2], dim, kept, rows), like=new)
            new.replace_all_uses_with(written)
            edits += 1
        return edits


def _rows(new: fx.Node, slot: str) -> tuple[fx.Node, int, fx.Node] | None:
    """The rows that `new` has in place of some of the old value of `slot`, along which dimension, and their places."""
    if new.target is not aten.where.self:
        return None
    mask, spread, base = (_node(arg) for arg in new.args)
    if base.meta.get("slot") != slot or len(base.users) != 1 or spread.target is not aten.index_select.default:
        return None
    rows, dim, clamped = _node(spread.args[0]), spread.args[1], _node(spread.args[2])
    is_kept = _node(mask.args[0]) if mask.target is aten.view.default else mask
    place = _node(clamped.args[0]) if clamped.target is aten.clamp.default else clamped
    named = str(place.meta.get("input", "")).startswith("place_")
    if not named or is_kept.target is not aten.ge.Scalar or is_kept.args[0] is not place:
        return None
    assert isinstance(dim, int)
    return rows, dim, place


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
