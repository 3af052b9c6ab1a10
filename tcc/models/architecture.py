"""What all architectures share: published sizes by name, and what a state dict tells about its model."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from typing import Any, ClassVar, TypeVar

from torch import Tensor, nn

from tcc.errors import ModelError
from tcc.models.config import ModelConfig
from tcc.samplers.diffusion import Diffusion

__all__ = ["Architecture", "count_blocks", "square"]

Model = TypeVar("Model", bound="Architecture")


class Architecture(nn.Module):
    """An image transformer that can be built by name, from its configuration, or from its weights.

    Attributes:
        family: its name, as in `DiT-XL/2`.
        config_type: the class of its configuration.
        sizes: (depth, width, heads) of the published sizes.
        patches: their patch sizes.
        mark: a tensor that all its state dicts have and those of the families before it in a search have not.
        training_only: prefixes of public tensors that sampling does not need; weight files may hold them.
        diffusion: the noising process that its published weights were trained on.
        exact: fixed tensors that are stored in float32, whatever the others are stored in.
        config: the configuration.
    """

    family: ClassVar[str]
    config_type: ClassVar[type[ModelConfig]]
    sizes: ClassVar[Mapping[str, tuple[int, int, int]]]
    patches: ClassVar[tuple[int, ...]]
    mark: ClassVar[str]
    training_only: ClassVar[tuple[str, ...]] = ()
    exact: ClassVar[tuple[str, ...]] = ()
    diffusion: ClassVar[Diffusion] = Diffusion()
    config: Any

    @classmethod
    def from_name(cls: type[Model], name: str, **overrides: Any) -> Model:
        """Build a published size, e.g. ``DiT.from_name("DiT-XL/2", input_size=32)``.

        Args:
            name: ``<family>-<size>/<patch>``.
            **overrides: any constructor argument, e.g. ``input_size``, ``num_classes``.

        Raises:
            ModelError: there is no such size; lists those there are.
        """
        names = {f"{cls.family}-{size}/{patch}": (size, patch) for size in cls.sizes for patch in cls.patches}
        if name not in names:
            raise ModelError(f"unknown {cls.family} size {name!r}; choose one of {', '.join(names)}")
        return cls(**{**cls.size_options(*names[name]), **overrides})

    @classmethod
    def size_options(cls, size: str, patch: int) -> dict[str, Any]:
        """The constructor arguments of a published size."""
        depth, width, heads = cls.sizes[size]
        return {"patch_size": patch, "depth": depth, "hidden_size": width, "num_heads": heads}

    @classmethod
    def from_config(cls: type[Model], config: ModelConfig) -> Model:
        """Build the model that a config describes."""
        return cls(**dataclasses.asdict(config))

    @classmethod
    def infer_config(cls, state: Mapping[str, Tensor], num_heads: int | None = None) -> ModelConfig:
        """Read the configuration off the shapes of a state dict (square input assumed).

        Args:
            state: tensors by public names.
            num_heads: attention heads; shapes do not tell them, so by default they come from the published size with
                the same depth and width.

        Raises:
            ModelError: a tensor is missing, or no published size tells the heads.
        """
        try:
            options = cls.read_sizes(state)
        except KeyError as error:
            raise ModelError(f"these are not the weights of {cls.family}: no tensor named {error}") from error
        depth, width = options["depth"], options["hidden_size"]
        heads = num_heads or {(d, w): h for d, w, h in cls.sizes.values()}.get((depth, width))
        if heads is None:
            raise ModelError(f"no published {cls.family} has depth {depth} and width {width}: pass num_heads")
        return cls.config_type(num_heads=heads, **options)

    @classmethod
    def read_sizes(cls, state: Mapping[str, Tensor]) -> dict[str, Any]:
        """The configuration without the heads.

        Raises:
            KeyError: a tensor is missing.
        """
        raise NotImplementedError


def count_blocks(state: Mapping[str, Tensor], prefix: str) -> int:
    """How many blocks `<prefix>.0`, `<prefix>.1`, ... a state dict holds."""
    return len({name.split(".")[1] for name in state if name.startswith(f"{prefix}.")})


def square(tokens: int, patch: int) -> tuple[int, int]:
    """The sides of the square image that has so many tokens."""
    return math.isqrt(tokens) * patch, math.isqrt(tokens) * patch
