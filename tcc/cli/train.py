"""`tcc train router | predictor`: learn what to cache, on a frozen model."""

from __future__ import annotations

from dataclasses import replace
from typing import Annotated, Literal

import typer

from tcc.cli.measuring import errors, steps
from tcc.cli.options import spread
from tcc.cli.train_options import LEARN, Learning
from tcc.cli.training import Planned, run_training
from tcc.info import ModelInfo
from tcc.train.predictors import FORMS, Sizes
from tcc.train.weights import Choices, RouterWeights, TokenWeights, Weights

__all__ = ["train"]

train = typer.Typer(no_args_is_help=True, rich_markup_mode="rich")

#: The rates at which the forms of a predictor learn, and the levels of a plan by what was kept in training.
_RATES = {"table": 0.1, "network": 0.01, "stream": 0.05}
_LEVELS = {"out": "out", "delta": "branch", "block": "block"}

Drop = Annotated[
    bool,
    typer.Option(
        "--drop",
        help="Learn what to leave out instead of what to reuse (Learning-to-Drop, a control).",
        rich_help_panel=LEARN,
    ),
]
Form = Annotated[
    Literal["table", "network", "stream"],
    typer.Option(
        help="[bold]table[/]: a score per step, block and token. [bold]network[/]: a small network over their "
        "embeddings. [bold]stream[/]: scores that depend on the stream, ranked in the graph.",
        rich_help_panel=LEARN,
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
@spread
def router(given: Learning, drop: Drop = False) -> None:
    """Learn which branches a P-step computes (Learning-to-Cache).

    A stopped training goes on with the same command: with --iterations to the same
    result. A finished one stays as it is.

    [bold]Examples[/]

      tcc train router --data fashion-mnist --out plan50.safetensors --learned router50.safetensors
      tcc train router --steps 20 --lambda 1e-5 --minutes 5 -o theta=0.5 --out plan20.safetensors
      torchrun --nproc-per-node 2 -m tcc train router --groups 2 --out plan50.safetensors
    """

    def make(info: ModelInfo, names: tuple[str, ...], choices: Choices) -> Weights:
        return RouterWeights(given.steps, names, choices, seed=given.seed).to(given.device)

    decided = {"router": "it is what is learned", "sites": "give --sites", "shifted": "give --sampler"}
    planned = Planned.of("learning_to_drop" if drop else "l2c", "router", given.option or [], decided=decided)
    run_training(given, given.budget(), given.settings(0.2), make, planned, drop=drop)


@train.command()
@spread
def predictor(given: Learning, form: Form = "table") -> None:
    """Learn which tokens a P-step updates (TokenCache).

    A stopped training goes on with the same command: with --iterations to the same
    result. A finished one stays as it is.

    [bold]Examples[/]

      tcc train predictor --out plan50.safetensors --learned importance.safetensors
      tcc train predictor --form stream --data photos --target 0.5 -o keep=0.25 --out plan50.safetensors
    """
    if given.kind == "pairs" and given.steps % 2:
        raise typer.BadParameter(
            "pairs are counted back from the image, and the plan from the noise: give an even number, or use "
            "--recipe trajectory",
            param_hint="--steps",
        )
    if given.target is None and given.price is None:
        given = replace(given, target=0.5)
    held = given.target if given.strength is None else None
    if held is not None and not 0 < held < 1:
        raise typer.BadParameter(
            f"weights are held at a mean between 0 and 1, not at {held:g}: take another, or give --target-strength",
            param_hint="--target",
        )

    def make(info: ModelInfo, names: tuple[str, ...], choices: Choices) -> Weights:
        learner = FORMS[form](Sizes.of(info, given.steps), seed=given.seed, mean=held)
        return TokenWeights(learner, info, choices).to(given.device)

    fixed = {"k1": given.k1, "k2": given.k2, "boundary": given.boundary, "level": _LEVELS[given.sites]}
    decided = {"importance": "it is what is learned", "level": "give --sites", "cycle": "give --k1 and --k2"}
    decided |= {name: f"give --{name}" for name in ("k1", "k2", "boundary")}
    planned = Planned.of("tokencache", "importance", given.option or [], decided=decided, fixed=fixed)
    run_training(given, given.budget(held=held is not None), given.settings(_RATES[form]), make, planned)
