"""TokenCache plans: which I-steps, blocks, tokens and counts follow from importance, and what the controls take."""

from __future__ import annotations

from importlib import resources
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import tcc
from tcc import plans
from tcc.errors import PlanError
from tcc.learned import Importance, Probes, load_learned, save_learned
from tcc.plan import CachePlan, Compute, Reuse, Update
from tcc.train.predictors import FORMS, Sizes, StreamPredictor
from tests.tiny_models import case, dit
from tests.token_plans import BLOCKS, P_STEPS, STEPS, TOKENS, by_block, deep, importance, plan


def kept(made: CachePlan, step: int, block: int, site: str = "mlp.out") -> list[int]:
    """The static tokens of a block at a step."""
    action = made.action(step, f"blocks.{block}.{site}")
    assert isinstance(action, Update)
    assert isinstance(action.tokens, str)
    found: list[int] = made.tokens[action.tokens].tolist()
    return found


# --- tokens


def cell_of(token: int, side: int) -> tuple[int, int]:
    """The cell of a token on the 4 x 4 grid."""
    return token // 4 // side, token % 4 // side


@pytest.mark.parametrize(("cell", "keep", "each"), [(2, 0.25, 1), (2, 0.5, 2), (2, 0.75, 3), (4, 0.5, 8), (4, 0.2, 3)])
def test_every_cell_keeps_its_most_important_tokens(cell: int, keep: float, each: int) -> None:
    """`round(keep * cell^2)` per cell, at every P-step and block, and none of the dropped ones outranks them."""
    made = plan(keep=keep, cell=cell)
    for step in P_STEPS:
        for block in range(BLOCKS):
            chosen, rank = kept(made, step, block), importance().scores[step, block]
            for place in {cell_of(token, cell) for token in range(TOKENS)}:
                inside = [token for token in range(TOKENS) if cell_of(token, cell) == place]
                best = sorted(inside, key=lambda token, rank=rank: -float(rank[token]))[:each]
                assert sorted(best) == [token for token in chosen if token in inside]


