"""Capturing calls as CUDA graphs: one launch replays all kernels of a step, or of a whole run."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch

__all__ = ["Record", "Replay", "record"]

#: `record(call, warm_ups)` returns what runs `call` again on the same memory, and the tensors that its results are in.
Record = Callable[[Callable[[], Sequence[torch.Tensor]], int], tuple[Callable[[], None], Sequence[torch.Tensor]]]

_WARM_UPS = 3  # cuBLAS and cuDNN choose and allocate in their first calls; PyTorch's own examples warm up as often


def record(
    call: Callable[[], Sequence[torch.Tensor]], warm_ups: int
) -> tuple[Callable[[], None], Sequence[torch.Tensor]]:
    """Capture `call` as a CUDA graph, after so many calls on a stream of their own."""
    stream = torch.cuda.Stream()  # type: ignore[no-untyped-call]
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(warm_ups):
            call()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        outputs = call()
    return graph.replay, outputs


class Replay:
    """A function of tensors, recorded at its first call and replayed from then on.

    Slots keep their addresses and are captured as they are. Every other input is copied into a buffer of the graph, and
    the outputs are copied out of it, because the next replay overwrites both.

    Args:
        runner: the function; it writes its slots in place, and nothing that it does depends on values of tensors.
        is_slot: for every input, whether it is a slot.
        warm_ups: calls before the one that is recorded.
        record: what records it.
    """

    def __init__(
        self,
        runner: Callable[..., Sequence[torch.Tensor]],
        is_slot: Sequence[bool],
        *,
        warm_ups: int = _WARM_UPS,
        record: Record = record,
    ) -> None:
        self._runner = runner
        self._is_slot = tuple(is_slot)
        self._warm_ups, self._record = warm_ups, record
        self._replay: Callable[[], None] | None = None
        self._inputs: list[torch.Tensor] = []
        self._outputs: Sequence[torch.Tensor] = ()

    def __call__(self, *inputs: torch.Tensor) -> list[torch.Tensor]:
        """Run the function."""
        if self._replay is None:
            self._replay = self._capture(inputs)
        for buffer, given, is_slot in zip(self._inputs, inputs, self._is_slot, strict=True):
            if not is_slot:
                buffer.copy_(given)
        self._replay()
        return [output.clone() for output in self._outputs]

    def _capture(self, inputs: Sequence[torch.Tensor]) -> Callable[[], None]:
        self._inputs = [x if is_slot else x.clone() for x, is_slot in zip(inputs, self._is_slot, strict=True)]
        slots = [x for x, is_slot in zip(self._inputs, self._is_slot, strict=True) if is_slot]
        before = [slot.clone() for slot in slots]  # the warm-up calls write to the slots: undone below
        replay, self._outputs = self._record(lambda: self._runner(*self._inputs), self._warm_ups)
        for slot, kept in zip(slots, before, strict=True):
            slot.copy_(kept)
        return replay
