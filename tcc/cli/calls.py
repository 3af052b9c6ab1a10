"""What is measured of a model whose sampler tcc does not know: calls like one that is given."""

from __future__ import annotations

import functools
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree  # no public pytree module in torch 2.11-2.13

from tcc.capture import Captured
from tcc.cli.compare import PLAIN, Model
from tcc.samplers import Sampler

__all__ = ["Calls"]


@dataclass(frozen=True)
class Calls:
    """One call per step. The noise level, if it was found among the inputs, falls in equal parts from its value to 0.

    The sample, if it was, begins as noise and takes Euler steps of a flow, so that steps follow from each other as in
    earnest. What comes out is no image, but the distance of two results tells whether they were computed alike.

    Attributes:
        captured: the model's graph.
        args: positional inputs of a call.
        kwargs: keyword inputs.
        seed: of the noise.
    """

    captured: Captured
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    seed: int

    @property
    def device(self) -> torch.device:
        """Where the model runs."""
        return self.captured.inputs[0].device

    @functools.cached_property
    def tensors(self) -> list[Tensor]:
        """The inputs of the first step, in the order of the graph."""
        found, generator = self.captured.flatten(self.args, self.kwargs), torch.Generator().manual_seed(self.seed)
        for place in self.captured.samples:
            found[place] = torch.randn(found[place].shape, generator=generator).to(found[place])
        return found

    def first_call(self) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """The inputs of the first step."""
        return self._call(self.tensors)

    def denoise(self, model: Model, num_steps: int, sampler: Sampler = PLAIN) -> Iterator[Tensor]:
        """One step per value: the sample, or the output where no input is one. The sampler is this class's own."""
        tensors, level = list(self.tensors), self.captured.noise_level
        for step in range(num_steps):
            if level is not None:
                tensors[level] = (self.tensors[level] * (1 - step / num_steps)).to(self.tensors[level].dtype)
            args, kwargs = self._call(tensors)
            with torch.no_grad():
                output = next(x for x in pytree.tree_leaves(model(*args, **kwargs)) if isinstance(x, Tensor))
            place = next((p for p in self.captured.samples if _fits(tensors[p], output)), None)
            if place is not None:
                moved = output[:, : tensors[place].shape[1]]  # without the variance that some predict
                tensors[place] = tensors[place] - moved.to(tensors[place]) / num_steps
            yield output if place is None else tensors[place]

    def timesteps(self, num_steps: int, sampler: Sampler = PLAIN) -> Tensor | None:
        """See `Job`; None without a noise level, and where samples, or tokens, have noise levels of their own."""
        level = self.captured.noise_level
        values = None if level is None else self.tensors[level].flatten()
        if values is None or not len(values) or not bool((values == values[0]).all()):
            return None
        return torch.stack([(values[0] * (1 - step / num_steps)).to(values.dtype) for step in range(num_steps)])

    def _call(self, tensors: list[Tensor]) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """The arguments with these tensors in them."""
        constants, left = self.captured.constants, iter(tensors)
        leaves = [constants[n] if n in constants else next(left) for n in range(self.captured.in_spec.num_leaves)]
        call: tuple[tuple[Any, ...], dict[str, Any]] = pytree.tree_unflatten(leaves, self.captured.in_spec)
        return call


def _fits(sample: Tensor, output: Tensor) -> bool:
    """Whether the output, or its first channels, can be taken from the sample."""
    same = output.shape[:1] + output.shape[2:] == sample.shape[:1] + sample.shape[2:]
    return output.dim() == sample.dim() > 1 and same and output.shape[1] >= sample.shape[1]
