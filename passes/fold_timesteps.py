"""What depends on the noise level, and else on nothing that changes within a run, is computed once per run."""

from __future__ import annotations

from collections.abc import Collection, Iterable
from dataclasses import dataclass

import torch
from torch import fx

from tcc.passes.base import Pass, run_passes
from tcc.passes.graph import copy_of, emit, fake_mode_of, shape, sized_by_data, value
from tcc.passes.macs import node_macs

__all__ = ["Fold", "FoldTimesteps", "find_folds", "fold_graph"]

aten = torch.ops.aten


@dataclass(frozen=True)
class Fold:
    """A value that is computed once per run.

    Attributes:
        name: its node in the captured graph.
        per_step: whether it depends on the noise level: there is one for every step.
    """

    name: str
    per_step: bool

    @property
    def input(self) -> str:
        """The name of the input that takes its place."""
        return f"folded:{self.name}"


@dataclass(frozen=True)
class FoldTimesteps(Pass):
    """Read values that are computed once per run where they were computed at every step.

    Before: `linear(silu(embed(t) + y), W)`
    After:  `view(index_select(folded, 0, step), [B, D])`, with the inputs `folded` `[steps, B, D]` and `step` `[1]`

    1. Of what depends on the noise level there is a table with a row for each step.
    2. What does not, such as the keys and values of a prompt, is an input as it is.
    """

    folds: tuple[Fold, ...]
    num_steps: int

    def run(self, gm: fx.GraphModule) -> int:
        """Edit `gm`; see the class."""
        nodes = {node.name: node for node in gm.graph.nodes if node.op == "call_function" and node.users}
        found = [(nodes[fold.name], fold) for fold in self.folds if fold.name in nodes]
        step = _input(gm.graph, "step", (1,), torch.int64, found[0][0]) if any(f.per_step for _, f in found) else None
        for node, fold in found:
            sizes = shape(node)
            new = _input(
                gm.graph, fold.input, (self.num_steps, *sizes) if fold.per_step else sizes, value(node).dtype, node
            )
            if fold.per_step:
                with gm.graph.inserting_before(node):
                    row = emit(gm.graph, aten.index_select.default, (new, 0, step), like=node)
                    new = emit(gm.graph, aten.view.default, (row, list(sizes)), like=node)
            node.replace_all_uses_with(new)
        return len(found)


def find_folds(graph: fx.Graph, level: int, changing: Iterable[fx.Node]) -> tuple[Fold, ...]:
    """The values that are worth computing once per run: the last products before what changes within a run.

    What comes after them, such as the parts of a modulation, is cheap, and fuses with its readers.

    Args:
        graph: the captured graph.
        level: the position of the noise level among its inputs.
        changing: values that change within a run otherwise: the sample, and all that a plan keeps from step to step.
    """
    inputs = [node for node in graph.nodes if node.op == "placeholder"]
    changed = _downstream(graph, {*changing, *(node for node in graph.nodes if _draws(node))})
    stepped = _downstream(graph, {inputs[level]})
    above: set[fx.Node] = set()  # the products that are folded, and all that they are computed from
    todo = [node for node in graph.nodes if node_macs(node) and node not in changed]
    while todo:
        node = todo.pop()
        if node not in above:
            above.add(node)
            todo += node.all_input_nodes
            if isinstance(node.meta.get("val"), (tuple, list)):  # its parts are kept, not the list
                todo += node.users
    return tuple(
        Fold(node.name, node in stepped)
        for node in graph.nodes
        if node in above and node.op == "call_function" and any(user not in above for user in node.users)
        if isinstance(node.meta.get("val"), torch.Tensor) and not sized_by_data(node)
    )


def fold_graph(gm: fx.GraphModule, folds: tuple[Fold, ...]) -> fx.GraphModule:
    """The graph that computes `folds` from the model's inputs."""
    new = copy_of(gm)
    nodes = {node.name: node for node in new.graph.nodes}
    new.graph.output_node().args = (tuple(nodes[fold.name] for fold in folds),)
    run_passes(new, [], label="fold", check=False)  # dead code
    return new


def _downstream(graph: fx.Graph, roots: Collection[fx.Node]) -> set[fx.Node]:
    found = set(roots)
    for node in graph.nodes:
        if any(source in found for source in node.all_input_nodes):
            found.add(node)
    return found


def _draws(node: fx.Node) -> bool:
    """Whether the call gives another value each time."""
    return torch.Tag.nondeterministic_seeded in getattr(node.target, "tags", ())


def _input(graph: fx.Graph, name: str, sizes: tuple[int, ...], dtype: torch.dtype, like: fx.Node) -> fx.Node:
    last = [node for node in graph.nodes if node.op == "placeholder"][-1]
    with graph.inserting_after(last):
        node: fx.Node = graph.placeholder("".join(c if c.isalnum() else "_" for c in name))
    with fake_mode_of(graph):
        node.meta["val"] = torch.empty(sizes, dtype=dtype, device=value(like).device)
    node.meta["input"] = name
    return node
