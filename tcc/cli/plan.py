"""`tcc plan`: make a cache plan with a policy, show it, save it, draw it."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Annotated

import torch
import typer

from tcc.cli import options, screen
from tcc.cli.policies import describe, find_policy, option_table, parse_options, policy_table
from tcc.cli.subjects import load_subject, look
from tcc.plan import CachePlan
from tcc.plan.picture import facts
from tcc.plans import shifted

__all__ = ["plan"]

Policy = Annotated[
    str, typer.Option("--policy", "-p", metavar="NAME", help="The policy; [bold]--policies[/] lists them.")
]
Options = Annotated[
    list[str] | None,
    typer.Option(
        "--option",
        "-o",
        metavar="NAME=VALUE",
        help="An option of the policy, once for each; [bold]--explain[/] lists them.",
        show_default=False,
    ),
]
Policies = Annotated[bool, typer.Option("--policies", help="List the policies and stop.")]
Explain = Annotated[bool, typer.Option("--explain", help="Explain the policy and its options, and stop.")]
Steps = Annotated[int, typer.Option(min=1, max=1000, help="Denoising steps of one run: evaluations of the model.")]
Shift = Annotated[
    bool,
    typer.Option("--shifted", help="For a solver of two evaluations per step (DPM-Solver-2): only first ones cache."),
]
Out = Annotated[
    Path | None, typer.Option(metavar="FILE", callback=options.tensors_file, help="Save the plan (.safetensors).")
]
Png = Annotated[
    Path | None,
    typer.Option(metavar="FILE", callback=options.picture_file, help="Draw steps x sites, coloured by action."),
]


def plan(
    policy: Policy = "tprr",
    option: Options = None,
    policies: Policies = False,
    explain: Explain = False,
    steps: Steps = 50,
    shift: Shift = False,
    slot_dtype: options.SlotDtype = None,
    max_slot_bytes: options.MaxSlotBytes = None,
    out: Out = None,
    png: Png = None,
    json: options.Json = None,
    model: options.ModelName = "reference",
    input_size: options.InputSize = 32,
    batch: options.Batch = 20,
) -> None:
    """Make a cache plan: which sites are computed, updated or reused at which denoising step.

    A plan belongs to one model, input size and batch. Its [bold]bound[/] is the
    speedup that its MACs allow; [bold]tcc demo[/] measures real ones.

    [bold]Examples[/]

      tcc plan --policies
      tcc plan --policy tprr --explain
      tcc plan --policy fora -o interval=3 --png fora.png
      tcc plan --policy fora -o interval=2 --shifted --out dpm.safetensors
      tcc plan -o keep=0.25 -o rotate=true --out plan.safetensors
      tcc plan --policy fora --slot-dtype bfloat16 --max-slot-bytes 8MiB
      tcc plan --model DiT-S/2 --batch 2 -o blocks=2-11
      tcc inspect plan.safetensors
    """
    if policies:
        screen.out().print(policy_table())
        return
    make = find_policy(policy)
    if explain:
        screen.out().print(f"{policy}: {describe(make)}\n", markup=False)
        screen.out().print(option_table(make))
        return
    options.check_apart({"--out": out, "--png": png, "--json": json}, model)
    chosen = parse_options(policy, option or ())
    with screen.status(f"loading {model}"):
        subject = load_subject(model, batch=batch, input_size=input_size)
    info = look(subject.model, subject.args, subject.kwargs, subject.label)
    with screen.status("planning"):
        made = make(info, num_steps=steps, **chosen)
        made = shifted(info, made) if shift else made
        if slot_dtype is not None:
            made = info.count(replace(made, slot_dtype=getattr(torch, slot_dtype)))
        if max_slot_bytes is not None:
            made.memory(info, max_slot_bytes)  # refuses the plan if it needs more
    _show(made, subject.label, out, png, json)


def _show(made: CachePlan, label: str, out: Path | None, png: Path | None, json: Path | None) -> None:
    """Print the summary, and write what was asked for."""
    inputs = ", ".join(f"{name} {list(shape)}" for name, shape in made.model.inputs) if made.model else ""
    screen.out().print(f"model    {label}: {inputs}", soft_wrap=True, markup=False)
    screen.out().print(made.summary(), soft_wrap=True, markup=False)
    if out is not None:
        made.save(str(out))
        screen.note(f"wrote {out}")
    else:
        screen.note("nothing was written: --out plan.safetensors saves the plan")
    if png is not None:
        made.plot(str(png))
        screen.note(f"wrote {png}")
    screen.write_json(json, {"model": label, **facts(made)})
