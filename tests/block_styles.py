"""Transformer blocks in the ways people write them, each with what its parts cost.

Every style is a stack of two blocks on `[B, S, D]` tokens. `Costs` counts its MACs by hand, so that a gather that
stopped early shows as a number and not only as a slow step.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tests.tiny_models import Case, Mlp, TokenConv, Tokens, noise, tokens_case

BATCH, TOKENS, WIDTH, HEADS = 2, 12, 16, 2
HEAD = WIDTH // HEADS
LINEAR = WIDTH * WIDTH


@dataclass(frozen=True)
class Costs:
    """MACs of one block of one style.

    Attributes:
        keys: per token, of keys and values.
        rest: per token, of everything else.
        pair: per query and key.
    """

    keys: int = 2 * LINEAR
    rest: int = 2 * LINEAR + 4 * LINEAR
    pair: int = 2 * WIDTH

    def step(self, attention: str, kept: int, blocks: int = 2) -> int:
        """MACs of a step that updates `kept` tokens of every block; embedding and head are computed for all."""
        keys = TOKENS if attention == "current" else kept
        seen = kept if attention == "kept" else TOKENS
        block = keys * self.keys + kept * self.rest + kept * seen * self.pair
        return BATCH * (2 * LINEAR * TOKENS + blocks * block)


@dataclass(frozen=True)
class Style:
    """A style: how its block is made, and what it costs."""

    block: Callable[[], nn.Module]
    costs: Costs = Costs()

    def case(self) -> Case:
        """Two blocks between an embedding and a head."""
        return tokens_case(Tokens([self.block(), self.block()]), BATCH, TOKENS, WIDTH)


class Styled(nn.Module):
    """Attention whose projections, heads, positions and products are functions of their own."""

    def __init__(
        self,
        split: Callable[[Tensor], list[Tensor]],
        attend: Callable[[Tensor, Tensor, Tensor], Tensor],
        *,
        turn: Callable[[Tensor], Tensor] = lambda x: x,
        norm: nn.Module | None = None,
        heads: tuple[int, int, int] = (HEADS, HEADS, HEADS),
    ) -> None:
        super().__init__()
        self.qkv, self.proj = nn.Linear(WIDTH, sum(heads) * HEAD), nn.Linear(WIDTH, WIDTH)
        self.split, self.attend, self.turn, self.norm = split, attend, turn, norm or nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        """Attend over all tokens of `[B, S, D]`; heads come apart and together as `split` and `attend` write it."""
        q, k, v = self.split(self.qkv(x))
        out = self.attend(self.turn(self.norm(q)), self.turn(self.norm(k)), v)
        projected: Tensor = self.proj(out)
        return projected


def in_front(qkv: Tensor) -> list[Tensor]:
    """`b n (three h d) -> three b h n d`, as einops writes it."""
    batch, tokens, _ = qkv.shape
    return list(qkv.reshape(batch, tokens, 3, HEADS, HEAD).permute(2, 0, 3, 1, 4))


def by_head(qkv: Tensor) -> list[Tensor]:
    """`b n (h three d) -> three b h n d`: every head has its query, key and value side by side."""
    batch, tokens, _ = qkv.shape
    return list(qkv.reshape(batch, tokens, HEADS, 3, HEAD).permute(3, 0, 2, 1, 4).unbind(0))


def chunked(qkv: Tensor) -> list[Tensor]:
    """Three chunks, then `b n (h d) -> b h n d`."""
    return [part.unflatten(-1, (HEADS, HEAD)).transpose(1, 2) for part in qkv.chunk(3, dim=-1)]


def grouped(qkv: Tensor) -> list[Tensor]:
    """Two query heads, one key head and one value head."""
    parts = qkv.split([WIDTH, HEAD, HEAD], dim=-1)
    return [part.unflatten(-1, (-1, HEAD)).transpose(1, 2) for part in parts]


def heads_behind(qkv: Tensor) -> list[Tensor]:
    """`[B, S, H, d]`: the heads stay where they are."""
    return [part.unflatten(-1, (HEADS, HEAD)) for part in qkv.chunk(3, dim=-1)]


def merged(x: Tensor) -> Tensor:
    """`b h n d -> b n (h d)`."""
    return x.permute(0, 2, 1, 3).flatten(2)


def fused(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Torch's own attention."""
    return merged(F.scaled_dot_product_attention(q, k, v))


