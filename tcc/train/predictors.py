"""Predictors: how much each token matters in each block at each step, learned (TokenCache, Lou et al. 2024).

One interface, three forms: a table, a small network over embeddings, and a network that sees the stream. All parameters
and results are float32, whatever the dtype of the model. Nothing of the model is trained.
"""

from __future__ import annotations

import json
import math
import os
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, ClassVar

import safetensors
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tcc.errors import PlanError
from tcc.info import ModelInfo
from tcc.learned import Importance, Probes
from tcc.tensors_file import write_tensors

__all__ = ["FORMS", "NetworkPredictor", "Predictor", "Sizes", "StreamPredictor", "TablePredictor", "load_predictor"]

_HEADER = "tcc.predictor"


@dataclass(frozen=True)
class Sizes:
    """What a predictor speaks about.

    Attributes:
        steps: denoising steps of a run.
        blocks: blocks of the model.
        tokens: tokens of the stream, S.
        width: channels of the stream, D.
        grid: the grid of the tokens, (h, w) or (t, h, w); () where there is none.
    """

    steps: int
    blocks: int
    tokens: int
    width: int
    grid: tuple[int, ...] = ()

    @staticmethod
    def of(info: ModelInfo, num_steps: int) -> Sizes:
        """The sizes for a model and a number of steps."""
        grid = info.grid if math.prod(info.grid) == info.num_tokens else ()
        return Sizes(num_steps, len(info.blocks), info.num_tokens, info.analysis.stream_shape[-1], grid)


