"""Make one sub-graph of what graphs repeat, so that a compiler generates its code once."""

from __future__ import annotations

import operator
from dataclasses import dataclass

import torch
from torch import fx

from tcc.passes.base import Pass
from tcc.passes.repeats import Stretch, find_repeats, inputs_of

__all__ = ["OutlineRepeats", "invoke_subgraph", "outline"]

invoke_subgraph = torch.ops.higher_order.invoke_subgraph


@dataclass(frozen=True)
class OutlineRepeats(Pass):
    """Replace all copies of a stretch of calls, as the blocks of a transformer are, by calls of one sub-graph.

    Before: `a1 = f(x, w1); b1 = g(a1); a2 = f(b1, w2); b2 = g(a2)`
    After:  `b1 = sub(x, w1); b2 = sub(b1, w2)`

    Copies differ in nothing but the values that they are given. A sub-graph's name says what it computes: equal names,
    in other graphs too, are equal sub-graphs.

    Attributes:
        stretches: what to replace, as `find_repeats` found it in several graphs; None: what this graph alone repeats.
    """

    stretches: tuple[Stretch, ...] | None = None

    def run(self, gm: fx.GraphModule) -> int:
        """Edit `gm`; see the class. An edit is a sub-graph."""
        stretches = find_repeats([gm.graph])[0] if self.stretches is None else self.stretches
        for stretch in stretches:
            outline(gm, stretch)
        return len({stretch.name for stretch in stretches})


def outline(gm: fx.GraphModule, stretch: Stretch) -> None:
    """Replace neighbouring calls by one of a sub-graph, which is a child of `gm` under the stretch's name."""
    if not hasattr(gm, stretch.name):
        gm.add_submodule(stretch.name, _sub_graph(gm, stretch))
    _call(gm.graph, stretch.name, stretch)


def _sub_graph(gm: fx.GraphModule, stretch: Stretch) -> fx.GraphModule:
    graph = fx.Graph()
    made: dict[fx.Node, fx.Node] = {}
    for number, node in enumerate(inputs_of(stretch.nodes)):
        made[node] = graph.placeholder(f"input_{number}")
        made[node].meta["val"] = node.meta["val"]
    for node in stretch.nodes:
        made[node] = graph.node_copy(node, made.__getitem__)
    graph.output(tuple(made[node] for node in stretch.outputs))
    return fx.GraphModule(gm, graph)


def _call(graph: fx.Graph, name: str, stretch: Stretch) -> None:
    """Replace the calls by one of the sub-graph."""
    inside = set(stretch.nodes)
    with graph.inserting_after(stretch.nodes[-1]):
        call = graph.create_node("call_function", invoke_subgraph, ())
    with graph.inserting_before(call):
        sub = graph.get_attr(name)
        sub.meta["val"] = getattr(graph.owning_module, name)
        call.args = (sub, name, *inputs_of(stretch.nodes))
    call.meta["val"] = tuple(node.meta["val"] for node in stretch.outputs)
    made: dict[fx.Node, fx.Node] = {}
    with graph.inserting_before(call.next):
        for number, node in enumerate(stretch.outputs):
            made[node] = graph.call_function(operator.getitem, (call, number))
            made[node].meta["val"] = node.meta["val"]

        def outside(node: fx.Node) -> fx.Node:
            if node in inside and node not in made:  # a view: of a result, or of what the stretch was given
                made[node] = graph.node_copy(node, outside)
            return made.get(node, node)

        for node in stretch.used:
            node.replace_all_uses_with(outside(node), delete_user_cb=lambda user: user not in inside)
    for node in reversed(stretch.nodes):
        graph.erase_node(node)
