"""Check a plan's scores, and the dynamic token sets chosen by them, against the model."""

from __future__ import annotations

import math

from tcc.errors import PlanError
from tcc.passes.sites import Analysis, Site
from tcc.plan.actions import Action, Compute, Skip, TopK, Update
from tcc.plan.plan import CachePlan
from tcc.plan.scores import Entropy, Fixed, Mapped, Norm, Probe, Score, kv_of
from tcc.plan.site_name import SiteName

__all__ = ["check_scores"]


def check_scores(plan: CachePlan, analysis: Analysis) -> None:
    """Check every score and every dynamic token set of `plan` against the analysed graph.

    Raises:
        PlanError: names the score, the step and the site, and the remedy.
    """
    for name, score in plan.scores.items():
        for _, term in score.terms:
            where = f"score '{name}', {term}"
            if isinstance(term, Mapped):
                _check_map(where, term, analysis)
            elif not isinstance(term, Fixed) and term.site not in analysis.sites:
                raise PlanError(f"{where}: the model has no site '{term.site}' (tcc inspect lists them all)")
            if isinstance(term, (Fixed, Probe)):
                _check_tables(where, term, plan, analysis)
            if isinstance(term, (Norm, Probe)):
                _check_value(where, analysis.sites[term.site], plan, analysis)
        if score.cell:
            _check_cells(name, score, analysis)
    for step in range(plan.num_steps):
        uses: dict[TopK, list[tuple[Site, Update]]] = {}
        for site, action in plan.at(step).items():
            if isinstance(action, Update) and isinstance(action.tokens, TopK):
                uses.setdefault(action.tokens, []).append((analysis.sites[site], action))
        for tokens, found in uses.items():
            _check_set(step, tokens, found, plan, analysis)


def _check_map(where: str, term: Mapped, analysis: Analysis) -> None:
    if isinstance(term, Entropy):
        _check_cross(where, term, analysis)
        return
    keys = analysis.sites.get(kv_of(term.branch))
    if keys is None or keys.reason or (keys.batch is None and analysis.batch > 1):
        named = [SiteName.parse(s.name) for s in analysis.sites.values() if s.kind == "kv" and not s.stream]
        known = ", ".join(name.branch for name in named) or "none"
        reason = keys and (keys.reason or "the samples cannot be followed into its keys")
        raise PlanError(
            f"{where}: {reason or 'no branch with one self-attention of that name'} (such branches are: {known})"
        )


def _check_cross(where: str, term: Entropy, analysis: Analysis) -> None:
    found = analysis.cross.get(term.branch)
    if found is None or (found.batch is None and analysis.batch > 1):
        reason = (
            "the samples cannot be followed into its queries" if found else "no branch of that name attends to others"
        )
        raise PlanError(f"{where}: {reason} (branches with one cross-attention: {', '.join(analysis.cross) or 'none'})")
    if term.halves and analysis.batch % 2:
        raise PlanError(f"{where}: a batch of {analysis.batch} has no halves: use halves=False")


def _check_tables(where: str, term: Fixed | Probe, plan: CachePlan, analysis: Analysis) -> None:
    batch, tokens = analysis.batch, analysis.num_tokens
    if isinstance(term, Fixed):
        wanted = {term.table: [(tokens,), (batch, tokens)]}
    else:
        width = plan.tables[term.weight].shape[0]
        wanted = {term.hidden: [(analysis.stream_shape[-1], width)], term.bias: [(tokens,)]}
    for name, shapes in wanted.items():
        found = tuple(plan.tables[name].shape)
        if found not in shapes:
            expected = " or ".join(str(list(s)) for s in shapes)
            raise PlanError(f"{where}: table '{name}' has shape {list(found)}, this model needs {expected}")


def _check_value(where: str, site: Site, plan: CachePlan, analysis: Analysis) -> None:
    """The value that a score reads is one of tokens and samples, and not a part of what another site keeps."""
    known = site.axis.plain and site.axis.count(site.shape) == analysis.num_tokens and not site.stream
    if not known or (site.batch is None and analysis.batch > 1) or (site.kind == "kv" and site.reason):
        others = f"they are of the stream '{site.stream}'" if site.stream else ""
        reason = others or site.reason or "its samples cannot be followed"
        raise PlanError(f"{where}: the tokens of '{site.name}' cannot be told apart: {reason}")
    for name in plan.sites:
        if name != site.name and analysis.sites[name].overlaps(site):
            raise PlanError(
                f"{where}: '{site.name}' keeps a part of what '{name}' keeps, which the plan acts on: read '{name}'"
            )


def _check_cells(name: str, score: Score, analysis: Analysis) -> None:
    grid = analysis.grid
    if len(grid) not in (2, 3):
        raise PlanError(
            f"score '{name}': the model's token grid is {grid or 'unknown'} for {analysis.num_tokens} tokens: grid "
            "cells need an image grid; use Score(cell=0, bonus=0, per_cell=False): select='global' of tokencache, "
            "cell=0 of toca and duca"
        )
    if grid[-2] % score.cell or grid[-1] % score.cell:
        raise PlanError(f"score '{name}': cell={score.cell} must divide both sides of the {grid[-2]} x {grid[-1]} grid")


def _check_set(step: int, tokens: TopK, uses: list[tuple[Site, Update]], plan: CachePlan, analysis: Analysis) -> None:
    score = plan.score_of(tokens)
    where = f"step {step}, {tokens}"
    if tokens.count > analysis.num_tokens:
        raise PlanError(f"{where}: the stream has only {analysis.num_tokens} tokens")
    if score.per_cell:
        cells = math.prod(analysis.grid) // score.cell**2
        others = analysis.num_tokens - math.prod(analysis.grid)
        if tokens.count <= others or (tokens.count - others) % cells:
            beside = f"the {others} tokens that are no image tokens, and " if others else ""
            raise PlanError(
                f"{where}: score '{tokens.score}' keeps the same number in every cell: the count must be {beside}a "
                f"multiple of the {cells} cells"
            )
    if analysis.batch > 1 and not score.shared:
        for site, action in uses:
            if site.batch is None or (action.attention == "kept" and None in site.key_batch):
                raise PlanError(
                    f"{where}: the samples cannot be followed into the keys of '{site.name}', so that they cannot keep "
                    "tokens of their own: use Score(shared=True) or attention 'current'"
                )
    first = min(uses, key=lambda use: _first_use(use[0], use[1], analysis))
    for _, term in score.terms:
        if isinstance(term, (Norm, Probe)):
            _check_order(where, analysis.sites[term.site], plan.action(step, term.site), first, analysis)


def _check_order(where: str, read: Site, action: Action, first: tuple[Site, Update], analysis: Analysis) -> None:
    """What a score reads of the present step is computed before the tokens are first needed."""
    if isinstance(action, Skip):
        raise PlanError(f"{where}: the score reads '{read.name}', which the step skips")
    last = max(analysis.positions[name] for name in read.values)
    if read.kind == "block":
        last = analysis.positions[read.stream_out]
    if (isinstance(action, Compute)) and last >= _first_use(*first, analysis):
        raise PlanError(
            f"{where}: the score reads '{read.name}', which the step computes only after the tokens are needed at "
            f"'{first[0].name}': read a site that comes earlier, or one that the step updates or reuses"
        )


def _first_use(site: Site, action: Update, analysis: Analysis) -> int:
    """Where in the graph's order the tokens of an update are first needed."""
    names = [site.stream_out] if site.kind == "block" else [site.values[0]]
    if action.attention == "kept" and site.kind != "kv":
        names += site.attention
    return min(analysis.positions[name] for name in names)
