"""What the configurations of all image transformers share: sizes, the token grid, and one line of JSON."""

from __future__ import annotations

import dataclasses
import json
from typing import Any, TypeVar

from tcc.errors import ModelError

__all__ = ["ModelConfig"]

Config = TypeVar("Config", bound="ModelConfig")


@dataclasses.dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """Sizes that every architecture has.

    Attributes:
        input_size: (H, W) of the image or latent.
        patch_size: side P of a square patch; one patch is one image token.
        in_channels: channels C of the input.
        hidden_size: width D of the residual stream.
        depth: number of blocks.
        num_heads: attention heads; must divide ``hidden_size``.
        mlp_ratio: hidden width of the MLP over D.
        num_classes: number of classes, the null class not counted.
    """

    input_size: tuple[int, int]
    patch_size: int
    in_channels: int
    hidden_size: int
    depth: int
    num_heads: int
    mlp_ratio: float
    num_classes: int

    def __post_init__(self) -> None:
        """Refuse sizes that cannot be built, naming the offender and the remedy."""
        height, width = self.input_size
        if height % self.patch_size or width % self.patch_size:
            raise ModelError(
                f"input_size {height}x{width} is not a multiple of patch_size {self.patch_size}: "
                "pad the input or choose another patch size"
            )
        if self.hidden_size % self.num_heads:
            raise ModelError(f"num_heads {self.num_heads} does not divide hidden_size {self.hidden_size}")

    @property
    def grid(self) -> tuple[int, int]:
        """Token grid (rows, columns)."""
        return self.input_size[0] // self.patch_size, self.input_size[1] // self.patch_size

    def to_json(self) -> str:
        """Serialise to one line of JSON."""
        return json.dumps(dataclasses.asdict(self), sort_keys=True)

    @classmethod
    def from_json(cls: type[Config], text: str) -> Config:
        """Inverse of :meth:`to_json`."""
        fields: dict[str, Any] = json.loads(text)
        height, width = fields.pop("input_size")
        return cls(input_size=(height, width), **fields)
