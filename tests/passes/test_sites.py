"""Sites: names, shapes, costs, and why tokens cannot be pruned, as literal tables for the three model classes."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn

import tcc
from tcc.passes.sites import Site
from tcc.passes.tokens import Axis
from tcc.plan.site_name import SiteName
from tests.styles import tokens_first, written_out
from tests.tiny_models import Attention, Block, LongSkip, Tokens, case, dit, fill, noise

HELD = "a stream is held as a whole: prune the sites that are added to it"

#: site of a block: kind, shape, token dimension, MACs per image
DIT_BLOCK = {
    "stream": ("stream", (2, 16, 32), 1, 0),
    "attn.kv": ("kv", (2, 2, 16, 16), 2, 49152),
    "attn.out": ("out", (2, 16, 32), 1, 81920),
    "attn.delta": ("delta", (2, 16, 32), 1, 81920),
    "mlp.out": ("out", (2, 16, 32), 1, 131072),
    "mlp.delta": ("delta", (2, 16, 32), 1, 131072),
    "delta": ("block", (2, 16, 32), 1, 212992),
}
HF_BLOCK = DIT_BLOCK | {"attn.kv": ("kv", (2, 2, 16, 16), 2, 32768)}
PIXART_BLOCK = {
    "stream": ("stream", (2, 16, 32), 1, 0),
    "attn.kv": ("kv", (2, 2, 16, 16), 2, 32768),
    "attn.out": ("out", (2, 16, 32), 1, 81920),
    "attn.delta": ("delta", (2, 16, 32), 1, 81920),
    "cross.out": ("out", (2, 16, 32), 1, 39936),
    "cross.delta": ("delta", (2, 16, 32), 1, 39936),
    "mlp.out": ("out", (2, 16, 32), 1, 131072),
    "mlp.delta": ("delta", (2, 16, 32), 1, 131072),
    "delta": ("block", (2, 16, 32), 1, 252928),
}


@pytest.mark.parametrize(
    ("name", "prefix", "block"),
    [
        ("dit", "blocks", DIT_BLOCK),
        ("hf_dit", "transformer_blocks", HF_BLOCK),
        ("hf_pixart", "transformer_blocks", PIXART_BLOCK),
    ],
)
def test_the_sites_of_the_three_model_classes(name: str, prefix: str, block: dict[str, tuple[object, ...]]) -> None:
    """All sites by name, in graph order, with shape, token dimension and cost; all prunable but the streams."""
    info = case(name).info
    expected = {f"{prefix}.{i}.{site}": row for i in range(2) for site, row in block.items()}
    expected["out.stream"] = block["stream"]
    found = {s.name: (s.kind, s.shape, s.axis.dim, s.macs // info.batch) for s in info.sites.values()}
    assert list(found) == list(expected)
    assert found == expected
    assert {s.reason for s in info.sites.values() if s.kind == "stream"} == {HELD}
    assert all(s.prunable and s.axis.plain for s in info.sites.values() if s.kind != "stream")


@pytest.mark.parametrize("name", ["dit", "hf_dit", "hf_pixart"])
def test_grid_and_token_axis(name: str) -> None:
    """Sixteen tokens on a 4 x 4 grid, along dimension 1 of the stream."""
    info = case(name).info
    assert (info.grid, info.num_tokens, info.batch) == ((4, 4), 16, 2)
    assert info.analysis.token_axis == Axis(1)
    assert info.analysis.stream_shape == (2, 16, 32)


def test_a_grid_that_is_not_square() -> None:
    """Rows before columns."""
    assert dit(input_size=(4, 12), depth=2).info.grid == (2, 6)


def test_tokens_without_an_image_have_no_grid() -> None:
    """Nothing in the graph splits the tokens."""
    assert case("separate").info.grid == ()


def test_bytes_are_those_of_the_slots() -> None:
    """K and V are two slots."""
    sites = case("dit").info.sites
    assert sites["blocks.0.delta"].bytes == 2 * 16 * 32 * 4
    assert sites["blocks.0.delta"].slots == ("blocks.0.delta",)
    assert sites["blocks.1.attn.kv"].bytes == 2 * (2 * 2 * 16 * 16 * 4)
    assert sites["blocks.1.attn.kv"].slots == ("blocks.1.attn.kv.k", "blocks.1.attn.kv.v")


def test_a_convolution_over_tokens_is_not_prunable() -> None:
    """The reason names the operator, and the user's line; the branch beside it stays prunable."""
    sites = case("conv").info.sites
    for name in ("mlp.out", "mlp.delta", "delta"):
        site = sites[f"blocks.0.{name}"]
        assert not site.prunable
        assert site.reason.startswith("aten.conv1d.default convolves over the token axis (File ")
        assert "tiny_models.py" in site.reason
        assert site.reason.endswith("in forward)")
    assert sites["blocks.0.attn.delta"].prunable
    assert sites["blocks.0.attn.kv"].prunable


