"""What a pass has changed in a graph: its checks then look there, and not at everything again."""

from __future__ import annotations

from torch import fx

from tcc.passes.graph import Call, call_of, line, numbers_of

__all__ = ["Calls", "calls_of", "changed", "differs"]

#: The calls of a graph, in order. FX gives a node new arguments where they change, so what is noted here stays.
Calls = dict[fx.Node, Call]


def calls_of(graph: fx.Graph) -> Calls:
    """What every node does now."""
    return {node: call_of(node) for node in graph.nodes}


def changed(before: Calls, graph: fx.Graph) -> list[fx.Node]:
    """The nodes that are new, do something else, or have an input with another value."""
    found, renewed = [], set[fx.Node]()
    for node in graph.nodes:
        known = before.get(node)
        if known is None or known[3] is not node.meta.get("val"):
            renewed.add(node)
        if known is None or not _does(node, known) or not renewed.isdisjoint(node.all_input_nodes):
            found.append(node)
    return found


def differs(graph: fx.Graph, before: Calls) -> bool:
    """Whether the graph's text is another one (`graph_text`); it is written from the first change on."""
    if len(graph.nodes) != len(before):
        return True
    same, numbers, old_numbers = True, dict[fx.Node, str](), dict[fx.Node, str]()
    for node, (old, call) in zip(graph.nodes, before.items(), strict=True):
        if same and node is old and _does(node, call):
            continue
        if same:
            same, numbers, old_numbers = False, numbers_of(graph.nodes), numbers_of(before)
        if line(node, call_of(node), numbers) != line(old, call, old_numbers):
            return True
    return False


def _does(node: fx.Node, call: Call) -> bool:
    """By identity: equal arguments may differ in type, and values cannot be compared."""
    target, args, kwargs, val = call
    return node.args is args and node.target is target and node.kwargs is kwargs and node.meta.get("val") is val
