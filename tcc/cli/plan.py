"""`tcc plan`: make a cache plan with a policy, show it, save it, draw it."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any, Literal

import typer

from tcc import plans
from tcc.cli import options, screen
from tcc.cli.subjects import Subject, load_subject, look
from tcc.plan import Attention, CachePlan
from tcc.plan_picture import facts

__all__ = ["plan"]

POLICIES: dict[str, Callable[..., CachePlan]] = {"full": plans.full, "fora": plans.fora, "tprr": plans.tprr}

_FORA = "Options of fora"
_TPRR = "Options of tprr"
Policy = Annotated[
    Literal["full", "fora", "tprr"],
    typer.Option("--policy", "-p", help="The policy; its options are below. [bold]full[/] caches nothing."),
]
Steps = Annotated[int, typer.Option(min=1, max=1000, help="Denoising steps of one run.")]
Out = Annotated[Path | None, typer.Option(metavar="FILE", help="Save the plan (.safetensors).")]
Png = Annotated[Path | None, typer.Option(metavar="FILE", help="Draw steps x sites, coloured by action.")]
Interval = Annotated[
    int | None, typer.Option(help="Compute every N-th step. [dim]default: 3[/]", rich_help_panel=_FORA)
]
Sites = Annotated[
    Literal["out", "delta"] | None,
    typer.Option(help="Keep branch outputs before or after the gate. [dim]default: out[/]", rich_help_panel=_FORA),
]
K1 = Annotated[
    int | None, typer.Option(help="P-steps after each I-step, first phase. [dim]default: 3[/]", rich_help_panel=_TPRR)
]
K2 = Annotated[int | None, typer.Option(help="Likewise, second phase. [dim]default: 1[/]", rich_help_panel=_TPRR)]
Boundary = Annotated[
    float | None, typer.Option(help="Share of steps in the first phase. [dim]default: 0.5[/]", rich_help_panel=_TPRR)
]
Cycle = Annotated[
    Literal["p_steps", "length"] | None,
    typer.Option(
        help="Read k1 and k2 as P-steps per cycle or as its length. [dim]default: p_steps[/]", rich_help_panel=_TPRR
    ),
]
Keep = Annotated[
    float | None,
    typer.Option(help="Keep ratio: share of tokens updated on a P-step. [dim]default: 0.5[/]", rich_help_panel=_TPRR),
]
Attends = Annotated[
    Attention | None,
    typer.Option(
        "--attention",
        help="What updated tokens see: each other, all tokens as they are now, or cached keys and values. "
        "[dim]default: kept[/]",
        rich_help_panel=_TPRR,
    ),
]
Blocks = Annotated[
    str | None, typer.Option(help="Blocks to prune, such as 2-11. [dim]default: all[/]", rich_help_panel=_TPRR)
]
Level = Annotated[
    Literal["block", "branch", "out"] | None,
    typer.Option(
        help="Keep a delta per block, a delta per branch, or branch outputs before the gate. [dim]default: block[/]",
        rich_help_panel=_TPRR,
    ),
]
Tokens = Annotated[
    Literal["uniform", "random", "checkerboard"] | None,
    typer.Option(help="How the updated tokens are chosen. [dim]default: checkerboard[/]", rich_help_panel=_TPRR),
]
Cell = Annotated[
    int | None, typer.Option(help="Side of a checkerboard cell. [dim]default: 2[/]", rich_help_panel=_TPRR)
]
TokenSeed = Annotated[
    int | None, typer.Option("--seed", help="Seed of random tokens. [dim]default: 0[/]", rich_help_panel=_TPRR)
]
Rotate = Annotated[
    bool | None,
    typer.Option(
        "--rotate/--no-rotate", help="Other tokens at every P-step. [dim]default: no[/]", rich_help_panel=_TPRR
    ),
]


def plan(
    ctx: typer.Context,  # the options after `batch` are read from here: each policy takes its own
    policy: Policy = "tprr",
    steps: Steps = 50,
    out: Out = None,
    png: Png = None,
    json: options.Json = None,
    model: options.ModelName = "reference",
    input_size: options.InputSize = 32,
    batch: options.Batch = 20,
    interval: Interval = None,
    sites: Sites = None,
    k1: K1 = None,
    k2: K2 = None,
    boundary: Boundary = None,
    cycle: Cycle = None,
    keep: Keep = None,
    attention: Attends = None,
    blocks: Blocks = None,
    level: Level = None,
    tokens: Tokens = None,
    cell: Cell = None,
    seed: TokenSeed = None,
    rotate: Rotate = None,
) -> None:
    """Make a cache plan: which sites are computed, updated or reused at which denoising step.

    A plan belongs to one model, input size and batch. Its [bold]bound[/] is the
    speedup that its MACs allow; [bold]tcc demo[/] measures real ones.

    [bold]Examples[/]

      tcc plan --policy fora --interval 3 --png fora.png
      tcc plan --keep 0.25 --attention cached --rotate --out plan.safetensors
      tcc plan --model DiT-S/2 --batch 2 --blocks 2-11
      tcc inspect plan.safetensors
    """
    chosen = _options_of(policy, ctx.params)
    with screen.status(f"loading {model}"):
        subject = load_subject(model, batch=batch, input_size=input_size)
    made = _make(subject, policy, steps, chosen)
    _show(made, subject.label, out, png, json)


def _make(subject: Subject, policy: str, steps: int, chosen: dict[str, Any]) -> CachePlan:
    info = look(subject.model, subject.args, subject.kwargs, subject.label)
    with screen.status("planning"):
        return POLICIES[policy](info, num_steps=steps, **chosen)


def _options_of(policy: str, given: dict[str, Any]) -> dict[str, Any]:
    """The policy options that were given, all of which `policy` must take.

    Raises:
        typer.BadParameter: an option of another policy; it would have no effect.
    """
    takes = {name: set(inspect.signature(make).parameters) for name, make in POLICIES.items()}
    known = set.union(*takes.values()) - takes["full"]
    chosen = {name: option for name, option in given.items() if name in known and option is not None}
    for name in chosen:
        if name not in takes[policy]:
            raise typer.BadParameter(f"policy {policy} has no such option", param_hint=f"--{name}")
    if "blocks" in chosen:
        chosen["blocks"] = options.numbers(chosen["blocks"], "--blocks")
    return chosen


def _show(made: CachePlan, label: str, out: Path | None, png: Path | None, json: Path | None) -> None:
    """Print the summary, and write what was asked for."""
    inputs = ", ".join(f"{name} {list(shape)}" for name, shape in made.model.inputs) if made.model else ""
    screen.out().print(f"model    {label}: {inputs}", soft_wrap=True, markup=False)
    screen.out().print(made.summary(), soft_wrap=True, markup=False)
    if out is not None:
        made.save(str(out))
        screen.note(f"wrote {out}")
    if png is not None:
        made.plot(str(png))
        screen.note(f"wrote {png}")
    screen.write_json(json, {"model": label, **facts(made)})
