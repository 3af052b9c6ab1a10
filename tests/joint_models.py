"""Tiny models with more than one residual stream: joint blocks, joint and then single blocks, streams of two widths."""

from __future__ import annotations

import functools
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tests.tiny_models import Block, Case, Mlp, fill, noise

TEXT, IMAGE, WIDTH, HEADS = 5, 12, 16, 2


def _heads(x: Tensor) -> Tensor:
    return x.reshape(*x.shape[:2], HEADS, -1).transpose(1, 2)


def _attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return F.scaled_dot_product_attention(_heads(q), _heads(k), _heads(v)).transpose(1, 2).flatten(2)


class Half(nn.Module):
    """One stream's half of a joint block."""

    def __init__(self, width: int = WIDTH) -> None:
        super().__init__()
        self.norm1, self.norm2, self.mlp = nn.LayerNorm(width), nn.LayerNorm(width), Mlp(width)
        self.qkv, self.proj = nn.Linear(width, 3 * WIDTH), nn.Linear(WIDTH, width)


class JointBlock(nn.Module):
    """Attention over the tokens of both streams, an MLP for each: text first, as in Flux, or last, as in SD3."""

    def __init__(self, *, text_first: bool = True, text_width: int = WIDTH) -> None:
        super().__init__()
        self.image, self.text, self.text_first = Half(), Half(text_width), text_first

    def forward(self, image: Tensor, text: Tensor) -> tuple[Tensor, Tensor]:
        """Map both streams."""
        parts = [half.qkv(half.norm1(x)).chunk(3, -1) for half, x in ((self.image, image), (self.text, text))]
        parts = parts[::-1] if self.text_first else parts
        joint = _attend(*(torch.cat(pair, 1) for pair in zip(*parts, strict=True)))
        sizes = [text.shape[1], image.shape[1]] if self.text_first else [image.shape[1], text.shape[1]]
        found = joint.split_with_sizes(sizes, 1)
        seen, told = found[::-1] if self.text_first else found
        image, text = image + self.image.proj(seen), text + self.text.proj(told)
        image = image + self.image.mlp(self.image.norm2(image))
        return image, text + self.text.mlp(self.text.norm2(text))


