"""What `tcc train` does once its options are known: train, in one process or several, and write what came out."""

from __future__ import annotations

import collections
import copy
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
import typer

from tcc.cli import screen
from tcc.cli.policies import find_policy, parse_options
from tcc.cli.subjects import dit_inputs, load_subject, look
from tcc.errors import ModelError
from tcc.info import ModelInfo
from tcc.learned import save_learned
from tcc.models import Architecture
from tcc.plan import CachePlan
from tcc.plan_picture import facts
from tcc.plans import first_evaluations, shifted, tprr_steps
from tcc.samplers import Evaluation, Sampler, named, timestep_dtype
from tcc.train.images import open_images
from tcc.train.loop import Report, Settings, train
from tcc.train.objective import Objective, Recipe, Target
from tcc.train.pairs import Pairs
from tcc.train.predictors import StreamPredictor
from tcc.train.student import Student
from tcc.train.trajectories import Trajectories, collect_streams
from tcc.train.weights import Budget, Choices, TokenWeights, Weights, choices_of_pairs
from tcc.train.world import World, join_world

__all__ = ["Files", "Kept", "Run", "run_training", "settings_of"]

Kept = Literal["out", "delta", "block"]


@dataclass(frozen=True)
class Run:
    """The options that say what is learned from what."""

    model: str
    data: Path | None
    recipe: str | None
    steps: int
    cycle: tuple[int, int]
    sites: Kept
    price: float | None
    target: float | None
    compare: Target
    cfg: float
    batch: int
    groups: int
    device: str
    fast: bool
    held: bool = False  # whether the weights keep to the target by themselves
    drop: bool = False
    sampler: str = "ddim"

    def __post_init__(self) -> None:
        if self.batch % self.groups:
            raise typer.BadParameter(
                f"{self.batch} images do not make {self.groups} equal groups", param_hint="--groups"
            )
        if self.kind == "pairs" and self.data is None:
            raise typer.BadParameter("pairs are made of noised images: give --data", param_hint="--recipe")
        if self.kind == "pairs" and self.cycle != (1, 1):
            raise typer.BadParameter("pairs have one P-step each: use --recipe trajectory", param_hint="--k1, --k2")
        if self.sampler == "dpm-solver-2" and self.steps % 2:
            raise typer.BadParameter("dpm-solver-2 evaluates twice per step: give an even number", param_hint="--steps")
        if self.kind == "pairs" and self.sampler != "ddim":
            raise typer.BadParameter("pairs are steps of DDIM: use --recipe trajectory", param_hint="--sampler")
        if self.kind == "pairs" and self.cfg != 1:
            raise typer.BadParameter("pairs are without guidance: use --recipe trajectory", param_hint="--cfg")

    @property
    def kind(self) -> str:
        """The recipe."""
        return self.recipe or ("trajectory" if self.data is None else "pairs")

    @property
    def rows(self) -> int:
        """Rows of one model call: a group, doubled under guidance."""
        return self.batch // self.groups * (2 if self.cfg > 1 else 1)

    @property
    def budget(self) -> Budget:
        """The price of computing."""
        price = self.price if self.price is not None else (2e-6 if self.target is None else 0.0)
        return Budget(price, self.target, 0.0 if self.held else 1.0)

    def sampled_by(self, model: Architecture) -> Sampler:
        """The sampler; pixels are clamped, for the latents of an encoder have no bounds."""
        return named(self.sampler, clip=model.config.in_channels in (1, 3), diffusion=model.diffusion)

    def choices(self, names: tuple[str, ...], evaluations: Sequence[Evaluation]) -> Choices:
        """The P-steps of the schedule; from the image backwards for pairs, so that an even run ends with a P-step."""
        if self.kind == "pairs":
            return choices_of_pairs(self.steps, names)
        p_steps = set(range(self.steps)) - set(tprr_steps(self.steps, *self.cycle, 0.5))
        return dict.fromkeys(first_evaluations(p_steps, [at.stage for at in evaluations]), names)


@dataclass(frozen=True)
class Files:
    """What is written."""

    plan: Path
    learned: Path | None
    json: Path | None

    @property
    def state(self) -> Path:
        """The state of the training."""
        return self.plan.with_name(self.plan.name.removesuffix(".safetensors") + ".state.safetensors")


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
    def of(policy: str, learned: str, given: Sequence[str]) -> Planned:
        """The policy of that name with the options in texts `name=value`; of two for one option the last counts.

        Raises:
            PlanError: the policy has no such option, or a value is none of an option's.
        """
        chosen = parse_options(policy, [*given, f"{learned}="])  # checked before training, not after
        chosen.pop(learned)
        return Planned(policy, learned, chosen)

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


