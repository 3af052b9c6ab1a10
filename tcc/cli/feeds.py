"""What `tcc run` gives the inputs of a bundle: the sampler's sample and timestep, labels, and what the user names."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import typer
from safetensors import SafetensorError
from safetensors.torch import load_file

from tcc.errors import CallError
from tcc.export.manifest import Input

__all__ = ["Parts", "parts_of", "read_inputs"]


@dataclass(frozen=True)
class Parts:
    """The inputs of a bundle by what fills them.

    Attributes:
        sample: what is drawn.
        timestep: what the sampler says at each step; None where the model is not told.
        label: what `--classes` fills; None where there is none, or the user gives it.
        given: what the user gives, by name.
    """

    sample: Input
    timestep: Input | None
    label: Input | None
    given: dict[str, torch.Tensor]


def parts_of(folder: Path, inputs: Sequence[Input], given: dict[str, torch.Tensor]) -> Parts:
    """Sort the inputs of the bundle in `folder`.

    Raises:
        CallError: nothing is left to draw, or something has no default; all of that is listed.
    """
    left = {role: [spec for spec in inputs if spec.role == role and spec.name not in given] for role in _DEFAULTS}
    sample, timestep, label = (next(iter(left[role]), None) for role in _DEFAULTS)
    if sample is None:
        raise CallError(f"{folder}: no input is left that is drawn: {_listed(inputs)}")
    filled = {spec.name for spec in (sample, timestep, label) if spec is not None}
    if missing := [spec for spec in inputs if spec.name not in filled | given.keys()]:
        first = missing[0].name
        raise CallError(
            f"{folder}: {'this input has' if len(missing) == 1 else 'these inputs have'} no default: "
            f"{_listed(missing)}. Give each: --input {first}=FILE.npy, --input {first}=FILE.safetensors, or a number"
        )
    return Parts(sample, timestep, label, given)


#: The roles that have defaults.
_DEFAULTS = ("sample", "timestep", "label")


def read_inputs(inputs: Sequence[Input], texts: Iterable[str]) -> dict[str, torch.Tensor]:
    """The tensors that `name=value` name: files, or numbers that fill an input.

    Raises:
        typer.BadParameter: there is no such input or file, or what it holds does not fit.
    """
    specs, found = {spec.name: spec for spec in inputs}, dict[str, torch.Tensor]()
    for text in texts:
        name, equals, value = text.partition("=")
        if not equals or name not in specs:
            raise _Bad(f"{text!r}: write NAME=FILE or NAME=NUMBER; the inputs are {_listed(inputs)}")
        if specs[name].role == "timestep":
            raise _Bad(f"{name} is the timestep, which the sampler gives")
        found[name] = _fitting(specs[name], value, _read(specs[name], value))
    return found


class _Bad(typer.BadParameter):
    """An `--input` that does not fit."""

    def __init__(self, message: str) -> None:
        super().__init__(message, param_hint="--input")


def _read(spec: Input, value: str) -> torch.Tensor:
    path = Path(value)
    if path.suffix not in (".npy", ".safetensors"):
        real = spec.torch_dtype.is_floating_point
        try:
            return torch.full(spec.shape, float(value) if real else int(value))
        except (ValueError, RuntimeError) as error:  # the latter for numbers that no dtype holds
            kind = "number" if real else "whole number"
            raise _Bad(f"{spec.name}={value}: neither a .npy file, nor a .safetensors file, nor a {kind}") from error
    if not path.is_file():
        raise _Bad(f"{spec.name}={value}: there is no such file")
    try:
        if path.suffix == ".npy":
            return torch.from_numpy(np.load(path, allow_pickle=False))
        tensors = load_file(path)
    except (ValueError, TypeError, OSError, EOFError, SafetensorError) as error:
        raise _Bad(f"{path}: cannot be read ({error})") from error
    if spec.name not in tensors and len(tensors) != 1:
        raise _Bad(f"{path}: holds {', '.join(sorted(tensors))}; name the tensor {spec.name}, or let it be alone")
    return tensors[spec.name] if spec.name in tensors else next(iter(tensors.values()))


def _fitting(spec: Input, value: str, tensor: torch.Tensor) -> torch.Tensor:
    """`tensor` in the dtype of the input."""
    described = f"{spec.name}={value}: {str(tensor.dtype).removeprefix('torch.')} {list(tensor.shape)}"
    same_kind = tensor.is_floating_point() == spec.torch_dtype.is_floating_point
    if tuple(tensor.shape) != spec.shape or not same_kind:
        raise _Bad(f"{described} does not fit {spec}")
    if spec.values and tensor.numel() and not 0 <= int(tensor.min()) <= int(tensor.max()) < spec.values:
        raise _Bad(f"{described} holds {int(tensor.min())} to {int(tensor.max())}, which does not fit {spec}")
    return tensor.to(spec.torch_dtype)


def _listed(inputs: Iterable[Input]) -> str:
    return "; ".join(map(str, inputs))
