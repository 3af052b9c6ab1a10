"""ToCa and DuCa: schedules, tokens, scores, and programs. Their cost: `test_published_costs.py`."""

from __future__ import annotations

import inspect
import math
import re
from typing import Any

import pytest

import tcc
from tcc import plans
from tcc.cli.policies import options_of
from tcc.errors import PlanError
from tcc.plan import Compute, Hold, Reuse, TopK, Update
from tcc.plan.scores import Attended, Entropy, Norm, Score, Stale
from tcc.plans.toca import toca_steps
from tests.published import dit_xl2, toca_tokens, updated_tokens
from tests.running import CLOSE, call, session
from tests.tiny_models import case, relative_error

#: ToCa's full steps for N = 3, T = 50, and those of which only the first block is computed, counted down.
FULL = [49, 44, 40, 36, 30, 27, 24, 21, 18, 16, 14, 12, 10, 8, 6, 4, 2, 0]
FIRST = [45, 32]


@pytest.fixture
def uncounted(monkeypatch: pytest.MonkeyPatch) -> None:
    """Policies return their tables without counting them: quick for many variants."""
    monkeypatch.setattr(tcc.ModelInfo, "count", lambda _, plan: plan)


# --- schedules


def of_kind(kinds: tuple[str, ...], kind: str) -> list[int]:
    """The steps of a kind, counted down."""
    return [len(kinds) - 1 - step for step, found in enumerate(kinds) if found == kind]


def test_the_published_steps() -> None:
    """With the quirk 18 full steps, without it 20: the two that it cuts short are full."""
    kinds = toca_steps(50, 3)
    assert (of_kind(kinds, "full"), of_kind(kinds, "first")) == (FULL, FIRST)
    plain = toca_steps(50, 3, quirk=False)
    assert of_kind(plain, "full") == sorted([*FULL, *FIRST], reverse=True)
    assert set(plain) == {"full", "partial"}


def test_the_published_counts_of_other_settings() -> None:
    """250 steps, N = 4: 72 full ones. DuCa: 22 partial steps of 50, and aggressive ones, 20 % fewer than those left."""
    assert toca_steps(250, 4).count("full") == 72
    kinds = toca_steps(50, 3, aggressive=True)
    assert [kinds.count(kind) for kind in ("full", "first", "partial", "aggressive")] == [18, 2, 22, 8]


def test_partial_and_aggressive_steps_alternate() -> None:
    """In an interval of four: odd distances are partial, the even one aggressive."""
    kinds = toca_steps(50, 3, aggressive=True)
    assert [kinds[49 - i] for i in (40, 39, 38, 37, 36)] == ["full", "partial", "aggressive", "partial", "full"]


def test_intervals_are_two_in_the_sensitive_window() -> None:
    """A fifth to two fifths of the steps from the end."""
    full = of_kind(toca_steps(100, 8, quirk=False), "full")
    assert [i for i in full if 20 <= i < 35] == list(range(34, 19, -2))


@pytest.mark.parametrize("options", [(1, 3), (2, 1), (7, 9)])
def test_the_first_step_is_full(options: tuple[int, int]) -> None:
    """However few there are."""
    assert toca_steps(*options)[0] == "full"


# --- tables


@pytest.mark.usefixtures("uncounted")
def test_what_toca_does_at_every_kind_of_step() -> None:
    """Full steps compute; others reuse attention and update the MLP; a quirk step computes the first block alone."""
    plan = plans.toca(dit_xl2(), num_steps=50)
    full, first, early, late = 0, 49 - 32, 49 - 43, 49 - 31
    assert set(plan.at(full).values()) == {Compute()}
    assert plan.action(first, "blocks.0.attn.out") == plan.action(first, "blocks.0.mlp.out") == Compute()
    assert plan.action(first, "blocks.1.attn.out") == Reuse()
    assert isinstance(plan.action(first, "blocks.1.mlp.out"), Update)
    assert set(plan.at(early).values()) == {Reuse()}  # the step factor is 0: no tokens
    assert {plan.action(late, f"blocks.{b}.attn.out") for b in range(28)} == {Reuse()}
    assert plan.action(late, "blocks.27.mlp.out") == Update(TopK("blocks.27.mlp.out", toca_tokens(27, 31)))


