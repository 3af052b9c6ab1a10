"""Of a product of which nobody reads some parts, compute the others alone."""

from __future__ import annotations

from dataclasses import dataclass

from torch import fx

from tcc.passes.base import Pass
from tcc.passes.graph import shape
from tcc.passes.split_projections import CUTS, SPLITS, find_parts, split

__all__ = ["DropDeadParts"]


@dataclass(frozen=True)
class DropDeadParts(Pass):
    """Leave out the rows of a weight that make parts of a product which are not read.

    Before: `shift, scale, gate = chunk(linear(c, W), 3, 1)`, and only `gate` is read
    After:  `gate = linear(c, W[2 * D:3 * D])`

    A step that reuses what a branch computes still needs its gate, but not its shift and scale; one that reuses keys
    and values needs the queries. Each part that is read gets a product of its own, as in `SplitProjections`. With two
    rows of conditioning the time of such a product is that of reading its weight.
    """

    def run(self, gm: fx.GraphModule) -> int:
        """Edit `gm`; see the class."""
        bases = [node for node in gm.graph.nodes if any(user.target in SPLITS | CUTS for user in node.users)]
        return sum(split(gm.graph, base) for base in reversed(bases) if _has_dead_part(base))


def _has_dead_part(base: fx.Node) -> bool:
    """Whether all readers of `base` read parts of one dimension, and some of its entries are in none."""
    parts = find_parts(base)
    if not parts or len({part.dim for part in parts}) != 1:
        return False
    read = {at for part in parts if part.node.users for at in range(part.start, part.start + part.count)}
    return 0 < len(read) < shape(base)[parts[0].dim]
