"""Policies: which steps and tokens they choose, what their plans cost, and what they refuse."""

from __future__ import annotations

import inspect
import re
from typing import Any

import pytest
import torch

from tcc import plans
from tcc.errors import PlanError
from tcc.plan import Compute, Reuse, Update
from tcc.plan.site_name import SiteName
from tests.tiny_models import Case, case, dit

# --- schedules


def test_full_computes_everything() -> None:
    """No actions, no slots, a bound of 1."""
    info = case("dit").info
    plan = plans.full(info, num_steps=7)
    assert (str(plan.schedule), dict(plan.actions)) == ("IIIIIII", {})
    assert (plan.bound, plan.slot_bytes, plan.macs) == (1.0, 0, 7 * info.macs)
    assert plan.model == info.key


def test_fora_computes_the_published_steps() -> None:
    """N = 3, T = 50: the descending indices 49, 48, 45, ..., 3, 0 are computed, 18 steps."""
    plan = plans.fora(case("dit").info, num_steps=50, interval=3)
    indices = [49 - step for step in plan.schedule.i_steps]
    assert indices == [49, *range(48, -1, -3)]
    assert len(indices) == 18


@pytest.mark.parametrize(
    ("num_steps", "interval", "schedule"),
    [(6, 1, "IIIIII"), (6, 2, "IIPIPI"), (7, 2, "IPIPIPI"), (8, 3, "IIPPIPPI"), (3, 9, "IPI"), (1, 3, "I")],
)
def test_fora_schedules(num_steps: int, interval: int, schedule: str) -> None:
    """The first step, the last step, and every interval-th before it."""
    assert str(plans.fora(case("dit").info, num_steps=num_steps, interval=interval).schedule) == schedule


@pytest.mark.parametrize("sites", ["out", "delta"])
def test_fora_reuses_all_branches(sites: Any) -> None:
    """Attention and MLP of every block, before the gate or after it."""
    plan = plans.fora(case("dit").info, num_steps=4, interval=2, sites=sites)
    assert plan.sites == tuple(f"blocks.{b}.{branch}.{sites}" for b in (0, 1) for branch in ("attn", "mlp"))
    assert {type(a) for s, a in plan.column(plan.sites[0]) if s == 2} == {Reuse}
    assert plan.policy == {"name": "fora", "interval": 2, "sites": sites, "count": "down"}


@pytest.mark.parametrize(("num_steps", "schedule"), [(6, "IPPIPP"), (7, "IPPIPPI"), (1, "I")])
def test_fora_counted_from_the_first_step(num_steps: int, schedule: str) -> None:
    """`count="up"`: every third step from step 0 on."""
    assert str(plans.fora(case("dit").info, num_steps=num_steps, count="up").schedule) == schedule


#: (num_steps, k1, k2, boundary): I-steps where K counts P-steps, I-steps where K is the cycle's length
TPRR = {
    (10, 3, 1, 0.5): ((0, 4, 8), (0, 3, 6, 7, 8, 9)),
    (12, 2, 1, 0.5): ((0, 3, 6, 8, 10), (0, 2, 4, 6, 7, 8, 9, 10, 11)),
    (20, 4, 2, 0.6): ((0, 5, 10, 15, 18), (0, 4, 8, 12, 14, 16, 18)),
    (6, 2, 2, 0.0): ((0, 3), (0, 2, 4)),
    (6, 1, 3, 1.0): ((0, 2, 4), (0, 1, 2, 3, 4, 5)),
    (1, 5, 5, 0.5): ((0,), (0,)),
}


@pytest.mark.parametrize("options", TPRR, ids=str)
def test_tprr_steps_in_both_readings(options: tuple[int, int, int, float]) -> None:
    """`p_steps`: K P-steps after each I-step; `length`: one I-step in K steps."""
    by_p_steps, by_length = TPRR[options]
    assert plans.tprr_steps(*options, "p_steps") == by_p_steps
    assert plans.tprr_steps(*options, "length") == by_length


def test_an_interval_of_no_p_steps_computes_everything() -> None:
    """K = 0 P-steps, or a cycle of 1."""
    assert plans.tprr_steps(4, 0, 0, 0.5, "p_steps") == plans.tprr_steps(4, 1, 1, 0.5, "length") == (0, 1, 2, 3)


