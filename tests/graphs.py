"""Small graphs made by hand, for tests of passes: what goes in, what should come out, and running both."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch._subclasses.fake_tensor import FakeTensorMode

from tcc.passes.base import Pass, run_passes
from tcc.passes.graph import emit, graph_text
from tcc.passes.tokens import Axis, gather_tokens, scatter_tokens

aten = torch.ops.aten


class Sketch:
    """A graph under construction; every node gets its fake value."""

    def __init__(self) -> None:
        self.graph, self.mode, self.root = fx.Graph(), FakeTensorMode(), nn.Module()

    def input(self, name: str, *sizes: int, dtype: torch.dtype = torch.float32) -> fx.Node:
        """A tensor input; `slot:...` and other names with a colon or digits become the runtime's extra inputs."""
        node = self.graph.placeholder("".join(c if c.isalnum() else "_" for c in name))
        with self.mode:
            node.meta["val"] = torch.empty(sizes, dtype=dtype)
        if name.startswith(("slot:", "kept_", "place_", "coefficients_")):
            node.meta["input"] = name
        if name.startswith("slot:"):
            node.meta["slot"] = name.removeprefix("slot:")
        return node

    def tokens(self, count: int, total: int, number: int = 0, batch: int = 0) -> tuple[fx.Node, fx.Node]:
        """The two inputs that describe a token set, or one for each of `batch` samples: kept positions, and places."""
        lead = (batch,) if batch else ()
        kept = self.input(f"kept_{number}", *lead, count, dtype=torch.int64)
        return kept, self.input(f"place_{number}", *lead, total, dtype=torch.int64)

    def weight(self, name: str, *sizes: int, seed: int = 3) -> fx.Node:
        """A parameter."""
        tensor = torch.randn(sizes, generator=torch.Generator().manual_seed(seed + len(name)))
        self.root.register_parameter(name, nn.Parameter(tensor, requires_grad=False))
        node = self.graph.get_attr(name)
        with self.mode:
            node.meta["val"] = torch.empty(sizes)
        return node

    def call(self, target: Callable[..., Any], *args: Any, **kwargs: Any) -> fx.Node:
        """A call at the end of the graph."""
        return emit(self.graph, target, args, kwargs)

    def gather(self, x: fx.Node, kept: fx.Node, dim: int = 1, *batch: int) -> fx.Node:
        """The kept tokens of `x`."""
        return self.call(gather_tokens, x, kept, dim, *batch)

    def scatter(
        self, base: fx.Node, rows: fx.Node, kept: fx.Node, place: fx.Node, dim: int = 1, *batch: int
    ) -> fx.Node:
        """`base` with its kept tokens replaced by `rows`."""
        return self.call(scatter_tokens, base, rows, kept, place, dim, *batch)

    def done(self, *outputs: fx.Node, stores: Sequence[str] = ()) -> fx.GraphModule:
        """The module; the last outputs are the new values of the slots `stores`."""
        self.graph.output(tuple(outputs))
        gm = fx.GraphModule(self.root, self.graph)
        if stores:
            gm.meta["stores"] = tuple(stores)
        return gm


def edits(gm: fx.GraphModule, *passes: Pass) -> int:
    """Run the passes with every check, and count their edits."""
    return sum(record.edits for record in run_passes(gm, passes))


def text(gm: fx.GraphModule) -> str:
    """The graph as text."""
    return graph_text(gm.graph)


def calls(gm: fx.GraphModule) -> list[str]:
    """What the graph calls, in order."""
    targets = (node.target for node in gm.graph.nodes if node.op == "call_function")
    return [str(getattr(t, "_schema", None) and t) if hasattr(t, "_schema") else t.__name__ for t in targets]


def values(gm: fx.GraphModule, seed: int = 5, kept: Sequence[Sequence[Any]] = ()) -> list[Tensor]:
    """Real inputs for the graph: normal noise, and the token sets `kept` in order (positions, or sets by sample)."""
    generator = torch.Generator().manual_seed(seed)
    made = []
    for node in gm.graph.nodes:
        if node.op == "placeholder":
            name, val = node.meta.get("input", ""), node.meta["val"]
            if name.startswith("kept_"):
                made.append(torch.tensor(kept[int(name[5:])]))
            elif name.startswith("place_"):
                given, total = kept[int(name[6:])], val.shape[-1]
                made.append(
                    torch.stack([place_of(k, total) for k in given]) if val.dim() == 2 else place_of(given, total)
                )
            else:
                made.append(torch.randn(val.shape, generator=generator).to(val.dtype))
    return made


def place_of(kept: Sequence[int], total: int) -> Tensor:
    """Where every token stands among the kept ones; -1 for dropped tokens."""
    return torch.tensor([list(kept).index(i) if i in kept else -1 for i in range(total)])


def take(x: Tensor, axis: Axis, kept: Sequence[int]) -> Tensor:
    """The kept tokens of `x` along `axis`, by the definition of an axis, with all others that are joined to them."""
    apart = x.unflatten(axis.dim, (axis.outer, -1, axis.inner))
    rows = range(apart.shape[axis.dim + 1])
    places = [*rows[: axis.before], *(axis.before + place for place in kept), *rows[len(rows) - axis.after :]]
    return apart.index_select(axis.dim + 1, torch.tensor(places)).flatten(axis.dim, axis.dim + 2)
