"""TokenCache plans whose tokens are ranked in the graph: by the norm of what is stored, or by learned probes."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import tcc
from tcc.errors import PlanError
from tcc.learned import Probes
from tcc.plan import CachePlan, TopK, Update
from tcc.plan.scores import Norm, Probe, Stale
from tcc.train.predictors import Sizes, StreamPredictor
from tests.tiny_models import case, relative_error, tensor_of
from tests.token_plans import BLOCKS, P_STEPS, STEPS, TOKENS, deep, plan


def predictor(scale: float = 1.0) -> StreamPredictor:
    """A predictor that sees the stream, with random read-outs."""
    made = StreamPredictor(Sizes.of(deep().info, STEPS))
    draw = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for parameter in made.parameters():
            parameter.copy_(scale * torch.randn(parameter.shape, generator=draw))
    return made


def streams(step: int) -> torch.Tensor:
    """The stream that enters block 0 at a step, `[2, 16, 32]`."""
    model: Any = deep().model
    (x, _, _), _ = deep().inputs(step)
    with torch.no_grad():
        entering: torch.Tensor = model.x_embedder(x) + model.pos_embed
    return entering


def sets(made: CachePlan) -> set[TopK]:
    """The dynamic sets of a plan."""
    found = {action.tokens for action in made.actions.values() if isinstance(action, Update)}
    assert all(isinstance(tokens, TopK) for tokens in found)
    return found  # type: ignore[return-value]


def test_norms_are_those_of_the_blocks_own_values() -> None:
    """One score per block, of both branches; the counts and MACs are those of the learned plan."""
    made = plan(scores="norm", keep=0.25)
    assert sets(made) == {TopK(f"norm{block}", 4) for block in range(BLOCKS)}
    score = made.scores["norm2"]
    assert score.terms == ((1.0, Norm("blocks.2.attn.out")), (1.0, Norm("blocks.2.mlp.out")))
    assert (score.cell, score.per_cell) == (2, True)
    assert made.cost is not None
    learned = plan(keep=0.25)
    assert learned.cost is not None
    assert made.cost.step_macs == learned.cost.step_macs


def test_shared_norms_are_summed_over_the_pruned_blocks() -> None:
    """And a rotation lets tokens that wait come forward."""
    made = plan(scores="norm", share=True, level="block", attention="kept", rotate=0.5, select="global", cell=2)
    assert sets(made) == {TopK("norm0+1+2+3", 8)}
    *norms, wait = made.scores["norm0+1+2+3"].terms
    assert norms == [(1.0, Norm(f"blocks.{block}.delta")) for block in range(BLOCKS)]
    assert wait == (0.5, Stale("blocks.0.delta"))
    assert not made.scores["norm0+1+2+3"].per_cell


def test_probes_read_the_stream_before_the_blocks() -> None:
    """One read-out per P-step and block, as tables; blocks and I-steps follow the mean importance."""
    learned = predictor()
    learned.calibrate([streams(step) for step in range(STEPS)])
    made = plan(importance=learned.learned(), pruned=2)
    pruned = learned.importance().scores[list(P_STEPS)].mean((0, 2)).argsort()[:2].sort().values.tolist()
    assert made.policy["blocks"] == pruned
    assert sets(made) == {TopK(f"step{step}.block{block}", 8) for step in P_STEPS for block in pruned}
    name = f"step3.block{pruned[0]}"
    assert made.scores[name].terms == (
        (1.0, Probe("blocks.0.stream", "hidden", "offset", f"weight.{name}", f"bias.{name}")),
    )
    assert torch.equal(made.tables[f"weight.{name}"], learned.learned().weight[3, pruned[0]])


def test_probes_keep_the_tokens_that_the_predictor_ranks_highest() -> None:
    """The compiled plan of probes is that of the tokens that the predictor chooses, sample by sample."""
    learned = predictor()
    made = plan(importance=learned.learned(), pruned=1, select="global", share=True, keep=0.25, i_steps=[0, 2, 3, 4, 5])
    (block,) = made.policy["blocks"]
    with torch.no_grad():
        ranks = learned(1, streams(1))[:, block]
    assert not torch.equal(ranks[0].argsort()[-4:], ranks[1].argsort()[-4:])
    compiled = tcc.compile(deep().model, made, backend="eager")
    by_sample = [
        plan(importance=None, scores="random", blocks=[block], select="global", keep=0.25, i_steps=[0, 2, 3, 4, 5])
        for _ in range(2)
    ]
    expected = []
    for sample, static in enumerate(by_sample):
        best = ranks[sample].argsort(descending=True)[:4].sort().values
        chosen = CachePlan(
            num_steps=STEPS, actions=static.actions, tokens=dict.fromkeys(static.tokens, best), model=static.model
        )
        expected.append(tcc.Reference(deep().model, chosen, deep().info))
    for step in (0, 1):
        args, kwargs = deep().inputs(step)
        with torch.no_grad():
            result = tensor_of(compiled(*args, **kwargs))
            for sample, reference in enumerate(expected):
                wanted = tensor_of(reference(*args, **kwargs))
                assert relative_error(result[sample], wanted[sample]) <= 2e-5


@pytest.mark.parametrize(
    "options",
    [
        {"scores": "norm"},
        {"scores": "norm", "share": True, "level": "block", "attention": "kept", "rotate": 1.0, "k1": 2},
        {"importance": "probes", "attention": "current", "level": "branch", "refresh": False},
        {"importance": "probes", "select": "global", "keep": 0.3, "share": True},
    ],
    ids=str,
)
def test_compiled_plans_agree_with_the_reference(options: dict[str, Any]) -> None:
    """Counts are fixed, so that no call is of another shape; P-steps share one variant."""
    given = options | ({"importance": predictor().learned()} if "importance" in options else {})
    made = plan(**given)
    compiled = tcc.compile(deep().model, made, backend="eager")
    reference = tcc.Reference(deep().model, made, deep().info)
    for step in range(STEPS):
        args, kwargs = deep().inputs(step)
        with torch.no_grad():
            error = relative_error(tensor_of(compiled(*args, **kwargs)), tensor_of(reference(*args, **kwargs)))
        assert error <= 2e-5, step
    program = tcc.program.build_program(deep().info.captured, deep().info.analysis, made, check=False)
    assert len(program.variants) <= (3 if given.get("k1") else 2)


@pytest.mark.parametrize("select", ["grid", "global"])
@pytest.mark.parametrize("scores", ["norm", "learned"])
def test_conditions_among_the_tokens_are_always_kept(scores: Any, select: Any) -> None:
    """As by static plans, with the same counts and MACs; compiled plans agree with the reference."""
    which = case("uvit")
    probes = StreamPredictor(Sizes.of(which.info, 4)).learned()
    options = {"num_steps": 4, "keep": 0.5, "select": select, "cell": 2, "last_full": 0}
    made = tcc.plans.tokencache(which.info, **options, scores=scores, importance=probes)
    assert {tokens.count for tokens in sets(made)} == {2 + 8}
    assert made.macs - tcc.plans.tokencache(which.info, **options, scores="random").macs <= 0.01 * made.macs
    compiled, reference = tcc.compile(which.model, made, backend="eager"), tcc.Reference(which.model, made)
    for step in range(4):
        args, kwargs = which.inputs(step)
        assert relative_error(tensor_of(compiled(*args, **kwargs)), tensor_of(reference(*args, **kwargs))) < 1e-5
    (first, others) = (next(iter(made.scores.values())), made.tables.get("others"))
    assert first.per_cell if select == "grid" else (others is not None and others.tolist() == [1e6] * 2 + [0.0] * 16)


def test_probes_of_another_width_are_refused() -> None:
    """They see channels that the stream does not have."""
    probes = predictor().learned()
    assert probes.mean.shape == (STEPS, BLOCKS, TOKENS)
    other = Probes(probes.hidden[:16], probes.offset, probes.weight, probes.bias, probes.mean)
    with pytest.raises(PlanError, match="the probes see 16 channels, the stream has 32"):
        plan(importance=other)
