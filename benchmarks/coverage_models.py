"""Small random models: one entry per transformer class of diffusers, with the inputs of one call.

An entry is a function that returns the class's configuration and the keyword inputs of its forward. Sizes are small:
two heads, a dozen image tokens or so, and at least two blocks of each kind. Where the entry leaves a part of the class
out, mostly because `torch.export` refuses it, `note` says so in one line.
"""

from __future__ import annotations

import importlib
import inspect
import pkgutil
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

#: The configuration of a class, and the keyword inputs of a call.
Parts = tuple[dict[str, Any], dict[str, Any]]


@dataclass(frozen=True)
class Entry:
    """How a class is built and called.

    Attributes:
        name: the class.
        parts: makes the configuration and the inputs.
        changing: the inputs that differ from step to step; by default the first one and the time.
        note: what the entry leaves out of the class, and why.
    """

    name: str
    parts: Callable[[], Parts]
    changing: tuple[str, ...]
    note: str


@dataclass(frozen=True)
class Built:
    """A model with random weights, and its calls."""

    model: nn.Module
    inputs: dict[str, Any]
    changing: tuple[str, ...]

    def call(self, step: int) -> dict[str, Any]:
        """The inputs of a call at `step`: other noise and another time at each, the same for the same step."""
        changed = {name: _changed(self.inputs[name], step) for name in self.changing}
        return {**self.inputs, **changed}


ENTRIES: dict[str, Entry] = {}


def entry(name: str, *, changing: tuple[str, ...] = (), note: str = "") -> Callable[[Callable[[], Parts]], None]:
    """Register the decorated function as the entry of class `name`."""

    def register(parts: Callable[[], Parts]) -> None:
        if name in ENTRIES:
            raise ValueError(f"two entries for {name}")
        ENTRIES[name] = Entry(name, parts, changing, note)

    return register


def build(name: str) -> Built:
    """The model of class `name` in eval mode, all its parameters random, zero-initialised ones too."""
    found = ENTRIES[name]
    config, inputs = found.parts()
    torch.manual_seed(0)  # buffers drawn by the class itself
    model = classes()[name](**config)
    fill(model)
    times = {"timestep", "timesteps", "t"} & inputs.keys()
    changing = found.changing or (next(iter(inputs)), *times)
    return Built(model.eval(), inputs, changing)


def classes() -> dict[str, type[nn.Module]]:
    """Every model class of `diffusers.models.transformers`, and `UVit2DModel`, by name."""
    import diffusers.models.transformers as package
    from diffusers.models.modeling_utils import ModelMixin
    from diffusers.models.unets.uvit_2d import UVit2DModel

    modules = [importlib.import_module(f"{package.__name__}.{m.name}") for m in pkgutil.iter_modules(package.__path__)]
    found = {
        name: value
        for module in modules
        for name, value in vars(module).items()
        if inspect.isclass(value) and issubclass(value, ModelMixin) and value.__module__ == module.__name__
    }
    return dict(sorted(found.items())) | {"UVit2DModel": UVit2DModel}


def fill(model: nn.Module, seed: int = 0) -> None:
    """Random weights that keep values at unit size, so that every branch and gate shows in the output."""
    draw = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.dim() > 1:
                parameter.normal_(0.0, max(1, parameter.shape[1:].numel()) ** -0.5, generator=draw)
            else:
                centre = 1.0 if name.endswith("weight") else 0.0  # of a norm
                parameter.normal_(centre, 0.1, generator=draw)


def noise(*sizes: int, seed: int = 7) -> Tensor:
    """Normal noise."""
    return torch.randn(sizes, generator=torch.Generator().manual_seed(seed))


def times(batch: int = 2) -> Tensor:
    """Whole timesteps."""
    return torch.full((batch,), 500)


def levels(batch: int = 2) -> Tensor:
    """Noise levels between 0 and 1."""
    return torch.full((batch,), 0.5)


def ones(*sizes: int) -> Tensor:
    """A mask that hides nothing."""
    return torch.ones(sizes, dtype=torch.int64)


def grid_ids(*sizes: int, axes: int = 3) -> Tensor:
    """Positions on a grid, `[tokens, axes]`; leading axes that the grid lacks are 0."""
    places = torch.cartesian_prod(*(torch.arange(n) for n in sizes)).reshape(-1, len(sizes)).float()
    return torch.cat([torch.zeros(len(places), axes - len(sizes)), places], dim=1)


def rotary(tokens: int, width: int) -> tuple[Tensor, Tensor]:
    """Cosines and sines `[tokens, width]`, every number twice."""
    angles = torch.arange(tokens)[:, None] / 10 ** (torch.arange(width // 2) / width)
    angles = angles.repeat_interleave(2, dim=1)
    return angles.cos(), angles.sin()


def _changed(value: Any, step: int) -> Any:
    """`value` at another step: other noise, an earlier time."""
    if isinstance(value, (list, tuple)):
        return type(value)(_changed(item, step) for item in value)
    if not value.is_floating_point():
        return value - 10 * step
    if value.numel() and bool((value == value.flatten()[0]).all()):  # a time
        return value * 0.9**step
    return noise(*value.shape, seed=1000 + step)