class Shuffled(nn.Module):
    """A feed-forward branch that turns the tokens round."""

    def forward(self, x: Tensor) -> Tensor:
        """Reverse."""
        return x.flip(1)


class Strided(nn.Module):
    """Attention to every second token."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.inner = Attention(width)

    def forward(self, x: Tensor) -> Tensor:
        """Keys and values from even positions."""
        inner, even = self.inner, x[:, ::2]
        q, k, v = inner._heads(inner.q(x), 2), inner._heads(inner.k(even), 2), inner._heads(inner.v(even), 2)
        out = nn.functional.scaled_dot_product_attention(q, k, v)
        projected: Tensor = inner.proj(out.transpose(1, 2).reshape(x.shape))
        return projected


def variant(**parts: nn.Module) -> dict[str, Site]:
    """The sites of a two-block model whose blocks have other parts."""
    blocks: list[nn.Module] = []
    for _ in range(2):
        block = Block(16)
        for name, part in parts.items():
            setattr(block, name, part)
        blocks.append(block)
    return tcc.inspect(Tokens(blocks).eval(), noise(2, 12, 16)).sites


def test_keys_of_some_tokens_cannot_be_pruned() -> None:
    """The kept tokens' keys are not among them."""
    sites = variant(attn=Strided(16))
    assert "cuts the token axis" in sites["blocks.0.attn.delta"].reason
    assert "cuts the token axis" in sites["blocks.0.delta"].reason
    assert sites["blocks.0.mlp.delta"].prunable


def test_tokens_that_change_places_cannot_be_pruned() -> None:
    """A kept token's value comes from another token."""
    mix = nn.Sequential(nn.Linear(16, 16), Shuffled())
    assert "mixes the token axis" in variant(mlp=mix)["blocks.0.mlp.delta"].reason


def test_attention_that_is_written_out_is_attention() -> None:
    """It has keys and values, as torch's own has, and the softmax stands for it."""
    sites = written_out().info.sites
    assert sites["blocks.0.attn.delta"].prunable
    keys = sites["blocks.0.attn.kv"]
    assert (keys.prunable, keys.shape, keys.axis) == (True, (2, 2, 12, 8), Axis(2))
    assert keys.attention == ("softmax",)


class Mixer(nn.Module):
    """Tokens are mixed by a product with weights that other tokens give, without a softmax over keys."""

    def forward(self, x: Tensor) -> Tensor:
        """Linear attention: the keys and values of all tokens are summed into one state."""
        state = torch.relu(x).transpose(1, 2) @ x
        return torch.relu(x) @ state


def test_a_product_that_mixes_tokens_without_a_softmax_is_not_prunable() -> None:
    """Nobody could say which keys it sees; the reason says what is recognised, and where the product stands."""
    reason = variant(mlp=Mixer())["blocks.0.attn2.delta"].reason
    assert reason.startswith("aten.matmul.default ('matmul_1') mixes tokens; attention is recognised as product, soft")
    assert "test_sites.py" in reason


def test_tokens_may_come_first() -> None:
    """A stream `[S, B, D]`: the token axis is found by the queries, and the batch is the other dimension."""
    info = tokens_first().info
    assert (info.analysis.token_axis, info.num_tokens, info.batch) == (Axis(0), 12, 2)
    assert info.sites["block0.delta"].prunable
    assert info.macs == 12 * (2 * (4 * 256 + 4 * 256) + 256) + 2 * 2 * 12 * 12 * 16


