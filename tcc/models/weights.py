"""Weight files of all architectures: published ``.pt`` files, ``.safetensors`` files, and the model shipped with tcc.

Nothing here unpickles arbitrary objects. Files written by :func:`save_weights` carry the model's
configuration in their header, so :func:`load_model` needs no arguments for them.
"""

from __future__ import annotations

import argparse
import dataclasses
import os
import pickle
from importlib import resources
from pathlib import Path
from typing import TypeVar

import safetensors
import safetensors.torch
import torch
from torch import Tensor, nn

from tcc.errors import ModelError
from tcc.models.architecture import Architecture
from tcc.models.config import ModelConfig
from tcc.models.dit import DiT
from tcc.models.mdt import MDT, MDTv2
from tcc.models.uvit import UViT
from tcc.tensors_file import save_tensors

# a state dict belongs to the first whose mark it has
ARCHITECTURES: tuple[type[Architecture], ...] = (UViT, MDTv2, MDT, DiT)
REFERENCE_FILE = "dit-fmnist-64tok.safetensors"
State = dict[str, Tensor]
Model = TypeVar("Model", bound=Architecture)


def reference_model() -> DiT:
    """Return the model shipped with tcc, on the CPU, in float32 and eval mode.

    A class-conditional DiT trained on Fashion-MNIST: 1 channel, 32x32 pixels in [-1, 1], patch 4, 64 tokens,
    width 128, 12 blocks, 10 classes and the null class 10, noise prediction under 1000 linear betas.
    """
    with resources.as_file(resources.files("tcc.data") / REFERENCE_FILE) as path:
        return load_dit(path)


def load_model(path: str | os.PathLike[str], *, num_heads: int | None = None) -> Architecture:
    """Build the model that a weight file describes and load the weights.

    Args:
        path: a ``.safetensors`` or ``.pt`` file.
        num_heads: attention heads, needed where neither the header nor a published width tells them.

    Returns:
        The model in float32 and eval mode, on the CPU.
    """
    state, header = read_state(path)
    kind = _kind(state)
    if kind is None:
        raise ModelError(f"{path}: these are not the weights of {_families()}")
    key = _config_key(kind)
    config = kind.config_type.from_json(header[key]) if key in header else kind.infer_config(state, num_heads)
    model = kind.from_config(config)
    _load_strict(model, state, path)
    return model.eval()


def load_dit(path: str | os.PathLike[str], *, num_heads: int | None = None) -> DiT:
    """Load a DiT, see :func:`load_model`.

    Raises:
        ModelError: the file holds another model.
    """
    model = load_model(path, num_heads=num_heads)
    if not isinstance(model, DiT):
        raise ModelError(f"{path} holds the weights of {model.family}, and a DiT is needed")
    return model


def load_weights(model: Model, path: str | os.PathLike[str]) -> Model:
    """Load a weight file into an existing model; every name and shape must agree.

    Args:
        model: the model to fill; keeps its dtype and device.
        path: a ``.safetensors`` or ``.pt`` file, with or without the ``ema`` / ``model`` wrapper.

    Returns:
        The same model.
    """
    state, _ = read_state(path)
    _load_strict(model, state, path)
    return model


def save_weights(model: Architecture, path: str | os.PathLike[str], dtype: torch.dtype = torch.float16) -> None:
    """Write the weights and the configuration to one safetensors file, replacing it atomically.

    Args:
        model: the model to save.
        path: where to.
        dtype: storage type of the trained tensors; fixed positions are kept in float32, indices as they are.
    """
    tensors = {
        name: tensor.detach().to("cpu", _stored_as(model, name, tensor, dtype)).contiguous()
        for name, tensor in model.state_dict().items()
    }
    partial = Path(f"{os.fspath(path)}.partial")
    save_tensors(tensors, partial, {_config_key(type(model)): model.config.to_json()})
    os.replace(partial, path)


