"""Scores of a dynamic token set: how the tokens of each sample are ranked, as data.

A plan names its scores (`CachePlan.scores`) and the tensors they read (`CachePlan.tables`); the compiler computes them
in the graph, `[B, S]` float32, and keeps the highest (`TopK`). Stored values, maps and ages are read as they stood when
the step began.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch

from tcc.errors import PlanError
from tcc.plan.numbers import number, whole
from tcc.plan.site_name import SiteName

__all__ = ["Attended", "Entropy", "Fixed", "Mapped", "Norm", "Probe", "Score", "Stale", "Term"]


@dataclass(frozen=True)
class Fixed:
    """A number per token from the plan: learned importance, random draws.

    Attributes:
        table: the name of a table of the plan, `[S]` or `[B, S]`.
    """

    table: str


@dataclass(frozen=True)
class Norm:
    """The L2 norm over the channels of a site's value (of V for a `kv` site), divided by its L2 norm over the tokens.

    The value is the stored one where the step updates, reuses or holds the site, else the one that the step computes.

    Attributes:
        site: the site.
    """

    site: str


@dataclass(frozen=True)
class Attended:
    """How much each token is attended to (ToCa, Zou et al. 2024, s1).

    Column sums of the head-averaged softmax map, kept from the last earlier step that computed the branch in full,
    divided by their L2 norm over the tokens.

    Attributes:
        branch: a branch with one self-attention, such as `blocks.0.attn`, on the main stream.
    """

    branch: str


@dataclass(frozen=True)
class Entropy:
    """How widely each token attends to the tokens of another kind, such as a prompt's (ToCa, s2).

    1 + the entropy of the token's row in the head-averaged softmax map, kept from the last earlier step that computed
    the branch in full, divided by its L2 norm over the tokens; as in ToCa's code for PixArt, where high ranks first.

    Attributes:
        branch: a branch with one cross-attention, such as `transformer_blocks.0.cross`, on the main stream.
        halves: average the maps of the two halves of the batch first, so that both guidance branches keep the same
            tokens (ToCa's code does).
    """

    branch: str
    halves: bool = False


@dataclass(frozen=True)
class Stale:
    """Steps since the token was last computed at a site (ToCa, s3).

    0 after a step that computes the site in full, and for the tokens that an update keeps and stores; else one more.

    Attributes:
        site: the site, which the plan updates with the score's own token set.
    """

    site: str


@dataclass(frozen=True)
class Probe:
    """A small network on a stream: `gelu(layer_norm(x) @ hidden + offset) @ weight + bias`, in float32.

    Attributes:
        site: a `stream` site, x `[B, S, D]`.
        hidden: the name of a table `[D, H]`.
        offset: the name of a table `[H]`.
        weight: the name of a table `[H]`.
        bias: the name of a table `[S]`.
    """

    site: str
    hidden: str
    offset: str
    weight: str
    bias: str


Term = Fixed | Norm | Attended | Entropy | Stale | Probe
#: Terms that read a map of attention, of the last earlier step that computed the branch in full.
Mapped = Attended | Entropy


@dataclass(frozen=True)
class Score:
    """A weighted sum of terms, `[B, S]`, and how the highest are taken.

    Attributes:
        terms: `((weight, term), ...)`.
        cell: the side of the grid cells (of one frame) that `bonus` and `per_cell` speak of; 0 for none.
        bonus: in every cell, the highest token gets this share of its own score on top (ToCa, s4).
        per_cell: keep the same number of tokens in every cell (grid-based pruning, TokenCache v1), and all tokens that
            are no image tokens; the count is of all of them together.
        shared: rank the tokens once for the whole batch, by the mean over the samples.
    """

    terms: tuple[tuple[float, Term], ...]
    cell: int = 0
    bonus: float = 0.0
    per_cell: bool = False
    shared: bool = False

    def __post_init__(self) -> None:
        if not self.terms:
            raise PlanError("a score needs at least one term")
        object.__setattr__(self, "terms", tuple(map(_weighted, self.terms)))
        object.__setattr__(self, "cell", whole("Score: cell", self.cell))
        object.__setattr__(self, "bonus", number("Score: bonus", self.bonus))
        if not math.isfinite(self.bonus):
            raise PlanError(f"Score(bonus={self.bonus}): the bonus must be finite")
        if (self.bonus or self.per_cell) and self.cell < 1:
            raise PlanError(f"Score(cell={self.cell}): a bonus or a count per cell needs a cell of side 1 or more")

    @property
    def tables(self) -> tuple[str, ...]:
        """The names of the tables that it reads, in the order of their first use."""
        return tuple(dict.fromkeys(name for _, term in self.terms for name, _ in table_ranks(term)))


def _weighted(pair: Any) -> tuple[float, Term]:
    """A weight and its term."""
    weight, term = pair if isinstance(pair, (tuple, list)) and len(pair) == 2 else (None, pair)
    if not isinstance(term, Term):
        raise PlanError(f"Score(terms=...): {term!r} is not a term: use Fixed, Norm, Attended, Entropy, Stale or Probe")
    found = number(f"Score(terms=...): the weight of {term}", weight)
    if not math.isfinite(found):
        raise PlanError(f"Score(terms=...): the weight of {term} must be finite, got {weight}")
    return found, term


def table_ranks(term: Term) -> tuple[tuple[str, tuple[int, ...]], ...]:
    """The tables that `term` reads, each with the numbers of dimensions that it may have."""
    if isinstance(term, Fixed):
        return ((term.table, (1, 2)),)
    if isinstance(term, Probe):
        return ((term.hidden, (2,)), (term.offset, (1,)), (term.weight, (1,)), (term.bias, (1,)))
    return ()


def kv_of(branch: str) -> str:
    """The site of the keys and values of `branch`."""
    return str(SiteName.of_branch(branch, "kv"))


def check_table(name: str, table: torch.Tensor) -> None:
    """Refuse a table that holds anything but finite floating-point numbers."""
    if not isinstance(table, torch.Tensor):
        raise PlanError(f"table '{name}': expected a floating-point tensor, got {type(table).__name__}")
    if not table.dtype.is_floating_point or table.dim() not in (1, 2) or table.numel() == 0:
        raise PlanError(
            f"table '{name}': expected a non-empty floating-point tensor of 1 or 2 dimensions, "
            f"got {table.dtype} {list(table.shape)}"
        )
    if not bool(torch.isfinite(table).all()):
        raise PlanError(f"table '{name}': the numbers must be finite")


def check_score(name: str, score: Score, tables: Mapping[str, torch.Tensor]) -> None:
    """Check what a score says by itself: its tables, and the form of the names in it.

    Raises:
        PlanError: names the score, the term and the remedy.
    """
    if not isinstance(score, Score):
        raise PlanError(f"score '{name}': {score!r} is not a Score")
    for _, term in score.terms:
        for table, ranks in table_ranks(term):
            if table not in tables:
                known = ", ".join(tables) or "none"
                raise PlanError(f"score '{name}', {term}: unknown table '{table}' (the plan has: {known})")
            if tables[table].dim() not in ranks:
                raise PlanError(
                    f"score '{name}', {term}: table '{table}' has shape {list(tables[table].shape)}, "
                    f"expected {' or '.join(map(str, ranks))} dimension(s)"
                )
        if isinstance(term, Probe):
            _check_probe(name, term, tables)


def _check_probe(name: str, term: Probe, tables: Mapping[str, torch.Tensor]) -> None:
    if SiteName.parse(term.site).kind != "stream":
        raise PlanError(f"score '{name}', {term}: a probe reads a site that ends in .stream, not '{term.site}'")
    width = tables[term.hidden].shape[1]
    for table in (term.offset, term.weight):
        if tables[table].shape[0] != width:
            raise PlanError(
                f"score '{name}', {term}: table '{table}' has shape {list(tables[table].shape)}, expected [{width}] "
                f"like the columns of '{term.hidden}'"
            )