#: What TokenCache v1 describes, beside its schedule.
KEPT_BLOCKS: dict[str, Any] = {"attention": "kept", "level": "block"}


def test_tprr_has_the_ablated_defaults() -> None:
    """Where `tprr` and `tokencache` have an option in common, and the plan of `tcc plan` is what it says."""
    ours, ablated = (inspect.signature(policy).parameters for policy in (plans.tprr, plans.tokencache))
    for name in ("k1", "k2", "boundary", "cycle", "attention", "level"):
        assert ours[name].default == ablated[name].default, name
    plan = plans.tprr(case("dit").info, num_steps=4)
    assert str(plan.schedule) == "IPIP"
    assert {SiteName.parse(site).kind for site in plan.sites} == {"kv", "out"}
    assert plan.action(1, "blocks.0.mlp.out") == Update("kept0", "cached")


def test_tprr_updates_every_chosen_block_on_p_steps() -> None:
    """I-steps compute, P-steps update with one token set; other blocks are not named."""
    info = case("dit").info
    plan = plans.tprr(info, num_steps=6, k1=2, k2=2, blocks=[1], keep=0.25, tokens="uniform", **KEPT_BLOCKS)
    assert plan.sites == ("blocks.1.delta",)
    assert [action for _, action in plan.column("blocks.1.delta")] == [
        Compute(),
        Update("kept0"),
        Update("kept0"),
    ] * 2
    assert plan.tokens["kept0"].tolist() == [0, 4, 8, 12]
    assert plan.policy["blocks"] == [1]


@pytest.mark.parametrize(
    ("level", "sites"),
    [
        ("block", ["blocks.0.delta"]),
        ("branch", ["blocks.0.attn.delta", "blocks.0.mlp.delta"]),
        ("out", ["blocks.0.attn.out", "blocks.0.mlp.out"]),
    ],
)
def test_tprr_levels(level: Any, sites: list[str]) -> None:
    """One site per block, or one per branch, after or before the gate; `cached` adds the keys."""
    info = case("dit").info
    plan = plans.tprr(info, num_steps=4, blocks=[0], level=level, attention="kept")
    assert list(plan.sites) == sites
    plan = plans.tprr(info, num_steps=4, blocks=[0], level=level, attention="cached")
    assert list(plan.sites) == ["blocks.0.attn.kv", *sites]


# --- tokens


@pytest.mark.parametrize(
    ("keep", "turn", "kept"),
    [
        (1.0, 0, list(range(16))),
        (0.5, 0, [0, 2, 4, 6, 8, 10, 12, 14]),
        (0.5, 1, [1, 3, 5, 7, 9, 11, 13, 15]),
        (0.25, 3, [3, 7, 11, 15]),
        (0.01, 0, [0]),
    ],
)
def test_uniform_tokens(keep: float, turn: int, kept: list[int]) -> None:
    """Every 1/r-th token, at least one; a turn shifts them."""
    assert plans.choose_tokens(case("dit").info, keep, "uniform", turn=turn).tolist() == kept


def test_random_tokens_are_the_seeds() -> None:
    """As many as asked, sorted and distinct; the same for one seed and turn, others for others."""
    info = case("dit").info
    first = plans.choose_tokens(info, 0.5, "random", seed=1)
    assert first.tolist() == sorted(set(first.tolist()))
    assert len(first) == 8
    assert torch.equal(first, plans.choose_tokens(info, 0.5, "random", seed=1))
    assert not torch.equal(first, plans.choose_tokens(info, 0.5, "random", seed=2))
    assert not torch.equal(first, plans.choose_tokens(info, 0.5, "random", seed=1, turn=1))


