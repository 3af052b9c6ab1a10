"""The processes that train together, when torchrun has started several."""

from __future__ import annotations

import functools
import itertools
import os
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

__all__ = ["World", "join_world"]


@dataclass(frozen=True)
class World:
    """This process among all.

    Attributes:
        rank: its number.
        size: how many there are.
    """

    rank: int = 0
    size: int = 1

    @property
    def speaks(self) -> bool:
        """Whether this process prints and writes: the first one."""
        return self.rank == 0

    def sum(self, numbers: Tensor) -> Tensor:
        """The sum of `numbers` over all processes."""
        if self.size > 1:
            dist.all_reduce(numbers)
        return numbers

    def average_gradients(self, parameters: Iterable[nn.Parameter], count: int, extra: Tensor) -> Tensor:
        """Divide the gradients, summed over all processes, by `count`; one message.

        A parameter without a gradient anywhere has none afterwards: optimisers do not move it.

        Args:
            parameters: the same in every process.
            count: over how many samples the gradients are sums.
            extra: `[n]`, other numbers to sum up.

        Returns:
            The sums of `extra`, `[n]` float64.
        """
        known = [parameter for parameter in parameters if parameter.requires_grad]
        has = [float(parameter.grad is not None) for parameter in known]
        flat = [torch.zeros_like(p).flatten() if p.grad is None else p.grad.flatten() for p in known]
        device = known[0].device
        numbers = torch.cat([extra.double().to(device), torch.tensor(has, dtype=torch.float64, device=device)])
        total = self.sum(torch.cat([numbers, *(grad.double() for grad in flat)]))
        sizes = [len(extra), len(known), *(parameter.numel() for parameter in known)]
        sums, anywhere, *grads = torch.split(total, sizes)
        for parameter, there, grad in zip(known, anywhere.tolist(), grads, strict=True):
            parameter.grad = (grad / count).to(parameter.dtype).view_as(parameter) if there else None
        return sums.cpu()


@functools.cache
def _rendezvous() -> tuple[Any, int, int]:
    """Where torchrun's processes find each other, this process's rank, and how many there are."""
    from torch.distributed.rendezvous import rendezvous  # imported here: not in every build of torch

    store, rank, size = next(rendezvous("env://"))
    return store, rank, size


_joined = itertools.count()


@contextmanager
def join_world(device: str = "cpu") -> Iterator[World]:
    """This process's world: that of torchrun where it was started so, else a lone one.

    A process may join as often as it likes, one world after the other, if all processes do so alike. A process group
    that is there already is used, and left as it is.

    Args:
        device: where training runs; processes talk by NCCL on `cuda`, by gloo elsewhere.
    """
    if dist.is_available() and dist.is_initialized():
        yield World(dist.get_rank(), dist.get_world_size())
        return
    if "RANK" not in os.environ or int(os.environ.get("WORLD_SIZE", "1")) == 1:
        yield World()
        return
    cuda = device == "cuda"
    if cuda:
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", "0")))
    store, rank, size = _rendezvous()
    # the store outlives a group and keeps its addresses: a group that found those of an earlier one would wait for it
    place = dist.PrefixStore(f"tcc-{next(_joined)}", store)  # type: ignore[attr-defined]
    dist.init_process_group("nccl" if cuda else "gloo", store=place, rank=rank, world_size=size)
    try:
        yield World(rank, size)
    finally:
        dist.destroy_process_group()
