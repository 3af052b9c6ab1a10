"""The models of `benchmarks/peers.py`, and the copies of them that peers may change."""

from __future__ import annotations

import copy
import functools
import inspect
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from step_speed import build_model
from torch import Tensor, nn

from tcc.cli.compare import Task
from tcc.models import reference_model


@dataclass(frozen=True)
class Subject:
    """What all methods run.

    Attributes:
        label: what to call it; says so where the weights are random.
        model: called as `model(x, t, y)`, x `[B, C, H, W]`, t and y `[B]`; float32, in eval mode.
        shape: (C, H, W).
        num_classes: its classes; the next label is the null class.
        blocks: the path to its list of blocks, in whose parent a peer's hooks look for it.
        trained: whether its images mean anything.
    """

    label: str
    model: nn.Module
    shape: tuple[int, int, int]
    num_classes: int
    blocks: str
    trained: bool

    def task(self, batch: int, seed: int, cfg: float = 1.5, first: int = 0) -> Task:
        """Noise for `batch` images, and the classes in turn, from `first` on."""
        noise = torch.randn(batch, *self.shape, generator=torch.Generator("cpu").manual_seed(seed), device="cpu")
        device = next(self.model.parameters()).device
        labels = torch.arange(first, first + batch, device=device) % self.num_classes
        return Task(noise.to(device), labels, self.num_classes, cfg, dtype=next(self.model.parameters()).dtype)


@dataclass(frozen=True)
class Target:
    """A copy of a model that one peer may change. It shares the weights of the others.

    Attributes:
        model: called as `model(x, t, y)`.
        denoiser: the module in it that has the blocks: what a pipeline calls its transformer.
        blocks: the blocks; their first argument is called `hidden_states`.
        steps: the steps of a run.
        draw: runs the sampler with a model, on noise that no method is measured on.
    """

    model: nn.Module
    denoiser: nn.Module
    blocks: nn.ModuleList
    steps: int
    draw: Callable[[Callable[..., Tensor]], object]


class HiddenStates(nn.Module):
    """A block under the name for its first argument by which diffusers' caches and cache-dit find it."""

    def __init__(self, block: nn.Module) -> None:
        super().__init__()
        self.block = block

    def forward(self, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Any:
        """The block's output."""
        return self.block(hidden_states, *args, **kwargs)


def target(
    subject: Subject,
    steps: int,
    draw: Callable[[Callable[..., Tensor]], object],
    compile_block: Callable[[nn.Module], object] | None = None,
) -> Target:
    """A copy of the subject's model for a peer; with `compile_block`, each block is given to that, then wrapped."""
    model = subject.model
    shared: dict[int, Any] = {id(tensor): tensor for tensor in (*model.parameters(), *model.buffers())}
    copied = copy.deepcopy(model, shared)
    path, _, name = subject.blocks.rpartition(".")
    denoiser = copied.get_submodule(path)
    blocks = denoiser.get_submodule(name)
    if compile_block is not None:
        for block in blocks:
            compile_block(block)
    if compile_block is not None or "hidden_states" not in inspect.signature(blocks[0].forward).parameters:
        blocks = nn.ModuleList(HiddenStates(block) for block in blocks)
        setattr(denoiser, name, blocks)
    return Target(copied, denoiser, blocks, steps, draw)


class TextToImage(nn.Module):
    """A diffusers transformer with text by cross attention, as a model of classes: each has a fixed random prompt."""

    def __init__(self, transformer: nn.Module, prompts: Tensor) -> None:
        super().__init__()
        self.transformer = transformer
        self.register_buffer("prompts", prompts)  # [classes + 1, tokens, width]

    def forward(self, x: Tensor, t: Tensor, y: Tensor) -> Tensor:
        """Predict the noise; the tensors that caches split are keywords, as pipelines pass them."""
        return self.transformer(  # type: ignore[no-any-return]
            hidden_states=x,
            encoder_hidden_states=self.prompts[y],
            timestep=t,
            added_cond_kwargs={"resolution": None, "aspect_ratio": None},
            return_dict=False,
        )[0]


def reference() -> Subject:
    """The shipped DiT, trained on Fashion-MNIST."""
    model = reference_model()
    config = model.config
    shape = (config.in_channels, *config.input_size)
    return Subject("reference model", model, shape, config.num_classes, "blocks", trained=True)


def dit(name: str) -> Subject:
    """A published size on 32x32 latents, 256 tokens, with random weights."""
    model, _ = build_model(name)
    config = model.config
    shape = (config.in_channels, *config.input_size)
    return Subject(f"{name}, random weights: speed only", model, shape, config.num_classes, "blocks", trained=False)


def pixart(layers: int = 12, heads: int = 6, size: int = 32, tokens: int = 77) -> Subject:
    """Diffusers' PixArt transformer with the sizes of DiT-S/2, 256 tokens and 77 text tokens.

    Raises:
        ImportError: diffusers is not installed.
    """
    from diffusers import PixArtTransformer2DModel

    torch.manual_seed(0)
    transformer = PixArtTransformer2DModel(
        num_attention_heads=heads, attention_head_dim=64, num_layers=layers, sample_size=size,
        cross_attention_dim=64 * heads, caption_channels=64 * heads, use_additional_conditions=False,
    ).eval()  # fmt: skip
    for parameter in transformer.parameters():
        parameter.data.normal_(0, 0.02)
    model = TextToImage(transformer, torch.randn(11, tokens, 64 * heads)).eval()
    label = f"PixArt, {layers} blocks, random weights: speed only"
    return Subject(label, model, (4, size, size), 10, "transformer.transformer_blocks", trained=False)


SUBJECTS: dict[str, Callable[[], Subject]] = {
    "reference": reference,
    "dit-s": functools.partial(dit, "DiT-S/2"),
    "dit-b": functools.partial(dit, "DiT-B/2"),
    "dit-xl": functools.partial(dit, "DiT-XL/2"),
    "pixart": pixart,
}
