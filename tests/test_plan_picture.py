"""A plan as text, as facts for programs, and as a picture."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from matplotlib.figure import Figure

from tcc.errors import PlanError
from tcc.plan import Action, CachePlan, Compute, Cost, Hold, ModelKey, Reuse, Skip, TopK, Update
from tcc.plan.picture import facts, plot, summary
from tcc.plan.scores import Norm, Score, Stale

SITES = ("blocks.0.attn.out", "blocks.0.mlp.out")


def a_plan(cost: Cost | None = None) -> CachePlan:
    """Four steps I P P I on two sites, three of eight tokens kept."""
    actions: dict[tuple[int, str], Action] = {(step, site): Compute() for step in range(4) for site in SITES}
    actions |= {(1, SITES[0]): Update("kept0", "cached"), (1, SITES[1]): Reuse(), (2, SITES[1]): Reuse()}
    return CachePlan(
        num_steps=4,
        actions=actions,
        tokens={"kept0": torch.tensor([0, 3, 5])},
        model=ModelKey("0" * 64, (("x", (2, 1, 8, 8)),), 8),
        policy={"name": "tprr", "keep": 0.375, "blocks": [0, 1, 2], "rotate": False},
        cost=cost,
    )


def every_action() -> CachePlan:
    """A hand-written plan with each action once."""
    return CachePlan(
        num_steps=4,
        actions={
            (1, "b.0.delta"): Reuse(),
            (2, "b.0.delta"): Skip(),
            (2, "b.1.delta"): Reuse(1, (2.0, -1.0)),
            (3, "b.2.stream"): Hold(),
            (3, "b.3.delta"): Update(TopK("norm", 4), "current"),
        },
        scores={"norm": Score(((1.0, Norm("b.3.delta")),))},
    )


def test_summary_says_it_all_in_few_lines() -> None:
    """Policy, schedule, steps, actions, token sets, MACs, bound and slots, one line each."""
    lines = summary(a_plan(Cost(full_macs=10**9, step_macs=(10**9, 2 * 10**8, 3 * 10**8, 10**9), slot_bytes=3 << 19)))

    assert lines.splitlines() == [
        "policy   tprr(keep=0.375, blocks=0..2, rotate=False)",
        "schedule IPPI",
        "steps    4: 2 I, 2 P",
        "actions  5 compute, 1 update, attention cached, 2 reuse (2 sites)",
        "tokens   kept0: 3 of 8 (38%)",
        "MACs     2.5 of 4 GMAC per run, image and guidance branch",
        "bound    1.60x: the speedup that the MACs allow; measure to know the real one",
        "slots    1.5 MiB for the batch it was made for",
    ]


def test_summary_counts_token_sets_by_their_size() -> None:
    """Six hundred sets are a line or a few, whatever their sizes; the facts name each."""
    sizes = [32] * 599 + [*range(33, 40)] + [39]
    sets = {f"kept{i}": torch.arange(size) for i, size in enumerate(sizes)}
    plan = replace(a_plan(), tokens=sets, model=ModelKey("0" * 64, (), 64))
    lines = [line[9:] for line in summary(plan).splitlines()]
    assert lines[4:7] == ["599 sets: 32 of 64 (50%)", "kept599: 33 of 64 (52%)", "kept600: 34 of 64 (53%)"]
    assert lines[9:11] == ["kept603: 37 of 64 (58%)", "and 3 sets: 38..39"]
    assert len(lines) == 12
    assert len(facts(plan)["tokens"]) == 607


def test_summary_names_what_dynamic_sets_are_chosen_by() -> None:
    """One line per score with the sizes of its sets; of many scores, the first ones."""
    names = [f"s{i}" for i in range(8)]
    terms = ((0.5, Norm("b.0.delta")), (-1.0, Stale("b.0.delta")))
    plan = CachePlan(
        num_steps=9,
        actions={(i + 1, "b.0.delta"): Update(TopK(name, i + 1)) for i, name in enumerate(names)}
        | {(8, "b.1.delta"): Update(TopK("s0", 5))},
        scores={name: Score(terms, cell=2, bonus=0.6, per_cell=True, shared=True) for name in names},
    )
    lines = summary(plan).splitlines()
    formula = "0.5 norm(b.0.delta) + -1 stale(b.0.delta), cells of 2 x 2, bonus 0.6, per cell, shared by the batch"
    assert lines[4] == f"tokens   top 1..5 by s0: {formula}"
    assert [line[9:] for line in lines[9:11]] == [f"top 6 by s5: {formula}", "and by 2 more scores"]
    assert facts(plan)["scores"]["s7"] == formula


def test_summary_of_a_plan_that_was_not_counted() -> None:
    """A plan written by hand has no cost yet; the summary says how to get it."""
    lines = summary(every_action())

    assert "policy   written by hand" in lines
    assert "1 forecast, 1 reuse, 1 hold, 1 skip (4 sites)" in lines
    assert "top 4 by norm: 1 norm(b.3.delta)" in lines
    assert "not counted yet: info.count(plan)" in lines
    assert "bound" not in lines


def test_summary_of_a_plan_that_caches_nothing() -> None:
    """No site is named: everything is computed."""
    lines = summary(CachePlan(num_steps=120, actions={}))

    assert "every site computed, none stored" in lines
    assert "steps    120: 120 I, 0 P" in lines
    assert max(map(len, lines.splitlines())) <= 110  # a long schedule is wrapped


def test_the_plan_calls_the_picture(tmp_path: Path) -> None:
    """`plan.summary()` and `plan.plot()` are these functions."""
    plan = a_plan()
    plan.plot(str(tmp_path / "plan.png"))

    assert plan.summary() == summary(plan)
    assert (tmp_path / "plan.png").read_bytes().startswith(b"\x89PNG")


def test_facts_survive_json() -> None:
    """Facts are plain values; what is not counted is null."""
    counted = json.loads(json.dumps(facts(a_plan(Cost(100, (100, 50, 50, 100), 64)))))

    assert counted["schedule"] == "IPPI"
    assert counted["actions"] == {"compute": 5, "update, attention cached": 1, "reuse": 2}
    assert counted["tokens"] == {"kept0": {"k": 3, "share": 0.375}}
    assert counted["bound"] == pytest.approx(400 / 300)
    assert facts(every_action())["bound"] is None


@pytest.mark.parametrize("steps", [1, 50, 250])
def test_plans_of_any_length_are_drawn(tmp_path: Path, steps: int) -> None:
    """From one step without sites to 250 steps with 56 sites."""
    sites = [f"blocks.{i}.delta" for i in range(56 if steps > 1 else 0)]
    actions: dict[tuple[int, str], Action] = {
        (step, site): Reuse() if step % 3 else Compute() for step in range(steps) for site in sites
    }

    plot(CachePlan(num_steps=steps, actions=actions), tmp_path / "plan.png")

    assert (tmp_path / "plan.png").stat().st_size > 1000


@pytest.mark.parametrize("steps", [4, 20, 50, 250])
def test_the_title_is_not_cut(tmp_path: Path, steps: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """It is as wide as its figure at most, however few steps make that narrow, and above the table."""
    found: list[Figure] = []
    monkeypatch.setattr(Figure, "savefig", lambda figure, path: found.append(figure))
    options = {f"option{i}": "Middling words"[i % 3 :] for i in range(9)} | {"blocks": [0, 1, 2, 3], "rotate": False}
    plot(CachePlan(num_steps=steps, actions={}, policy={"name": "tprr", **options}), tmp_path / "plan.png")
    found[0].draw_without_rendering()  # lays out
    (title,) = (text for text in found[0].texts if text.get_text().startswith("tprr"))
    around = title.get_window_extent()
    assert 0.6 < around.width / found[0].bbox.width < 0.97
    assert found[0].axes[0].get_tightbbox().y1 <= around.y0


def test_every_action_has_its_colour(tmp_path: Path) -> None:
    """All actions can be drawn, in any format that matplotlib writes; the legend names those that occur."""
    plot(every_action(), tmp_path / "plan.svg")

    drawn = (tmp_path / "plan.svg").read_text()
    for label in ("compute", "forecast", "reuse", "hold", "skip", "update, attention current"):
        assert f"<!-- {label} -->" in drawn
    assert "<!-- update, attention kept -->" not in drawn


def test_a_picture_that_cannot_be_written_is_named(tmp_path: Path) -> None:
    """With the formats that there are."""
    with pytest.raises(PlanError, match=r"plan.xyz: Format 'xyz' is not supported \(supported formats: .*png"):
        every_action().plot(str(tmp_path / "plan.xyz"))
