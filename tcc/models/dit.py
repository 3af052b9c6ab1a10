"""The diffusion transformer of Peebles & Xie ("Scalable Diffusion Models with Transformers", 2023).

Parameter names and shapes are those of the public DiT checkpoints, so their state dicts load with
``strict=True``. The forward is straight-line code (no branch on data, no Python state), so ``torch.export``
captures it whole.

Shape legend used below: B batch, C channels, H/W image or latent size, S tokens, D width, P patch size.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tcc.errors import ModelError
from tcc.models.architecture import Architecture, count_blocks, square
from tcc.models.config import ModelConfig

# (depth, width, heads) of the four published sizes; each exists with patch 2, 4 and 8.
SIZES: dict[str, tuple[int, int, int]] = {
    "S": (12, 384, 6),
    "B": (12, 768, 12),
    "L": (24, 1024, 16),
    "XL": (28, 1152, 16),
}
PATCHES = (2, 4, 8)


@dataclasses.dataclass(frozen=True, kw_only=True)
class DiTConfig(ModelConfig):
    """Everything that is needed to rebuild a DiT before its weights are loaded.

    Attributes:
        class_dropout_prob: share of labels replaced by the null class in training; above 0 adds the null row.
        learn_sigma: whether the output has C more channels for the learned-range variance.
    """

    class_dropout_prob: float
    learn_sigma: bool

    def __post_init__(self) -> None:
        """Refuse sizes that cannot be built, naming the offender and the remedy."""
        super().__post_init__()
        if self.hidden_size % 4:
            raise ModelError(f"hidden_size {self.hidden_size} is not a multiple of 4, as 2-D positions need")
        if not 0.0 <= self.class_dropout_prob <= 1.0:
            raise ModelError(f"class_dropout_prob must lie in [0, 1], got {self.class_dropout_prob}")

    @property
    def num_tokens(self) -> int:
        """Number of tokens S."""
        return self.grid[0] * self.grid[1]

    @property
    def out_channels(self) -> int:
        """Channels of the output: C, or 2C with learned sigma."""
        return self.in_channels * (2 if self.learn_sigma else 1)

    @property
    def null_class(self) -> int | None:
        """Label of the unconditional row, or None if the model has none."""
        return self.num_classes if self.class_dropout_prob > 0 else None


def sincos_positions(width: int, grid: tuple[int, int]) -> Tensor:
    """Fixed 2-D sin-cos position embedding, as in the public DiT and MAE code.

    The first half of the channels encodes the column, the second half the row; each half is ``[sin, cos]`` of
    the coordinate times ``10000 ** (-k / (D/4))``.

    Args:
        width: channels D, a multiple of 4.
        grid: (rows, columns) of the token grid.

    Returns:
        float32 ``[1, rows * columns, D]``, tokens in row-major order.
    """
    rows, columns = grid
    omega = 10000.0 ** (-torch.arange(width // 4, dtype=torch.float64) / (width // 4))
    row = torch.arange(rows, dtype=torch.float64).repeat_interleave(columns)
    column = torch.arange(columns, dtype=torch.float64).repeat(rows)
    halves = [f(coordinate[:, None] * omega) for coordinate in (column, row) for f in (torch.sin, torch.cos)]
    return torch.cat(halves, dim=1)[None].float()


def modulate(x: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
    """Shift and scale every token alike: x ``[B, S, D]``, shift and scale ``[B, D]``."""
    return x * (1 + scale.unsqueeze(1)) + shift.unsqueeze(1)


def unpatchify(x: Tensor, grid: tuple[int, int], patch_size: int) -> Tensor:
    """Put patches ``[B, S, P * P * C]`` of a token grid back together: ``[B, C, H, W]``."""
    (rows, columns), channels = grid, x.shape[-1] // patch_size**2
    x = x.reshape(x.shape[0], rows, columns, patch_size, patch_size, channels).permute(0, 5, 1, 3, 2, 4)
    return x.reshape(x.shape[0], channels, rows * patch_size, columns * patch_size)


def timestep_features(t: Tensor, width: int) -> Tensor:
    """Noise level ``[B]``, integer or fractional, to float32 ``[B, width]``: cos, then sin, max period 10000."""
    half = width // 2
    frequencies = torch.exp(-math.log(10000.0) * torch.arange(half, dtype=torch.float32, device=t.device) / half)
    angles = t[:, None].float() * frequencies[None]
    return torch.cat([torch.cos(angles), torch.sin(angles)], dim=-1)


class PatchEmbed(nn.Module):
    """Image ``[B, C, H, W]`` to tokens ``[B, S, D]`` by a convolution with stride P."""

    def __init__(self, patch_size: int, in_channels: int, hidden_size: int) -> None:
        super().__init__()
        self.proj = nn.Conv2d(in_channels, hidden_size, kernel_size=patch_size, stride=patch_size)

    def forward(self, x: Tensor) -> Tensor:
        """Return the tokens in row-major order."""
        patches: Tensor = self.proj(x)  # [B, D, H / P, W / P]
        return patches.flatten(2).transpose(1, 2)


class TimestepEmbedder(nn.Module):
    """Noise level ``[B]`` to ``[B, D]``: 256 cos|sin features (max period 10000), then Linear-SiLU-Linear."""

    def __init__(self, hidden_size: int, num_features: int = 256) -> None:
        super().__init__()
        self.num_features = num_features
        self.mlp = nn.Sequential(nn.Linear(num_features, hidden_size), nn.SiLU(), nn.Linear(hidden_size, hidden_size))

    def forward(self, t: Tensor) -> Tensor:
        """Embed integer or fractional timesteps."""
        features = timestep_features(t, self.num_features)
        embedded: Tensor = self.mlp(features.to(next(self.mlp.parameters()).dtype))
        return embedded


class LabelEmbedder(nn.Module):
    """Class label ``[B]`` to ``[B, D]``; with dropout > 0 the last row is the null class of guidance."""

    def __init__(self, num_classes: int, hidden_size: int, dropout_prob: float) -> None:
        super().__init__()
        self.embedding_table = nn.Embedding(num_classes + int(dropout_prob > 0), hidden_size)
        self.num_classes = num_classes
        self.dropout_prob = dropout_prob

    def forward(self, labels: Tensor) -> Tensor:
        """Embed labels; in training mode each becomes the null class with probability ``dropout_prob``."""
        if self.training and self.dropout_prob > 0:
            drop = torch.rand(labels.shape, device=labels.device) < self.dropout_prob
            labels = torch.where(drop, self.num_classes, labels)
        embedded: Tensor = self.embedding_table(labels)
        return embedded


class Attention(nn.Module):
    """Multi-head self-attention over ``[B, S, D]`` with one fused qkv projection."""

    def __init__(self, hidden_size: int, num_heads: int, *, qkv_bias: bool = True) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.head_dim = hidden_size // num_heads
        self.qkv = nn.Linear(hidden_size, 3 * hidden_size, bias=qkv_bias)
        self.proj = nn.Linear(hidden_size, hidden_size)

    def forward(self, x: Tensor, bias: Tensor | None = None) -> Tensor:
        """Attend over all tokens; `bias`, `[heads, S, S]`, is added to the logits."""
        batch, tokens, width = x.shape
        qkv = self.qkv(x).reshape(batch, tokens, 3, self.num_heads, self.head_dim)
        q, k, v = qkv.permute(2, 0, 3, 1, 4).unbind(0)  # each [B, heads, S, head_dim]
        out = F.scaled_dot_product_attention(q, k, v, attn_mask=bias)
        projected: Tensor = self.proj(out.transpose(1, 2).reshape(batch, tokens, width))
        return projected


class Mlp(nn.Module):
    """Linear, GELU (by default its tanh form), Linear over ``[B, S, D]``."""

    def __init__(self, hidden_size: int, inner_size: int, *, approximate: str = "tanh") -> None:
        super().__init__()
        self.approximate = approximate
        self.fc1 = nn.Linear(hidden_size, inner_size)
        self.fc2 = nn.Linear(inner_size, hidden_size)

    def forward(self, x: Tensor) -> Tensor:
        """Transform every token on its own."""
        out: Tensor = self.fc2(F.gelu(self.fc1(x), approximate=self.approximate))
        return out


class DiTBlock(nn.Module):
    """Attention and MLP branches, each modulated and gated by the conditioning (adaLN-Zero)."""

    def __init__(self, hidden_size: int, num_heads: int, mlp_ratio: float) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(hidden_size, elementwise_affine=False, eps=1e-6)
        self.attn = Attention(hidden_size, num_heads)
        self.norm2 = nn.LayerNorm(hidden_size, elementwise_affine=False, eps=1e-6)
        self.mlp = Mlp(hidden_size, int(hidden_size * mlp_ratio))
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(hidden_size, 6 * hidden_size))

    def forward(self, x: Tensor, c: Tensor) -> Tensor:
        """Map the stream x ``[B, S, D]`` under the conditioning c ``[B, D]``."""
        modulation: Tensor = self.adaLN_modulation(c)
        shift_attn, scale_attn, gate_attn, shift_mlp, scale_mlp, gate_mlp = modulation.chunk(6, dim=1)
        x = x + gate_attn.unsqueeze(1) * self.attn(modulate(self.norm1(x), shift_attn, scale_attn))
        x = x + gate_mlp.unsqueeze(1) * self.mlp(modulate(self.norm2(x), shift_mlp, scale_mlp))
        return x


class FinalLayer(nn.Module):
    """Modulated LayerNorm and the linear head: ``[B, S, D]`` to ``[B, S, P * P * C_out]``."""

    def __init__(self, hidden_size: int, patch_size: int, out_channels: int) -> None:
        super().__init__()
        self.norm_final = nn.LayerNorm(hidden_size, elementwise_affine=False, eps=1e-6)
        self.linear = nn.Linear(hidden_size, patch_size * patch_size * out_channels)
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(hidden_size, 2 * hidden_size))

    def forward(self, x: Tensor, c: Tensor) -> Tensor:
        """Read the patches off the stream."""
        shift, scale = self.adaLN_modulation(c).chunk(2, dim=1)
        patches: Tensor = self.linear(modulate(self.norm_final(x), shift, scale))
        return patches


def initialize_dit(model: nn.Module) -> None:
    """Initialise as the DiT paper does: Xavier linears, zero gates and head (adaLN-Zero); positions are left alone."""
    for name, parameter in model.named_parameters():
        if "adaLN_modulation" in name or "final_layer" in name or name.endswith("bias"):
            nn.init.zeros_(parameter)
        elif name.startswith(("t_embedder", "y_embedder")):
            nn.init.normal_(parameter, std=0.02)
        elif not name.endswith("pos_embed"):
            nn.init.xavier_uniform_(parameter.view(len(parameter), -1))  # the convolution as a linear map


def read_dit_sizes(state: Mapping[str, Tensor], block: str) -> dict[str, Any]:
    """The sizes that a state dict tells, but the depth; the last label row is taken for the null class.

    Args:
        state: tensors by public names.
        block: the name of any block.

    Raises:
        KeyError: a tensor is missing.
    """
    width, channels, patch, _ = state["x_embedder.proj.weight"].shape
    outputs = state["final_layer.linear.weight"].shape[0]
    return {
        "input_size": square(state["pos_embed"].shape[1], patch),
        "patch_size": patch,
        "in_channels": channels,
        "hidden_size": width,
        "mlp_ratio": state[f"{block}.mlp.fc1.weight"].shape[0] / width,
        "num_classes": state["y_embedder.embedding_table.weight"].shape[0] - 1,
        "class_dropout_prob": 0.1,
        "learn_sigma": outputs == 2 * channels * patch * patch,
    }


class DiT(Architecture):
    """A class-conditional diffusion transformer that predicts the noise, and with learned sigma the variance.

    Args:
        input_size: side of a square input, or (H, W).
        patch_size: side P of a patch.
        in_channels: channels C of the input.
        hidden_size: width D.
        depth: number of blocks.
        num_heads: attention heads.
        mlp_ratio: hidden width of the MLP over D.
        class_dropout_prob: share of labels dropped in training; above 0 adds the null row to the label table.
        num_classes: number of classes.
        learn_sigma: output 2C channels, the second half being the variance interpolation.
    """

    family = "DiT"
    config_type = DiTConfig
    sizes = SIZES
    patches = PATCHES
    mark = "x_embedder.proj.weight"
    exact = ("pos_embed",)

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
    ) -> None:
        super().__init__()
        self.config = config = DiTConfig(
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
        )
        self.x_embedder = PatchEmbed(patch_size, in_channels, hidden_size)
        self.t_embedder = TimestepEmbedder(hidden_size)
        self.y_embedder = LabelEmbedder(num_classes, hidden_size, class_dropout_prob)
        self.pos_embed = nn.Parameter(sincos_positions(hidden_size, config.grid), requires_grad=False)
        self.blocks = nn.ModuleList(DiTBlock(hidden_size, num_heads, mlp_ratio) for _ in range(depth))
        self.final_layer = FinalLayer(hidden_size, patch_size, config.out_channels)
        self.initialize_weights()

    @classmethod
    def read_sizes(cls, state: Mapping[str, Tensor]) -> dict[str, Any]:
        """See `Architecture`; the last label row is taken for the null class."""
        return {**read_dit_sizes(state, "blocks.0"), "depth": count_blocks(state, "blocks")}

    def initialize_weights(self) -> None:
        """Initialise as the paper does: Xavier linears, zero gates and head (adaLN-Zero): output 0."""
        initialize_dit(self)

    def unpatchify(self, x: Tensor) -> Tensor:
        """Put patches ``[B, S, P * P * C_out]`` back together: ``[B, C_out, H, W]``."""
        return unpatchify(x, self.config.grid, self.config.patch_size)

    def forward(self, x: Tensor, t: Tensor, y: Tensor) -> Tensor:
        """Predict the noise.

        Args:
            x: noisy input ``[B, C, H, W]``.
            t: timesteps ``[B]``, integer or float, in the training range (0..999).
            y: class labels ``[B]``, int64; the null class is ``config.null_class``.

        Returns:
            ``[B, C_out, H, W]``.
        """
        x = self.x_embedder(x) + self.pos_embed
        c = self.t_embedder(t) + self.y_embedder(y)
        for block in self.blocks:
            x = block(x, c)
        return self.unpatchify(self.final_layer(x, c))
