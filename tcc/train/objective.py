"""The loss of one P-step: how far the student is from its teacher, and what its weights cost."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal, Protocol, get_args

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree  # no public pytree module in torch 2.11-2.13

from tcc.errors import TrainError
from tcc.train.calls import Call, tensors_of
from tcc.train.student import Student, Values
from tcc.train.weights import Budget, Weights

__all__ = ["Objective", "Recipe", "StepLoss", "Target"]

Target = Literal["output", "stream"]

#: The factor of the loss of a float16 model on the way back: gradients of a mean over many elements, of an error of
#: 1e-3 and less, are below what float16 can tell from 0.
_HALF_SCALE = 1024.0


@dataclass(frozen=True)
class StepLoss:
    """What a recipe says about one P-step that it has gone back through.

    Attributes:
        step: the denoising step, in execution order.
        error: how far the student was from its teacher.
        cost: what its weights cost.
    """

    step: int
    error: float
    cost: float

    @property
    def total(self) -> float:
        """The loss."""
        return self.error + self.cost


class Recipe(Protocol):
    """A way to come by P-steps to learn from."""

    @property
    def num_steps(self) -> int:
        """Denoising steps of a run."""

    def accumulate(self, weights: Weights, generator: torch.Generator) -> list[StepLoss]:
        """Draw one group of samples, and add the gradient of its loss to the parameters of `weights`.

        Args:
            weights: what is learned.
            generator: the only source of randomness, on the CPU.
        """

    def describe(self) -> dict[str, object]:
        """What the result depends on, for the record and to tell one run from another."""


@dataclass(frozen=True)
class Objective:
    """Teacher and student at one P-step, on the same input.

    Attributes:
        student: the model.
        budget: the price of computing.
        target: `output` compares the whole output, variance channels too (Learning-to-Cache), and of several tensors
            all alike; `stream` the stream after the last block (TokenCache, L_mse).
        drop: what is not computed is nothing, instead of the stored value (Learning-to-Drop: Ma et al. 2024, Table 7).

    Raises:
        TrainError: there is no such target, or the student does not return it.
    """

    student: Student
    budget: Budget
    target: Target = "output"
    drop: bool = False

    def __post_init__(self) -> None:
        if self.target not in get_args(Target):
            raise TrainError(f"target={self.target!r}: use one of {', '.join(get_args(Target))}")
        if self.target == "stream" and "out.stream" not in self.student.streams:
            raise TrainError("the target 'stream' needs a student that returns it: Student(streams=['out.stream'])")

    def backward(
        self,
        weights: Weights,
        step: int,
        stored: Mapping[str, Tensor],
        call: Call,
        share: float = 1.0,
    ) -> tuple[StepLoss, Values]:
        """Run both, and add `share` times the gradient of the loss to the parameters of `weights`.

        Args:
            weights: what is learned.
            step: the denoising step.
            stored: the stored value of every site.
            call: args and kwargs.
            share: a factor.

        Returns:
            The loss, and the student's values, cut off from the gradients.
        """
        args, kwargs = call
        teacher = self.student.compute(*args, **kwargs)
        given = weights(step, None if weights.reads is None else teacher.streams[weights.reads])
        if self.drop:
            stored = {site: torch.zeros_like(value) for site, value in stored.items()}
        scale = _HALF_SCALE if any(value.dtype == torch.float16 for value in stored.values()) else 1.0
        if scale != 1:
            given = {site: _unscaled(weight, scale) for site, weight in given.items()}
        mixed = self.student.mix(stored, given, *args, **kwargs)
        pairs = zip(self._compared(mixed), self._compared(teacher), strict=True)
        error = torch.stack([_squared(one - other) for one, other in pairs]).mean()
        cost = self.budget.cost(given)
        (scale * share * (error + cost)).backward()  # type: ignore[no-untyped-call]
        output = pytree.tree_map_only(Tensor, Tensor.detach, mixed.output)
        return StepLoss(step, float(error.detach()), float(cost.detach())), Values(output, mixed.stored, {})

    def describe(self) -> dict[str, object]:
        """What the result depends on: see `Recipe`."""
        return {
            "model": self.student.info.captured.hash,
            "model's weights": _digest(self.student.info.captured.gm),
            "sites": list(self.student.sites),
            "batch": self.student.info.batch,
            "target": self.target,
            "drop": self.drop,
            "budget": [self.budget.price, self.budget.target, self.budget.strength],
        }

    def _compared(self, values: Values) -> list[Tensor]:
        if self.target == "stream":
            return [values.streams["out.stream"]]
        return [tensor for tensor in tensors_of(values.output) if tensor.is_floating_point()]


def _unscaled(weight: Tensor, scale: float) -> Tensor:
    """The same weight, whose gradient is divided by `scale` on its way to the parameters: they are float32 there."""
    weight = weight * 1.0  # a tensor of its own: sites may share one
    if weight.requires_grad:
        weight.register_hook(lambda gradient: gradient / scale)  # type: ignore[no-untyped-call]
    return weight


def _squared(gap: Tensor) -> Tensor:
    """The mean square, in float32 or more."""
    return gap.to(torch.promote_types(gap.dtype, torch.float32)).square().mean()


def _digest(model: nn.Module) -> str:
    """Of all weights, which the graph's hash is not."""
    found = hashlib.sha256()
    for name, tensor in sorted(model.state_dict().items()):
        found.update(name.encode())
        found.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes())
    return found.hexdigest()
