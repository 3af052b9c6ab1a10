"""PruneTokens moves gathers above everything that can be computed for the kept tokens alone."""

from __future__ import annotations

import operator

import pytest
import torch
from torch import fx

from tcc.passes.prune_tokens import PruneTokens
from tests.graphs import Sketch, calls, edits, text, values

aten = torch.ops.aten
KEPT, OTHER = [0, 2, 5], [1, 2, 4]
B, S, D = 2, 6, 4
#: A smaller product may be summed in another order by the BLAS: a few roundings of float32.
CLOSE = {"rtol": 2e-6, "atol": 2e-6}


def start(*extra: str) -> tuple[Sketch, list[fx.Node], fx.Node]:
    """A sketch with inputs `[B, S, D]` and one token set."""
    sketch = Sketch()
    inputs = [sketch.input(name, B, S, D) for name in ("x", *extra)]
    return sketch, inputs, sketch.tokens(3, S)[0]


def prune(gm: fx.GraphModule) -> int:
    """Run the pass; the outputs must stay equal."""
    inputs = values(gm, kept=[KEPT, OTHER])
    before = gm(*inputs)
    count = edits(gm, PruneTokens())
    for one, other in zip(gm(*inputs), before, strict=True):
        torch.testing.assert_close(one, other, **CLOSE)
    return count


def mlp(sketch: Sketch, x: fx.Node) -> fx.Node:
    """Norm, linear, activation."""
    normed = sketch.call(aten.layer_norm.default, x, [D])
    return sketch.call(aten.gelu.default, sketch.call(aten.linear.default, normed, sketch.weight("w", 8, D)))


def test_a_gather_moves_to_the_input() -> None:
    """Everything between is computed for three tokens instead of six."""
    sketch, (x,), kept = start()
    gm = sketch.done(sketch.gather(mlp(sketch, x), kept))
    assert prune(gm) == 1
    expected, (x,), kept = start()
    assert text(gm) == text(expected.done(mlp(expected, expected.gather(x, kept))))


