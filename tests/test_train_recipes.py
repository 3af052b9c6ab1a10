"""Weights, budget and the two recipes, against runs of the reference interpreter."""

from __future__ import annotations

import functools
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import tcc
import tcc.data
from tcc import plans
from tcc.errors import CallError, PlanError, TrainError
from tcc.learned import Importance, Router, load_learned
from tcc.models import UViT, reference_model
from tcc.plan import CachePlan, Compute, Reuse, Skip, Update
from tcc.samplers import DDIM, DPMSolver2, Sampler, sample
from tcc.train.calls import images_with_labels, noise_with_labels
from tcc.train.images import MemoryImages
from tcc.train.loop import Settings, train
from tcc.train.objective import Objective
from tcc.train.pairs import Pairs
from tcc.train.predictors import Sizes, StreamPredictor, TablePredictor
from tcc.train.student import Student
from tcc.train.trajectories import Trajectories, collect_streams
from tcc.train.weights import Budget, Choices, RouterWeights, TokenWeights, choices_of, choices_of_pairs
from tests.tiny_models import Case, dit, uvit

NUM_STEPS = 6
REUSE = Reuse()
#: Six steps of float32 in two orders of summation.
CLOSE = {"rtol": 1e-3, "atol": 1e-9}


@functools.cache
def tiny() -> Case:
    """A DiT on 8 x 8 pixels with a null class and learned variances; outputs of size 1, so that differences show."""
    return dit(batch=4, in_channels=1, learn_sigma=True)


def sites(kind: str = "out") -> tuple[str, ...]:
    """The sites of one kind."""
    return tuple(name for name, site in tiny().info.sites.items() if site.kind == kind)


@functools.cache
def student(kind: str = "out") -> Student:
    """A student that mixes all sites of a kind."""
    return Student(tiny().info, sites(kind), streams=["blocks.0.stream", "out.stream"])


def images(count: int = 20) -> MemoryImages:
    """Random pixels."""
    draw = torch.Generator().manual_seed(4)
    pixels = torch.randint(256, (count, 1, 8, 8), generator=draw, dtype=torch.uint8)
    return MemoryImages(pixels, torch.randint(10, (count,), generator=draw))


def router(choices: Choices, score: float) -> RouterWeights:
    """A router whose scores are all the same."""
    made = RouterWeights(NUM_STEPS, sites(), choices)
    for row in made.logits.values():
        nn.init.constant_(row, math.inf if score == 1 else -math.inf if score == 0 else math.log(score / (1 - score)))
    return made


def pairs(objective: Objective, num_steps: int = NUM_STEPS, dropout: float = 0.1) -> Pairs:
    """Pairs of `images`."""
    calls = images_with_labels(objective.student.info, images(), 10, dropout)
    return Pairs(objective, calls, choices_of_pairs(num_steps, objective.student.sites), num_steps)


def trajectories(
    objective: Objective, choices: Choices, num_steps: int = NUM_STEPS, cfg: float = 1.0, **options: Any
) -> Trajectories:
    """Runs for random labels."""
    calls = noise_with_labels(objective.student.info, 10, 10, cfg)
    return Trajectories(objective, calls, choices, num_steps, **options)


def seeded(seed: int = 0) -> torch.Generator:
    """A generator."""
    return torch.Generator().manual_seed(seed)


def reuse_plan(choices: Choices, num_steps: int = NUM_STEPS, action: Reuse | Skip = REUSE) -> CachePlan:
    """The plan that reuses (or takes another action) wherever there is a choice."""
    rows = {(step, name): Compute() for step in range(num_steps) for name in sites()}
    return CachePlan(
        num_steps=num_steps,
        actions=rows | {(step, name): action for step, chosen in choices.items() for name in chosen},
    )


def test_pairs_are_counted_from_the_image() -> None:
    """Odd indices are I-steps and even ones P-steps, so the first step computes and the last one decides."""
    assert list(choices_of_pairs(6, ["a.out"])) == [1, 3, 5]
    assert list(choices_of_pairs(5, ["a.out"])) == [2, 4]
    assert choices_of_pairs(6, ["a.out", "b.out"])[3] == ("a.out", "b.out")


