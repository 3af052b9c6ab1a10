"""Choosing tokens in the graph: ranks, ties, cells, and what scores read, by an independent computation."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, fx

from tcc.passes.attention import find_attention
from tcc.passes.choose_tokens import Choice, choose, older, read_map
from tcc.passes.tokens import Axis
from tcc.plan.scores import Attended, Entropy, Fixed, Score
from tests.graphs import Sketch, calls

aten = torch.ops.aten
B, S, D = 2, 16, 3


def chosen(score: Score, table: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """What the graph of a choice by one table returns: kept positions and places."""
    sketch = Sketch()
    choice = Choice(score, count, (("0", tuple(table.shape)),), (), frozenset(), B, S, (4, 4), (0, 16))
    node = sketch.input("table", *table.shape)
    end = sketch.call(torch.ops.aten.neg.default, node)
    kept, place = choose(sketch.graph, choice, lambda _: end, lambda _: node, end)
    gm = sketch.done(kept, place)
    assert not [name for name in calls(gm) if "sort" in name or "topk" in name or "nonzero" in name]
    found = gm(table)
    assert found[0].dtype == found[1].dtype == torch.int64
    return found[0], found[1]


def expected(scores: Tensor, count: int) -> list[int]:
    """Python's sort is stable: the first of equal scores comes first."""
    return sorted(sorted(range(len(scores)), key=lambda i: -float(scores[i]))[:count])


@pytest.mark.parametrize("count", [1, 5, 16])
@pytest.mark.parametrize("levels", [1, 3, 1000])
def test_the_highest_of_each_sample(count: int, levels: int) -> None:
    """With ties (few levels) and without; places are the inverse of positions."""
    table = torch.randint(levels, (B, S), generator=torch.Generator().manual_seed(levels)).float()
    kept, place = chosen(Score(((1.0, Fixed("0")),)), table, count)
    for row in range(B):
        assert kept[row].tolist() == expected(table[row], count)
        assert place[row].tolist() == [kept[row].tolist().index(i) if i in kept[row].tolist() else -1 for i in range(S)]


def test_one_set_for_the_batch() -> None:
    """By the mean; positions and places have no samples, as static ones."""
    table = torch.randn(B, S, generator=torch.Generator().manual_seed(1))
    kept, place = chosen(Score(((1.0, Fixed("0")),), shared=True), table, 6)
    assert kept.tolist() == expected(table.mean(0), 6)
    assert place.shape == (S,)


@pytest.mark.parametrize("levels", [2, 1000])
def test_cells(levels: int) -> None:
    """One of each 2 x 2 cell; then the best of each, made 9 times as high, before all others."""
    table = 1 + torch.randint(levels, (B, S), generator=torch.Generator().manual_seed(levels)).float()
    cells = torch.arange(S).view(2, 2, 2, 2).transpose(1, 2).reshape(4, 4)
    kept, _ = chosen(Score(((1.0, Fixed("0")),), cell=2, per_cell=True), table, 4)
    raised = table.clone()
    for row in range(B):
        best = [int(cell[expected(table[row, cell], 1)]) for cell in cells]
        assert kept[row].tolist() == sorted(best)
        raised[row, best] *= 9
    kept, _ = chosen(Score(((1.0, Fixed("0")),), cell=2, bonus=8.0), table, 6)
    assert [row.tolist() for row in kept] == [expected(row, 6) for row in raised]


def test_weights_add_up() -> None:
    """A table counted once and taken off twice ranks the other way round."""
    table = torch.randn(S, generator=torch.Generator().manual_seed(2))
    kept, _ = chosen(Score(((1.0, Fixed("0")), (-2.0, Fixed("0")))), table, 5)
    assert [row.tolist() for row in kept] == [expected(-table, 5)] * B


@pytest.mark.parametrize("flat", [False, True])
@pytest.mark.parametrize("mask", ["none", "bool", "float", "written out"])
def test_maps_are_column_sums_and_row_entropies_of_the_mean_softmax(mask: str, flat: bool) -> None:
    """By torch, head by head; samples and heads in two dimensions, or in one."""
    sketch, heads = Sketch(), 2
    sizes = (B * heads, S, D) if flat else (B, heads, S, D)
    q, k = sketch.input("q", *sizes), sketch.input("k", *sizes)
    given = (
        []
        if mask in ("none", "written out")
        else [sketch.input("mask", S, S, dtype=torch.bool if mask == "bool" else torch.float32)]
    )
    if mask == "written out":
        logits = sketch.call(aten.matmul.default, q, sketch.call(aten.transpose.int, k, -2, -1))
        weights = sketch.call(aten.softmax.int, sketch.call(aten.mul.Tensor, logits, D**-0.5), -1)
        sketch.call(aten.matmul.default, weights, k)
    else:
        sketch.call(aten.scaled_dot_product_attention.default, q, k, k, *given)
    (attention,) = find_attention(sketch.graph).values()
    samples, tokens = Axis(0, 1, heads) if flat else Axis(0), Axis(len(sizes) - 2)
    entropies = [Entropy("b.attn", halves) for halves in (False, True)] if attention.written is None else []
    rows = [read_map(attention, term, samples, tokens) for term in entropies]
    gm = sketch.done(read_map(attention, Attended("b.attn"), samples, Axis(1)), *rows)
    generator = torch.Generator().manual_seed(3)
    values = [torch.randn(sizes, generator=generator) for _ in range(2)]
    bias = torch.randn(S, S, generator=generator)
    passed = {"none": [], "written out": [], "bool": [bias > -1], "float": [bias]}[mask]
    expected = (values[0] @ values[1].transpose(-2, -1) / D**0.5).view(B, heads, S, S)
    if given:
        expected = expected.masked_fill(bias <= -1, -torch.inf) if mask == "bool" else expected + bias
    shares, found = expected.softmax(-1).mean(1), gm(*values, *passed)
    torch.testing.assert_close(found[0], shares.sum(1))
    for entropy, term in zip(found[1:], entropies, strict=True):
        each = shares.mean(0, keepdim=True).expand(B, -1, -1) if term.halves else shares
        by_torch = torch.distributions.Categorical(probs=each).entropy()
        torch.testing.assert_close(entropy, by_torch, rtol=1e-4, atol=1e-5)


def test_ages() -> None:
    """Kept tokens are new, of one set for all or of each sample's; a step that keeps none makes all older."""
    ages = torch.tensor([[0.0, 3.0, 1.0], [2.0, 0.0, 0.0]])
    for place, wanted in (
        (torch.tensor([-1, 0, -1]), [[1.0, 0.0, 2.0], [3.0, 0.0, 1.0]]),
        (torch.tensor([[0, -1, -1], [-1, -1, 0]]), [[0.0, 4.0, 2.0], [3.0, 1.0, 0.0]]),
        (None, [[1.0, 4.0, 2.0], [3.0, 1.0, 1.0]]),
    ):
        sketch = Sketch()
        inputs: list[fx.Node] = [sketch.input("ages", 2, 3)]
        inputs += [sketch.input("place", *place.shape, dtype=torch.int64)] if place is not None else []
        gm = sketch.done(older(sketch.graph, inputs[0], inputs[1] if place is not None else None))
        assert gm(*([ages] if place is None else [ages, place]))[0].tolist() == wanted