def settings_of(iterations: int | None, minutes: float | None, lr: float, groups: int, seed: int) -> Settings:
    """The settings; ten minutes where nothing else ends the training."""
    limit = 10.0 if iterations is None and minutes is None else minutes
    return Settings(iterations, limit, lr, groups, seed)


def run_training(
    run: Run,
    settings: Settings,
    make: Callable[[ModelInfo, tuple[str, ...], Choices], Weights],
    planned: Planned,
    files: Files,
    plan_batch: int,
) -> None:
    """Train, and write what came out, in one process or several."""
    with join_world(run.device) as world:
        model = _model(run.model).to(run.device)
        evaluations = run.sampled_by(model).evaluations(run.steps)
        info = look(model, _inputs(model, run.rows, run.device, evaluations), {}, run.model)
        names = tuple(name for name, site in info.sites.items() if site.kind == run.sites)
        choices = run.choices(names, evaluations)
        weights = make(info, names, choices)
        streams = [*(["out.stream"] if run.compare == "stream" else []), *([weights.reads] if weights.reads else [])]
        student = Student(info, names, streams=streams, fast=run.fast)
        recipe = _recipe(run, model, Objective(student, run.budget, run.compare, run.drop), choices)
        target = look(model, _inputs(model, plan_batch, run.device, evaluations), {}, run.model)
        planned.rehearse(target, run.steps, weights)
        report = _follow(weights, recipe, settings, files.state, world, planned.theta)
        if world.speaks:
            _calibrate(weights, student, model, run)
            if files.learned is not None:  # before the plan, which the policy may refuse to make
                save_learned(weights.learned(), files.learned)
                screen.note(f"wrote {files.learned}")
            plan = planned.make(target, run.steps, weights)
            stages = [at.stage for at in evaluations]
            plan = shifted(target, plan, stages=stages) if any(stages) else plan
            _write(run, settings, report, weights, plan, files, planned.theta)


def _model(name: str) -> Architecture:
    model = load_subject(name, batch=1, input_size=32).model
    if not isinstance(model, Architecture) or not model.config.num_classes:
        raise ModelError(
            f"{name} is not a class-conditional model of tcc.models, and training samples by calling model(x, t, y): "
            "use tcc.train from Python"
        )
    return model


def _inputs(model: Architecture, rows: int, device: str, evaluations: Sequence[Evaluation]) -> tuple[torch.Tensor, ...]:
    x, t, y = dit_inputs(model.config, rows)
    return x.to(device), t.to(device, timestep_dtype(evaluations)), y.to(device)


def _recipe(run: Run, model: Architecture, objective: Objective, choices: Choices) -> Recipe:
    config, null = model.config, model.config.null_class
    if run.kind == "pairs":
        assert run.data is not None
        images = open_images(
            run.data, size=config.input_size, channels=config.in_channels, num_classes=config.num_classes
        )
        return Pairs(objective, images, run.steps, null, diffusion=model.diffusion)
    return Trajectories(objective, choices, run.steps, config.num_classes, null, run.cfg, run.sampled_by(model))


def _calibrate(weights: Weights, student: Student, model: Architecture, run: Run) -> None:
    """Mean importances of a predictor that depends on the stream."""
    if isinstance(weights, TokenWeights) and isinstance(weights.predictor, StreamPredictor) and weights.reads:
        config, draw = model.config, torch.Generator().manual_seed(0)
        x = torch.randn(student.info.batch, config.in_channels, *config.input_size, generator=draw).to(run.device)
        y = torch.randint(config.num_classes, (len(x),), generator=draw).to(run.device)
        sampler = run.sampled_by(model)
        streams = collect_streams(student, weights.reads, x, y, num_steps=run.steps, sampler=sampler)
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
    run: Run, settings: Settings, report: Report, weights: Weights, plan: CachePlan, files: Files, theta: float
) -> None:
    """The plan, the scores, and what can be said about them."""
    known = weights.known()
    record = {
        "model": run.model,
        "recipe": run.kind,
        "lambda": run.budget.price,
        "target": run.target,
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
    plan.save(str(files.plan))
    screen.out().print(plan.summary(), soft_wrap=True, markup=False)
    screen.note(
        f"{report.iteration} iterations in {report.seconds:.0f} s; {record['share_below']:.1%} of the weights are at "
        f"most {theta:g}, their mean is {record['mean_weight']:.3f}"
    )
    screen.note(f"wrote {files.plan}")
    screen.write_json(files.json, record | {"plan": facts(plan)})
