"""Training of models of any signature, on noise and on latents; and of pairs under other solvers."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

import tcc
import tcc.train
from tcc import plans
from tcc.models import UViT
from tcc.samplers import DDIM, DPMSolver2, FlowEuler, Sampler, guide
from tcc.train import (
    Budget,
    Calls,
    Objective,
    Pairs,
    Recipe,
    RouterWeights,
    Settings,
    Sizes,
    Student,
    TablePredictor,
    TokenWeights,
    Trajectories,
    Weights,
    images_with_labels,
    train,
)
from tests.joint_models import hf_flux, hf_sd3
from tests.test_train_recipes import images
from tests.tiny_models import Case, hf_pixart, uvit

STEPS = 4
CHOICES = (1, 3)


def told_by_name(case: Case, x: Tensor, t: Tensor, told: dict[str, Tensor]) -> Any:
    """A call of a model of diffusers, with what it was told by name."""
    return (x,), case.kwargs | {"timestep": t} | told


def noise_calls(case: Case, name: str) -> Calls:
    """Noise and random embeddings under `name`: always the same, for which much can be learned in little time."""

    def draw(_: torch.Generator) -> tuple[Tensor, dict[str, Tensor]]:
        return case.args[0], {name: case.kwargs[name]}

    return Calls(draw, lambda x, t, told: told_by_name(case, x, t, told))


def learns(weights: Weights, recipe: Recipe, model: nn.Module, iterations: int, lr: float) -> None:
    """The loss falls, and gradients reach the weights alone."""

    def loss() -> float:
        return sum(
            x.total for seed in (91, 92) for x in recipe.accumulate(weights, torch.Generator().manual_seed(seed))
        )

    before, parameters = loss(), {name: value.clone() for name, value in model.state_dict().items()}
    train(weights, recipe, Settings(iterations=iterations, lr=lr))
    assert loss() < 0.95 * before
    assert weights.unlearned() == []
    assert all(parameter.grad is None for parameter in model.parameters())
    assert all(torch.equal(value, parameters[name]) for name, value in model.state_dict().items())


def outputs(info: tcc.ModelInfo, streams: str = "") -> tuple[str, ...]:
    """The branch outputs of one stream, or of all."""
    return tuple(
        name for name, site in info.sites.items() if site.kind == "out" and (streams == "all" or "@" not in name)
    )


def test_tokens_of_a_text_to_image_model_are_learned_from_noise() -> None:
    """PixArt: prompts by cross attention, keyword arguments, an output that is a dataclass; the plan follows."""
    case = hf_pixart()
    calls = noise_calls(case, "encoder_hidden_states")
    args, kwargs = calls.example()
    info = tcc.inspect(case.model, *args, **kwargs)
    names = outputs(info)
    choices = dict.fromkeys(CHOICES, names)
    weights = TokenWeights(TablePredictor(Sizes.of(info, STEPS), mean=0.5), info, choices)
    recipe = Trajectories(Objective(Student(info, names), Budget()), calls, choices, STEPS, DDIM(clip=False))
    learns(weights, recipe, case.model, iterations=12, lr=0.3)
    plan = plans.tokencache(info, num_steps=STEPS, importance=weights.learned())  # type: ignore[arg-type]
    assert str(plan.schedule) == "IPIP"


def test_branches_of_a_model_of_two_streams_are_learned_from_noise() -> None:
    """SD3: a flow, fractional timesteps, sites of the text's stream too; the plan follows."""
    case = hf_sd3()
    calls = noise_calls(case, "encoder_hidden_states")
    args, kwargs = calls.example(torch.float32)
    info = tcc.inspect(case.model, *args, **kwargs)
    names = outputs(info, "all")
    assert any("@" in name for name in names)
    choices = dict.fromkeys(CHOICES, names)
    weights = RouterWeights(STEPS, names, choices)
    recipe = Trajectories(Objective(Student(info, names), Budget(price=1e-3)), calls, choices, STEPS, FlowEuler())
    learns(weights, recipe, case.model, iterations=6, lr=0.3)
    assert plans.l2c(info, num_steps=STEPS, router=weights.learned(), theta=1).schedule.letters == "IPIP"  # type: ignore[arg-type]