def test_any_plans_table_says_where_to_decide() -> None:
    """What a plan computes is computed; updates, reuses and skips are learned anew."""
    tokens = {"even": torch.arange(0, 16, 2)}
    actions = {(1, "blocks.0.attn.out"): Reuse(), (1, "blocks.1.mlp.out"): Compute(), (3, "blocks.1.mlp.out"): Reuse()}
    plan = CachePlan(num_steps=4, actions=actions | {(3, "blocks.0.attn.out"): Update("even")}, tokens=tokens)
    assert choices_of(plan) == {1: ("blocks.0.attn.out",), 3: ("blocks.0.attn.out", "blocks.1.mlp.out")}


def test_the_budget_is_a_price_or_a_target() -> None:
    """Per site, whatever its rows: the mean over samples and tokens."""
    weights = {"a": torch.full((1, 1), 0.25), "b": torch.tensor([[0.0, 1.0], [0.5, 1.0]])}
    assert float(Budget(price=0.1).cost(weights)) == pytest.approx(0.1 * (0.25 + 0.625))
    assert float(Budget(target=0.5, strength=2).cost(weights)) == pytest.approx(2 * (0.4375 - 0.5) ** 2)
    assert float(Budget().cost(weights)) == 0
    with pytest.raises(PlanError, match="price=-1: expected a number, 0 or more"):
        Budget(price=-1)
    with pytest.raises(PlanError, match=r"target=2: expected a mean weight, 0\.\.1"):
        Budget(target=2)


def test_a_router_is_a_row_of_logits_per_p_step() -> None:
    """Scores by site; 1 where there is nothing to decide, no number at I-steps; logits stay within their limit."""
    choices = {1: sites(), 3: sites()[:2]}
    made = RouterWeights(4, sites(), choices, seed=3)
    again = RouterWeights(4, sites(), choices, seed=3)
    assert all(torch.equal(a, b) for a, b in zip(made.parameters(), again.parameters(), strict=True))
    given = made(3)
    assert list(given) == list(sites()[:2])
    found = made.learned()
    assert isinstance(found, Router)
    assert found.p_steps == (1, 3)
    assert torch.equal(found.scores[3, 2:], torch.ones(2))
    assert float(found.scores[3, 1]) == pytest.approx(float(given[sites()[1]].detach()))
    with torch.no_grad():
        made.logits["1"].fill_(7.0)
    made.settle()
    assert torch.equal(made.logits["1"], torch.full((4,), 5.0))
    assert len(made.known()) == 6


def test_token_weights_are_a_predictors_rows() -> None:
    """All sites of a block share its importances, per token; only the form that sees the stream asks for it."""
    choices = {1: sites()}
    sizes = Sizes.of(tiny().info, 2)
    table = TokenWeights(TablePredictor(sizes), tiny().info, choices)
    nn.init.normal_(table.predictor.get_parameter("table.1"))
    given = table(1)
    assert table.reads is None
    assert given["blocks.1.attn.out"].shape == (1, 16)
    assert torch.equal(given["blocks.1.attn.out"], given["blocks.1.mlp.out"])
    assert torch.equal(given["blocks.1.mlp.out"][0], table.learned().scores[1, 1])  # type: ignore[union-attr]
    assert torch.equal(table.known(), table.learned().scores[1].flatten())  # type: ignore[union-attr]
    seeing = TokenWeights(StreamPredictor(sizes), tiny().info, choices)
    assert seeing.reads == "blocks.0.stream"
    assert seeing(1, torch.randn(4, 16, 32))["blocks.0.mlp.out"].shape == (4, 16)


def test_steps_that_decide_nothing_are_ranked_like_the_nearest() -> None:
    """A plan may have its I-steps elsewhere; what was never learned there would rank all tokens alike."""
    sizes = Sizes.of(tiny().info, 6)
    for predictor in (TablePredictor(sizes), StreamPredictor(sizes)):
        for parameter in predictor.parameters():
            nn.init.normal_(parameter)
        rows, own = [1, 1, 1, 4, 4, 4], predictor.learned()
        found = TokenWeights(predictor, tiny().info, {1: sites(), 4: sites()}).learned()
        for name in ("scores",) if isinstance(own, Importance) else ("weight", "bias", "mean"):
            assert torch.equal(getattr(found, name), getattr(own, name)[rows])


class Noted:
    """A model that notes what it is called with and what it returns."""

    def __init__(self, model: Any) -> None:
        self.model, self.inputs, self.outputs = model, [], []

    def __call__(self, *inputs: Tensor) -> Tensor:
        self.inputs.append(inputs)
        self.outputs.append(self.model(*inputs))
        output: Tensor = self.outputs[-1]
        return output