def test_a_block_that_scales_the_stream_has_no_block_delta() -> None:
    """Its branches are sites, its change as a whole is not."""
    names = case("rescaled").info.sites
    assert "blocks.0.attn.delta" in names
    assert "blocks.0.delta" not in names


def test_overlapping_sites() -> None:
    """Two sites overlap where they keep parts of one branch: a plan can act on one of them."""
    sites = case("dit").info.sites
    block, out, delta, other = (sites[f"blocks.0.{n}"] for n in ("delta", "attn.out", "attn.delta", "mlp.delta"))
    assert block.overlaps(out)
    assert delta.overlaps(block)
    assert out.overlaps(delta)
    assert not delta.overlaps(other)
    assert not block.overlaps(sites["blocks.1.delta"])
    assert not block.overlaps(sites["blocks.0.stream"])
    assert not out.overlaps(sites["blocks.0.attn.kv"])
    assert not replace(out, block=1).overlaps(block)


def test_a_long_skip_is_a_site_of_the_block_that_takes_it() -> None:
    """One more site, a held one; the block's delta begins behind the linear map, its stream before it."""
    sites = case("uvit").info.sites
    names = ["stream", "skip", "attn.kv", "attn.out", "attn.delta", "mlp.out", "mlp.delta", "delta"]
    assert [name for name in sites if name.startswith("out_blocks.1.")] == [f"out_blocks.1.{name}" for name in names]
    skip, stream, delta = (sites[f"out_blocks.1.{name}"] for name in ("skip", "stream", "delta"))
    assert (skip.kind, skip.shape, skip.axis, skip.macs, skip.prunable) == ("skip", (2, 18, 16), Axis(1), 0, False)
    assert skip.reason == "a long skip is held as a whole: prune the sites that are added to the stream"
    assert skip.values == (sites["in_blocks.0.delta"].stream_out,)
    assert stream.values == (sites["out_blocks.0.delta"].stream_out,)
    assert delta.stream_in not in (*skip.values, *stream.values)
    assert not skip.overlaps(delta)
    assert not skip.overlaps(stream)


class TwoSkips(LongSkip):
    """Both earlier streams enter the last block."""

    def forward(self, x: Tensor) -> Tensor:
        """Join one by a linear map and add the other."""
        first = self.embed(x)
        early = self.blocks[0](first)
        joined = self.join(torch.cat([self.blocks[1](early), early], dim=-1))
        out: Tensor = self.head(self.blocks[2](joined + first))
        return out


def test_several_skips_of_a_block_are_numbered() -> None:
    """The second has a number, and its own reader."""
    sites = tcc.inspect(TwoSkips().eval(), noise(2, 12, 16)).sites
    one, two = sites["blocks.2.skip"], sites["blocks.2.skip2.skip"]
    assert [s.name for s in sites.values() if s.kind == "skip"] == [one.name, two.name]
    assert one.readers != two.readers
    assert two.values == sites["blocks.0.stream"].values


def test_who_else_reads_the_stream() -> None:
    """A long skip reads the stream between two blocks; nothing else does anywhere."""
    for name in ("dit", "hf_dit", "hf_pixart", "separate"):
        added = [s for s in case(name).info.sites.values() if s.stream_in]
        assert all(s.sole_reader for s in added)
    sites = case("long_skip").info.sites
    assert sites["blocks.0.delta"].sole_reader
    assert not sites["blocks.1.delta"].sole_reader
    assert not sites["blocks.1.attn.delta"].sole_reader
    assert sites["blocks.1.mlp.delta"].sole_reader
    parallel = case("parallel").info.sites
    assert parallel["blocks.0.delta"].sole_reader
    assert not parallel["blocks.0.attn.delta"].sole_reader


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_sites_have_the_dtype_of_their_values(dtype: torch.dtype) -> None:
    """A slot of bfloat16 takes half the bytes."""
    model = Tokens([Block(16), Block(16)]).eval().to(dtype)
    site = tcc.inspect(model, noise(2, 12, 16).to(dtype)).sites["blocks.0.delta"]
    assert (site.dtype, site.bytes) == (dtype, 2 * 12 * 16 * dtype.itemsize)


