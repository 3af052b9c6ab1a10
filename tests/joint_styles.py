"""Blocks in which image and text tokens attend to each other, in the ways people write them, and what they cost."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tests.block_styles import HEAD, HEADS, LINEAR, WIDTH, Angles, merged, stacked
from tests.tiny_models import Case, Mlp, fill, noise

BATCH, IMAGE, TEXT = 2, 12, 5
Join = Callable[[Tensor, Tensor, int], Tensor]


class Fused(nn.Module):
    """The same from one product."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.qkv = nn.LayerNorm(WIDTH), nn.Linear(WIDTH, 3 * WIDTH)

    def forward(self, x: Tensor) -> list[Tensor]:
        """Project the normed stream."""
        parts = self.qkv(self.norm(x)).chunk(3, dim=-1)
        return [part.unflatten(-1, (HEADS, HEAD)).transpose(1, 2) for part in parts]


class Projections(nn.Module):
    """Queries, keys and values of one stream, `[B, H, S, d]`."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.q, self.k, self.v = nn.LayerNorm(WIDTH), *(nn.Linear(WIDTH, WIDTH) for _ in range(3))

    def forward(self, x: Tensor) -> list[Tensor]:
        """Project the normed stream."""
        x = self.norm(x)
        return [part(x).unflatten(-1, (HEADS, HEAD)).transpose(1, 2) for part in (self.q, self.k, self.v)]


def by_torch(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Torch's own attention."""
    return merged(F.scaled_dot_product_attention(q, k, v))


def written_out(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Products and a softmax."""
    return merged((q @ k.transpose(-2, -1) * 0.3).softmax(-1) @ v)


class Dual(nn.Module):
    """Two streams, each with weights of its own, and one attention over both."""

    def __init__(
        self,
        text_first: bool,
        attend: Callable[..., Tensor],
        *,
        split: bool = False,
        rotary: bool = False,
        fused: bool = False,
    ) -> None:
        super().__init__()
        project = Fused if fused else Projections
        self.image, self.text = project(), project()
        self.proj, self.text_proj = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH)
        self.mlp, self.text_mlp = (
            nn.Sequential(nn.LayerNorm(WIDTH), Mlp(WIDTH)),
            nn.Sequential(nn.LayerNorm(WIDTH), Mlp(WIDTH)),
        )
        self.text_first, self.attend, self.split = text_first, attend, split
        self.turn = Angles(stacked, repeat=False, tokens=IMAGE + TEXT) if rotary else nn.Identity()

    def forward(self, x: Tensor, text: Tensor) -> tuple[Tensor, Tensor]:
        """Map both streams."""
        pairs = zip(self.image(x), self.text(text), strict=True)
        q, k, v = (torch.cat([t, i] if self.text_first else [i, t], dim=2) for i, t in pairs)
        out = self.attend(self.turn(q), self.turn(k), v)
        first, n = (TEXT, IMAGE) if self.text_first else (IMAGE, TEXT)
        a, b = out.split_with_sizes([first, n], dim=1) if self.split else (out[:, :first], out[:, first:])
        text_out, image_out = (a, b) if self.text_first else (b, a)
        x, text = x + self.proj(image_out), text + self.text_proj(text_out)
        return x + self.mlp(x), text + self.text_mlp(text)


class Single(nn.Module):
    """One sequence of text and image, joined for this block and taken apart again."""

    def __init__(self) -> None:
        super().__init__()
        self.both, self.proj = Projections(), nn.Linear(WIDTH, WIDTH)
        self.mlp = nn.Sequential(nn.LayerNorm(WIDTH), Mlp(WIDTH))
        self.turn = Angles(stacked, repeat=False, tokens=IMAGE + TEXT)

    def forward(self, x: Tensor, text: Tensor) -> tuple[Tensor, Tensor]:
        """Map both streams."""
        joined = torch.cat([text, x], dim=1)
        q, k, v = self.both(joined)
        joined = joined + self.proj(by_torch(self.turn(q), self.turn(k), v))
        joined = joined + self.mlp(joined)
        return joined[:, TEXT:], joined[:, :TEXT]


class Joint(nn.Module):
    """Blocks on an image and a text stream; both are read off."""

    def __init__(self, *blocks: nn.Module) -> None:
        super().__init__()
        self.embed, self.head = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH)
        self.context, self.text_head = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH)
        self.blocks = nn.ModuleList(blocks)

    def forward(self, x: Tensor, text: Tensor) -> tuple[Tensor, Tensor]:
        """Embed, transform, read off."""
        x, text = self.embed(x), self.context(text)
        for block in self.blocks:
            x, text = block(x, text)
        return self.head(x), self.text_head(text)


def joint(*blocks: nn.Module) -> Case:
    """A case of these blocks."""
    return Case(fill(Joint(*blocks), std=0.2), (noise(BATCH, IMAGE, WIDTH), noise(BATCH, TEXT, WIDTH, seed=8)), {})


def costs(attention: str, kept: int) -> int:
    """MACs of a step of two blocks that updates `kept` image tokens; the text is computed whole."""
    keys = IMAGE if attention == "current" else kept
    seen = kept if attention == "kept" else IMAGE
    tokens = 2 * LINEAR * keys + 6 * LINEAR * kept + 8 * LINEAR * TEXT
    block = tokens + (kept + TEXT) * (seen + TEXT) * 2 * WIDTH
    return BATCH * (2 * LINEAR * (IMAGE + TEXT) + 2 * block)


JOINT: dict[str, Callable[[], Case]] = {
    "image first": lambda: joint(*(Dual(False, by_torch) for _ in range(2))),
    "fused projections": lambda: joint(*(Dual(False, by_torch, fused=True) for _ in range(2))),
    "text first, split, rotary": lambda: joint(*(Dual(True, by_torch, split=True, rotary=True) for _ in range(2))),
    "written out": lambda: joint(*(Dual(True, written_out) for _ in range(2))),
    "one sequence": lambda: joint(*(Single() for _ in range(2))),
    "two streams, then one sequence": lambda: joint(Dual(True, by_torch, rotary=True), Single()),
}
