"""The training loop: resumption to the same result, interruptions, numbers that are not finite, other runs' states."""

from __future__ import annotations

import json
import math
import os
import signal
import subprocess
import sys
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from tcc.errors import TrainError
from tcc.learned import Learned, Router
from tcc.train.calls import images_with_labels
from tcc.train.loop import Report, Settings, train
from tcc.train.objective import Objective, StepLoss
from tcc.train.pairs import Pairs
from tcc.train.predictors import NetworkPredictor, Sizes, TablePredictor
from tcc.train.student import Student
from tcc.train.weights import Budget, RouterWeights, TokenWeights, Weights, choices_of_pairs
from tcc.train.world import World
from tests import killed_training
from tests.test_train_recipes import pairs, sites, student, tiny, trajectories


class Numbers(Weights):
    """Two rows of numbers to learn, without a model."""

    def __init__(self) -> None:
        super().__init__()
        self.rows = nn.ParameterList([nn.Parameter(torch.ones(3)), nn.Parameter(torch.ones(2))])

    def forward(self, step: int, stream: Tensor | None = None) -> dict[str, Tensor]:
        """One row."""
        return {"a.out": self.rows[step].view(1, -1)}

    def learned(self) -> Learned:
        """Nothing that anyone asks for."""
        return Router(torch.zeros(1, 1), ("a.out",))

    def known(self) -> Tensor:
        """All numbers."""
        return torch.cat([row.detach() for row in self.rows])

    def unlearned(self) -> list[int]:
        """Nothing that anyone asks for."""
        return []


class Noisy:
    """Pulls one row, chosen at random, towards random numbers; may do as it is told at an iteration."""

    num_steps = 2

    def __init__(self, at: int = -1, what: Any = None) -> None:
        self.at, self.what, self.calls = at, what, 0

    def accumulate(self, weights: Weights, generator: torch.Generator) -> list[StepLoss]:
        """One group."""
        step = int(torch.randint(2, (), generator=generator))
        (row,) = weights(step, None).values()
        loss = (row - torch.randn(row.shape, generator=generator)).square().mean()
        if self.calls == self.at:
            if isinstance(self.what, BaseException):
                raise self.what
            loss = loss * self.what
        self.calls += 1
        loss.backward()
        return [StepLoss(step, float(loss.detach()), 0.5)]

    def describe(self) -> dict[str, object]:
        """Nothing to tell."""
        return {"recipe": "noisy"}


def ended(
    iterations: int, state: Path | None = None, recipe: Any = None, **options: Any
) -> tuple[list[Tensor], Report]:
    """The numbers and the report after training so long."""
    weights = Numbers()
    report = train(weights, recipe or Noisy(), Settings(iterations, lr=0.1, **options), state=state)
    return [row.detach() for row in weights.rows], report


def same(ones: Any, others: Any) -> bool:
    """Bit for bit."""
    return all(torch.equal(a, b) for a, b in zip(ones, others, strict=True))


def test_a_held_mean_and_a_free_one_are_different_runs(tmp_path: Path) -> None:
    """Their parameters have the same shapes."""
    choices = choices_of_pairs(4, sites())

    def run(mean: float | None, iterations: int) -> None:
        weights = TokenWeights(TablePredictor(Sizes.of(tiny().info, 4), mean=mean), tiny().info, choices)
        recipe = pairs(Objective(student(), Budget(price=1e-3)), 4)
        train(weights, recipe, Settings(iterations), state=tmp_path / "state")

    run(0.5, 1)
    with pytest.raises(TrainError, match=r"the state of another run \(held mean was 0.5 and is None\)"):
        run(None, 2)


def test_the_seed_decides() -> None:
    """The same twice; another seed, another result; more groups, another result."""
    first, report = ended(9)
    assert same(first, ended(9)[0])
    assert not same(first, ended(9, seed=1)[0])
    assert not same(first, ended(9, groups=2)[0])
    assert report.iteration == 9
    assert report.cost == 0.5
    assert report.loss == report.error + 0.5
    assert report.resumed is None


