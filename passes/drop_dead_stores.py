"""Do not write what nobody reads."""

from __future__ import annotations

from dataclasses import dataclass

from torch import fx

from tcc.passes.base import Pass
from tcc.passes.graph import output_values

__all__ = ["DropDeadStores"]


@dataclass(frozen=True)
class DropDeadStores(Pass):
    """Remove the stores to slots that no later step reads before the slot's next write.

    Which stores are live is a question about the whole plan: `tcc.program.liveness` answers it.

    Before: outputs `(y, slot_a, slot_b)` with `live = {slot_a}`
    After:  outputs `(y, slot_a)`
    """

    live: frozenset[str]

    def run(self, gm: fx.GraphModule) -> int:
        """Edit `gm`; see the class."""
        stores: tuple[str, ...] = gm.meta.get("stores", ())
        dead = [name for name in stores if name not in self.live]
        if not dead:
            return 0
        values = output_values(gm.graph)
        first = len(values) - len(stores)
        keep = [val for name, val in zip(stores, values[first:], strict=True) if name in self.live]
        gm.graph.output_node().args = ((*values[:first], *keep),)
        gm.meta["stores"] = tuple(name for name in stores if name in self.live)
        return len(dead)
