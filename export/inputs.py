"""What a call of a bundle takes, for people and for programs that draw with it; and random calls."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence

import torch

from tcc.capture import Captured
from tcc.export.manifest import Input, dtype_name
from tcc.passes.inputs import input_facts
from tcc.passes.sites import analyse

__all__ = ["describe", "random_inputs"]

_MEANINGS = {
    "sample": "the noisy sample",
    "timestep": "the timestep: how noisy the sample is",
    "label": "a label for each sample",
    "ids": "tokens that are looked up, of a text for example",
    "mask": "a mask: which rows count",
    "number": "a number for each sample, such as a guidance strength",
    "positions": "positions of tokens",
    "embedding": "features of what is to be drawn, of a text for example",
}


def describe(captured: Captured) -> tuple[Input, ...]:
    """The inputs of a captured model: what each is in the graph, its axes, and the range of whole numbers."""
    graph = captured.gm.graph
    facts = input_facts(graph, analyse(graph), captured.noise_level, captured.samples)
    return tuple(
        Input(spec.name, spec.shape, dtype_name(spec.dtype), _MEANINGS[fact.role], fact.role, fact.axes, fact.values)
        for spec, fact in zip(captured.inputs, facts, strict=True)
    )


def random_inputs(
    inputs: Sequence[Input], given: Sequence[torch.Tensor], num_steps: int, seed: int = 0
) -> Callable[[int], list[torch.Tensor]]:
    """Random calls, one for each step, in which every input takes values from all of its range.

    Timesteps fall over the whole schedule to 0, and each sample has its own; they begin at 1000, at 1 where the given
    ones are fractions, or at the last row where they are looked up in a table. Whole numbers that are looked up come
    from the whole table; others, and masks, from the values that are given. All else is normal noise.

    Args:
        inputs: what a call takes.
        given: a call that the model takes, in the same order.
        num_steps: the steps of a run.
        seed: of all that is drawn.
    """

    def call(step: int) -> list[torch.Tensor]:
        generator, at = torch.Generator().manual_seed(seed * 100_003 + step), step % num_steps / num_steps
        pairs = zip(inputs, given, strict=True)
        return [_drawn(spec, tensor.cpu(), at, 1 / num_steps, generator).to(tensor) for spec, tensor in pairs]

    return call


def _drawn(spec: Input, given: torch.Tensor, at: float, width: float, generator: torch.Generator) -> torch.Tensor:
    """An input at a step that covers the share `width` of the schedule, from the share `at` on."""
    draw = functools.partial(torch.rand, given.shape, generator=generator)
    if spec.role == "timestep":
        whole = not given.is_floating_point()
        top = spec.values or (1 if not whole and 0 < float(given.abs().max()) <= 1 else 1000)
        return (top * (1 - at - width * draw())).clamp(0, top - 1 if whole else top)
    if spec.values:
        return torch.randint(spec.values, given.shape, generator=generator)
    if spec.role == "mask" or not given.is_floating_point():
        drawn = given.flatten()[(draw() * given.numel()).long()]
        drawn[..., :1] = given[..., :1]  # a mask of all rows leaves nothing
        return drawn
    return torch.randn(given.shape, generator=generator)
