"""Replaying a compiled variant as a CUDA graph: one launch per step instead of one per kernel."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch

__all__ = ["Replay"]

_WARM_UPS = 3  # cuBLAS and cuDNN choose and allocate in their first calls; PyTorch's own examples warm up as often


class Replay:
    """A variant of one session, captured at its first call and replayed from then on.

    Slots keep their addresses and are captured as they are. Every other input is copied into a buffer of the graph, and
    the outputs are copied out of it, because the next replay overwrites both.

    Args:
        runner: the compiled variant; it writes its slots in place.
        is_slot: for every input, whether it is a slot.
    """

    def __init__(self, runner: Callable[..., Sequence[torch.Tensor]], is_slot: Sequence[bool]) -> None:
        self._runner = runner
        self._is_slot = tuple(is_slot)
        self._graph: torch.cuda.CUDAGraph | None = None
        self._inputs: list[torch.Tensor] = []
        self._outputs: Sequence[torch.Tensor] = ()

    def __call__(self, *inputs: torch.Tensor) -> list[torch.Tensor]:
        """Run the variant."""
        if self._graph is None:
            self._capture(inputs)
        assert self._graph is not None
        for buffer, given, is_slot in zip(self._inputs, inputs, self._is_slot, strict=True):
            if not is_slot:
                buffer.copy_(given)
        self._graph.replay()
        return [output.clone() for output in self._outputs]

    def _capture(self, inputs: Sequence[torch.Tensor]) -> None:
        self._inputs = [x if is_slot else x.clone() for x, is_slot in zip(inputs, self._is_slot, strict=True)]
        slots = [x for x, is_slot in zip(self._inputs, self._is_slot, strict=True) if is_slot]
        before = [slot.clone() for slot in slots]  # the warm-up calls write to the slots: undone below
        stream = torch.cuda.Stream()  # type: ignore[no-untyped-call]
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for _ in range(_WARM_UPS):
                self._runner(*self._inputs)
        torch.cuda.current_stream().wait_stream(stream)
        self._graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(self._graph):
            self._outputs = self._runner(*self._inputs)
        for slot, kept in zip(slots, before, strict=True):
            slot.copy_(kept)
