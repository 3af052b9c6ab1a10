"""What Inductor is told about its own loops: they write over inputs that nobody reads any more.

It gives the memory of a dead buffer to a later one of the same size, and meanwhile keeps it, wherever its estimate of
the peak leaves room for that. The estimate (torch 2.13) counts such a loop's input and output both: in an MLP the wide
value before and after its activation, of which there is only one. The room is not there: what is kept raises the peak.
"""

from __future__ import annotations

from collections import Counter
from typing import Any

from torch._inductor import config, memory
from torch._inductor.codegen import wrapper
from torch._inductor.virtualized import V
from torch.utils._ordered_set import OrderedSet

from tcc.inductor_stores import StoreEarly

__all__ = ["InPlace", "install", "peak_in_place"]


def install() -> None:
    """Correct the estimate of the graphs that tcc compiles, and of no others; versions without one need nothing."""
    known = getattr(wrapper, "EfficientPeakEstimate", None)
    if known is not None and not issubclass(known, InPlace):
        wrapper.EfficientPeakEstimate = type("EfficientPeakEstimate", (InPlace, known), {})  # type: ignore[assignment, misc]


class InPlace:
    """A base of Inductor's estimate. The peak of single steps stays too high, which keeps less for longer."""

    overall_peak_memory: int

    def __init__(self) -> None:
        super().__init__()
        if isinstance(config.post_grad_custom_post_pass, StoreEarly):
            self.overall_peak_memory = min(self.overall_peak_memory, _overall_peak())


def _overall_peak() -> int:
    nodes, outputs = V.graph.scheduler.nodes, OrderedSet(V.graph.get_output_names())
    inputs = memory.get_freeable_input_buf(nodes, OrderedSet(V.graph.graph_inputs))
    buffers, *_ = memory.compute_memory_timeline(nodes, inputs, outputs)
    return peak_in_place(buffers, [not node.is_extern() and not node.is_template() for node in nodes])


def peak_in_place(buffers: list[Any], is_loop: list[bool]) -> int:
    """The most bytes alive at once.

    Args:
        buffers: Inductor's `BufferInfo`: the steps that make and last read a buffer (-1: it stays), and its bytes.
        is_loop: of every step, whether it is a loop: its outputs take the place of inputs of their size that end there.
    """
    made: list[Counter[int]] = [Counter() for _ in is_loop]
    ended: list[Counter[int]] = [Counter() for _ in is_loop]
    freed = [0] * len(is_loop)
    for buffer in buffers:
        made[buffer.start_step][buffer.size_alloc] += 1
        if buffer.end_step >= 0:
            freed[buffer.end_step] += buffer.size_free
            ended[buffer.end_step][buffer.size_free] += buffer.start_step < buffer.end_step
    alive = peak = 0
    for step, loop in enumerate(is_loop):
        in_place = (made[step] & ended[step]).items() if loop else ()
        allocated = sum(size * count for size, count in made[step].items())
        peak = max(peak, alive + allocated - sum(size * count for size, count in in_place))
        alive += allocated - freed[step]
    return peak
