"""Sampling with classifier-free guidance, one model call per evaluation.

The model is called as ``model(x, t, y)`` with the same shapes and dtypes at every step, so a compiled plan
can stand in for it. Steps are numbered in execution order, noisiest first.

Classifier-free guidance is Ho & Salimans 2022. Numbers agree with the public DiT code.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from typing import Any, Literal

import torch
from torch import Tensor

from tcc.errors import CallError
from tcc.samplers.ddim import DDIM, DDPM
from tcc.samplers.diffusion import Diffusion
from tcc.samplers.dpm import DPMSolver2
from tcc.samplers.flow import FlowEuler
from tcc.samplers.sampler import Evaluation, Sampler, denoise
from tcc.samplers.schedulers import dpm_solver_2m, dpm_solver_2s

__all__ = ["SAMPLERS", "guide", "named", "sample", "timestep_dtype"]

Model = Callable[[Tensor, Tensor, Tensor], Tensor]
Progress = Callable[[int, int], None]
GuidanceChannels = Literal["all", "first-three"]

#: What makes a sampler, by name.
SAMPLERS: dict[str, Callable[..., Sampler]] = {
    "ddim": DDIM,
    "ddpm": DDPM,
    "dpm-solver-2": DPMSolver2,
    "dpm-solver++2m": dpm_solver_2m,
    "dpm-solver++2s": dpm_solver_2s,
    "flow-euler": FlowEuler,
}


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
    sampler: str | Sampler = "ddim",
    cfg_scale: float = 1.0,
    null_class: int | None = None,
    guidance_channels: GuidanceChannels = "all",
    eta: float | None = None,
    clip: bool | None = None,
    diffusion: Diffusion | None = None,
    generator: torch.Generator | None = None,
    progress: Progress | None = None,
) -> Tensor:
    """Turn noise into images, calling the model exactly once per step.

    Args:
        model: called as ``model(x, t, y)`` and returns ``[N, C or 2C, H, W]``; ``reset()`` is called first if
            it has that method. ``N`` is B, or 2B under guidance (conditional half first); ``t`` is int64, or float32
            for a sampler that evaluates between the training timesteps.
        noise: unit Gaussian ``[B, C, H, W]``.
        labels: class labels int64 ``[B]``.
        num_steps: model evaluations, whatever number of them a solver takes for a step of its own; see also
            :meth:`Diffusion.timesteps`.
        sampler: a sampler, or the name of one: see `SAMPLERS`.
        cfg_scale: guidance scale; at 1 the batch is not doubled.
        null_class: label of the unconditional half; by default ``model.config.null_class``.
        guidance_channels: see :func:`guide`.
        eta: of a named sampler: randomness of DDIM; by default 0.
        clip: of a named sampler: clamp the implied image to [-1, 1] at every step; right for pixels, wrong for latents.
            By default True.
        diffusion: of a named sampler: the noising process; by default 1000 linear betas from 1e-4 to 0.02.
        generator: source of the noise added by DDPM and by DDIM with ``eta > 0``.
        progress: called as ``progress(steps_done, num_steps)`` after each step.

    Returns:
        Images ``[B, C, H, W]``.

    Raises:
        CallError: the model runs a plan of another number of steps, or the sampler needs diffusers.
        ValueError: an unknown sampler, an option that it does not have, or guidance without a null class.
    """
    chosen = _chosen(sampler, eta=eta, clip=clip, diffusion=diffusion)
    guided = cfg_scale != 1.0
    y = torch.cat([labels, torch.full_like(labels, _null_class(model, null_class))]) if guided else labels
    reset = getattr(model, "reset", None)
    if callable(reset):
        reset()
    evaluations = chosen.evaluations(num_steps)
    count, dtype, channels = len(evaluations), timestep_dtype(evaluations), noise.shape[1]

    def evaluate(x: Tensor, evaluation: Evaluation) -> Tensor:
        _check_num_steps(model, count)  # at every step: a policy makes its plan at the first call
        t = torch.full((len(y),), evaluation.timestep, dtype=dtype, device=x.device)
        output = model(torch.cat([x, x]) if guided else x, t, y)
        return guide(output, cfg_scale, channels, guidance_channels) if guided else output

    x, run = noise, denoise(chosen, evaluate, noise, num_steps, generator)
    for done in range(1, count + 1):
        x = next(run)
        if progress is not None:
            progress(done, count)
    return x


def named(name: str, **options: Any) -> Sampler:
    """The sampler of that name.

    Args:
        name: a key of `SAMPLERS`.
        options: its options.

    Raises:
        ValueError: there is no such sampler, or it has no such option.
        CallError: it needs diffusers, which is not installed.
    """
    if name not in SAMPLERS:
        raise ValueError(f"unknown sampler {name!r}: choose {', '.join(SAMPLERS)}")
    parameters = inspect.signature(SAMPLERS[name]).parameters
    for option in options:
        if option not in parameters:
            raise ValueError(f"sampler {name!r} has no option {option}; it has {', '.join(parameters)}")
    return SAMPLERS[name](**options)


def timestep_dtype(evaluations: Sequence[Evaluation]) -> torch.dtype:
    """What the model's timesteps are in: int64 where all of a run are whole numbers, else float32."""
    return torch.int64 if all(isinstance(e.timestep, int) for e in evaluations) else torch.float32


def _chosen(sampler: str | Sampler, **options: Any) -> Sampler:
    """The sampler; a name with the options that were given."""
    given = {name: value for name, value in options.items() if value is not None}
    if isinstance(sampler, str):
        return named(sampler, **given)
    if given:
        raise ValueError(f"{', '.join(given)}: options of a sampler that is given by its name; this one has its own")
    return sampler


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
