"""The kind of every step of a plan: what decides its graph, apart from what its graph takes as inputs."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass, replace

from tcc.passes.choose_tokens import Choice, age_slot, map_slot
from tcc.passes.entries import Entry, Records
from tcc.passes.pipeline import Rewrites, StepKind
from tcc.passes.sites import Analysis
from tcc.plan import Action, CachePlan, Compute, Hold, Reuse, TopK, Update
from tcc.plan.checks import forecast_depth
from tcc.plan.scores import Entropy, Fixed, Mapped, Norm, Probe, Stale, Term, kv_of
from tcc.program.liveness import (
    Span,
    find_spans,
    is_subset,
    live_ages,
    live_maps,
    live_stores,
    sets_by_site,
    slot_names,
)

__all__ = ["StepTable", "find_step_kinds", "share_stores"]


@dataclass(frozen=True)
class StepTable:
    """The inputs of one step that are not in its kind: token sets, coefficients and tables, by their numbers."""

    tokens: tuple[str | TopK, ...]
    coefficients: tuple[tuple[float, ...], ...]
    tables: tuple[str, ...]


def find_step_kinds(plan: CachePlan, analysis: Analysis, rewrites: Rewrites) -> tuple[list[StepKind], list[StepTable]]:
    """What every step does, and what its graph takes as inputs.

    Args:
        plan: the plan.
        analysis: what is known about the graph.
        rewrites: which rewrites are made.
    """
    spans = find_spans(plan, analysis, merge=rewrites.merge_spans)
    stores = [live_stores(plan, span, analysis.num_tokens) for span in spans]
    depths = [forecast_depth(plan, span[0].name) for span in spans]
    narrowing = [sets_by_site(plan, span) for span in spans]
    terms = list(dict.fromkeys(term for score in plan.scores.values() for _, term in score.terms))
    maps = {term: live_maps(plan, term) for term in terms if isinstance(term, Mapped)}
    ages = {term.site: live_ages(plan, term.site) for term in terms if isinstance(term, Stale)}
    kinds, tables = [], []
    for step in range(plan.num_steps):
        entries, table = _entries(plan, spans, depths, [sets[step] for sets in narrowing], step)
        live = {
            name for entry, kept in zip(entries, stores, strict=True) for name in slot_names(entry.slots, kept[step])
        }
        live |= {map_slot(term) for term, steps in maps.items() if steps[step]}
        live |= {age_slot(site) for site, steps in ages.items() if steps[step]}
        sets = tuple(
            _choice(plan, analysis, step, tokens, table.tables)
            if isinstance(tokens, TopK)
            else plan.tokens[tokens].numel()
            for tokens in table.tokens
        )
        records = _records(plan, analysis, step, table, maps, ages)
        kinds.append(StepKind(entries, frozenset(live), sets, analysis.num_tokens, records, plan.slot_dtype, rewrites))
        tables.append(table)
    return _share_nesting(kinds, [_nested(plan, table.tokens) for table in tables]), tables


def _choice(plan: CachePlan, analysis: Analysis, step: int, tokens: TopK, tables: tuple[str, ...]) -> Choice:
    """A dynamic set, with everything that its graph depends on, and nothing else."""
    score = plan.score_of(tokens)
    names = dict.fromkeys(term.site for _, term in score.terms if isinstance(term, (Norm, Probe)))
    return Choice(
        score=replace(score, terms=tuple((weight, _numbered(term, tables)) for weight, term in score.terms)),
        count=tokens.count,
        tables=tuple((str(tables.index(name)), tuple(plan.tables[name].shape)) for name in score.tables),
        sites=tuple(analysis.sites[name] for name in names),
        stored=frozenset(name for name in names if isinstance(plan.action(step, name), (Update, Reuse, Hold))),
        batch=analysis.batch,
        num_tokens=analysis.num_tokens,
        grid=analysis.grid if score.cell else (),
        image=analysis.image_tokens if score.cell else (0, 0),
    )


def _numbered(term: Term, tables: tuple[str, ...]) -> Term:
    """`term` with the numbers of its tables for their names."""

    def number(name: str) -> str:
        return str(tables.index(name))

    if isinstance(term, Fixed):
        return Fixed(number(term.table))
    if isinstance(term, Probe):
        return Probe(term.site, number(term.hidden), number(term.offset), number(term.weight), number(term.bias))
    return term


def _records(
    plan: CachePlan,
    analysis: Analysis,
    step: int,
    table: StepTable,
    maps: dict[Mapped, list[bool]],
    ages: dict[str, list[bool]],
) -> Records:
    """What the step notes down for scores; a plan without any live one has none."""
    computed = [term for term in maps if any(maps[term]) and plan.computes(step, term.branch)]
    where = [analysis.cross[t.branch] if isinstance(t, Entropy) else analysis.sites[kv_of(t.branch)] for t in computed]
    aged: list[tuple[str, str | None]] = []
    for site in (site for site in ages if any(ages[site])):
        action = plan.action(step, site)
        number = str(table.tokens.index(action.tokens)) if isinstance(action, Update) and action.store else ""
        aged.append((site, None if isinstance(action, Compute) else number))
    shape = (analysis.batch, analysis.num_tokens)
    return Records(tuple(zip(computed, where, strict=True)), tuple(aged), shape)


def _nested(plan: CachePlan, names: Sequence[str | TopK]) -> frozenset[tuple[int, int]]:
    """Token sets that are within the one before, as where later blocks of a run keep fewer tokens."""
    return frozenset(
        (number + 1, number)
        for number, (outer, inner) in enumerate(itertools.pairwise(names))
        if is_subset(plan, inner, outer)
    )


def _share_nesting(kinds: list[StepKind], nested: list[frozenset[tuple[int, int]]]) -> list[StepKind]:
    """The kinds with the sets that are nested at all steps of one kind: chance at one step makes no variant."""
    common: dict[StepKind, frozenset[tuple[int, int]]] = {}
    keys = [replace(kind, live=frozenset()) for kind in kinds]
    for key, pairs in zip(keys, nested, strict=True):
        common[key] = common.get(key, pairs) & pairs
    return [replace(kind, nested=common[key]) for kind, key in zip(kinds, keys, strict=True)]


def share_stores(kinds: list[StepKind]) -> list[StepKind]:
    """One variant for steps that differ in nothing but stores: what is live at one of them is stored at all of them."""
    live: dict[StepKind, frozenset[str]] = {}
    for kind in kinds:
        key = replace(kind, live=frozenset())
        live[key] = live.get(key, frozenset()) | kind.live
    return [replace(kind, live=live[replace(kind, live=frozenset())]) for kind in kinds]


def _entries(
    plan: CachePlan, spans: list[Span], depths: list[int], narrowing: list[tuple[str, ...]], step: int
) -> tuple[tuple[Entry, ...], StepTable]:
    tokens: list[str | TopK] = []
    coefficients: list[tuple[float, ...]] = []
    entries = []
    for span, depth, sets in zip(spans, depths, narrowing, strict=True):
        action: Action = plan.action(step, span[-1].name)
        number = 0
        tokens += [name for name in dict.fromkeys(sets) if name not in tokens]
        if isinstance(action, Update):
            tokens += [action.tokens] if action.tokens not in tokens else []
            action = replace(action, tokens=str(tokens.index(action.tokens)))
        if isinstance(action, Reuse) and action.order:
            coefficients += [action.coefficients] if action.coefficients not in coefficients else []
            number = coefficients.index(action.coefficients)
            action = Reuse(action.order, (0.0,) * (action.order + 1))
        entries.append(Entry(span, action, depth, number, tuple(str(tokens.index(name)) for name in sets)))
    scores = [plan.score_of(dynamic) for dynamic in tokens if isinstance(dynamic, TopK)]
    tables = tuple(dict.fromkeys(name for score in scores for name in score.tables))
    return tuple(entries), StepTable(tuple(tokens), tuple(coefficients), tables)
