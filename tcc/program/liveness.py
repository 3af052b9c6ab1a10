"""Which stores of a plan are read later, token by token, and which sites can share one summed slot."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch

from tcc.passes.entries import history
from tcc.passes.sites import Analysis, Site
from tcc.plan import Action, CachePlan, Compute, Hold, Reuse, Skip, TopK, Update
from tcc.plan.checks import forecast_depth
from tcc.plan.scores import Mapped, Norm, Probe, Score, Stale, Term
from tcc.plan.site_name import SiteName

__all__ = ["find_spans", "is_subset", "live_stores", "sets_by_site"]

Span = tuple[Site, ...]


def find_spans(plan: CachePlan, analysis: Analysis, *, merge: bool = True) -> list[Span]:
    """Group the plan's sites so that neighbours on the stream which are always treated alike share one slot.

    The slot then keeps the sum of what they add to the stream (*merge runs*, *merge reused spans*). Two neighbours are
    merged where they have the same action at every step and nothing between them reads or replaces the stream of the
    dropped tokens: no attention `current`, no held stream, no key computed of more tokens than the span's, no long
    skip, no value that a score reads, no branch on another stream. Keys are no neighbours: they read the stream, and
    are not added to it. Without `merge`, every site has a slot of its own.

    Neighbours that update fewer and fewer tokens are treated alike too, see `_narrows`: the slot then keeps, of every
    token, what the sites add to it that do not update it.
    """
    spans: list[Span] = []
    latest: dict[str, int] = {}
    for site in (s for s in analysis.sites.values() if s.name in plan.sites):
        before = latest.get(site.stream)
        if merge and before is not None and _mergeable(plan, analysis, spans[before], site):
            spans[before] = (*spans[before], site)
        else:
            if site.kind != "kv":
                latest[site.stream] = len(spans)
            spans.append((site,))
    return _kv_last(spans)


def _kv_last(spans: list[Span]) -> list[Span]:
    return sorted(spans, key=lambda span: span[0].kind == "kv")


def _mergeable(plan: CachePlan, analysis: Analysis, span: Span, site: Site) -> bool:
    last = span[-1]
    if not (last.stream_out and last.stream_out == site.stream_in and site.sole_reader):
        return False
    column = [action for _, action in plan.column(site.name)]
    before = [action for _, action in plan.column(last.name)]
    if column != before and not _narrows(plan, before, column):
        return False
    if any(isinstance(a, Update) and a.attention == "current" for a in column):
        return False
    read = _read_by_scores(plan)
    between = [s for s in analysis.sites.values() if s.kind == "stream" and (s.name in plan.sites or s.name in read)]
    if any(s.values[0] == site.stream_in for s in between):
        return False
    blocks = {last.block, site.block}
    if any(s.block in blocks for s in analysis.sites.values() if s.name in read and s.kind != "stream"):
        return False
    if any(_seen_beside(plan, site, step, action) for step, action in enumerate(column)):
        return False
    return not _reads_more_inside(plan, analysis, (*span, site))


def _narrows(plan: CachePlan, outer: list[Action], inner: list[Action]) -> bool:
    """Whether both sites compute, or update tokens at the same steps, and one updates some of the other's.

    Between two steps that compute, each has one token set: nobody reads what it would store at an update.
    """
    pairs = list(zip(outer, inner, strict=True))
    if any(a != b and not (isinstance(a, Update) and isinstance(b, Update)) for a, b in pairs):
        return False
    updates = {(a, b) for a, b in pairs if isinstance(a, Update) and isinstance(b, Update)}
    return (
        all(isinstance(a, (Compute, Update)) for a in inner)
        and all(a.attention == b.attention and is_subset(plan, b.tokens, a.tokens) for a, b in updates)
        and all(_one_set_at_a_time(column) for column in (outer, inner))
    )


def is_subset(plan: CachePlan, inner: str | TopK, outer: str | TopK) -> bool:
    """Whether one token set is within another; of sets that are chosen in the graph nobody knows."""
    if isinstance(inner, TopK) or isinstance(outer, TopK):
        return False
    return bool(torch.isin(plan.tokens[inner], plan.tokens[outer]).all())


def _one_set_at_a_time(column: list[Action]) -> bool:
    """Whether the updates between two computed values are of one token set."""
    latest: Action = Compute()
    for action in column:
        if isinstance(action, Update) and isinstance(latest, Update) and action.tokens != latest.tokens:
            return False
        latest = action
    return True


def sets_by_site(plan: CachePlan, span: Span) -> list[tuple[str, ...]]:
    """For every step the token set of each site of a span, where they differ, else nothing.

    At a step that computes, those of the next updates; after the last of them, theirs: such steps are of one kind.
    """
    columns = [[a.tokens if isinstance(a, Update) else "" for _, a in plan.column(site.name)] for site in span]
    rows = [tuple(map(str, row)) for row in zip(*columns, strict=True)]
    updates = [row for row in rows if all(row)]
    if all(len(set(row)) == 1 for row in rows):
        return [()] * plan.num_steps
    found, latest = [], updates[-1]
    for row in reversed(rows):
        latest = row if all(row) else latest
        found.append(latest)
    return found[::-1]


def _seen_beside(plan: CachePlan, site: Site, step: int, action: Action) -> bool:
    """Whether a branch on another stream reads the stream that `site` is added to, where a merged span has none.

    An update has the kept tokens of it; those are all that others see through attention `kept`.
    """
    if isinstance(action, Compute) or (isinstance(action, Update) and site.guarded):
        return False
    return any(not _stands_in(plan, branch, step) for branch in site.beside)


def _stands_in(plan: CachePlan, branch: str, step: int) -> bool:
    """Whether nothing of `branch` is computed at `step`: a stored value, or zero, stands in for its output."""
    names = [(site, SiteName.parse(site)) for site in plan.sites]
    kept = [site for site, name in names if name.keeps_part_of(branch) and name.kind != "kv"]
    return any(isinstance(plan.action(step, site), (Reuse, Skip)) for site in kept)


def _reads_more_inside(plan: CachePlan, analysis: Analysis, span: Span) -> bool:
    """Whether some key of the span is computed, at some step, of tokens that its block does not compute there."""
    firsts = {site.block: site.name for site in reversed(span)}  # of a block's sites, the one with the most tokens
    keys = [s for s in analysis.sites.values() if s.kind == "kv" and s.block in firsts and s.name in plan.sites]
    return any(
        not isinstance(action, Compute) and not _within(plan.action(step, key.name), action)
        for key in keys
        for step, action in plan.column(firsts[key.block])
    )


def _within(keys: Action, action: Action) -> bool:
    """Whether keys are computed of no tokens but those that a span with `action` computes."""
    if isinstance(keys, Update):
        return isinstance(action, Update) and keys.tokens == action.tokens
    return not isinstance(keys, Compute)


def _read_by_scores(plan: CachePlan) -> set[str]:
    """The sites whose value a score of the plan reads."""
    return {term.site for score in plan.scores.values() for _, term in score.terms if isinstance(term, (Norm, Probe))}


def _scores_at(plan: CachePlan, step: int) -> list[Score]:
    """The scores that choose tokens at `step`."""
    tokens = (action.tokens for action in plan.at(step).values() if isinstance(action, Update))
    return [plan.score_of(dynamic) for dynamic in dict.fromkeys(tokens) if isinstance(dynamic, TopK)]


def live_maps(plan: CachePlan, term: Mapped) -> list[bool]:
    """For every step, whether a later step reads what `term` says of a branch's attention as the step leaves it."""
    return _live(plan, lambda read: read == term, lambda step: plan.computes(step, term.branch))


