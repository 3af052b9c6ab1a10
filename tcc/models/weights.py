"""DiT weights: published ``.pt`` files, ``.safetensors`` files, and the model shipped with tcc.

Nothing here unpickles arbitrary objects. Files written by :func:`save_weights` carry the model's
configuration in their header, so :func:`load_dit` needs no arguments for them.
"""

from __future__ import annotations

import argparse
import math
import os
import pickle
from importlib import resources
from pathlib import Path

import safetensors
import safetensors.torch
import torch
from torch import Tensor, nn

from tcc.errors import ModelError
from tcc.models.dit import PATCHES, SIZES, DiT, DiTConfig

CONFIG_KEY = "tcc.dit"  # header entry of a safetensors file that holds DiTConfig as JSON
REFERENCE_FILE = "dit-fmnist-64tok.safetensors"
State = dict[str, Tensor]


def reference_model() -> DiT:
    """Return the model shipped with tcc, on the CPU, in float32 and eval mode.

    A class-conditional DiT trained on Fashion-MNIST: 1 channel, 32x32 pixels in [-1, 1], patch 4, 64 tokens,
    width 128, 12 blocks, 10 classes and the null class 10, noise prediction under 1000 linear betas.
    """
    with resources.as_file(resources.files("tcc.data") / REFERENCE_FILE) as path:
        return load_dit(path)


def load_dit(path: str | os.PathLike[str], *, num_heads: int | None = None) -> DiT:
    """Build the DiT that a weight file describes and load the weights.

    Args:
        path: a ``.safetensors`` or ``.pt`` file.
        num_heads: attention heads, needed where neither the header nor a published width tells them.

    Returns:
        The model in float32 and eval mode, on the CPU.
    """
    state, header = read_state(path)
    config = DiTConfig.from_json(header[CONFIG_KEY]) if CONFIG_KEY in header else infer_config(state, num_heads)
    model = DiT.from_config(config)
    _load_strict(model, state, path)
    return model.eval()


def load_weights(model: DiT, path: str | os.PathLike[str]) -> DiT:
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


def save_weights(model: DiT, path: str | os.PathLike[str], dtype: torch.dtype = torch.float16) -> None:
    """Write the weights and the configuration to one safetensors file, replacing it atomically.

    Args:
        model: the model to save.
        path: where to.
        dtype: storage type of the trained tensors; the fixed positions are kept in float32.
    """
    tensors = {
        name: tensor.detach().to("cpu", torch.float32 if name == "pos_embed" else dtype).contiguous()
        for name, tensor in model.state_dict().items()
    }
    partial = Path(f"{os.fspath(path)}.partial")
    safetensors.torch.save_file(tensors, partial, metadata={CONFIG_KEY: model.config.to_json()})
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


def infer_config(state: State, num_heads: int | None = None) -> DiTConfig:
    """Read a DiT's configuration off the shapes of its weights (square input assumed).

    Args:
        state: tensors by public DiT names.
        num_heads: attention heads; shapes do not tell them, so by default they come from the published size
            with the same depth and width.
    """
    try:
        width, channels, patch, _ = state["x_embedder.proj.weight"].shape
        tokens = state["pos_embed"].shape[1]
        rows = state["y_embedder.embedding_table.weight"].shape[0]
        outputs = state["final_layer.linear.weight"].shape[0]
        inner = state["blocks.0.mlp.fc1.weight"].shape[0]
    except KeyError as error:
        raise ModelError(f"these are not the weights of a DiT: no tensor named {error}") from error
    depth = 1 + max(int(name.split(".")[1]) for name in state if name.startswith("blocks."))
    published = {(d, w): heads for d, w, heads in SIZES.values()}
    heads = num_heads or published.get((depth, width))
    if heads is None:
        raise ModelError(f"no published DiT has depth {depth} and width {width}: pass num_heads")
    side = math.isqrt(tokens) * patch
    return DiTConfig(
        input_size=(side, side),
        patch_size=patch,
        in_channels=channels,
        hidden_size=width,
        depth=depth,
        num_heads=heads,
        mlp_ratio=inner / width,
        class_dropout_prob=0.1,
        num_classes=rows - 1,
        learn_sigma=outputs == 2 * channels * patch * patch,
    )


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


def _load_strict(model: DiT, state: State, path: str | os.PathLike[str]) -> None:
    """Load with ``strict=True``; on disagreement say what differs and which model the file fits."""
    own = model.state_dict()
    wrong = [
        f"{name} is {list(state[name].shape)} in the file and {list(own[name].shape)} in the model"
        for name in own
        if name in state and state[name].shape != own[name].shape
    ]
    wrong += [f"{name} is missing from the file" for name in own if name not in state]
    wrong += [f"{name} is unknown to the model" for name in state if name not in own]
    if not wrong:
        nn.Module.load_state_dict(model, state, strict=True)
        return
    more = f" (and {len(wrong) - 1} more)" if len(wrong) > 1 else ""
    raise ModelError(f"{path} does not fit this model: {wrong[0]}{more}. {_fitting_model(state)}")


def _fitting_model(state: State) -> str:
    """Say how to build the model that a state dict belongs to."""
    try:
        config = infer_config(state, num_heads=1)
    except ModelError:
        return "It holds no weights of a DiT"
    extra = f"input_size={config.input_size[0]}, in_channels={config.in_channels}"
    extra += f", num_classes={config.num_classes}, learn_sigma={config.learn_sigma}"
    for size, (depth, width, _) in SIZES.items():
        if (depth, width) == (config.depth, config.hidden_size) and config.patch_size in PATCHES:
            return f'It fits DiT.from_name("DiT-{size}/{config.patch_size}", {extra})'
    custom = f"hidden_size={config.hidden_size}, depth={config.depth}, patch_size={config.patch_size}"
    return f"It fits DiT({custom}, {extra}) with the right num_heads"
