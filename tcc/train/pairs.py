"""Learning-to-Cache's recipe: pairs of neighbouring steps on noised images."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch

from tcc.errors import TrainError
from tcc.samplers import Diffusion, ddim_step
from tcc.train.images import Images
from tcc.train.objective import Objective, StepLoss
from tcc.train.weights import Weights

__all__ = ["Pairs"]


@dataclass(frozen=True)
class Pairs:
    """Train on pairs of an I-step and the P-step after it (Ma et al. 2024, section 3.3, as in its code).

    One group of samples shares one pair: counted from the image, the steps 2k + 1 (I) and 2k (P) of the evenly respaced
    grid. Images are noised to the I-step, the model is run there and its sites are stored, one deterministic DDIM step
    without guidance and without clipping leads to the P-step, and there the student learns from the teacher.
    The paper's code also flips the images at random; this does not.

    Attributes:
        objective: teacher, student and budget. The model is called as `model(x, t, y)`; its batch is a group.
        images: where samples come from.
        num_steps: denoising steps of a run.
        null_class: what dropped labels become; None drops none.
        dropout: the share of labels dropped, the same ones at both steps.
        diffusion: the noising process.

    Raises:
        TrainError: there are fewer than two steps.
    """

    objective: Objective
    images: Images
    num_steps: int
    null_class: int | None = None
    dropout: float = 0.1
    diffusion: Diffusion = field(default_factory=Diffusion)

    def __post_init__(self) -> None:
        if self.num_steps < 2:
            raise TrainError(f"a pair is two steps, and the run has {self.num_steps}")

    def accumulate(self, weights: Weights, generator: torch.Generator) -> list[StepLoss]:
        """Learn from one group of images at one pair; see the class."""
        student = self.objective.student
        batch, spec = student.info.batch, student.info.captured.inputs[0]
        k = int(torch.randint(self.num_steps // 2, (), generator=generator))
        x0, y = self.images.take(torch.randint(len(self.images), (batch,), generator=generator))
        noise = torch.randn(x0.shape, generator=generator)
        dropped = torch.rand(batch, generator=generator) < self.dropout
        x0, noise, y = x0.to(spec.device, spec.dtype), noise.to(spec.device, spec.dtype), y.to(spec.device)
        if self.null_class is not None:
            y = y.masked_fill(dropped.to(spec.device), self.null_class)
        steps = self.diffusion.steps(self.num_steps)
        older, newer = self.num_steps - 2 - 2 * k, self.num_steps - 1 - 2 * k  # in execution order
        t = torch.full((batch,), steps[older].timestep, dtype=torch.int64, device=spec.device)
        x = self.diffusion.add_noise(x0, t, noise)
        values = student.compute(x, t, y)
        x = ddim_step(x, values.output[:, : x.shape[1]], steps[older], noise=None, eta=0.0, clip=False)
        t = torch.full_like(t, steps[newer].timestep)
        loss, _ = self.objective.backward(weights, newer, values.stored, (x, t, y))
        return [loss]

    def describe(self) -> dict[str, object]:
        """The recipe and its options."""
        return self.objective.describe() | {
            "recipe": "pairs",
            "steps": self.num_steps,
            "images": len(self.images),
            "images' digest": self.images.digest(),
            "dropout": self.dropout,
        }
