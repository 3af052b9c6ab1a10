"""What one run of a method tells besides its time: arithmetic, cached bytes, what `torch.compile` had to do."""

from __future__ import annotations

import contextlib
import gc
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
import torch._dynamo.utils as dynamo
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode, sdpa_flop_count

from tcc.cli.compare import Method, Task

#: torch counts the fused attention of accelerators only; on CPUs it is another operator with the same inputs.
CPU_ATTENTION = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu


@dataclass(frozen=True)
class Work:
    """What an eager run did.

    Attributes:
        macs: multiply-accumulates of matrix products, attention and convolutions, for the whole batch.
        live_bytes: the most bytes of tensors that were alive between two steps, beyond those before the run.
    """

    macs: float
    live_bytes: int


@dataclass(frozen=True)
class Compilation:
    """What `torch.compile` did while something ran.

    Attributes:
        seconds: in Dynamo and its backend.
        graph_breaks: how often a graph ended before its function did.
        recompiles: how often a function was compiled again, because a guard failed.
    """

    seconds: float
    graph_breaks: int
    recompiles: int


def eager_work(method: Method, task: Task) -> Work:
    """One run, counted operator by operator; not for compiled methods.

    Every decision that a cache takes shows in what is computed, so nothing need be known of the cache.
    """
    model = method.open()
    gc.collect()
    before, most = _live_bytes(), 0

    def count(query: Any, key: Any, value: Any, *args: Any, **kwargs: Any) -> int:  # shapes
        return int(sdpa_flop_count(query, key, value))

    with FlopCounterMode(display=False, custom_mapping={CPU_ATTENTION: count}) as counter:
        for _ in task.denoise(model, method.num_steps, method.sampler):
            most = max(most, _live_bytes() - before)
    return Work(counter.get_total_flops() / 2, most)


@contextlib.contextmanager
def watched_compilation() -> Iterator[list[Compilation]]:
    """Fills the list when the block ends."""
    found: list[Compilation] = []
    breaks = sum(dynamo.counters["graph_break"].values())
    dynamo.clear_compilation_metrics()
    dynamo.set_compilation_metrics_limit(100_000)
    try:
        yield found
    finally:
        metrics = dynamo.get_compilation_metrics()
        found.append(
            Compilation(
                sum(m.entire_frame_compile_time_s or 0.0 for m in metrics),
                sum(dynamo.counters["graph_break"].values()) - breaks,
                sum(bool(m.recompile_reason) for m in metrics),
            )
        )


def peak_bytes(method: Method, task: Task) -> int | None:
    """The accelerator's peak during a run, weights included; None on CPUs, where no measure is sound."""
    if task.noise.device.type != "cuda":
        return None
    torch.cuda.reset_peak_memory_stats()
    run(method, task)
    return torch.cuda.max_memory_allocated()


def run(method: Method, task: Task) -> Tensor:
    """One run: the images `[B, C, H, W]`."""
    *_, images = task.denoise(method.open(), method.num_steps, method.sampler)
    return images


def _live_bytes() -> int:
    """The bytes of all storages that Python can reach."""
    found = {}
    for thing in gc.get_objects():
        if type(thing) in (Tensor, nn.Parameter):
            storage = thing.untyped_storage()
            found[storage.data_ptr()] = storage.nbytes()
    return sum(found.values())
