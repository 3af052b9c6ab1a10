"""Dynamic token sets: what is chosen, that it is compiled as it is defined, and that samples do not mix."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

import tcc
from tcc.lowering import lower
from tcc.passes.graph import write_code
from tcc.passes.tokens import gather_tokens
from tcc.plan import Action, CachePlan, Compute, Reuse, TopK, Update
from tcc.plan.scores import Attended, Entropy, Fixed, Norm, Score, Stale
from tcc.program import build_program
from tcc.runtime import Session
from tests.dynamic_plans import SCORES, STEPS, dynamic_plan
from tests.odd_styles import ODD
from tests.running import CLOSE, call, session
from tests.tiny_models import Case, case, dit, relative_error, tensor_of

MLP = "blocks.0.mlp.out"


def kept_of(reference: tcc.Reference) -> torch.Tensor:
    """The tokens that the last step of a reference kept, as a mask."""
    (kept,) = reference._chosen.values()
    return kept


def chosen(score: Score, which: Case | None = None, count: int = 4) -> torch.Tensor:
    """What a score of fixed tables keeps of the tiny DiT's 16 tokens, on its 4 x 4 grid."""
    which = which or case("dit")
    plan = CachePlan(
        2,
        {(1, MLP): Update(TopK("s", count))},
        scores={"s": score},
        tables={"t": torch.arange(16.0), "e": torch.zeros(16)},
    )
    reference = tcc.Reference(which.model, plan, which.info)
    for step in range(2):
        call(reference, which, step)
    return kept_of(reference)


def positions(kept: torch.Tensor) -> list[int]:
    """The kept positions of the first sample."""
    return torch.atleast_2d(kept)[0].nonzero().flatten().tolist()


def test_the_highest_scores_are_kept() -> None:
    """Of equal ones, the first; of negated ones, the lowest."""
    assert positions(chosen(Score(((1.0, Fixed("t")),)))) == [12, 13, 14, 15]
    assert positions(chosen(Score(((-1.0, Fixed("t")),)))) == [0, 1, 2, 3]
    assert positions(chosen(Score(((1.0, Fixed("e")),)))) == [0, 1, 2, 3]


def test_every_cell_keeps_the_same_number() -> None:
    """In cells of 2 x 2, the last token of each; with half of the tokens, the lower row."""
    score = Score(((1.0, Fixed("t")),), cell=2, per_cell=True)
    assert positions(chosen(score)) == [5, 7, 13, 15]
    assert positions(chosen(score, count=8)) == [4, 5, 6, 7, 12, 13, 14, 15]


def test_the_best_of_a_cell_gets_a_bonus() -> None:
    """Scores 5 and 7 become 10 and 14; 13 and 15 become 26 and 30: then 14, 12 is not enough."""
    assert positions(chosen(Score(((1.0, Fixed("t")),), cell=2, bonus=1.0))) == [7, 13, 14, 15]


def test_a_shared_set_is_one_set() -> None:
    """The mean over the samples decides."""
    assert chosen(Score(((1.0, Fixed("t")),), shared=True)).shape == (16,)
    assert chosen(Score(((1.0, Fixed("t")),))).shape == (2, 16)


@pytest.mark.parametrize("kind", SCORES)
@pytest.mark.parametrize("attention", ["kept", "current", "cached"])
def test_compiled_plans_agree_with_the_reference(kind: str, attention: tcc.plan.Attention) -> None:
    """Every term, in every attention mode, at branches; every pass is verified."""
    which = case("dit")
    plan = dynamic_plan(which, SCORES[kind], attention=attention)
    run, reference = session(which, plan, check=True), tcc.Reference(which.model, plan, which.info)
    for step in range(2 * STEPS):
        assert relative_error(call(run, which, step), call(reference, which, step)) <= CLOSE


@pytest.mark.parametrize(
    "options", [{"cell": 2, "bonus": 0.6}, {"cell": 2, "per_cell": True}, {"shared": True}], ids=str
)
def test_ways_to_take_the_highest_agree_with_the_reference(options: dict[str, float]) -> None:
    """ToCa's bonus, grid-based pruning, and one set for the batch."""
    which = case("dit")
    plan = dynamic_plan(which, replace(SCORES["stale"], **options), keep=lambda _: 8, only="mlp")
    run, reference = session(which, plan), tcc.Reference(which.model, plan, which.info)
    for step in range(STEPS):
        assert relative_error(call(run, which, step), call(reference, which, step)) <= CLOSE


