"""The token plans that one set of options allows, and the one of them that reaches a budget: behind `tokencache`."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass
from typing import Literal, TypeVar

import numpy as np
import torch

from tcc.errors import PlanError
from tcc.info import ModelInfo
from tcc.learned import Importance, Probes, load_learned
from tcc.passes.sites import Site
from tcc.plan import Action, CachePlan, Compute, Reuse, Update
from tcc.plans.checks import check_i_steps, check_keep, check_known, check_number, check_seed, check_whole
from tcc.plans.forecast import even_steps
from tcc.plans.placement import Cycle, percentile_steps, step_means, tprr_steps
from tcc.plans.ranking import (
    Grain,
    NormRanking,
    ProbeRanking,
    Ranking,
    StaticRanking,
    check_importance,
    spread_evenly,
)
from tcc.plans.tokens import (
    Level,
    TokenAttention,
    choose_blocks,
    default_cell,
    keep_per_cell,
    pruned_sites,
    token_actions,
)

__all__ = ["Draft", "Options", "Ranks"]

Ranks = Literal["learned", "random", "uniform", "norm"]
Knob = TypeVar("Knob", float, int)


@dataclass(frozen=True)
class Options:
    """The options of `tokencache` that a budget does not solve for."""

    num_steps: int
    scores: str
    schedule: str
    k1: int
    k2: int
    boundary: float
    cycle: Cycle
    i_steps: int | Sequence[int] | None
    attention: TokenAttention
    level: Level
    last_full: int
    select: str
    cell: int | None
    adapt: str
    sets: str
    share: bool
    refresh: bool
    rotate: float
    seed: int

    def __post_init__(self) -> None:
        known = {
            "scores": ("learned", "random", "uniform", "norm"),
            "schedule": ("tprr", "percentile", "even"),
            "select": ("grid", "global"),
            "adapt": ("run", "step"),
            "sets": ("step", "cycle"),
        }
        for name, values in known.items():
            check_known(name, getattr(self, name), values)
        check_whole("num_steps", self.num_steps, 1)
        check_number("rotate", self.rotate, 0)
        if self.cell is not None:
            check_whole("cell", self.cell, 1)
        check_seed(self.seed)
        if self.i_steps is not None and not isinstance(self.i_steps, Iterable) and self.schedule == "tprr":
            raise PlanError(
                f"i_steps={self.i_steps}: schedule 'tprr' counts its I-steps by k1, k2 and boundary; use "
                "schedule='even' or 'percentile', or name the steps"
            )


class Draft:
    """What all plans of one call have in common, and the plan for a keep ratio and a number of pruned blocks."""

    def __init__(self, info: ModelInfo, options: Options, importance: object, blocks: Sequence[int] | None) -> None:
        learned = load_learned(importance) if isinstance(importance, (str, os.PathLike)) else importance
        self.info, self.options = info, options
        self.cell = (options.cell or default_cell(info)) if options.select == "grid" else 0  # 0: the grid is no matter
        self.sizes = (options.num_steps, len(info.blocks), info.num_tokens)
        self.image = range(*info.image_tokens)
        self.probes = learned if isinstance(learned, Probes) else None
        self.importance = self._read(learned)
        self.candidates = self._candidates(blocks)
        self.i_steps = self._place()
        self.p_steps = [step for step in range(options.num_steps) if step not in self.i_steps]
        self.turns = self._turns()

    def solve(self, budget: float | None, keep: float | None, pruned: int | None) -> CachePlan:
        """The plan that was asked for, or the most expensive one that reaches the budget."""
        if budget is None:
            return self.plan(0.5 if keep is None else keep, pruned)
        if keep is None:
            return _solve(self.keeps(), lambda knob: self.plan(knob, pruned), budget, "keep")
        if pruned is None:
            return _solve(range(1, len(self.candidates) + 1), lambda knob: self.plan(keep, knob), budget, "pruned")
        raise PlanError(
            f"budget={budget}: with both keep={keep} and pruned={pruned} given there is nothing to solve for"
        )

    def plan(self, keep: float, pruned: int | None) -> CachePlan:
        """The counted plan."""
        check_keep(keep)
        among = self._among(pruned)
        counts = self._counts(keep, among)
        chosen = {block for at in among.values() for block in at}
        sites = pruned_sites(self.info, sorted(chosen), self.options.level, self.options.attention)
        ranking = self._ranking(sites)
        rows: dict[tuple[int, int], Action] = {}
        for step, at in among.items():
            for block in at:
                count = counts[step, block]
                if 0 < count < len(self.image):
                    kept = ranking.choose(step, block, at, count)
                    rows[step, block] = Update(kept, store=self.options.refresh)
                else:
                    rows[step, block] = Compute() if count else Reuse()
        plan = CachePlan(
            num_steps=self.options.num_steps,
            actions=token_actions(
                sites, self.options.num_steps, self.options.attention, lambda *at: rows.get(at, Compute())
            ),
            tokens=ranking.tokens,
            scores=ranking.scores,
            tables=ranking.tables,
            policy=self._policy(keep, pruned, sorted(chosen)),
        )
        return self.info.count(plan)

    def keeps(self) -> list[float]:
        """All keep ratios that differ, from 1 down."""
        count = self.cell**2 or len(self.image)
        return [k / count for k in range(count, 0, -1)]

    def _read(self, learned: object) -> torch.Tensor | None:
        """The importances `[steps, blocks, S]`; the mean ones where they depend on the stream."""
        options = self.options
        needed = [
            name for name, at in (("scores", "learned"), ("schedule", "percentile")) if getattr(options, name) == at
        ]
        if learned is None and needed:
            raise PlanError(
                f"{needed[0]}='{getattr(options, needed[0])}' needs an importance: give importance=<file of `tcc train "
                "predictor`>, or use scores='random', 'uniform' or 'norm' with schedule='tprr' or 'even'"
            )
        if learned is None:
            return None
        if not isinstance(learned, (Importance, Probes)):
            raise PlanError(
                f"importance: a {type(learned).__name__.lower()} is none; make one with `tcc train predictor`"
            )
        tensors = [learned.scores] if isinstance(learned, Importance) else [learned.mean, learned.bias]
        for tensor in tensors:
            check_importance(tensor, self.sizes)
        width = self.info.analysis.stream_shape[-1]
        if isinstance(learned, Probes) and learned.hidden.shape[0] != width:
            raise PlanError(f"the probes see {learned.hidden.shape[0]} channels, the stream has {width}")
        return tensors[0].detach().double().cpu()

    def _candidates(self, blocks: Sequence[int] | None) -> list[int]:
        """The blocks that may be pruned; where none are named, those whose tokens can be."""
        total, options = len(self.info.blocks), self.options
        check_whole("last_full", options.last_full, 0, total - 1)
        allowed = [block for block in choose_blocks(self.info, blocks) if block < total - options.last_full]
        if blocks is not None and allowed:
            pruned_sites(self.info, allowed, options.level, options.attention)
            return allowed
        reasons = {block: self._refusal(block) for block in allowed}
        found = [block for block, reason in reasons.items() if not reason]
        if not found:
            reason = next(iter(reasons.values()), "`blocks` and `last_full` leave none")
            raise PlanError(f"no block can be pruned: {reason}")
        return found

    def _refusal(self, block: int) -> str:
        """Why the tokens of a block cannot be pruned; "" where they can."""
        try:
            pruned_sites(self.info, [block], self.options.level, self.options.attention)
        except PlanError as error:
            return str(error)
        return ""

    def _place(self) -> tuple[int, ...]:
        """The I-steps."""
        o = self.options
        by_phases = tprr_steps(o.num_steps, o.k1, o.k2, o.boundary, o.cycle)
        if isinstance(o.i_steps, Iterable):
            return check_i_steps("i_steps", o.i_steps, o.num_steps)
        count = len(by_phases) if o.i_steps is None else o.i_steps
        if o.schedule == "tprr":
            return by_phases
        if o.schedule == "even":
            return even_steps(o.num_steps, count)
        assert self.importance is not None
        return percentile_steps(step_means(self.importance[:, self.candidates]), count)

    def _among(self, pruned: int | None) -> dict[int, list[int]]:
        """The pruned blocks of every P-step: those of least mean importance."""
        total = len(self.candidates)
        if pruned is not None:
            check_whole("pruned", pruned, 1, total)
        if pruned is None or pruned == total:
            return dict.fromkeys(self.p_steps, self.candidates)
        if self.importance is None:
            raise PlanError(f"pruned={pruned} chooses blocks by importance: give one, or name the blocks in `blocks`")
        return {
            step: sorted(sorted(self.candidates, key=lambda block: (float(mean[block]), block))[:pruned])
            for step, mean in self._means().items()
        }

    def _means(self) -> dict[int, torch.Tensor]:
        """The mean importance of each block's image tokens `[blocks]`, at every P-step."""
        return {step: self._deciding(step).mean(1) for step in self.p_steps}

    def _deciding(self, step: int) -> torch.Tensor:
        """The importance of the image tokens `[blocks, N]` that decides at a P-step how many are kept, and where.

        Of all P-steps (`adapt="run"`), or of those that keep one set with it: of the step alone with `sets="step"`.
        """
        assert self.importance is not None
        steps = [s for s in self.p_steps if self.options.adapt == "run" or self.turns[s] == self.turns[step]]
        return self.importance[steps].mean(0)[:, self.image]

    def _counts(self, keep: float, among: dict[int, list[int]]) -> dict[tuple[int, int], int]:
        """How many image tokens each pruned block keeps at every P-step."""
        n, o = len(self.image), self.options
        each = keep_per_cell(keep, self.cell) * (n // self.cell**2) if self.cell else max(1, round(keep * n))
        if self.cell or o.share or self.importance is None:
            return {(step, block): each for step, at in among.items() for block in at}
        counts: dict[tuple[int, int], int] = {}
        for step, at in among.items():
            ranks = self._deciding(step)[at].flatten()
            chosen = ranks.argsort(descending=True, stable=True)[: round(keep * n * len(at))]
            found = torch.bincount(chosen // n, minlength=len(at)).tolist()
            counts |= {(step, block): count for block, count in zip(at, found, strict=True)}
        return counts

    def _ranking(self, sites: Sequence[Site]) -> Ranking:
        o, (steps, blocks, n) = self.options, self.sizes
        grain = Grain(self.cell, o.share, o.rotate)
        by_block = {site.block: [s for s in sites if s.block == site.block] for site in sites}
        dynamic = o.scores == "norm" or (o.scores == "learned" and self.probes is not None)
        if dynamic and o.sets == "cycle":
            raise PlanError("sets='cycle' keeps one static set; ranks from the graph are new at every step")
        if o.scores == "norm":
            return NormRanking(self.info, grain, by_block)
        if self.probes is not None and o.scores == "learned":
            first = next(s.name for s in self.info.sites.values() if s.kind == "stream" and s.block == 0)
            return ProbeRanking(self.info, grain, by_block, self.probes, first)
        if o.scores == "learned":
            assert self.importance is not None
            ranks = self.importance.numpy()
        elif o.scores == "random":
            ranks = np.random.default_rng(o.seed).random((steps, blocks, n))
        else:
            ranks = np.broadcast_to(spread_evenly(self.info, grain.cell), (steps, blocks, n))
        return StaticRanking(self.info, grain, ranks, self.turns)

    def _turns(self) -> list[int]:
        """For every step, the first of the P-steps that keep its tokens."""
        turns: list[int] = []
        for step in range(self.options.num_steps):
            same = self.options.sets == "cycle" and step in self.p_steps and step - 1 in self.p_steps
            turns.append(turns[-1] if same else step)
        return turns

    def _policy(self, keep: float, pruned: int | None, chosen: list[int]) -> dict[str, object]:
        options = asdict(self.options) | {"i_steps": list(self.i_steps), "keep": keep, "pruned": pruned}
        options["cell"] = self.cell or self.options.cell
        learned = "none" if self.importance is None else "importance" if self.probes is None else "probes"
        return {"name": "tokencache", "importance": learned, **options, "blocks": chosen}


def _solve(knobs: Sequence[Knob], make: Callable[[Knob], CachePlan], budget: float, name: str) -> CachePlan:
    """The first plan that reaches the bound, of plans whose bounds rise with the knob's place."""
    check_number("budget", budget, 1, what="a bound (uncached MACs / planned MACs)")
    best = make(knobs[-1])
    if best.bound < budget:
        raise PlanError(
            f"budget={budget}: the nearest bound within reach is {best.bound:.4g}, with {name}={knobs[-1]:g}: take "
            "fewer I-steps, keep fewer tokens, or prune more blocks"
        )
    low, high = -1, len(knobs) - 1  # the plan at `high` reaches it, that at `low` does not
    while high - low > 1:
        middle = (low + high) // 2
        plan = make(knobs[middle])
        low, high, best = (low, middle, plan) if plan.bound >= budget else (middle, high, best)
    return best
