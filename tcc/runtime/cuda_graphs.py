"""Capturing calls as CUDA graphs: one launch replays all kernels of a step, or of a whole run."""

from __future__ import annotations

import functools
import threading
import warnings
from collections.abc import Callable, Sequence
from typing import Any

import torch

from tcc.errors import CallError, TccError

__all__ = ["Graphs", "Record", "Replay", "settle"]

#: `record(call, warm_ups)` returns what runs `call` again on the same memory, and the values that it returned.
Record = Callable[[Callable[[], Sequence[Any]], int], tuple[Callable[[], None], Sequence[Any]]]

_WARM_UPS = 3  # cuBLAS and cuDNN choose and allocate in their first calls; PyTorch's own examples warm up as often
_CAPTURING = threading.RLock()  # one capture at a time in a process, and no wait for a device meanwhile


@functools.cache
def _side_stream(device: torch.device) -> torch.cuda.Stream:
    """One for all captures on a device: graphs share memory only if they were captured on one stream."""
    return torch.cuda.Stream(device)  # type: ignore[no-untyped-call]


class Graphs:
    """Captures calls as CUDA graphs that share one pool of memory: no two of them may run at the same time.

    Args:
        device: the device that the calls run on.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._pool = torch.cuda.graph_pool_handle()

    def __call__(self, call: Callable[[], Sequence[Any]], warm_ups: int) -> tuple[Callable[[], None], Sequence[Any]]:
        """Capture `call` as a CUDA graph, after so many calls; other threads may use the device meanwhile."""
        with _CAPTURING, torch.cuda.device(self._device):
            side, graph = _side_stream(self._device), torch.cuda.CUDAGraph()
            side.wait_stream(torch.cuda.current_stream())
            try:
                with torch.cuda.stream(side), warnings.catch_warnings():
                    for _ in range(warm_ups):
                        call()
                    warnings.filterwarnings("error", message="The CUDA Graph is empty")
                    with torch.cuda.graph(graph, self._pool, side, capture_error_mode="thread_local"):
                        outputs = call()
            finally:  # whoever puts back what the calls wrote to waits for those that are still at it
                torch.cuda.current_stream().wait_stream(side)
        return graph.replay, outputs


def settle(device: torch.device) -> None:
    """Wait until nothing runs on the device, so that another stream may take up its memory."""
    if device.type == "cuda":
        with _CAPTURING:
            torch.cuda.synchronize(device)


class Replay:
    """A function of tensors, recorded at its first call and replayed from then on.

    Slots keep their addresses and are captured as they are. Every other input is copied into a buffer of the graph, and
    the outputs are copied out of it, because the next replay overwrites both.

    Args:
        runner: the function; it writes its slots in place, and nothing that it does depends on values of tensors. What
            it returns beside tensors is the same at every call.
        is_slot: for every input, whether it is a slot.
        record: what records it.
        warm_ups: calls before the one that is recorded.
    """

    def __init__(
        self, runner: Callable[..., Sequence[Any]], is_slot: Sequence[bool], record: Record, warm_ups: int = _WARM_UPS
    ) -> None:
        self._runner = runner
        self._is_slot = tuple(is_slot)
        self._record, self._warm_ups = record, warm_ups
        self._replay: Callable[[], None] | None = None
        self._inputs: list[torch.Tensor] = []
        self._outputs: Sequence[Any] = ()

    def __call__(self, *inputs: torch.Tensor) -> list[Any]:
        """Run the function.

        Raises:
            CallError: at the first call, where the function cannot be recorded; the slots are as they were.
        """
        if self._replay is None:
            self._replay = self._capture(inputs)
        for buffer, given, is_slot in zip(self._inputs, inputs, self._is_slot, strict=True):
            if not is_slot:
                buffer.copy_(given)
        self._replay()
        return [output.clone() if isinstance(output, torch.Tensor) else output for output in self._outputs]

    def _capture(self, inputs: Sequence[torch.Tensor]) -> Callable[[], None]:
        with torch.inference_mode(False):  # what is allocated in inference mode cannot be written to outside of it
            self._inputs = [x if is_slot else x.clone() for x, is_slot in zip(inputs, self._is_slot, strict=True)]
        slots = [x for x, is_slot in zip(self._inputs, self._is_slot, strict=True) if is_slot]
        before = [slot.clone() for slot in slots]  # the warm-up calls write to the slots: undone below
        try:
            replay, self._outputs = self._record(lambda: self._runner(*self._inputs), self._warm_ups)
        except TccError:
            raise
        except (RuntimeError, UserWarning) as error:
            raise CallError(
                f"this call cannot be captured as a CUDA graph: {_first_line(error)}. A captured call reads no "
                "value of a tensor, copies nothing from the host and runs on one device. Without "
                "mode='reduce-overhead' and whole_run, none is captured"
            ) from error
        finally:
            for slot, kept in zip(slots, before, strict=True):
                slot.copy_(kept)
        return replay


def _first_line(error: BaseException) -> str:
    """Of what went wrong first: ending a capture that failed raises once more."""
    while error.__context__ is not None:
        error = error.__context__
    return (str(error).strip().splitlines() or [type(error).__name__])[0]