@pytest.mark.parametrize("choices", [choices_of_pairs(NUM_STEPS, sites()), {1: sites(), 2: sites()[1:], 3: sites()}])
@pytest.mark.parametrize(("cfg", "drop"), [(1.0, False), (1.5, False), (1.0, True)])
def test_a_trajectory_at_weight_zero_is_a_cached_run(choices: Choices, cfg: float, drop: bool) -> None:
    """Its errors are those of the sampler under the plan that reuses: real values, as stale as they get. Or drops."""
    objective = Objective(student(), Budget(), drop=drop)
    recipe = trajectories(objective, choices, cfg=cfg)
    losses = recipe.accumulate(router(choices, 0.0), seeded())
    draw = seeded()
    count = 4 if cfg == 1 else 2
    noise, labels = torch.randn(count, 1, 8, 8, generator=draw), torch.randint(10, (count,), generator=draw)
    plan = reuse_plan(choices, action=Skip() if drop else REUSE)
    calls = Noted(tcc.Reference(tiny().model, plan, tiny().info))
    sample(calls, noise, labels, num_steps=NUM_STEPS, cfg_scale=cfg, null_class=10)
    assert [loss.step for loss in losses] == list(choices)
    for loss in losses:
        with torch.no_grad():
            expected = (calls.outputs[loss.step] - tiny().model(*calls.inputs[loss.step])).square().mean()
        assert float(expected) > 0
        torch.testing.assert_close(loss.error, float(expected), **CLOSE)


def test_a_trajectory_of_a_two_stage_solver_is_its_cached_run() -> None:
    """A U-ViT under DPM-Solver-2: fractional timesteps, and P-steps that are first evaluations of a solver step."""
    made = uvit(batch=2)
    case = Case(made.model, (made.args[0], torch.zeros(2), made.args[2]), {})
    solver = DPMSolver2(clip=False, diffusion=UViT.diffusion)
    names = tuple(name for name, site in case.info.sites.items() if site.kind == "out")
    choices = dict.fromkeys(plans.first_evaluations({1, 3, 5}, [e.stage for e in solver.evaluations(6)]), names)
    recipe = trajectories(Objective(Student(case.info, names), Budget()), choices, sampler=solver)
    weights = RouterWeights(6, names, choices)
    for row in weights.logits.values():
        nn.init.constant_(row, -math.inf)
    losses = recipe.accumulate(weights, seeded())

    assert list(choices) == [loss.step for loss in losses] == [2, 4]
    draw = seeded()
    noise, labels = torch.randn(2, 4, 8, 8, generator=draw), torch.randint(10, (2,), generator=draw)
    plan = plans.shifted(case.info, plans.fora(case.info, num_steps=6, interval=2))
    calls = Noted(tcc.Reference(case.model, plan, case.info))
    sample(calls, noise, labels, num_steps=6, sampler=solver)
    assert float(calls.inputs[0][1][0]) == 1000
    for loss in losses:
        with torch.no_grad():
            expected = (calls.outputs[loss.step] - case.model(*calls.inputs[loss.step])).square().mean()
        assert float(expected) > 0
        torch.testing.assert_close(loss.error, float(expected), **CLOSE)
    whole = trajectories(Objective(student(), Budget()), {2: sites()}, sampler=DPMSolver2())
    with pytest.raises(CallError, match=r"dtype torch\.float32, expected torch\.int64"):
        whole.accumulate(router({2: sites()}, 0.5), seeded())


def test_a_trajectory_at_weight_one_has_no_error() -> None:
    """The student is its own teacher."""
    choices, objective = choices_of_pairs(NUM_STEPS, sites()), Objective(student(), Budget(price=0.5))
    losses = trajectories(objective, choices).accumulate(router(choices, 1.0), seeded())
    assert [loss.error for loss in losses] == [0.0] * 3
    assert [loss.cost for loss in losses] == [0.5 * 4] * 3


