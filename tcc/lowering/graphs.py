"""The graphs that a backend is given: those of variants, which write their slots."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

from torch import fx

from tcc.passes.base import run_passes
from tcc.passes.pipeline import lowering_passes, storing_passes
from tcc.passes.repeats import Stretch, find_repeats
from tcc.program import Variant
from tcc.runtime.folding import Folding

__all__ = ["extra_inputs", "graphs_of"]


def graphs_of(
    variants: Mapping[int, Variant], *, folding: Folding | None, regional: bool, check: bool
) -> Iterator[fx.GraphModule]:
    """Copies of the variants' graphs, ready for a backend.

    Args:
        variants: variants of one program, by their numbers in it.
        folding: what is computed once per run, if anything.
        regional: make one sub-graph of what they repeat, also of each other; all are then made before the first is
            yielded.
        check: verify the graphs after each pass.
    """
    if not regional:
        for number, variant in variants.items():
            yield _storing(_computing(variant, number, folding, regional, check), number, None, check)
        return
    graphs = [_computing(variant, number, folding, regional, check) for number, variant in variants.items()]
    repeats = find_repeats([gm.graph for gm in graphs])
    for number, gm, stretches in zip(variants, graphs, repeats, strict=True):
        yield _storing(gm, number, stretches, check)


def extra_inputs(gm: fx.GraphModule) -> tuple[str, ...]:
    """The names of a graph's inputs after the model's own, in order."""
    return tuple(n.meta["input"] for n in gm.graph.find_nodes(op="placeholder") if "input" in n.meta)


def _computing(variant: Variant, number: int, folding: Folding | None, regional: bool, check: bool) -> fx.GraphModule:
    """What computes no more than it must, and still returns what it stores."""
    graph = fx.Graph()
    graph.output(graph.graph_copy(variant.gm.graph, {}))
    gm = fx.GraphModule(variant.gm, graph)
    gm.meta["stores"] = variant.stores
    folds, num_steps = (folding.folds, len(folding.levels)) if folding else ((), 0)
    passes = lowering_passes(variant.kind, folds=folds, num_steps=num_steps, regional=regional)
    run_passes(gm, passes, label=f"lower variant {number}", check=check)
    return gm


def _storing(gm: fx.GraphModule, number: int, repeats: Sequence[Stretch] | None, check: bool) -> fx.GraphModule:
    """The same graph, once it writes what it stores."""
    run_passes(gm, storing_passes(repeats), label=f"lower variant {number}, slots", check=check, verified=True)
    return gm