class JoinedOneByOne(nn.Module):
    """Blocks on image tokens, then on image and text tokens, which are joined sample by sample."""

    def __init__(self, width: int = 16) -> None:
        super().__init__()
        self.early, self.late = Tokens([Block(width), Block(width)], head=False), Tokens([Block(width), Block(width)])

    def forward(self, x: Tensor, text: Tensor) -> Tensor:
        """Map `[B, S, D]` and `[B, T, D]`."""
        rows = [torch.cat([image, words]) for image, words in zip(self.early(x), text, strict=True)]
        out: Tensor = self.late(nn.utils.rnn.pad_sequence(rows, batch_first=True))[:, : x.shape[1]]
        return out


def test_tokens_that_nobody_can_name_are_not_pruned() -> None:
    """Token sets name the rows that the output is made of; rows before an operator without a rule have no names."""
    torch.manual_seed(0)
    model, inputs = JoinedOneByOne().eval(), (noise(2, 6, 16), noise(2, 3, 16, seed=8))
    info = tcc.inspect(model, *inputs)
    sites = [s for s in info.sites.values() if s.kind != "stream"]
    late, early = ([s for s in sites if s.name.startswith(part)] for part in ("late", "early"))
    assert [{s.shape[s.axis.dim] for s in part} for part in (late, early)] == [{9}, {6}]
    assert {s.kind for s in late} == {s.kind for s in early} == {"out", "delta", "kv", "block"}
    assert (info.num_tokens, info.image_tokens) == (9, (0, 6))
    assert {s.reason for s in late} == {""}
    assert {s.reason for s in early} == {"its tokens are not in the order that they have in other blocks"}


class Nested(nn.Module):
    """A branch before an inner block of the branch's name."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.inner, self.attn = nn.LayerNorm(16), Attention(16), Block(16)

    def forward(self, x: Tensor) -> Tensor:
        """Map the stream."""
        out: Tensor = self.attn(x + self.inner(self.norm(x)))
        return out


class Named(nn.Module):
    """Blocks in attributes."""

    def __init__(self, **blocks: nn.Module) -> None:
        super().__init__()
        self.embed, self.head, self.names = nn.Linear(16, 16), nn.Linear(16, 16), tuple(blocks)
        for name, block in blocks.items():
            self.add_module(name, block)

    def forward(self, x: Tensor) -> Tensor:
        """Embed, transform, read off."""
        x = self.embed(x)
        for name in self.names:
            x = getattr(self, name)(x)
        out: Tensor = self.head(x)
        return out


def test_no_two_sites_have_one_name() -> None:
    """A block called `out`, one called like a branch of the block that it is in, and one with an `@` in its name."""
    info = tcc.inspect(
        fill(Named(down=Block(16), **{"a@b": Block(16)}, out=Block(16), last=Nested())), noise(2, 12, 16)
    )
    assert info.blocks == ("down", "a_b", "out.block2", "last", "last.attn.block4")
    streams = [name for name, site in info.sites.items() if site.kind == "stream"]
    assert streams == [*(f"{block}.stream" for block in info.blocks), "out.stream"]
    assert [SiteName.parse(name).owner for name in info.sites if name.endswith("attn.out")] == [
        f"{block}.attn" for block in info.blocks
    ]


class Apart(Named):
    """Part of the second block runs after the third."""

    def forward(self, x: Tensor) -> Tensor:
        """Embed, transform."""
        x = self.mid(self.out(self.down(self.embed(x))))
        out: Tensor = self.out.block1(x)
        return out


def test_a_module_that_is_called_like_a_numbered_block() -> None:
    """Is a block of its own."""
    blocks = [Block(16) for _ in range(3)]
    blocks[1].block1 = Block(16)
    info = tcc.inspect(fill(Apart(**dict(zip(("down", "out", "mid"), blocks, strict=True)))), noise(2, 12, 16))
    assert info.blocks == ("down", "out.block1_", "mid", "out.block1")
    assert [site.block for site in info.sites.values() if site.kind == "stream"] == [0, 1, 2, 3, 4]