@pytest.mark.usefixtures("uncounted")
def test_as_many_tokens_as_published() -> None:
    """At every partial step and in every block."""
    plan = plans.toca(dit_xl2(), num_steps=50, score="random")
    for step, kind in enumerate(toca_steps(50, 3)):
        for block in range(28):
            if kind == "partial":
                action = plan.action(step, f"blocks.{block}.mlp.out")
                kept = plan.tokens[str(action.tokens)].numel() if isinstance(action, Update) else 0
                assert kept == toca_tokens(block, 49 - step)


@pytest.mark.usefixtures("uncounted")
def test_the_ratios_of_250_steps() -> None:
    """Front blocks take more: `(1.8 - 1.6 l / 27) (1.4 - 0.8 i / 250)`."""
    plan = plans.toca(dit_xl2(), num_steps=250, interval=4, layer_slope=0.8, step_slope=0.4)
    step = 249 - 101
    for block in (0, 13, 27):
        share = 0.07 * (1.8 - 1.6 * block / 27) * (1.4 - 0.8 * 101 / 250) * 2.5
        expected = Update(TopK(f"blocks.{block}.mlp.out", math.floor(256 * share)))
        assert plan.action(step, f"blocks.{block}.mlp.out") == expected


@pytest.mark.usefixtures("uncounted")
def test_duca_holds_the_last_stream_at_aggressive_steps() -> None:
    """Nothing before it is stored there, so nothing is computed."""
    plan = plans.duca(dit_xl2(), num_steps=50)
    kinds = toca_steps(50, 3, aggressive=True)
    held = [step for step, action in plan.column("out.stream") if action == Hold()]
    assert held == [step for step, kind in enumerate(kinds) if kind == "aggressive"]
    for step in held:
        assert {action for site, action in plan.at(step).items() if site != "out.stream"} == {Reuse()}


@pytest.mark.usefixtures("uncounted")
@pytest.mark.parametrize(
    ("score", "term"),
    [
        ("attention", Attended("blocks.3.attn")),
        ("norm", Norm("blocks.3.stream")),
        ("value", Norm("blocks.3.attn.kv")),
    ],
)
def test_scores(score: Any, term: Any) -> None:
    """s1, a quarter of s3 over the interval, and s4 of 0.6 in cells of 2 x 2; of 0.8 for DuCa."""
    plan = plans.toca(dit_xl2(), num_steps=50, score=score)
    terms = ((1.0, term), (0.25 / 3, Stale("blocks.3.mlp.out")))
    assert plan.scores["blocks.3.mlp.out"] == Score(terms, cell=2, bonus=0.6)
    plan = plans.duca(dit_xl2(), num_steps=50, score=score, stale=0.0)
    assert plan.scores["blocks.3.mlp.out"] == Score(((1.0, term),), cell=2, bonus=0.8)
    plan = plans.toca(dit_xl2(), num_steps=50, score=score, cell=0)
    assert plan.scores["blocks.3.mlp.out"] == Score(terms)


@pytest.mark.usefixtures("uncounted")
def test_values_are_those_of_the_last_full_step() -> None:
    """They are kept like attention's output, and not computed in between."""
    plan = plans.toca(dit_xl2(), num_steps=50, score="value")
    for step in range(50):
        assert plan.action(step, "blocks.5.attn.kv") == plan.action(step, "blocks.5.attn.out")


@pytest.mark.usefixtures("uncounted")
@pytest.mark.parametrize("levels", [1, 3, 8])
def test_levels_bound_the_variants(levels: int) -> None:
    """So many kinds of partial step, and as many tokens on average, but for rounding."""
    exact, few = (plans.toca(dit_xl2(), num_steps=50, levels=n) for n in (None, levels))
    rows = {
        tuple(getattr(getattr(few.action(s, f"blocks.{b}.mlp.out"), "tokens", None), "count", 0) for b in range(1, 28))
        for s, kind in enumerate(toca_steps(50, 3))
        if kind != "full"
    }
    assert len(rows - {(0,) * 27}) == levels
    assert sum(updated_tokens(few)) == pytest.approx(sum(updated_tokens(exact)), rel=0.02)


# --- random tokens


def random_sets(**options: Any) -> list[list[int]]:
    """The tokens of the second block of a small DiT at successive partial steps of one long interval."""
    given = {"ratio": 0.1, "step_slope": 0.0, "layer_slope": 0.0, "score": "random", "quirk": False} | options
    plan = plans.toca(case("dit").info, num_steps=6, interval=40, **given)
    names = [action.tokens for _, action in plan.column("blocks.1.mlp.out") if isinstance(action, Update)]
    return [plan.tokens[str(name)].tolist() for name in names]