@pytest.mark.parametrize("stop", [1, 4, 8])
def test_a_resumed_run_ends_like_a_whole_one(tmp_path: Path, stop: int) -> None:
    """Bit for bit: parameters, both moments and the random numbers are where they would be."""
    ended(stop, tmp_path / "state")
    numbers, report = ended(9, tmp_path / "state")
    assert report.resumed == stop
    whole, expected = ended(9)
    assert same(numbers, whole)
    assert report.error == expected.error


@pytest.mark.parametrize("kind", ["router", "network"])
def test_a_model_is_resumed_to_the_same_result(tmp_path: Path, kind: str) -> None:
    """The same with the two recipes, a router and a predictor, on a model."""
    choices = choices_of_pairs(4, sites())
    objective = Objective(student(), Budget(price=1e-3))

    def run(iterations: int, state: Path | None) -> list[Tensor]:
        weights: Weights
        if kind == "router":
            weights, recipe = RouterWeights(4, sites(), choices), pairs(objective, 4)
        else:
            weights = TokenWeights(NetworkPredictor(Sizes.of(tiny().info, 4)), tiny().info, choices)
            recipe = trajectories(objective, choices, 4)  # type: ignore[assignment]
        train(weights, recipe, Settings(iterations, lr=0.1), state=state)
        return [parameter.detach() for parameter in weights.parameters()]

    run(2, tmp_path / "state")
    assert same(run(5, tmp_path / "state"), run(5, None))


@pytest.mark.parametrize("where", ["inside", "between"])
def test_an_interruption_keeps_the_last_whole_iteration(tmp_path: Path, where: str) -> None:
    """Wherever it comes, the run goes on to the same result."""
    state, weights = tmp_path / "state", Numbers()

    def interrupt(report: Report) -> None:
        if report.iteration == 5 and where == "between":
            raise KeyboardInterrupt

    recipe = Noisy(5, KeyboardInterrupt()) if where == "inside" else Noisy()
    with pytest.raises(KeyboardInterrupt):
        train(weights, recipe, Settings(9, lr=0.1), state=state, progress=interrupt)
    numbers, report = ended(9, state)
    assert report.resumed == 5
    assert same(numbers, ended(9)[0])


@pytest.mark.parametrize("moment", ["update", "saving"])
def test_a_killed_process_is_resumed_to_the_same_result(tmp_path: Path, moment: str) -> None:
    """By SIGKILL, in the middle of an iteration or of a save: bit for bit, the optimiser's moments too."""
    state, whole, script = tmp_path / "state", tmp_path / "whole", str(Path(killed_training.__file__))
    killed = subprocess.run(
        [sys.executable, script, str(state), moment],
        env=os.environ | {"OMP_NUM_THREADS": "1"}, capture_output=True, text=True, timeout=300, check=False,
    )  # fmt: skip
    assert killed.returncode == -signal.SIGKILL, killed.stderr
    assert state.with_name("state.partial").exists() == (moment == "saving")
    left = load_file(state)
    (_, report), (_, expected) = (killed_training.train_router(path, 8) for path in (state, whole))
    assert (report.resumed, expected.resumed) == (killed_training.LAST - 1, None)
    assert (report.error, report.cost) == (expected.error, expected.cost)
    ends, wanted = load_file(state), load_file(whole)
    assert ends.keys() == wanted.keys() == left.keys()
    assert same(ends.values(), (wanted[name] for name in ends))
    assert not same(left.values(), (wanted[name] for name in left))


@pytest.mark.parametrize("what", [math.nan, math.inf])
def test_a_loss_that_is_no_number_stops(tmp_path: Path, what: float) -> None:
    """The message names the step; the state before it is saved, and the weights are still numbers."""
    state, weights = tmp_path / "state", Numbers()
    with pytest.raises(
        TrainError, match=r"loss of denoising step [01] is not finite in iteration 6; the state .*state:"
    ):
        train(weights, Noisy(5, what), Settings(9, lr=0.1), state=state)
    assert bool(weights.known().isfinite().all())
    numbers, report = ended(9, state)
    assert report.resumed == 5
    assert same(numbers, ended(9)[0])


