"""Keep slots in a narrower dtype than values are computed in."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

from tcc.passes.base import Pass
from tcc.passes.graph import emit, fake_mode_of, output_values, value

__all__ = ["NarrowSlots"]

aten = torch.ops.aten


@dataclass(frozen=True)
class NarrowSlots(Pass):
    """Round what is stored to a narrower dtype, and cast what is read back.

    Before: `y = f(slot)`, and an output `new` of the slot, both float32
    After:  `y = f(_to_copy(slot, float32))`, and an output `_to_copy(new, bfloat16)`

    1. A dtype with a smaller range than the values' gets them clamped to it: a cast to float8 makes NaN of the others.
    2. An older value of a history is moved on as it is.
    3. Values that are as narrow already, and integers, stay.

    Attributes:
        slots: the names of the slots.
        dtype: what they are kept in.
    """

    slots: frozenset[str]
    dtype: torch.dtype

    def run(self, gm: fx.GraphModule) -> int:
        """Edit `gm`; see the class."""
        stores: tuple[str, ...] = gm.meta.get("stores", ())
        values = list(output_values(gm.graph))
        first = len(values) - len(stores)
        reads = [n for n in gm.graph.nodes if n.meta.get("slot") in self.slots and self._narrows(n)]
        stored = [i for i, name in enumerate(stores, first) if name in self.slots and self._narrows(values[i])]
        for number in stored:
            if values[number] not in reads:
                values[number] = self._narrow(gm.graph, values[number])
        if stored:
            gm.graph.output_node().args = (tuple(values),)
        for slot in reads:
            self._read(gm.graph, slot, first)
        return len(reads) + len(stored)

    def _narrows(self, node: fx.Node) -> bool:
        dtype: torch.dtype = value(node).dtype
        return dtype.is_floating_point and self.dtype.itemsize < dtype.itemsize

    def _narrow(self, graph: fx.Graph, node: fx.Node) -> fx.Node:
        """What is kept of `node`, made right after it, so that the wide value need not live on."""
        most = torch.finfo(self.dtype).max
        after = node if node.op != "placeholder" else [n for n in graph.nodes if n.op == "placeholder"][-1]
        with graph.inserting_before(after.next):
            if 2 * most < torch.finfo(value(node).dtype).max:  # bfloat16 has the range of float32
                node = emit(graph, aten.clamp.default, (node, -most, most), like=node)
            return emit(graph, aten._to_copy.default, (node,), {"dtype": self.dtype}, like=node)

    def _read(self, graph: fx.Graph, slot: fx.Node, own: int) -> None:
        """Make a slot narrow, and cast it back right before it is first read; `own` outputs are the model's."""
        wide = value(slot).dtype
        with fake_mode_of(graph):
            slot.meta["val"] = torch.empty(value(slot).shape, dtype=self.dtype, device=value(slot).device)
        output, values = graph.output_node(), output_values(graph)
        readers: dict[fx.Node, Any] = {user: None for user in slot.users if user is not output}
        if not readers and slot not in values[:own]:
            return
        with graph.inserting_before(min([*readers, output])):
            back = emit(graph, aten._to_copy.default, (slot,), {"dtype": wide}, like=slot)
        slot.replace_all_uses_with(back, delete_user_cb=readers.__contains__)
        output.args = ((*(back if val is slot else val for val in values[:own]), *values[own:]),)
