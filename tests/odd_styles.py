"""Branches that do something unusual with their tokens: what `info` says of each must be what the compiler does."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tests.block_styles import BATCH, HEAD, HEADS, TOKENS, WIDTH, PreNorm, Styled, chunked, fused, merged
from tests.tiny_models import Case, Tokens, tokens_case

Attend = Callable[[Tensor, Tensor, Tensor], Tensor]


@dataclass(frozen=True)
class Odd:
    """A branch in two blocks.

    Attributes:
        branch: makes the branch, a map of `[B, S, D]`.
        reason: what the reason must say why its tokens cannot be pruned; "" where they can.
        attends: whether the branch stands in the place of attention, and not of the MLP.
    """

    branch: Callable[[], nn.Module]
    reason: str = ""
    attends: bool = True

    def case(self) -> Case:
        """Two blocks between an embedding and a head."""
        blocks = [self._block(), self._block()]
        return tokens_case(Tokens(blocks), BATCH, TOKENS, WIDTH)

    def _block(self) -> nn.Module:
        return PreNorm(self.branch()) if self.attends else PreNorm(Styled(chunked, fused), self.branch())


class Map(nn.Module):
    """A function of `[B, S, D]` between two linear maps."""

    def __init__(self, function: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.function, self.first, self.last = function, nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        """Map, apply, map."""
        out: Tensor = self.last(self.function(self.first(x)))
        return out


def attending(attend: Attend) -> Callable[[], nn.Module]:
    """Attention by `attend`, which gets `[B, H, S, d]`."""
    return lambda: Styled(chunked, attend)


def mapping(function: Callable[[Tensor], Tensor]) -> Odd:
    """An MLP's place; prunable."""
    return Odd(lambda: Map(function), attends=False)


def refused(function: Callable[[Tensor], Tensor], reason: str) -> Odd:
    """An MLP's place; not prunable."""
    return Odd(lambda: Map(function), reason, attends=False)


def scores_of(q: Tensor, k: Tensor) -> Tensor:
    """Scaled products of queries and keys."""
    return q @ k.transpose(-2, -1) * 0.3


def linear_attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Keys and values are summed over the tokens first (Shen et al., arXiv 1812.01243)."""
    return merged(q.softmax(-1) @ (k.softmax(-2).transpose(-2, -1) @ v))


def relu_attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """The same with rectified features and a sum that normalises, as in Sana."""
    q, k, v = q.relu(), k.relu(), F.pad(v, (0, 1), value=1.0)
    out = q @ (k.transpose(-2, -1) @ v)
    return merged(out[..., :-1] / (out[..., -1:] + 1e-6))


def over_channels(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Channels attend to channels (XCiT, arXiv 2106.09681)."""
    return merged(v.transpose(-2, -1).mT @ scores_of(q.mT, k.mT).softmax(-1))


