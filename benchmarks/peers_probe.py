"""What an eager run of a method tells that is no plan of tcc's: its arithmetic and what it keeps."""

from __future__ import annotations

import gc
import itertools
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode, sdpa_flop_count

from tcc.cli.compare import Method, Task

#: torch counts the fused attention of accelerators only; on CPUs it is another operator with the same inputs.
CPU_ATTENTION = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu


@dataclass(frozen=True)
class Work:
    """What an eager run did.

    Attributes:
        step_macs: multiply-accumulates of matrix products, attention and convolutions, for the whole batch, by step.
        live_bytes: the most bytes of tensors that were alive between two steps, beyond those before the run.
    """

    step_macs: tuple[float, ...]
    live_bytes: int

    @property
    def macs(self) -> float:
        """Of the run."""
        return sum(self.step_macs)


def eager_work(method: Method, task: Task) -> Work:
    """One run, counted operator by operator; not for compiled methods.

    Every decision that a cache takes shows in what is computed, so nothing need be known of the cache.
    """
    model = method.open()
    gc.collect()
    before, most, flops = _live_bytes(), 0, [0]

    def count(query: Any, key: Any, value: Any, *args: Any, **kwargs: Any) -> int:  # shapes
        return int(sdpa_flop_count(query, key, value))

    with FlopCounterMode(display=False, custom_mapping={CPU_ATTENTION: count}) as counter:
        for _ in task.denoise(model, method.num_steps, method.sampler):
            most = max(most, _live_bytes() - before)
            flops.append(counter.get_total_flops())
    return Work(tuple((after - so_far) / 2 for so_far, after in itertools.pairwise(flops)), most)


def _live_bytes() -> int:
    """The bytes of all storages that Python can reach."""
    found = {}
    for thing in gc.get_objects():
        if type(thing) in (Tensor, nn.Parameter) and thing.layout is torch.strided:  # others have no storage to ask for
            storage = thing.untyped_storage()
            found[storage.data_ptr()] = storage.nbytes()
    return sum(found.values())