def test_literal_shapes_and_tables_follow() -> None:
    """Views are re-sized, and a table with one row per token is gathered too."""
    sketch, (x,), kept = start()
    table = sketch.weight("table", S, D // 2)
    apart = sketch.call(aten.view.default, x, [B, S, 2, D // 2])
    turned = sketch.call(aten.mul.Tensor, sketch.call(aten.transpose.int, apart, 1, 2), table)
    gm = sketch.done(sketch.gather(turned, kept, 2))
    assert prune(gm) == 1
    assert calls(gm).count("gather_tokens") == 2
    assert "[2, 3, 2, 2]" in text(gm)


def test_it_stops_at_what_is_needed_whole() -> None:
    """A value that an output needs for all tokens is computed once, and gathered."""
    sketch, (x,), kept = start()
    y = mlp(sketch, x)
    gm = sketch.done(y, sketch.gather(sketch.call(aten.exp.default, y), kept))
    assert prune(gm) == 1
    assert calls(gm)[-2:] == ["gather_tokens", "aten.exp.default"]
    assert calls(gm).count("aten.linear.default") == 1


def test_it_stops_at_what_mixes_tokens() -> None:
    """Keys and values of all tokens, a convolution, a sum over tokens: above them everything stays whole."""
    sketch, (x,), kept = start()
    mixed = sketch.call(aten.cumsum.default, sketch.call(aten.exp.default, x), 1)
    gm = sketch.done(sketch.gather(sketch.call(aten.neg.default, mixed), kept))
    assert prune(gm) == 1
    assert calls(gm) == ["aten.exp.default", "aten.cumsum.default", "gather_tokens", "aten.neg.default"]


def test_only_queries_of_attention_are_pruned() -> None:
    """Attention `current`: the kept queries see the keys of all tokens."""
    sketch = Sketch()
    q, k, v = (sketch.input(name, B, 2, S, D) for name in "qkv")
    kept, _ = sketch.tokens(3, S)
    doubled = [sketch.call(aten.mul.Tensor, one, 2) for one in (q, k, v)]
    out = sketch.call(aten.scaled_dot_product_attention.default, *doubled)
    gm = sketch.done(sketch.gather(out, kept, 2))
    assert prune(gm) == 1
    shapes = [tuple(n.meta["val"].shape) for n in gm.graph.nodes if n.target is aten.mul.Tensor]
    assert sorted(shapes) == [(B, 2, 3, D), (B, 2, S, D), (B, 2, S, D)]


def test_a_gather_of_queries_moves_above_one_of_keys() -> None:
    """Attention written out, `kept`: both products run on the kept tokens alone, and so does what is above them."""
    sketch = Sketch()
    x, (kept, _) = sketch.input("x", B, S, D), sketch.tokens(3, S)
    y = mlp(sketch, x)
    scores = sketch.call(aten.matmul.default, y, sketch.call(aten.transpose.int, y, 1, 2))
    weights = sketch.call(aten.softmax.int, sketch.gather(scores, kept, 2), -1)
    gm = sketch.done(sketch.gather(sketch.call(aten.matmul.default, weights, sketch.gather(y, kept)), kept))
    assert prune(gm) == 4  # the gather of keys once more, below the one of queries
    assert calls(gm).count("gather_tokens") == 1
    assert {tuple(n.meta["val"].shape) for n in gm.graph.nodes if n.target is aten.linear.default} == {(B, 3, 8)}
    assert edits(gm, PruneTokens()) == 0


def test_constants_are_made_for_the_kept_tokens() -> None:
    """A literal shape is all that there is to narrow."""
    sketch, (x,), kept = start()
    ones = sketch.call(aten.ones.default, [B, S, D])
    gm = sketch.done(sketch.gather(sketch.call(aten.add.Tensor, x, ones), kept))
    assert prune(gm) == 1
    assert calls(gm).count("gather_tokens") == 1


@pytest.mark.parametrize("text", ["before", "after"])
@pytest.mark.parametrize("split", [False, True])
def test_rows_of_others_come_along(text: str, split: bool) -> None:
    """The text that attention over both computes is read from the value that has fewer image tokens."""
    sketch, first, last = Sketch(), *((2, 6) if text == "before" else (6, 2))
    x, kept = sketch.input("x", B, S + 2, D), sketch.tokens(3, S)[0]
    y = mlp(sketch, x)
    if split:
        parts = sketch.call(aten.split_with_sizes.default, y, [first, last], 1)
        one, other = (sketch.call(operator.getitem, parts, i) for i in range(2))
    else:
        one, other = sketch.call(aten.slice.Tensor, y, 1, 0, first), sketch.call(aten.slice.Tensor, y, 1, first, S + 2)
    words, image = (one, other) if text == "before" else (other, one)
    gm = sketch.done(sketch.call(aten.exp.default, words), sketch.gather(sketch.call(aten.neg.default, image), kept))
    assert prune(gm) == 2
    assert {tuple(n.meta["val"].shape) for n in gm.graph.nodes if n.target is aten.linear.default} == {(B, 5, 8)}
    assert edits(gm, PruneTokens()) == 0


def test_rows_of_others_stay_where_all_tokens_are_needed() -> None:
    """Both parts are read whole, and the image through a gather as well."""
    sketch = Sketch()
    x, kept = sketch.input("x", B, S + 2, D), sketch.tokens(3, S)[0]
    y = mlp(sketch, x)
    words, image = sketch.call(aten.slice.Tensor, y, 1, 0, 2), sketch.call(aten.slice.Tensor, y, 1, 2, S + 2)
    gm = sketch.done(words, image, sketch.gather(sketch.call(aten.neg.default, image), kept))
    prune(gm)
    assert {tuple(n.meta["val"].shape) for n in gm.graph.nodes if n.target is aten.linear.default} == {(B, S + 2, 8)}


def test_rows_take_the_place_of_a_scatter_of_the_same_set() -> None:
    """Between two blocks of one token set, nothing is gathered."""
    sketch = Sketch()
    base, rows, (kept, place) = sketch.input("base", B, S, D), sketch.input("rows", B, 3, D), sketch.tokens(3, S)
    stream = sketch.scatter(base, rows, kept, place)
    gm = sketch.done(sketch.gather(sketch.call(aten.exp.default, stream), kept))
    assert prune(gm) == 1
    assert calls(gm) == ["aten.exp.default"]


def test_a_scatter_of_another_set_is_gathered() -> None:
    """The kept tokens may be old or new there."""
    sketch = Sketch()
    base, rows = sketch.input("base", B, S, D), sketch.input("rows", B, 3, D)
    one, two = sketch.tokens(3, S, 0), sketch.tokens(3, S, 1)
    stream = sketch.scatter(base, rows, *one)
    gm = sketch.done(sketch.gather(sketch.call(aten.exp.default, stream), two[0]))
    assert prune(gm) == 1
    assert calls(gm) == ["scatter_tokens", "gather_tokens", "aten.exp.default"]


def test_one_value_is_pruned_once_for_all_its_readers() -> None:
    """Two gathers of one set share what is above them; another set has its own."""
    sketch, (x,), kept = start()
    other, _ = sketch.tokens(3, S, 1)
    y = mlp(sketch, x)
    gm = sketch.done(
        sketch.gather(sketch.call(aten.exp.default, y), kept),
        sketch.gather(sketch.call(aten.neg.default, y), kept),
        sketch.gather(y, other),
    )
    assert prune(gm) == 3
    assert calls(gm).count("aten.linear.default") == 2
    assert calls(gm).count("gather_tokens") == 2


def test_parts_of_a_split_are_pruned_with_it() -> None:
    """The gather moves through the parts to what was split."""
    sketch, (x,), kept = start()
    parts = sketch.call(aten.chunk.default, sketch.call(aten.exp.default, x), 2, -1)
    gate, up = (sketch.call(operator.getitem, parts, i) for i in range(2))
    gm = sketch.done(sketch.gather(sketch.call(aten.mul.Tensor, gate, up), kept))
    assert prune(gm) == 1
    assert calls(gm)[:2] == ["gather_tokens", "aten.exp.default"]


def test_parts_of_a_split_that_is_needed_whole_are_gathered() -> None:
    """A list of tensors cannot be gathered: its elements are."""
    sketch, (x,), kept = start()
    parts = sketch.call(aten.chunk.default, x, 2, -1)
    gate, up = (sketch.call(operator.getitem, parts, i) for i in range(2))
    product = sketch.gather(sketch.call(aten.mul.Tensor, gate, sketch.call(aten.exp.default, up)), kept)
    gm = sketch.done(product, gate, up)
    assert prune(gm) == 1
    assert calls(gm).count("gather_tokens") == 2


@pytest.mark.parametrize("whole", [False, True])
def test_tokens_that_share_a_dimension_with_the_batch(whole: bool) -> None:
    """`[B * S, D]`: the gather moves above the merging view, whoever else needs the product."""
    sketch, (x,), kept = start()
    flat = sketch.call(aten.view.default, sketch.call(aten.exp.default, x), [B * S, D])
    product = sketch.call(aten.linear.default, flat, sketch.weight("w", D, D))
    apart = sketch.call(aten.view.default, product, [B, S, D])
    gathered = sketch.gather(sketch.call(aten.neg.default, apart), kept)
    gm = sketch.done(gathered, product) if whole else sketch.done(gathered)
    assert prune(gm) == 1
    last = [tuple(n.meta["val"].shape) for n in gm.graph.nodes if n.target is aten.linear.default]
    assert last == ([(B * S, D)] if whole else [(B * 3, D)])


def test_tokens_that_share_a_dimension_where_the_gather_must_stop() -> None:
    """The dimension is split, gathered and merged again."""
    sketch, (x,), kept = start()
    flat = sketch.call(aten.layer_norm.default, sketch.call(aten.view.default, x, [B * S, D]), [D])
    product = sketch.call(aten.linear.default, flat, sketch.weight("w", D, D))
    gm = sketch.done(sketch.gather(sketch.call(aten.view.default, product, [B, S, D]), kept), flat)
    assert prune(gm) == 1
    assert calls(gm).count("gather_tokens") == 1
    assert [tuple(n.meta["val"].shape) for n in gm.graph.nodes if n.target is aten.linear.default] == [(B * 3, D)]
    assert edits(gm, PruneTokens()) == 0


def test_a_second_run_changes_nothing() -> None:
    """A gather that stands where it must is no edit."""
    sketch, (x,), kept = start()
    y = mlp(sketch, x)
    gm = sketch.done(y, sketch.gather(sketch.call(aten.exp.default, y), kept))
    assert prune(gm) == 1
    before = text(gm)
    assert edits(gm, PruneTokens()) == 0
    assert text(gm) == before


def test_a_graph_without_gathers_is_left_alone() -> None:
    """Nothing to move."""
    sketch, (x,), _ = start()
    gm = sketch.done(mlp(sketch, x))
    before = text(gm)
    assert edits(gm, PruneTokens()) == 0
    assert text(gm) == before


OWN = [KEPT, OTHER]


def own(*extra: str) -> tuple[Sketch, list[fx.Node], fx.Node]:
    """A sketch with inputs `[B, S, D]` and a token set for each sample."""
    sketch = Sketch()
    inputs = [sketch.input(name, B, S, D) for name in ("x", *extra)]
    return sketch, inputs, sketch.tokens(3, S, batch=B)[0]


def prune_own(gm: fx.GraphModule) -> int:
    """Run the pass; the outputs must stay equal, and a second run must find nothing to do."""
    inputs = values(gm, kept=[OWN])
    before = gm(*inputs)
    count = edits(gm, PruneTokens())
    for one, other in zip(gm(*inputs), before, strict=True):
        torch.testing.assert_close(one, other, **CLOSE)
    assert edits(gm, PruneTokens()) == 0
    return count


def test_a_gather_of_every_sample_moves_to_the_input() -> None:
    """By the same rules, asked for the tokens and for the samples."""
    sketch, (x,), kept = own()
    gm = sketch.done(sketch.gather(mlp(sketch, x), kept, 1, 0))
    assert prune_own(gm) == 1
    expected, (x,), kept = own()
    assert text(gm) == text(expected.done(mlp(expected, expected.gather(x, kept, 1, 0))))


@pytest.mark.parametrize("sizes", [(S, D), (1, S, D)])
def test_a_table_that_all_samples_share_is_gathered_for_each(sizes: tuple[int, ...]) -> None:
    """It is expanded, which copies nothing, and each sample takes its own rows of it."""
    sketch, (x,), kept = own()
    summed = sketch.call(aten.add.Tensor, x, sketch.weight("table", *sizes))
    turned = sketch.call(aten.mul.Tensor, summed, sketch.weight("scale", *sizes))
    gm = sketch.done(sketch.gather(mlp(sketch, turned), kept, 1, 0))
    assert prune_own(gm) == 1
    assert calls(gm).count("gather_tokens") == 3
    assert calls(gm).count("aten.expand.default") == 2


@pytest.mark.parametrize(
    ("equation", "tables", "dim"),
    [
        ("bsd,td->bst", [(S, D)], 2),
        ("bsd,sd->bs", [(S, D)], 1),
        ("...d,td->...t", [(S, D)], 2),
        ("bsd,sde,se->bse", [(S, D, 2), (S, 2)], 1),
    ],
)
def test_an_einsum_names_the_samples_of_a_table(equation: str, tables: list[tuple[int, ...]], dim: int) -> None:
    """A factor that all samples share gets the dimension of the samples, in the equation too."""
    sketch, (x,), kept = own()
    factors = [sketch.call(aten.exp.default, x), *(sketch.weight(f"w{i}", *t) for i, t in enumerate(tables))]
    product = sketch.call(aten.einsum.default, equation, factors)
    gm = sketch.done(sketch.gather(product, kept, dim, 0))
    assert prune_own(gm) == 1
    (node,) = [n for n in gm.graph.nodes if n.target is aten.einsum.default]
    assert node.meta["val"].shape[dim] == 3


@pytest.mark.parametrize("inner", [1, D])
def test_a_gather_stops_at_a_product_that_takes_no_samples(inner: int) -> None:
    """`mm` has no place for them, whatever the size of the dimension that it sums over."""
    sketch = Sketch()
    x, w = sketch.input("x", B, inner), sketch.weight("w", inner, S)
    kept = sketch.tokens(3, S, batch=B)[0]
    gm = sketch.done(sketch.gather(sketch.call(aten.mm.default, x, w), kept, 1, 0))
    assert prune_own(gm) == 0


def test_samples_that_share_the_tokens_dimension_are_followed() -> None:
    """`[B * S, D]` above and below: the products run on three rows of each sample."""
    sketch, (x,), kept = own()
    flat = sketch.call(aten.view.default, sketch.call(aten.exp.default, x), [B * S, D])
    product = sketch.call(aten.linear.default, flat, sketch.weight("w", D, D))
    gm = sketch.done(sketch.gather(sketch.call(aten.view.default, product, [B, S, D]), kept, 1, 0))
    assert prune_own(gm) == 1
    (linear,) = [n for n in gm.graph.nodes if n.target is aten.linear.default]
    assert linear.meta["val"].shape == (B * 3, D)


def test_a_gather_stops_where_flat_rows_are_needed_whole() -> None:
    """The stop gives tokens and samples dimensions of their own."""
    sketch, (x,), kept = own()
    flat = sketch.call(aten.view.default, x, [B * S, D])
    product = sketch.call(aten.linear.default, sketch.call(aten.exp.default, flat), sketch.weight("w", D, D))
    out = sketch.call(aten.view.default, product, [B, S, D])
    gm = sketch.done(sketch.gather(sketch.call(aten.neg.default, out), kept, 1, 0), product)
    prune_own(gm)
    (linear,) = [n for n in gm.graph.nodes if n.target is aten.linear.default]
    assert linear.meta["val"].shape == (B * S, D)


def test_a_gather_stops_where_samples_mix() -> None:
    """A mean over the batch: correct, and nothing is saved above it."""
    sketch, (x, y), kept = own("y")
    mixed = sketch.call(aten.cumsum.default, sketch.call(aten.exp.default, x), 0)
    gm = sketch.done(sketch.gather(sketch.call(aten.add.Tensor, mixed, y), kept, 1, 0))
    assert prune_own(gm) == 1
    (total,) = [n for n in gm.graph.nodes if n.target is aten.cumsum.default]
    assert total.meta["val"].shape == (B, S, D)


def test_positions_that_are_computed_late_come_before_what_they_gather() -> None:
    """A set that is chosen after the values it gathers: the pass keeps the order of computation."""
    sketch = Sketch()
    x, y, scores = (sketch.input(name, B, S, D) for name in ("x", "y", "scores"))
    early = mlp(sketch, sketch.call(aten.mul.Tensor, x, sketch.weight("table", S, D)))
    order = sketch.call(aten.sort.default, sketch.call(aten.sum.dim_IntList, scores, [2]))
    ranks = sketch.call(operator.getitem, order, 1)
    kept = sketch.call(aten.slice.Tensor, ranks, 1, 0, 3)
    gm = sketch.done(sketch.gather(early, kept, 1, 0), y)
    assert prune_own(gm) == 1
    gm.graph.lint()
    (linear,) = [n for n in gm.graph.nodes if n.target is aten.linear.default]
    assert linear.meta["val"].shape == (B, 3, 8)
