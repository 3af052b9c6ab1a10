"""What `tcc train` does once its options are known: train, in one process or several, and write what came out."""

from __future__ import annotations

import collections
import copy
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any

import torch
import typer

from tcc.cli import screen
from tcc.cli.harness import device_named
from tcc.cli.policies import find_policy, parse_options
from tcc.cli.subjects import dit_inputs, load_subject, look
from tcc.cli.train_options import Learning
from tcc.errors import ModelError, TrainError
from tcc.info import ModelInfo
from tcc.learned import save_learned
from tcc.models import Architecture
from tcc.plan import CachePlan
from tcc.plan.picture import facts
from tcc.plans import shifted
from tcc.samplers import Evaluation, timestep_dtype
from tcc.train.calls import images_with_labels, noise_with_labels
from tcc.train.images import open_images
from tcc.train.loop import Report, Settings, train
from tcc.train.objective import Objective, Recipe
from tcc.train.pairs import Pairs
from tcc.train.predictors import StreamPredictor
from tcc.train.student import Student
from tcc.train.trajectories import Trajectories, collect_streams
from tcc.train.weights import Budget, Choices, TokenWeights, Weights
from tcc.train.world import World, join_world

__all__ = ["Planned", "run_training"]


@dataclass(frozen=True)
class Planned:
    """How what was learned becomes a plan.

    Attributes:
        policy: the policy's name.
        learned: its option that takes what was learned.
        options: its other options.
    """

    policy: str
    learned: str
    options: dict[str, Any]

    @staticmethod
    def of(
        policy: str,
        learned: str,
        given: Sequence[str],
        *,
        decided: Mapping[str, str],
        fixed: Mapping[str, Any] = MappingProxyType({}),
    ) -> Planned:
        """The policy of that name with the options in texts `name=value`; of two for one option the last counts.

        Args:
            policy: the policy's name.
            learned: its option that takes what is learned.
            given: the texts.
            decided: the options that follow from how it is trained, and what to do instead.
            fixed: the values of those.

        Raises:
            PlanError: the policy has no such option, or a value is none of an option's.
            typer.BadParameter: an option is decided by the training.
        """
        for name in (text.partition("=")[0] for text in given):
            if name in decided:
                raise typer.BadParameter(
                    f"{name} is decided by the training, for a plan fits what was learned: {decided[name]}",
                    param_hint="--option",
                )
        chosen = parse_options(policy, [*given, f"{learned}="])  # checked before training, not after
        chosen.pop(learned)
        return Planned(policy, learned, {**chosen, **fixed})

    def make(self, info: ModelInfo, num_steps: int, weights: Weights) -> CachePlan:
        """The plan."""
        return find_policy(self.policy)(info, num_steps=num_steps, **self.options, **{self.learned: weights.learned()})

    def rehearse(self, info: ModelInfo, num_steps: int, weights: Weights) -> None:
        """Make the plan of arbitrary weights: what the policy refuses then, it would refuse after the training too.

        Raises:
            PlanError: the options exclude each other, or their budget is out of reach.
        """
        arbitrary, draw = copy.deepcopy(weights).cpu(), torch.Generator().manual_seed(0)
        with torch.no_grad():
            for parameter in arbitrary.parameters():
                parameter.copy_(torch.randn(parameter.shape, generator=draw))
        self.make(info, num_steps, arbitrary)

    @property
    def theta(self) -> float:
        """Up to which weight a site counts as reused in what is shown."""
        return float(self.options.get("theta", 0.1))


def run_training(
    given: Learning,
    budget: Budget,
    settings: Settings,
    make: Callable[[ModelInfo, tuple[str, ...], Choices], Weights],
    planned: Planned,
    *,
    drop: bool = False,
) -> None:
    """Train, and write what came out, in one process or several.

    Raises:
        CallError: there is no such device.
    """
    device_named(given.device)
    with join_world(given.device) as world:
        model = _model(given.model).to(given.device)
        evaluations = given.sampled_by(model).evaluations(given.steps)
        info = look(model, _inputs(model, given.rows, given.device, evaluations), {}, given.model)
        names = tuple(name for name, site in info.sites.items() if site.kind == given.sites)
        choices = given.choices(names, evaluations)
        weights = make(info, names, choices)
        streams = [*(["out.stream"] if given.compare == "stream" else []), *([weights.reads] if weights.reads else [])]
        student = Student(info, names, streams=streams, fast=given.compile)
        recipe = _recipe(given, model, Objective(student, budget, given.compare, drop), choices)
        target = look(model, _inputs(model, given.plan_batch, given.device, evaluations), {}, given.model)
        planned.rehearse(target, given.steps, weights)
        report = _follow(weights, recipe, settings, given.state, world, planned.theta)
        if world.speaks:
            _check_learned(weights, report)
            _calibrate(weights, student, model, given)
            if given.learned is not None:  # before the plan, which the policy may refuse to make
                save_learned(weights.learned(), given.learned)
                screen.note(f"wrote {given.learned}")
            plan = planned.make(target, given.steps, weights)
            stages = [at.stage for at in evaluations]
            plan = shifted(target, plan, stages=stages) if any(stages) else plan
            _write(given, budget, settings, report, weights, plan, planned.theta)