@pytest.mark.parametrize("seed", range(4))
def test_a_pair_at_weight_zero_is_two_steps_of_a_cached_run(seed: int) -> None:
    """By hand: noise the images (DDPM eq. 4), the model there, one DDIM step (eq. 12) to the P-step, reuse."""
    choices = choices_of_pairs(NUM_STEPS, sites())
    recipe = pairs(Objective(student(), Budget()), dropout=0.4)
    (loss,) = recipe.accumulate(router(choices, 0.0), seeded(seed))
    draw = seeded(seed)
    k = int(torch.randint(3, (), generator=draw))
    assert loss.step == NUM_STEPS - 1 - 2 * k
    picked = torch.randint(20, (4,), generator=draw)
    x0, y = images().pixels[picked] / 127.5 - 1, images().labels[picked]
    y = torch.where(torch.rand(4, generator=draw) < 0.4, 10, y)
    noise = torch.randn(4, 1, 8, 8, generator=draw)
    grid = [round(999 / 5 * i) for i in range(NUM_STEPS)]
    kept = torch.cumprod(1 - torch.linspace(1e-4, 0.02, 1000, dtype=torch.float64), 0)
    s, m = grid[2 * k + 1], grid[2 * k]
    x = kept[s].sqrt() * x0 + (1 - kept[s]).sqrt() * noise
    reference = tcc.Reference(tiny().model, reuse_plan({1: sites()}, 2), tiny().info)
    eps = reference(x.float(), torch.full((4,), s), y)[:, :1]
    x = kept[m].sqrt() * (x - (1 - kept[s]).sqrt() * eps) / kept[s].sqrt() + (1 - kept[m]).sqrt() * eps
    inputs = (x.float(), torch.full((4,), m), y)
    with torch.no_grad():
        expected = (reference(*inputs) - tiny().model(*inputs)).square().mean()
    torch.testing.assert_close(loss.error, float(expected), **CLOSE)


def test_the_gradient_is_that_of_error_and_cost() -> None:
    """Only the pair's own row gets one, and it is the derivative of the loss that is told; in float64."""
    made = dit(batch=4, in_channels=1, learn_sigma=True)
    case = Case(made.model.double(), (made.args[0].double(), *made.args[1:]), {})
    recipe = pairs(Objective(Student(case.info, sites()), Budget(price=1e-3)))
    weights = router(choices_of_pairs(NUM_STEPS, sites()), 0.4).double()
    (loss,) = recipe.accumulate(weights, seeded())
    assert [step for step, row in weights.logits.items() if row.grad is not None] == [str(loss.step)]
    row, height = weights.logits[str(loss.step)], 1e-3
    gradient = row.grad.clone()  # type: ignore[union-attr]
    for unit in range(len(sites())):
        sides = []
        for sign in (1, -1):
            with torch.no_grad():
                row[unit] += sign * height
            sides.append(recipe.accumulate(weights, seeded())[0])
            with torch.no_grad():
                row[unit] -= sign * height
        slope = (sides[0].error - sides[1].error + sides[0].cost - sides[1].cost) / (2 * height)
        assert float(gradient[unit]) == pytest.approx(slope, rel=1e-4)


def test_gradients_of_float16_models_do_not_vanish() -> None:
    """They are those of float32, but for the rounding: a mean of small squares has gradients below float16's range."""
    found = []
    for dtype in (torch.float32, torch.float16):
        made = dit(batch=4, in_channels=1, learn_sigma=True)
        with torch.no_grad():
            for parameter in made.model.final_layer.parameters():  # type: ignore[union-attr, operator]
                parameter.mul_(0.01)  # outputs, and so errors, as small as those of neighbouring steps
        case = Case(made.model.to(dtype), (made.args[0].to(dtype), *made.args[1:]), {})
        weights = router(choices_of_pairs(NUM_STEPS, sites()), 0.4)
        pairs(Objective(Student(case.info, sites()), Budget(price=1e-9))).accumulate(weights, seeded())
        found.append(torch.cat([row.grad for row in weights.logits.values() if row.grad is not None]))
    assert float(torch.cosine_similarity(*found, dim=0)) > 0.999
    assert float(found[1].norm() / found[0].norm()) == pytest.approx(1, abs=0.02)


def test_the_final_stream_can_be_compared() -> None:
    """TokenCache's loss is that of the stream after the last block."""
    choices = choices_of_pairs(2, sites())
    weights = RouterWeights(2, sites(), choices)
    for row in weights.logits.values():
        nn.init.constant_(row, -math.inf)
    recipe = trajectories(Objective(student(), Budget(), "stream"), choices, 2)
    (loss,) = recipe.accumulate(weights, seeded())
    draw = seeded()
    noise, labels = torch.randn(4, 1, 8, 8, generator=draw), torch.randint(10, (4,), generator=draw)
    calls = Noted(tcc.Reference(tiny().model, reuse_plan(choices, 2), tiny().info))
    sample(calls, noise, labels, num_steps=2)
    old, new = (student().compute(*inputs) for inputs in calls.inputs)
    zeros = {site: torch.zeros(1, 1) for site in sites()}
    mixed = student().mix(old.stored, zeros, *calls.inputs[1])
    expected = (mixed.streams["out.stream"] - new.streams["out.stream"]).square().mean()
    torch.testing.assert_close(loss.error, float(expected), **CLOSE)
    with pytest.raises(TrainError, match="needs a student that returns it"):
        Objective(Student(tiny().info, sites()), Budget(), "stream")
    with pytest.raises(TrainError, match="target='streams': use one of output, stream"):
        Objective(student(), Budget(), "streams")  # type: ignore[arg-type]