class Predictor(nn.Module, ABC):
    """`g(l, t)`: an importance in 0..1 for every token of every block.

    Every form starts with one importance everywhere: `mean`, or else 0.5, halfway between what is stored and what is
    computed, where the sigmoid's gradient is largest.

    The published loss alone is least where everything is computed. Either a penalty on the mean importance is added to
    it, or the importance is held at a mean: then only its distribution over blocks and tokens is learned. That needs no
    penalty, whose right size differs from step to step with the size of the error (by five orders on the reference
    model), and which drowns the error where it is too large.

    Args:
        sizes: what it speaks about.
        seed: seed of the initial weights; the same seed gives the same weights on every device.
        mean: the mean importance, at every step (of every sample, where it depends on the stream); None leaves it
            free.

    Raises:
        PlanError: the mean is not between 0 and 1.
    """

    form: ClassVar[str]

    def __init__(self, sizes: Sizes, *, seed: int = 0, mean: float | None = None) -> None:
        super().__init__()
        if mean is not None and not 0 < mean < 1:
            raise PlanError(f"mean={mean}: a mean importance that is held lies between 0 and 1")
        self.sizes = sizes
        self.held = mean
        self._draw = torch.Generator().manual_seed(seed)

    @abstractmethod
    def logits(self, step: int, stream: Tensor | None) -> Tensor:
        """`[1 or B, blocks, S]`, before the sigmoid."""

    def forward(self, step: int, stream: Tensor | None = None) -> Tensor:
        """The importance of every token at `step`.

        Args:
            step: in execution order.
            stream: `[B, S, D]`, the stream that enters block 0; only the form that sees it needs it.

        Returns:
            `[1, blocks, S]`, or `[B, blocks, S]` where it depends on the stream; float32 in 0..1.
        """
        logits = self.logits(step, stream)
        return torch.sigmoid(logits if self.held is None else logits + _shift(logits, self.held))

    def flat(self, step: int) -> bool:
        """Whether all tokens of all blocks matter alike at `step`, as they do before anything is learned."""
        with torch.no_grad():
            return _alike(self.logits(step, None))

    def importance(self) -> Importance:
        """The importances of all steps, for a form that needs no stream."""
        with torch.no_grad():
            return Importance(torch.cat([self(step) for step in range(self.sizes.steps)]).cpu())

    def learned(self) -> Importance | Probes:
        """What a plan is made from."""
        return self.importance()

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the weights and sizes as one safetensors file, replacing it atomically.

        Raises:
            PlanError: the file cannot be written.
        """
        header = {"form": self.form, "sizes": asdict(self.sizes), "mean": self.held, "version": 1}
        tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in self.state_dict().items()}
        partial = Path(f"{os.fspath(path)}.partial")
        write_tensors(tensors, partial, {_HEADER: json.dumps(header)}, what="the predictor", error=PlanError)
        os.replace(partial, path)

    def _normal(self, *shape: int, std: float) -> nn.Parameter:
        return nn.Parameter(torch.randn(shape, generator=self._draw) * std)


class TablePredictor(Predictor):
    """One logit per step, block and token.

    Each step has a parameter of its own, so that the optimiser leaves a step alone that an iteration leaves out.
    """

    form = "table"

    def __init__(self, sizes: Sizes, *, seed: int = 0, mean: float | None = None) -> None:
        super().__init__(sizes, seed=seed, mean=mean)
        self.table = nn.ParameterList(torch.zeros(sizes.blocks, sizes.tokens) for _ in range(sizes.steps))

    def logits(self, step: int, stream: Tensor | None = None) -> Tensor:
        """`[1, blocks, S]`."""
        table: Tensor = self.table[step]
        return table[None]


class NetworkPredictor(Predictor):
    """A small network over embeddings of block, step and token position.

    `logit = gelu(gelu(block[l] + time(t) + place(i)) @ mix) @ out`, with a learned vector per block, and linear maps of
    waves (sines and cosines of the share of the run that is done, and of the coordinates in the grid). The number of
    parameters grows with the blocks alone: `(blocks + 10 (1 + axes) + 1 + hidden + 2) hidden + 1`. What it learns is
    smooth over steps and tokens.

    Args:
        sizes: what it speaks about.
        seed: seed of the initial weights.
        mean: see `Predictor`.
        hidden: width of both layers.
    """

    form = "network"
    waves = 5

    def __init__(self, sizes: Sizes, *, seed: int = 0, mean: float | None = None, hidden: int = 64) -> None:
        super().__init__(sizes, seed=seed, mean=mean)
        axes = len(sizes.grid) or 1
        self.block = self._normal(sizes.blocks, hidden, std=0.5)
        self.time = self._normal(2 * self.waves, hidden, std=self.waves**-0.5)
        self.place = self._normal(2 * self.waves * axes, hidden, std=(self.waves * axes) ** -0.5)
        self.offset = nn.Parameter(torch.zeros(hidden))
        self.mix = self._normal(hidden, hidden, std=(2 / hidden) ** 0.5)
        self.mix_offset = nn.Parameter(torch.zeros(hidden))
        self.out = nn.Parameter(torch.zeros(hidden))
        self.out_offset = nn.Parameter(torch.zeros(1))
        self.register_buffer("places", _waves(_coordinates(sizes), self.waves), persistent=False)

    def logits(self, step: int, stream: Tensor | None = None) -> Tensor:
        """`[1, blocks, S]`."""
        done = torch.tensor([[step / self.sizes.steps]], device=self.out.device)
        places: Tensor = self.get_buffer("places") @ self.place
        x = F.gelu(self.block[:, None] + places + _waves(done, self.waves) @ self.time + self.offset)
        x = F.gelu(x @ self.mix + self.mix_offset)
        return (x @ self.out + self.out_offset)[None]


class StreamPredictor(Predictor):
    """A network on the stream that enters block 0, read out for every block and step: what `Probes` describes.

    The hidden layer is random at first, and its read-out zero; the bias is a table. As in the table, each step has
    read-outs of its own.

    Args:
        sizes: what it speaks about.
        seed: seed of the initial weights.
        mean: see `Predictor`.
        hidden: width H of the hidden layer.
    """

    form = "stream"

    def __init__(self, sizes: Sizes, *, seed: int = 0, mean: float | None = None, hidden: int = 16) -> None:
        super().__init__(sizes, seed=seed, mean=mean)
        self.hidden = self._normal(sizes.width, hidden, std=sizes.width**-0.5)
        self.offset = nn.Parameter(torch.zeros(hidden))
        self.weight = nn.ParameterList(torch.zeros(sizes.blocks, hidden) for _ in range(sizes.steps))
        self.bias = nn.ParameterList(torch.zeros(sizes.blocks, sizes.tokens) for _ in range(sizes.steps))
        self.register_buffer("mean", torch.full((sizes.steps, sizes.blocks, sizes.tokens), 0.5))

    def logits(self, step: int, stream: Tensor | None) -> Tensor:
        """`[B, blocks, S]`."""
        if stream is None:
            raise PlanError("this predictor depends on the stream: call it with the stream that enters block 0")
        x = F.layer_norm(stream.float(), stream.shape[-1:])
        x = F.gelu(x @ self.hidden + self.offset)
        logits: Tensor = torch.einsum("bsh,lh->bls", x, self.weight[step]) + self.bias[step]
        return logits

    def flat(self, step: int) -> bool:
        """See `Predictor`: whatever the stream."""
        return not bool(self.weight[step].any()) and _alike(self.bias[step].detach())

    def calibrate(self, streams: Sequence[Tensor]) -> None:
        """Set the mean importance from samples: what places I-steps and ranks blocks (TokenCache v2).

        Args:
            streams: for every step, `[B, S, D]`.
        """
        with torch.no_grad():
            rows = [self(step, stream).mean(0) for step, stream in enumerate(streams)]
            self.get_buffer("mean").copy_(torch.stack(rows))

    def importance(self) -> Importance:
        """The mean importances; see `calibrate`."""
        return Importance(self.get_buffer("mean").detach().cpu().clone())

    def learned(self) -> Probes:
        """The network as data, for a plan that ranks tokens in the graph."""
        weight, bias = torch.stack([*self.weight]), torch.stack([*self.bias])
        tensors = (self.hidden, self.offset, weight, bias, self.get_buffer("mean"))
        return Probes(*(tensor.detach().cpu().clone() for tensor in tensors))


def _alike(numbers: Tensor) -> bool:
    """Whether they are all the same."""
    return bool((numbers == numbers.flatten()[0]).all())


def _shift(logits: Tensor, mean: float) -> Tensor:
    """What to add to the logits of each sample, so that their mean importance is `mean`.

    Found by halving; the gradient is that of the exact shift (implicit function theorem). Holding the mean *logit*
    would be simpler, but is evaded: a few tokens of very low logits let all others be computed.

    Args:
        logits: `[B, blocks, S]`.
        mean: the mean importance to reach, between 0 and 1.

    Returns:
        `[B, 1, 1]`.
    """
    known, wanted = logits.detach(), math.log(mean / (1 - mean))
    low, high = wanted - known.amax(dim=(1, 2), keepdim=True), wanted - known.amin(dim=(1, 2), keepdim=True)
    for _ in range(40):
        shift = (low + high) / 2
        above = torch.sigmoid(known + shift).mean(dim=(1, 2), keepdim=True) > mean
        low, high = torch.where(above, low, shift), torch.where(above, shift, high)
    shift = (low + high) / 2
    slopes = torch.sigmoid(known + shift) * torch.sigmoid(-known - shift)
    shares = slopes / slopes.sum(dim=(1, 2), keepdim=True).clamp_min(torch.finfo(slopes.dtype).tiny)
    return shift - (shares * (logits - known)).sum(dim=(1, 2), keepdim=True)


#: Every form by name: what `tcc train predictor --form` takes.
FORMS: dict[str, type[Predictor]] = {form.form: form for form in (TablePredictor, NetworkPredictor, StreamPredictor)}


def load_predictor(path: str | os.PathLike[str]) -> Predictor:
    """Read a predictor that `save` wrote.

    Raises:
        PlanError: there is no such file, or it holds no predictor.
    """
    if not Path(path).is_file():
        raise PlanError(f"there is no file {path}")
    try:
        with safetensors.safe_open(path, framework="pt") as file:
            header: dict[str, Any] = json.loads((file.metadata() or {})[_HEADER])
            state = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - not a dict
        given = header["sizes"]
        sizes = Sizes(**(given | {"grid": tuple(given["grid"])}))
        width = {} if header["form"] == "table" else {"hidden": state["offset"].numel()}
        predictor = FORMS[header["form"]](sizes, mean=header["mean"], **width)
        predictor.load_state_dict(state, strict=True)
    except (safetensors.SafetensorError, KeyError, TypeError, ValueError, RuntimeError) as error:
        raise PlanError(f"{path} is no predictor: make one with `tcc train predictor`") from error
    return predictor


def _coordinates(sizes: Sizes) -> Tensor:
    """`[S, axes]`: where each token lies, 0..1 along every axis of the grid."""
    lengths = sizes.grid or (sizes.tokens,)
    axes = torch.meshgrid(*((torch.arange(n) + 0.5) / n for n in lengths), indexing="ij")
    return torch.stack([axis.reshape(-1) for axis in axes], dim=-1)


def _waves(x: Tensor, count: int) -> Tensor:
    """`[n, axes]` in 0..1 to `[n, 2 * count * axes]`: cosines and sines of `pi x`, `2 pi x`, `4 pi x`, ..."""
    angles = x[..., None] * (math.pi * 2.0 ** torch.arange(count, device=x.device))
    return torch.cat([angles.cos(), angles.sin()], dim=-1).flatten(-2)
