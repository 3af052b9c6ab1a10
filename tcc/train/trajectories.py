"""Training on whole runs from pure noise: what is stored is what sampling will find stored."""

from __future__ import annotations

import itertools
from dataclasses import dataclass, field

import torch
from torch import Tensor

from tcc.samplers import DDIM, Evaluation, Sampler, denoise
from tcc.train.calls import Calls
from tcc.train.objective import Objective, StepLoss
from tcc.train.student import Student
from tcc.train.weights import Choices, Weights, check_choices

__all__ = ["Trajectories", "collect_streams"]


@dataclass(frozen=True)
class Trajectories:
    """Roll the schedule from noise; no images are needed (HarmoniCa, Huang et al. 2024, does so for routers).

    At an I-step everything is computed and stored. At a P-step the teacher runs on the student's own input, and the
    student's own output and mixed values go on: what is stale by several steps is seen as such. Gradients do not pass
    from step to step, neither through what is stored nor through x. The loss is the mean over the P-steps.

    Attributes:
        objective: teacher, student and budget.
        calls: how the model is called, on unit noise.
        choices: the P-steps, and the sites at which there is something to decide.
        num_steps: denoising steps of a run.
        sampler: what rolls it; its evaluations are the steps.

    Raises:
        TrainError: no step is a P-step, or the first is one.
    """

    objective: Objective
    calls: Calls
    choices: Choices
    num_steps: int
    sampler: Sampler = field(default_factory=DDIM)

    def __post_init__(self) -> None:
        check_choices(self.choices, self.num_steps)

    def accumulate(self, weights: Weights, generator: torch.Generator) -> list[StepLoss]:
        """Learn from one run of one group; see the class."""
        evaluations = self.sampler.evaluations(self.num_steps)
        x, told = self.calls.draw(generator)
        losses: list[StepLoss] = []
        stored: dict[str, Tensor] = {}
        steps = itertools.count()

        def evaluate(x: Tensor, evaluation: Evaluation) -> Tensor:
            nonlocal stored
            (args, kwargs), number = self.calls.at(evaluation, evaluations, x, told), next(steps)
            if number in self.choices:
                share = 1 / len(self.choices)
                loss, values = self.objective.backward(weights, number, stored, (args, kwargs), share)
                losses.append(loss)
            else:
                values = self.objective.student.compute(*args, **kwargs)
            stored = values.stored
            return self.calls.prediction(values.output, x)

        for _ in denoise(self.sampler, evaluate, x, self.num_steps, generator):
            pass
        return losses

    def describe(self) -> dict[str, object]:
        """The recipe and its options."""
        return self.objective.describe() | {
            "recipe": "trajectory",
            "steps": self.num_steps,
            "p_steps": list(self.choices),
            "sampler": repr(self.sampler),
            **self.calls.record,
        }


def collect_streams(
    student: Student,
    site: str,
    calls: Calls,
    *,
    num_steps: int,
    sampler: Sampler | None = None,
    generator: torch.Generator | None = None,
) -> list[Tensor]:
    """The values of a `stream` site in an uncached run, step by step.

    Args:
        student: a student that returns the site.
        site: its name.
        calls: how the model is called, on unit noise.
        num_steps: denoising steps.
        sampler: by default DDIM, clamped.
        generator: of what is drawn, on the CPU; by default of seed 0.
    """
    found: list[Tensor] = []
    chosen, draw = sampler or DDIM(), generator or torch.Generator().manual_seed(0)
    evaluations = chosen.evaluations(num_steps)
    x, told = calls.draw(draw)

    def evaluate(x: Tensor, evaluation: Evaluation) -> Tensor:
        args, kwargs = calls.at(evaluation, evaluations, x, told)
        values = student.compute(*args, **kwargs)
        found.append(values.streams[site])
        return calls.prediction(values.output, x)

    for _ in denoise(chosen, evaluate, x, num_steps, draw):
        pass
    return found
