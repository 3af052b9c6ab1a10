"""Tiny models for tests: our DiT, two of diffusers', and home-made blocks in other styles.

Every builder returns a `Case`: the model with random non-zero weights (adaLN-Zero would make all outputs zero), and the
inputs of one call. `case(name)` builds a named one and captures it once per test session.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import tcc
from tcc.models import MDT, DiT, MDTv2, UViT


@dataclass(frozen=True, eq=False)
class Case:
    """A model, the inputs of a call, and what tcc sees in it."""

    model: nn.Module
    args: tuple[Any, ...]
    kwargs: dict[str, Any]

    @functools.cached_property
    def info(self) -> tcc.ModelInfo:
        """The captured and analysed model; captured once."""
        return tcc.inspect(self.model, *self.args, **self.kwargs)

    def inputs(self, step: int) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """The arguments of a call at `step`: another random first input at each, the same for the same step."""
        x = torch.randn(self.args[0].shape, generator=torch.Generator().manual_seed(1000 + step))
        return (x, *self.args[1:]), self.kwargs


def tensor_of(output: Any) -> Tensor:
    """The tensor in a model's output, whatever structure it comes in."""
    found = output if isinstance(output, Tensor) else output[0]
    assert isinstance(found, Tensor)
    return found


def relative_error(result: Tensor, expected: Tensor) -> float:
    """The largest difference, over the largest expected magnitude."""
    return float((result - expected).abs().max() / expected.abs().max().clamp_min(1e-30))


def fill(model: nn.Module, seed: int = 0, std: float = 0.1) -> nn.Module:
    """`model` in eval mode with normal random weights, gates and heads included."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(0.0, std, generator=generator)
    return model.eval()


def noise(*sizes: int, seed: int = 7) -> Tensor:
    """Normal noise from a seed."""
    return torch.randn(sizes, generator=torch.Generator().manual_seed(seed))


def dit(batch: int = 2, **overrides: Any) -> Case:
    """Our DiT: 16 tokens on a 4 x 4 grid, width 32, two blocks, unless overridden."""
    sizes: dict[str, Any] = {
        "input_size": 8,
        "patch_size": 2,
        "in_channels": 4,
        "hidden_size": 32,
        "depth": 2,
        "num_heads": 2,
        "num_classes": 10,
    } | overrides
    model = fill(DiT(**sizes))
    h, w = model.config.input_size  # type: ignore[union-attr, misc]
    labels = torch.arange(batch) % sizes["num_classes"]
    return Case(model, (noise(batch, sizes["in_channels"], h, w), torch.full((batch,), 5), labels), {})


def uvit(batch: int = 2, **overrides: Any) -> Case:
    """Our U-ViT: 16 image tokens after 2 conditions, width 16, five blocks, two long skips, unless overridden."""
    sizes: dict[str, Any] = {"input_size": 8, "hidden_size": 16, "depth": 4, "num_heads": 2, "num_classes": 10}
    model = fill(UViT(**(sizes | overrides)), std=0.2)
    return Case(model, (noise(batch, 4, 8, 8), torch.full((batch,), 5), torch.arange(batch)), {})


def mdt(version: type[MDT | MDTv2] = MDTv2, batch: int = 2, **overrides: Any) -> Case:
    """An MDT: 16 tokens, width 16, six blocks; of version 2, two long skips and two blocks that read the embedding."""
    sizes: dict[str, Any] = {"input_size": 8, "hidden_size": 16, "depth": 6, "num_heads": 2, "num_classes": 10}
    model = fill(version(**(sizes | {"decode_layer": 2, "learn_sigma": False} | overrides)), std=0.2)
    return Case(model, (noise(batch, 4, 8, 8), torch.full((batch,), 5), torch.arange(batch)), {})


def hf_dit() -> Case:
    """Diffusers' `DiTTransformer2DModel`, small."""
    from diffusers import DiTTransformer2DModel

    model = DiTTransformer2DModel(
        num_attention_heads=2,
        attention_head_dim=16,
        in_channels=4,
        out_channels=8,
        num_layers=2,
        sample_size=8,
        patch_size=2,
        num_embeds_ada_norm=10,
    )
    kwargs = {"timestep": torch.tensor([5, 5]), "class_labels": torch.tensor([1, 2])}
    return Case(fill(model), (noise(2, 4, 8, 8),), kwargs)


