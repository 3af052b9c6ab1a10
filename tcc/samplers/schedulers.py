"""Schedulers of diffusers as samplers: DPM-Solver++, and any other that a pipeline uses."""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import inspect
import warnings
from collections.abc import Mapping
from types import ModuleType
from typing import Any, Literal, get_args

import torch
from torch import Tensor

from tcc.errors import CallError
from tcc.samplers.diffusion import Diffusion, whole_number
from tcc.samplers.sampler import Evaluation, Sampler, Solving

__all__ = ["Scheduled", "Spacing", "dpm_solver_2m", "dpm_solver_2s"]

Spacing = Literal["time", "log-snr"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Scheduled(Sampler):
    """A scheduler of diffusers. Its steps are evaluations already, those of solvers that take two per step too.

    Attributes:
        scheduler: the scheduler; it is copied for every run.
        settings: further arguments of its `set_timesteps`: `mu`, where a flow's shift depends on the resolution.
    """

    scheduler: Any
    settings: Mapping[str, Any] = dataclasses.field(default_factory=dict)

    def evaluations(self, num_steps: int | str) -> tuple[Evaluation, ...]:
        """See `Sampler`; the timesteps are the scheduler's."""
        scheduler = self._started(num_steps)
        orders = getattr(scheduler, "order_list", None)  # of singlestep solvers: 1 at a first evaluation, 2 at a second
        times = scheduler.timesteps.tolist()
        stages = [order - 1 for order in orders] if orders else [i % self._order for i in range(len(times))]
        return tuple(Evaluation(timestep, stage) for timestep, stage in zip(times, stages, strict=True))

    def run(
        self, noise: Tensor, num_steps: int | str, generator: torch.Generator | None = None, first: int = 0
    ) -> Solving:
        """See `Sampler`."""
        if first:
            raise ValueError("a scheduler of diffusers begins at its first evaluation")
        scheduler = self._started(num_steps)
        x: Tensor = noise * getattr(scheduler, "init_noise_sigma", 1.0)  # schedulers of flows have neither
        scale = getattr(scheduler, "scale_model_input", lambda x, timestep: x)
        random = {"generator": generator} if "generator" in inspect.signature(scheduler.step).parameters else {}
        for timestep in scheduler.timesteps:
            output = yield scale(x, timestep)
            x = scheduler.step(output[:, : noise.shape[1]], timestep, x, return_dict=False, **random)[0]
        return x

    @property
    def _order(self) -> int:
        """Evaluations of one of its steps; some schedulers of one do not say."""
        return int(getattr(self.scheduler, "order", 1))

    def _started(self, num_steps: int | str) -> Any:
        """A copy of the scheduler, at the beginning of a run of so many evaluations.

        Raises:
            ValueError: it has no such run, or refuses the settings.
        """
        count = whole_number(num_steps)
        scheduler = self._set(-(-count // self._order))
        if len(scheduler.timesteps) == count:
            return scheduler
        others = {len(scheduler.timesteps): scheduler}  # solvers that begin in another way have more or fewer
        for steps in range(1, count + 1):
            with contextlib.suppress(ValueError):
                other = self._set(steps)
                others[len(other.timesteps)] = other
        if count in others:
            return others[count]
        near = sorted(sorted(others, key=lambda has: abs(has - count))[:2])
        name, runs = type(scheduler).__name__, " and ".join(map(str, near))
        raise ValueError(f"{name} has no run of {count} evaluations; the nearest are of {runs}")

    def _set(self, steps: int) -> Any:
        """A copy of the scheduler at the beginning of so many of its own steps.

        Raises:
            ValueError: it refuses.
        """
        scheduler = copy.deepcopy(self.scheduler)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", DeprecationWarning)  # numpy's, of how the schedulers make arrays
            try:
                scheduler.set_timesteps(steps, **self.settings)
            except (TypeError, ValueError) as error:
                name, given = type(scheduler).__name__, ", ".join(self.settings) or "no further settings"
                raise ValueError(
                    f"{name}.set_timesteps({steps}) with {given}: {error}: give what it asks for as "
                    "Scheduled(..., settings={name: value})"
                ) from error
        return scheduler


def dpm_solver_2m(*, clip: bool = True, diffusion: Diffusion | None = None, spacing: Spacing = "time") -> Scheduled:
    """DPM-Solver++(2M): second order, from this evaluation and the one before (Lu et al. 2022b, Algorithm 2).

    The first and the last step are of first order: before the first nothing is known, and the last ends without noise.

    Args:
        clip: clamp the implied image to [-1, 1] at every evaluation; right for pixels, wrong for latents.
        diffusion: the noising process; by default 1000 linear betas from 1e-4 to 0.02.
        spacing: steps of one length in `time`, or in `log-snr`.

    Raises:
        CallError: diffusers is not installed.
        ValueError: an unknown spacing.
    """
    if spacing not in get_args(Spacing):
        raise ValueError(f"unknown spacing {spacing!r}: choose {' or '.join(get_args(Spacing))}")
    given = _config(clip, diffusion) | {"use_lu_lambdas": spacing == "log-snr"}
    return Scheduled(scheduler=_diffusers().DPMSolverMultistepScheduler(**given))


def dpm_solver_2s(*, clip: bool = True, diffusion: Diffusion | None = None) -> Scheduled:
    """DPM-Solver++(2S): two evaluations per step (Lu et al. 2022b, Algorithm 1), on a grid of whole timesteps.

    The evaluations are spread evenly in time, so the second one of a step lies where the grid has it, not halfway in
    log-SNR as in the paper and in U-ViT's code: for that see `DPMSolver2`. The last step is of first order; for an even
    number of evaluations, the last two.

    Args:
        clip: clamp the implied image to [-1, 1] at every evaluation; right for pixels, wrong for latents.
        diffusion: the noising process; by default 1000 linear betas from 1e-4 to 0.02.

    Raises:
        CallError: diffusers is not installed.
    """
    given = _config(clip, diffusion) | {"lower_order_final": True}
    return Scheduled(scheduler=_diffusers().DPMSolverSinglestepScheduler(**given))


def _config(clip: bool, diffusion: Diffusion | None) -> dict[str, Any]:
    """The options that both schedulers have; with these limits dynamic thresholding is clamping to [-1, 1]."""
    process = diffusion or Diffusion()
    thresholds = {"thresholding": clip, "sample_max_value": 1.0}
    return {"num_train_timesteps": process.num_train_steps, "trained_betas": process.betas.tolist(), **thresholds}


def _diffusers() -> ModuleType:
    try:
        import diffusers
    except ImportError as error:
        raise CallError(
            "this sampler is a scheduler of diffusers, which is not installed: pip install 'tcc[diffusers]'"
        ) from error
    return diffusers