def test_images_that_are_no_numbers_stop(tmp_path: Path) -> None:
    """Through a model, by the pair's P-step."""

    class Broken:
        """Images that are NaN."""

        def __len__(self) -> int:
            return 3

        def take(self, picked: Tensor) -> tuple[Tensor, Tensor]:
            """See `Images`."""
            return torch.full((len(picked), 1, 8, 8), torch.nan), torch.zeros(len(picked), dtype=torch.int64)

        def digest(self) -> str:
            """See `Images`."""
            return "broken"

    calls = images_with_labels(tiny().info, Broken(), 10)
    recipe = Pairs(Objective(student(), Budget()), calls, choices_of_pairs(2, sites()), 2)
    weights = RouterWeights(2, sites(), choices_of_pairs(2, sites()))
    with pytest.raises(TrainError, match="loss of denoising step 1 is not finite in iteration 1"):
        train(weights, recipe, Settings(3), state=tmp_path / "state")
    assert (tmp_path / "state").is_file()


def test_a_gradient_that_is_no_number_stops() -> None:
    """Even where the loss is one."""

    class Steep(Noisy):
        """The root of zero, times zero."""

        def accumulate(self, weights: Weights, generator: torch.Generator) -> list[StepLoss]:
            """One group."""
            (row,) = weights(0, None).values()
            ((row - row.detach()).sum().sqrt() * 0).backward()
            return [StepLoss(0, 0.0, 0.0)]

    with pytest.raises(TrainError, match="the gradient is not finite in iteration 1"):
        ended(3, recipe=Steep())


def test_an_error_of_the_recipe_leaves_the_last_good_state(tmp_path: Path) -> None:
    """An image that cannot be read, say: what was learned before is not lost."""
    state = tmp_path / "state"
    with pytest.raises(TrainError, match="no image"):
        ended(9, state, Noisy(5, TrainError("no image")), save_every=1e6)
    found, report = ended(9, state)
    assert report.resumed == 5
    assert same(found, ended(9)[0])


def test_a_state_of_other_choices_is_refused(tmp_path: Path) -> None:
    """Its logits would become those of other sites."""
    for begun, chosen in enumerate((sites()[:2], sites()[2:4])):
        recipe = trajectories(Objective(student(), Budget()), {1: chosen}, 2)
        weights = RouterWeights(2, sites(), {1: chosen})
        if begun:
            with pytest.raises(TrainError, match=r"another run \(choices' digest was \w+ and is \w+\)"):
                train(weights, recipe, Settings(2), state=tmp_path / "state")
        else:
            train(weights, recipe, Settings(1), state=tmp_path / "state")


def test_states_of_other_runs_are_refused(tmp_path: Path) -> None:
    """With what differs; another learning rate or end is no difference."""
    state = tmp_path / "state"
    ended(3, state)
    with pytest.raises(TrainError, match=r"another run \(seed was 0 and is 1\): remove it"):
        ended(9, state, seed=1)
    train(Numbers(), Noisy(), Settings(4, minutes=5, lr=0.01), state=state)
    (tmp_path / "text").write_text("no state")
    with pytest.raises(TrainError, match="is no state of a training"):
        ended(9, tmp_path / "text")
    with pytest.raises(TrainError, match=r"the training's state cannot be written .*: write to another place"):
        ended(1, tmp_path / "missing" / "state")


@pytest.mark.parametrize(
    ("lost", "reason"),
    [
        ("run", "'run'"),
        ("losses", "'losses'"),
        ("iteration", "'iteration'"),
        ("weights.rows.0", "rows.0"),
        ("optimiser.", "it has nothing of the optimiser"),
        ("optimiser.0.exp_avg_sq", "'exp_avg_sq'"),
    ],
)
def test_states_that_lack_something_are_refused(tmp_path: Path, lost: str, reason: str) -> None:
    """A part of the header, of the weights or of the optimiser's moments: none goes on as if nothing were missing."""
    state = tmp_path / "state"
    ended(20, state)
    with safe_open(state, framework="pt") as file:
        header = json.loads(file.metadata()["tcc.training"])
    header.pop(lost, None)
    tensors = {name: tensor for name, tensor in load_file(state).items() if not name.startswith(lost)}
    save_file(tensors, state, {"tcc.training": json.dumps(header)})
    with pytest.raises(TrainError, match=rf"(?s)is no state of a training .*{reason}"):
        ended(21, state)


