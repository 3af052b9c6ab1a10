"""Compute the scores of a dynamic token set in the graph, and take the highest.

No operator here sorts: a token's rank is the number of tokens that come before it. Such counts are pointwise work and
sums, which every backend fuses and every exporter has, and which break ties in one way everywhere.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

from tcc.passes.attention import Attention
from tcc.passes.gathers import apart
from tcc.passes.graph import emit, shape, value
from tcc.passes.sites import Site
from tcc.passes.token_axis import argument
from tcc.passes.tokens import Axis
from tcc.plan.scores import Attended, Entropy, Fixed, Mapped, Norm, Score, Stale, Term

__all__ = ["Choice", "age_slot", "choose", "map_slot", "older", "read_map"]

aten = torch.ops.aten
_TINY = 1e-12  # keeps a score of zeros from dividing by zero
_SMALL = 1e-7  # keeps the logarithm finite, as in ToCa's code


@dataclass(frozen=True)
class Choice:
    """A dynamic token set of one kind of step.

    Attributes:
        score: the score; its tables are named by the numbers of their inputs.
        count: how many tokens are taken.
        tables: the shape of every table, by number.
        sites: the sites whose value the score reads.
        stored: the names of those that are read from their slot.
        batch: the samples, B.
        num_tokens: the tokens, S.
        grid: the image grid, where the score speaks of cells.
        image: the positions of the image tokens, from and up to but not including, likewise.
    """

    score: Score
    count: int
    tables: tuple[tuple[str, tuple[int, ...]], ...]
    sites: tuple[Site, ...]
    stored: frozenset[str]
    batch: int
    num_tokens: int
    grid: tuple[int, ...] = ()
    image: tuple[int, int] = (0, 0)

    @property
    def record_slots(self) -> tuple[str, ...]:
        """The slots of maps and ages that the score reads."""
        terms = (term for _, term in self.score.terms)
        found = (
            age_slot(t.site) if isinstance(t, Stale) else map_slot(t) for t in terms if isinstance(t, (Mapped, Stale))
        )
        return tuple(dict.fromkeys(found))

    @property
    def own_sets(self) -> bool:
        """Whether every sample has a set of its own."""
        return self.batch > 1 and not self.score.shared


def map_slot(term: Mapped) -> str:
    """The slot that keeps what `term` reads of a branch's attention, `[B, S]`."""
    if isinstance(term, Attended):
        return f"{term.branch}.map"
    return f"{term.branch}.{'shared_entropy' if term.halves else 'entropy'}"


def age_slot(site: str) -> str:
    """The slot that keeps the steps since each token was computed at `site`, `[B, S]`."""
    return f"{site}.age"


@dataclass
class _Build:
    """Adds calls at the graph's insertion point."""

    graph: fx.Graph
    like: fx.Node

    def __call__(self, target: Any, *args: Any, **kwargs: Any) -> fx.Node:
        return emit(self.graph, target, args, kwargs, like=self.like)

    def per_token(self, x: fx.Node, axis: Axis, batch: Axis | None) -> fx.Node:
        """`x` as `[B, S, everything else]` in float32."""
        if batch is None:
            x, axis, batch = self(aten.unsqueeze.default, x, 0), axis.at(axis.dim + 1), Axis(0)
        sizes, (tokens, samples) = apart(shape(x), axis, batch)
        order = [samples, tokens, *(d for d in range(len(sizes)) if d not in (samples, tokens))]
        x = self(aten.permute.default, self(aten.reshape.default, x, sizes), order)
        if axis.others:
            x = self(aten.slice.Tensor, x, 1, axis.before, shape(x)[1] - axis.after)
        x = self(aten.reshape.default, x, [*shape(x)[:2], -1])
        return x if value(x).dtype == torch.float32 else self(aten._to_copy.default, x, dtype=torch.float32)

    def unit(self, x: fx.Node) -> fx.Node:
        """`[B, S]` divided by its L2 norm over the tokens."""
        return self(aten.div.Tensor, x, self(aten.clamp_min.default, self.norm(x, 1, True), _TINY))

    def norm(self, x: fx.Node, dim: int, keep: bool = False) -> fx.Node:
        return self(aten.sqrt.default, self(aten.sum.dim_IntList, self(aten.mul.Tensor, x, x), [dim], keep))