def test_tokens_that_are_joined_by_those_of_a_text_have_weights_of_their_own() -> None:
    """Flux: single blocks hold text and image in one value; text is computed, and tokens of the image are learned."""
    case = hf_flux()
    info = case.info
    (site,) = (site for site in info.sites.values() if site.name == "single_transformer_blocks.0.attn.out")
    assert site.axis.others == (5, 0)
    student, draw = Student(info, [site.name]), torch.Generator().manual_seed(0)
    stored, computed = (
        torch.randn(site.shape, generator=draw),
        student.compute(*case.args, **case.kwargs).stored[site.name],
    )
    weight = torch.rand(1, 12, generator=draw)
    mixed = student.mix({site.name: stored}, {site.name: weight}, *case.args, **case.kwargs).stored[site.name]
    assert torch.equal(mixed[:, :5], computed[:, :5])
    expected = weight[..., None] * computed[:, 5:] + (1 - weight[..., None]) * stored[:, 5:]
    torch.testing.assert_close(mixed[:, 5:], expected)

    names = outputs(info)
    choices, calls = dict.fromkeys(CHOICES, names), noise_calls(case, "encoder_hidden_states")
    weights = TokenWeights(TablePredictor(Sizes.of(info, STEPS), mean=0.5), info, choices)
    recipe = Trajectories(Objective(Student(info, names), Budget()), calls, choices, STEPS, FlowEuler())
    learns(weights, recipe, case.model, iterations=12, lr=0.3)


def test_a_model_of_any_signature_is_learned_from_latents_in_files(tmp_path: Path) -> None:
    """One file per sample: what the model is told lies beside the latent, under its names; a flow's pairs too."""
    case, draw = hf_pixart(), torch.Generator().manual_seed(0)
    for number in range(3):
        prompt = torch.randn(case.kwargs["encoder_hidden_states"].shape[1:], generator=draw)
        save_file(
            {"x": torch.randn(4, 8, 8, generator=draw), "encoder_hidden_states": prompt},
            tmp_path / f"{number}.safetensors",
        )
    latents = tcc.train.open_latents(tmp_path)

    def picked(generator: torch.Generator) -> tuple[Tensor, dict[str, Tensor]]:
        return latents.take(torch.randint(len(latents), (2,), generator=generator))

    calls = Calls(
        picked,
        lambda x, t, told: told_by_name(case, x, t, told),
        record={"latents": latents.digest()},
    )
    names = outputs(case.info)
    choices = dict.fromkeys(CHOICES, names)
    weights = RouterWeights(STEPS, names, choices)
    recipe = Pairs(Objective(Student(case.info, names), Budget(price=1e-3)), calls, choices, STEPS)
    learns(weights, recipe, case.model, iterations=8, lr=0.3)
    assert recipe.describe()["latents"] == latents.digest()


def test_guidance_is_the_callers() -> None:
    """A doubled batch and guided predictions: what is compared is the model's own output, of all rows."""
    case = hf_pixart()

    def draw(generator: torch.Generator) -> tuple[Tensor, dict[str, Tensor]]:
        prompts = torch.randn(2, 7, 24, generator=generator)
        return torch.randn(1, 4, 8, 8, generator=generator), {"encoder_hidden_states": prompts}

    seen: list[Tensor] = []

    def prediction(output: Any, x: Tensor) -> Tensor:
        seen.append(output[0])
        return guide(output[0], 3.0, x.shape[1])

    calls = Calls(draw, lambda x, t, told: told_by_name(case, torch.cat([x, x]), torch.cat([t, t]), told), prediction)
    names = outputs(case.info)
    choices = {1: names}
    recipe = Trajectories(Objective(Student(case.info, names), Budget()), calls, choices, 2, DDIM(clip=False))
    weights = RouterWeights(2, names, choices)
    (loss,) = recipe.accumulate(weights, torch.Generator().manual_seed(0))
    assert [output.shape[0] for output in seen] == [2, 2]
    x, told = draw(torch.Generator().manual_seed(0))
    first, second = DDIM().diffusion.timesteps(2)
    solving = DDIM(clip=False).run(x, 2)
    next(solving)
    with torch.no_grad():
        args, kwargs = told_by_name(case, torch.cat([x, x]), torch.tensor([first] * 2), told)
        x = solving.send(guide(case.model(*args, **kwargs)[0], 3.0, 4))
        args, kwargs = told_by_name(case, torch.cat([x, x]), torch.tensor([second] * 2), told)
        expected = (seen[1] - case.model(*args, **kwargs)[0]).square().mean()
    assert loss.error == pytest.approx(float(expected), rel=1e-3)
    assert loss.error > 0


