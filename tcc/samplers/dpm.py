"""DPM-Solver-2 as U-ViT and Learning-to-Cache run it: two evaluations per step, the second halfway in log-SNR.

diffusers' schedulers differ from it: their evaluations lie on one grid of whole timesteps, so that the second one is
halfway in time, and their last step is of first order (`dpm_solver_2s`). Here every step is of second order, timesteps
are fractional, and the run ends at the least noise of the training instead of none.
"""

from __future__ import annotations

import dataclasses
import itertools
import math
from typing import Literal

import torch
from torch import Tensor

from tcc.samplers.diffusion import Diffusion, whole_number
from tcc.samplers.sampler import Evaluation, Sampler, Solving

__all__ = ["DPMSolver2"]


@dataclasses.dataclass(frozen=True, slots=True)
class Level:
    """A noise level: x is alpha times the image plus sigma times unit noise."""

    timestep: float
    alpha: float
    sigma: float

    @property
    def log_snr(self) -> float:
        """Half the logarithm of the signal-to-noise ratio, lambda in the papers."""
        return math.log(self.alpha / self.sigma)


@dataclasses.dataclass(frozen=True, kw_only=True)
class DPMSolver2(Sampler):
    """DPM-Solver-2, singlestep (Lu et al. 2022a, Algorithm 1; predicting the image: Lu et al. 2022b, Algorithm 1).

    Steps have one length in time. A plan should not cache the second evaluation of a step: `tcc.plans.shifted`.

    Attributes:
        predict: what is taken as linear along a step: the implied `image` (U-ViT, Learning-to-Cache) or the `noise`.
        clip: clamp the implied image to [-1, 1] at every evaluation; right for pixels, wrong for latents.
        whole: evaluate at whole timesteps only, the nearest ones, for a model that takes integers.
        diffusion: the noising process.
    """

    predict: Literal["image", "noise"] = "image"
    clip: bool = True
    whole: bool = False
    diffusion: Diffusion = dataclasses.field(default_factory=Diffusion)

    def __post_init__(self) -> None:
        if self.predict not in ("image", "noise"):
            raise ValueError(f"predict={self.predict!r}: use 'image' or 'noise'")

    def evaluations(self, num_steps: int | str) -> tuple[Evaluation, ...]:
        """See `Sampler`; an even number."""
        ends = self._steps(num_steps)
        return tuple(Evaluation(at.timestep, stage) for s, middle, _ in ends for stage, at in enumerate((s, middle)))

    def scales(self, num_steps: int | str) -> tuple[tuple[float, float], ...]:
        """See `Sampler`."""
        return tuple((at.alpha, at.sigma) for s, middle, _ in self._steps(num_steps) for at in (s, middle))

    def run(
        self, noise: Tensor, num_steps: int | str, generator: torch.Generator | None = None, first: int = 0
    ) -> Solving:
        """See `Sampler`; nothing is random."""
        if first % 2:
            raise ValueError(f"a step of DPM-Solver-2 begins at an even evaluation, not at {first}")
        x, channels = noise, noise.shape[1]
        for s, middle, t in self._steps(num_steps)[first // 2 :]:
            before = self._prediction(x, (yield x)[:, :channels], s)
            halfway = self._moved(x, before, s, middle)
            second = self._prediction(halfway, (yield halfway)[:, :channels], middle)
            share = (middle.log_snr - s.log_snr) / (t.log_snr - s.log_snr)
            x = self._moved(x, before + (second - before) / (2 * share), s, t)
        return x

    def _prediction(self, x: Tensor, eps: Tensor, at: Level) -> Tensor:
        """The implied image, or the noise that agrees with it."""
        image = (x - at.sigma * eps) / at.alpha
        image = image.clamp(-1, 1) if self.clip else image
        return image if self.predict == "image" else (x - at.alpha * image) / at.sigma

    def _moved(self, x: Tensor, prediction: Tensor, s: Level, t: Level) -> Tensor:
        """The exact solution from s to t, were the prediction constant: DDIM."""
        h = t.log_snr - s.log_snr
        if self.predict == "image":
            return t.sigma / s.sigma * x - t.alpha * math.expm1(-h) * prediction
        return t.alpha / s.alpha * x - t.sigma * math.expm1(h) * prediction

    def _steps(self, num_steps: int | str) -> list[tuple[Level, Level, Level]]:
        """Start, middle and end of every step."""
        count, process = whole_number(num_steps), self.diffusion
        if count < 2 or count % 2:
            raise ValueError(f"DPM-Solver-2 takes two evaluations per step: an even number of them, got {num_steps}")
        first, last = process.first_timestep, process.first_timestep + process.num_train_steps - 1
        times = [last + (first - last) * i / (count // 2) for i in range(count // 2 + 1)]
        ends = [self._level(float(round(time)) if self.whole else time) for time in times]
        return [(s, self._between(s, t), t) for s, t in itertools.pairwise(ends)]

    def _between(self, s: Level, t: Level) -> Level:
        """Halfway in log-SNR; of whole timesteps the nearest that is neither end."""
        time = self.diffusion.timestep_at((s.log_snr + t.log_snr) / 2)
        if not self.whole:
            return self._level(time)
        if s.timestep - t.timestep < 2:
            raise ValueError(f"no whole timestep lies between {s.timestep:g} and {t.timestep:g}: take fewer steps")
        return self._level(min(max(round(time), t.timestep + 1), s.timestep - 1))

    def _level(self, timestep: float) -> Level:
        bar = self.diffusion.alpha_bar_at(timestep)
        return Level(int(timestep) if self.whole else float(timestep), math.sqrt(bar), math.sqrt(1 - bar))
