"""U-ViT, the diffusion transformer of Bao et al. ("All are Worth Words: A ViT Backbone for Diffusion Models", 2023).

Conditions are tokens: the sequence is [label, time, patches]. The first half of the blocks keep their streams, and the
second half take them in again, latest first, by a linear map of both (long skips). There is no adaLN and no gate.
Parameter names and shapes are those of the public checkpoints (class-conditional and unconditional models; the text
models are not here).

Shape legend: B batch, C channels, H/W image or latent size, S tokens (conditions included), D width, P patch size.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from tcc.errors import ModelError
from tcc.models.architecture import Architecture, count_blocks, square
from tcc.models.config import ModelConfig
from tcc.models.dit import Attention, Mlp, PatchEmbed, timestep_features, unpatchify
from tcc.samplers.diffusion import Diffusion

__all__ = ["UViT", "UViTConfig"]

# (depth, width, heads) of the published sizes; a model of depth N has N + 1 blocks.
SIZES: dict[str, tuple[int, int, int]] = {
    "S": (12, 512, 8),
    "M": (16, 768, 12),
    "L": (20, 1024, 16),
    "H": (28, 1152, 16),
}
PATCHES = (2, 4)


@dataclasses.dataclass(frozen=True, kw_only=True)
class UViTConfig(ModelConfig):
    """Everything that is needed to rebuild a U-ViT before its weights are loaded.

    Its ``depth`` counts the blocks without the middle one, as the paper does. With ``num_classes`` 0 the model is
    unconditional.

    Attributes:
        has_null_class: whether the label table has one more row, for guidance.
        final_conv: whether a 3x3 convolution follows the head (all published sizes but H).
    """

    has_null_class: bool
    final_conv: bool

    def __post_init__(self) -> None:
        """Refuse sizes that cannot be built, naming the offender and the remedy."""
        super().__post_init__()
        if self.depth % 2 or self.depth < 2:
            raise ModelError(f"depth {self.depth}: half of the blocks keep their streams for the others: use 2, 4, ...")
        if self.has_null_class and not self.num_classes:
            raise ModelError("has_null_class without classes: an unconditional model has no guidance")

    @property
    def num_extras(self) -> int:
        """Condition tokens before the image tokens: label and time, or time alone."""
        return 2 if self.num_classes else 1

    @property
    def num_tokens(self) -> int:
        """Number of tokens S, conditions included."""
        return self.num_extras + self.grid[0] * self.grid[1]

    @property
    def out_channels(self) -> int:
        """Channels of the output: C."""
        return self.in_channels

    @property
    def null_class(self) -> int | None:
        """Label of the unconditional row, or None if the model has none."""
        return self.num_classes if self.has_null_class else None


class UViTBlock(nn.Module):
    """Pre-norm attention and MLP; with ``skip``, a linear map of the stream and the long skip comes before them."""

    def __init__(self, hidden_size: int, num_heads: int, mlp_ratio: float, *, skip: bool = False) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(hidden_size)
        self.attn = Attention(hidden_size, num_heads, qkv_bias=False)
        self.norm2 = nn.LayerNorm(hidden_size)
        self.mlp = Mlp(hidden_size, int(hidden_size * mlp_ratio), approximate="none")
        self.skip_linear = nn.Linear(2 * hidden_size, hidden_size) if skip else None

    def forward(self, x: Tensor, skip: Tensor | None = None) -> Tensor:
        """Map the stream x ``[B, S, D]``; skip ``[B, S, D]`` is the long skip of a block that takes one."""
        if self.skip_linear is not None and skip is not None:
            x = self.skip_linear(torch.cat([x, skip], dim=-1))
        x = x + self.attn(self.norm1(x))
        x = x + self.mlp(self.norm2(x))
        return x


class UViT(Architecture):
    """A diffusion transformer with long skips, which predicts the noise.

    Args:
        input_size: side of a square input, or (H, W).
        patch_size: side P of a patch.
        in_channels: channels C of the input.
        hidden_size: width D.
        depth: number of blocks, the middle one not counted; even.
        num_heads: attention heads.
        mlp_ratio: hidden width of the MLP over D.
        num_classes: number of classes, the null class not counted; 0 for an unconditional model.
        has_null_class: whether the label table has a null row after the classes.
        final_conv: whether a 3x3 convolution follows the head.
    """

    family = "UViT"
    config_type = UViTConfig
    sizes = SIZES
    patches = PATCHES
    diffusion = Diffusion(schedule="scaled-linear", beta_start=0.00085, beta_end=0.012, first_timestep=1)
    mark = "mid_block.attn.qkv.weight"

    def __init__(
        self,
        *,
        input_size: int | tuple[int, int] = 32,
        patch_size: int = 2,
        in_channels: int = 4,
        hidden_size: int = 1152,
        depth: int = 28,
        num_heads: int = 16,
        mlp_ratio: float = 4.0,
        num_classes: int = 1000,
        has_null_class: bool = True,
        final_conv: bool = False,
    ) -> None:
        super().__init__()
        self.config = config = UViTConfig(
            input_size=(input_size, input_size) if isinstance(input_size, int) else input_size,
            patch_size=patch_size,
            in_channels=in_channels,
            hidden_size=hidden_size,
            depth=depth,
            num_heads=num_heads,
            mlp_ratio=mlp_ratio,
            num_classes=num_classes,
            has_null_class=has_null_class,
            final_conv=final_conv,
        )
        sizes = (hidden_size, num_heads, mlp_ratio)
        self.patch_embed = PatchEmbed(patch_size, in_channels, hidden_size)
        self.label_emb = nn.Embedding(num_classes + int(has_null_class), hidden_size) if num_classes else None
        self.pos_embed = nn.Parameter(torch.zeros(1, config.num_tokens, hidden_size))
        self.in_blocks = nn.ModuleList(UViTBlock(*sizes) for _ in range(depth // 2))
        self.mid_block = UViTBlock(*sizes)
        self.out_blocks = nn.ModuleList(UViTBlock(*sizes, skip=True) for _ in range(depth // 2))
        self.norm = nn.LayerNorm(hidden_size)
        self.decoder_pred = nn.Linear(hidden_size, patch_size * patch_size * in_channels)
        self.final_layer = nn.Conv2d(in_channels, in_channels, 3, padding=1) if final_conv else nn.Identity()
        self.initialize_weights()

    @classmethod
    def size_options(cls, size: str, patch: int) -> dict[str, Any]:
        """The constructor arguments of a published size."""
        return {**super().size_options(size, patch), "final_conv": size != "H"}

    @classmethod
    def read_sizes(cls, state: Mapping[str, Tensor]) -> dict[str, Any]:
        """See `Architecture`; the last label row, where there are labels, is taken for the null class."""
        width, channels, patch, _ = state["patch_embed.proj.weight"].shape
        rows = state["label_emb.weight"].shape[0] if "label_emb.weight" in state else 0
        return {
            "input_size": square(state["pos_embed"].shape[1] - (2 if rows else 1), patch),
            "patch_size": patch,
            "in_channels": channels,
            "hidden_size": width,
            "depth": count_blocks(state, "in_blocks") + count_blocks(state, "out_blocks"),
            "mlp_ratio": state["mid_block.mlp.fc1.weight"].shape[0] / width,
            "num_classes": max(0, rows - 1),
            "has_null_class": rows > 0,
            "final_conv": "final_layer.weight" in state,
        }

    def initialize_weights(self) -> None:
        """Initialise as the paper does: normal linears and positions, cut off at two deviations."""
        nn.init.trunc_normal_(self.pos_embed, std=0.02)
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.trunc_normal_(module.weight, std=0.02)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)

    def forward(self, x: Tensor, t: Tensor, y: Tensor | None = None) -> Tensor:
        """Predict the noise.

        Args:
            x: noisy input ``[B, C, H, W]``.
            t: timesteps ``[B]``, integer or float, in the training range (0..999).
            y: class labels ``[B]``, int64; none for an unconditional model.

        Returns:
            ``[B, C, H, W]``.
        """
        config, patches = self.config, self.patch_embed(x)
        extras = [timestep_features(t, config.hidden_size).to(patches.dtype)]
        if self.label_emb is not None:
            if y is None:
                raise ModelError(f"a model of {config.num_classes} classes needs the labels y, int64 [B]")
            extras.insert(0, self.label_emb(y))
        x = torch.cat([*(token.unsqueeze(1) for token in extras), patches], dim=1) + self.pos_embed
        skips = []
        for block in self.in_blocks:
            x = block(x)
            skips.append(x)
        x = self.mid_block(x)
        for block in self.out_blocks:
            x = block(x, skips.pop())
        patches = self.decoder_pred(self.norm(x))[:, config.num_extras :]
        image: Tensor = self.final_layer(unpatchify(patches, config.grid, config.patch_size))
        return image
