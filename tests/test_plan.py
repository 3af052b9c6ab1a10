"""A plan is checked when it is made, and answers what a step does at a site."""

from __future__ import annotations

import re
from typing import Any

import pytest
import torch

from tcc.errors import PlanError
from tcc.plan import COMPUTE, Action, CachePlan, Compute, Cost, Hold, Reuse, Skip, TopK, Update
from tcc.plan.scores import Norm, Score

SITE, KEYS, STREAM = "blocks.0.delta", "blocks.0.attn.kv", "blocks.0.stream"
SETS = {"T": torch.tensor([0, 2])}
SCORES = {"norm": Score(((1.0, Norm(SITE)),))}


def column(*actions: Action, site: str = SITE, tokens: dict[str, torch.Tensor] | None = None) -> CachePlan:
    """A plan with one site, given step by step."""
    table = {(step, site): action for step, action in enumerate(actions)}
    return CachePlan(num_steps=len(actions), actions=table, tokens=SETS if tokens is None else tokens, scores=SCORES)


BAD_ACTIONS = {
    "empty top-k": (lambda: TopK("norm", 0), "TopK(count=0): at least one token must be kept"),
    "positions for a name": (
        lambda: Update(torch.tensor([0, 2])),  # type: ignore[arg-type]
        "Update(tokens=Tensor): give the name of a token set, and the set itself to CachePlan(tokens=",
    ),
    "attention": (lambda: Update("T", "all"), "Update(attention='all'): use one of kept, current, cached"),
    "negative order": (lambda: Reuse(-1), "Reuse(order=-1) takes 0 coefficients (newest first), got 0"),
    "few coefficients": (lambda: Reuse(2, (1.0, 2.0)), "Reuse(order=2) takes 3 coefficients (newest first), got 2"),
    "coefficients of no forecast": (lambda: Reuse(0, (1.0,)), "Reuse(order=0) takes 0 coefficients"),
    "nan coefficient": (lambda: Reuse(1, (float("nan"), 1.0)), "the coefficients must be finite, got (nan, 1.0)"),
    "infinite coefficient": (lambda: Reuse(1, (2.0, float("-inf"))), "must be finite, got (2.0, -inf)"),
}


@pytest.mark.parametrize("kind", BAD_ACTIONS)
def test_an_action_checks_its_own_numbers(kind: str) -> None:
    """An action that means nothing cannot be made."""
    make, message = BAD_ACTIONS[kind]
    with pytest.raises(PlanError, match=re.escape(message)):
        make()


BAD_SETS = {
    "two dimensions": (torch.zeros(1, 2, dtype=torch.int64), "got torch.int64 [1, 2]"),
    "a list": ([1, 2], "token set 'T': expected an int64 tensor of positions, got list"),
    "floats": (torch.tensor([0.0, 1.0]), "got torch.float32 [2]"),
    "a mask": (torch.tensor([True, False]), "got torch.bool [2]"),
    "int32": (torch.tensor([0, 1], dtype=torch.int32), "got torch.int32 [2]"),
    "nothing": (torch.zeros(0, dtype=torch.int64), "token set 'T': expected a non-empty 1-D int64 tensor"),
    "negative": (torch.tensor([-1, 1]), "token set 'T': positions must be >= 0, sorted and distinct"),
    "unsorted": (torch.tensor([2, 1]), "sorted and distinct"),
    "twice": (torch.tensor([1, 1]), "sorted and distinct"),
}


@pytest.mark.parametrize("kind", BAD_SETS)
def test_a_token_set_is_sorted_distinct_positions(kind: str) -> None:
    """A token set that is no list of positions is refused by name, whether an action uses it or not."""
    kept, message = BAD_SETS[kind]
    with pytest.raises(PlanError, match=re.escape(message)):
        column(Compute(), tokens={"T": kept})