def one_for_all(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """One key head for all queries, repeated."""
    return fused(q, *(x.repeat_interleave(HEADS, dim=1) for x in (k, v)))


def expanded(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """The same, by expand and reshape."""
    batch, _, tokens, head = k.shape
    k, v = (x[:, :, None].expand(batch, 1, HEADS, tokens, head).reshape(batch, HEADS, tokens, head) for x in (k, v))
    return fused(q, k, v)


def shared_keys(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """The same, by torch's option."""
    return merged(F.scaled_dot_product_attention(q, k, v, enable_gqa=True))


def by_matmul(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Scaled products and a softmax."""
    scores = (q * HEAD**-0.5) @ k.transpose(-2, -1)
    return merged(scores.softmax(dim=-1) @ v)


def in_float32(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Keys scaled and turned first, a softmax in float32, a cast back."""
    scores = torch.matmul(q, (k * 0.3).permute(0, 1, 3, 2))
    return merged(torch.matmul(F.softmax(scores, dim=-1, dtype=torch.float32).to(q.dtype), v))


def by_baddbmm(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """`(b h) n d`, and a product into an empty tensor, as diffusers' attention processors write it."""
    batch, heads, tokens, head = q.shape
    q, k, v = (x.reshape(batch * heads, tokens, head) for x in (q, k, v))
    empty = torch.empty(batch * heads, tokens, tokens)
    scores = torch.baddbmm(empty, q, k.transpose(-1, -2), beta=0, alpha=head**-0.5)
    return merged(torch.bmm(scores.softmax(dim=-1), v).unflatten(0, (batch, heads)))


def by_einsum(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Einsums that leave the heads behind the tokens."""
    weights = (torch.einsum("bqhd,bkhd->bhqk", q, k) * 0.3).softmax(-1)
    return torch.einsum("bhqk,bkhd->bqhd", weights, v).flatten(2)


def by_open_einsum(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Einsums that leave the leading dimensions open."""
    return merged(torch.einsum("...ij,...jd->...id", torch.einsum("...id,...jd->...ij", q, k).softmax(-1), v))


class Masked(nn.Module):
    """Attention written out, with a band of visible keys and a bias for every head and pair."""

    def __init__(self) -> None:
        super().__init__()
        places = torch.arange(TOKENS)
        self.register_buffer("far", (places[:, None] - places[None]).abs() > 5)
        self.register_buffer("bias", noise(1, HEADS, TOKENS, TOKENS, seed=11))

    def forward(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """Mask and bias go onto the scores."""
        scores = (q @ k.transpose(-2, -1) + self.bias).masked_fill(self.far, float("-inf"))
        return merged(scores.softmax(-1) @ v)


class ByQuery(nn.Module):
    """A bias computed from the query, of a table per distance or per pair (Shaw et al., arXiv 1803.02155)."""

    def __init__(self, equation: str, *sizes: int) -> None:
        super().__init__()
        self.equation, self.table = equation, nn.Parameter(torch.zeros(*sizes, HEAD))

    def forward(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """The bias goes onto the scores."""
        scores = q @ k.transpose(-2, -1) + torch.einsum(self.equation, q, self.table)
        return merged(scores.softmax(-1) @ v)


class Angles(nn.Module):
    """Rotary positions: pairs of channels of `[B, H, S, d]` are turned by angles that depend on the token."""

    def __init__(self, pairs: Callable[[Tensor, Tensor, Tensor], Tensor], repeat: bool, tokens: int = TOKENS) -> None:
        super().__init__()
        angles = torch.arange(tokens)[:, None] / 10.0 ** torch.arange(HEAD // 2)
        angles = angles.repeat(1, 2) if repeat else angles
        self.pairs = pairs
        self.register_buffer("cos", angles.cos())
        self.register_buffer("sin", angles.sin())

    def forward(self, x: Tensor) -> Tensor:
        """Turn."""
        return self.pairs(x, self.cos, self.sin)


def stacked(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Neighbouring channels, stacked and flattened."""
    a, b = x.unflatten(-1, (-1, 2)).unbind(-1)
    return torch.stack([a * cos - b * sin, a * sin + b * cos], dim=-1).flatten(-2)


def halves(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """The first and the second half of the channels, as `rotate_half`."""
    a, b = x[..., : HEAD // 2], x[..., HEAD // 2 :]
    return x * cos + torch.cat((-b, a), dim=-1) * sin


def in_place(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Every second channel, written into an empty tensor."""
    a, b, out = x[..., 0::2], x[..., 1::2], torch.empty_like(x)
    out[..., 0::2] = a * cos - b * sin
    out[..., 1::2] = a * sin + b * cos
    return out


def as_complex(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Pairs of channels as complex numbers."""
    turned = torch.view_as_complex(x.float().unflatten(-1, (-1, 2)).contiguous()) * torch.complex(cos, sin)
    return torch.view_as_real(turned).flatten(-2).type_as(x)


class RootMeanSquare(nn.Module):
    """RMS norm, written out."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))

    def forward(self, x: Tensor) -> Tensor:
        """Divide by the root of the mean square of the channels."""
        squares = x.to(torch.float32).pow(2).mean(-1, keepdim=True)
        return (x * torch.rsqrt(squares + 1e-6)).to(x.dtype) * self.weight


class Unit(nn.Module):
    """Queries and keys of length one, with a learned factor per head."""

    def __init__(self) -> None:
        super().__init__()
        self.factor = nn.Parameter(torch.ones(HEADS, 1, 1))

    def forward(self, x: Tensor) -> Tensor:
        """Normalise `[B, H, S, d]`."""
        return F.normalize(x, dim=-1) * self.factor


class SwiGlu(nn.Module):
    """A gated unit whose two halves come from one product."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(WIDTH, 4 * WIDTH), nn.Linear(2 * WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        """Gate, then map back."""
        gate, up = self.up(x).chunk(2, dim=-1)
        out: Tensor = self.down(F.silu(gate) * up)
        return out


class PreNorm(nn.Module):
    """`x + f(norm(x))`, twice."""

    def __init__(self, attn: nn.Module, mlp: nn.Module | None = None, norm: type[nn.Module] = nn.LayerNorm) -> None:
        super().__init__()
        self.norm1, self.norm2 = norm(WIDTH), norm(WIDTH)  # type: ignore[call-arg]
        self.attn, self.mlp = attn, mlp or Mlp(WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        """Map the stream."""
        x = x + self.attn(self.norm1(x))
        out: Tensor = x + self.mlp(self.norm2(x))
        return out


class PostNorm(PreNorm):
    """`norm(x + f(x))`, twice."""

    def forward(self, x: Tensor) -> Tensor:
        """Map the stream."""
        x = self.norm1(x + self.attn(x))
        out: Tensor = self.norm2(x + self.mlp(x))
        return out


class SandwichNorm(PreNorm):
    """`x + norm(f(norm(x)))`, twice: norms on both sides of a branch."""

    def __init__(self, attn: nn.Module) -> None:
        super().__init__(attn)
        self.norm3, self.norm4 = RootMeanSquare(WIDTH), RootMeanSquare(WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        """Map the stream."""
        x = x + self.norm3(self.attn(self.norm1(x)))
        out: Tensor = x + self.norm4(self.mlp(self.norm2(x)))
        return out


class Modulated(PreNorm):
    """Shift, scale and gate of every token alone."""

    def __init__(self, attn: nn.Module) -> None:
        super().__init__(attn)
        self.register_buffer("times", noise(BATCH, TOKENS, WIDTH, seed=17))
        self.table = nn.Parameter(torch.zeros(1, 1, 6, WIDTH))

    def forward(self, x: Tensor) -> Tensor:
        """Map the stream."""
        parts = (self.table + self.times.unsqueeze(2)).chunk(6, dim=2)
        shift, scale, gate, shift2, scale2, gate2 = (part.squeeze(2) for part in parts)
        x = x + gate * self.attn(self.norm1(x) * (1 + scale) + shift)
        out: Tensor = x + gate2 * self.mlp(self.norm2(x) * (1 + scale2) + shift2)
        return out


class OneProduct(nn.Module):
    """Attention and MLP side by side, with one product before both and one after."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(WIDTH)
        self.both, self.proj = nn.Linear(WIDTH, 5 * WIDTH), nn.Linear(3 * WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        """Map the stream."""
        qkv, hidden = self.both(self.norm(x)).split([3 * WIDTH, 2 * WIDTH], dim=-1)
        out: Tensor = x + self.proj(torch.cat([fused(*in_front(qkv)), F.gelu(hidden)], dim=2))
        return out


def pre(split: Callable[[Tensor], list[Tensor]], attend: Callable[..., Tensor]) -> Callable[[], nn.Module]:
    """A pre-norm block with this attention."""
    return lambda: PreNorm(Styled(split, attend))


def turned(pairs: Callable[[Tensor, Tensor, Tensor], Tensor], repeat: bool = False) -> Callable[[], nn.Module]:
    """A pre-norm block with rotary positions."""
    return lambda: PreNorm(Styled(chunked, fused, turn=Angles(pairs, repeat)))


ONE_KEY_HEAD = Costs(keys=2 * WIDTH * HEAD)
TABLE = Costs(pair=3 * WIDTH)
STYLES: dict[str, Style] = {
    "qkv in front": Style(pre(in_front, fused)),
    "qkv by head": Style(pre(by_head, fused)),
    "qkv in chunks": Style(pre(chunked, fused)),
    "matmul": Style(pre(chunked, by_matmul)),
    "softmax in float32": Style(pre(in_front, in_float32)),
    "baddbmm": Style(pre(chunked, by_baddbmm)),
    "einsum": Style(pre(heads_behind, by_einsum)),
    "einsum, open": Style(pre(chunked, by_open_einsum)),
    "mask and bias, written out": Style(lambda: PreNorm(Styled(chunked, Masked()))),
    "bias of the query, by key": Style(lambda: PreNorm(Styled(chunked, ByQuery("bhqd,kd->bhqk", TOKENS))), TABLE),
    "bias of the query, by pair": Style(
        lambda: PreNorm(Styled(chunked, ByQuery("bhqd,qkd->bhqk", TOKENS, TOKENS))), TABLE
    ),
    "one key head, repeated": Style(lambda: PreNorm(Styled(grouped, one_for_all, heads=(HEADS, 1, 1))), ONE_KEY_HEAD),
    "one key head, expanded": Style(lambda: PreNorm(Styled(grouped, expanded, heads=(HEADS, 1, 1))), ONE_KEY_HEAD),
    "one key head, shared": Style(lambda: PreNorm(Styled(grouped, shared_keys, heads=(HEADS, 1, 1))), ONE_KEY_HEAD),
    "rotary, stacked": Style(turned(stacked)),
    "rotary, halves": Style(turned(halves, repeat=True)),
    "rotary, in place": Style(turned(in_place)),
    "rotary, complex": Style(turned(as_complex)),
    "rms norm": Style(lambda: PreNorm(Styled(chunked, fused, norm=nn.RMSNorm(HEAD)), norm=nn.RMSNorm)),
    "rms norm, written out": Style(
        lambda: PreNorm(Styled(chunked, fused, norm=RootMeanSquare(HEAD)), norm=RootMeanSquare)
    ),
    "unit queries and keys": Style(lambda: PreNorm(Styled(chunked, fused, norm=Unit()))),
    "swiglu": Style(lambda: PreNorm(Styled(chunked, fused), SwiGlu()), Costs(rest=8 * LINEAR)),
    "post-norm": Style(lambda: PostNorm(Styled(chunked, fused))),
    "norms on both sides": Style(lambda: SandwichNorm(Styled(chunked, fused))),
    "modulated by token": Style(lambda: Modulated(Styled(chunked, fused))),
    "one product for both": Style(OneProduct, Costs(rest=6 * LINEAR)),
}


def convolved() -> Case:
    """A convolution over neighbouring tokens in the feed-forward."""
    return tokens_case(Tokens([PreNorm(Styled(chunked, fused), TokenConv(WIDTH)) for _ in range(2)]), BATCH, TOKENS)
