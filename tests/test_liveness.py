"""Which stores a later step reads, and which neighbours on the stream share one slot."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import given, settings

from tcc.plan import Action, CachePlan, Compute, Hold, Reuse, Skip, TopK, Update
from tcc.plan.scores import Fixed, Score
from tcc.program.liveness import find_spans, live_stores, sets_by_site, slot_names
from tests.tiny_models import Case, case, dit

SITE = "blocks.0.delta"
C, R, H, S = Compute(), Reuse(), Hold(), Skip()
R1, R2 = Reuse(1, (2.0, -1.0)), Reuse(2, (3.0, -3.0, 1.0))
SETS = {"few": [0], "other": [1, 2], "more": [0, 1], "all": [0, 1, 2, 3]}
TOKENS = {name: torch.tensor(kept) for name, kept in SETS.items()}
FEW, OTHER, MORE, ALL = (Update(name) for name in SETS)
LOOK = Update("few", store=False)

# --- stores


def stores(actions: Sequence[Action], site: str = SITE) -> list[frozenset[int]]:
    """What every step of a one-site plan on four tokens must store."""
    plan = CachePlan(len(actions), {(i, site): action for i, action in enumerate(actions)}, TOKENS)
    return live_stores(plan, (case("dit").info.sites[site],), 4)


#: actions of a run, and the ages that each step stores, as digits
STORES: dict[str, tuple[list[Action], str]] = {
    "a value that nobody reads": ([C, C], ". ."),
    "only the last value before a reuse": ([C, C, R, R], ". 0 . ."),
    "a value after the last reuse": ([C, R, C], "0 . ."),
    "one token set: rows are recomputed before they are read": ([C, FEW, FEW, FEW], "0 . . ."),
    "another token set reads the rows": ([C, FEW, OTHER], "0 0 ."),
    "sets that take turns": ([C, FEW, OTHER, FEW, OTHER], "0 0 0 0 ."),
    "a set within the next one": ([C, FEW, MORE], "0 . ."),
    "the next set is smaller": ([C, MORE, FEW], "0 0 ."),
    "rows that are read only after another set": ([C, FEW, MORE, FEW], "0 . 0 ."),
    "reuse after an update": ([C, FEW, R], "0 0 ."),
    "an update that does not store": ([C, LOOK, R], "0 . ."),
    "what it reads was stored by an update": ([C, OTHER, LOOK, FEW], "0 0 . ."),
    "an update of all tokens needs nothing": ([C, ALL, R], ". 0 ."),
    "a new I-step ends what was stored": ([C, FEW, C, FEW], "0 . 0 ."),
    "a skip reads and writes nothing": ([C, S, R], "0 . ."),
    "a skip alone": ([S, C, S], ". . ."),
    "two computed values": ([C, C, R1], "0 01 ."),
    "two of three computed values": ([C, C, C, R1], ". 0 01 ."),
    "computed values far apart": ([C, R, C, R1, R1], "0 . 01 . ."),
    "three computed values": ([C, C, C, R2, R], "0 01 012 . ."),
    "three values, the oldest read once": ([C, C, C, R2, C, R1], "0 01 012 . 01 ."),
    "a history that a reuse does not need": ([C, C, R, C, R1], ". 0 . 01 ."),
}


@pytest.mark.parametrize("kind", STORES)
def test_a_store_is_live_where_it_is_read_before_it_is_overwritten(kind: str) -> None:
    """Steps store what a later step of the run reads, and nothing else."""
    actions, digits = STORES[kind]
    expected = [frozenset(int(age) for age in ages if age != ".") for ages in digits.split()]
    assert stores(actions) == expected


def test_a_held_stream_is_stored_where_it_is_computed() -> None:
    """Hold reads like reuse."""
    assert stores([C, C, H, C], "out.stream") == [frozenset(ages) for ages in ((), (0,), (), ())]


def run(plan: CachePlan, stored: Sequence[frozenset[int]]) -> list[Any]:
    """Everything that the steps read, where a value is a (step, token) and only the ages in `stored` are written."""
    slots: list[list[Any]] = [[None] * 4 for _ in range(3)]
    reads: list[Any] = []
    for step, action in plan.column(SITE):
        new = [(step, token) for token in range(4)]
        if isinstance(action, Compute):
            slots = [[new, *slots][age] if age in stored[step] else slots[age] for age in range(3)]
        elif isinstance(action, Update):
            kept = SETS[str(action.tokens)]
            mixed = [new[token] if token in kept else slots[0][token] for token in range(4)]
            reads.append(mixed)
            slots[0] = mixed if action.store and 0 in stored[step] else slots[0]
        elif isinstance(action, Reuse):
            reads.append(slots[: action.order + 1])
    return reads


@st.composite
def columns(draw: st.DrawFn) -> CachePlan:
    """A valid plan for one site and up to eight steps, with updates or with forecasts."""
    partial = draw(st.sampled_from([[FEW, OTHER, MORE, ALL, LOOK], [R1, R2]]))
    actions: list[Action] = []
    for action in draw(st.lists(st.sampled_from([C, C, R, S, *partial]), min_size=1, max_size=8)):
        needed = {Skip: 0, Compute: 0}.get(type(action), 1 + getattr(action, "order", 0))
        actions.append(action if actions.count(C) >= needed else C)
    return CachePlan(len(actions), {(i, SITE): action for i, action in enumerate(actions)}, TOKENS)


@settings(deadline=None)  # the first example captures a model
@given(columns())
def test_live_stores_are_enough_and_none_is_too_many(plan: CachePlan) -> None:
    """With them every step reads what it would read if all was stored; without any one of them some step does not."""
    live = live_stores(plan, (case("dit").info.sites[SITE],), 4)
    expected = run(plan, [frozenset(range(3))] * plan.num_steps)
    assert run(plan, live) == expected
    for step, ages in enumerate(live):
        for age in ages:
            assert run(plan, [*live[:step], ages - {age}, *live[step + 1 :]]) != expected


def test_slots_of_a_history_are_named_by_age() -> None:
    """The newest value has the site's name; keys and values have a slot each."""
    assert slot_names(("a.k", "a.v"), frozenset({2, 0})) == ["a.k", "a.k~2", "a.v", "a.v~2"]
    assert slot_names(("a",), frozenset()) == []