def wan_model() -> nn.Module:
    """Diffusers' `WanTransformer3DModel`, small."""
    from diffusers import WanTransformer3DModel

    model = WanTransformer3DModel(
        patch_size=(1, 2, 2),
        num_attention_heads=2,
        attention_head_dim=16,
        in_channels=4,
        out_channels=4,
        text_dim=24,
        freq_dim=16,
        ffn_dim=64,
        num_layers=2,
        cross_attn_norm=True,
        qk_norm="rms_norm_across_heads",
        rope_max_seq_len=32,
    )
    return fill(model)


def hf_wan() -> Case:
    """A video, cross attention to text, modulated by the timestep alone."""
    kwargs = {"timestep": torch.tensor([5, 5]), "encoder_hidden_states": noise(2, 7, 24, seed=8)}
    return Case(wan_model(), (noise(2, 4, 3, 8, 8),), kwargs)


def hf_pixart() -> Case:
    """Diffusers' `PixArtTransformer2DModel`, small: text by cross attention, with a mask."""
    from diffusers import PixArtTransformer2DModel

    model = PixArtTransformer2DModel(
        num_attention_heads=2,
        attention_head_dim=16,
        in_channels=4,
        out_channels=8,
        num_layers=2,
        sample_size=8,
        patch_size=2,
        cross_attention_dim=32,
        caption_channels=24,
        use_additional_conditions=False,
    )
    kwargs = {
        "encoder_hidden_states": noise(2, 7, 24, seed=8),
        "timestep": torch.tensor([5, 5]),
        "encoder_attention_mask": torch.tensor([[1.0] * 7, [1.0] * 4 + [0.0] * 3]),
        "added_cond_kwargs": {"resolution": None, "aspect_ratio": None},
    }
    return Case(fill(model), (noise(2, 4, 8, 8),), kwargs)