def _check_learned(weights: Weights, report: Report) -> None:
    """Say where nothing was learned.

    Raises:
        TrainError: nowhere was anything.
    """
    missing = weights.unlearned()
    if len(missing) == len(weights.choices):
        raise TrainError(
            f"{report.iteration} iterations learned nothing, so there is nothing to plan by: give more --iterations or "
            "--minutes, and a higher --lr if the weights do not move"
        )
    if missing:
        screen.note(
            f"{report.iteration} iterations left out P-steps {', '.join(map(str, missing))}, for which nothing was "
            "learned: give more --iterations or --minutes, and the training goes on"
        )


def _model(name: str) -> Architecture:
    subject = load_subject(name, batch=1, input_size=32, device="meta")  # random weights are refused: none are drawn
    if subject.random:
        raise ModelError(
            f"{name} has random weights, from which there is nothing to learn: use 'reference' or a file of trained "
            "weights"
        )
    model = subject.model
    if not isinstance(model, Architecture) or not model.config.num_classes:
        raise ModelError(
            f"{name} is not a class-conditional model of tcc.models, and the command calls model(x, t, y): say in "
            "Python how another model is called, by tcc.train.Calls (help(tcc.train) shows a whole training)"
        )
    return model


def _inputs(model: Architecture, rows: int, device: str, evaluations: Sequence[Evaluation]) -> tuple[torch.Tensor, ...]:
    x, t, y = dit_inputs(model.config, rows)
    return x.to(device), t.to(device, timestep_dtype(evaluations)), y.to(device)


def _recipe(given: Learning, model: Architecture, objective: Objective, choices: Choices) -> Recipe:
    config, info = model.config, objective.student.info
    if given.kind == "pairs":
        assert given.data is not None
        images = open_images(
            given.data,
            size=config.input_size,
            channels=config.in_channels,
            num_classes=config.num_classes,
            null_class=config.null_class,
        )
        calls = images_with_labels(info, images, config.null_class)
        return Pairs(objective, calls, choices, given.steps, given.sampled_by(model, clip=False))
    calls = noise_with_labels(info, config.num_classes, config.null_class, given.cfg)
    return Trajectories(objective, calls, choices, given.steps, given.sampled_by(model))


def _calibrate(weights: Weights, student: Student, model: Architecture, given: Learning) -> None:
    """Mean importances of a predictor that depends on the stream."""
    if isinstance(weights, TokenWeights) and isinstance(weights.predictor, StreamPredictor) and weights.reads:
        calls, sampler = noise_with_labels(student.info, model.config.num_classes), given.sampled_by(model)
        streams = collect_streams(student, weights.reads, calls, num_steps=given.steps, sampler=sampler)
        weights.predictor.calibrate(streams)
        weights.seen.clear()  # the means say more than the last call, and a resumed training has no last call


def _follow(weights: Weights, recipe: Recipe, settings: Settings, state: Path, world: World, theta: float) -> Report:
    """Train behind a progress bar; an interruption says how to go on."""
    if state.is_file() and world.speaks:
        screen.note(f"going on from {state}")
    try:
        if not world.speaks:
            return train(weights, recipe, settings, state=state, world=world)
        with screen.bar("training") as bar:
            return train(
                weights, recipe, settings, state=state, world=world, progress=_Line(bar, weights, settings, theta)
            )
    except KeyboardInterrupt:
        if world.speaks:
            same = ", to the same result" if settings.minutes is None else ""
            screen.note(f"stopped; {state} holds the state: the same command goes on from there{same}")
        raise typer.Exit(130) from None


class _Line:
    """The line of the progress bar."""

    def __init__(self, bar: screen.Bar, weights: Weights, settings: Settings, theta: float) -> None:
        self.bar, self.weights, self.settings, self.theta = bar, weights, settings, theta
        self.losses: collections.deque[float] = collections.deque(maxlen=100)
        self.first: tuple[int, float] | None = None
        self.shown = time.monotonic()

    def __call__(self, report: Report) -> None:
        """Show one iteration; the numbers at most four times a second."""
        self.losses.append(report.loss)
        now = time.monotonic()
        self.first = self.first or (report.iteration, now)
        if now - self.shown < 0.25 or report.iteration == self.first[0]:
            return
        self.shown = now
        loss, pace = sum(self.losses) / len(self.losses), (report.iteration - self.first[0]) / (now - self.first[1])
        share = float((self.weights.known() <= self.theta).float().mean())
        self.bar.describe(f"training: loss {loss:.2e}, {share:.0%} of the weights below {self.theta:g}, {pace:.1f}/s")
        if self.settings.iterations is not None:
            self.bar(report.iteration, self.settings.iterations)
        else:
            self.bar(int(report.seconds), int(60 * (self.settings.minutes or 0)))


def _write(
    given: Learning, budget: Budget, settings: Settings, report: Report, weights: Weights, plan: CachePlan, theta: float
) -> None:
    """The plan, the scores, and what can be said about them."""
    known = weights.known()
    record = {
        "model": given.model,
        "recipe": given.kind,
        "lambda": budget.price,
        "target": budget.target,
        "lr": settings.lr,
        "seed": settings.seed,
        "iterations": report.iteration,
        "seconds": report.seconds,
        "error": report.error,
        "cost": report.cost,
        "theta": theta,
        "share_below": float((known <= theta).float().mean()),
        "mean_weight": float(known.mean()),
    }
    plan.save(str(given.out))
    screen.out().print(plan.summary(), soft_wrap=True, markup=False)
    screen.note(
        f"{report.iteration} iterations in {report.seconds:.0f} s; {record['share_below']:.1%} of the weights are at "
        f"most {theta:g}, their mean is {record['mean_weight']:.3f}"
    )
    screen.note(f"wrote {given.out}")
    screen.write_json(given.json, record | {"plan": facts(plan)})
