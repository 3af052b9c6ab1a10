"""Scores of a dynamic token set: how the tokens of each sample are ranked, as data.

A plan names its scores (`CachePlan.scores`) and the tensors they read (`CachePlan.tables`); the compiler computes them
in the graph, `[B, S]`, and keeps the highest (`TopK`).
"""

from __future__ import annotations

from dataclasses import dataclass

from tcc.errors import PlanError

__all__ = ["Attended", "Fixed", "Norm", "Probe", "Score", "Stale", "Term"]


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

    The value is the stored one where the step updates or reuses the site, else the one that the step computes.

    Attributes:
        site: the site.
    """

    site: str


@dataclass(frozen=True)
class Attended:
    """How much each token is attended to (ToCa, Zou et al. 2024, s1).

    Column sums of the head-averaged softmax map, kept from the last step that computed the branch in full, divided by
    their L2 norm over the tokens.

    Attributes:
        branch: a branch with one self-attention, such as `blocks.0.attn`.
    """

    branch: str


@dataclass(frozen=True)
class Stale:
    """Steps since the token was last computed at a site (ToCa, s3); 0 after a step that computes the site in full.

    Attributes:
        site: the site, which the plan updates with the score's own token set.
    """

    site: str


@dataclass(frozen=True)
class Probe:
    """A small network on a stream: `gelu(layer_norm(x) @ hidden + offset) @ weight + bias`.

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


Term = Fixed | Norm | Attended | Stale | Probe


@dataclass(frozen=True)
class Score:
    """A weighted sum of terms, `[B, S]`, and how the highest are taken.

    Attributes:
        terms: `((weight, term), ...)`.
        cell: the side of the grid cells that `bonus` and `per_cell` speak of; 0 for none.
        bonus: in every cell, the highest token gets this share of its own score on top (ToCa, s4).
        per_cell: keep the same number of tokens in every cell (grid-based pruning, TokenCache v1).
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
        if (self.bonus or self.per_cell) and self.cell < 1:
            raise PlanError(f"Score(cell={self.cell}): a bonus or a count per cell needs a cell of side 1 or more")