class Attention(nn.Module):
    """Self-attention over `[B, S, D]` with three projections of its own."""

    def __init__(self, width: int, heads: int = 2, *, flat: bool = False) -> None:
        super().__init__()
        self.heads, self.flat = heads, flat
        self.q, self.k, self.v, self.proj = (nn.Linear(width, width) for _ in range(4))

    def _heads(self, x: Tensor, batch: int) -> Tensor:
        return x.reshape(batch, -1, self.heads, x.shape[-1] // self.heads).transpose(1, 2)

    def forward(self, x: Tensor) -> Tensor:
        """Attend over all tokens; `flat` projects `[B * S, D]`."""
        batch, tokens, width = x.shape
        flat = x.reshape(batch * tokens, width) if self.flat else x
        q, k, v = (self._heads(p(flat), batch) for p in (self.q, self.k, self.v))
        out = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(batch, tokens, width)
        projected: Tensor = self.proj(out)
        return projected


class Mlp(nn.Sequential):
    """Linear, GELU, Linear on every token alone."""

    def __init__(self, width: int) -> None:
        super().__init__(nn.Linear(width, 2 * width), nn.GELU(), nn.Linear(2 * width, width))


class TokenConv(nn.Module):
    """A feed-forward branch with a convolution over neighbouring tokens: its tokens cannot be computed alone."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.conv = nn.Conv1d(width, width, kernel_size=3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        """Convolve `[B, S, D]` along the tokens."""
        out: Tensor = self.conv(x.transpose(1, 2)).transpose(1, 2)
        return out


class Block(nn.Module):
    """Pre-norm attention and MLP; `parallel` adds both branches to one stream value."""

    def __init__(self, width: int, mlp: nn.Module | None = None, *, parallel: bool = False, flat: bool = False) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.attn, self.mlp = Attention(width, flat=flat), mlp or Mlp(width)
        self.parallel = parallel

    def forward(self, x: Tensor) -> Tensor:
        """Map the stream `[B, S, D]`."""
        if self.parallel:
            normed = self.norm1(x)
            return x + self.attn(normed) + self.mlp(normed)
        x = x + self.attn(self.norm1(x))
        out: Tensor = x + self.mlp(self.norm2(x))
        return out


class Tokens(nn.Module):
    """Blocks on `[B, S, D]` tokens, with an embedding and a head, or without a head."""

    def __init__(self, blocks: list[nn.Module], width: int = 16, *, head: bool = True) -> None:
        super().__init__()
        self.embed, self.blocks = nn.Linear(width, width), nn.ModuleList(blocks)
        self.head = nn.Linear(width, width) if head else None

    def forward(self, x: Tensor) -> Tensor:
        """Embed, transform, read off."""
        x = self.embed(x)
        for block in self.blocks:
            x = block(x)
        return x if self.head is None else self.head(x)


class LongSkip(nn.Module):
    """Three blocks; the stream between the first two is also joined in after the second, as in U-ViT."""

    def __init__(self, width: int = 16) -> None:
        super().__init__()
        self.embed, self.head = nn.Linear(width, width), nn.Linear(width, width)
        self.blocks = nn.ModuleList(Block(width) for _ in range(3))
        self.join = nn.Linear(2 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        """Embed, two blocks, join the skip, one block, read off."""
        early = self.blocks[0](self.embed(x))
        late = self.blocks[1](early)
        out: Tensor = self.head(self.blocks[2](self.join(torch.cat([late, early], dim=-1))))
        return out


class Rescaled(nn.Module):
    """A block that scales the stream between its branches, so that its change is not the sum of them."""

    def __init__(self, width: int = 16) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.attn, self.mlp = Attention(width), Mlp(width)

    def forward(self, x: Tensor) -> Tensor:
        """Map the stream `[B, S, D]`."""
        x = (x + self.attn(self.norm1(x))) * 0.5
        out: Tensor = x + self.mlp(self.norm2(x))
        return out


class Plain(nn.Module):
    """Layers without a residual stream."""

    def __init__(self, width: int = 16) -> None:
        super().__init__()
        self.layers = nn.Sequential(*(nn.Linear(width, width) for _ in range(4)))

    def forward(self, x: Tensor) -> Tensor:
        """Transform."""
        out: Tensor = self.layers(x)
        return out


class Branching(nn.Module):
    """A forward that branches on a tensor's value."""

    def __init__(self, width: int = 16) -> None:
        super().__init__()
        self.inner = Tokens([Block(width), Block(width)])

    def forward(self, x: Tensor) -> Tensor:
        """Negate where the sum is positive."""
        if x.sum() > 0:
            x = -x
        out: Tensor = self.inner(x)
        return out


def tokens_case(model: nn.Module, batch: int = 2, tokens: int = 12, width: int = 16) -> Case:
    """A case for a model of `[B, S, D]` tokens."""
    return Case(fill(model, std=0.2), (noise(batch, tokens, width),), {})


def _blocks(count: int = 2, **options: Any) -> list[nn.Module]:
    return [Block(16, **options) for _ in range(count)]


BUILDERS: dict[str, Callable[[], Case]] = {
    "dit": dit,
    "uvit": uvit,
    "mdt": lambda: mdt(MDT, depth=3, decode_layer=1),
    "mdtv2": mdt,
    "hf_dit": hf_dit,
    "hf_pixart": hf_pixart,
    "hf_wan": hf_wan,
    "separate": lambda: tokens_case(Tokens(_blocks())),
    "parallel": lambda: tokens_case(Tokens(_blocks(parallel=True))),
    "flat": lambda: tokens_case(Tokens(_blocks(flat=True))),
    "headless": lambda: tokens_case(Tokens(_blocks(), head=False)),
    "conv": lambda: tokens_case(Tokens([Block(16, TokenConv(16)) for _ in range(2)])),
    "long_skip": lambda: tokens_case(LongSkip()),
    "rescaled": lambda: tokens_case(Tokens([Rescaled(), Rescaled()])),
    "plain": lambda: tokens_case(Plain()),
    "branching": lambda: tokens_case(Branching()),
}


@functools.cache
def case(name: str) -> Case:
    """The case of that name, built and captured once per session."""
    return BUILDERS[name]()