BAD_TABLES: dict[str, tuple[Any, str]] = {
    "step after the end": ({(2, SITE): Compute()}, "step 2, site 'blocks.0.delta': the plan has steps 0..1"),
    "negative step": ({(-1, SITE): Compute()}, "step -1, site 'blocks.0.delta': the plan has steps 0..1"),
    "step between": ({(0.5, SITE): Reuse()}, "site 'blocks.0.delta': step=0.5: expected a whole number"),
    "action class": ({(1, SITE): Reuse}, "is not an action: write an instance, such as Reuse()"),
    "no site kind": (
        {(0, "blocks.0.attn"): Compute()},
        "step 0, site 'blocks.0.attn': not a site name; sites end in .out, .delta, .stream, .skip, .kv",
    ),
    "no block": ({(0, "delta"): Compute()}, "site 'delta': not a site name"),
    "held delta": ({(0, SITE): Hold()}, "hold is not for this kind of site; use compute, update, reuse or skip"),
    "held keys": ({(0, KEYS): Hold()}, "step 0, site 'blocks.0.attn.kv': hold is not for this kind of site"),
    "reused stream": ({(0, STREAM): Reuse()}, "reuse is not for this kind of site; use compute or hold"),
    "updated stream": ({(0, STREAM): Update("T")}, "update is not for this kind of site; use compute or hold"),
    "skipped stream": ({(0, STREAM): Skip()}, "skip is not for this kind of site; use compute or hold"),
    "reused skip": ({(0, "blocks.2.skip"): Reuse()}, "site 'blocks.2.skip': reuse is not for this kind of site"),
    "skipped keys": ({(0, KEYS): Skip()}, "keys and values cannot be skipped; skip the branch's delta"),
    "unknown set": ({(1, SITE): Update("U")}, "site 'blocks.0.delta': unknown token set 'U' (the plan has: T)"),
    "unknown score": (
        {(1, SITE): Update(TopK("s", 2))},
        "site 'blocks.0.delta': unknown score 's' (the plan has: norm)",
    ),
}


@pytest.mark.parametrize("kind", BAD_TABLES)
def test_a_table_names_steps_sites_and_sets_that_exist(kind: str) -> None:
    """What is wrong in the table is refused with its step and site, and what would be right."""
    table, message = BAD_TABLES[kind]
    with pytest.raises(PlanError, match=re.escape(message)):
        CachePlan(num_steps=2, actions=table, tokens=SETS, scores=SCORES)


@pytest.mark.parametrize("num_steps", [0, -3, 2.0, "4"])
def test_a_plan_has_a_whole_number_of_steps(num_steps: Any) -> None:
    """No steps, half steps and text are refused."""
    with pytest.raises(PlanError, match=rf"num_steps={re.escape(repr(num_steps))}: expected a whole number"):
        CachePlan(num_steps=num_steps, actions={})


def test_an_unknown_set_of_a_plan_without_sets() -> None:
    """The message does not list sets where there are none."""
    with pytest.raises(PlanError, match=r"unknown token set 'T' \(the plan has: none\)"):
        column(Compute(), Update("T"), tokens={})


TWO = Reuse(1, (2.0, -1.0))
READS: dict[str, tuple[tuple[Action, ...], str, str]] = {
    "reuse": ((Reuse(), Compute()), SITE, "step 0, site 'blocks.0.delta': reuse reads 1 stored value(s), but 0 were"),
    "update": ((Update("T"), Compute()), SITE, "step 0, site 'blocks.0.delta': update reads 1 stored value(s), but 0"),
    "top-k": ((Update(TopK("norm", 2)), Compute()), SITE, "update reads 1 stored value(s), but 0 were computed"),
    "hold": ((Hold(), Compute()), STREAM, "step 0, site 'blocks.0.stream': hold reads 1 stored value(s), but 0 were"),
    "keys": ((Reuse(),), KEYS, "step 0, site 'blocks.0.attn.kv': reuse reads 1 stored value(s), but 0 were"),
    "after a skip": ((Skip(), Reuse()), SITE, "step 1, site 'blocks.0.delta': reuse reads 1 stored value(s), but 0"),
    "forecast": ((Compute(), TWO), SITE, "reads 2 stored value(s), but 1 were computed before it in the run"),
    "remedy": ((Compute(), Reuse(2, (3.0, -3.0, 1.0))), SITE, "compute the site at 2 earlier step(s)"),
    "update before a forecast": (
        (Compute(), Compute(), Update("T"), TWO), SITE,
        "step 3, site 'blocks.0.delta': a forecast combines computed values, but step 2 updates only some tokens",
    ),
    "update after a forecast": ((Compute(), Compute(), TWO, Update("T")), SITE, "but step 3 updates only some tokens"),
}  # fmt: skip


@pytest.mark.parametrize("kind", READS)
def test_a_value_is_stored_before_it_is_read(kind: str) -> None:
    """A read before its write is refused with step, site and remedy."""
    actions, site, message = READS[kind]
    with pytest.raises(PlanError, match=re.escape(message)):
        column(*actions, site=site)


