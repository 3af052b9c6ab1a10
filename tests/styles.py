"""More block styles: rotary positions with shared keys and gated MLPs, masks, tokens first, attention written out."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tests.tiny_models import Block, Case, Mlp, Tokens, fill, noise, tokens_case


class RotaryAttention(nn.Module):
    """Normalised queries and keys, turned by position; four query heads share two key heads; one projection."""

    def __init__(self, width: int, tokens: int) -> None:
        super().__init__()
        self.head = width // 4
        self.qkv, self.proj = nn.Linear(width, 2 * width), nn.Linear(width, width)
        self.norm = nn.RMSNorm(self.head)
        angles = torch.arange(tokens)[:, None] / 10.0 ** torch.arange(self.head // 2)
        self.register_buffer("cos", angles.cos().repeat(1, 2))
        self.register_buffer("sin", angles.sin().repeat(1, 2))

    def turn(self, x: Tensor) -> Tensor:
        """Rotate pairs of channels of `[B, heads, S, d]` by the token's angles."""
        a, b = x.chunk(2, dim=-1)
        return x * self.cos + torch.cat([-b, a], dim=-1) * self.sin

    def forward(self, x: Tensor) -> Tensor:
        """Attend over all tokens."""
        batch, tokens, width = x.shape
        parts = self.qkv(x).split([width, width // 2, width // 2], dim=-1)
        q, k, v = (part.reshape(batch, tokens, -1, self.head).transpose(1, 2) for part in parts)
        q, k = self.turn(self.norm(q)), self.turn(self.norm(k))
        out = F.scaled_dot_product_attention(q, k, v, enable_gqa=True)
        projected: Tensor = self.proj(out.transpose(1, 2).reshape(batch, tokens, width))
        return projected


class GatedMlp(nn.Module):
    """SwiGLU with one projection for gate and value."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(width, 4 * width), nn.Linear(2 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        """Transform every token on its own."""
        gate, value = self.up(x).chunk(2, dim=-1)
        out: Tensor = self.down(F.silu(gate) * value)
        return out


class MaskedAttention(nn.Module):
    """Attention with a band mask of booleans, and one with a bias per head and pair of tokens."""

    def __init__(self, width: int, tokens: int) -> None:
        super().__init__()
        self.heads, self.head = 2, width // 2
        self.qkv, self.proj = nn.Linear(width, 3 * width), nn.Linear(width, width)
        places = torch.arange(tokens)
        self.register_buffer("near", (places[:, None] - places[None]).abs() <= 4)
        self.register_buffer("bias", noise(1, 2, tokens, tokens, seed=11))

    def forward(self, x: Tensor) -> Tensor:
        """The sum of both."""
        batch, tokens, width = x.shape
        qkv = self.qkv(x).reshape(batch, tokens, 3, self.heads, self.head)
        q, k, v = qkv.permute(2, 0, 3, 1, 4).unbind(0)
        out = F.scaled_dot_product_attention(q, k, v, attn_mask=self.near)
        out = out + F.scaled_dot_product_attention(q, k, v, attn_mask=self.bias)
        projected: Tensor = self.proj(out.transpose(1, 2).reshape(batch, tokens, width))
        return projected


class WrittenOut(nn.Module):
    """Attention as two matrix products and a softmax."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.qkv, self.proj = nn.Linear(width, 3 * width), nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        """Attend over all tokens."""
        batch, tokens, width = x.shape
        q, k, v = self.qkv(x).reshape(batch, tokens, 3, 2, width // 2).permute(2, 0, 3, 1, 4)
        weights = (q @ k.transpose(-2, -1) * 0.3).softmax(-1)
        projected: Tensor = self.proj((weights @ v).transpose(1, 2).reshape(batch, tokens, width))
        return projected


class TokensFirst(nn.Module):
    """A stream `[S, B, D]`, as in older code; the blocks stand in no list."""

    def __init__(self, width: int = 16) -> None:
        super().__init__()
        self.embed, self.one, self.two = nn.Linear(width, width), Block(width), Block(width)

    def forward(self, x: Tensor) -> Tensor:
        """Attention turns the stream round and back."""
        x = self.embed(x)
        for block in (self.one, self.two):
            x = x + block.attn(block.norm1(x).transpose(0, 1)).transpose(0, 1)
            x = x + block.mlp(block.norm2(x))
        return x


class ChannelMajor(nn.Module):
    """Patches whose channels lie apart in memory, a learned bias of attention, and a head that flattens tokens."""

    def __init__(self, width: int = 16) -> None:
        super().__init__()
        self.embed, self.blocks = nn.Conv2d(4, width, 2, 2), nn.ModuleList(with_parts(attn=LearnedBias(width, 16)))

    def forward(self, x: Tensor) -> Tensor:
        """`[B, 4, 8, 8]` to `[B * D]`; the last reshape is a view of a stream that lies as the patches do."""
        x = self.embed(x).flatten(2).transpose(1, 2)
        for block in self.blocks:
            x = block(x)
        return x.transpose(1, 2).reshape(-1, 16).sum(-1)


class LearnedBias(nn.Module):
    """Attention with a bias that has a gradient, for which torch takes another kernel."""

    def __init__(self, width: int, tokens: int) -> None:
        super().__init__()
        self.qkv, self.proj = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.bias = nn.Parameter(torch.zeros(2, tokens, tokens))

    def forward(self, x: Tensor) -> Tensor:
        """Attend over all tokens."""
        q, k, v = self.qkv(x).unflatten(-1, (3, 2, -1)).permute(2, 0, 3, 1, 4)
        out = F.scaled_dot_product_attention(q, k, v, attn_mask=self.bias[None])
        projected: Tensor = self.proj(out.transpose(1, 2).flatten(2))
        return projected


def with_parts(count: int = 2, **parts: nn.Module) -> list[nn.Module]:
    """Blocks with other parts."""
    blocks: list[nn.Module] = []
    for _ in range(count):
        block = Block(16)
        for name, part in parts.items():
            setattr(block, name, part)
        blocks.append(block)
    return blocks


def rotary() -> Case:
    """Rotary positions, shared keys, gated MLP."""
    return tokens_case(Tokens([*with_parts(1, attn=RotaryAttention(16, 12), mlp=GatedMlp(16)), Block(16)]))


def masked() -> Case:
    """A band mask and a bias, at 12 tokens."""
    blocks = [*with_parts(1, attn=MaskedAttention(16, 12)), *with_parts(1, attn=MaskedAttention(16, 12))]
    return tokens_case(Tokens(blocks))


def written_out() -> Case:
    """Attention that is not recognised as such."""
    return tokens_case(Tokens(with_parts(attn=WrittenOut(16), mlp=Mlp(16))))


def tokens_first() -> Case:
    """Twelve tokens, batch 2."""
    return Case(fill(TokensFirst(), std=0.2), (noise(12, 2, 16),), {})


def channel_major() -> Case:
    """Sixteen tokens, batch 2; some of its weights want gradients."""
    return Case(fill(ChannelMajor(), std=0.2), (noise(2, 4, 8, 8),), {})