@pytest.mark.parametrize(
    ("size", "cell"), [((16, 16), 4), ((8, 24), 4), ((8, 8), 2), ((12, 12), 2), ((4, 16), 2)], ids=str
)
def test_cells_are_of_4_where_there_are_several(size: tuple[int, int], cell: int) -> None:
    """Else of 2: in a grid of 4 x 4 (tokens are patches of 2 x 2), and in one whose sides 4 does not divide."""
    info = dit(input_size=size).info
    options: dict[str, Any] = {"num_steps": 2, "scores": "random", "select": "grid", "share": False}
    made, same = plans.tokencache(info, **options), plans.tokencache(info, **options, cell=cell)
    assert made.policy["cell"] == cell
    assert all(torch.equal(made.tokens[name], kept) for name, kept in same.tokens.items())
    cells, halves = (plans.tokens.grid_cells(info, side) for side in (cell, cell // 2))
    for kept in made.tokens.values():
        assert np.isin(cells, kept.numpy()).sum(1).tolist() == [cell * cell // 2] * len(cells)
        assert len(set(np.isin(halves, kept.numpy()).sum(1))) > 1, "at random inside a cell"


@pytest.mark.parametrize("select", ["grid", "global"])
def test_conditions_among_the_tokens_are_always_kept(select: Any) -> None:
    """Half of the 16 image tokens behind two conditions, which rank lowest."""
    info = case("uvit").info
    scores = torch.rand(4, 5, 18, generator=torch.Generator().manual_seed(0))
    scores[..., :2] = 0.0
    learned = Importance(scores)
    made = plans.tokencache(info, num_steps=4, importance=learned, keep=0.5, select=select)
    assert made.tokens
    assert all(kept[:2].tolist() == [0, 1] for kept in made.tokens.values())
    counts = [action.tokens for action in made.actions.values() if isinstance(action, Update)]
    assert sum(made.tokens[str(name)].numel() - 2 for name in counts) == 8 * len(counts)


def test_both_branches_and_the_keys_of_a_block_keep_the_same_tokens() -> None:
    """By default branch outputs with cached keys."""
    made = plan()
    assert {name.split(".", 2)[2] for name in made.sites} == {"attn.kv", "attn.out", "mlp.out"}
    for step in P_STEPS:
        sets = {made.action(step, f"blocks.2.{site}") for site in ("attn.kv", "attn.out", "mlp.out")}
        assert len(sets) == 1
        assert all(isinstance(action, Compute) for action in made.at(step - 1).values())


def test_global_selection_takes_the_highest_pairs() -> None:
    """The pairs of block and token that rank highest in the mean of the P-steps make the counts."""
    made, scores = plan(select="global", keep=0.3), importance().scores
    pairs = scores[list(P_STEPS)].mean(0)
    threshold = pairs.flatten().sort(descending=True).values[round(0.3 * BLOCKS * TOKENS) - 1]
    counts = (pairs >= threshold).sum(1).tolist()
    assert sum(counts) == round(0.3 * BLOCKS * TOKENS)
    assert len(set(counts)) > 1
    for step in P_STEPS:
        for block, count in enumerate(counts):
            best = scores[step, block].argsort(descending=True)[:count]
            assert kept(made, step, block) == sorted(best.tolist())


def test_a_block_without_important_tokens_is_reused_and_one_without_others_computed() -> None:
    """Counts of 0 and of all tokens need no token set. Where blocks share one set, each keeps as many."""
    scores = by_block(0.5, 0.1, 0.9, 0.5).scores
    made = plan(importance=Importance(scores), select="global", keep=0.5)
    assert made.action(1, "blocks.1.mlp.out") == made.action(1, "blocks.1.attn.kv") == Reuse()
    assert made.action(1, "blocks.2.mlp.out") == made.action(1, "blocks.2.attn.kv") == Compute()
    assert len(kept(made, 1, 0)) + len(kept(made, 1, 3)) == TOKENS
    shared = plan(importance=Importance(scores), select="global", keep=0.5, share=True)
    assert [len(kept(shared, 1, block)) for block in range(BLOCKS)] == [TOKENS // 2] * BLOCKS


@pytest.mark.parametrize("scores", ["learned", "random", "uniform"])
@pytest.mark.parametrize("options", [{}, {"select": "global", "keep": 0.3}, {"pruned": 2}, {"share": True}], ids=str)
def test_controls_have_the_same_counts(scores: Any, options: dict[str, Any]) -> None:
    """The same blocks, counts and MACs; other tokens."""
    learned, control = plan(**options), plan(**options, scores=scores)
    assert control.cost == learned.cost
    assert control.sites == learned.sites
    assert {n: t.numel() for n, t in control.tokens.items()} == {n: t.numel() for n, t in learned.tokens.items()}
    same = all(torch.equal(control.tokens[name], learned.tokens[name]) for name in learned.tokens)
    assert same == (scores == "learned")


def test_random_tokens_are_new_for_every_block_and_step() -> None:
    """And the same for the same seed."""
    made = plan(scores="random", importance=None)
    assert len({tuple(t.tolist()) for t in made.tokens.values()}) > len(made.tokens) // 2
    again, other = (plan(scores="random", importance=None, seed=seed) for seed in (0, 1))
    assert all(torch.equal(again.tokens[name], made.tokens[name]) for name in made.tokens)
    assert any(not torch.equal(other.tokens[name], made.tokens[name]) for name in made.tokens)


def test_uniform_tokens_are_spread_evenly() -> None:
    """A checkerboard over the cells; over the sequence, gaps of about 1 / keep."""
    assert kept(plan(scores="uniform", importance=None), 1, 0) == [0, 2, 5, 7, 8, 10, 13, 15]
    spread = kept(plan(scores="uniform", importance=None, select="global", keep=0.25), 1, 0)
    gaps = [b - a for a, b in zip(spread, [*spread[1:], spread[0] + TOKENS], strict=True)]
    assert len(spread) == 4
    assert max(gaps) <= 6
    assert min(gaps) >= 3


def test_shared_tokens_are_the_best_in_the_mean() -> None:
    """One set per P-step, and one merged slot where the keys allow it."""
    made = plan(share=True, level="block", attention="kept")
    assert list(made.tokens) == ["step1", "step3", "step5"]
    mean = importance().scores[3].mean(0)
    for place in {cell_of(token, 2) for token in range(TOKENS)}:
        inside = [token for token in range(TOKENS) if cell_of(token, 2) == place]
        best = sorted(inside, key=lambda token: -float(mean[token]))[:2]
        assert set(best) <= set(made.tokens["step3"].tolist())
    assert made.slot_bytes == 2 * TOKENS * 32 * 4


def test_one_set_per_cycle() -> None:
    """The P-steps of a cycle keep the tokens that are best in the mean over them."""
    made, scores = plan(k1=2, k2=2, sets="cycle", select="global", share=False), importance().scores
    assert str(made.schedule) == "IPPIPP"
    assert kept(made, 1, 0) == kept(made, 2, 0) != kept(made, 4, 0)
    counts = len(kept(made, 4, 1))
    assert kept(made, 4, 1) == sorted(scores[4:6, 1].mean(0).argsort(descending=True)[:counts].tolist())


def test_counts_of_a_cycle_are_those_of_its_set() -> None:
    """With `adapt="step"`, a block keeps as many tokens at all P-steps of a cycle as its mean importance there says."""
    scores = importance().scores.clone()
    scores[1] *= torch.tensor([0.1, 0.4, 0.7, 1.0])[:, None]
    scores[2] *= torch.tensor([1.0, 0.7, 0.4, 0.1])[:, None]
    options = {"importance": Importance(scores), "k1": 2, "k2": 2, "sets": "cycle", "select": "global", "share": False}
    made = plan(**options, adapt="step", keep=0.5)
    mean = scores[1:3].mean(0)
    best = mean.flatten().argsort(descending=True)[: BLOCKS * TOKENS // 2]
    for block in range(BLOCKS):
        expected = sorted(int(at) % TOKENS for at in best if int(at) // TOKENS == block)
        assert kept(made, 1, block) == kept(made, 2, block) == expected


def test_rotation_lets_tokens_take_turns() -> None:
    """A token that was kept comes after all others at the next P-step, in each block by itself."""
    made = plan(rotate=1.0, keep=0.5)
    for block in range(BLOCKS):
        first, second, third = (set(kept(made, step, block)) for step in P_STEPS)
        assert first | second == set(range(TOKENS))
        assert third == set(kept(plan(keep=0.5), 5, block))
    gentle = plan(rotate=1e-9, keep=0.5)
    assert kept(gentle, 3, 1) == kept(plan(keep=0.5), 3, 1)


def test_without_refresh_nothing_is_stored_on_p_steps() -> None:
    """Updates do not store, and MACs are the same."""
    made = plan(refresh=False, k1=2, k2=2)
    assert all(not a.store for a in made.actions.values() if isinstance(a, Update))
    assert made.cost is not None
    assert made.macs == plan(k1=2, k2=2).macs
    stored = plan(refresh=True)
    assert all(a.store for a in stored.actions.values() if isinstance(a, Update))


# --- blocks


def test_the_least_important_blocks_are_pruned() -> None:
    """The others are computed in full: the plan does not name them."""
    made = plan(importance=by_block(0.4, 0.2, 0.9, 0.3), pruned=2)
    assert made.policy["blocks"] == [1, 3]
    assert {name.split(".")[1] for name in made.sites} == {"1", "3"}


def test_conditions_do_not_decide_which_blocks_are_pruned() -> None:
    """They are computed everywhere, so what was learned for them says nothing."""
    scores = torch.full((4, 5, 18), 0.5)
    scores[:, 0, :2] = 0.0
    scores[:, 3, 2:] = torch.rand(4, 16, generator=torch.Generator().manual_seed(0)) * 0.8
    options = {"num_steps": 4, "importance": Importance(scores), "keep": 0.5, "pruned": 1, "select": "global"}
    assert plans.tokencache(case("uvit").info, **options).policy["blocks"] == [3]


def test_blocks_can_be_chosen_at_every_step() -> None:
    """`adapt="step"`: a block that is not pruned at a step is computed and stored there."""
    scores = by_block(0.4, 0.2, 0.9, 0.3).scores.clone()
    scores[3] = by_block(0.1, 0.8, 0.9, 0.3).scores[3]
    made = plan(importance=Importance(scores), pruned=1, adapt="step")
    assert isinstance(made.action(1, "blocks.1.mlp.out"), Update)
    assert isinstance(made.action(3, "blocks.0.mlp.out"), Update)
    assert made.action(3, "blocks.1.mlp.out") == made.action(1, "blocks.0.mlp.out") == Compute()


def test_the_last_blocks_can_be_left_in_full() -> None:
    """They are no candidates, also where they matter least."""
    made = plan(importance=by_block(0.4, 0.5, 0.6, 0.1), last_full=1, pruned=2)
    assert made.policy["blocks"] == [0, 1]


def test_a_model_without_a_block_that_can_be_pruned_is_refused() -> None:
    """With the first reason."""
    info = case("conv").info
    with pytest.raises(
        PlanError, match=r"no block can be pruned: site 'blocks.0.mlp.out' cannot be pruned: aten.conv1d"
    ):
        plans.tokencache(info, num_steps=4, scores="random", select="global")


def test_all_p_steps_share_a_variant() -> None:
    """Different tokens per block and step are inputs; a choice of blocks per step is a variant each."""
    info = deep().info

    def variants(made: CachePlan) -> int:
        return len(tcc.program.build_program(info.captured, info.analysis, made, check=False).variants)

    assert variants(plan(refresh=False)) == 2
    assert variants(plan(select="global", keep=0.3, refresh=False)) == 2
    assert variants(plan(pruned=1, adapt="step", refresh=False)) > 2


# --- I-steps


@pytest.mark.parametrize(
    ("mass", "count", "steps"),
    [
        ([1.0] * 10, 5, (0, 2, 4, 6, 8)),
        ([1.0] * 10, 10, tuple(range(10))),
        ([1.0] * 10, 1, (0,)),
        ([1.0] * 8 + [4.0, 4.0], 4, (0, 4, 8, 9)),
        ([1.0, 1.0, 1.0, 1.0, 2.0, 2.0, 2.0, 2.0], 3, (0, 4, 6)),
        ([0.0, 0.0, 0.0, 9.0, 0.0, 0.0], 3, (0, 4, 5)),
        ([9.0, 1.0, 1.0, 1.0], 2, (0, 2)),  # nothing is learned for the first step: it counts as the second
        ([5.0], 1, (0,)),
    ],
)
def test_percentile_placement(mass: list[float], count: int, steps: tuple[int, ...]) -> None:
    """Stretches of equal importance; as many I-steps as asked for, the first step among them."""
    assert plans.percentile_steps(torch.tensor(mass), count) == steps


@pytest.mark.parametrize(
    ("mass", "count", "message"),
    [
        ([1.0, 1.0], 3, "i_steps=3: expected a whole number, 1..2"),
        ([1.0, 1.0], 0, "i_steps=0"),
        ([1.0, float("nan")], 1, "finite, not negative, and not all zero"),
        ([1.0, -1.0], 1, "finite, not negative"),
        ([0.0, 0.0], 1, "not all zero"),
    ],
)
def test_percentiles_need_importances(mass: list[float], count: int, message: str) -> None:
    """And a count that the run has room for."""
    with pytest.raises(PlanError, match=message):
        plans.percentile_steps(torch.tensor(mass), count)


def test_i_steps_where_importance_is_dense() -> None:
    """`percentile` has as many I-steps as `tprr`, at other places; `even` and a list of steps need no importance."""
    scores = torch.full((STEPS, BLOCKS, TOKENS), 1 / 8)
    scores[4:] = 6 / 8
    scores += torch.linspace(0, 1e-3, TOKENS)  # tokens that rank alike are refused
    dense = plan(importance=Importance(scores), schedule="percentile")
    assert str(plan().schedule) == "IPIPIP"
    assert str(dense.schedule) == "IPPPII"
    assert str(plan(schedule="percentile", i_steps=1).schedule) == "IPPPPP"
    assert str(plan(scores="random", importance=None, schedule="even", i_steps=3).schedule) == "IPIPPI"
    assert str(plan(i_steps=[0, 4]).schedule) == "IPPPIP"


@pytest.mark.parametrize("form", ["table", "network", "stream"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_percentiles_of_an_importance_held_at_a_mean_are_refused(form: str, dtype: torch.dtype, tmp_path: Path) -> None:
    """Its steps differ by rounding alone, also that of a file in half precision; with a price, they differ truly."""
    sizes = Sizes(STEPS, BLOCKS, TOKENS, width=deep().info.analysis.stream_shape[-1])
    placed: dict[str, Any] = {"schedule": "percentile", "i_steps": 3, "scores": "random"}
    spreads = []
    for mean in (0.3, None):
        predictor, draw = FORMS[form](sizes, mean=mean), torch.Generator().manual_seed(1)
        for parameter in predictor.parameters():
            torch.nn.init.normal_(parameter, std=0.5, generator=draw)
        if isinstance(predictor, StreamPredictor):
            predictor.calibrate([torch.randn(2, TOKENS, sizes.width, generator=draw) for _ in range(STEPS)])
        save_learned(predictor.learned(), tmp_path / "learned", dtype)
        learned = load_learned(tmp_path / "learned")
        assert isinstance(learned, Importance | Probes)
        means = (learned.scores if isinstance(learned, Importance) else learned.mean).double().mean(dim=(1, 2))
        spreads.append(float((means.max() - means.min()) / means.max()))
        if mean is None:
            assert len(plan(importance=learned, **placed).schedule.i_steps) == 3
        else:
            message = (
                r"schedule='percentile': the importance is 0\.(3|29\d+|30\d+) on average at every step.*\(`--lambda`\)"
            )
            with pytest.raises(PlanError, match=message):
                plan(importance=learned, **placed)
    assert 0 < spreads[0] < spreads[1] / 10, "rounding, and no exact equality"


def test_tokens_that_rank_alike_are_refused() -> None:
    """At a step that was not learned, the first tokens would be kept again and again; taking turns is allowed."""
    scores = torch.rand(STEPS, BLOCKS, TOKENS, generator=torch.Generator().manual_seed(0))
    scores[3] = 0.5
    with pytest.raises(PlanError, match="step 3, block 0: the importance ranks all tokens alike"):
        plan(importance=Importance(scores))
    assert plan(importance=Importance(scores), rotate=1.0).tokens
    assert plan(importance=Importance(scores), i_steps=[0, 3]).tokens


# --- shipped


@pytest.mark.parametrize(
    ("name", "steps"), [("importance-ddim50", 50), ("importance-ddim20", 20), ("probes-ddim50", 50)]
)
def test_shipped_importances_fit_the_reference_model(name: str, steps: int) -> None:
    """They rank the tokens of every step, those of the garment before those of the black border."""
    with resources.as_file(resources.files("tcc.data") / f"{name}.safetensors") as path:
        learned = load_learned(path)
        assert path.stat().st_size < 200_000
    assert isinstance(learned, Importance | Probes)
    scores = learned.scores if isinstance(learned, Importance) else learned.mean
    assert scores.shape == (steps, 12, 64)
    assert bool(((scores >= 0) & (scores <= 1)).all())
    if isinstance(learned, Importance):  # the means of probes rank nothing: their scores do, in the graph
        assert all(len(ranks.unique()) > 32 for ranks in scores.mean(1))
    grid = scores.mean((0, 1)).view(8, 8)
    inner = grid[1:-1, 1:-1]
    assert float(inner.mean()) > (float(grid.sum()) - float(inner.sum())) / 28 + 0.003
