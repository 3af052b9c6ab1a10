"""Command-line options that several commands share."""

from __future__ import annotations

import dataclasses
import functools
import inspect
import math
import os
import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, get_type_hints

import typer

from tcc.cli import screen

__all__ = [
    "MAX_SEED",
    "Backend",
    "BackwardsError",
    "Batch",
    "Cfg",
    "Classes",
    "InputSize",
    "Json",
    "MaxSlotBytes",
    "ModelName",
    "Regional",
    "Rounds",
    "Seconds",
    "Seed",
    "SlotDtype",
    "Threads",
    "TrainedName",
    "WeightsName",
    "check_apart",
    "finite",
    "in_a_folder",
    "numbers",
    "picture_file",
    "samples_file",
    "spread",
    "tensors_file",
    "whole_numbers",
]


def in_a_folder(path: Path | None) -> Path | None:
    """What is to be written, if it can be: said before hours of work, not after.

    Raises:
        typer.BadParameter: there is no such folder or nothing can be written in it, or the path is a folder, a device
            or a pipe, in whose place a file would be put.
    """
    if path is None:
        return None
    if not path.absolute().parent.is_dir():
        raise typer.BadParameter(f"there is no folder {path.parent}: make it first")
    if path.is_dir():
        raise typer.BadParameter(f"{path} is a folder: name a file")
    if path.exists() and not path.is_file():
        raise typer.BadParameter(f"{path} is a device or a pipe: name a file")
    folder = path.absolute().parent
    if not os.access(folder, os.W_OK | os.X_OK) or (path.exists() and not os.access(path.absolute(), os.W_OK)):
        raise typer.BadParameter(f"{path} cannot be written: name a file in a folder of yours")
    return path


def tensors_file(path: Path | None) -> Path | None:
    """A plan or what was learned that is to be written, see `in_a_folder`.

    Raises:
        typer.BadParameter: there is no writing to it, or it is not named as such files are.
    """
    if in_a_folder(path) is not None and path is not None and path.suffix != ".safetensors":
        raise typer.BadParameter(f"{path}: this is a .safetensors file: name it {path.stem}.safetensors")
    return path


def picture_file(path: Path | None) -> Path | None:
    """A picture that is to be written, see `in_a_folder`.

    Raises:
        typer.BadParameter: there is no writing to it, or matplotlib knows no such format.
    """
    return _file(path, ())


def _file(path: Path | None, beside: Sequence[str]) -> Path | None:
    """A picture, or a file with one of the endings `beside`."""
    if in_a_folder(path) is not None and path is not None and path.suffix not in beside:
        from matplotlib.backend_bases import FigureCanvasBase  # here: slow to import, and not every command draws

        known = FigureCanvasBase.get_supported_filetypes()
        if path.suffix[1:].lower() not in known:
            endings = ", ".join((".png", *beside, *(f".{name}" for name in sorted(known) if name != "png")))
            raise typer.BadParameter(f"{path}: no such file is written: use one of {endings}")
    return path


def samples_file(path: Path | None) -> Path | None:
    """A picture or numbers that are to be written, see `picture_file`.

    Raises:
        typer.BadParameter: it is neither, or there is no writing to it.
    """
    return _file(path, (".safetensors",))


def check_apart(written: Mapping[str, Path | None], model: str = "") -> None:
    """Refuse files that would be written over each other, or over the model's weights.

    Args:
        written: the files, by option.
        model: what `--model` names.

    Raises:
        typer.BadParameter: two are one file.
    """
    found = {Path(model).resolve(): "--model"} if model and Path(model).is_file() else {}
    for name, path in written.items():
        if path is not None and (other := found.setdefault(path.resolve(), name)) != name:
            raise typer.BadParameter(f"{path} is the file of {other} too: name another one", param_hint=name)


def of_the_model(ctx: typer.Context, param: typer.CallbackParam, value: int) -> int:
    """A size of the inputs, if it is tcc that makes them for the model; `--model` is read before (`is_eager`).

    Raises:
        typer.BadParameter: it is asked for, and the model comes with its own.
    """
    source, name = ctx.get_parameter_source(str(param.name)), ctx.params.get("what") or ctx.params.get("model")
    name = name or "reference"
    if source is not None and source.name == "COMMANDLINE":
        from tcc.cli.subjects import kind_of  # here: imports the models, which few options need

        kind = kind_of(name)
        if kind == "callable":
            raise typer.BadParameter(
                f"{name} returns the inputs of its own call: choose them there, and leave this out"
            )
        if kind == "file" and param.name == "input_size":
            raise typer.BadParameter(f"{name} is for one size of its input: leave this out")
    return value


def finite(value: float | None) -> float | None:
    """A number that can be calculated with; bounds let "nan" and "inf" through.

    Raises:
        typer.BadParameter: it is none.
    """
    if value is not None and not math.isfinite(value):
        raise typer.BadParameter(f"{value} is no finite number")
    return value


#: What torch's generators take, less the next one, which some draws have.
MAX_SEED = 2**63 - 2

_MODEL = (
    "[bold]reference[/] (the trained model that comes with tcc), a size such as [bold]DiT-S/2[/], [bold]UViT-S/2[/], "
    "[bold]MDT-S/2[/] or [bold]MDTv2-S/2[/] (random weights), a weights file ([bold].safetensors[/] or [bold].pt[/]) "
    "of one of these, or [bold]package.module:callable[/], which is called without arguments and returns (model, args, "
    "kwargs)."
)
_WEIGHTS = "[bold]reference[/] (the trained model that comes with tcc), or a weights file of a DiT on pixels."