@pytest.mark.parametrize("kind", ["norm, stored", "norm of values", "attended", "probe", "stale"])
def test_every_sample_keeps_its_own_tokens(kind: str) -> None:
    """The sets differ within the batch, and each sample comes out as it does alone."""
    both = dit(batch=2)
    plan = dynamic_plan(both, SCORES[kind], only="mlp")
    reference, run = tcc.Reference(both.model, plan, both.info), session(both, plan)
    alone = []
    for sample in range(2):
        one = Case(both.model, tuple(x[sample : sample + 1] for x in both.args), {})
        own = dynamic_plan(one, SCORES[kind], only="mlp")
        alone.append((one, session(one, replace(own, tables=plan.tables | {"each": own.tables["each"]}))))
    differ = []
    for step in range(STEPS):
        args, _ = both.inputs(step)
        together = tensor_of(run(*args))
        tensor_of(reference(*args))
        for sample, (_, single) in enumerate(alone):
            own_args = tuple(x[sample : sample + 1] for x in args)
            assert relative_error(tensor_of(single(*own_args)), together[sample : sample + 1]) <= CLOSE
        if step % 3:
            differ.append(not torch.equal(*kept_of(reference)))
    assert any(differ)


def test_ages_count_steps_since_a_token_was_stored() -> None:
    """A token that is not kept grows older at updates and at reuse; after a full step all are new."""
    which, site = case("dit"), MLP
    rows: list[Action] = [
        Compute(),
        Update(TopK("s", 4)),
        Reuse(),
        Update(TopK("s", 4)),
        Compute(),
        Update(TopK("s", 4)),
    ]
    plan = CachePlan(
        6,
        {(step, site): action for step, action in enumerate(rows)},
        scores={"s": Score(((1.0, Stale(site)),))},
    )
    reference, seen = tcc.Reference(which.model, plan, which.info), []
    for step in range(6):
        call(reference, which, step)
        seen.append(reference._ages[site][0, [0, 4, 15]].tolist())
    # step 1 keeps 0..3 (all are equal: the first ones), step 3 the oldest: 4..7
    assert seen == [[0, 0, 0], [0, 1, 1], [1, 2, 2], [2, 0, 3], [0, 0, 0], [0, 1, 1]]
    run = session(which, plan)
    again = tcc.Reference(which.model, plan, which.info)
    for step in range(12):
        assert relative_error(call(run, which, step), call(again, which, step)) <= CLOSE


def test_an_attention_map_is_the_softmax_of_the_model() -> None:
    """Column sums of the head-averaged map, from the last full step, by hand from keys and queries."""
    which = case("dit")
    plan = dynamic_plan(which, SCORES["attended"], only="mlp")
    reference = tcc.Reference(which.model, plan, which.info)
    block = which.model.blocks[0]  # type: ignore[union-attr,index]
    found: list[torch.Tensor] = []

    def note(_: torch.nn.Module, inputs: tuple[torch.Tensor], __: torch.Tensor) -> None:
        x = inputs[0]
        q, k, _v = block.attn.qkv(x).reshape(2, 16, 3, 2, 16).permute(2, 0, 3, 1, 4)
        found.append((q @ k.transpose(-2, -1) / 4).softmax(-1).mean(1).sum(1))

    handle = block.attn.register_forward_hook(note)
    args, _ = which.inputs(0)
    with torch.no_grad():
        which.model(*args)
    handle.remove()
    call(reference, which, 0)
    torch.testing.assert_close(reference._maps[Attended("blocks.0.attn")], found[0], rtol=1e-5, atol=1e-6)


