"""Training on whole runs from pure noise: what is stored is what sampling will find stored."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor

from tcc.errors import TrainError
from tcc.samplers import Diffusion, ddim_step, guide
from tcc.train.objective import Objective, StepLoss
from tcc.train.student import Student
from tcc.train.weights import Choices, Weights

__all__ = ["Trajectories", "collect_streams"]


@dataclass(frozen=True)
class Trajectories:
    """Roll the schedule from noise with DDIM; no images are needed (HarmoniCa, Huang et al. 2024, does so for routers).

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
        clip: clamp the implied image to [-1, 1] at every step; right for pixels.
        diffusion: the noising process.

    Raises:
        TrainError: no step is a P-step, the first is one, or guidance lacks a null class or an even batch.
    """

    objective: Objective
    choices: Choices
    num_steps: int
    num_classes: int
    null_class: int | None = None
    cfg_scale: float = 1.0
    clip: bool = True
    diffusion: Diffusion = field(default_factory=Diffusion)

    def __post_init__(self) -> None:
        if not self.choices:
            raise TrainError("there is nothing to learn: every step of the schedule computes everything")
        if 0 in self.choices:
            raise TrainError("step 0 of the schedule reuses values, and nothing is stored yet: make it an I-step")
        if max(self.choices) >= self.num_steps:
            raise TrainError(f"the schedule has a P-step {max(self.choices)}, and the run has {self.num_steps} steps")
        if self.guided and (self.null_class is None or self.objective.student.info.batch % 2):
            raise TrainError("guidance needs a model with a null class, and twice as many rows as images")

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
        for number, step in enumerate(self.diffusion.steps(self.num_steps)):
            t = torch.full((len(y),), step.timestep, dtype=torch.int64, device=spec.device)
            inputs = (torch.cat([x, x]) if self.guided else x, t, y)
            if number in self.choices:
                share = 1 / len(self.choices)
                loss, values = self.objective.backward(weights, number, stored, inputs, share)
                losses.append(loss)
            else:
                values = student.compute(*inputs)
            stored, output = values.stored, values.output
            if self.guided:
                output = guide(output, self.cfg_scale, x.shape[1])
            x = ddim_step(x, output[:, : x.shape[1]], step, noise=None, eta=0.0, clip=self.clip)
        return losses

    def describe(self) -> dict[str, object]:
        """The recipe and its options."""
        return self.objective.describe() | {
            "recipe": "trajectory",
            "steps": self.num_steps,
            "p_steps": list(self.choices),
            "guidance": self.cfg_scale,
            "clip": self.clip,
        }


def collect_streams(
    student: Student, site: str, x: Tensor, y: Tensor, *, num_steps: int, clip: bool, diffusion: Diffusion | None = None
) -> list[Tensor]:
    """The values of a `stream` site in an uncached DDIM run, step by step.

    Args:
        student: a student that returns the site.
        site: its name.
        x: unit Gaussian noise `[B, C, H, W]`.
        y: labels `[B]`.
        num_steps: denoising steps.
        clip: clamp the implied image to [-1, 1] at every step.
        diffusion: the noising process.
    """
    found = []
    for step in (diffusion or Diffusion()).steps(num_steps):
        values = student.compute(x, torch.full((len(y),), step.timestep, dtype=torch.int64, device=x.device), y)
        found.append(values.streams[site])
        x = ddim_step(x, values.output[:, : x.shape[1]], step, noise=None, eta=0.0, clip=clip)
    return found
