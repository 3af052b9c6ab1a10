"""Attention is found in every writing, with its queries, keys and values; other products are not taken for it."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import fx

from tcc.passes.attention import Attention, find_attention
from tcc.passes.tokens import Axis
from tests.graphs import Sketch

aten = torch.ops.aten
B, H, Q, K, D = 2, 3, 5, 7, 4
Build = Callable[[Sketch, fx.Node, fx.Node, fx.Node], fx.Node]


def by_matmul(sketch: Sketch, q: fx.Node, k: fx.Node, v: fx.Node) -> fx.Node:
    """Scale, mask, softmax, cast."""
    scores = sketch.call(aten.matmul.default, q, sketch.call(aten.transpose.int, k, -1, -2))
    scores = sketch.call(aten.add.Tensor, sketch.call(aten.mul.Tensor, scores, 0.5), sketch.input("mask", B, 1, 1, K))
    weights = sketch.call(aten.softmax.int, scores, -1, torch.float64)
    return sketch.call(aten.matmul.default, sketch.call(aten._to_copy.default, weights, dtype=torch.float32), v)


def by_bmm(sketch: Sketch, q: fx.Node, k: fx.Node, v: fx.Node) -> fx.Node:
    """Batch and heads in one dimension."""
    q, k, v = (sketch.call(aten.view.default, x, [B * H, x.meta["val"].shape[2], D]) for x in (q, k, v))
    empty = sketch.call(aten.empty.memory_format, [B * H, Q, K])
    scores = sketch.call(aten.baddbmm.default, empty, q, sketch.call(aten.transpose.int, k, 1, 2), beta=0)
    return sketch.call(aten.bmm.default, sketch.call(aten._softmax.default, scores, 2, False), v)


def by_einsum(sketch: Sketch, q: fx.Node, k: fx.Node, v: fx.Node) -> fx.Node:
    """Labels."""
    scores = sketch.call(aten.einsum.default, "bhqd,bhkd->bhqk", [q, k])
    return sketch.call(aten.einsum.default, "bhqk,bhkd->bqhd", [sketch.call(aten.softmax.int, scores, 3), v])


def turned_round(sketch: Sketch, q: fx.Node, k: fx.Node, v: fx.Node) -> fx.Node:
    """Keys are rows and queries columns."""
    scores = sketch.call(aten.matmul.default, k, sketch.call(aten.transpose.int, q, -1, -2))
    weights = sketch.call(aten.softmax.int, scores, 2)
    return sketch.call(aten.matmul.default, sketch.call(aten.transpose.int, v, -1, -2), weights)


def by_torch(sketch: Sketch, q: fx.Node, k: fx.Node, v: fx.Node) -> fx.Node:
    """One operator."""
    return sketch.call(aten.scaled_dot_product_attention.default, q, k, v)


def found(build: Build) -> tuple[dict[fx.Node, Attention], list[fx.Node]]:
    """The attention in a graph, and its queries, keys and values."""
    sketch = Sketch()
    inputs = [sketch.input(name, B, H, size, D) for name, size in (("q", Q), ("k", K), ("v", K))]
    sketch.done(build(sketch, *inputs))
    return find_attention(sketch.graph), inputs


@pytest.mark.parametrize("build", [by_torch, by_matmul, by_einsum, turned_round])
def test_attention_is_found_however_it_is_written(build: Build) -> None:
    """Keys and values are found above the transpositions that the products need."""
    ((node, attention),), inputs = found(build)[0].items(), found(build)[1]
    assert [rows.node.name for rows in (attention.key, attention.value)] == [x.name for x in inputs[1:]]
    assert (attention.key.axis, attention.value.axis, attention.same_layout) == (Axis(2), Axis(2), True)
    assert attention.query.node.meta["val"].shape[attention.query.axis.dim] == Q
    assert node.meta["val"].shape[attention.written.axis.dim if attention.written else 2] == (
        K if attention.written else Q
    )


def test_samples_and_heads_may_share_a_dimension() -> None:
    """Keys and values are the lowest pair of one layout."""
    (attention,) = found(by_bmm)[0].values()
    assert attention.key.node.meta["val"].shape == (B * H, K, D)
    assert (attention.key.axis, attention.value.axis) == (Axis(1), Axis(1))


def linear_attention(sketch: Sketch, q: fx.Node, k: fx.Node, v: fx.Node) -> fx.Node:
    """The products meet in another order."""
    state = sketch.call(aten.matmul.default, sketch.call(aten.transpose.int, k, 2, 3), v)
    return sketch.call(aten.matmul.default, sketch.call(aten.softmax.int, q, -1), state)


def mixture(sketch: Sketch, q: fx.Node, k: fx.Node, v: fx.Node) -> fx.Node:
    """Weights over experts come from a linear."""
    weights = sketch.call(aten.softmax.int, sketch.call(aten.linear.default, q, sketch.weight("w", K, D)), -1)
    return sketch.call(aten.matmul.default, weights, v)


def two_scores(sketch: Sketch, q: fx.Node, k: fx.Node, v: fx.Node) -> fx.Node:
    """Two products make the scores: the keys are not one value."""
    turned = sketch.call(aten.transpose.int, k, -1, -2)
    scores = [sketch.call(aten.matmul.default, x, turned) for x in (q, sketch.call(aten.neg.default, q))]
    return sketch.call(aten.matmul.default, sketch.call(aten.softmax.int, sketch.call(aten.add.Tensor, *scores), -1), v)


def twice_read(sketch: Sketch, q: fx.Node, k: fx.Node, v: fx.Node) -> fx.Node:
    """One softmax weighs two values."""
    scores = sketch.call(aten.matmul.default, q, sketch.call(aten.transpose.int, k, -1, -2))
    weights = sketch.call(aten.softmax.int, scores, -1)
    return sketch.call(aten.add.Tensor, *(sketch.call(aten.matmul.default, weights, x) for x in (k, v)))


def over_queries(sketch: Sketch, q: fx.Node, k: fx.Node, v: fx.Node) -> fx.Node:
    """The softmax is not over what the second product sums."""
    scores = sketch.call(aten.matmul.default, q, sketch.call(aten.transpose.int, k, -1, -2))
    return sketch.call(aten.matmul.default, sketch.call(aten.softmax.int, scores, 2), v)


@pytest.mark.parametrize("build", [linear_attention, mixture, two_scores, twice_read, over_queries])
def test_other_products_are_no_attention(build: Build) -> None:
    """What is not product, softmax over the keys, product of one query, key and value is left alone."""
    assert not found(build)[0]