def cells(kept: torch.Tensor, w: int, cell: int) -> list[int]:
    """How many kept tokens each cell of the grid has."""
    counts: dict[tuple[int, int], int] = {}
    for token in kept.tolist():
        at = (token // w // cell, token % w // cell)
        counts[at] = counts.get(at, 0) + 1
    return list(counts.values())


@pytest.mark.parametrize("cell", [1, 2, 4])
@pytest.mark.parametrize("keep", [0.25, 0.5, 0.75, 1.0])
@pytest.mark.parametrize("turn", [0, 1, 5])
def test_the_checkerboard_keeps_as_many_in_every_cell(cell: int, keep: float, turn: int) -> None:
    """`round(keep * cell^2)` tokens in each of the cells, and at least one."""
    kept = plans.choose_tokens(case("dit").info, keep, "checkerboard", cell=cell, turn=turn)
    each = max(1, round(keep * cell * cell))
    assert cells(kept, 4, cell) == [each] * (16 // cell**2)


def test_half_a_checkerboard_is_a_checkerboard() -> None:
    """Fields of one colour."""
    kept = plans.choose_tokens(case("dit").info, 0.5, "checkerboard", cell=2)
    assert kept.tolist() == [0, 2, 5, 7, 8, 10, 13, 15]


def test_the_highest_scores_are_kept_cell_by_cell() -> None:
    """A cell of low scores keeps as many as a cell of high ones."""
    scores = torch.zeros(16)
    scores[[0, 1, 4, 5]] = torch.tensor([9.0, 8.0, 7.0, 6.0])  # the first cell
    scores[[3, 10, 13]] = 0.5
    kept = plans.choose_tokens(case("dit").info, 0.25, scores, cell=2)
    assert kept.tolist() == [0, 3, 10, 13]
    kept = plans.choose_tokens(case("dit").info, 0.25, scores, cell=4)
    assert kept.tolist() == [0, 1, 4, 5]


def test_a_grid_that_is_not_square_is_cut_into_square_cells() -> None:
    """2 x 6 tokens in cells of 2 x 2."""
    kept = plans.choose_tokens(wide().info, 0.25, "checkerboard", cell=2)
    assert kept.tolist() == [0, 2, 4]


def wide() -> Case:
    """A DiT of 2 x 6 tokens."""
    if not _wide:
        _wide.append(dit(input_size=(4, 12)))
    return _wide[0]


_wide: list[Case] = []

# --- cost


def p_step_macs(which: Case, **options: Any) -> int:
    """MACs of a P-step for one image."""
    plan = plans.tprr(which.info, num_steps=2, k1=1, tokens="uniform", **options)
    assert plan.cost is not None
    assert plan.cost.step_macs[0] == which.info.macs
    return plan.cost.step_macs[1]


@pytest.mark.parametrize("r", [0.25, 0.5, 0.75])
@pytest.mark.parametrize("level", ["block", "branch"])
def test_the_cost_of_every_attention_mode(r: float, level: str) -> None:
    """Per pruned block, exactly: kept 12 d^2 rN + 2 (rN)^2 d, current 2 d^2 N + 10 d^2 rN + 2 r N^2 d, and so on."""
    which, n, d = case("dit"), 16, 32
    k = round(r * n)
    block = 12 * d * d * n + 2 * n * n * d
    costs = {
        "kept": 12 * d * d * k + 2 * k * k * d,
        "current": 2 * d * d * n + 10 * d * d * k + 2 * k * n * d,
        "cached": 12 * d * d * k + 2 * k * n * d,
    }
    for attention, cost in costs.items():
        macs = p_step_macs(which, keep=r, attention=attention, level=level)
        assert which.info.macs - macs == 2 * (block - cost), attention


@pytest.mark.parametrize("r", [0.25, 0.5, 0.75])
@pytest.mark.parametrize("level", ["branch", "out"])
def test_the_cost_of_reused_attention(r: float, level: Any) -> None:
    """Attention from the cache, MLP on the kept tokens: 8 d^2 rN per block."""
    which, n, d = case("dit"), 16, 32
    macs = p_step_macs(which, keep=r, level=level, attention="reused")
    block = 12 * d * d * n + 2 * n * n * d
    assert which.info.macs - macs == 2 * (block - 8 * d * d * round(r * n))


def test_reusing_every_branch_leaves_what_is_not_in_a_branch() -> None:
    """FORA's P-steps cost the embedding, the head and the conditioning."""
    info = case("dit").info
    plan = plans.fora(info, num_steps=3, interval=2)
    assert plan.cost is not None
    branches = sum(s.macs for s in info.sites.values() if s.kind == "out") // info.batch
    assert plan.cost.step_macs == (info.macs, info.macs - branches, info.macs)
    assert plan.bound == 3 * info.macs / sum(plan.cost.step_macs)


def test_slots_are_counted_for_the_captured_batch() -> None:
    """One merged delta of [2, 16, 32] float32; with cached keys, K and V of each block beside it."""
    info = case("dit").info
    one = 2 * 16 * 32 * 4
    assert plans.tprr(info, num_steps=4, attention="kept", level="block").slot_bytes == one
    assert plans.tprr(info, num_steps=4, attention="cached", level="block").slot_bytes == one + 4 * one
    assert plans.fora(info, num_steps=4).slot_bytes == 4 * one


# --- refusals

BAD = {
    "interval": (lambda i: plans.fora(i, num_steps=4, interval=0), "interval=0: expected a whole number, 1 or more"),
    "broken interval": (lambda i: plans.fora(i, num_steps=4, interval=1.5), "interval=1.5: expected a whole number"),
    "interval True": (lambda i: plans.fora(i, num_steps=4, interval=True), "interval=True: expected a whole number"),
    "broken steps": (lambda i: plans.fora(i, num_steps=4.0), "num_steps=4.0: expected a whole number, 1 or more"),
    "count": (lambda i: plans.fora(i, num_steps=4, count="both"), "fora(count='both'): use 'down' or 'up'"),
    "sites": (lambda i: plans.fora(i, num_steps=4, sites="kv"), "sites='kv': use 'out' (before the gate) or 'delta'"),
    "k1": (lambda i: plans.tprr(i, num_steps=4, k1=-1), "k1=-1: expected a whole number, 0 or more"),
    "broken k1": (lambda i: plans.tprr(i, num_steps=4, k1=1.5), "k1=1.5: expected a whole number, 0 or more"),
    "cycle of 0": (
        lambda i: plans.tprr(i, num_steps=4, k2=0, cycle="length"),
        "k2=0: expected a whole number, 1 or more",
    ),
    "boundary": (lambda i: plans.tprr(i, num_steps=4, boundary=1.5), "boundary=1.5: expected a share, 0..1"),
    "keep 0": (lambda i: plans.tprr(i, num_steps=4, keep=0.0), "keep=0.0: the keep ratio is in (0, 1]"),
    "keep 0, rotating": (lambda i: plans.tprr(i, num_steps=4, keep=0.0, rotate=True), "keep=0.0: the keep ratio"),
    "keep inf, rotating": (lambda i: plans.tprr(i, num_steps=4, keep=float("inf"), rotate=True), "keep=inf: the keep"),
    "keep above 1": (lambda i: plans.tprr(i, num_steps=4, keep=1.01), "keep=1.01: the keep ratio is in (0, 1]"),
    "keep below 0": (lambda i: plans.tprr(i, num_steps=4, keep=-0.5), "keep=-0.5: the keep ratio is in (0, 1]"),
    "keep_last 0": (lambda i: plans.tprr(i, num_steps=4, keep_last=0.0), "keep_last=0.0: the keep ratio is in (0, 1]"),
    "keep_last above keep": (
        lambda i: plans.tprr(i, num_steps=4, keep=0.5, keep_last=0.75),
        "keep_last=0.75: the last block keeps no more than the first, and keep=0.5",
    ),
    "keep_last of tokens that are not nested": (
        lambda i: plans.tprr(i, num_steps=4, keep_last=0.25, tokens="uniform"),
        "keep_last with tokens='uniform': the tokens of a smaller share are not among those of a larger one",
    ),
    "keep NaN": (lambda i: plans.tprr(i, num_steps=4, keep=float("nan")), "keep=nan: the keep ratio is in (0, 1]"),
    "attention": (
        lambda i: plans.tprr(i, num_steps=4, attention="all"),
        "attention='all': use one of kept, current, cached, reused",
    ),
    "attention of blocks": (
        lambda i: plans.tprr(i, num_steps=4, attention="reused", level="block"),
        "attention='reused' keeps the branches of a block apart: use level='branch' or 'out'",
    ),
    "level": (lambda i: plans.tprr(i, num_steps=4, level="layer"), "level='layer': use one of block, branch, out"),
    "block": (lambda i: plans.tprr(i, num_steps=4, blocks=[2]), "there is no block 2; the model has blocks 0..1"),
    "blocks as text": (lambda i: plans.tprr(i, num_steps=4, blocks="0-2"), "blocks='0-2': give a list of blocks"),
    "negative block": (lambda i: plans.tprr(i, num_steps=4, blocks=[-1]), "there is no block -1"),
    "tokens": (lambda i: plans.tprr(i, num_steps=4, tokens="best"), "tokens='best': use 'uniform', 'random',"),
    "cell": (lambda i: plans.tprr(i, num_steps=4, cell=3), "cell=3: the grid is 4 x 4; the cell's side must divide"),
    "cell of 0": (lambda i: plans.tprr(i, num_steps=4, cell=0), "cell=0: expected a whole number, 1 or more"),
    "few scores": (
        lambda i: plans.tprr(i, num_steps=4, tokens=torch.zeros(3)),
        "scores have shape [3], expected one per token: [16]",
    ),
    "NaN score": (
        lambda i: plans.tprr(i, num_steps=4, tokens=torch.tensor([0.0] * 7 + [float("nan")] + [0.0] * 8)),
        "the score of token 7 is nan: scores must be finite",
    ),
    "infinite score": (
        lambda i: plans.tprr(i, num_steps=4, tokens=torch.tensor([float("inf")] + [0.0] * 15)),
        "the score of token 0 is inf: scores must be finite",
    ),
    "steps": (lambda i: plans.full(i, num_steps=0), "num_steps=0"),
}


@pytest.mark.parametrize("kind", BAD)
def test_a_policy_refuses_what_it_cannot_do(kind: str) -> None:
    """The message names the option, its value and what it may be."""
    make, message = BAD[kind]
    with pytest.raises(PlanError, match=re.escape(message)):
        make(case("dit").info)


def test_a_block_that_cannot_be_pruned_is_refused_with_the_reason() -> None:
    """And with the remedy."""
    message = r"site 'blocks.0.delta' cannot be pruned: aten.conv1d.default convolves .*Leave its block out"
    with pytest.raises(PlanError, match=message):
        plans.tprr(case("conv").info, num_steps=4, tokens="uniform", level="block")


def test_a_block_without_a_delta_is_refused() -> None:
    """Its branches can be pruned, and the message says so."""
    info = case("rescaled").info
    with pytest.raises(PlanError, match=r"block 'blocks.0' has no delta of its own, .* use level='branch'"):
        plans.tprr(info, num_steps=4, tokens="uniform", level="block")
    assert plans.tprr(info, num_steps=4, tokens="uniform", level="branch").bound > 1


def test_grid_cells_need_a_grid() -> None:
    """A model of bare tokens can be pruned by position."""
    with pytest.raises(
        PlanError,
        match=r"the model's token grid is unknown for 12 tokens: .* choose among all tokens: tokens='uniform'",
    ):
        plans.tprr(case("separate").info, num_steps=4)


@pytest.mark.parametrize("tokens", ["uniform", "random", "checkerboard", torch.arange(18.0)])
def test_tokens_that_are_not_image_tokens_are_always_kept(tokens: plans.tokens.Choice | torch.Tensor) -> None:
    """The keep ratio counts image tokens; the two conditions before them come on top, whatever their scores."""
    info = case("uvit").info
    kept = plans.choose_tokens(info, 0.5, tokens)
    assert kept[:2].tolist() == [0, 1]
    assert kept.numel() == 2 + 8
    assert torch.equal(kept, kept.unique())
    assert int(kept[-1]) < info.num_tokens == 18


def test_grid_cells_begin_at_the_first_image_token() -> None:
    """Each 2 x 2 cell of the 4 x 4 grid behind two conditions keeps its highest score."""
    scores = torch.zeros(18)
    scores[[2, 5, 14, 13]] = 1.0
    kept = plans.choose_tokens(case("uvit").info, 0.25, scores)
    assert kept.tolist() == [0, 1, 2, 5, 13, 14]
    assert plans.tokens.grid_cells(case("uvit").info, 2).tolist()[3] == [12, 13, 16, 17]


def test_turns_are_no_more_than_tokens() -> None:
    """A tiny keep ratio keeps one token at a time, and a round through all of them is as long as the stream."""
    info = case("dit").info
    plan = plans.tprr(info, num_steps=4, keep=1e-9, tokens="uniform", rotate=True)
    assert len(plan.tokens) == info.num_tokens
    assert {kept.numel() for kept in plan.tokens.values()} == {1}


@pytest.mark.parametrize("given", [None, torch.nn.Linear(2, 2)])
def test_a_policy_is_for_what_inspect_returns(given: Any) -> None:
    """The model itself is easily given instead."""
    with pytest.raises(PlanError, match=r"fora\(info, ...\) takes what tcc.inspect\(model, ...\) returns, got (N|L)"):
        plans.fora(given, num_steps=4)