# --- spans


def spans(table: dict[str, Sequence[Action]], which: Case | None = None) -> list[str]:
    """The spans of a plan, given site by site, as `a + b`; sites are those of a DiT of three blocks by default."""
    steps = max(len(actions) for actions in table.values())
    actions = {(i, site): action for site, column in table.items() for i, action in enumerate(column)}
    plan = CachePlan(
        steps, actions, TOKENS, scores={"one": Score(((1.0, Fixed("t")),))}, tables={"t": torch.arange(4.0)}
    )
    return [" + ".join(site.name for site in span) for span in find_spans(plan, (which or _dit3()).info.analysis)]


@functools.cache
def _dit3() -> Case:
    return dit(depth=3, hidden_size=16)


def deltas(*actions: Action, blocks: Sequence[int] = (0, 1, 2)) -> dict[str, Sequence[Action]]:
    """The same actions for the deltas of all blocks."""
    return {f"blocks.{b}.delta": actions for b in blocks}


ALL_THREE = "blocks.0.delta + blocks.1.delta + blocks.2.delta"
APART = ["blocks.0.delta", "blocks.1.delta", "blocks.2.delta"]
ONE_APART = ["blocks.0.delta", "blocks.1.delta + blocks.2.delta"]
KEYS = [f"blocks.{b}.attn.kv" for b in range(3)]


@pytest.mark.parametrize("action", [R, S, FEW, Update("few", "cached")], ids=str)
def test_neighbours_with_equal_actions_share_a_slot(action: Action) -> None:
    """Three blocks that are always treated alike keep one sum."""
    assert spans(deltas(C, action)) == [ALL_THREE]


def test_branches_share_a_slot_across_blocks() -> None:
    """What counts is the stream between them, not the block."""
    names = [f"blocks.{b}.{branch}.delta" for b in range(3) for branch in ("attn", "mlp")]
    assert spans({name: [C, FEW] for name in names}) == [" + ".join(names)]


