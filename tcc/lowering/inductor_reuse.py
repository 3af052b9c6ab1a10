"""What Inductor is told about the memory that its own loops need.

It gives the memory of a dead buffer to a later one of the same size, and meanwhile keeps it, wherever its estimate of
the peak leaves room for that. The estimate (torch 2.13) is wrong about loops in two ways, and what is kept without room
raises the peak:

1. A loop writes over an input that nobody reads any more, and the estimate counts both: in an MLP the wide value before
   and after its activation, of which there is only one. It finds room that is not there.
2. On a CPU the loops between two calls of a library are one function: all that they make is allocated before it, and
   nothing is freed before it returns. The estimate takes them one by one, and finds less in use than there is.
"""

from __future__ import annotations

from collections import Counter
from typing import Any

from torch._inductor import config, memory
from torch._inductor.codegen import wrapper
from torch._inductor.virtualized import V
from torch.utils._ordered_set import OrderedSet

from tcc.lowering.inductor_stores import StoreEarly

__all__ = ["LoopsAsTheyAre", "install", "memory_in_use"]


def install() -> None:
    """Correct the estimate of the graphs that tcc compiles, and of no others; versions without one need nothing."""
    known = getattr(wrapper, "EfficientPeakEstimate", None)
    if known is not None and not issubclass(known, LoopsAsTheyAre):
        wrapper.EfficientPeakEstimate = type("EfficientPeakEstimate", (LoopsAsTheyAre, known), {})  # type: ignore[assignment, misc]


class LoopsAsTheyAre:
    """A base of Inductor's estimate. Of a step that the two estimate differently, the larger number stays."""

    overall_peak_memory: int
    segmented_tree: Any

    def __init__(self) -> None:
        super().__init__()
        if not isinstance(config.post_grad_custom_post_pass, StoreEarly):
            return
        nodes, outputs = V.graph.scheduler.nodes, OrderedSet(V.graph.get_output_names())
        inputs = memory.get_freeable_input_buf(nodes, OrderedSet(V.graph.graph_inputs))
        buffers, *_ = memory.compute_memory_timeline(nodes, inputs, outputs)
        is_loop = [not node.is_extern() and not node.is_template() for node in nodes]
        used = memory_in_use(buffers, is_loop, grouped=all(device == "cpu" for device in V.graph.device_types))
        self.overall_peak_memory = max(used)
        for step, more in enumerate(used):
            known = self.segmented_tree.summarize_range(step, step)
            self.segmented_tree.update_range(step, step, max(more - known, 0))


def memory_in_use(buffers: list[Any], is_loop: list[bool], *, grouped: bool) -> list[int]:
    """Bytes at every step, at most.

    Args:
        buffers: Inductor's `BufferInfo`: the steps that make and last read a buffer (-1: it stays), and its bytes.
        is_loop: of every step, whether it is a loop: its outputs take the place of inputs of their size that end there.
        grouped: whether loops that follow each other are one function, which frees when it returns.
    """
    made: list[Counter[int]] = [Counter() for _ in is_loop]
    ended: list[Counter[int]] = [Counter() for _ in is_loop]
    freed = [0] * len(is_loop)
    for buffer in buffers:
        made[buffer.start_step][buffer.size_alloc] += 1
        if buffer.end_step >= 0:
            freed[buffer.end_step] += buffer.size_free
            ended[buffer.end_step][buffer.size_free] += buffer.start_step < buffer.end_step
    used, alive, group = [0] * len(is_loop), 0, list[int]()
    for step, loop in enumerate(is_loop):
        in_place = _bytes(made[step] & ended[step]) if loop else 0
        alive += _bytes(made[step]) - in_place
        freed[step] -= in_place
        group.append(step)
        if grouped and loop and is_loop[step + 1 : step + 2] == [True]:
            continue
        for each in group:
            used[each] = alive
        alive -= sum(freed[each] for each in group)
        group.clear()
    return used


def _bytes(sizes: Counter[int]) -> int:
    return sum(size * count for size, count in sizes.items())
