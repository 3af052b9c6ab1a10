"""What a sampler is: model evaluations in a fixed order, and the arithmetic between them."""

from __future__ import annotations

import dataclasses
from abc import ABC, abstractmethod
from collections.abc import Callable, Generator, Iterator
from typing import Any

import torch
from torch import Tensor

from tcc.errors import CallError

__all__ = ["Evaluation", "Sampler", "Solving", "denoise"]

#: Gives what the model is to see `[B, C, ...]`, takes its output `[B, C or 2C, ...]`, returns the images `[B, C, ...]`.
Solving = Generator[Tensor, Tensor, Tensor]


@dataclasses.dataclass(frozen=True, slots=True)
class Evaluation:
    """One call of the model: a step, as plans count them.

    Attributes:
        timestep: what the model is told; a whole number as int.
        stage: which evaluation of its solver step it is, 0 the first. A solver of one evaluation per step has only 0.
    """

    timestep: float
    stage: int = 0


class Sampler(ABC):
    """Turns noise into images by evaluations of a model.

    `num_steps` is the number of evaluations: a plan's step is one evaluation, and a solver may take several of them for
    a step of its own. All of them are known before the first.
    """

    @abstractmethod
    def evaluations(self, num_steps: int | str) -> tuple[Evaluation, ...]:
        """The evaluations of one run, noisiest first.

        Raises:
            ValueError: the sampler has no run of so many evaluations.
        """

    def scales(self, num_steps: int | str) -> tuple[tuple[float, float], ...]:
        """What the input of each evaluation is made of: `a` times the image plus `b` times unit noise, by evaluation.

        Raises:
            ValueError: as for `evaluations`, or this sampler does not know.
        """
        raise ValueError(
            f"{type(self).__name__} does not know how noisy its inputs are: use DDIM, DPMSolver2, FlowEuler"
        )

    @abstractmethod
    def run(
        self, noise: Tensor, num_steps: int | str, generator: torch.Generator | None = None, first: int = 0
    ) -> Solving:
        """One run: a generator that gives the model's input at each evaluation, and is sent the model's output.

        Args:
            noise: unit Gaussian `[B, C, ...]`.
            num_steps: the number of evaluations.
            generator: source of the noise that a random sampler adds.
            first: the evaluation to begin at, the first of a step of the solver; `noise` is then its input.

        Raises:
            ValueError: this sampler cannot begin there.
        """


def denoise(
    sampler: Sampler,
    model: Callable[[Tensor, Evaluation], Tensor],
    noise: Tensor,
    num_steps: int | str,
    generator: torch.Generator | None = None,
) -> Iterator[Tensor]:
    """Run a sampler, evaluation by evaluation.

    Args:
        sampler: the sampler.
        model: from the input `[B, C, ...]` of an evaluation to the output `[B, C or 2C, ...]`.
        noise: unit Gaussian `[B, C, ...]`.
        num_steps: the number of evaluations.
        generator: source of the noise that a random sampler adds.

    Yields:
        After each evaluation, the input of the next one `[B, C, ...]`; after the last, the images.

    Raises:
        CallError: an output does not fit its input.
    """
    solving = sampler.run(noise, num_steps, generator)
    x = next(solving)
    for evaluation in sampler.evaluations(num_steps):
        try:
            x = solving.send(_fitting(model(x, evaluation), x))
        except StopIteration as done:
            x = done.value
        yield x


def _fitting(output: Any, x: Tensor) -> Tensor:
    """The output for input `x`; one with too few channels would be broadcast, and draw something."""
    if not isinstance(output, Tensor) or output.dim() < 2 or output[:, : x.shape[1]].shape != x.shape:
        got = list(output.shape) if isinstance(output, Tensor) else type(output).__name__
        raise CallError(
            f"the model's output is {got} for an input {list(x.shape)}: samplers need a tensor of its shape, or of "
            "more channels, which are the variance"
        )
    return output