def test_the_order_in_which_a_plan_names_sites_means_nothing() -> None:
    """Spans follow the stream."""
    table = deltas(C, R)
    assert spans(dict(reversed(table.items()))) == [ALL_THREE]


DIFFERENT: dict[str, tuple[list[Action], list[Action]]] = {
    "action": ([C, R], [C, FEW]),
    "step": ([C, R, C], [C, C, R]),
    "token set": ([C, FEW], [C, OTHER]),
    "attention": ([C, FEW], [C, Update("few", "cached")]),
    "coefficients": ([C, C, R1], [C, C, Reuse(1, (1.5, -0.5))]),
}


@pytest.mark.parametrize("kind", DIFFERENT)
def test_different_columns_keep_sites_apart(kind: str) -> None:
    """One step at which two sites differ is enough; their other neighbours still merge."""
    one, two = DIFFERENT[kind]
    assert spans(deltas(*one, blocks=[0, 1]) | deltas(*two, blocks=[2])) == [
        "blocks.0.delta + blocks.1.delta",
        "blocks.2.delta",
    ]


def test_equal_forecasts_share_their_histories() -> None:
    """A sum of forecasts with the same weights is the forecast of the sum."""
    assert spans(deltas(C, C, R1)) == [ALL_THREE]


FEWER: dict[str, tuple[list[list[Action]], list[str]]] = {
    "fewer and fewer": ([[C, ALL], [C, MORE], [C, FEW]], [ALL_THREE]),
    "fewer, then as many": ([[C, MORE], [C, FEW], [C, FEW]], [ALL_THREE]),
    "other sets after the next I-step": ([[C, MORE, C, OTHER], [C, FEW, C, OTHER], [C, FEW, C, OTHER]], [ALL_THREE]),
    "stored or not": ([[C, MORE], [C, LOOK], [C, LOOK]], [ALL_THREE]),
    "more again": ([[C, MORE], [C, FEW], [C, MORE]], ["blocks.0.delta + blocks.1.delta", "blocks.2.delta"]),
    "another set before the next I-step": ([[C, ALL, MORE], [C, FEW, FEW], [C, FEW, FEW]], ONE_APART),
    "fewer at one step, more at another": ([[C, MORE, C, FEW], [C, FEW, C, MORE], [C, FEW, C, MORE]], ONE_APART),
    "other attention": ([[C, MORE], [C, Update("few", "cached")], [C, Update("few", "cached")]], ONE_APART),
    "a step of reuse": ([[C, MORE, R], [C, FEW, R], [C, FEW, R]], ONE_APART),
    "reuse beside an update": ([[C, MORE], [C, R], [C, R]], ONE_APART),
    "chosen in the graph": ([[C, Update(TopK("one", count))] for count in (3, 2, 1)], APART),
}


@pytest.mark.parametrize("kind", FEWER)
def test_neighbours_that_update_fewer_tokens_share_a_slot(kind: str) -> None:
    """Each some of the one before's, at every step; between two I-steps each one set, which nobody reads then."""
    columns, expected = FEWER[kind]
    assert spans({f"blocks.{b}.delta": column for b, column in enumerate(columns)}) == expected


def test_keys_of_a_block_that_updates_fewer_tokens() -> None:
    """They may be of its own tokens, and not of those of the block before, which it has not computed."""
    columns = {f"blocks.{b}.delta": [C, Update(name, "cached")] for b, name in enumerate(("all", "more", "few"))}
    assert spans(columns | dict(zip(KEYS, ([C, ALL], [C, MORE], [C, FEW]), strict=True))) == [ALL_THREE, *KEYS]
    assert spans(columns | dict(zip(KEYS, ([C, ALL], [C, ALL], [C, FEW]), strict=True))) == [*APART, *KEYS]


def test_the_sets_of_a_span_step_by_step() -> None:
    """An I-step has those of the updates that follow; those after the last update are of the same kind."""
    actions = {
        (i, f"blocks.{b}.delta"): a
        for b, c in enumerate(([C, MORE, C, ALL, C], [C, FEW, C, FEW, C]))
        for i, a in enumerate(c)
    }
    plan = CachePlan(5, actions, TOKENS)
    (span,) = find_spans(plan, _dit3().info.analysis)
    assert sets_by_site(plan, span) == [("more", "few")] * 2 + [("all", "few")] * 3
    alike = CachePlan(2, {(i, f"blocks.{b}.delta"): a for b in (0, 1) for i, a in enumerate((C, FEW))}, TOKENS)
    assert sets_by_site(alike, find_spans(alike, _dit3().info.analysis)[0]) == [(), ()]


