"""Learning-to-Cache's recipe: pairs of neighbouring steps on noised images."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch

from tcc.samplers import DDIM, Sampler
from tcc.train.calls import Calls
from tcc.train.objective import Objective, StepLoss
from tcc.train.weights import Choices, Weights, check_choices

__all__ = ["Pairs"]


@dataclass(frozen=True)
class Pairs:
    """Train on pairs of an I-step and the P-step after it (Ma et al. 2024, section 3.3, as in its code).

    One group of samples shares one pair. Images are noised to the solver's step before the P-step, the model runs there
    and its sites are stored, the solver leads to the P-step without guidance, and there the student learns from the
    teacher. Of a solver with two evaluations per step both run, and the second one's sites are stored (the paper's code
    for U-ViT).

    What differs from the paper's training (its Table 8, and its code):

    - The learning rate of `tcc train router` is 0.2, and it ends after ten minutes unless told otherwise; the paper's
      is 1e-3 (1e-2 for DiT-L/2 with 20 steps), over 20,000 iterations and more. `Settings` has 1e-3.
    - AdamW's eps is 1e-15, not its usual 1e-8: the loss of an early step is about 1e-6, and gradients are smaller.
    - By default 4 images in one group, not 64 in 8 groups, and lambda is 2e-6; the paper's is 1e-6 or 5e-6 for DiT.
    - Images are not flipped; the paper's code flips them at random.
    - Of U-ViT, too, logits are clamped and the loss is a mean of squares. The paper's code for it does not clamp, and
      takes their sum: its lambda of 0.1 is 2.4e-5 for a mean over latents of 4 x 32 x 32.

    Attributes:
        objective: teacher, student and budget.
        calls: how the model is called, on clean samples; without guidance.
        choices: the P-steps, and the sites at which there is something to decide: `choices_of_pairs`.
        num_steps: denoising steps of a run.
        sampler: what leads from step to step; it must know its `scales`. By default DDIM, not clamped (the paper).

    Raises:
        TrainError: no step is a P-step, or the first is one.
        ValueError: the sampler cannot begin in the middle of a run.
    """

    objective: Objective
    calls: Calls
    choices: Choices
    num_steps: int
    sampler: Sampler = field(default_factory=lambda: DDIM(clip=False))

    def __post_init__(self) -> None:
        check_choices(self.choices, self.num_steps)
        self.sampler.scales(self.num_steps)

    def accumulate(self, weights: Weights, generator: torch.Generator) -> list[StepLoss]:
        """Learn from one group of images at one pair; see the class."""
        # counted from the image, as in the paper
        newer = sorted(self.choices, reverse=True)[int(torch.randint(len(self.choices), (), generator=generator))]
        evaluations, compute = self.sampler.evaluations(self.num_steps), self.objective.student.compute
        older = max(step for step in range(newer) if evaluations[step].stage == 0)
        clean, told = self.calls.draw(generator)
        image, noise = self.sampler.scales(self.num_steps)[older]
        drawn = torch.randn(clean.shape, generator=generator).to(clean.device, clean.dtype)
        solving = self.sampler.run(image * clean + noise * drawn, self.num_steps, generator, older)
        x = next(solving)
        for evaluation in evaluations[older:newer]:
            args, kwargs = self.calls.at(evaluation, evaluations, x, told)
            values = compute(*args, **kwargs)
            x = solving.send(self.calls.prediction(values.output, x))
        call = self.calls.at(evaluations[newer], evaluations, x, told)
        loss, _ = self.objective.backward(weights, newer, values.stored, call)
        return [loss]

    def describe(self) -> dict[str, object]:
        """The recipe and its options."""
        return self.objective.describe() | {
            "recipe": "pairs",
            "steps": self.num_steps,
            "p_steps": list(self.choices),
            "sampler": repr(self.sampler),
            **self.calls.record,
        }