def choose(
    graph: fx.Graph,
    choice: Choice,
    read: Callable[[Site], fx.Node],
    given: Callable[[str], fx.Node],
    like: fx.Node,
) -> tuple[fx.Node, fx.Node]:
    """Add the choice at the graph's insertion point.

    Args:
        graph: the graph.
        choice: what to compute.
        read: the value of a site that the score reads.
        given: the input of a table (by number), of a map or of ages (by slot).
        like: a node whose module path and source line the new ones take over.

    Returns:
        The kept positions, sorted, and the place of every token (-1 for dropped ones): `[B, k]` and `[B, S]`, or `[k]`
        and `[S]` where all samples share one set.
    """
    build = _Build(graph, like)
    scores: fx.Node | None = None
    for weight, term in choice.score.terms:
        one = _term(build, term, choice, read, given)
        one = one if weight == 1 else build(aten.mul.Tensor, one, weight)
        scores = one if scores is None else build(aten.add.Tensor, scores, one)
    assert scores is not None
    full = [choice.batch, choice.num_tokens]
    scores = scores if list(shape(scores)) == full else build(aten.expand.default, scores, full)
    if choice.score.bonus:
        scores = _with_bonus(build, scores, choice)
    if not choice.own_sets:
        scores = build(aten.mean.dim, scores, [0], True)
    return _highest(build, scores, choice)


def _term(
    build: _Build, term: Term, choice: Choice, read: Callable[[Site], fx.Node], given: Callable[[str], fx.Node]
) -> fx.Node:
    """One term: `[B, S]`, or `[S]` where it is the same for all samples."""
    if isinstance(term, Fixed):
        return given(term.table)
    if isinstance(term, Stale):
        return given(age_slot(term.site))
    if isinstance(term, Attended):
        return build.unit(given(map_slot(term)))
    if isinstance(term, Entropy):
        return build.unit(build(aten.add.Tensor, given(map_slot(term)), 1.0))
    site = next(site for site in choice.sites if site.name == term.site)
    x = build.per_token(read(site), site.axis, site.batch)
    if isinstance(term, Norm):
        return build.unit(build.norm(x, 2))
    hidden, offset, weight, bias = (given(t) for t in (term.hidden, term.offset, term.weight, term.bias))
    x = build(aten.layer_norm.default, x, [shape(x)[-1]])
    x = build(aten.gelu.default, build(aten.add.Tensor, build(aten.matmul.default, x, hidden), offset))
    return build(aten.add.Tensor, build(aten.matmul.default, x, weight), bias)


def _in_cells(build: _Build, x: fx.Node, choice: Choice) -> fx.Node:
    """`[B, S]` -> `[B, cells, tokens of a cell]`, of the image tokens."""
    if choice.image != (0, choice.num_tokens):
        x = build(aten.slice.Tensor, x, 1, *choice.image)
    sizes, cell = _cell_sizes(choice, shape(x)[0])
    x = build(aten.permute.default, build(aten.reshape.default, x, sizes), [0, 1, 2, 4, 3, 5])
    return build(aten.reshape.default, x, [shape(x)[0], -1, cell * cell])