def test_attention_to_current_tokens_keeps_sites_apart() -> None:
    """The next block's keys need the stream of the dropped tokens, block by block."""
    assert spans(deltas(C, Update("few", "current"), FEW)) == APART


def test_a_gap_keeps_sites_apart() -> None:
    """A block that the plan does not name reads the stream between them."""
    assert spans(deltas(C, R, blocks=[0, 2])) == ["blocks.0.delta", "blocks.2.delta"]


def test_branch_outputs_do_not_merge() -> None:
    """Before the gate nothing is added to the stream."""
    names = ["blocks.0.attn.out", "blocks.0.mlp.out", "blocks.1.attn.out"]
    assert spans({name: [C, R] for name in names}) == names


HELD = {
    "blocks.0.stream": ["blocks.0.stream", ALL_THREE],
    "blocks.1.stream": ["blocks.0.delta", "blocks.1.stream", "blocks.1.delta + blocks.2.delta"],
    "blocks.2.stream": ["blocks.0.delta + blocks.1.delta", "blocks.2.stream", "blocks.2.delta"],
    "out.stream": [ALL_THREE, "out.stream"],
}


@pytest.mark.parametrize("site", HELD)
def test_a_stream_that_is_kept_divides_a_span(site: str) -> None:
    """Inside a span the stream does not exist; before and after it, it does."""
    assert spans(deltas(C, R, R) | {site: [C, C, H]}) == HELD[site]


KEY_COLUMNS: dict[str, tuple[list[Action], list[Action], list[str]]] = {
    "computed with the span": ([C, R], [C, R], [ALL_THREE]),
    "refreshed with the span": ([C, Update("few", "cached")], [C, FEW], [ALL_THREE]),
    "computed where the span is reused": ([C, R], [C, C], ONE_APART),
    "computed where the span is updated": ([C, FEW], [C, C], ONE_APART),
    "computed where the span is skipped": ([C, S], [C, C], ONE_APART),
}


@pytest.mark.parametrize("kind", KEY_COLUMNS)
def test_keys_that_are_computed_where_their_span_is_not_divide_it(kind: str) -> None:
    """The first block's keys stay with a span that is computed whenever they are; keys come after all other sites."""
    column, keys, expected = KEY_COLUMNS[kind]
    assert spans(deltas(*column) | {KEYS[0]: keys}) == [*expected, KEYS[0]]


def test_keys_inside_a_span_divide_it() -> None:
    """Keys of a later block lie between its delta and the one before, and need the stream there."""
    assert spans(deltas(C, R) | {KEYS[2]: [C, C]}) == ["blocks.0.delta + blocks.1.delta", "blocks.2.delta", KEYS[2]]
    assert spans(deltas(C, R) | {name: [C, C] for name in KEYS}) == [*APART, *KEYS]


@pytest.mark.parametrize(
    ("keys", "expected"), [(FEW, [ALL_THREE]), (R, [ALL_THREE]), (OTHER, APART), (C, APART)], ids=str
)
def test_keys_of_the_tokens_that_a_span_updates_do_not_divide_it(keys: Action, expected: list[str]) -> None:
    """They need the stream of these tokens alone; other tokens have none inside."""
    table = deltas(C, Update("few", "cached")) | {name: [C, keys] for name in KEYS}
    assert spans(table) == [*expected, *KEYS]


def test_keys_that_are_refreshed_where_their_span_is_reused_divide_it() -> None:
    """A reused span has no stream inside, not even for some tokens."""
    assert spans(deltas(C, R) | {name: [C, FEW] for name in KEYS}) == [*APART, *KEYS]


def test_a_long_skip_divides_a_span() -> None:
    """The stream that the skip reads, and what is joined into it, keep the three blocks apart."""
    assert spans(deltas(C, R), case("long_skip")) == APART
