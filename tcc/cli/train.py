"""`tcc train router | predictor`: learn what to cache, on a frozen model."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

import typer

from tcc.cli import options
from tcc.cli.measuring import errors, steps
from tcc.cli.training import Files, Kept, Planned, Run, run_training, settings_of
from tcc.info import ModelInfo
from tcc.train.objective import Target
from tcc.train.predictors import FORMS, Sizes
from tcc.train.weights import Choices, RouterWeights, TokenWeights, Weights

__all__ = ["train"]

train = typer.Typer(no_args_is_help=True, rich_markup_mode="rich")

_LEARN, _PLAN, _RUN = "What is learned from what", "The plan", "How long and where"

Out = Annotated[
    Path,
    typer.Option(
        metavar="FILE",
        callback=options.in_a_folder,
        help="The plan to write; the training's state is kept beside it.",
        show_default=False,
    ),
]
Learned = Annotated[
    Path | None,
    typer.Option(
        metavar="FILE",
        callback=options.in_a_folder,
        help="Also write the scores that were learned, to make other plans from.",
    ),
]
Data = Annotated[
    Path | None,
    typer.Option(
        metavar="FOLDER",
        help="One sub-folder of images per class, or the Fashion-MNIST files. Without: [bold]trajectory[/].",
        rich_help_panel=_LEARN,
    ),
]
RecipeName = Annotated[
    Literal["pairs", "trajectory"] | None,
    typer.Option(
        "--recipe",
        help="[bold]pairs[/]: noised images, two neighbouring steps (Learning-to-Cache). [bold]trajectory[/]: whole "
        "runs from noise, where values get as stale as they will; needs no images. [dim]default: pairs where there is "
        "--data[/]",
        rich_help_panel=_LEARN,
    ),
]
Steps = Annotated[int, typer.Option(min=2, max=1000, help="Denoising steps of one run.", rich_help_panel=_LEARN)]
K1 = Annotated[
    int,
    typer.Option(min=1, help="P-steps after each I-step, first half; above 1: trajectory.", rich_help_panel=_LEARN),
]
K2 = Annotated[int, typer.Option(min=1, help="Likewise, second half.", rich_help_panel=_LEARN)]
SamplerName = Annotated[
    Literal["ddim", "dpm-solver-2"],
    typer.Option(
        help="What samples the trajectories. [bold]dpm-solver-2[/] evaluates the model twice per step of its own; only "
        "first evaluations are P-steps.",
        rich_help_panel=_LEARN,
    ),
]
SiteKind = Annotated[
    Kept,
    typer.Option(
        help="What is kept: branch outputs before the gate, after it ([bold]delta[/]), or a block's whole change.",
        rich_help_panel=_LEARN,
    ),
]
Price = Annotated[
    float | None,
    typer.Option(
        "--lambda",
        min=0.0,
        help="Price of computing one site at one step, in units of the squared error. Larger caches more; 0 caches "
        "nothing. [dim]default: 2e-6, or 0 where there is a target[/]",
        rich_help_panel=_LEARN,
    ),
]
TargetWeight = Annotated[
    float | None,
    typer.Option("--target", min=0.0, max=1.0, help="Instead: a mean weight to reach.", rich_help_panel=_LEARN),
]
Compared = Annotated[
    Target,
    typer.Option(
        "--compare", help="Student and teacher agree in the output, or in the final stream.", rich_help_panel=_LEARN
    ),
]
Cfg = Annotated[
    float, typer.Option(min=1.0, help="Guidance of the trajectories; above 1 they cost twice.", rich_help_panel=_LEARN)
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
Rate = Annotated[float, typer.Option("--lr", help="Learning rate of AdamW.", rich_help_panel=_RUN)]
FormRate = Annotated[
    float | None,
    typer.Option(
        "--lr",
        help="Learning rate of AdamW. [dim]default: table 0.1, network 0.01, stream 0.05[/]",
        rich_help_panel=_RUN,
    ),
]
TrainSeed = Annotated[int, typer.Option(help="Seed of everything that is drawn.", rich_help_panel=_RUN)]
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
        "each; [bold]tcc plan --policy l2c --explain[/] lists them.",
        show_default=False,
        rich_help_panel=_PLAN,
    ),
]
Form = Annotated[
    Literal["table", "network", "stream"],
    typer.Option(
        help="[bold]table[/]: a score per step, block and token. [bold]network[/]: a small network over their "
        "embeddings. [bold]stream[/]: scores that depend on the stream, ranked in the graph.",
        rich_help_panel=_LEARN,
    ),
]


@train.callback()
def start() -> None:
    """Learn what to cache, on a frozen model.

    At every P-step each kept value becomes a mixture, weight x computed +
    (1 - weight) x stored, and the weights are trained so that the model's output
    stays what it was while computing has its price. [bold]router[/] learns one weight
    per branch and step (Learning-to-Cache), [bold]predictor[/] one per token, block and
    step (TokenCache). The weights become a plan.

    [bold]steps[/] and [bold]errors[/] learn nothing by gradients: they search where the computed
    steps stand, and measure what changes from step to step.
    """


train.command("steps")(steps)
train.command("errors")(errors)


@train.command()
def router(
    out: Out,
    learned: Learned = None,
    json: options.Json = None,
    model: options.TrainedName = "reference",
    data: Data = None,
    recipe: RecipeName = None,
    steps: Steps = 50,
    k1: K1 = 1,
    k2: K2 = 1,
    sampler: SamplerName = "ddim",
    sites: SiteKind = "out",
    drop: Annotated[
        bool,
        typer.Option(
            "--drop",
            help="Learn what to leave out instead of what to reuse (Learning-to-Drop, a control).",
            rich_help_panel=_LEARN,
        ),
    ] = False,
    price: Price = None,
    target: TargetWeight = None,
    compare: Compared = "output",
    cfg: Cfg = 1.0,
    iterations: Iterations = None,
    minutes: Minutes = None,
    batch: TrainBatch = 4,
    groups: Groups = 1,
    lr: Rate = 0.2,
    seed: TrainSeed = 0,
    device: Device = "cpu",
    compile: Fast = False,
    option: PlanOptions = None,
    plan_batch: PlanBatch = 20,
) -> None:
    """Learn which branches a P-step computes (Learning-to-Cache).

    A stopped training goes on with the same command: with --iterations to the same
    result. A finished one stays as it is.

    [bold]Examples[/]

      tcc train router --data fashion-mnist --out plan50.safetensors --learned router50.safetensors
      tcc train router --steps 20 --lambda 1e-5 --minutes 5 -o theta=0.5 --out plan20.safetensors
      torchrun --nproc-per-node 2 -m tcc train router --groups 2 --out plan50.safetensors
    """
    run = Run(
        model,
        data,
        recipe,
        steps,
        (k1, k2),
        sites,
        price,
        target,
        compare,
        cfg,
        batch,
        groups,
        device,
        compile,
        drop=drop,
        sampler=sampler,
    )
    planned = Planned.of("learning_to_drop" if drop else "l2c", "router", option or [])
    settings = settings_of(iterations, minutes, lr, groups, seed)

    def make(info: ModelInfo, names: tuple[str, ...], choices: Choices) -> Weights:
        return RouterWeights(steps, names, choices, seed=seed).to(device)

    run_training(run, settings, make, planned, Files(out, learned, json), plan_batch)


@train.command()
def predictor(
    out: Out,
    learned: Learned = None,
    json: options.Json = None,
    model: options.TrainedName = "reference",
    form: Form = "table",
    data: Data = None,
    recipe: RecipeName = None,
    steps: Steps = 50,
    k1: K1 = 1,
    k2: K2 = 1,
    sampler: SamplerName = "ddim",
    sites: SiteKind = "out",
    price: Price = None,
    target: TargetWeight = None,
    compare: Compared = "output",
    cfg: Cfg = 1.0,
    iterations: Iterations = None,
    minutes: Minutes = None,
    batch: TrainBatch = 4,
    groups: Groups = 1,
    lr: FormRate = None,
    seed: TrainSeed = 0,
    device: Device = "cpu",
    compile: Fast = False,
    option: PlanOptions = None,
    plan_batch: PlanBatch = 20,
) -> None:
    """Learn which tokens a P-step updates (TokenCache).

    A stopped training goes on with the same command: with --iterations to the same
    result. A finished one stays as it is.

    [bold]Examples[/]

      tcc train predictor --out plan50.safetensors --learned importance.safetensors
      tcc train predictor --form stream --data photos --target 0.5 -o keep=0.25 --out plan50.safetensors
    """
    run = Run(
        model, data, recipe, steps, (k1, k2), sites, price, target, compare, cfg, batch, groups, device, compile,
        held=target is not None, sampler=sampler,
    )  # fmt: skip
    if run.kind == "pairs" and steps % 2:
        raise typer.BadParameter(
            "pairs are counted back from the image, and the plan from the noise: give an even number, or use "
            "--recipe trajectory",
            param_hint="--steps",
        )
    level = {"out": "out", "delta": "branch", "block": "block"}[sites]
    planned = Planned.of("tokencache", "importance", [f"k1={k1}", f"k2={k2}", f"level={level}", *(option or [])])
    rate = {"table": 0.1, "network": 0.01, "stream": 0.05}[form] if lr is None else lr
    settings = settings_of(iterations, minutes, rate, groups, seed)

    def make(info: ModelInfo, names: tuple[str, ...], choices: Choices) -> Weights:
        return TokenWeights(FORMS[form](Sizes.of(info, steps), seed=seed, mean=target), info, choices).to(device)

    run_training(run, settings, make, planned, Files(out, learned, json), plan_batch)
