"""The command line: `tcc demo | inspect | plan | train | sample | bench | export | run`, one file each."""

from __future__ import annotations

import warnings
from typing import Annotated, Any

import typer
from typer.core import TyperGroup

import tcc
from tcc.cli import screen
from tcc.cli.bench import bench
from tcc.cli.demo import demo
from tcc.cli.export import export
from tcc.cli.inspect import inspect
from tcc.cli.plan import plan
from tcc.cli.run import run
from tcc.cli.sample import sample
from tcc.cli.train import app as train
from tcc.errors import TccError

__all__ = ["app", "main"]


class Commands(TyperGroup):
    """The commands; an error that tcc raises on purpose becomes one line and exit code 1."""

    def invoke(self, ctx: Any) -> Any:
        """Run the command."""
        try:
            return super().invoke(ctx)
        except (TccError, OSError) as error:
            if ctx.params.get("debug"):
                raise
            screen.fail(" ".join(str(error).split()))
            raise typer.Exit(1) from None


app = typer.Typer(
    name="tcc",
    cls=Commands,
    no_args_is_help=True,
    rich_markup_mode="rich",
    pretty_exceptions_show_locals=False,
    context_settings={"help_option_names": ["--help", "-h"]},
)


def _version(asked: bool) -> None:
    if asked:
        screen.out().print(f"tcc {tcc.__version__}")
        raise typer.Exit


@app.callback()
def start(
    debug: Annotated[bool, typer.Option("--debug", help="Show the traceback of an error, and warnings.")] = False,
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version.")
    ] = False,
) -> None:
    """tcc, a token-caching compiler for diffusion transformers.

    A diffusion transformer denoises an image in many steps, and much of a step
    repeats the one before. A [bold]plan[/] says which values are computed, updated for
    some tokens or reused at which step; tcc rewrites the model's graph once per
    kind of step and compiles each as one static graph.

    [bold]Start here[/]

      tcc demo                                     speed and error of several plans
      tcc inspect                                  what a plan can act on
      tcc plan -o keep=0.5 --out plan.safetensors  make a plan
      tcc sample --plan plan.safetensors           draw images with it
      tcc train router --out plan.safetensors      learn a plan
      tcc bench plan.safetensors                   measure it beside the uncached model
      tcc export --plan plan.safetensors --out b   a bundle that needs no model code
      tcc run b --null-class 10                    draw images with the bundle
    """
    if not debug:
        warnings.filterwarnings("ignore", category=FutureWarning, module="copyreg")  # torch.export, of its own code


app.command()(bench)
app.command()(demo)
app.command()(export)
app.command()(inspect)
app.command()(plan)
app.add_typer(train, name="train")
app.command()(run)
app.command()(sample)


def main() -> None:
    """Run the command line."""
    app()
