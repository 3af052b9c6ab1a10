"""Masked diffusion transformers of Gao et al. (MDT, 2023, and MDTv2, 2024), as they sample.

Both are DiTs with a learned relative position bias in every attention, and positions added a second time before the
decoder, the last `decode_layer` blocks. MDTv2 has long skips too: the encoder's second half takes in the streams of
its first half, latest first, and every decoder block the embedded input. Masked training and its side-interpolater are
not here: the tensors that only they use (`training_only`) are left out when a public checkpoint is loaded. All other
names and shapes are those of the public checkpoints.

Shape legend: B batch, S tokens, D width.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from tcc.errors import ModelError
from tcc.models.architecture import Architecture, count_blocks
from tcc.models.dit import (
    PATCHES,
    SIZES,
    Attention,
    DiTBlock,
    DiTConfig,
    FinalLayer,
    LabelEmbedder,
    PatchEmbed,
    TimestepEmbedder,
    initialize_dit,
    read_dit_sizes,
    sincos_positions,
    unpatchify,
)

__all__ = ["MDT", "MDTConfig", "MDTv2"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class MDTConfig(DiTConfig):
    """Everything that is needed to rebuild an MDT before its weights are loaded.

    Attributes:
        decode_layer: how many of the blocks are the decoder.
    """

    decode_layer: int

    def __post_init__(self) -> None:
        """Refuse sizes that cannot be built, naming the offender and the remedy."""
        super().__post_init__()
        if not 0 < self.decode_layer < self.depth:
            raise ModelError(f"decode_layer {self.decode_layer} of depth {self.depth}: use 1..{self.depth - 1}")


class RelativePositionBias(nn.Module):
    """What attention adds to the logit of two tokens: a number per head for each offset between them on the grid."""

    def __init__(self, grid: tuple[int, int], num_heads: int) -> None:
        super().__init__()
        rows, columns = grid
        # the last three rows are for a class token, which these models lack; checkpoints hold them
        self.relative_position_bias_table = nn.Parameter(torch.zeros((2 * rows - 1) * (2 * columns - 1) + 3, num_heads))
        row = torch.arange(rows).repeat_interleave(columns)
        column = torch.arange(columns).repeat(rows)
        down, right = row[:, None] - row + rows - 1, column[:, None] - column + columns - 1
        self.relative_position_index: Tensor
        self.register_buffer("relative_position_index", down * (2 * columns - 1) + right)

    def forward(self) -> Tensor:
        """The bias ``[heads, S, S]``, queries before keys."""
        return self.relative_position_bias_table[self.relative_position_index].permute(2, 0, 1)


class BiasedAttention(Attention):
    """Self-attention with a relative position bias."""

    def __init__(self, hidden_size: int, num_heads: int, grid: tuple[int, int]) -> None:
        super().__init__(hidden_size, num_heads)
        self.rel_pos_bias = RelativePositionBias(grid, num_heads)

    def forward(self, x: Tensor, bias: Tensor | None = None) -> Tensor:
        """Attend over all tokens."""
        own = self.rel_pos_bias()
        return super().forward(x, own if bias is None else own + bias)


class MDTBlock(DiTBlock):
    """A DiT block with biased attention; with ``skip``, a linear map of stream and long skip comes before it."""

    def __init__(self, config: MDTConfig, *, skip: bool = False) -> None:
        super().__init__(config.hidden_size, config.num_heads, config.mlp_ratio)
        self.attn = BiasedAttention(config.hidden_size, config.num_heads, config.grid)
        self.skip_linear = nn.Linear(2 * config.hidden_size, config.hidden_size) if skip else None

    def forward(self, x: Tensor, c: Tensor, skip: Tensor | None = None) -> Tensor:
        """Map the stream x ``[B, S, D]`` under the conditioning c ``[B, D]``; skip is like x."""
        if self.skip_linear is not None and skip is not None:
            x = self.skip_linear(torch.cat([x, skip], dim=-1))
        return super().forward(x, c)


class _Masked(Architecture):
    """What both versions share: embeddings, positions before and within, and the head."""

    config_type = MDTConfig
    sizes = SIZES
    training_only = ("sideblocks.", "mask_token")
    published_decoder: ClassVar[int]

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
        class_dropout_prob: float = 0.1,
        num_classes: int = 1000,
        learn_sigma: bool = True,
        decode_layer: int | None = None,
    ) -> None:
        super().__init__()
        self.config: MDTConfig = MDTConfig(
            input_size=(input_size, input_size) if isinstance(input_size, int) else input_size,
            patch_size=patch_size,
            in_channels=in_channels,
            hidden_size=hidden_size,
            depth=depth,
            num_heads=num_heads,
            mlp_ratio=mlp_ratio,
            class_dropout_prob=class_dropout_prob,
            num_classes=num_classes,
            learn_sigma=learn_sigma,
            decode_layer=self.published_decoder if decode_layer is None else decode_layer,
        )
        positions = sincos_positions(hidden_size, self.config.grid)
        self.x_embedder = PatchEmbed(patch_size, in_channels, hidden_size)
        self.t_embedder = TimestepEmbedder(hidden_size)
        self.y_embedder = LabelEmbedder(num_classes, hidden_size, class_dropout_prob)
        self.pos_embed = nn.Parameter(positions)
        self.decoder_pos_embed = nn.Parameter(positions.clone())
        self.build_blocks()
        self.final_layer = FinalLayer(hidden_size, patch_size, self.config.out_channels)
        self.initialize_weights()

    def build_blocks(self) -> None:
        """Make the blocks."""
        raise NotImplementedError

    def transform(self, x: Tensor, c: Tensor) -> Tensor:
        """All blocks on the stream x ``[B, S, D]`` under the conditioning c ``[B, D]``."""
        raise NotImplementedError

    def initialize_weights(self) -> None:
        """Initialise as the paper does: as DiT, with small normal biases of attention and trained sin-cos positions."""
        initialize_dit(self)
        for name, parameter in self.named_parameters():
            if name.endswith("relative_position_bias_table"):
                nn.init.trunc_normal_(parameter, std=0.02)

    def forward(self, x: Tensor, t: Tensor, y: Tensor) -> Tensor:
        """Predict the noise.

        Args:
            x: noisy input ``[B, C, H, W]``.
            t: timesteps ``[B]``, integer or float, in the training range (0..999).
            y: class labels ``[B]``, int64; the null class is ``config.null_class``.

        Returns:
            ``[B, C_out, H, W]``.
        """
        c = self.t_embedder(t) + self.y_embedder(y)
        x = self.transform(self.x_embedder(x) + self.pos_embed, c)
        return unpatchify(self.final_layer(x, c), self.config.grid, self.config.patch_size)


class MDT(_Masked):
    """The first version: a chain of blocks. Arguments as for MDTv2."""

    family = "MDT"
    patches = PATCHES
    mark = "decoder_pos_embed"
    published_decoder = 2

    @classmethod
    def read_sizes(cls, state: Mapping[str, Tensor]) -> dict[str, Any]:
        """See `Architecture`; weights do not tell the decoder from the encoder: the published 2 blocks are taken."""
        sizes = read_dit_sizes(state, "blocks.0")
        return {**sizes, "depth": count_blocks(state, "blocks"), "decode_layer": cls.published_decoder}

    def build_blocks(self) -> None:
        """One list, the decoder's at its end."""
        self.blocks = nn.ModuleList(MDTBlock(self.config) for _ in range(self.config.depth))

    def transform(self, x: Tensor, c: Tensor) -> Tensor:
        """Add the decoder's positions on the way."""
        for index, block in enumerate(self.blocks):
            if index == self.config.depth - self.config.decode_layer:
                x = x + self.decoder_pos_embed
            x = block(x, c)
        return x


