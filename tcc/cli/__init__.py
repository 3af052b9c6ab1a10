"""The command line: `tcc demo | inspect | plan | train | sample | bench | export | run`, one file each."""

from __future__ import annotations

import importlib
import os
import time
import warnings
from collections.abc import Iterator, Mapping
from typing import Annotated, Any

import typer
from typer.core import TyperGroup

import tcc
from tcc.cli import screen
from tcc.errors import TccError

__all__ = ["app", "main"]

#: The commands, in the order of the help: `<name>` of `tcc.cli.<name>`, a function or an app with commands of its own.
NAMES = ("bench", "demo", "export", "inspect", "plan", "train", "run", "sample")


class Files(Mapping[str, Any]):
    """The commands by name; one is imported when it is asked for, so that none needs what only others do."""

    def __init__(self) -> None:
        self._made: dict[str, Any] = {}

    def __getitem__(self, name: str) -> Any:
        if name not in NAMES:
            raise KeyError(name)
        if name not in self._made:
            found, holder = getattr(importlib.import_module(f"tcc.cli.{name}"), name), typer.Typer(**_SETTINGS)
            if isinstance(found, typer.Typer):
                holder.add_typer(found, name=name)
            else:
                holder.command(name)(found)
            self._made[name] = typer.main.get_group(holder).commands[name]
        return self._made[name]

    def __iter__(self) -> Iterator[str]:
        return iter(NAMES)

    def __len__(self) -> int:
        return len(NAMES)


class Commands(TyperGroup):
    """The commands; an error that tcc raises on purpose becomes one line and exit code 1."""

    def __init__(self, **settings: Any) -> None:
        super().__init__(**settings)
        self.commands = Files()  # type: ignore[assignment]

    def list_commands(self, ctx: Any) -> list[str]:
        """Their names, without importing them."""
        return list(NAMES)

    def invoke(self, ctx: Any) -> Any:
        """Run the command."""
        try:
            return super().invoke(ctx)
        except (TccError, OSError) as error:
            if ctx.params.get("debug"):
                raise
            _let_the_first_speak()
            screen.fail(" ".join(str(error).split()))
            raise typer.Exit(1) from None
        except typer.BadParameter:
            _let_the_first_speak()
            raise


def _let_the_first_speak() -> None:
    """Wait, if torchrun has started this process beside a first one: all make the same mistake, and one says so.

    torchrun ends the others when the first one has failed. What goes wrong here alone is said after the wait.
    """
    if int(os.environ.get("RANK", "0")) > 0:
        time.sleep(5)


_SETTINGS: dict[str, Any] = {"rich_markup_mode": "rich", "pretty_exceptions_show_locals": False}
app = typer.Typer(
    name="tcc",
    cls=Commands,
    no_args_is_help=True,
    **_SETTINGS,
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


def main() -> None:
    """Run the command line."""
    app()
