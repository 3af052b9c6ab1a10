"""Make what is kept a matter of degree, so that it can be learned: the training form of a cached step."""

from __future__ import annotations

from dataclasses import dataclass, field
from itertools import combinations
from typing import Any, ClassVar

import torch
from torch import fx

from tcc.errors import PlanError
from tcc.passes.base import Pass
from tcc.passes.graph import emit, fake_mode_of, output_values, shape, value
from tcc.passes.sites import Site

__all__ = ["Superpose"]

aten = torch.ops.aten
_KINDS = ("out", "delta", "block")


@dataclass(frozen=True)
class Superpose(Pass):
    """Mix the computed value of every site with its stored one, by a weight that is an input.

    Before: `x1 = x0 + f(x0)`
    After:  `x1 = x0 + lerp(slot, f(x0), weight)`, and the mixed value as an output: the next step's stored one

    1. An `out` is replaced where it stands; for a `delta` or a block's change, the stream after it is added up anew.
    2. The weight has one row or one per sample, and one column or one per token; it is broadcast over the channels.
       Rows of another stream that are joined to the tokens are computed where it has one column per token.
    3. What `read` sites hold in the rewritten graph is returned too, after the mixed values.

    The form is that of TokenCache (Lou et al. 2024, fhat_l^t; one weight per token) and of Learning-to-Cache (Ma et al.
    2024, eq. 5 with the current stream and gate, as its code has it; one weight per site). Weight 1 gives the computed
    value and weight 0 the stored one, bit for bit; that of a block's change is the sum of its branches, so the stream
    behind it differs by the rounding of one addition.

    Attributes:
        sites: the sites to mix, of kinds `out`, `delta` and `block`.
        read: sites of these kinds, or `stream` ones, whose values are returned too.
        weight: the shape of every weight: `(1 or B, 1 or S)`.

    Raises:
        PlanError: a site of another kind, two sites of one branch, or weights per token of a value without such rows.
    """

    exact: ClassVar[bool] = False
    sites: tuple[Site, ...] = ()
    read: tuple[Site, ...] = ()
    weight: tuple[int, int] = (1, 1)

    def __post_init__(self) -> None:
        for site in self.sites:
            self._check(site)
        for site in self.read:
            if site.kind not in (*_KINDS, "stream"):
                raise PlanError(f"site '{site.name}' has two values: only {', '.join(_KINDS)} and stream can be read")
        for one, other in combinations(self.sites, 2):
            if one.overlaps(other):
                raise PlanError(f"sites '{one.name}' and '{other.name}' keep parts of the same branch: mix one of them")

    def _check(self, site: Site) -> None:
        if site.kind not in _KINDS:
            raise PlanError(f"site '{site.name}' cannot be mixed: choose sites of kind {', '.join(_KINDS)}")
        if self.weight != (1, 1) and not site.axis.plain:
            raise PlanError(
                f"site '{site.name}': its tokens share a dimension with something else, so it has no weight per token: "
                "give it one weight"
            )

    def run(self, gm: fx.GraphModule) -> int:
        """Edit `gm`; see the class."""
        mixture = _Mixture(gm, self.weight)
        mixed = [mixture.mix(site) for site in self.sites]
        read = [mixture.read(site) for site in self.read]
        if mixed or read:
            output = gm.graph.output_node()
            output.args = ((*output_values(gm.graph), *mixed, *read),)
            gm.meta["stores"] = tuple(site.name for site in self.sites)
        return len(mixed) + len(read)


@dataclass
class _Mixture:
    """One run of the pass over one graph."""

    gm: fx.GraphModule
    weight: tuple[int, int]
    now: dict[str, fx.Node] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.graph = self.gm.graph
        self.now = {node.name: node for node in self.graph.nodes}
        self.first = next(n for n in self.graph.nodes if n.op != "placeholder")

    def mix(self, site: Site) -> fx.Node:
        """Let the mixture take the place of what `site` computes; the mixed value."""
        place = self.now[site.stream_out or site.values[0]]
        with self.graph.inserting_before(place.next):
            computed = self._sum(site)
            slot = self._input(f"slot:{site.name}", shape(computed), computed)
            weight = self._aligned(self._input(f"weight:{site.name}", self.weight, computed), site)
            mixed = self._call(aten.lerp.Tensor, slot, computed, weight, like=place)
            new = mixed
            if site.stream_out:
                new = self._call(aten.add.Tensor, self.now[site.stream_in], mixed, like=place)
        place.replace_all_uses_with(new, delete_user_cb=lambda user: user is not mixed)
        self.now[site.stream_out or site.values[0]] = new
        return mixed

    def read(self, site: Site) -> fx.Node:
        """What `site` holds in the rewritten graph."""
        with self.graph.inserting_before(self.graph.output_node()):
            return self._sum(site)

    def _sum(self, site: Site) -> fx.Node:
        total, *rest = (self.now[name] for name in site.values)
        for term in rest:
            total = self._call(aten.add.Tensor, total, term, like=term)
        return total

    def _aligned(self, weight: fx.Node, site: Site) -> fx.Node:
        """The weight `[1 or B, 1 or S]` with its dimensions where the site has samples and tokens; 1 for other rows."""
        if self.weight[1] > 1 and site.axis.others:
            weight = self._call(aten.constant_pad_nd.default, weight, [*site.axis.others], 1.0, like=weight)
        if site.axis.dim == 0:  # samples stand after the tokens, or nowhere
            weight = self._call(aten.transpose.int, weight, 0, 1, like=weight)
        for dim in range(1, site.axis.dim):
            weight = self._call(aten.unsqueeze.default, weight, dim, like=weight)
        while len(shape(weight)) < len(site.shape):
            weight = self._call(aten.unsqueeze.default, weight, -1, like=weight)
        return weight

    def _input(self, name: str, sizes: tuple[int, ...], like: fx.Node) -> fx.Node:
        with self.graph.inserting_before(self.first):
            node = self.graph.placeholder("".join(c if c.isalnum() else "_" for c in name))
        with fake_mode_of(self.graph):
            node.meta["val"] = torch.empty(sizes, dtype=value(like).dtype, device=value(like).device)
        node.meta["input"] = name
        return node

    def _call(self, target: Any, *args: Any, like: fx.Node) -> fx.Node:
        return emit(self.graph, target, args, like=like)
