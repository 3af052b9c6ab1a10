"""What training learns, as files: routers (Learning-to-Cache), importances and probes (TokenCache)."""

from __future__ import annotations

import json
import os
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import safetensors
import torch

from tcc.errors import PlanError
from tcc.tensors_file import write_tensors

__all__ = ["Importance", "Learned", "Probes", "Router", "load_learned", "save_learned"]

_HEADER = "tcc.learned"


@dataclass(frozen=True)
class Router:
    """How much each site matters at each step (Learning-to-Cache, Ma et al. 2024, section 3).

    Attributes:
        scores: `[steps, sites]` float32 in 0..1, steps in execution order; high means compute. NaN at the steps that
            compute everything, for which nothing is learned.
        sites: the names of the sites.

    Raises:
        PlanError: the shape is another, a site is named twice, a row has some NaN, or a score is not in 0..1.
    """

    scores: torch.Tensor
    sites: tuple[str, ...]

    def __post_init__(self) -> None:
        if self.scores.dim() != 2 or self.scores.shape[1] != len(self.sites):
            raise PlanError(f"a router has scores [steps, {len(self.sites)}], got {list(self.scores.shape)}")
        if len(set(self.sites)) < len(self.sites):
            raise PlanError("a router names each of its sites once")
        for step in self.p_steps:
            bad = ~((self.scores[step] >= 0) & (self.scores[step] <= 1))
            if bool(bad.any()):
                unit = int(bad.nonzero()[0])
                raise PlanError(
                    f"step {step}, site '{self.sites[unit]}': the router's score is {float(self.scores[step, unit])}; "
                    "scores lie in 0..1 (all of a step's are NaN where nothing is learned for it)"
                )

    @property
    def p_steps(self) -> tuple[int, ...]:
        """The steps for which scores were learned."""
        return tuple(torch.nonzero(~self.scores.isnan().all(dim=1)).flatten().tolist())


@dataclass(frozen=True)
class Importance:
    """How much each token matters in each block at each step (TokenCache, Lou et al. 2024, w_l^t).

    Attributes:
        scores: `[steps, blocks, tokens]` float32 in 0..1, steps in execution order; high means compute.

    Raises:
        PlanError: the shape is another, or a score is not in 0..1.
    """

    scores: torch.Tensor

    def __post_init__(self) -> None:
        if self.scores.dim() != 3:
            raise PlanError(f"importances have shape [steps, blocks, tokens], got {list(self.scores.shape)}")
        bad = ~((self.scores >= 0) & (self.scores <= 1))
        if bool(bad.any()):
            step, block, token = bad.nonzero()[0].tolist()
            found = float(self.scores[step, block, token])
            raise PlanError(f"step {step}, block {block}, token {token}: the importance is {found}; they lie in 0..1")


@dataclass(frozen=True)
class Probes:
    """Importance that depends on the stream: one small network per run, read out for every block and step.

    With x the stream that enters block 0, the score of a token is
    `gelu(layer_norm(x) @ hidden + offset) @ weight[step, block] + bias[step, block]`: the terms of
    `tcc.plan.scores.Probe`.

    Attributes:
        hidden: `[D, H]` float32.
        offset: `[H]` float32.
        weight: `[steps, blocks, H]` float32.
        bias: `[steps, blocks, tokens]` float32.
        mean: `[steps, blocks, tokens]` float32 in 0..1: the importance, averaged over the samples it was learned on.
            How many tokens a block keeps is decided by it, and not for each sample: counts are fixed.
    """

    hidden: torch.Tensor
    offset: torch.Tensor
    weight: torch.Tensor
    bias: torch.Tensor
    mean: torch.Tensor

    def __post_init__(self) -> None:
        sizes = [list(t.shape) for t in (self.hidden, self.offset, self.weight, self.bias, self.mean)]
        if [len(size) for size in sizes] != [2, 1, 3, 3, 3]:
            raise PlanError(
                f"probes are [D, H], [H], [steps, blocks, H] and twice [steps, blocks, tokens], got {sizes}"
            )
        hidden, offset, weight, bias, mean = sizes
        if not (hidden[1:] == offset == weight[2:] and weight[:2] == bias[:2] and bias == mean):
            raise PlanError(f"the sizes of the probes do not agree: {sizes}")


Learned = Router | Importance | Probes
_KINDS: dict[str, type[Router] | type[Importance] | type[Probes]] = {
    kind.__name__.lower(): kind for kind in (Router, Importance, Probes)
}


def save_learned(learned: Learned, path: str | os.PathLike[str], dtype: torch.dtype = torch.float32) -> None:
    """Write what was learned as one safetensors file: a JSON header and the tensors, stored as `dtype`.

    Raises:
        PlanError: the file cannot be written.
    """
    content = {field.name: getattr(learned, field.name) for field in fields(learned)}
    tensors = {name: t.detach().to("cpu", dtype).contiguous() for name, t in content.items() if torch.is_tensor(t)}
    header: dict[str, Any] = {name: list(value) for name, value in content.items() if name not in tensors}
    header |= {"kind": type(learned).__name__.lower(), "version": 1}
    write_tensors(tensors, path, {_HEADER: json.dumps(header)}, what="what was learned", error=PlanError)


def load_learned(path: str | os.PathLike[str]) -> Learned:
    """Read a file that `save_learned` wrote; tensors come as float32.

    Raises:
        PlanError: there is no such file, or it holds nothing that was learned.
    """
    if not Path(path).is_file():
        raise PlanError(f"there is no file {path}")
    try:
        with safetensors.safe_open(path, framework="pt") as file:
            header = json.loads((file.metadata() or {})[_HEADER])
            content: dict[str, Any] = {name: file.get_tensor(name).float() for name in file.keys()}  # noqa: SIM118
        kind = _KINDS[header["kind"]]
        content |= {field.name: tuple(header[field.name]) for field in fields(kind) if field.name not in content}
        return kind(**content)
    except (safetensors.SafetensorError, KeyError, TypeError, ValueError) as error:
        raise PlanError(
            f"{path} is no router, importance or probes: make one with `tcc train ... --learned FILE`"
        ) from error