class SingleBlock(nn.Module):
    """A block on text and image in one sequence, which it joins and parts again."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.qkv, self.proj = nn.LayerNorm(WIDTH), nn.Linear(WIDTH, 3 * WIDTH), nn.Linear(2 * WIDTH, WIDTH)
        self.up = nn.Linear(WIDTH, WIDTH)

    def forward(self, image: Tensor, text: Tensor) -> tuple[Tensor, Tensor]:
        """Attention and MLP side by side, projected together."""
        x = torch.cat([text, image], 1)
        normed = self.norm(x)
        both = torch.cat([_attend(*self.qkv(normed).chunk(3, -1)), F.gelu(self.up(normed))], -1)
        x = x + self.proj(both)
        return x[:, text.shape[1] :], x[:, : text.shape[1]]


class Joint(nn.Module):
    """Joint blocks, then single ones, then perhaps joint ones again; the output is made of image tokens."""

    def __init__(
        self, double: int, single: int, again: int = 0, *, text_first: bool = True, width: int = WIDTH
    ) -> None:
        super().__init__()
        self.embed, self.head, self.context = (nn.Linear(WIDTH, WIDTH) for _ in range(3))
        self.context = nn.Linear(WIDTH, width)

        def joint(count: int) -> nn.ModuleList:
            return nn.ModuleList(JointBlock(text_first=text_first, text_width=width) for _ in range(count))

        self.pairs, self.single, self.again = (
            joint(double),
            nn.ModuleList(SingleBlock() for _ in range(single)),
            joint(again),
        )

    def forward(self, image: Tensor, encoder_hidden_states: Tensor) -> Tensor:
        """Embed both, transform, read the image off."""
        image, text = self.embed(image), self.context(encoder_hidden_states)
        for block in (*self.pairs, *self.single, *self.again):
            image, text = block(image, text)
        out: Tensor = self.head(image)
        return out


class Side(nn.Module):
    """A stream of audio that attends to the image, block by block, and the image to it; the image comes out first."""

    def __init__(self, width: int = 8) -> None:
        super().__init__()
        self.image, self.audio = (nn.ModuleList(Block(w) for _ in range(2)) for w in (WIDTH, width))
        self.to_image, self.to_audio = (
            nn.ModuleList(Cross(a, b) for _ in range(2)) for a, b in ((WIDTH, width), (width, WIDTH))
        )
        self.heads = nn.ModuleList(nn.Linear(w, w) for w in (WIDTH, width))

    def forward(self, image: Tensor, audio_hidden_states: Tensor) -> tuple[Tensor, Tensor]:
        """Both streams."""
        audio = audio_hidden_states
        for blocks in zip(self.image, self.audio, self.to_image, self.to_audio, strict=True):
            image, audio = blocks[0](image), blocks[1](audio)
            image = image + blocks[2](image, audio)
            audio = audio + blocks[3](audio, image)
        return self.heads[0](image), self.heads[1](audio)


class Cross(nn.Module):
    """Attention of one stream to another."""

    def __init__(self, width: int, other: int) -> None:
        super().__init__()
        self.q, self.kv, self.proj = nn.Linear(width, WIDTH), nn.Linear(other, 2 * WIDTH), nn.Linear(WIDTH, width)

    def forward(self, x: Tensor, other: Tensor) -> Tensor:
        """What is added to `x`."""
        out: Tensor = self.proj(_attend(self.q(x), *self.kv(other).chunk(2, -1)))
        return out


class Control(nn.Module):
    """Blocks on the image plus a hint; what each gives is added straight to the image, as in ControlNet."""

    def __init__(self, *, pooled: bool = False) -> None:
        super().__init__()
        self.embed, self.head = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH)
        self.blocks, self.control = (nn.ModuleList(Block(WIDTH) for _ in range(3)) for _ in range(2))
        self.zero, self.pooled = nn.ModuleList(nn.Linear(WIDTH, WIDTH) for _ in range(3)), pooled

    def forward(self, image: Tensor, hint: Tensor) -> Tensor:
        """Every block of the image takes what the block beside it gives: of all its tokens, or `pooled` to one."""
        image = self.embed(image)
        hint = hint if self.pooled else image + hint
        for block, control, zero in zip(self.blocks, self.control, self.zero, strict=True):
            hint = control(hint)
            image = block(image) + zero(hint.mean(1, keepdim=True) if self.pooled else hint)
        out: Tensor = self.head(image)
        return out


def _case(model: nn.Module, other: tuple[int, ...] = (2, TEXT, WIDTH)) -> Case:
    return Case(fill(model, std=0.2), (noise(2, IMAGE, WIDTH), noise(*other, seed=8)), {})


def hf_sd3() -> Case:
    """Diffusers' `SD3Transformer2DModel`: 16 image tokens on a 4 x 4 grid, 5 text tokens."""
    from diffusers import SD3Transformer2DModel

    model = SD3Transformer2DModel(
        sample_size=8,
        patch_size=2,
        in_channels=4,
        num_layers=2,
        attention_head_dim=8,
        num_attention_heads=2,
        joint_attention_dim=12,
        caption_projection_dim=16,
        pooled_projection_dim=10,
        out_channels=4,
        pos_embed_max_size=8,
    )
    kwargs = {
        "encoder_hidden_states": noise(2, TEXT, 12, seed=8),
        "pooled_projections": noise(2, 10, seed=9),
        "timestep": torch.tensor([5, 5]),
    }
    return Case(fill(model), (noise(2, 4, 8, 8),), kwargs)


def hf_flux() -> Case:
    """Diffusers' `FluxTransformer2DModel`: 12 image tokens in one row each, 5 text tokens."""
    from diffusers import FluxTransformer2DModel

    model = FluxTransformer2DModel(
        patch_size=1,
        in_channels=8,
        num_layers=2,
        num_single_layers=2,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=12,
        pooled_projection_dim=10,
        axes_dims_rope=(4, 4, 8),
    )
    places = torch.arange(12.0)
    kwargs = {
        "encoder_hidden_states": noise(2, TEXT, 12, seed=8),
        "pooled_projections": noise(2, 10, seed=9),
        "timestep": torch.tensor([0.5, 0.5]),
        "img_ids": torch.stack([places * 0, places // 4, places % 4], 1),
        "txt_ids": torch.zeros(TEXT, 3),
    }
    return Case(fill(model), (noise(2, 12, 8),), kwargs)


BUILDERS: dict[str, Callable[[], Case]] = {
    "hf_sd3": hf_sd3,
    "hf_flux": hf_flux,
    "joint": lambda: _case(Joint(2, 0, text_first=False)),
    "joint, then single": lambda: _case(Joint(2, 2)),
    "joint, single, joint": lambda: _case(Joint(1, 1, 2)),
    "two widths": lambda: _case(Joint(2, 0, width=8)),
    "as much text as image": lambda: _case(Joint(2, 1), (2, IMAGE, WIDTH)),
    "audio": lambda: _case(Side(), (2, 7, 8)),
    "control": lambda: _case(Control(), (2, IMAGE, WIDTH)),
    "pooled control": lambda: _case(Control(pooled=True)),
}


@functools.cache
def joint(name: str) -> Case:
    """The case of that name, built and captured once per session."""
    return BUILDERS[name]()