def live_ages(plan: CachePlan, site: str) -> list[bool]:
    """For every step, whether a later step reads the ages of the tokens at `site` as it leaves them."""
    return _live(
        plan,
        lambda term: isinstance(term, Stale) and term.site == site,
        lambda step: isinstance(plan.action(step, site), Compute),
    )


def _live(plan: CachePlan, reads: Callable[[Term], bool], renews: Callable[[int], bool]) -> list[bool]:
    """For every step, whether a record is read later, before a step that renews it without reading it."""
    live, needed = [], False
    for step in reversed(range(plan.num_steps)):
        live.append(needed)
        read = any(reads(term) for score in _scores_at(plan, step) for _, term in score.terms)
        needed = read or (needed and not renews(step))
    return live[::-1]


def live_stores(plan: CachePlan, span: Span, num_tokens: int) -> list[frozenset[int]]:
    """For every step, the ages of the span's history that the step must store.

    Age 0 is the newest value; on compute, the value of age a moves to age a + 1. A store is live where a later step
    reads one of the stored tokens before they are written again. A dynamic set may keep, and drop, any token.
    """
    name = span[-1].name  # the one that drops the most tokens
    depth = forecast_depth(plan, name)
    everything, nothing = torch.ones(num_tokens, dtype=torch.bool), torch.zeros(num_tokens, dtype=torch.bool)
    live = [nothing] * depth
    read = any(_reads(score, name) for score in plan.scores.values())
    stores: list[frozenset[int]] = []
    for step, action in reversed(list(plan.column(name))):
        store: set[int] = set()
        if isinstance(action, Compute):
            store = {age for age in range(depth) if bool(live[age].any())}
            live = [*live[1:], nothing]
        elif isinstance(action, Update):
            dynamic = isinstance(action.tokens, TopK)
            kept, dropped = (everything, everything) if dynamic else _split(plan.tokens[str(action.tokens)], nothing)
            if action.store:
                store = {0} if bool((live[0] & kept).any()) else set()
                live = [dropped, *live[1:]]
            else:
                live = [live[0] | dropped, *live[1:]]
        elif isinstance(action, (Reuse, Hold)):
            order = action.order if isinstance(action, Reuse) else 0
            live = [everything if age <= order else live[age] for age in range(depth)]
        if read and not isinstance(action, Compute) and any(_reads(score, name) for score in _scores_at(plan, step)):
            live = [everything, *live[1:]]
        stores.append(frozenset(store))
    return stores[::-1]


def _reads(score: Score, site: str) -> bool:
    return any(isinstance(term, (Norm, Probe)) and term.site == site for _, term in score.terms)


def _split(tokens: torch.Tensor, nothing: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    kept = nothing.clone()
    kept[tokens] = True
    return kept, ~kept


def slot_names(slots: Sequence[str], ages: frozenset[int]) -> list[str]:
    """The slots that keep the values of the given ages."""
    return [history(slot, age) for slot in slots for age in sorted(ages)]
