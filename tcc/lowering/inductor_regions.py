"""Sub-graphs that several graphs call, compiled once; what is left of such a graph is calls of them, made by Python."""

from __future__ import annotations

import functools
import hashlib
import operator
import threading
from collections.abc import Callable, Sequence
from typing import Any
from weakref import WeakValueDictionary

import torch
from torch import Tensor, fx
from torch._dynamo.convert_frame import compile_lock
from torch._inductor import config

from tcc.passes.between import stretches_between
from tcc.passes.outline_repeats import invoke_subgraph, outline
from tcc.runtime import Runner

__all__ = ["Region", "call_regions", "with_weights"]

#: `start(gm, example_inputs)` begins to compile, and returns what waits for the end of that.
Start = Callable[[fx.GraphModule, list[Tensor]], Callable[[], Runner]]
#: Those that some compiled graph calls, by name.
_alive: WeakValueDictionary[str, Region] = WeakValueDictionary()


class Region:
    """A compiled sub-graph, which lives as long as a graph that calls it.

    Args:
        name: what it computes, and what its code depends on.
        gm: the sub-graph, of tensors alone. It returns a tuple of tensors, and may write to its inputs.
        start: compiles it.
    """

    def __init__(self, name: str, gm: fx.GraphModule, start: Start) -> None:
        self.__name__ = name  # FX writes code that calls it by that
        examples = [_like(node.meta["val"]) for node in gm.graph.find_nodes(op="placeholder")]
        self._finish: Callable[[], Runner] | None = start(gm, examples)
        self._lock = threading.Lock()
        self._runner: Runner
        self._shared: frozenset[int] | None = None

    def __call__(self, *inputs: Tensor) -> Sequence[Tensor]:
        """What the sub-graph returns, in memory of its own: later calls may write to what this one was given."""
        outputs = self._runner(*inputs)
        if self._shared is None:  # the code is the same at each call
            self._shared = _shared(inputs, outputs)
        if not self._shared:
            return outputs
        return [output.clone() if place in self._shared else output for place, output in enumerate(outputs)]

    def finish(self) -> None:
        """Wait until it can be called."""
        with self._lock:
            if self._finish is not None:
                self._runner = self._finish()
                self._finish = None  # and with it the examples


def _shared(inputs: Sequence[Tensor], outputs: Sequence[Tensor]) -> frozenset[int]:
    """Which outputs are in the memory of an input: of `x + 0` and `x * 1`, Inductor returns `x`."""
    given = {x.untyped_storage().data_ptr() for x in inputs}
    return frozenset(place for place, x in enumerate(outputs) if x.untyped_storage().data_ptr() in given)


def call_regions(gm: fx.GraphModule, options: dict[str, Any], start: Start) -> list[Region]:
    """If `gm` calls sub-graphs, let it do nothing but call regions, in place: also what stands between becomes some.

    Args:
        gm: its sub-graphs' names say what they compute (`OutlineRepeats`), so that equal ones, also of other graphs,
            are one region.
        options: what else their code depends on.
        start: compiles a sub-graph that no compiled graph calls yet.

    Returns:
        The regions. They must be finished before `gm` is called.
    """
    if not gm.graph.find_nodes(op="call_function", target=invoke_subgraph):
        return []
    for stretch in stretches_between(gm.graph):
        outline(gm, stretch)
    regions: dict[str, Region] = {}
    for node in gm.graph.find_nodes(op="call_function", target=invoke_subgraph):
        sub, name, *inputs = node.args
        assert isinstance(sub, fx.Node)
        if name not in regions:
            regions[name] = _region(f"{name}_{_around(options)}", getattr(gm, str(sub.target)), start)
        with gm.graph.inserting_before(node):
            call = gm.graph.call_function(regions[name], tuple(inputs))
        call.meta = dict(node.meta)
        node.replace_all_uses_with(call)
        gm.graph.erase_node(node)
        gm.graph.erase_node(sub)
    return list(regions.values())


def with_weights(gm: fx.GraphModule) -> Runner:
    """`gm` as a function of its inputs, with its weights at hand: a module looks each of them up at each call."""
    weights: list[Tensor] = []
    graph, first = gm.graph, next(iter(gm.graph.nodes))
    for node in graph.find_nodes(op="get_attr"):
        weights.append(operator.attrgetter(str(node.target))(gm))
        with graph.inserting_before(first):
            node.replace_all_uses_with(graph.placeholder(f"weight_{len(weights)}"))
        graph.erase_node(node)
    return functools.partial(fx.GraphModule({}, graph).forward, *weights)


def _region(name: str, gm: fx.GraphModule, start: Start) -> Region:
    with compile_lock:  # two threads must not make the same one
        known = _alive.get(name)
        if known is None:
            known = _alive[name] = Region(name, gm, start)
    return known


def _around(options: dict[str, Any]) -> str:
    """A short name for what the code of a sub-graph depends on beside the sub-graph."""
    cuda, cpu = torch.backends.cuda.matmul, torch.backends.mkldnn.matmul  # type: ignore[attr-defined]
    sums = (cuda.allow_fp16_reduced_precision_reduction, cuda.allow_bf16_reduced_precision_reduction)
    settings = (config.get_hash(), cuda.fp32_precision, cpu.fp32_precision, *sums, torch.get_default_dtype())
    around = (sorted(options.items()), settings, torch.get_num_threads())
    return hashlib.sha256(repr(around).encode()).hexdigest()[:8]


def _like(val: Tensor) -> Tensor:
    return torch.empty_strided(tuple(val.shape), val.stride(), dtype=val.dtype, device=val.device)