ModelName = Annotated[str, typer.Option("--model", "-m", help=_MODEL, is_eager=True)]
TrainedName = Annotated[
    str,
    typer.Option(
        "--model",
        "-m",
        help="[bold]reference[/] (the trained model that comes with tcc), or a weights file of a DiT, U-ViT or MDT.",
    ),
]
WeightsName = Annotated[str, typer.Option("--model", "-m", help=_WEIGHTS)]
InputSize = Annotated[
    int,
    typer.Option(
        min=1,
        help="Side of the input, in pixels or latent pixels, of a size such as DiT-S/2; other models have their own.",
        callback=of_the_model,
    ),
]
Batch = Annotated[
    int,
    typer.Option(
        "--batch",
        "-b",
        min=1,
        help="Rows of one model call: images, times two under guidance. A callable has its own.",
        callback=of_the_model,
    ),
]


def _json_file(path: Path | None) -> Path | None:
    screen.json_to(path)
    return path if str(path) == screen.STDOUT else in_a_folder(path)


Json = Annotated[
    Path | None,
    typer.Option(
        "--json", metavar="FILE", help="Also write the numbers as JSON; [bold]-[/] is stdout.", callback=_json_file
    ),
]
Backend = Annotated[
    Literal["inductor", "eager"],
    typer.Option(help="[bold]inductor[/] compiles (seconds to a minute per variant), [bold]eager[/] only rewrites."),
]
Classes = Annotated[str, typer.Option(help="Class labels, one image each: [bold]0,1,2[/] or [bold]0-9[/].")]
Cfg = Annotated[float, typer.Option(min=1.0, help="Guidance scale; above 1 the batch is doubled.", callback=finite)]
Seed = Annotated[int, typer.Option(min=0, max=MAX_SEED, help="Seed of the noise: the same seed gives the same noise.")]
Rounds = Annotated[int, typer.Option(min=1, help="How often every method is run.")]
Seconds = Annotated[float, typer.Option(min=0.0, help="No further round begins after so many seconds of measuring.")]
Threads = Annotated[
    int | None, typer.Option(min=1, help="CPU threads. [dim]default: torch's choice, or 1 on a busy machine[/]")
]


def byte_count(text: str) -> int:
    """The bytes in `1048576`, `512KiB`, `20MiB` or `1.5GiB`.

    Raises:
        typer.BadParameter: not such a size.
    """
    found = re.fullmatch(r"(\d+(?:\.\d+)?) ?(B|KiB|MiB|GiB)?", text.strip())
    if found is None:
        raise typer.BadParameter(f"{text!r} is no size: write bytes, such as 1048576, or 512KiB, 20MiB, 1.5GiB")
    return int(float(found[1]) * 1024 ** ("B", "KiB", "MiB", "GiB").index(found[2] or "B"))


MaxSlotBytes = Annotated[
    int | None,
    typer.Option(
        metavar="BYTES",
        parser=byte_count,
        help="Refuse a plan whose slots take more: [bold]1048576[/], [bold]512KiB[/], [bold]20MiB[/].",
        show_default=False,
    ),
]
SlotDtype = Annotated[
    Literal["bfloat16", "float16", "float8_e4m3fn", "float8_e5m2"] | None,
    typer.Option(help="Round what slots keep to this dtype: fewer bytes, and an error to measure.", show_default=False),
]
Regional = Annotated[
    bool, typer.Option("--regional", help="Compile a block once for all of its copies: deep models compile faster.")
]


def spread(command: Callable[..., None]) -> Callable[..., None]:
    """The command with the fields of its first parameter, a dataclass, as options: several commands share them so."""
    first, *own = inspect.signature(command, eval_str=True).parameters.values()
    kinds = get_type_hints(first.annotation, include_extras=True)
    shared = [
        inspect.Parameter(
            field.name,
            inspect.Parameter.KEYWORD_ONLY,
            default=inspect.Parameter.empty if field.default is dataclasses.MISSING else field.default,
            annotation=kinds[field.name],
        )
        for field in dataclasses.fields(first.annotation)
    ]

    @functools.wraps(command)
    def run(**values: Any) -> None:
        given = first.annotation(**{parameter.name: values.pop(parameter.name) for parameter in shared})
        command(given, **values)

    takes = [*shared, *(parameter.replace(kind=inspect.Parameter.KEYWORD_ONLY) for parameter in own)]
    run.__signature__ = inspect.Signature(takes)  # type: ignore[attr-defined]
    run.__annotations__ = {parameter.name: parameter.annotation for parameter in takes}
    return run


def numbers(text: str, option: str) -> list[int]:
    """The numbers in `0,1,2` or `0-9` or a mixture.

    Raises:
        typer.BadParameter: not such a list; names the option.
    """
    try:
        return whole_numbers(text)
    except (ValueError, BackwardsError) as error:
        raise typer.BadParameter(str(error), param_hint=option) from error


class BackwardsError(Exception):
    """A range whose last number is below its first: no numbers at all, and no other reading of the text would do."""


def whole_numbers(text: str) -> list[int]:
    """The numbers in `0,1,2` or `0-9` or a mixture.

    Raises:
        BackwardsError: a range runs backwards.
        ValueError: not such a list.
    """
    found: list[int] = []
    for part in text.split(","):
        first, dash, last = part.strip().partition("-")
        if not first.isdecimal() or (dash and not last.isdecimal()):
            raise ValueError(f"{text!r} is not a list of numbers such as 0,1,2 or 0-9")
        if dash and int(last) < int(first):
            raise BackwardsError(f"the range {part.strip()} runs backwards: write {last}-{first}")
        found += range(int(first), int(last if dash else first) + 1)
    return found