def test_random_tokens_are_the_seeds() -> None:
    """Others at every step; the same for one seed."""
    sets = random_sets()
    assert [len(kept) for kept in sets] == [4] * len(sets)
    assert len({tuple(kept) for kept in sets}) > 1
    assert sets == random_sets()
    assert sets != random_sets(seed=1)


def test_stale_tokens_come_first() -> None:
    """With a large weight of s3, every token has its turn before any has a second."""
    sets = random_sets(stale=1000.0, bonus=0.0)
    assert sorted(token for kept in sets[:4] for token in kept) == list(range(16))
    assert sorted(token for kept in random_sets(stale=0.0, bonus=0.0)[:4] for token in kept) != list(range(16))


def test_the_bonus_spreads_tokens_over_the_cells() -> None:
    """With a large weight of s4, four tokens lie in the four cells of the grid."""
    for kept in random_sets(bonus=1000.0, stale=0.0):
        assert sorted((token // 4 // 2, token % 4 // 2) for token in kept) == [(0, 0), (0, 1), (1, 0), (1, 1)]


# --- programs


@pytest.mark.parametrize("name", ["dit", "uvit"])
@pytest.mark.parametrize("score", ["attention", "norm", "value", "random"])
@pytest.mark.parametrize("policy", ["toca", "duca"])
def test_programs_compute_what_the_reference_computes(policy: str, score: Any, name: str) -> None:
    """Every step of a run on a tiny model."""
    which = case(name)
    cell = 2 if which.info.image_tokens == (0, which.info.num_tokens) or score == "random" else 0
    plan = plans.POLICIES[policy](which.info, num_steps=12, interval=6, ratio=0.15, score=score, cell=cell)
    kinds = {type(action) for action in plan.actions.values()}
    assert kinds >= {Compute, Reuse, Update} | ({Hold} if policy == "duca" else set())
    model, reference = session(which, plan), tcc.Reference(which.model, plan)
    for step in range(plan.num_steps):
        assert relative_error(call(model, which, step), call(reference, which, step)) < CLOSE


@pytest.mark.parametrize("score", ["random", "norm"])
def test_tokens_that_are_no_image_tokens_are_recomputed_too(score: Any) -> None:
    """A U-ViT has two before the 16 of the image: its label and its time."""
    which = case("uvit")
    assert which.info.image_tokens == (2, 18)
    options: dict[str, Any] = {"interval": 20, "ratio": 0.1, "step_slope": 0.0, "layer_slope": 0.0, "cell": 0}
    plan = plans.toca(which.info, num_steps=4, score=score, **options)
    assert set(updated_tokens(plan)) == {2 + 4}
    for kept in plan.tokens.values():
        assert kept[:2].tolist() == [0, 1]
    for table in plan.tables.values():
        assert (table > 0).tolist() == [True] * 2 + [False] * 16


@pytest.mark.usefixtures("uncounted")
def test_cross_attention_has_a_factor_of_its_own() -> None:
    """As for PixArt: fewer tokens than the MLP."""
    plan = plans.toca(case("hf_pixart").info, num_steps=6, interval=20, ratio=0.3, step_slope=0.0, layer_slope=0.0)
    block = "transformer_blocks.0"
    assert plan.action(1, f"{block}.attn.out") == Reuse()
    assert plan.action(1, f"{block}.cross.out") == Update(TopK(f"{block}.cross.out", int(0.3 * 0.6 * 16)))
    assert plan.action(1, f"{block}.mlp.out") == Update(TopK(f"{block}.mlp.out", int(0.3 * 2.5 * 16)))


def test_the_schedule_for_pixart() -> None:
    """Counted up from intervals N / 0.8 to N / 1.2, no sensitive window, and factors of 1.9 - 1.8 step / T."""
    options: dict[str, Any] = {"slope": -0.2, "count": "up", "sensitive": False}
    kinds = toca_steps(20, 3, **options)
    current, full, first = 3, [], []
    for step in range(20):  # the published code: every block asks anew, and the first one sets the interval
        if step % current == 0:
            current = round(3 / (0.8 + 0.4 * step / 20))
            (first if step and step % current else full).append(step)
    assert [step for step, kind in enumerate(kinds) if kind == "full"] == full == [0, 6, 9, 12, 15, 18]
    assert [step for step, kind in enumerate(kinds) if kind == "first"] == first == [4]

    published = {"score": "entropy", "halves": True, "ratio": 0.3, "layer_slope": 0.6, "step_slope": 0.9, "mlp": 1.6}
    published |= {"cell": 4, "bonus": 0.4, "count": "up", "interval_slope": -0.2, "sensitive": False}
    plan = plans.toca(case("hf_pixart").info, num_steps=20, interval=3, **published)
    for step in (1, 7, 19):
        for number, layer in enumerate((1.6, 0.4)):  # from the first of 2 blocks to the last: 1.6 - 1.2 l / (L - 1)
            for branch, module in (("cross", 0.6), ("mlp", 1.6)):
                count = int(min(1, 0.3 * layer * (1.9 - 1.8 * step / 20) * module) * 16)
                name = f"transformer_blocks.{number}.{branch}.out"
                assert plan.action(step, name) == (Update(TopK(name, count)) if count else Reuse())
    score = plan.scores["transformer_blocks.1.mlp.out"]
    assert (score.cell, score.bonus) == (4, 0.4)
    assert score.terms[0] == (1.0, Entropy("transformer_blocks.1.cross", halves=True))


@pytest.mark.parametrize("policy", ["toca", "duca"])
def test_programs_rank_by_entropy_as_the_reference_does(policy: str) -> None:
    """Every step of a run on a tiny PixArt."""
    which = case("hf_pixart")
    plan = plans.POLICIES[policy](which.info, num_steps=8, interval=4, ratio=0.3, score="entropy", halves=True)
    assert {type(action) for action in plan.actions.values()} >= {Compute, Reuse, Update}
    model, reference = session(which, plan), tcc.Reference(which.model, plan)
    for step in range(plan.num_steps):
        assert relative_error(call(model, which, step), call(reference, which, step)) < CLOSE


# --- refusals


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"interval": 0}, "interval=0: expected a whole number, 1 or more"),
        ({"interval": 2.5}, "interval=2.5: expected a whole number, 1 or more"),
        ({"ratio": 1.5}, "ratio=1.5: expected a share, 0..1"),
        ({"levels": 0}, "levels=0: expected a whole number, 1 or more"),
        ({"cell": -1}, "cell=-1: expected a whole number, 0 or more"),
        ({"mlp": -1.0}, "mlp=-1.0: expected a number, 0 or more"),
        ({"score": "best"}, "toca(score='best'): use one of attention, entropy, norm, value, random"),
        ({"score": "entropy"}, "block 'blocks.1' has no cross-attention to read"),
        ({"count": "both"}, "toca(count='both'): use 'down' or 'up'"),
        ({"interval_slope": 1.0}, "toca(interval_slope=1.0): intervals are finite between -1 and 1"),
        ({"cell": 3}, "cell=3: the grid is 4 x 4; the cell's side must divide both"),
    ],
)
def test_bad_options_are_refused(options: dict[str, Any], message: str) -> None:
    """The message names the option and its value."""
    with pytest.raises(PlanError, match=re.escape(message)):
        plans.toca(case("dit").info, num_steps=6, **options)


def test_toca_and_duca_take_the_same_options() -> None:
    """What `duca` takes from `toca`'s docstring is about options that it has; two of them have other defaults."""
    ours, theirs = (inspect.signature(policy).parameters for policy in (plans.duca, plans.toca))
    assert {name: p.annotation for name, p in ours.items()} == {name: p.annotation for name, p in theirs.items()}
    assert {name for name, p in ours.items() if p.default != theirs[name].default} == {"ratio", "bonus"}
    assert all(option.help for option in options_of(plans.duca).values())


def test_models_that_cannot_are_refused() -> None:
    """No grid for s4, or an MLP whose tokens cannot be computed alone."""
    with pytest.raises(PlanError, match=r"toca\(cell=2\): the model's token grid is unknown: use cell=0"):
        plans.toca(case("separate").info, num_steps=6)
    options: dict[str, Any] = {"num_steps": 6, "interval": 20, "ratio": 0.5, "cell": 0, "score": "random"}
    with pytest.raises(PlanError, match=r"site 'blocks.0.mlp.out' cannot be pruned: aten.conv1d.default convolves"):
        plans.toca(case("conv").info, **options, step_slope=0.0)
