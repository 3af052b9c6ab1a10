"""DDIM and DDPM sampling with classifier-free guidance, one model call per step.

The model is called as ``model(x, t, y)`` with the same shapes and dtypes at every step, so a compiled plan
can stand in for it. Steps are numbered in execution order, noisiest first.

Sources: DDPM is Ho et al. 2020, DDIM is Song et al. 2021, IDDPM is Nichol & Dhariwal 2021 (respacing and
learned variance), classifier-free guidance is Ho & Salimans 2022. Numbers agree with the public DiT code.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable
from typing import Literal

import torch
from torch import Tensor

from tcc.errors import CallError

Model = Callable[[Tensor, Tensor, Tensor], Tensor]
Progress = Callable[[int, int], None]
GuidanceChannels = Literal["all", "first-three"]
Sampler = Literal["ddim", "ddpm"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Diffusion:
    """The noising process: linear betas over ``num_train_steps`` timesteps.

    Attributes:
        num_train_steps: number of training timesteps.
        beta_start: first beta.
        beta_end: last beta.
    """

    num_train_steps: int = 1000
    beta_start: float = 1e-4
    beta_end: float = 0.02

    @functools.cached_property
    def alpha_bar(self) -> Tensor:
        """Share of signal variance left at each timestep, float64 ``[num_train_steps]`` (DDPM eq. 4)."""
        betas = torch.linspace(self.beta_start, self.beta_end, self.num_train_steps, dtype=torch.float64)
        return torch.cumprod(1 - betas, dim=0)

    def add_noise(self, x0: Tensor, t: Tensor, noise: Tensor) -> Tensor:
        """Noise ``x0 [B, ...]`` to timesteps ``t [B]`` (DDPM eq. 4)."""
        alpha_bar = self.alpha_bar.to(x0.device)[t].view(-1, *[1] * (x0.ndim - 1))
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
            return self._strided(int(num_steps.removeprefix("ddim")))
        count = int(num_steps)
        if not 1 <= count <= self.num_train_steps:
            raise ValueError(f"num_steps must lie in 1..{self.num_train_steps}, got {count}")
        if count == 1:  # the range has two ends and one point: take the noisy one
            return (self.num_train_steps - 1,)
        stride = (self.num_train_steps - 1) / (count - 1)
        position, chosen = 0.0, []
        for _ in range(count):  # summed up, not multiplied: rounds as the public code does
            chosen.append(round(position))
            position += stride
        return tuple(reversed(chosen))

    def _strided(self, count: int) -> tuple[int, ...]:
        for stride in range(1, self.num_train_steps + 1):
            points = range(0, self.num_train_steps, stride)
            if len(points) == count:
                return tuple(reversed(points))
        raise ValueError(f"no integer stride visits exactly {count} of {self.num_train_steps} timesteps")

    def steps(self, num_steps: int | str) -> tuple[Step, ...]:
        """The steps of one sampling run, noisiest first."""
        visited = self.timesteps(num_steps)
        bars = [float(self.alpha_bar[t]) for t in visited]
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


def guide(output: Tensor, scale: float, channels: int, guidance_channels: GuidanceChannels = "all") -> Tensor:
    """Classifier-free guidance of a doubled batch: ``uncond + scale * (cond - uncond)``.

    Args:
        output: the model's output ``[2B, C_out, H, W]``, conditional half first.
        scale: guidance scale; 1 is no guidance.
        channels: input channels C; the noise is the first C output channels.
        guidance_channels: ``all`` guides all C; ``first-three`` guides only channels 0-2 and leaves the
            others conditional, as the public DiT sampler does.

    Returns:
        ``[B, C_out, H, W]``; the variance channels are the conditional half's.
    """
    cond, uncond = output.chunk(2)
    guided = channels if guidance_channels == "all" else min(3, channels)
    eps = uncond[:, :guided] + scale * (cond[:, :guided] - uncond[:, :guided])
    return torch.cat([eps, cond[:, guided:]], dim=1)


@torch.no_grad()
def sample(
    model: Model,
    noise: Tensor,
    labels: Tensor,
    *,
    num_steps: int | str = 50,
    sampler: Sampler = "ddim",
    cfg_scale: float = 1.0,
    null_class: int | None = None,
    guidance_channels: GuidanceChannels = "all",
    eta: float = 0.0,
    clip: bool = True,
    diffusion: Diffusion | None = None,
    generator: torch.Generator | None = None,
    progress: Progress | None = None,
) -> Tensor:
    """Turn noise into images, calling the model exactly once per step.

    Args:
        model: called as ``model(x, t, y)`` and returns ``[N, C or 2C, H, W]``; ``reset()`` is called first if
            it has that method. ``N`` is B, or 2B under guidance (conditional half first); ``t`` is int64.
        noise: unit Gaussian ``[B, C, H, W]``.
        labels: class labels int64 ``[B]``.
        num_steps: see :meth:`Diffusion.timesteps`.
        sampler: ``ddim`` or ``ddpm``.
        cfg_scale: guidance scale; at 1 the batch is not doubled.
        null_class: label of the unconditional half; by default ``model.config.null_class``.
        guidance_channels: see :func:`guide`.
        eta: randomness of DDIM.
        clip: clamp the implied image to [-1, 1] at every step; right for pixels, wrong for latents.
        diffusion: the noising process; by default 1000 linear betas from 1e-4 to 0.02.
        generator: source of the noise added by DDPM and by DDIM with ``eta > 0``.
        progress: called as ``progress(steps_done, num_steps)`` after each step.

    Returns:
        Images ``[B, C, H, W]``.

    Raises:
        CallError: the model runs a plan of another number of steps.
    """
    if sampler not in ("ddim", "ddpm"):
        raise ValueError(f"unknown sampler {sampler!r}: choose ddim or ddpm")
    guided = cfg_scale != 1.0
    y = torch.cat([labels, torch.full_like(labels, _null_class(model, null_class))]) if guided else labels
    reset = getattr(model, "reset", None)
    if callable(reset):
        reset()
    steps = (diffusion or Diffusion()).steps(num_steps)
    x, channels = noise, noise.shape[1]
    for done, step in enumerate(steps, start=1):
        _check_num_steps(model, len(steps))  # at every step: a policy makes its plan at the first call
        t = torch.full((len(y),), step.timestep, dtype=torch.int64, device=x.device)
        output = model(torch.cat([x, x]) if guided else x, t, y)
        if guided:
            output = guide(output, cfg_scale, channels, guidance_channels)
        eps, variance = output[:, :channels], output[:, channels:] if output.shape[1] > channels else None
        random = sampler == "ddpm" or eta > 0
        fresh = torch.randn(x.shape, generator=generator, device=x.device, dtype=x.dtype) if random else None
        if sampler == "ddim":
            x = ddim_step(x, eps, step, noise=fresh, eta=eta, clip=clip)
        else:
            x = ddpm_step(x, eps, step, noise=fresh, clip=clip, variance=variance)
        if progress is not None:
            progress(done, len(steps))
    return x


def _posterior_variance(bar: float, after: float) -> float:
    """Variance of the less noisy image given the noisier one and the clean one (DDPM eq. 7)."""
    return (1 - after) / (1 - bar) * (1 - bar / after)


def _check_num_steps(model: Model, count: int) -> None:
    """A compiled model only sees calls: here the run's length is known, and that of its plan."""
    planned = getattr(model, "num_steps", None)
    if isinstance(planned, int) and planned != count:
        raise CallError(
            f"the sampler runs {count} steps, but the model's plan has {planned}: sample with num_steps={planned}, or "
            f"make the plan with num_steps={count}"
        )


def _null_class(model: Model, null_class: int | None) -> int:
    """The label of the unconditional half, from the caller or from the model."""
    if null_class is None:
        null_class = getattr(getattr(model, "config", None), "null_class", None)
    if null_class is None:
        raise ValueError("guidance needs a null class, and the model names none: pass null_class, or cfg_scale=1")
    return null_class