def _from_cells(build: _Build, x: fx.Node, others: fx.Node, choice: Choice) -> fx.Node:
    """The inverse of `_in_cells`; tokens that are no image tokens have their value in `others`, `[B, S]`."""
    (batch, frames, rows, _, columns, _), cell = _cell_sizes(choice, shape(x)[0])
    x = build(aten.reshape.default, x, [batch, frames, rows, columns, cell, cell])
    x = build(aten.reshape.default, build(aten.permute.default, x, [0, 1, 2, 4, 3, 5]), [batch, -1])
    start, stop = choice.image
    before = [build(aten.slice.Tensor, others, 1, 0, start)] if start else []
    after = [build(aten.slice.Tensor, others, 1, stop, choice.num_tokens)] if stop < choice.num_tokens else []
    return build(aten.cat.default, [*before, x, *after], 1) if before or after else x


def _cell_sizes(choice: Choice, batch: int) -> tuple[list[int], int]:
    cell, (height, width) = choice.score.cell, choice.grid[-2:]
    frames = (choice.image[1] - choice.image[0]) // (height * width)
    return [batch, frames, height // cell, cell, width // cell, cell], cell


def _with_bonus(build: _Build, scores: fx.Node, choice: Choice) -> fx.Node:
    """In every cell, the highest token (the first among equals) gets a share of its own score on top."""
    cells = _in_cells(build, scores, choice)
    best = build(aten.eq.Scalar, _ranks(build, cells), 0)
    more = build(aten.mul.Tensor, cells, 1 + choice.score.bonus)
    return _from_cells(build, build(aten.where.self, best, more, cells), scores, choice)


def _ranks(build: _Build, scores: fx.Node) -> fx.Node:
    """How many of the last dimension's scores come before each: higher ones, and equal ones that stand earlier."""
    count, device = shape(scores)[-1], value(scores).device
    mine, theirs = (build(aten.unsqueeze.default, scores, dim) for dim in (-1, -2))
    number = build(aten.arange.default, count, device=device)
    earlier = build(aten.lt.Tensor, build(aten.unsqueeze.default, number, 0), build(aten.unsqueeze.default, number, 1))
    equal = build(aten.logical_and.default, build(aten.eq.Tensor, theirs, mine), earlier)
    before = build(aten.logical_or.default, build(aten.gt.Tensor, theirs, mine), equal)
    return build(aten.sum.dim_IntList, before, [-1])


def _highest(build: _Build, scores: fx.Node, choice: Choice) -> tuple[fx.Node, fx.Node]:
    """Kept positions and places of the tokens with the highest scores."""
    if choice.score.per_cell:
        cells = _in_cells(build, scores, choice)
        others = choice.num_tokens - (choice.image[1] - choice.image[0])
        each = (choice.count - others) // shape(cells)[1]
        always = build(aten.full_like.default, scores, True, dtype=torch.bool)
        is_kept = _from_cells(build, build(aten.lt.Scalar, _ranks(build, cells), each), always, choice)
    else:
        is_kept = build(aten.lt.Scalar, _ranks(build, scores), choice.count)
    ones = build(aten._to_copy.default, is_kept, dtype=torch.float32)  # TensorRT has running sums of real numbers alone
    so_far = build(aten.cumsum.default, ones, 1)  # exact: far fewer than 2**24 tokens
    place = build(aten.sub.Tensor, build(aten.mul.Tensor, so_far, ones), 1)
    place = build(aten._to_copy.default, place, dtype=torch.int64)
    # the p-th kept token stands behind as many tokens as have fewer than p + 1 kept ones up to them
    number = build(aten.arange.default, choice.count, dtype=torch.float32, device=value(scores).device)
    number = build(aten.view.default, number, [1, choice.count, 1])
    behind = build(aten.le.Tensor, build(aten.unsqueeze.default, so_far, 1), number)
    kept = build(aten.sum.dim_IntList, behind, [2])
    if choice.own_sets:
        return kept, place
    return tuple(build(aten.squeeze.dim, node, 0) for node in (kept, place))  # type: ignore[return-value]


def read_map(attention: Attention, term: Mapped, batch: Axis | None, tokens: Axis) -> fx.Node:
    """Add what a term keeps of an attention's softmax map, `[B, S]`, after the attention.

    Args:
        attention: the attention.
        term: the term; it says what: the column sums, averaged over the heads, or the entropies of the rows.
        batch: where the samples lie in its keys (`Attended`) or queries (`Entropy`).
        tokens: where the tokens lie in them; there may be keys of others too, whose columns are left out.
    """
    build, node = _Build(attention.node.graph, attention.node), attention.node
    with node.graph.inserting_before(node.next):
        if isinstance(term, Entropy):
            found = _map(build, attention)
            return _entropies(build, build.per_token(found, tokens, batch), shape(found)[-1], term.halves)
        if attention.written is not None:
            columns = build.per_token(node, tokens.at(attention.written.axis.dim), batch)
            heads = shape(columns)[-1] // shape(attention.query.node)[attention.query.axis.dim]
            return build(aten.mul.Tensor, build(aten.sum.dim_IntList, columns, [2]), 1 / heads)
        sums = build(aten.sum.dim_IntList, _map(build, attention), [-2], True)
        return build(aten.mean.dim, build.per_token(sums, tokens.at(len(shape(sums)) - 1), batch), [2])


def _entropies(build: _Build, rows: fx.Node, count: int, halves: bool) -> fx.Node:
    """The entropies of the rows `[B, S, heads * count]` of a map, averaged over heads (and halves of the batch)."""
    samples, tokens, size = shape(rows)
    shares = build(aten.reshape.default, rows, [samples, tokens, size // count, count])
    shares = build(aten.mean.dim, shares, [2])
    if halves:
        pairs = build(aten.reshape.default, shares, [2, samples // 2, tokens, count])
        shares = build(aten.repeat.default, build(aten.mean.dim, pairs, [0]), [2, 1, 1])
    logs = build(aten.log.default, build(aten.add.Tensor, shares, _SMALL))
    return build(aten.neg.default, build(aten.sum.dim_IntList, build(aten.mul.Tensor, shares, logs), [-1]))


def _map(build: _Build, attention: Attention) -> fx.Node:
    """The softmax map of an attention, in float32, written out beside the fused attention, whose map cannot be had."""
    node, query, key = attention.node, attention.query.node, attention.key.node
    mask = argument(node, 3, "attn_mask")
    if len(shape(query)) > 3 and shape(query)[-3] != shape(key)[-3]:  # several query heads share one key head
        key = build(aten.repeat_interleave.self_int, key, shape(query)[-3] // shape(key)[-3], len(shape(key)) - 3)
    scale = node.kwargs.get("scale") or shape(query)[-1] ** -0.5
    logits = build(aten.matmul.default, query, build(aten.transpose.int, key, -2, -1))
    logits = build(aten.mul.Tensor, build(aten._to_copy.default, logits, dtype=torch.float32), scale)
    if isinstance(mask, fx.Node):
        logits = _masked(build, logits, mask)
    if argument(node, 5, "is_causal", False):
        ones = build(aten.full.default, list(shape(logits)[-2:]), True, dtype=torch.bool, device=value(logits).device)
        logits = _masked(build, logits, build(aten.tril.default, ones))
    return build(aten.softmax.int, logits, -1)


def _masked(build: _Build, logits: fx.Node, mask: fx.Node) -> fx.Node:
    if value(mask).dtype != torch.bool:
        return build(aten.add.Tensor, logits, mask)
    return build(aten.masked_fill.Scalar, logits, build(aten.logical_not.default, mask), float("-inf"))


def older(graph: fx.Graph, ages: fx.Node, place: fx.Node | None) -> fx.Node:
    """The ages after a step that keeps the tokens of `place`, `[S]` or `[B, S]`, or that keeps none."""
    build = _Build(graph, ages)
    more = build(aten.add.Tensor, ages, 1.0)
    if place is None:
        return more
    return build(aten.mul.Tensor, more, build(aten.lt.Scalar, place, 0))