class MDTv2(_Masked):
    """The second version, with long skips.

    Args:
        input_size: side of a square input, or (H, W).
        patch_size: side P of a patch.
        in_channels: channels C of the input.
        hidden_size: width D.
        depth: number of blocks, the decoder's counted.
        num_heads: attention heads.
        mlp_ratio: hidden width of the MLP over D.
        class_dropout_prob: share of labels dropped in training; above 0 adds the null row to the label table.
        num_classes: number of classes.
        learn_sigma: output 2C channels, the second half being the variance interpolation.
        decode_layer: blocks of the decoder; by default 2 for MDT and 4 for MDTv2, as published.
    """

    family = "MDTv2"
    patches = (2,)
    mark = "en_inblocks.0.attn.qkv.weight"
    published_decoder = 4

    @classmethod
    def read_sizes(cls, state: Mapping[str, Tensor]) -> dict[str, Any]:
        """See `Architecture`."""
        blocks = [count_blocks(state, prefix) for prefix in ("en_inblocks", "en_outblocks", "de_blocks")]
        return {**read_dit_sizes(state, "en_inblocks.0"), "depth": sum(blocks), "decode_layer": blocks[2]}

    def build_blocks(self) -> None:
        """The encoder's two halves and the decoder."""
        config = self.config
        half, odd = divmod(config.depth - config.decode_layer, 2)
        if odd:
            raise ModelError(
                f"decode_layer {config.decode_layer} of depth {config.depth} leaves the encoder "
                f"{2 * half + 1} blocks: it has two halves of one size"
            )
        self.en_inblocks = nn.ModuleList(MDTBlock(config) for _ in range(half))
        self.en_outblocks = nn.ModuleList(MDTBlock(config, skip=True) for _ in range(half))
        self.de_blocks = nn.ModuleList(MDTBlock(config, skip=True) for _ in range(config.decode_layer))

    def transform(self, x: Tensor, c: Tensor) -> Tensor:
        """Keep the first half's streams for the second, and the embedded input for the decoder."""
        embedded, skips = x, []
        for block in self.en_inblocks:
            x = block(x, c)
            skips.append(x)
        for block in self.en_outblocks:
            x = block(x, c, skips.pop())
        x = x + self.decoder_pos_embed
        for block in self.de_blocks:
            x = block(x, c, embedded)
        return x
