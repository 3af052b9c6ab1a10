"""The model a command works on: the reference model, a published size, a weights file, or the user's own."""

from __future__ import annotations

import contextlib
import importlib
import io
import os
import re
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import nn

from tcc.cli import screen
from tcc.errors import ModelError
from tcc.info import ModelInfo, inspect
from tcc.models import ARCHITECTURES, Architecture, DiT, ModelConfig, load_dit, load_model, reference_model

__all__ = ["Subject", "dit_inputs", "kind_of", "load_pixel_dit", "load_subject", "look"]

_WEIGHTS = (".safetensors", ".pt", ".pth", ".bin")


@dataclass(frozen=True)
class Subject:
    """A model with the inputs of one call.

    Attributes:
        model: the model, in eval mode.
        args: positional inputs.
        kwargs: keyword inputs.
        label: what to call it in titles; says so where the weights are random.
        random: whether tcc drew the weights.
    """

    model: nn.Module
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    label: str
    random: bool = False


def load_subject(name: str, *, batch: int, input_size: int, device: str = "cpu") -> Subject:
    """The model that `--model` names.

    Args:
        name: see the help of `--model`.
        batch: rows of the inputs, where tcc makes them; a callable makes its own.
        input_size: side of the input of a model given by its size.
        device: where a model given by its size is built; `meta` builds it without memory, for looking only.

    Raises:
        ModelError: there is no such model, or the callable returns something else.
    """
    if kind := _published(name):
        with torch.random.fork_rng(devices=()), torch.device(device):
            torch.manual_seed(0)
            model = kind.from_name(name, input_size=input_size).eval()
            return Subject(model, dit_inputs(model.config, batch), {}, f"{name}, random weights", random=True)
    if kind_of(name) == "callable":
        return _imported(name)
    model = reference_model() if name == "reference" else load_model(_weights(name))
    return Subject(model, dit_inputs(model.config, batch), {}, name)


def kind_of(name: str) -> Literal["size", "callable", "file"]:
    """What `--model` names; the reference model is a file."""
    if _published(name):
        return "size"
    return "callable" if ":" in name and not Path(name).exists() else "file"


def look(model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], label: str) -> ModelInfo:
    """Capture and analyse a model behind a spinner.

    Raises:
        CaptureError, AnalysisError: see `tcc.inspect`; the graph that torch.export prints on an error is left out.
    """
    with screen.status(f"capturing {label}"), contextlib.redirect_stderr(io.StringIO()):
        return inspect(model, *args, **kwargs)


def load_pixel_dit(name: str) -> DiT:
    """A trained DiT whose output is an image: `reference` or a weights file.

    Raises:
        ModelError: its weights are random, or it works on latents.
    """
    if _published(name):
        raise ModelError(
            f"{name} has random weights and would draw noise: use 'reference' or a file of trained weights"
        )
    model = reference_model() if name == "reference" else load_dit(_weights(name))
    if model.config.in_channels not in (1, 3):
        raise ModelError(
            f"{name} has {model.config.in_channels} channels, so it works on latents and needs a decoder to draw: "
            "use a model on pixels (1 or 3 channels)"
        )
    return model


def dit_inputs(config: ModelConfig, batch: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """The inputs (x, t, y) of one call of a model of `tcc.models`."""
    x = torch.zeros(batch, config.in_channels, *config.input_size)
    return x, torch.zeros(batch, dtype=torch.int64), torch.zeros(batch, dtype=torch.int64)


def _published(name: str) -> type[Architecture] | None:
    """The architecture whose size `name` is."""
    return next((kind for kind in ARCHITECTURES if name.startswith(f"{kind.family}-")), None)


def _weights(name: str) -> str:
    """`name`, if it is that of a weights file."""
    if name.endswith(_WEIGHTS):
        return name
    raise ModelError(
        f"unknown model '{name}': use 'reference', a size such as DiT-S/2 or UViT-S/2, a weights file (.safetensors or "
        ".pt), or package.module:callable"
    )


def _imported(name: str) -> Subject:
    """Call `package.module:callable`; modules in the current folder are found."""
    module_name, _, attribute = name.partition(":")
    if not re.fullmatch(r"[\w.]+", module_name) or not attribute.isidentifier():
        raise ModelError(f"'{name}' is not of the form package.module:callable")
    if os.getcwd() not in sys.path:
        sys.path.insert(0, os.getcwd())
    try:
        make = getattr(importlib.import_module(module_name), attribute)
    except (ImportError, AttributeError) as error:
        raise ModelError(f"cannot import '{name}': {error}") from error
    except Exception as error:  # whatever code of the user's raises
        raise ModelError(f"importing '{module_name}' failed: {_of(error)}") from error
    if not callable(make):
        raise ModelError(f"'{name}' is no function but {type(make).__name__}: name one that returns its model")
    try:
        made = make()
    except Exception as error:
        raise ModelError(f"'{name}' failed: {_of(error)}") from error
    if not (isinstance(made, tuple) and len(made) == 3 and isinstance(made[0], nn.Module)):
        raise ModelError(f"'{name}' must return (model, args, kwargs), and returned {type(made).__name__}")
    model, args, kwargs = made
    if not (isinstance(args, (tuple, list)) and isinstance(kwargs, dict)):
        kinds = f"{type(args).__name__} and {type(kwargs).__name__}"
        raise ModelError(f"'{name}' must return args as a tuple and kwargs as a dict, and returned {kinds}")
    return Subject(model.eval(), tuple(args), dict(kwargs), name)


def _of(error: Exception) -> str:
    """An error in one line; `tcc --debug` shows where it comes from."""
    return f"{type(error).__name__}: {error} (tcc --debug shows where)"
