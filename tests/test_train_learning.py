"""What training learns: by the error, by the budget, and which tokens matter."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

import tcc
from tcc.samplers import Evaluation, Sampler, Solving
from tcc.train.calls import noise_with_labels
from tcc.train.loop import Report, Settings, train
from tcc.train.objective import Objective
from tcc.train.predictors import FORMS, Sizes, TablePredictor
from tcc.train.student import Student
from tcc.train.trajectories import Trajectories
from tcc.train.weights import Budget, Choices, RouterWeights, TokenWeights, choices_of_pairs
from tests.test_train_recipes import pairs, seeded, sites, student, tiny, trajectories
from tests.tiny_models import dit


def predicted(form: str, choices: Choices, num_steps: int) -> TokenWeights:
    """A predictor that is held at a mean of one half, and knows nothing yet."""
    return TokenWeights(FORMS[form](Sizes.of(tiny().info, num_steps), mean=0.5), tiny().info, choices)


@pytest.fixture(params=["pairs", "trajectory"])
def recipe_of(request: pytest.FixtureRequest) -> Iterator[Any]:
    """Makes a recipe of two steps for a budget."""

    def make(budget: Budget) -> Any:
        objective = Objective(student(), budget)
        if request.param == "pairs":
            return pairs(objective, 2)
        return trajectories(objective, choices_of_pairs(2, sites()), 2)

    return make


def fresh() -> list[Any]:
    """Weights of sites and of tokens that know nothing yet."""
    choices, table = choices_of_pairs(2, sites()), TablePredictor(Sizes.of(tiny().info, 2))
    return [RouterWeights(2, sites(), choices, seed=1), TokenWeights(table, tiny().info, choices)]


def optimum(recipe: Any, made: Any) -> Tensor:
    """The scores after 60 large steps."""
    optimiser = torch.optim.AdamW(made.parameters(), lr=0.3, weight_decay=0.0)
    for iteration in range(60):
        optimiser.zero_grad()
        recipe.accumulate(made, seeded(iteration))
        optimiser.step()
        made.settle()
    return made.known()


def test_without_a_budget_everything_is_computed(recipe_of: Any) -> None:
    """The error alone is least where nothing is cached; a high price caches all, and a target is met."""
    assert all(float(optimum(recipe_of(Budget()), made).min()) > 0.9 for made in fresh())
    assert all(float(optimum(recipe_of(Budget(price=100.0)), made).max()) < 0.1 for made in fresh())
    assert abs(float(optimum(recipe_of(Budget(target=0.5, strength=1e4)), fresh()[0]).mean()) - 0.5) < 0.05


@pytest.mark.parametrize("form", FORMS)
def test_predictors_learn_by_either_recipe(recipe_of: Any, form: str) -> None:
    """One interface: at a mean that is held, the error alone teaches which tokens of some samples to compute."""
    weights = predicted(form, choices_of_pairs(2, sites()), 2)
    recipe, rate = recipe_of(Budget()), {"table": 0.1, "network": 0.01, "stream": 0.05}[form]
    optimiser = torch.optim.AdamW(weights.parameters(), lr=rate, weight_decay=0.0, eps=1e-15)
    errors = []
    for _ in range(6):
        optimiser.zero_grad()
        errors += [loss.error for loss in recipe.accumulate(weights, seeded())]
        optimiser.step()
    assert errors[-1] < 0.97 * errors[0]
    assert float(weights.known().mean()) == pytest.approx(0.5, abs=1e-4)


@dataclasses.dataclass(frozen=True)
class HalfChanges(Sampler):
    """What the model sees has one half of an image anew at every step; the other stays, and nothing else changes.

    Attributes:
        left: whether it is the left half that changes.
    """

    left: bool

    def evaluations(self, num_steps: int | str) -> tuple[Evaluation, ...]:
        """One noise level."""
        return (Evaluation(500),) * int(num_steps)

    def run(
        self, noise: Tensor, num_steps: int | str, generator: torch.Generator | None = None, first: int = 0
    ) -> Solving:
        """Takes no notice of the model."""
        half = noise.shape[-1] // 2
        for _ in range(int(num_steps)):
            yield noise
            fresh = torch.randn(noise.shape, generator=generator)
            halves = [fresh[..., :half], noise[..., half:]] if self.left else [noise[..., :half], fresh[..., half:]]
            noise = torch.cat(halves, dim=-1)
        return noise


@pytest.mark.parametrize(("form", "left"), [("table", True), ("network", False), ("stream", True)])
def test_predictors_learn_which_tokens_change(form: str, left: bool) -> None:
    """Tokens whose inputs change rank above all whose inputs stay: in every block, at every P-step, on new images."""
    choices = dict.fromkeys((1, 2), sites())
    weights = predicted(form, choices, 3)
    recipe = trajectories(Objective(student(), Budget()), choices, 3, sampler=HalfChanges(left))
    rate = {"table": 0.2, "network": 0.03, "stream": 0.1}[form]
    train(weights, recipe, Settings(iterations=20, lr=rate))
    weights.seen.clear()
    recipe.accumulate(weights, seeded(77))  # of what depends on the stream, the importance for these
    for step in choices:
        columns = weights.seen[step].unflatten(-1, (4, 4))
        changing, staying = (columns[..., :2], columns[..., 2:]) if left else (columns[..., 2:], columns[..., :2])
        assert bool((changing.amin(dim=(-1, -2)) > staying.amax(dim=(-1, -2))).all())


def test_the_models_parameters_stay_as_they_are(recipe_of: Any) -> None:
    """Training touches the weights alone."""
    before = {name: value.clone() for name, value in tiny().model.state_dict().items()}
    optimum(recipe_of(Budget(price=1e-3)), fresh()[0])
    assert all(parameter.grad is None for parameter in tiny().model.parameters())
    assert all(torch.equal(value, before[name]) for name, value in tiny().model.state_dict().items())


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="training on a GPU needs a CUDA device, and there is none")
@pytest.mark.parametrize("form", ["router", *FORMS])
def test_training_on_a_gpu(form: str) -> None:
    """The first iteration's error is that of a CPU; all that is learned is on the GPU, finite, and has moved."""
    errors = []
    for device in ("cpu", "cuda"):
        made = dit(batch=4, in_channels=1, learn_sigma=True)
        info = tcc.inspect(made.model.to(device), *(x.to(device) for x in made.args))
        choices = dict.fromkeys((1, 2), sites())
        weights = RouterWeights(3, sites(), choices) if form == "router" else predicted(form, choices, 3)
        objective = Objective(Student(info, sites(), streams=["blocks.0.stream"]), Budget(price=1e-3))
        recipe = Trajectories(objective, noise_with_labels(info, 10), choices, 3)
        reports: list[Report] = []
        train(weights.to(device), recipe, Settings(iterations=4, lr=0.1), progress=reports.append)
        errors.append(reports[0].error)
        assert all(parameter.device.type == device for parameter in weights.parameters())
        assert math.isfinite(reports[-1].loss)
        assert weights.unlearned() == []
    assert errors[1] == pytest.approx(errors[0], rel=1e-2)
