"""ToCa and DuCa: attention is reused between full steps, the MLP recomputed for the tokens that score highest."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal, TypeVar, get_args

import numpy as np
import torch

from tcc.errors import PlanError
from tcc.info import ModelInfo
from tcc.passes.sites import Site
from tcc.plan import Action, CachePlan, Compute, Hold, Reuse, TopK, Update
from tcc.plan.scores import Attended, Entropy, Norm, Score, Stale, Term
from tcc.plan.site_name import SiteName
from tcc.plans.branches import branch_sites
from tcc.plans.checks import check_number, check_seed, check_share, check_whole
from tcc.plans.options import plain_options
from tcc.plans.tokens import grid_cells, others_first, with_others

__all__ = ["duca", "toca", "toca_steps"]

Count = Literal["down", "up"]
Kind = Literal["full", "first", "partial", "aggressive"]
ScoreKind = Literal["attention", "entropy", "norm", "value", "random"]
Policy = TypeVar("Policy", bound=Callable[..., CachePlan])


def toca_steps(
    num_steps: int,
    interval: int,
    *,
    slope: float = 0.4,
    sensitive: bool = True,
    count: Count = "down",
    quirk: bool = True,
    aggressive: bool = False,
) -> tuple[Kind, ...]:
    """What every step does under ToCa's schedule (Zou et al., ICLR 2025, arXiv 2410.05317, section 3.4, and its code).

    Steps are counted down, i = num_steps - 1 - step, or up, i = step. A step is full where i is a multiple of the
    interval `N / (1 + w - 2 w i / num_steps)`, rounded, that the last full step has set: long ones first. It is 2 in
    the sensitive window, 0.2 <= i / num_steps < 0.4. The first step is always full.

    Args:
        num_steps: denoising steps.
        interval: N.
        slope: w: 0.4 for DiT; -0.2 for PixArt, which counts up.
        sensitive: whether there is a sensitive window: for DiT; not for PixArt.
        count: how steps are counted.
        quirk: as the published code does, set the interval after the first block of a full step already. Where the step
            is no multiple of the new interval, the other blocks take it for a partial one: `first`.
        aggressive: DuCa: partial steps at an even distance from the next multiple are `aggressive`.
    """
    kinds: list[Kind] = []
    current = interval
    for step in range(num_steps):
        i = step if count == "up" else num_steps - 1 - step
        first, offset = step == 0, i % current
        if first or offset == 0:
            window = sensitive and 0.2 * num_steps <= i < 0.4 * num_steps
            current = 2 if window else max(1, round(interval / (1 + slope - 2 * slope * i / num_steps)))
            kinds.append("first" if quirk and not first and i % current else "full")
        else:
            kinds.append("aggressive" if aggressive and offset % 2 == 0 else "partial")
    return tuple(kinds)


@dataclass(frozen=True)
class _Options:
    """The options of both policies; see `toca`."""

    interval: int
    ratio: float
    score: ScoreKind
    layer_slope: float
    step_slope: float
    mlp: float
    cross: float
    stale: float
    cell: int
    bonus: float
    quirk: bool
    levels: int | None
    seed: int
    halves: bool
    count: Count
    interval_slope: float
    sensitive: bool


@plain_options
def toca(
    info: ModelInfo,
    *,
    num_steps: int,
    interval: int = 3,
    ratio: float = 0.07,
    score: ScoreKind = "attention",
    layer_slope: float = -0.2,
    step_slope: float = 2.0,
    mlp: float = 2.5,
    cross: float = 0.6,
    stale: float = 0.25,
    cell: int = 2,
    bonus: float = 0.6,
    quirk: bool = True,
    levels: int | None = None,
    seed: int = 0,
    halves: bool = False,
    count: Count = "down",
    interval_slope: float = 0.4,
    sensitive: bool = True,
) -> CachePlan:
    """ToCa (Zou et al., ICLR 2025, arXiv 2410.05317): the MLP runs on tokens that matter, attention is reused.

    Between full steps (`toca_steps`), every block reuses its self-attention, and recomputes its MLP for the
    `floor(S ratio mlp layer step)` highest-scoring of S image tokens. Block l of L has
    `layer = 1 + w - 2 w l / (L - 1)`, the step i, counted down, `step = 1 + w - 2 w i / num_steps`, at least 0; no
    token means reuse. Tokens of other kinds are recomputed with them. The score is s1 or s2, plus
    `stale s3 / interval` (section 3.3), and the highest of each grid cell gets `bonus` times its score on top, s4. Here
    s3 also counts the steps on which no token of the branch is recomputed.

    The defaults are those for DiT with 50 DDIM steps; for 250 DDPM steps: interval=4, layer_slope=0.8, step_slope=0.4.
    For PixArt: score='entropy', halves=True, ratio=0.3, count='up', interval_slope=-0.2, sensitive=False,
    layer_slope=0.6, step_slope=0.9, mlp=1.6, cell=4, bonus=0.4.
    The number of tokens differs from step to step, and each number makes a variant: `levels` bounds them.

    Args:
        info: the model.
        num_steps: denoising steps.
        interval: N in the paper, see `toca_steps`.
        ratio: the share of tokens that is recomputed, before the factors.
        score: s1: `attention`, how much a token is attended to (full steps compute the map: one more product of queries
            and keys, 1.5 % more for DiT-XL/2, which the published FLOPs leave out); s2: `entropy`, how widely it
            attends to the prompt, high first as in the published code (which also takes the new maps of recomputed
            tokens; here they are of the last full step); `norm`, the norm of the token in the stream that enters the
            block; `value`, the norm of its attention value (DuCa); `random`, drawn when the plan is made, the same for
            every image: a static token set per block and step.
        layer_slope: w of the layer factor; above 0, front blocks recompute more.
        step_slope: w of the step factor; above 0, late steps recompute more.
        mlp: the factor of the MLPs, and of every branch that is no attention.
        cross: the factor of cross attention.
        stale: weight of s3, the steps since the token was recomputed.
        cell: the side of a grid cell of s4; 0 for a model without a grid.
        bonus: weight of s4.
        quirk: some full steps compute only the first block, see `toca_steps`; the published numbers are with it.
        levels: how many different step factors there may be, for fewer variants: partial steps of similar factor take
            their mean. None keeps the paper's.
        seed: seed of `random`.
        halves: of `entropy`: average the maps of both halves of a batch doubled for guidance, which then keep the same
            tokens; the published code does.
        count: whether the step i is counted `down` or `up`.
        interval_slope: w of the intervals, see `toca_steps`.
        sensitive: whether intervals are 2 in the sensitive window, see `toca_steps`.

    Raises:
        PlanError: an option is out of range, or the model has no token grid or a branch that cannot be pruned.
    """
    options = _Options(
        interval=interval, ratio=ratio, score=score, layer_slope=layer_slope, step_slope=step_slope, mlp=mlp,
        cross=cross, stale=stale, cell=cell, bonus=bonus, quirk=quirk, levels=levels, seed=seed, halves=halves,
        count=count, interval_slope=interval_slope, sensitive=sensitive,
    )  # fmt: skip
    return _Table("toca", info, num_steps, options, aggressive=False).plan()


def _with_arguments_of(documented: Policy) -> Callable[[Policy], Policy]:
    """Docstrings get the `Args:` and `Raises:` of a policy that takes the same options."""

    def add(policy: Policy) -> Policy:
        of = inspect.getdoc(documented) or ""  # python -OO leaves none
        policy.__doc__ = f"{(inspect.getdoc(policy) or '').rstrip()}\n\nArgs:{of.partition('Args:')[2]}\n"
        return policy

    return add


@plain_options
@_with_arguments_of(toca)
def duca(
    info: ModelInfo,
    *,
    num_steps: int,
    interval: int = 3,
    ratio: float = 0.05,
    score: ScoreKind = "attention",
    layer_slope: float = -0.2,
    step_slope: float = 2.0,
    mlp: float = 2.5,
    cross: float = 0.6,
    stale: float = 0.25,
    cell: int = 2,
    bonus: float = 0.8,
    quirk: bool = True,
    levels: int | None = None,
    seed: int = 0,
    halves: bool = False,
    count: Count = "down",
    interval_slope: float = 0.4,
    sensitive: bool = True,
) -> CachePlan:
    """DuCa (Zou et al. 2024, arXiv 2412.18911): ToCa's partial steps alternate with aggressive ones.

    An aggressive step holds the stream x after the last block, `x(t) = x(t + 1)`, and computes only what follows it.
    All options are those of `toca`; the published values of `ratio` and `bonus` are others. The revised paper finds
    `score='random'` no worse than the others.
    """
    options = _Options(
        interval=interval, ratio=ratio, score=score, layer_slope=layer_slope, step_slope=step_slope, mlp=mlp,
        cross=cross, stale=stale, cell=cell, bonus=bonus, quirk=quirk, levels=levels, seed=seed, halves=halves,
        count=count, interval_slope=interval_slope, sensitive=sensitive,
    )  # fmt: skip
    return _Table("duca", info, num_steps, options, aggressive=True).plan()


class _Table:
    """Makes the table step x site -> action, with the scores or token sets it names."""

    def __init__(self, name: str, info: ModelInfo, num_steps: int, options: _Options, *, aggressive: bool) -> None:
        check_whole("num_steps", num_steps, 1)
        _check(name, info, options)
        self.name, self.info, self.options = name, info, options
        self.kinds = toca_steps(
            num_steps, options.interval, slope=options.interval_slope, sensitive=options.sensitive,
            count=options.count, quirk=options.quirk, aggressive=aggressive,
        )  # fmt: skip
        self.factors = _step_factors(self.kinds, options)
        self.sites = [info.sites[site] for site in branch_sites(info, "out")]
        self.actions: dict[tuple[int, str], Action] = {}
        self.scores: dict[str, Score] = {}
        self.tokens: dict[str, torch.Tensor] = {}
        self.tables: dict[str, torch.Tensor] = {}
        start, stop = info.image_tokens
        self.num_image = stop - start
        self.ages = {site.name: np.zeros(info.num_tokens) for site in self.sites}

    def plan(self) -> CachePlan:
        """The plan, counted."""
        for step, kind in enumerate(self.kinds):
            for site in self.sites:
                if kind == "full" or (kind == "first" and site.block == 0):
                    self.actions[step, site.name] = Compute()
                    self.ages[site.name][:] = 0
                else:
                    action = Reuse() if kind == "aggressive" else self._partial(step, site)
                    self.actions[step, site.name] = action
                    self.ages[site.name] += isinstance(action, Reuse)
            if "aggressive" in self.kinds:
                self.actions[step, "out.stream"] = Hold() if kind == "aggressive" else Compute()
        self._keep_values()
        policy = {"name": self.name, **asdict(self.options)}
        plan = CachePlan(
            len(self.kinds), self.actions, self.tokens, policy=policy, scores=self.scores, tables=self.tables
        )
        return self.info.count(plan)

    def _partial(self, step: int, site: Site) -> Action:
        """Some tokens of the site, or none; token sets are not of other streams, whose branches are whole."""
        if site.stream:
            return Reuse() if site.attention else Compute()
        count = 0 if site.attention else self._count(step, site)
        if count == 0:
            return Reuse()
        if not site.prunable:
            raise PlanError(f"{self.name}: site '{site.name}' cannot be pruned: {site.reason}")
        if self.options.score == "random":
            return Update(self._draw(step, site, count))
        self.scores.setdefault(site.name, self._score(site))
        return Update(TopK(site.name, count + self.info.num_tokens - self.num_image))

    def _count(self, step: int, site: Site) -> int:
        """How many image tokens: all x ratio x factors of layer, step and module, rounded down."""
        w, depth = self.options.layer_slope, max(1, len(self.info.blocks) - 1)
        layer = 1 + w - 2 * w * site.block / depth
        branch = SiteName.parse(site.name).owner.rpartition(".")[2]
        module = self.options.cross if branch == "cross" else self.options.mlp
        share = min(1.0, self.options.ratio * layer * self.factors[step] * module)
        return max(0, int(share * self.num_image))

    def _score(self, site: Site) -> Score:
        options = self.options
        terms: list[tuple[float, Term]] = [(1.0, self._term(site))]
        if options.stale:
            terms.append((options.stale / options.interval, Stale(site.name)))
        tables, always = others_first(self.info)
        self.tables |= tables
        return Score((*terms, *always), cell=options.cell, bonus=options.bonus if options.cell else 0.0)

    def _term(self, site: Site) -> Term:
        """What ranks the tokens of a branch, s1 or s2."""
        if self.options.score == "entropy":
            return self._entropy(site)
        mates = [other for other in self.info.sites.values() if other.block == site.block and not other.stream]
        kind = {"attention": "kv", "value": "kv", "norm": "stream"}[self.options.score]
        found = next((other.name for other in mates if other.kind == kind), None)
        if found is None:
            raise PlanError(
                f"{self.name}(score='{self.options.score}'): block '{self.info.blocks[site.block]}' has no branch with "
                "one self-attention to read: use score='norm' or 'random'"
            )
        return Attended(SiteName.parse(found).branch) if self.options.score == "attention" else Norm(found)

    def _entropy(self, site: Site) -> Entropy:
        block = self.info.blocks[site.block]
        found = next((name for name in self.info.analysis.cross if name.startswith(f"{block}.")), None)
        if found is None:
            raise PlanError(
                f"{self.name}(score='entropy'): block '{block}' has no cross-attention to read: use another"
            )
        return Entropy(found, self.options.halves)

    def _keep_values(self) -> None:
        """`value` reads the values of the last full step, so they are kept, as attention is."""
        for score in list(self.scores.values()):
            read = [SiteName.parse(term.site) for _, term in score.terms if isinstance(term, Norm)]
            for site, attention in ((str(name), name.but("out")) for name in read if name.kind == "kv"):
                self.actions |= {(s, site): self.actions[s, attention] for s in range(len(self.kinds))}

    def _draw(self, step: int, site: Site, count: int) -> str:
        """The name of a random set, drawn with the terms s3 and s4 as a dynamic score has them."""
        options, ages = self.options, self.ages[site.name]
        draw = np.random.default_rng([options.seed, step, self.sites.index(site)]).random(ages.size)
        ranks = draw + options.stale / options.interval * ages
        if options.cell and options.bonus:
            cells = grid_cells(self.info, options.cell)
            best = np.take_along_axis(cells, ranks[cells].argmax(axis=1)[:, None], axis=1)[:, 0]
            ranks[best] *= 1 + options.bonus
        start, stop = self.info.image_tokens
        kept = with_others(self.info, start + np.argsort(-ranks[start:stop], kind="stable")[:count])
        ages += 1
        ages[kept.numpy()] = 0
        name = f"{site.name}:{step}"
        self.tokens[name] = kept
        return name


def _step_factors(kinds: Sequence[Kind], options: _Options) -> np.ndarray[Any, Any]:
    """The step factor of every step, at least 0; of partial ones at most `levels` different ones above 0."""
    i = np.arange(len(kinds))[:: 1 if options.count == "up" else -1]
    w = options.step_slope
    factors = np.maximum(0.0, 1 + w - 2 * w * i / len(kinds))
    if options.levels is not None:
        steps = np.array(
            [s for s, kind in enumerate(kinds) if kind in ("partial", "first") and factors[s] > 0], dtype=int
        )
        for group in np.array_split(steps[np.argsort(factors[steps], kind="stable")], options.levels):
            if group.size:
                factors[group] = factors[group].mean()
    return factors


def _check(name: str, info: ModelInfo, options: _Options) -> None:
    check_whole("interval", options.interval, 1)
    check_whole("cell", options.cell, 0)
    check_share("ratio", options.ratio)
    if options.levels is not None:
        check_whole("levels", options.levels, 1)
    check_seed(options.seed)
    for weight in ("mlp", "cross", "stale", "bonus"):
        check_number(weight, getattr(options, weight), 0)
    for slope in ("layer_slope", "step_slope", "interval_slope"):
        check_number(slope, getattr(options, slope))
    if options.score not in get_args(ScoreKind):
        raise PlanError(f"{name}(score={options.score!r}): use one of {', '.join(get_args(ScoreKind))}")
    if options.count not in get_args(Count):
        raise PlanError(f"{name}(count={options.count!r}): use 'down' or 'up'")
    if not -1 < options.interval_slope < 1:
        raise PlanError(f"{name}(interval_slope={options.interval_slope}): intervals are finite between -1 and 1")
    if options.cell and not info.grid:
        raise PlanError(f"{name}(cell={options.cell}): the model's token grid is unknown: use cell=0")
    if options.cell:
        grid_cells(info, options.cell)
