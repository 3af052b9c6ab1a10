"""Sub-graphs that several graphs call, compiled once: for Inductor they are operators that it does not look into."""

from __future__ import annotations

import hashlib
import threading
from collections.abc import Callable, Sequence
from typing import Any
from weakref import WeakValueDictionary, finalize

import torch
from torch import Tensor, fx
from torch._dynamo.convert_frame import compile_lock
from torch._inductor import config

from tcc.passes.outline_repeats import invoke_subgraph
from tcc.runtime import Runner

__all__ = ["Region", "call_regions"]

#: `start(gm, example_inputs)` begins to compile, and returns what waits for the end of that.
Start = Callable[[fx.GraphModule, list[Tensor]], Callable[[], Runner]]
_NAMESPACE = "tcc_regions"
#: Those that some compiled graph calls, by name.
_alive: WeakValueDictionary[str, Region] = WeakValueDictionary()


class Region:
    """A sub-graph as an operator, which lives as long as this object.

    Args:
        name: of the operator.
        gm: the sub-graph, of tensors alone. It returns a tuple of tensors.
        start: compiles it.
    """

    def __init__(self, name: str, gm: fx.GraphModule, start: Start) -> None:
        outputs, inputs = gm.graph.output_node().all_input_nodes, gm.graph.find_nodes(op="placeholder")
        made = [_like(node.meta["val"]) for node in outputs]
        self._finish: Callable[[], Runner] | None = start(gm, [_like(node.meta["val"])() for node in inputs])
        self._lock = threading.Lock()
        runner: list[Runner] = []  # a list of its own: what the operator calls must not keep this object alive
        self.name, self._runner = name, runner
        library: Any = torch.library.Library(_NAMESPACE, "FRAGMENT")  # type: ignore[no-untyped-call]
        finalize(self, library._destroy)  # torch 2.11 forgets an operator's address only so, not where a library dies
        library.define(f"{name}(Tensor[] inputs) -> Tensor[]", tags=(torch.Tag.needs_exact_strides,))
        library.impl(name, lambda inputs: _apart(inputs, runner[0](*inputs)), "CompositeExplicitAutograd")
        torch.library.register_fake(f"{_NAMESPACE}::{name}", lambda _: [make() for make in made], lib=library)

    @property
    def operator(self) -> Any:
        """The operator: of a list of tensors to a list of tensors."""
        return getattr(getattr(torch.ops, _NAMESPACE), self.name).default

    def finish(self) -> None:
        """Wait until the operator can be called."""
        with self._lock:
            if self._finish is not None:
                self._runner.append(self._finish())
                self._finish = None  # and with it the examples


def _apart(inputs: Sequence[Tensor], outputs: Sequence[Tensor]) -> list[Tensor]:
    """The outputs, each in memory of its own: Inductor may return one twice, or an input (`y * 1`, `x + 0`)."""
    taken, apart = {given.data_ptr() for given in inputs}, list[Tensor]()
    for output in outputs:
        apart.append(output.clone() if output.data_ptr() in taken else output)
        taken.add(output.data_ptr())
    return apart


def call_regions(gm: fx.GraphModule, options: dict[str, Any], start: Start) -> list[Region]:
    """Let `gm` call operators where it calls sub-graphs, in place.

    Args:
        gm: its sub-graphs' names say what they compute (`OutlineRepeats`), so that equal ones, also of other graphs,
            are one operator.
        options: what else their code depends on.
        start: compiles a sub-graph that no compiled graph calls yet.

    Returns:
        The operators. They must be finished before `gm` is called, and kept for as long as it is.
    """
    regions: dict[str, Region] = {}
    for node in gm.graph.find_nodes(op="call_function", target=invoke_subgraph):
        sub, name, *inputs = node.args
        assert isinstance(sub, fx.Node)
        if name not in regions:
            regions[name] = _region(f"{name}_{_around(options)}", getattr(gm, str(sub.target)), start)
        with gm.graph.inserting_before(node):
            call = gm.graph.call_function(regions[name].operator, (inputs,))
        call.meta = dict(node.meta)
        node.replace_all_uses_with(call)
        gm.graph.erase_node(node)
        if not sub.users:
            gm.graph.erase_node(sub)
            gm.delete_submodule(str(sub.target))
    if regions:
        gm.recompile()
    return list(regions.values())


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


def _like(val: Tensor) -> Callable[[], Tensor]:
    """Makes tensors like `val`, which lie in memory as it does."""
    size, stride, dtype, device = tuple(val.shape), val.stride(), val.dtype, val.device
    return lambda: torch.empty_strided(size, stride, dtype=dtype, device=device)