def test_streams_are_collected_along_a_run() -> None:
    """At every step the value that enters block 0, in an uncached run."""
    calls = noise_with_labels(tiny().info, 10)
    found = collect_streams(student(), "blocks.0.stream", calls, num_steps=3)
    noise, labels = calls.draw(seeded())
    noted = Noted(tiny().model)
    sample(noted, noise, labels, num_steps=3)
    expected = [student().compute(*inputs).streams["blocks.0.stream"] for inputs in noted.inputs]
    assert len(found) == 3
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-6)


class Unknown(DDIM):
    """A sampler that says nothing about its noise levels."""

    scales = Sampler.scales


def test_recipes_that_cannot_run_are_refused() -> None:
    """With the step, and what to change."""
    objective = Objective(student(), Budget())
    calls = noise_with_labels(tiny().info, 10)
    for recipe in (Pairs, Trajectories):
        with pytest.raises(TrainError, match="every step of the schedule computes all; take more steps"):
            recipe(objective, calls, {}, 4)
        with pytest.raises(TrainError, match="step 0 of the schedule reuses"):
            recipe(objective, calls, {0: sites()}, 4)
        with pytest.raises(TrainError, match="a P-step 5, and the run has 4 steps"):
            recipe(objective, calls, {5: sites()}, 4)
        with pytest.raises(TrainError, match="P-step 1 of the schedule has no sites to decide about"):
            recipe(objective, calls, {1: ()}, 4)
    with pytest.raises(TrainError, match="needs a model with a null class"):
        noise_with_labels(tiny().info, 10, cfg_scale=1.5)
    with pytest.raises(ValueError, match="Unknown does not know how noisy its inputs are"):
        Pairs(objective, calls, {1: sites()}, 4, sampler=Unknown())


def test_weights_that_cannot_decide_are_refused() -> None:
    """Before training: without sites, about unknown ones, or at other steps than those of the recipe."""
    with pytest.raises(TrainError, match="P-step 1 of the schedule has no sites"):
        RouterWeights(4, sites(), {1: ()})
    with pytest.raises(TrainError, match=r"P-step 1 decides about site 'x\.out', which is none of the router's sites"):
        RouterWeights(4, sites(), {1: ("x.out",)})
    with pytest.raises(TrainError, match=r"decides about site 'x\.out', which is none of the model's"):
        TokenWeights(TablePredictor(Sizes.of(tiny().info, 4)), tiny().info, {1: ("x.out",)})
    recipe = trajectories(Objective(student(), Budget()), {1: sites(), 3: sites()}, 4)
    with pytest.raises(TrainError, match="the recipe has a P-step 3, at which the weights decide nothing"):
        train(RouterWeights(4, sites(), {1: sites()}), recipe, Settings(1))


@pytest.mark.parametrize(("num_steps", "share"), [(50, 0.422), (20, 0.45)])
def test_shipped_routers_are_for_the_shipped_model(num_steps: int, share: float) -> None:
    """Every other step, all branches of the reference model, and the share that their README tells."""
    found = load_learned(Path(tcc.data.__file__).with_name(f"router-ddim{num_steps}.safetensors"))
    assert isinstance(found, Router)
    assert found.p_steps == tuple(range(1, num_steps, 2))
    depth = reference_model().config.depth
    assert found.sites == tuple(f"blocks.{i}.{branch}.out" for i in range(depth) for branch in ("attn", "mlp"))
    scores = found.scores[list(found.p_steps)]
    assert float((scores <= 0.1).float().mean()) == pytest.approx(share, abs=1e-3)
    noisy, clean = scores.chunk(2) if num_steps == 20 else (scores[:12], scores[13:])
    assert float(noisy.mean()) < 0.3 < 0.7 < float(clean.mean())
