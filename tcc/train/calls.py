"""How a model is called while it is learned from: what it is called on, and what its arguments and results are.

Nothing else in training knows a model's signature. `noise_with_labels` and `images_with_labels` are the calls of models
of `tcc.models`; any other model that captures gets a `Calls` of its own.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree  # no public pytree module in torch 2.11-2.13

from tcc.errors import TrainError
from tcc.info import ModelInfo
from tcc.samplers import Evaluation, guide, timestep_dtype
from tcc.train.images import Images

__all__ = ["Call", "Calls", "images_with_labels", "noise_with_labels", "tensors_of"]

#: The arguments of one call of a model.
Call = tuple[tuple[Any, ...], dict[str, Any]]


def first_tensor(output: Any, x: Tensor) -> Tensor:
    """The first tensor of an output, whatever its structure."""
    return tensors_of(output)[0]


@dataclass(frozen=True)
class Calls:
    """How a model of any signature is called.

    Guidance is the caller's: `call` may double the batch, and `prediction` then combines the halves.

    Attributes:
        draw: from a generator on the CPU, its only source of randomness, to samples `[N, ...]` and what the model is
            told of them for a whole run (prompts, labels, sizes: anything). `Trajectories` begin with the samples, so
            they are unit noise; `Pairs` add noise to them, so they are clean.
        call: from x `[N, ...]`, timesteps `[N]` (int64, or float32 where the sampler's are fractional) and what `draw`
            told, to `(args, kwargs)` of the shapes, dtypes and device that the model was inspected with.
        prediction: from the model's output and x to what the sampler takes: `[N, C or more, ...]` for x `[N, C, ...]`.
            By default the output's first tensor.
        record: what the result depends on here, for a state to be told from that of other data. JSON.
    """

    draw: Callable[[torch.Generator], tuple[Tensor, Any]]
    call: Callable[[Tensor, Tensor, Any], Call]
    prediction: Callable[[Any, Tensor], Tensor] = first_tensor
    record: Mapping[str, object] = field(default_factory=dict)

    def example(self, dtype: torch.dtype = torch.int64) -> Call:
        """The arguments of one call, to inspect the model with.

        Args:
            dtype: of the timesteps.
        """
        x, told = self.draw(torch.Generator().manual_seed(0))
        return self._called(x, torch.zeros(len(x), dtype=dtype, device=x.device), told)

    def at(self, evaluation: Evaluation, run: Sequence[Evaluation], x: Tensor, told: Any) -> Call:
        """The arguments of the call at one evaluation of a run."""
        timesteps = torch.full((len(x),), evaluation.timestep, dtype=timestep_dtype(run), device=x.device)
        return self._called(x, timesteps, told)

    def _called(self, x: Tensor, timesteps: Tensor, told: Any) -> Call:
        """What `call` returns.

        Raises:
            TrainError: it is no pair of arguments and keyword arguments.
        """
        made = self.call(x, timesteps, told)
        if not (isinstance(made, tuple) and len(made) == 2 and isinstance(made[1], dict)):
            raise TrainError(
                f"Calls.call returned a {type(made).__name__}: expected the pair (args, kwargs), as in (x, t, y), {{}}"
            )
        return made


def noise_with_labels(
    info: ModelInfo, num_classes: int, null_class: int | None = None, cfg_scale: float = 1.0
) -> Calls:
    """Noise and random labels for a model that is called as `model(x, t, y)`.

    Args:
        info: the model; its batch is a group of samples, doubled under guidance.
        num_classes: labels are drawn from 0..num_classes - 1.
        null_class: the label of the unconditional half.
        cfg_scale: guidance scale; at 1 the batch is not doubled.

    Raises:
        TrainError: guidance lacks a null class or an even batch.
    """
    spec, guided = info.captured.inputs[0], cfg_scale != 1.0
    if guided and (null_class is None or info.batch % 2):
        raise TrainError("guidance needs a model with a null class, and twice as many rows as images")
    count = info.batch // 2 if guided else info.batch

    def draw(generator: torch.Generator) -> tuple[Tensor, Tensor]:
        x = torch.randn(count, *spec.shape[1:], generator=generator).to(spec.device, spec.dtype)
        y = torch.randint(num_classes, (count,), generator=generator).to(spec.device)
        return x, torch.cat([y, torch.full_like(y, null_class or 0)]) if guided else y

    def call(x: Tensor, t: Tensor, y: Tensor) -> Call:
        return (torch.cat([x, x]), torch.cat([t, t]), y) if guided else (x, t, y), {}

    def prediction(output: Any, x: Tensor) -> Tensor:
        return guide(output, cfg_scale, x.shape[1]) if guided else first_tensor(output, x)

    return Calls(draw, _timed(info, call), prediction, {"guidance": cfg_scale})


def images_with_labels(info: ModelInfo, images: Images, null_class: int | None = None, dropout: float = 0.1) -> Calls:
    """Images and their labels for a model that is called as `model(x, t, y)`.

    Args:
        info: the model; its batch is a group of images.
        images: where they come from.
        null_class: what dropped labels become; None drops none.
        dropout: the share of labels dropped.
    """
    spec = info.captured.inputs[0]

    def draw(generator: torch.Generator) -> tuple[Tensor, Tensor]:
        x, y = images.take(torch.randint(len(images), (info.batch,), generator=generator))
        dropped = torch.rand(info.batch, generator=generator) < dropout
        y = y if null_class is None else y.masked_fill(dropped, null_class)
        return x.to(spec.device, spec.dtype), y.to(spec.device)

    def call(x: Tensor, t: Tensor, y: Tensor) -> Call:
        return (x, t, y), {}

    record = {"images": len(images), "images' digest": images.digest(), "dropout": dropout}
    return Calls(draw, _timed(info, call), record=record)


def tensors_of(output: Any) -> list[Tensor]:
    """All tensors of an output, whatever its structure."""
    return [leaf for leaf in pytree.tree_leaves(output) if isinstance(leaf, Tensor)]


def _timed(info: ModelInfo, call: Callable[[Tensor, Tensor, Any], Call]) -> Callable[[Tensor, Tensor, Any], Call]:
    """Whole timesteps in what the model takes them in; a fraction stays one, and is refused where that is integers."""
    dtype = info.captured.inputs[1].dtype

    def timed(x: Tensor, t: Tensor, told: Any) -> Call:
        return call(x, t if t.is_floating_point() and not dtype.is_floating_point else t.to(dtype), told)

    return timed