def test_a_causal_map_is_that_of_the_tokens_so_far() -> None:
    """No token is attended to by an earlier one: by hand from keys and queries."""
    which, term = ODD["causal"].case(), Attended("blocks.0.attn")
    plan = dynamic_plan(which, Score(((1.0, term),)), only="mlp")
    reference, compiled = tcc.Reference(which.model, plan, which.info), session(which, plan)
    attention = which.model.blocks[0].attn  # type: ignore[union-attr,index]
    seen: list[torch.Tensor] = []
    handle = attention.register_forward_hook(lambda module, given, _: seen.extend(module.split(module.qkv(given[0]))))
    args, kwargs = which.inputs(0)
    with torch.no_grad():
        which.model(*args, **kwargs)
    handle.remove()
    scores = seen[0] @ seen[1].transpose(2, 3) / seen[0].shape[-1] ** 0.5
    later = torch.ones_like(scores).triu(1) > 0
    expected = scores.masked_fill(later, float("-inf")).softmax(-1).mean(1).sum(1)
    for step in range(STEPS):
        assert relative_error(call(compiled, which, step), call(reference, which, step)) <= CLOSE
        if step == 0:
            torch.testing.assert_close(reference._maps[term], expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("halves", [False, True])
def test_entropies_are_those_of_the_models_cross_attention(halves: bool) -> None:
    """1 + entropy of each token's row of the head-averaged map, by hand from queries, keys and the prompt's mask."""
    which, branch = case("hf_pixart"), "transformer_blocks.0.cross"
    plan = dynamic_plan(which, Score(((1.0, Entropy(branch, halves)),)), only="mlp")
    reference, compiled = tcc.Reference(which.model, plan, which.info), session(which, plan)
    block = which.model.transformer_blocks[0].attn2  # type: ignore[union-attr,index]
    seen: dict[str, torch.Tensor] = {}
    handles = [
        getattr(block, name).register_forward_hook(lambda _, __, out, name=name: seen.__setitem__(name, out))
        for name in ("to_q", "to_k")
    ]
    args, kwargs = which.inputs(0)
    with torch.no_grad():
        which.model(*args, **kwargs)
    for handle in handles:
        handle.remove()
    q, k = (seen[name].unflatten(2, (2, 16)).transpose(1, 2) for name in ("to_q", "to_k"))
    hidden = (1 - kwargs["encoder_attention_mask"])[:, None, None] * -10_000.0
    shares = (q @ k.transpose(2, 3) / 4 + hidden).softmax(-1).mean(1)
    shares = shares.mean(0, keepdim=True).expand(2, -1, -1) if halves else shares
    expected = -(shares * shares.clamp(min=1e-30).log()).sum(-1)

    for step in range(STEPS):
        assert relative_error(call(compiled, which, step), call(reference, which, step)) <= CLOSE
        if step == 0:
            torch.testing.assert_close(reference._maps[Entropy(branch, halves)], expected, rtol=1e-5, atol=1e-5)
            ranked = (1 + expected).argsort(dim=1, descending=True)[:, :8].sort().values
        if step == 1:
            kept = reference._chosen[TopK("s", 8)]
            assert [row.nonzero().flatten().tolist() for row in kept] == ranked.tolist()
    slots = {slot.name for slot in program(plan, which).slots}
    assert f"{branch}.{'shared_entropy' if halves else 'entropy'}" in slots


def program(plan: CachePlan, which: Case | None = None) -> tcc.program.Program:
    """The plan's program on the tiny DiT."""
    which = which or case("dit")
    return build_program(which.info.captured, which.info.analysis, plan, check=False)


@pytest.mark.parametrize("attention", ["kept", "current", "cached"])
@pytest.mark.parametrize("kind", ["block", "out", "delta"])
def test_dynamic_sets_save_what_static_ones_save(kind: str, attention: tcc.plan.Attention) -> None:
    """The gathers move up through the same operators: the MACs are those of a static set of the same size."""
    plan = dynamic_plan(case("dit"), SCORES["fixed"], kind=kind, attention=attention)
    static = {
        at: replace(action, tokens="half") if isinstance(action, Update) else action
        for at, action in plan.actions.items()
    }
    twin = CachePlan(STEPS, static, tokens={"half": torch.arange(8)})
    assert [v.macs for v in program(plan).variants] == [v.macs for v in program(twin).variants]


def test_steps_with_other_tables_share_a_variant() -> None:
    """Tables are inputs of the graph."""
    actions: dict[tuple[int, str], Action] = {(s, MLP): Update(TopK(f"s{s}", 4)) for s in range(1, 5)}
    scores = {f"s{s}": Score(((1.0, Fixed(f"t{s}")),)) for s in range(1, 5)}
    plan = CachePlan(5, actions, scores=scores, tables={f"t{s}": torch.randn(16) for s in range(1, 5)})
    assert len(program(plan).variants) == 2


def test_maps_and_ages_take_slots_only_where_they_are_read() -> None:
    """Both are `[B, S]`, and no step keeps them for a plan that does not ask."""
    names = {
        kind: {s.name for s in program(dynamic_plan(case("dit"), SCORES[kind], only="mlp")).slots} for kind in SCORES
    }
    assert "blocks.0.attn.map" in names["attended"]
    assert f"{MLP}.age" in names["stale"]
    assert not any(name.endswith((".map", ".age")) for name in names["fixed"] | names["probe"])
    unread = dynamic_plan(case("dit"), SCORES["fixed"], only="mlp")
    unread = replace(
        unread,
        scores=dict(unread.scores) | {"unread": SCORES["stale"], "too": SCORES["attended"]},
        actions={**unread.actions, (0, "blocks.1.attn.out"): Compute(), (1, "blocks.1.attn.out"): Compute()},
    )
    assert {s.name for s in program(unread).slots} == names["fixed"]


def test_merged_blocks_with_a_dynamic_set_share_a_slot() -> None:
    """One gather at the first block, one scatter at the last; a score that reads between them keeps them apart."""
    which = case("dit")
    merged = dynamic_plan(which, SCORES["probe"], kind="block", attention="kept")
    assert [s.name for s in program(merged).slots] == ["blocks.0.delta+1"]
    between = replace(merged, scores={"s": Score(((1.0, Norm("blocks.0.delta")),))})
    assert [s.name for s in program(between).slots] == ["blocks.0.delta", "blocks.1.delta"]
    for plan in (merged, between):
        run, reference = session(which, plan), tcc.Reference(which.model, plan, which.info)
        for step in range(STEPS):
            assert relative_error(call(run, which, step), call(reference, which, step)) <= CLOSE


@pytest.mark.compiles
@pytest.mark.filterwarnings("ignore:.*torch.jit.script:DeprecationWarning")  # Inductor's own imports
def test_inductor_compiles_dynamic_sets() -> None:
    """Scores, ranks and gathers with no graph break; every step as the reference."""
    which = case("dit")
    score = Score(((1.0, Attended("blocks.0.attn")), (0.25, Stale(MLP))), cell=2, bonus=0.6)
    plan = dynamic_plan(which, score, only="mlp")
    run = Session(lower(program(plan), "inductor"))
    reference = tcc.Reference(which.model, plan, which.info)
    for step in range(STEPS):
        assert relative_error(call(run, which, step), call(reference, which, step)) <= CLOSE


def test_a_variant_traces_whole() -> None:
    """`torch.compile(fullgraph=True)` takes the graph of a dynamic step: no decision is left to the host."""
    which = case("dit")
    plan = dynamic_plan(which, SCORES["stale"], attention="kept")
    made = program(plan)
    for binding in made.bindings[:2]:
        variant = made.variants[binding.variant]
        inputs = [n.meta["val"].shape for n in variant.gm.graph.nodes if n.op == "placeholder" and "slot" in n.meta]
        args = [*which.args, *(torch.rand(sizes) for sizes in inputs)]
        write_code(variant.gm)
        with torch.no_grad():
            whole = torch.compile(variant.gm, fullgraph=True, backend="aot_eager")(*args)
            torch.testing.assert_close(whole, variant.gm(*args))


def test_gathers_of_each_sample() -> None:
    """Whatever the order of the samples' and the tokens' dimensions."""
    x, kept = torch.arange(24.0).reshape(2, 4, 3), torch.tensor([[0, 3], [1, 2]])
    expected = torch.stack([x[0, [0, 3]], x[1, [1, 2]]])
    assert torch.equal(gather_tokens(x, kept, 1, 0), expected)
    assert torch.equal(gather_tokens(x.transpose(0, 1), kept, 0, 1), expected.transpose(0, 1))
    assert torch.equal(gather_tokens(x[:, None], kept, 2, 0), expected[:, None])


@pytest.mark.parametrize("options", [{"cell": 2, "bonus": 2.0}, {"cell": 2, "per_cell": True}], ids=str)
def test_cells_hold_image_tokens_alone(options: dict[str, float]) -> None:
    """U-ViT puts other tokens first: cells begin behind them, and a count per cell keeps them all beside it."""
    which = case("uvit")
    start, stop = which.info.image_tokens
    assert start > 0
    site = next(s.name for s in which.info.sites.values() if s.name.endswith(".mlp.delta"))
    score = replace(Score(((1.0, Fixed("one")), (1.0, Norm(site)))), **options)
    plan = dynamic_plan(which, score, kind="delta", only="mlp", keep=lambda n: start + (stop - start) // 2)
    run, reference = session(which, plan), tcc.Reference(which.model, plan, which.info)
    for step in range(STEPS):
        assert relative_error(call(run, which, step), call(reference, which, step)) <= CLOSE
        if step % 3 and score.per_cell:
            assert bool(kept_of(reference)[:, :start].all())
            cells = kept_of(reference)[:, start:stop].unflatten(1, (*which.info.grid[:1], -1))
            assert set(cells.unflatten(1, (-1, 2)).unflatten(3, (-1, 2)).sum((2, 4)).flatten().tolist()) == {2}
