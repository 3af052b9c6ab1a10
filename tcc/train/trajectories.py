"""Training on whole runs from pure noise: what is stored is what sampling will find stored."""

from __future__ import annotations

import itertools
from dataclasses import dataclass, field

import torch
from torch import Tensor

from tcc.errors import TrainError
from tcc.samplers import DDIM, Evaluation, Sampler, denoise, guide, timestep_dtype
from tcc.train.objective import Objective, StepLoss
from tcc.train.student import Student
from tcc.train.weights import Choices, Weights

__all__ = ["Trajectories", "collect_streams"]


@dataclass(frozen=True)
class Trajectories:
    """Roll the schedule from noise; no images are needed (HarmoniCa, Huang et al. 2024, does so for routers).

    At an I-step everything is computed and stored. At a P-step the teacher runs on the student's own input, and the
    student's own output and mixed values go on: what is stale by several steps is seen as such. Gradients do not pass
    from step to step, neither through what is stored nor through x. The loss is the mean over the P-steps.

    Attributes:
        objective: teacher, student and budget. The model is called as `model(x, t, y)`; its batch is a group, doubled
            under guidance.
        choices: the P-steps, and the sites at which there is something to decide.
        num_steps: denoising steps of a run.
        num_classes: labels are drawn from 0..num_classes - 1.
        null_class: the label of the unconditional half.
        cfg_scale: guidance scale of the sampler; at 1 the batch is not doubled.
        sampler: what rolls it; its evaluations are the steps.

    Raises:
        TrainError: no step is a P-step, the first is one, guidance lacks a null class or an even batch, or the model
            was captured with whole timesteps and the sampler's are fractional.
    """

    objective: Objective
    choices: Choices
    num_steps: int
    num_classes: int
    null_class: int | None = None
    cfg_scale: float = 1.0
    sampler: Sampler = field(default_factory=DDIM)

    def __post_init__(self) -> None:
        if not self.choices:
            raise TrainError("there is nothing to learn: every step of the schedule computes everything")
        if 0 in self.choices:
            raise TrainError("step 0 of the schedule reuses values, and nothing is stored yet: make it an I-step")
        if max(self.choices) >= self.num_steps:
            raise TrainError(f"the schedule has a P-step {max(self.choices)}, and the run has {self.num_steps} steps")
        if self.guided and (self.null_class is None or self.objective.student.info.batch % 2):
            raise TrainError("guidance needs a model with a null class, and twice as many rows as images")
        wanted = timestep_dtype(self.sampler.evaluations(self.num_steps))
        if wanted.is_floating_point and not self.time_dtype.is_floating_point:
            raise TrainError(
                f"the sampler's timesteps are fractional, and the model was captured with {self.time_dtype}"
            )

    @property
    def time_dtype(self) -> torch.dtype:
        """What the model takes timesteps in."""
        return self.objective.student.info.captured.inputs[1].dtype

    @property
    def guided(self) -> bool:
        """Whether the batch is doubled."""
        return self.cfg_scale != 1.0

    def accumulate(self, weights: Weights, generator: torch.Generator) -> list[StepLoss]:
        """Learn from one run of one group; see the class."""
        student = self.objective.student
        spec = student.info.captured.inputs[0]
        count = student.info.batch // 2 if self.guided else student.info.batch
        x = torch.randn(count, *spec.shape[1:], generator=generator).to(spec.device, spec.dtype)
        y = torch.randint(self.num_classes, (count,), generator=generator).to(spec.device)
        if self.guided:
            y = torch.cat([y, torch.full_like(y, self.null_class or 0)])
        losses: list[StepLoss] = []
        stored: dict[str, Tensor] = {}
        steps = itertools.count()

        def evaluate(x: Tensor, evaluation: Evaluation) -> Tensor:
            nonlocal stored
            t = torch.full((len(y),), evaluation.timestep, dtype=self.time_dtype, device=spec.device)
            inputs, number = (torch.cat([x, x]) if self.guided else x, t, y), next(steps)
            if number in self.choices:
                loss, values = self.objective.backward(weights, number, stored, inputs, 1 / len(self.choices))
                losses.append(loss)
            else:
                values = student.compute(*inputs)
            stored = values.stored
            return guide(values.output, self.cfg_scale, x.shape[1]) if self.guided else values.output

        for _ in denoise(self.sampler, evaluate, x, self.num_steps, generator):
            pass
        return losses

    def describe(self) -> dict[str, object]:
        """The recipe and its options."""
        return self.objective.describe() | {
            "recipe": "trajectory",
            "steps": self.num_steps,
            "p_steps": list(self.choices),
            "guidance": self.cfg_scale,
            "sampler": repr(self.sampler),
        }


def collect_streams(
    student: Student, site: str, x: Tensor, y: Tensor, *, num_steps: int, sampler: Sampler | None = None
) -> list[Tensor]:
    """The values of a `stream` site in an uncached run, step by step.

    Args:
        student: a student that returns the site.
        site: its name.
        x: unit Gaussian noise `[B, C, H, W]`.
        y: labels `[B]`.
        num_steps: denoising steps.
        sampler: by default DDIM, clamped.
    """
    found = []
    dtype = student.info.captured.inputs[1].dtype

    def evaluate(x: Tensor, evaluation: Evaluation) -> Tensor:
        values = student.compute(x, torch.full((len(y),), evaluation.timestep, dtype=dtype, device=x.device), y)
        found.append(values.streams[site])
        output: Tensor = values.output
        return output

    for _ in denoise(sampler or DDIM(), evaluate, x, num_steps):
        pass
    return found
