"""SplitProjections gives queries a product of their own where keys are needed for more tokens."""

from __future__ import annotations

import operator
from collections.abc import Callable

import pytest
import torch
from torch import fx

from tcc.passes.split_projections import SplitProjections
from tests.graphs import Sketch, calls, edits, text, values
from tests.tiny_models import relative_error

aten = torch.ops.aten
KEPT = [0, 2, 5]
B, S, H, D = 2, 6, 2, 4

Parts = Callable[[Sketch, fx.Node], list[fx.Node]]


def items(sketch: Sketch, split: fx.Node) -> list[fx.Node]:
    """The three parts of a split."""
    return [sketch.call(operator.getitem, split, i) for i in range(3)]


def heads(sketch: Sketch, x: fx.Node) -> fx.Node:
    """`[B, S, H * D]` to `[B, H, S, D]`."""
    return sketch.call(aten.transpose.int, sketch.call(aten.view.default, x, [B, S, H, D]), 1, 2)


def unbound(sketch: Sketch, qkv: fx.Node) -> list[fx.Node]:
    """Timm's form: view, permute, unbind."""
    apart = sketch.call(aten.view.default, qkv, [B, S, 3, H, D])
    return items(sketch, sketch.call(aten.unbind.int, sketch.call(aten.permute.default, apart, [2, 0, 3, 1, 4])))


def unbound_without_permutation(sketch: Sketch, qkv: fx.Node) -> list[fx.Node]:
    """View, unbind along dimension 2, then every part on its own."""
    apart = sketch.call(aten.view.default, qkv, [B, S, 3, H, D])
    parts = items(sketch, sketch.call(aten.unbind.int, apart, 2))
    return [sketch.call(aten.transpose.int, part, 1, 2) for part in parts]


def chunked(sketch: Sketch, qkv: fx.Node) -> list[fx.Node]:
    """Three equal chunks of the channels."""
    return [heads(sketch, part) for part in items(sketch, sketch.call(aten.chunk.default, qkv, 3, -1))]


def split_with_sizes(sketch: Sketch, qkv: fx.Node) -> list[fx.Node]:
    """Channels by size."""
    sizes = [H * D] * 3
    split = sketch.call(aten.split_with_sizes.default, qkv, sizes, 2)
    return [heads(sketch, part) for part in items(sketch, split)]


def interleaved(sketch: Sketch, qkv: fx.Node) -> list[fx.Node]:
    """Heads outside, parts inside, `[B, S, H, 3, D]`: the rows of a part do not lie together in the weight."""
    apart = sketch.call(aten.view.default, qkv, [B, S, H, 3, D])
    parts = items(sketch, sketch.call(aten.unbind.int, apart, 3))
    return [sketch.call(aten.transpose.int, part, 1, 2) for part in parts]


def selected(sketch: Sketch, qkv: fx.Node) -> list[fx.Node]:
    """`qkv[0]`, `qkv[1]`, `qkv[-1]`."""
    apart = sketch.call(aten.view.default, qkv, [B, S, 3, H, D])
    front = sketch.call(aten.permute.default, apart, [2, 0, 3, 1, 4])
    return [sketch.call(aten.select.int, front, 0, i) for i in (0, 1, -1)]


def sliced(sketch: Sketch, qkv: fx.Node) -> list[fx.Node]:
    """`qkv[..., :D]` and so on."""
    ends = (H * D, 2 * H * D, 2**63 - 1)
    return [heads(sketch, sketch.call(aten.slice.Tensor, qkv, 2, i * H * D, end)) for i, end in enumerate(ends)]


def split_twice(sketch: Sketch, qkv: fx.Node) -> list[fx.Node]:
    """Queries beside keys and values together, which are then taken apart."""
    queries, both = (
        sketch.call(operator.getitem, sketch.call(aten.split_with_sizes.default, qkv, [H * D, 2 * H * D], -1), i)
        for i in range(2)
    )
    return [
        heads(sketch, queries),
        *(heads(sketch, sketch.call(aten.slice.Tensor, both, 2, i * H * D, (i + 1) * H * D)) for i in range(2)),
    ]


FORMS: dict[str, Parts] = {
    "interleaved": interleaved,
    "select": selected,
    "slice": sliced,
    "unbind": unbound,
    "unbind without permutation": unbound_without_permutation,
    "chunk": chunked,
    "split": split_with_sizes,
}


def attention(form: Parts, *, bias: bool = True, gathered: bool = True, keys: str = "whole") -> fx.GraphModule:
    """Fused projection, attention, and an output of which only the kept tokens are read."""
    sketch = Sketch()
    x, (kept, _) = sketch.input("x", B, S, H * D), sketch.tokens(3, S)
    weights = [sketch.weight("w", 3 * H * D, H * D), *([sketch.weight("b", 3 * H * D)] if bias else [])]
    q, k, v = form(sketch, sketch.call(aten.linear.default, x, *weights))
    if keys == "gathered":
        k, v = sketch.gather(k, kept, 2), sketch.gather(v, kept, 2)
    out = sketch.call(aten.scaled_dot_product_attention.default, q, k, v)
    return sketch.done(sketch.gather(out, kept, 2) if gathered else out)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("bias", [True, False])
def test_every_form_of_a_fused_projection_is_split(form: str, bias: bool) -> None:
    """Three products with their own rows of the weight, and the same outputs."""
    gm = attention(FORMS[form], bias=bias)
    inputs = values(gm, kept=[KEPT])
    before = gm(*inputs)[0]
    assert edits(gm, SplitProjections()) == 1
    assert calls(gm).count("aten.linear.default") == 3
    assert not {"aten.unbind.int", "aten.chunk.default", "aten.split_with_sizes.default"} & set(calls(gm))
    assert {node.meta["val"].shape[-1] for node in gm.graph.nodes if node.target is aten.linear.default} == {H * D}
    # the same rows of the same product: only the order inside a dot product may differ, by some roundings of 6e-8
    assert relative_error(gm(*inputs)[0], before) <= 2e-6


def test_keys_of_the_kept_tokens_need_no_split() -> None:
    """All parts are then pruned alike, and one product is cheaper than three."""
    gm = attention(unbound, keys="gathered")
    before = text(gm)
    assert edits(gm, SplitProjections()) == 0
    assert text(gm) == before


def test_attention_that_is_read_whole_is_left_alone() -> None:
    """Nothing is pruned, so nothing is saved."""
    assert edits(attention(unbound, gathered=False), SplitProjections()) == 0


def test_a_projection_with_another_reader_is_left_alone() -> None:
    """The product would have to be computed whole anyway."""
    other: list[fx.Node] = []

    def read_twice(sketch: Sketch, qkv: fx.Node) -> list[fx.Node]:
        other.append(sketch.call(aten.relu.default, qkv))
        parts = unbound(sketch, qkv)
        return [sketch.call(aten.add.Tensor, parts[0], sketch.call(aten.sum.default, other[0])), *parts[1:]]

    assert edits(attention(read_twice), SplitProjections()) == 0


def test_separate_projections_are_left_alone() -> None:
    """There is nothing to split, and a second run of the pass finds the same."""
    gm = attention(unbound)
    assert edits(gm, SplitProjections()) == 1
    assert edits(gm, SplitProjections()) == 0
