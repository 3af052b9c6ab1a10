"""Euler's method for models of a flow (rectified flow, flow matching), which predict a velocity."""

from __future__ import annotations

import dataclasses
import itertools

import torch
from torch import Tensor

from tcc.samplers.diffusion import whole_number
from tcc.samplers.sampler import Evaluation, Sampler, Solving

__all__ = ["FlowEuler"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class FlowEuler(Sampler):
    """Rectified-flow Euler (Liu et al. 2023, Algorithm 1): x = (1 - s) image + s noise, and s goes from 1 to 0.

    The model predicts noise - image. It is told s times `num_train_steps`, a fraction. The noise levels are those of
    diffusers' `FlowMatchEulerDiscreteScheduler` as Flux pipelines call it.

    Attributes:
        shift: a level s becomes shift s / (1 + (shift - 1) s) (Esser et al. 2024, eq. 23): above 1, more are noisy.
        num_train_steps: what the model is told at pure noise.
    """

    shift: float = 1.0
    num_train_steps: int = 1000

    def levels(self, num_steps: int | str) -> list[float]:
        """The levels s of the evaluations, and 0."""
        count = whole_number(num_steps)
        if count < 1:
            raise ValueError(f"num_steps must be at least 1, got {num_steps}")
        even = (1 - i / count for i in range(count + 1))
        return [self.shift * s / (1 + (self.shift - 1) * s) for s in even]

    def evaluations(self, num_steps: int | str) -> tuple[Evaluation, ...]:
        """See `Sampler`."""
        return tuple(Evaluation(s * self.num_train_steps) for s in self.levels(num_steps)[:-1])

    def scales(self, num_steps: int | str) -> tuple[tuple[float, float], ...]:
        """See `Sampler`."""
        return tuple((1 - s, s) for s in self.levels(num_steps)[:-1])

    def run(
        self, noise: Tensor, num_steps: int | str, generator: torch.Generator | None = None, first: int = 0
    ) -> Solving:
        """See `Sampler`; nothing is random."""
        x, levels = noise, self.levels(num_steps)[first:]
        for s, after in itertools.pairwise(levels):
            velocity = (yield x)[:, : x.shape[1]]
            x = x + (after - s) * velocity
        return x
