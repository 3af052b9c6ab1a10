"""The noising process, and the noise levels that a sampling run visits."""

from __future__ import annotations

import dataclasses
import functools
import math
from typing import Literal

import torch
from torch import Tensor

__all__ = ["Diffusion", "Step"]


def whole_number(num_steps: int | str) -> int:
    """The number of steps, which may be given as text.

    Raises:
        ValueError: it is no whole number.
    """
    if isinstance(num_steps, bool) or not str(num_steps).removeprefix("-").isdecimal():
        raise ValueError(f"num_steps={num_steps!r}: give a whole number of steps")
    return int(num_steps)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Diffusion:
    """The noising process over ``num_train_steps`` timesteps.

    Attributes:
        num_train_steps: number of training timesteps.
        beta_start: first beta.
        beta_end: last beta.
        schedule: how betas grow in between: `linear` (DDPM, DiT), or `scaled-linear`, whose roots grow linearly (Stable
            Diffusion, U-ViT).
        first_timestep: what the model is told at the least noise; 1 where it was trained on 1..num_train_steps (U-ViT).
    """

    num_train_steps: int = 1000
    beta_start: float = 1e-4
    beta_end: float = 0.02
    schedule: Literal["linear", "scaled-linear"] = "linear"
    first_timestep: int = 0

    @functools.cached_property
    def betas(self) -> Tensor:
        """Variance of the noise that each timestep adds, float64 ``[num_train_steps]``."""
        if self.schedule == "linear":
            return torch.linspace(self.beta_start, self.beta_end, self.num_train_steps, dtype=torch.float64)
        ends = (math.sqrt(self.beta_start), math.sqrt(self.beta_end))
        return torch.linspace(*ends, self.num_train_steps, dtype=torch.float64).square()

    @functools.cached_property
    def alpha_bar(self) -> Tensor:
        """Share of signal variance left at each timestep, float64 ``[num_train_steps]`` (DDPM eq. 4)."""
        return torch.cumprod(1 - self.betas, dim=0)

    @functools.cached_property
    def log_alpha_bar(self) -> Tensor:
        """Its logarithm: what is linear in time between two timesteps, where a solver evaluates there."""
        return self.alpha_bar.log()

    def alpha_bar_at(self, timestep: float) -> float:
        """`alpha_bar` at any time from the first timestep to the last: in between, its logarithm is linear."""
        place = timestep - self.first_timestep
        below = min(int(place), self.num_train_steps - 2)
        low, high = map(float, self.log_alpha_bar[below : below + 2])
        return math.exp(low + (place - below) * (high - low))

    def timestep_at(self, log_snr: float) -> float:
        """The time at which ``log(sqrt(alpha_bar) / sqrt(1 - alpha_bar))`` is `log_snr`, which falls with time."""
        wanted = -math.log1p(math.exp(-2 * log_snr))  # log of alpha_bar
        below = int((self.log_alpha_bar > wanted).sum()) - 1
        below = min(max(below, 0), self.num_train_steps - 2)
        low, high = map(float, self.log_alpha_bar[below : below + 2])
        return self.first_timestep + below + (wanted - low) / (high - low)

    def add_noise(self, x0: Tensor, t: Tensor, noise: Tensor) -> Tensor:
        """Noise ``x0 [B, ...]`` to timesteps ``t [B]`` (DDPM eq. 4)."""
        alpha_bar = self.alpha_bar.to(x0.device)[t - self.first_timestep].view(-1, *[1] * (x0.ndim - 1))
        return alpha_bar.sqrt().to(x0.dtype) * x0 + (1 - alpha_bar).sqrt().to(x0.dtype) * noise

    def timesteps(self, num_steps: int | str) -> tuple[int, ...]:
        """Choose the timesteps to visit, noisiest first.

        Args:
            num_steps: ``N`` (or ``"N"``) for N points spread evenly over the range, both ends included and
                rounded (IDDPM); ``"ddimN"`` for the integer stride that gives N points from 0 upwards (DDIM).

        Returns:
            N timesteps, e.g. ``(999, 946, ..., 105, 53, 0)`` for 20.
        """
        if isinstance(num_steps, str) and num_steps.startswith("ddim"):
            return self._strided(whole_number(num_steps.removeprefix("ddim")))
        count = whole_number(num_steps)
        if not 1 <= count <= self.num_train_steps:
            raise ValueError(f"num_steps must lie in 1..{self.num_train_steps}, got {count}")
        if count == 1:  # the range has two ends and one point: take the noisy one
            return (self.first_timestep + self.num_train_steps - 1,)
        stride = (self.num_train_steps - 1) / (count - 1)
        position, chosen = 0.0, []
        for _ in range(count):  # summed up, not multiplied: rounds as the public code does
            chosen.append(self.first_timestep + round(position))
            position += stride
        return tuple(reversed(chosen))

    def _strided(self, count: int) -> tuple[int, ...]:
        for stride in range(1, self.num_train_steps + 1):
            points = range(self.first_timestep, self.first_timestep + self.num_train_steps, stride)
            if len(points) == count:
                return tuple(reversed(points))
        raise ValueError(f"no integer stride visits exactly {count} of {self.num_train_steps} timesteps")

    def steps(self, num_steps: int | str) -> tuple[Step, ...]:
        """The steps of one sampling run, noisiest first."""
        visited = self.timesteps(num_steps)
        bars = [float(self.alpha_bar[t - self.first_timestep]) for t in visited]
        return tuple(
            Step(timestep=t, alpha_bar=bar, alpha_bar_next=after)
            for t, bar, after in zip(visited, bars, [*bars[1:], 1.0], strict=True)
        )


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Step:
    """The constants of one denoising step.

    Attributes:
        timestep: what the model is told.
        alpha_bar: signal share before the step.
        alpha_bar_next: signal share after it; 1 after the last.
    """

    timestep: int
    alpha_bar: float
    alpha_bar_next: float

    @property
    def is_last(self) -> bool:
        """Whether the result is the image."""
        return self.alpha_bar_next == 1.0
