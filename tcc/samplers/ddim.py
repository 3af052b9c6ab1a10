"""DDIM and DDPM: one evaluation per step, and nothing remembered between steps.

Sources: DDPM is Ho et al. 2020, DDIM is Song et al. 2021, IDDPM is Nichol & Dhariwal 2021 (learned variance). Numbers
agree with the public DiT code.
"""

from __future__ import annotations

import dataclasses
import math

import torch
from torch import Tensor

from tcc.samplers.diffusion import Diffusion, Step
from tcc.samplers.sampler import Evaluation, Sampler, Solving

__all__ = ["DDIM", "DDPM", "ddim_step", "ddpm_step", "predict_x0"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class DDIM(Sampler):
    """Denoising diffusion implicit models (Song et al. 2021).

    Attributes:
        eta: 0 deterministic, 1 as random as DDPM.
        clip: clamp the implied image to [-1, 1] at every step; right for pixels, wrong for latents.
        diffusion: the noising process.
    """

    eta: float = 0.0
    clip: bool = True
    diffusion: Diffusion = dataclasses.field(default_factory=Diffusion)

    def evaluations(self, num_steps: int | str) -> tuple[Evaluation, ...]:
        """See `Sampler`; the timesteps are `Diffusion.timesteps`."""
        return tuple(Evaluation(timestep) for timestep in self.diffusion.timesteps(num_steps))

    def scales(self, num_steps: int | str) -> tuple[tuple[float, float], ...]:
        """See `Sampler`: DDPM eq. 4."""
        return tuple((math.sqrt(s.alpha_bar), math.sqrt(1 - s.alpha_bar)) for s in self.diffusion.steps(num_steps))

    def run(
        self, noise: Tensor, num_steps: int | str, generator: torch.Generator | None = None, first: int = 0
    ) -> Solving:
        """See `Sampler`; noise is added where `eta` is not 0."""
        x = noise
        for step in self.diffusion.steps(num_steps)[first:]:
            eps = (yield x)[:, : x.shape[1]]
            fresh = _like(x, generator) if self.eta > 0 else None
            x = ddim_step(x, eps, step, noise=fresh, eta=self.eta, clip=self.clip)
        return x


@dataclasses.dataclass(frozen=True, kw_only=True)
class DDPM(Sampler):
    """Ancestral sampling (Ho et al. 2020), with the model's variance where it predicts one.

    Attributes:
        clip: clamp the implied image to [-1, 1] at every step; right for pixels, wrong for latents.
        diffusion: the noising process.
    """

    clip: bool = True
    diffusion: Diffusion = dataclasses.field(default_factory=Diffusion)

    def evaluations(self, num_steps: int | str) -> tuple[Evaluation, ...]:
        """See `Sampler`; the timesteps are `Diffusion.timesteps`."""
        return tuple(Evaluation(timestep) for timestep in self.diffusion.timesteps(num_steps))

    def scales(self, num_steps: int | str) -> tuple[tuple[float, float], ...]:
        """See `Sampler`: DDPM eq. 4."""
        return tuple((math.sqrt(s.alpha_bar), math.sqrt(1 - s.alpha_bar)) for s in self.diffusion.steps(num_steps))

    def run(
        self, noise: Tensor, num_steps: int | str, generator: torch.Generator | None = None, first: int = 0
    ) -> Solving:
        """See `Sampler`."""
        x, channels = noise, noise.shape[1]
        for step in self.diffusion.steps(num_steps)[first:]:
            output = yield x
            variance = output[:, channels:] if output.shape[1] > channels else None
            fresh = _like(x, generator)
            x = ddpm_step(x, output[:, :channels], step, noise=fresh, clip=self.clip, variance=variance)
        return x


def predict_x0(x: Tensor, eps: Tensor, step: Step, clip: bool) -> Tensor:
    """The image ``[B, C, H, W]`` that x and the predicted noise imply (DDIM eq. 9), clamped on demand."""
    x0 = (x - math.sqrt(1 - step.alpha_bar) * eps) / math.sqrt(step.alpha_bar)
    return x0.clamp(-1, 1) if clip else x0


def ddim_step(x: Tensor, eps: Tensor, step: Step, *, noise: Tensor | None, eta: float, clip: bool) -> Tensor:
    """One DDIM step (DDIM eq. 12; sigma from eq. 16).

    Args:
        x: noisy images ``[B, C, H, W]``.
        eps: predicted noise, same shape.
        step: the step's constants.
        noise: unit Gaussian, same shape; not read when ``eta`` is 0.
        eta: 0 deterministic, 1 as random as DDPM.
        clip: clamp the implied image to [-1, 1], and take the noise that agrees with it.
    """
    bar, after = step.alpha_bar, step.alpha_bar_next
    x0 = predict_x0(x, eps, step, clip)
    if clip:
        eps = (x - math.sqrt(bar) * x0) / math.sqrt(1 - bar)
    sigma = eta * math.sqrt(_posterior_variance(bar, after))
    mean = math.sqrt(after) * x0 + math.sqrt(1 - after - sigma**2) * eps
    return mean if sigma == 0 or noise is None else mean + sigma * noise


def ddpm_step(
    x: Tensor, eps: Tensor, step: Step, *, noise: Tensor | None, clip: bool, variance: Tensor | None = None
) -> Tensor:
    """One ancestral DDPM step: a draw from the posterior of DDPM eq. 6-7 at the implied image.

    Args:
        x: noisy images ``[B, C, H, W]``.
        eps: predicted noise, same shape.
        step: the step's constants.
        noise: unit Gaussian, same shape; not read at the last step.
        clip: clamp the implied image to [-1, 1].
        variance: the model's variance channels, same shape: interpolates between the logarithms of the
            posterior variance (-1) and beta (+1) (IDDPM eq. 15). None: the posterior variance.
    """
    bar, after = step.alpha_bar, step.alpha_bar_next
    beta = 1 - bar / after
    x0 = predict_x0(x, eps, step, clip)
    mean = math.sqrt(after) * beta / (1 - bar) * x0 + math.sqrt(bar / after) * (1 - after) / (1 - bar) * x
    if step.is_last or noise is None:
        return mean
    low = math.log(_posterior_variance(bar, after))
    if variance is None:
        return mean + math.exp(low / 2) * noise
    share = (variance + 1) / 2
    return mean + torch.exp((share * math.log(beta) + (1 - share) * low) / 2) * noise


def _like(x: Tensor, generator: torch.Generator | None) -> Tensor:
    return torch.randn(x.shape, generator=generator, device=x.device, dtype=x.dtype)


def _posterior_variance(bar: float, after: float) -> float:
    """Variance of the less noisy image given the noisier one and the clean one (DDPM eq. 7)."""
    return (1 - after) / (1 - bar) * (1 - bar / after)