@pytest.mark.parametrize(
    ("sampler", "newer", "older"),
    [(DPMSolver2(clip=False, diffusion=UViT.diffusion), 4, 2), (FlowEuler(), 3, 2)],
    ids=["dpm-solver-2", "flow"],
)
def test_a_pair_is_a_whole_step_of_its_solver(sampler: Sampler, newer: int, older: int) -> None:
    """By hand: noise the images to the start of a step, run it, keep what the last evaluation stored, and reuse it."""
    made = uvit(batch=2)
    case = Case(made.model, (made.args[0], torch.zeros(2), made.args[2]), {})
    names = outputs(case.info)
    choices = {newer: names}
    pixels = images()
    latents = tcc.train.MemoryImages(pixels.pixels.expand(-1, 4, -1, -1).contiguous(), pixels.labels)
    calls = images_with_labels(case.info, latents, dropout=0.0)
    recipe = Pairs(Objective(Student(case.info, names), Budget()), calls, choices, 6, sampler)
    weights = RouterWeights(6, names, choices)
    nn.init.constant_(weights.logits[str(newer)], -torch.inf)
    (loss,) = recipe.accumulate(weights, torch.Generator().manual_seed(5))
    assert loss.step == newer

    draw = torch.Generator().manual_seed(5)
    torch.randint(1, (), generator=draw)
    clean, y = calls.draw(draw)
    image, level = sampler.scales(6)[older]
    x = image * clean + level * torch.randn(clean.shape, generator=draw)
    times = [evaluation.timestep for evaluation in sampler.evaluations(6)]
    plan = tcc.CachePlan(
        num_steps=newer - older + 1,
        actions={
            (step, name): tcc.Reuse() if step == newer - older else tcc.Compute()
            for step in range(newer - older + 1)
            for name in names
        },
    )
    reference = tcc.Reference(case.model, plan, case.info)
    solving = sampler.run(x, 6, first=older)
    x = next(solving)
    for step in range(older, newer):
        x = solving.send(reference(x, torch.full((2,), times[step]), y))
    t = torch.full((2,), times[newer])
    with torch.no_grad():
        expected = (reference(x, t, y) - case.model(x, t, y)).square().mean()
    assert float(expected) > 0
    assert loss.error == pytest.approx(float(expected), rel=1e-3)


@pytest.mark.parametrize("sampler", [DDIM(), DPMSolver2(), FlowEuler(shift=3)], ids=lambda at: type(at).__name__)
def test_a_run_can_begin_where_its_noise_levels_say(sampler: Sampler) -> None:
    """For a model that knows the truth, x at every step is what `scales` makes of image and noise."""
    draw = torch.Generator().manual_seed(0)
    image, noise = torch.rand(1, 1, 4, 4, generator=draw) - 0.5, torch.randn(1, 1, 4, 4, generator=draw)
    truth = noise - image if isinstance(sampler, FlowEuler) else noise
    scales, stages = sampler.scales(6), [at.stage for at in sampler.evaluations(6)]
    for first in (step for step in range(6) if stages[step] == 0):
        a, b = scales[first]
        solving = sampler.run(a * image + b * noise, 6, first=first)
        x = next(solving)
        for step in range(first, 6):
            a, b = scales[step]
            torch.testing.assert_close(x, a * image + b * noise, rtol=1e-4, atol=1e-4)
            if step < 5:
                x = solving.send(truth)
