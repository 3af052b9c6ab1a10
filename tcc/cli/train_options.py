"""The options that `tcc train router` and `tcc train predictor` share."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import typer

from tcc.cli import options
from tcc.models import Architecture
from tcc.plans import first_evaluations, tprr_steps
from tcc.samplers import Evaluation, Sampler, named
from tcc.train.loop import Settings
from tcc.train.objective import Target
from tcc.train.weights import Budget, Choices, choices_of_pairs

__all__ = ["LEARN", "Learning"]

Kept = Literal["out", "delta", "block"]

LEARN, _PLAN, _RUN = "What is learned from what", "The plan", "How long and where"

Out = Annotated[
    Path,
    typer.Option(
        metavar="FILE",
        callback=options.tensors_file,
        help="The plan to write; the training's state is kept beside it.",
        show_default=False,
    ),
]
Learned = Annotated[
    Path | None,
    typer.Option(
        metavar="FILE",
        callback=options.tensors_file,
        help="Also write the scores that were learned, to make other plans from.",
    ),
]
Data = Annotated[
    Path | None,
    typer.Option(
        metavar="FOLDER",
        help="One sub-folder of images per class (named by labels, or counted alphabetically), or the Fashion-MNIST "
        "files; for a model on latents one safetensors file per sample, with tensors [bold]x[/] and [bold]y[/]. "
        "Without: [bold]trajectory[/].",
        rich_help_panel=LEARN,
    ),
]
RecipeName = Annotated[
    Literal["pairs", "trajectory"] | None,
    typer.Option(
        "--recipe",
        help="[bold]pairs[/]: noised images, two neighbouring steps (Learning-to-Cache). [bold]trajectory[/]: whole "
        "runs from noise, where values get as stale as they will; needs no images. [dim]default: pairs where there is "
        "--data[/]",
        rich_help_panel=LEARN,
    ),
]
Steps = Annotated[int, typer.Option(min=2, max=1000, help="Denoising steps of one run.", rich_help_panel=LEARN)]
K1 = Annotated[
    int,
    typer.Option(min=1, help="P-steps after each I-step, first half; above 1: trajectory.", rich_help_panel=LEARN),
]
K2 = Annotated[int, typer.Option(min=1, help="Likewise, second half.", rich_help_panel=LEARN)]
Boundary = Annotated[
    float,
    typer.Option(min=0.0, max=1.0, help="The share of the steps that is the first half.", rich_help_panel=LEARN),
]
SamplerName = Annotated[
    Literal["ddim", "dpm-solver-2"],
    typer.Option(
        help="What leads from step to step. [bold]dpm-solver-2[/] evaluates the model twice per step of its own; only "
        "first evaluations are P-steps.",
        rich_help_panel=LEARN,
    ),
]
SiteKind = Annotated[
    Kept,
    typer.Option(
        help="What is kept: branch outputs before the gate, after it ([bold]delta[/]), or a block's whole change.",
        rich_help_panel=LEARN,
    ),
]
Price = Annotated[
    float | None,
    typer.Option(
        "--lambda",
        min=0.0,
        help="Price of computing one site at one step, in units of the squared error. Larger caches more; 0 caches "
        "nothing. [dim]default: routers 2e-6, or 0 where there is a target; predictors 0[/]",
        rich_help_panel=LEARN,
    ),
]
TargetWeight = Annotated[
    float | None,
    typer.Option(
        "--target",
        min=0.0,
        max=1.0,
        help="Instead: a mean weight to reach. [dim]default: predictors 0.5, unless there is a --lambda[/]",
        rich_help_panel=LEARN,
    ),
]
Strength = Annotated[
    float | None,
    typer.Option(
        "--target-strength",
        min=0.0,
        help="Price of missing the target: times (mean weight - target)², in units of the squared error. "
        "[dim]default: routers 1; predictors keep to the target exactly[/]",
        rich_help_panel=LEARN,
    ),
]
Compared = Annotated[
    Target,
    typer.Option(
        "--compare", help="Student and teacher agree in the output, or in the final stream.", rich_help_panel=LEARN
    ),
]
Cfg = Annotated[
    float,
    typer.Option(
        min=1.0,
        help="Guidance of the trajectories; above 1 they cost twice.",
        callback=options.finite,
        rich_help_panel=LEARN,
    ),
]
Iterations = Annotated[
    int | None,
    typer.Option(
        min=1, help="Steps of the optimiser. Only these give the same result on all machines.", rich_help_panel=_RUN
    ),
]
Minutes = Annotated[
    float | None,
    typer.Option(
        min=0.0,
        help="Time limit: how far that leads depends on the machine. [dim]default: 10 without --iterations[/]",
        rich_help_panel=_RUN,
    ),
]
TrainBatch = Annotated[
    int, typer.Option("--batch", "-b", min=1, help="Images per step of the optimiser.", rich_help_panel=_RUN)
]
Groups = Annotated[
    int,
    typer.Option(
        min=1,
        help="Parts of the batch, each with a pair of steps or a run of its own. They are dealt out to the processes.",
        rich_help_panel=_RUN,
    ),
]
Rate = Annotated[
    float | None,
    typer.Option(
        "--lr",
        help="Learning rate of AdamW. [dim]default: router 0.2, table 0.1, network 0.01, stream 0.05[/]",
        rich_help_panel=_RUN,
    ),
]
TrainSeed = Annotated[
    int, typer.Option(min=0, max=options.MAX_SEED, help="Seed of everything that is drawn.", rich_help_panel=_RUN)
]
Device = Annotated[Literal["cpu", "cuda"], typer.Option(help="Where to train.", rich_help_panel=_RUN)]
Fast = Annotated[bool, typer.Option("--compile", help="Compile teacher and student first.", rich_help_panel=_RUN)]
PlanBatch = Annotated[int, typer.Option(min=1, help="Rows of one model call under the plan.", rich_help_panel=_PLAN)]
PlanOptions = Annotated[
    list[str] | None,
    typer.Option(
        "--option",
        "-o",
        metavar="NAME=VALUE",
        help="An option of the policy that makes the plan (l2c for routers, tokencache for predictors), once for "
        "each; [bold]tcc plan --policy l2c --explain[/] lists them. What the training decides is no such option.",
        show_default=False,
        rich_help_panel=_PLAN,
    ),
]


@dataclass(frozen=True, kw_only=True)
class Learning:
    """What is learned from what, for how long, and what is written."""

    out: Out
    learned: Learned = None
    json: options.Json = None
    model: options.TrainedName = "reference"
    data: Data = None
    recipe: RecipeName = None
    steps: Steps = 50
    k1: K1 = 1
    k2: K2 = 1
    boundary: Boundary = 0.5
    sampler: SamplerName = "ddim"
    sites: SiteKind = "out"
    price: Price = None
    target: TargetWeight = None
    strength: Strength = None
    compare: Compared = "output"
    cfg: Cfg = 1.0
    iterations: Iterations = None
    minutes: Minutes = None
    batch: TrainBatch = 4
    groups: Groups = 1
    lr: Rate = None
    seed: TrainSeed = 0
    device: Device = "cpu"
    compile: Fast = False
    option: PlanOptions = None
    plan_batch: PlanBatch = 20

    def __post_init__(self) -> None:
        if self.batch % self.groups:
            raise typer.BadParameter(
                f"{self.batch} images do not make {self.groups} equal groups", param_hint="--groups"
            )
        if self.strength is not None and self.target is None:
            raise typer.BadParameter("there is no target to miss: give --target", param_hint="--target-strength")
        if self.sampler == "dpm-solver-2" and self.steps % 2:
            raise typer.BadParameter("dpm-solver-2 evaluates twice per step: give an even number", param_hint="--steps")
        if self.kind == "pairs":
            self._check_pairs()
        elif self.data is not None:
            raise typer.BadParameter(
                "trajectories begin from noise: leave out --data, or use --recipe pairs", param_hint="--data"
            )
        written = {"--out": self.out, "the training's state": self.state, "--json": self.json}
        options.check_apart(written | {"--learned": self.learned}, self.model)

    def _check_pairs(self) -> None:
        if self.data is None:
            raise typer.BadParameter("pairs are made of noised images: give --data", param_hint="--recipe")
        if (self.k1, self.k2) != (1, 1):
            raise typer.BadParameter("pairs have one P-step each: use --recipe trajectory", param_hint="--k1, --k2")
        if self.cfg != 1:
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
    def state(self) -> Path:
        """The state of the training."""
        return self.out.with_name(self.out.name.removesuffix(".safetensors") + ".state.safetensors")

    def budget(self, *, held: bool = False) -> Budget:
        """The price of computing; none for missing a target where the weights are held at it."""
        price = self.price if self.price is not None else (2e-6 if self.target is None else 0.0)
        return Budget(price, self.target, 0.0 if held else 1.0 if self.strength is None else self.strength)

    def settings(self, lr: float) -> Settings:
        """How long and how fast, `lr` by default; ten minutes where nothing else ends the training."""
        limit = 10.0 if self.iterations is None and self.minutes is None else self.minutes
        return Settings(self.iterations, limit, lr if self.lr is None else self.lr, self.groups, self.seed)

    def sampled_by(self, model: Architecture, *, clip: bool | None = None) -> Sampler:
        """The sampler; by default pixels are clamped, for the latents of an encoder have no bounds."""
        clamped = model.config.in_channels in (1, 3) if clip is None else clip
        return named(self.sampler, clip=clamped, diffusion=model.diffusion)

    def choices(self, names: tuple[str, ...], evaluations: Sequence[Evaluation]) -> Choices:
        """The P-steps of the schedule; from the image backwards for pairs, so that an even run ends with a P-step."""
        if self.kind == "pairs":
            p_steps = set(choices_of_pairs(self.steps, names))
        else:
            p_steps = set(range(self.steps)) - set(tprr_steps(self.steps, self.k1, self.k2, self.boundary))
        return dict.fromkeys(first_evaluations(p_steps, [at.stage for at in evaluations]), names)