GOOD: dict[str, tuple[tuple[Action, ...], str]] = {
    "skip stores nothing and needs nothing": ((Skip(), Compute(), Skip(), Reuse()), SITE),
    "a reuse is no write, but the value stays": ((Compute(), Reuse(), Update("T"), Reuse()), SITE),
    "two computed values, however far apart": ((Compute(), Reuse(), Compute(), Reuse(), TWO), SITE),
    "one stream of several": ((Compute(), Update("T", "current")), "blocks.0.attn.delta@text"),
    "keys": ((Compute(), Update("T"), Reuse()), KEYS),
    "stream": ((Compute(), Hold(), Compute(), Hold()), "out.stream"),
    "long skip": ((Compute(), Hold()), "blocks.2.skip"),
}


@pytest.mark.parametrize("kind", GOOD)
def test_a_sound_column_is_kept_as_given(kind: str) -> None:
    """What reads only stored values is a plan."""
    actions, site = GOOD[kind]
    assert tuple(column(*actions, site=site).column(site)) == tuple(enumerate(actions))


def test_a_step_without_a_row_computes() -> None:
    """A named site is computed where the table says nothing else, and so may be read later."""
    plan = CachePlan(num_steps=3, actions={(2, SITE): Reuse(), (1, STREAM): Hold()})
    assert plan.action(0, SITE) is plan.action(2, STREAM) is COMPUTE
    assert plan.action(0, "blocks.7.delta") is COMPUTE
    assert plan.at(0) == {SITE: Compute(), STREAM: Compute()}
    assert plan.at(1) == {SITE: Compute(), STREAM: Hold()}
    assert list(plan.column(SITE)) == [(0, Compute()), (1, Compute()), (2, Reuse())]


def test_sites_come_in_the_order_of_their_first_mention() -> None:
    """A site named at several steps is listed once."""
    plan = CachePlan(num_steps=2, actions={(1, SITE): Reuse(), (0, KEYS): Compute(), (0, SITE): Compute()})
    assert plan.sites == (SITE, KEYS)


@pytest.mark.parametrize("action", [Update("T"), Reuse(), Skip()])
def test_a_step_that_does_not_compute_a_site_is_a_p_step(action: Action) -> None:
    """One site that is not computed makes a P, whatever the others do."""
    actions = {(0, SITE): Compute(), (2, SITE): action, (0, KEYS): Compute(), (3, KEYS): Reuse()}
    schedule = CachePlan(num_steps=5, actions=actions, tokens=SETS).schedule
    assert (str(schedule), schedule.i_steps) == ("IIPPI", (0, 1, 4))


def test_a_held_stream_makes_a_p_step() -> None:
    """Hold counts as not computing."""
    assert str(column(Compute(), Hold(), Compute(), site=STREAM).schedule) == "IPI"


def test_a_plan_that_names_no_site_computes_every_step() -> None:
    """The empty table is the uncached model."""
    plan = CachePlan(num_steps=3, actions={})
    assert (plan.sites, str(plan.schedule), plan.at(1)) == ((), "III", {})


def test_cost_is_summed_over_the_steps() -> None:
    """The bound is the uncached run's MACs over the plan's."""
    plan = CachePlan(num_steps=3, actions={}, cost=Cost(full_macs=100, step_macs=(100, 30, 20), slot_bytes=64))
    assert (plan.macs, plan.bound, plan.slot_bytes) == (150, 2.0, 64)


@pytest.mark.parametrize("what", ["macs", "bound", "slot_bytes"])
def test_cost_of_an_uncounted_plan(what: str) -> None:
    """A plan written by hand says how to count it."""
    with pytest.raises(PlanError, match=r"the plan has no cost yet: count it with info.count\(plan\)"):
        getattr(column(Compute()), what)


def test_plans_are_compared_by_content() -> None:
    """Token sets too; equal ones have one hash."""

    def made(kept: list[int], steps: int = 2) -> CachePlan:
        return CachePlan(steps, {(1, SITE): Update("kept")}, tokens={"kept": torch.tensor(kept)})

    assert made([0, 2]) == made([0, 2])
    assert len({made([0, 2]), made([0, 2]), made([1, 2])}) == 2
    assert made([0, 2]) != made([1, 2])
    assert made([0, 2]) != made([0, 2], steps=3)
    assert made([0, 2]) != "a plan"


def test_a_key_that_is_no_pair_is_named() -> None:
    """The step is easily forgotten."""
    with pytest.raises(
        PlanError, match=rf"the key '{SITE}' is no pair \(step, site\), such as \(1, 'blocks.0.delta'\)"
    ):
        CachePlan(2, {SITE: Reuse()})  # type: ignore[dict-item]