def test_other_models_and_recipes_are_other_runs(tmp_path: Path) -> None:
    """The budget, the schedule and the sites count."""
    choices = choices_of_pairs(2, sites())

    def run(price: float, sites_: tuple[str, ...]) -> None:
        recipe = trajectories(Objective(Student(tiny().info, sites_), Budget(price)), choices, 2)
        train(RouterWeights(2, sites(), choices), recipe, Settings(0, lr=0.1), state=tmp_path / "state")

    run(0.1, sites())
    with pytest.raises(TrainError, match=r"budget was \[0\.1, None, 1\.0\] and is \[0\.2, None, 1\.0\]"):
        run(0.2, sites())
    with pytest.raises(TrainError, match="sites was"):
        run(0.1, sites()[:3])


def test_a_state_is_one_file_of_tensors_and_json(tmp_path: Path) -> None:
    """Parameters, both moments and step counts; nothing else is left in the folder."""
    ended(20, tmp_path / "state")
    assert [path.name for path in tmp_path.iterdir()] == ["state"]
    with safe_open(tmp_path / "state", framework="pt") as file:
        names = set(file.keys())
    moments = {f"optimiser.{row}.{name}" for row in range(2) for name in ("step", "exp_avg", "exp_avg_sq")}
    assert names == {"weights.rows.0", "weights.rows.1"} | moments


def test_time_ends_a_run(tmp_path: Path) -> None:
    """Minutes that were spent before a resumption count: what has ended stays as it is, bit for bit."""
    numbers, report = ended(10**9, tmp_path / "state", minutes=0.002)
    assert 0 < report.iteration < 10**6
    assert report.seconds >= 0.12
    again, resumed = ended(10**9, tmp_path / "state", minutes=0.002)
    assert (resumed.iteration, resumed.seconds) == (report.iteration, report.seconds)
    assert same(again, numbers)
    assert ended(10**9, tmp_path / "state", minutes=0.004)[1].iteration > report.iteration
    assert train(Numbers(), Noisy(), Settings(minutes=0)).iteration == 0


def test_what_an_iteration_leaves_out_is_not_moved() -> None:
    """A row without a gradient keeps its value, whatever the momentum of others."""
    weights, seen = Numbers(), []

    def look(report: Report) -> None:
        seen.append([row.detach().clone() for row in weights.rows])

    train(weights, Noisy(), Settings(20, lr=0.1), progress=look)
    moved = [[not torch.equal(a, b) for a, b in zip(one, other, strict=True)] for one, other in pairwise(seen)]
    assert all(sum(rows) == 1 for rows in moved)


def test_settings_that_cannot_be_are_refused() -> None:
    """Before anything runs."""
    with pytest.raises(TrainError, match="nothing ends the training"):
        Settings()
    for options in ({"lr": 0.0}, {"lr": 1e38}, {"groups": 0}, {"iterations": -1}):
        with pytest.raises(TrainError, match=r"the learning rate is in \(0, 100\]"):
            Settings(**({"iterations": 1} | options))  # type: ignore[arg-type]
    for name, wrong in (("iterations", 2.5), ("iterations", "5"), ("groups", 1.5), ("seed", 1.5), ("seed", True)):
        with pytest.raises(TrainError, match=f"{name}={wrong!r}: expected a whole number"):
            Settings(**({"iterations": 1} | {name: wrong}))  # type: ignore[arg-type]
    for name, wrong in (("minutes", math.nan), ("minutes", math.inf), ("lr", math.nan), ("save_every", "30")):
        with pytest.raises(TrainError, match=f"{name}={wrong!r}: expected a number, finite"):
            Settings(**{name: wrong} | ({"minutes": 1.0} if name != "minutes" else {}))  # type: ignore[arg-type]
    assert type(Settings(np.int64(3)).iterations) is int
    with pytest.raises(TrainError, match=r"2 processes share 1 group\(s\)"):
        train(Numbers(), Noisy(), Settings(1), world=World(0, 2))
