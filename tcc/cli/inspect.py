"""`tcc inspect`: what tcc sees in a model, or what a plan file or a bundle says."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer
from safetensors import SafetensorError, safe_open

from tcc.cli import options, screen
from tcc.cli.bundles import bundle_tables
from tcc.export.manifest import MANIFEST, read
from tcc.plan import CachePlan
from tcc.plan.file import FORMAT
from tcc.plan.picture import facts

__all__ = ["inspect"]

What = Annotated[
    str | None,
    typer.Argument(help="A plan file, a bundle, or a model as for --model.", show_default=False, is_eager=True),
]


def inspect(
    ctx: typer.Context,
    what: What = None,
    model: options.ModelName = "",
    input_size: options.InputSize = 32,
    batch: options.Batch = 2,
    json: options.Json = None,
) -> None:
    """Show what tcc sees in a model: its blocks, its token grid, and every site a plan can act on.

    A site is a value that can be kept from one denoising step to the next.
    The table gives its shape, the MACs of computing it for one image, the size
    of its slot, and whether single tokens of it can be updated, or why not.
    Given a plan file, the command prints that plan's summary instead; given the
    folder of a bundle, what is in it, after checking every file.

    [bold]Examples[/]

      tcc inspect                              the reference model
      tcc inspect DiT-XL/2 --json sites.json   a published size, no weights made
      tcc inspect mine.models:small            your own (model, args, kwargs)
      tcc inspect plan.safetensors             a plan written by tcc plan
      tcc inspect bundle                       a folder written by tcc export
    """
    if what and model and what != model:
        raise typer.BadParameter(f"give one thing to look at, {what} or --model {model}")
    name = what or model or "reference"
    if _is_plan(name):
        _is_made_for_its_own(ctx, f"the plan {name}")
        plan = CachePlan.load(name)
        screen.out().print(plan.summary(), soft_wrap=True, markup=False)
        screen.write_json(json, facts(plan))
        return
    if Path(name, MANIFEST).exists() or any(Path(name).glob(f"*/{MANIFEST}")):  # a Triton model has it in `1`
        _is_made_for_its_own(ctx, f"the bundle {name}")
        manifest = read(Path(name))
        for table in bundle_tables(name, manifest):
            screen.out().print(table)
        screen.write_json(json, asdict(manifest))
        return
    from tcc.cli.subjects import load_subject, look  # here: a bundle is shown without the code of any model

    subject = load_subject(name, batch=batch, input_size=input_size, device="meta")
    info = look(subject.model, subject.args, subject.kwargs, subject.label)
    table = info.table()
    table.title = f"{subject.label}: {table.title}"
    screen.out().print(table)
    macs = {"macs": info.macs, "tokens": info.num_tokens, "grid": list(info.grid), "batch": info.batch}
    screen.write_json(json, {"model": subject.label, **macs, "blocks": list(info.blocks), "sites": info.rows()})


def _is_made_for_its_own(ctx: typer.Context, what: str) -> None:
    """Check that nobody asks for inputs of another size.

    Raises:
        typer.BadParameter: somebody does.
    """
    for name, option in (("input_size", "--input-size"), ("batch", "--batch")):
        if (source := ctx.get_parameter_source(name)) is not None and source.name == "COMMANDLINE":
            raise typer.BadParameter(f"{what} is for inputs of its own: leave this out", param_hint=option)


def _is_plan(name: str) -> bool:
    """Whether `name` is a plan file, by its header."""
    if not name.endswith(".safetensors"):
        return False
    try:
        with safe_open(name, framework="pt") as file:
            return (file.metadata() or {}).get("format") == FORMAT
    except (SafetensorError, OSError):
        return False
