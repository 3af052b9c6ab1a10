"""Which tokens of a block are kept at a step: static sets from an array of ranks, or scores computed in the graph."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import numpy as np
import torch

from tcc.errors import PlanError
from tcc.info import ModelInfo
from tcc.learned import Probes
from tcc.passes.sites import Site
from tcc.plan import TopK
from tcc.plan.scores import Norm, Probe, Score, Stale, Term
from tcc.plans.tokens import best_per_cell, checkerboard, others_first, with_others

__all__ = ["Grain", "NormRanking", "ProbeRanking", "Ranking", "StaticRanking", "spread_evenly"]


@dataclass(frozen=True)
class Grain:
    """How finely tokens are told apart.

    Attributes:
        cell: the side of a grid cell, each of which keeps the same number of tokens; 0 where the grid does not matter.
        share: whether all pruned blocks keep the same tokens.
        rotate: what a token's rank loses each time it is kept.
    """

    cell: int
    share: bool
    rotate: float


class Ranking(Protocol):
    """Chooses the tokens of a block at a step, and collects what the plan needs for it."""

    tokens: dict[str, torch.Tensor]
    scores: dict[str, Score]
    tables: dict[str, torch.Tensor]

    def choose(self, step: int, block: int, among: Sequence[int], count: int) -> str | TopK:
        """The token set of `block` at `step`, where the blocks `among` are pruned; called in the order of the steps."""


@dataclass
class StaticRanking:
    """The highest of given numbers.

    Attributes:
        info: the model.
        grain: see `Grain`.
        ranks: `[steps, blocks, S]`, high is kept.
        turns: the first step of those that keep one set, for every step.
    """

    info: ModelInfo
    grain: Grain
    ranks: np.ndarray[Any, Any]
    turns: Sequence[int]
    tokens: dict[str, torch.Tensor] = field(default_factory=dict)
    scores: dict[str, Score] = field(default_factory=dict)
    tables: dict[str, torch.Tensor] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self._kept = np.zeros(self.ranks.shape[1:])

    def choose(self, step: int, block: int, among: Sequence[int], count: int) -> str:
        """The name of the set: one per step and block, or fewer where sets are shared.

        Raises:
            PlanError: all tokens rank alike, and do not take turns: the first ones would be kept again and again.
        """
        turn = self.turns[step]
        rows = list(among) if self.grain.share else [block]
        name = f"step{turn}" if self.grain.share else f"step{turn}.block{block}"
        if name not in self.tokens:
            steps = [s for s, first in enumerate(self.turns) if first == turn]
            rank = self.ranks[np.ix_(steps, rows)].mean(axis=(0, 1)) - self.grain.rotate * self._kept[rows].mean(axis=0)
            if not self.grain.rotate and np.ptp(rank[slice(*self.info.image_tokens)]) == 0:
                raise PlanError(
                    f"step {step}, block {block}: the importance ranks all tokens alike, so nothing says what to keep: "
                    "learn it for this step (tcc train predictor), or use scores='random' or 'uniform'"
                )
            kept = self._best(rank, count)
            for row in rows:
                self._kept[row, kept] += 1
            self.tokens[name] = kept
        return name

    def _best(self, rank: np.ndarray[Any, Any], count: int) -> torch.Tensor:
        start, stop = self.info.image_tokens
        if self.grain.cell:
            return best_per_cell(self.info, rank, count * self.grain.cell**2 // (stop - start), self.grain.cell)
        return with_others(self.info, start + np.argsort(-rank[start:stop], kind="stable")[:count])


@dataclass
class NormRanking:
    """The tokens that a block changed most when they were last computed: the norms of what is stored, per sample.

    Attributes:
        info: the model.
        grain: see `Grain`; `rotate` counts for every step that a token waits.
        sites: the sites of every block.
    """

    info: ModelInfo
    grain: Grain
    sites: dict[int, list[Site]]
    tokens: dict[str, torch.Tensor] = field(default_factory=dict)
    scores: dict[str, Score] = field(default_factory=dict)
    tables: dict[str, torch.Tensor] = field(default_factory=dict)

    def choose(self, step: int, block: int, among: Sequence[int], count: int) -> TopK:
        """A dynamic set."""
        rows = among if self.grain.share else [block]
        terms = tuple((1.0, Norm(site.name)) for row in rows for site in self.sites[row] if site.kind != "kv")
        name = f"norm{'+'.join(map(str, rows))}"
        return _choose(self, name, terms, self.sites[rows[0]], count)


@dataclass
class ProbeRanking:
    """What learned probes say of the stream that enters block 0, per sample.

    Attributes:
        info: the model.
        grain: see `Grain`; `rotate` counts for every step that a token waits.
        sites: the sites of every block.
        probes: the probes.
        stream: the name of the stream's site.
    """

    info: ModelInfo
    grain: Grain
    sites: dict[int, list[Site]]
    probes: Probes
    stream: str
    tokens: dict[str, torch.Tensor] = field(default_factory=dict)
    scores: dict[str, Score] = field(default_factory=dict)
    tables: dict[str, torch.Tensor] = field(default_factory=dict)

    def choose(self, step: int, block: int, among: Sequence[int], count: int) -> TopK:
        """A dynamic set; with a shared one, read-outs are averaged over the pruned blocks."""
        rows = list(among) if self.grain.share else [block]
        name = f"step{step}" if self.grain.share else f"step{step}.block{block}"
        self.tables |= {"hidden": self.probes.hidden, "offset": self.probes.offset}
        self.tables[f"weight.{name}"] = self.probes.weight[step, rows].mean(0)
        self.tables[f"bias.{name}"] = self.probes.bias[step, rows].mean(0)
        probe = Probe(self.stream, "hidden", "offset", f"weight.{name}", f"bias.{name}")
        return _choose(self, name, ((1.0, probe),), self.sites[rows[0]], count)


def _choose(
    ranking: NormRanking | ProbeRanking,
    name: str,
    terms: tuple[tuple[float, Term], ...],
    sites: Sequence[Site],
    count: int,
) -> TopK:
    """The best `count` image tokens, and all other tokens; a score per cell keeps those by itself."""
    grain, info = ranking.grain, ranking.info
    wait = ((grain.rotate, Stale(sites[-1].name)),) if grain.rotate else ()
    tables, always = ({}, ()) if grain.cell else others_first(info)
    ranking.tables |= tables
    ranking.scores[name] = Score((*terms, *wait, *always), cell=grain.cell, per_cell=grain.cell > 0)
    start, stop = info.image_tokens
    return TopK(name, count + info.num_tokens - (stop - start))


def spread_evenly(info: ModelInfo, cell: int) -> np.ndarray[Any, Any]:
    """Ranks `[S]` whose highest are spread over the tokens: over each cell, or over the sequence where `cell` is 0."""
    if cell:
        return checkerboard(info, cell) / cell**2
    golden = (np.sqrt(5.0) - 1) / 2  # by the three-gap theorem, gaps of a stretch of multiples have three lengths
    ranks: np.ndarray[Any, Any] = -(np.arange(info.num_tokens) * golden % 1.0)
    return ranks


def check_importance(scores: torch.Tensor, expected: tuple[int, int, int]) -> None:
    """Refuse importances of another shape than `[steps, blocks, tokens]`, or that are not finite.

    Raises:
        PlanError: the shape, or the first number that is not finite.
    """
    if tuple(scores.shape) != expected:
        raise PlanError(
            f"the importance is for {list(scores.shape)} steps, blocks and tokens; the plan has {list(expected)}: "
            "learn it for this model and number of steps (`tcc train predictor`)"
        )
    finite = torch.isfinite(scores)
    if not bool(finite.all()):
        step, block, token = (~finite).nonzero()[0].tolist()
        raise PlanError(
            f"the importance of step {step}, block {block}, token {token} is {float(scores[step, block, token])}: it "
            "must be finite"
        )
