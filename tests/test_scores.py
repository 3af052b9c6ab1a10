"""A score is checked when its plan is made: its numbers, its tables, and what it reads of earlier steps."""

from __future__ import annotations

import re
from typing import Any

import pytest
import torch

from tcc.errors import PlanError
from tcc.plan import Action, CachePlan, Reuse, Skip, TopK, Update
from tcc.plan.scores import Attended, Fixed, Norm, Probe, Score, Stale, Term
from tcc.plan.site_name import SiteName

SITE = "b.0.mlp.out"
TABLES = {"s": torch.zeros(4), "w": torch.zeros(8, 3), "row": torch.zeros(3)}


def plan(
    *terms: Term, more: dict[tuple[int, str], Action] | None = None, tables: dict[str, torch.Tensor] | None = None
) -> CachePlan:
    """Two steps: all is computed, then one site is updated by a score of the given terms."""
    return CachePlan(
        num_steps=2,
        actions={(1, SITE): Update(TopK("mine", 2), "current"), **(more or {})},
        scores={"mine": Score(tuple((1.0, term) for term in terms))},
        tables=TABLES if tables is None else tables,
    )


BAD_SCORES: dict[str, tuple[Any, str]] = {
    "no terms": (lambda: Score(()), "a score needs at least one term"),
    "no term": (
        lambda: Score(((1.0, "norm"),)),
        "'norm' is not a term: use Fixed, Norm, Attended, Entropy, Stale or Probe",
    ),  # type: ignore[arg-type]
    "nan weight": (lambda: Score(((float("nan"), Norm(SITE)),)), "must be finite, got nan"),
    "infinite bonus": (lambda: Score(((1.0, Norm(SITE)),), cell=2, bonus=float("inf")), "the bonus must be finite"),
    "bonus without cells": (lambda: Score(((1.0, Norm(SITE)),), bonus=0.5), "needs a cell of side 1 or more"),
    "per cell without cells": (lambda: Score(((1.0, Norm(SITE)),), per_cell=True), "Score(cell=0): a bonus or a count"),
    "unknown table": (
        lambda: plan(Fixed("t")),
        "score 'mine', Fixed(table='t'): unknown table 't' (the plan has: s, w, row)",
    ),
    "no tables": (lambda: plan(Fixed("t"), tables={}), "unknown table 't' (the plan has: none)"),
    "integers": (
        lambda: plan(Norm(SITE), tables={"t": torch.arange(3)}),
        "table 't': expected a non-empty floating-point tensor",
    ),
    "nan table": (
        lambda: plan(Fixed("t"), tables={"t": torch.tensor([0.0, float("nan")])}),
        "table 't': the numbers must",
    ),
    "empty table": (lambda: plan(Fixed("t"), tables={"t": torch.zeros(0)}), "got torch.float32 [0]"),
    "flat hidden": (
        lambda: plan(Probe("b.0.stream", "row", "row", "row", "s")),
        "table 'row' has shape [3], expected 2 dimension(s)",
    ),
    "hidden width": (
        lambda: plan(Probe("b.0.stream", "w", "s", "row", "s")),
        "table 's' has shape [4], expected [3] like",
    ),
    "probe on a delta": (
        lambda: plan(Probe("b.0.delta", "w", "row", "row", "s")),
        "a probe reads a site that ends in .stream, not 'b.0.delta'",
    ),
    "map of no earlier step": (
        lambda: plan(Attended("b.0.attn"), more={(0, "b.0.attn.out"): Skip()}),
        "step 1, site 'b.0.mlp.out': score 'mine' reads how branch 'b.0.attn' attended, but no earlier step computes",
    ),
    "age of another site": (
        lambda: plan(Stale("b.1.mlp.out")),
        "step 1, site 'b.0.mlp.out': score 'mine' counts the age of the tokens of 'b.1.mlp.out', but the plan never",
    ),
}


@pytest.mark.parametrize("kind", BAD_SCORES)
def test_a_score_that_means_nothing_is_refused(kind: str) -> None:
    """The message names the score, the term and the table, or the step and the site."""
    make, message = BAD_SCORES[kind]
    with pytest.raises(PlanError, match=re.escape(message)):
        make()


def test_the_age_of_tokens_that_were_never_computed() -> None:
    """Refused at the first step that asks for it, whatever comes later."""
    actions: dict[tuple[int, str], Action] = {
        (1, "b.1.mlp.out"): Update(TopK("mine", 2)),
        (0, SITE): Reuse(),
        (3, SITE): Update(TopK("mine", 2)),
    }
    score = Score(((1.0, Stale(SITE)),))
    with pytest.raises(PlanError, match="reuse reads 1 stored value"):
        CachePlan(num_steps=4, actions=actions, scores={"mine": score})
    del actions[0, SITE]
    CachePlan(num_steps=4, actions=actions, scores={"mine": score})  # step 0 computes it
    actions[0, SITE] = Skip()
    message = "step 1, site 'b.1.mlp.out': score 'mine' counts the age of the tokens of 'b.0.mlp.out', which no earlier"
    with pytest.raises(PlanError, match=message):
        CachePlan(num_steps=4, actions=actions, scores={"mine": score})


def test_every_term_of_a_sound_score() -> None:
    """Nothing to refuse."""
    terms = (Fixed("s"), Norm(SITE), Attended("b.0.attn"), Stale(SITE), Probe("b.0.stream", "w", "row", "row", "s"))
    assert plan(*terms).scores["mine"].tables == ("s", "w", "row")


def test_what_keeps_part_of_a_branch() -> None:
    """Its output, its change of the stream, its keys, its block's change; of its stream alone."""
    sites = ("b.0.attn.out", "b.0.attn.delta", "b.0.attn.kv", "b.0.delta")
    assert all(SiteName.parse(site).keeps_part_of("b.0.attn") for site in sites)
    others = ("b.0.mlp.out", "b.1.delta", "b.0.stream", "b.0.attn2.out", "b.0.attn.out@text")
    assert not any(SiteName.parse(site).keeps_part_of("b.0.attn") for site in others)


def test_a_branch_is_computed_where_no_part_of_it_is_kept() -> None:
    """By any of the sites that keep a part of it."""
    made = CachePlan(num_steps=4, actions={(1, "b.0.attn.kv"): Reuse(), (2, "b.0.delta"): Reuse(), (3, SITE): Reuse()})
    assert [made.computes(step, "b.0.attn") for step in range(4)] == [True, False, False, True]