def read_state(path: str | os.PathLike[str]) -> tuple[State, dict[str, str]]:
    """Read a state dict and its header without building a model.

    Args:
        path: a ``.safetensors`` or ``.pt`` file; of a training checkpoint ``ema`` is taken, else ``model``.

    Returns:
        The tensors by name, and the header (empty for ``.pt``).
    """
    if not Path(path).is_file():
        raise ModelError(f"there is no weight file at {path}")
    if Path(path).suffix == ".safetensors":
        try:
            with safetensors.safe_open(path, framework="pt") as file:
                return {name: file.get_tensor(name) for name in file.keys()}, file.metadata() or {}  # noqa: SIM118
        except safetensors.SafetensorError as error:
            raise ModelError(f"{path} is not a readable safetensors file ({error}): fetch it again") from error
    try:
        # Published training checkpoints carry their command line as a Namespace: plain attributes, harmless.
        with torch.serialization.safe_globals([argparse.Namespace]):
            content = torch.load(path, map_location="cpu", weights_only=True)
    except (pickle.UnpicklingError, RuntimeError, EOFError) as error:
        raise ModelError(
            f"{path} is not a plain PyTorch weight file: it is damaged, or holds pickled "
            "objects, which tcc refuses to run. Save the bare state dict with "
            "torch.save(model.state_dict(), path), or use safetensors"
        ) from error
    return _unwrap(content, path), {}


def _stored_as(model: Architecture, name: str, tensor: Tensor, dtype: torch.dtype) -> torch.dtype:
    if not tensor.is_floating_point():
        return tensor.dtype
    return torch.float32 if name in model.exact else dtype


def _config_key(kind: type[Architecture]) -> str:
    """The entry of a safetensors header that holds the configuration as JSON."""
    return f"tcc.{kind.family.lower()}"


def _kind(state: State) -> type[Architecture] | None:
    return next((kind for kind in ARCHITECTURES if kind.mark in state), None)


def _families() -> str:
    return "a " + " or ".join(sorted(kind.family for kind in ARCHITECTURES))


def _unwrap(content: object, path: str | os.PathLike[str]) -> State:
    """Take the state dict out of a training checkpoint (``ema``, else ``model``), or return it as it is."""
    if isinstance(content, dict):
        for wrapper in ("ema", "model"):
            if isinstance(content.get(wrapper), dict):
                content = content[wrapper]
                break
    if not isinstance(content, dict) or not all(isinstance(value, Tensor) for value in content.values()):
        raise ModelError(f"{path} holds no state dict: expected tensors by name, alone or under 'ema' or 'model'")
    return content


def _load_strict(model: Architecture, state: State, path: str | os.PathLike[str]) -> None:
    """Load with ``strict=True``, but for what only training needs; on disagreement say which model the file fits."""
    given = {name: tensor for name, tensor in state.items() if not name.startswith(model.training_only)}
    own = model.state_dict()
    wrong = [
        f"{name} is {list(given[name].shape)} in the file and {list(own[name].shape)} in the model"
        for name in own
        if name in given and given[name].shape != own[name].shape
    ]
    wrong += [f"{name} is missing from the file" for name in own if name not in given]
    wrong += [f"{name} is unknown to the model" for name in given if name not in own]
    if not wrong:
        nn.Module.load_state_dict(model, given, strict=True)
        return
    more = f" (and {len(wrong) - 1} more)" if len(wrong) > 1 else ""
    raise ModelError(f"{path} does not fit this model: {wrong[0]}{more}. {_fitting_model(state)}")


def _fitting_model(state: State) -> str:
    """Say how to build the model that a state dict belongs to."""
    kind = _kind(state)
    try:
        config = None if kind is None else kind.infer_config(state, num_heads=1)
    except ModelError:
        config = None
    if kind is None or config is None:
        return f"It holds no weights of {_families()}"
    extra = f"input_size={config.input_size[0]}, in_channels={config.in_channels}, num_classes={config.num_classes}"
    common = {field.name for field in dataclasses.fields(ModelConfig)}
    for field in dataclasses.fields(config):
        if field.name not in common:
            extra += f", {field.name}={getattr(config, field.name)}"
    for size, (depth, width, _) in kind.sizes.items():
        if (depth, width) == (config.depth, config.hidden_size) and config.patch_size in kind.patches:
            return f'It fits {kind.__name__}.from_name("{kind.family}-{size}/{config.patch_size}", {extra})'
    custom = f"hidden_size={config.hidden_size}, depth={config.depth}, patch_size={config.patch_size}"
    return f"It fits {kind.__name__}({custom}, {extra}) with the right num_heads"