def one_more(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """A softmax written out, with one more in its sum."""
    weights = scores_of(q, k).exp()
    return merged(weights / (1 + weights.sum(-1, keepdim=True)) @ v)


def sigmoid(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Every weight on its own."""
    return merged(scores_of(q, k).sigmoid() @ v)


def differential(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """The difference of two maps (arXiv 2410.05258)."""
    (q, other_q), (k, other_k) = q.chunk(2, -1), k.chunk(2, -1)
    return merged((scores_of(q, k).softmax(-1) - 0.2 * scores_of(other_q, other_k).softmax(-1)) @ v)


def causal(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """No token sees a later one."""
    return merged(F.scaled_dot_product_attention(q, k, v, is_causal=True))


def windows(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Attention inside of three windows."""
    parts = [x.unflatten(2, (3, -1)) for x in (q, k, v)]
    return merged(F.scaled_dot_product_attention(*parts).flatten(2, 3))


def by_distance(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """ALiBi: a slope for every head."""
    places = torch.arange(q.shape[2])
    distances = (places[:, None] - places[None]).abs()
    slopes = torch.tensor([0.5, 0.25])[:, None, None]
    return merged(F.scaled_dot_product_attention(q, k, v, attn_mask=-slopes * distances))


def largest(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Only the eight largest scores of a query count."""
    scores = scores_of(q, k)
    least = scores.topk(8, dim=-1).values[..., -1:]
    return merged(scores.masked_fill(scores < least, float("-inf")).softmax(-1) @ v)


def pooled_key(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """The mean of the keys is one more of them."""
    k, v = (torch.cat([x, x.mean(2, keepdim=True)], 2) for x in (k, v))
    return merged(F.scaled_dot_product_attention(q, k, v))


class TalkingHeads(nn.Module):
    """Heads mix before and after the softmax (arXiv 2003.02436)."""

    def __init__(self) -> None:
        super().__init__()
        self.before, self.after = nn.Linear(HEADS, HEADS), nn.Linear(HEADS, HEADS)

    def forward(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """The heads stand last for the two maps."""
        scores = self.before(scores_of(q, k).permute(0, 2, 3, 1)).permute(0, 3, 1, 2)
        weights = self.after(scores.softmax(-1).permute(0, 2, 3, 1)).permute(0, 3, 1, 2)
        return merged(weights @ v)


class Buckets(nn.Module):
    """T5's bias: one number per head and distance, looked up."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(2 * TOKENS, HEADS)

    def forward(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """The bias is the attention's mask."""
        places = torch.arange(q.shape[2])
        bias = self.table(places[:, None] - places[None] + TOKENS).permute(2, 0, 1)
        return merged(F.scaled_dot_product_attention(q, k, v, attn_mask=bias[None]))


class MoreKeys(nn.Module):
    """Two learned keys and values for all samples, before those of the tokens."""

    def __init__(self) -> None:
        super().__init__()
        self.keys, self.values = (nn.Parameter(torch.zeros(1, HEADS, 2, HEAD)) for _ in range(2))

    def forward(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """Attend to both."""
        more = [(x.expand(q.shape[0], -1, -1, -1), own) for x, own in ((self.keys, k), (self.values, v))]
        return merged(F.scaled_dot_product_attention(q, *(torch.cat(pair, 2) for pair in more)))


class Latent(nn.Module):
    """Keys and values from one narrow value (DeepSeek-V2, arXiv 2405.04434)."""

    def __init__(self) -> None:
        super().__init__()
        self.q, self.down, self.up = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, 4), nn.Linear(4, 2 * WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        """Attend over all tokens of `[B, S, D]`."""
        parts = (self.q(x), *self.up(self.down(x)).chunk(2, -1))
        return fused(*(part.unflatten(-1, (HEADS, HEAD)).transpose(1, 2) for part in parts))


class Module(nn.Module):
    """Torch's own module."""

    def __init__(self) -> None:
        super().__init__()
        self.attn = nn.MultiheadAttention(WIDTH, HEADS, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        """Attend over all tokens of `[B, S, D]`."""
        out: Tensor = self.attn(x, x, x)[0]  # with weights: without, eager runs a kernel of its own
        return out


class Learned(nn.Module):
    """Three learned queries read the tokens, which read them."""

    def __init__(self) -> None:
        super().__init__()
        self.queries, self.qkv = nn.Parameter(torch.zeros(1, HEADS, 3, HEAD)), nn.Linear(WIDTH, 3 * WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        """Attend twice."""
        q, k, v = chunked(self.qkv(x))
        read = F.scaled_dot_product_attention(self.queries.expand(x.shape[0], -1, -1, -1), k, v)
        return fused(q, read, read)


class Gated(nn.Module):
    """The output of attention times a gate of the token."""

    def __init__(self) -> None:
        super().__init__()
        self.attn, self.gate = Styled(chunked, fused), nn.Linear(WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        """Attend and gate."""
        out: Tensor = self.attn(x) * self.gate(x).sigmoid()
        return out


class Mixer(nn.Module):
    """A linear map of the tokens (arXiv 2105.01601)."""

    def __init__(self) -> None:
        super().__init__()
        self.mix = nn.Linear(TOKENS, TOKENS)

    def forward(self, x: Tensor) -> Tensor:
        """Map along the tokens of `[B, S, D]`."""
        out: Tensor = self.mix(x.mT).mT
        return out


class Experts(nn.Module):
    """Three experts, all computed, of which two count for each token."""

    def __init__(self) -> None:
        super().__init__()
        self.router = nn.Linear(WIDTH, 3)
        self.experts = nn.ModuleList(nn.Linear(WIDTH, WIDTH) for _ in range(3))

    def forward(self, x: Tensor) -> Tensor:
        """Weights of the two largest, scattered to all three."""
        found = self.router(x).softmax(-1).topk(2, dim=-1)
        weights = torch.zeros_like(self.router(x)).scatter(-1, found.indices, found.values)
        out = torch.stack([expert(x) for expert in self.experts], -1) @ weights.unsqueeze(-1)
        return out.squeeze(-1)


class Convolved(nn.Module):
    """A convolution along the tokens, or of each alone."""

    def __init__(self, size: int, groups: int = 1) -> None:
        super().__init__()
        self.conv = nn.Conv1d(WIDTH, WIDTH, size, padding=size // 2, groups=groups)

    def forward(self, x: Tensor) -> Tensor:
        """Convolve `[B, S, D]`."""
        out: Tensor = self.conv(x.mT).mT
        return out


class OnGrid(nn.Module):
    """The same on a grid of 3 x 4."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(WIDTH, WIDTH, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        """Convolve `[B, S, D]`."""
        out: Tensor = self.conv(x.mT.unflatten(2, (3, 4))).flatten(2).mT
        return out


class Scaled(nn.Module):
    """A linear map whose weight is scaled by the mean over tokens."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Linear(WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        """`[B, S, D]` to the same."""
        return F.linear(x, self.inner.weight * (x.mean((0, 1)) + 1))


def in_chunks(x: Tensor) -> Tensor:
    """A feed-forward chunk by chunk of the tokens."""
    return torch.cat([F.gelu(part) for part in x.chunk(2, dim=1)], dim=1)


def beside_others(x: Tensor) -> Tensor:
    """Rows of others are joined to the tokens, which are then written in place, as rotary positions often are."""
    joined = torch.cat([x.new_ones(x.shape[0], 3, x.shape[2]), x], dim=1)
    joined[:, 3:] = joined[:, 3:] * 2
    joined = F.gelu(joined)
    return torch.tanh(torch.cat([joined[:, :3] * 0.5, joined[:, 3:]], dim=1))[:, 3:]


def with_blank(x: Tensor) -> Tensor:
    """Values of no parameter and no input: zeros, ones and sevens, made like another value."""
    return x + x.new_zeros(x.shape) + x.new_ones(x.shape[0], x.shape[1], 1) * x.new_full((1, x.shape[1], 1), 7.0)


ODD: dict[str, Odd] = {
    "gated": Odd(Gated),
    "latent keys": Odd(Latent),
    "torch's module": Odd(Module),
    "slopes": Odd(attending(by_distance)),
    "buckets": Odd(attending(Buckets())),
    "more keys": Odd(attending(MoreKeys())),
    "pooled key": Odd(attending(pooled_key), "mean.dim reduces over the token axis"),
    "causal": Odd(attending(causal), "causal attention"),
    "windows": Odd(attending(windows), "merges or splits the token axis"),
    "largest scores": Odd(attending(largest), "mixes tokens"),
    "linear attention": Odd(attending(linear_attention), "mixes tokens"),
    "relu attention": Odd(attending(relu_attention), "mixes tokens"),
    "over channels": Odd(attending(over_channels), "mixes tokens"),
    "one more in the sum": Odd(attending(one_more), "mixes tokens"),
    "sigmoid": Odd(attending(sigmoid), "mixes tokens"),
    "differential": Odd(attending(differential), "mixes tokens"),
    "talking heads": Odd(attending(TalkingHeads()), "mixes tokens"),
    "learned queries": Odd(Learned, "tokens"),
    "mixer": Odd(Mixer, "linear.default mixes", attends=False),
    "convolution": Odd(lambda: Convolved(3), "conv1d.default convolves over", attends=False),
    "convolution on a grid": Odd(OnGrid, "merges or splits", attends=False),
    "convolution of channels": Odd(lambda: Convolved(1), attends=False),
    "convolution of groups of channels": Odd(lambda: Convolved(1, WIDTH), attends=False),
    "experts": Odd(Experts, attends=False),
    "scaled weight": Odd(Scaled, "takes what is computed from all tokens", attends=False),
    "deviation": mapping(lambda x: (x - x.mean(-1, True)) / x.std(-1, keepdim=True)),
    "variance and mean": mapping(lambda x: (x - torch.var_mean(x, -1, keepdim=True)[1]) * 0.5),
    "groups of channels": mapping(lambda x: F.group_norm(x.flatten(0, 1), 2).unflatten(0, (BATCH, -1))),
    "made like another": mapping(with_blank),
    "beside others": mapping(beside_others),
    "unfolded channels": mapping(lambda x: x.unfold(-1, 4, 4).mean(-1).repeat_interleave(4, -1)),
    "largest channels": mapping(lambda x: x.topk(4, dim=-1).values.repeat(1, 1, 4)),
    "sorted channels": mapping(lambda x: x.sort(dim=-1).values),
    "channels added up": mapping(lambda x: torch.zeros_like(x).scatter_add(-1, (x > 0).long(), x)),
    "shift": refused(lambda x: x + x.roll(1, dims=1), "roll.default mixes"),
    "running sum": refused(lambda x: x.cumsum(1), "cumsum.default mixes"),
    "mean of all": refused(lambda x: x * x.mean(1, keepdim=True).sigmoid(), "takes what is computed from all tokens"),
    "response norm": refused(lambda x: x / (x.norm(dim=1, keepdim=True) + 1), "takes what is computed from all tokens"),
    "weights of a norm": refused(
        lambda x: F.layer_norm(x, x.shape[-1:], weight=x.mean((0, 1))), "takes what is computed from all tokens"
    ),
    "chunks": refused(in_chunks, "cat.default joins along"),
}
