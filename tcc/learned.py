"""What training learns, as files: routers (Learning-to-Cache) and importances (TokenCache)."""

from __future__ import annotations

import json
import os
from dataclasses import dataclass
from pathlib import Path

import safetensors
import safetensors.torch
import torch

from tcc.errors import PlanError

__all__ = ["Importance", "Router", "load_learned", "save_learned"]

_HEADER = "tcc.learned"


@dataclass(frozen=True)
class Router:
    """How much each site matters at each step (Learning-to-Cache, Ma et al. 2024, section 3).

    Attributes:
        scores: `[steps, sites]` float32 in 0..1, steps in execution order; high means compute. NaN at the steps that
            compute everything, for which nothing is learned.
        sites: the names of the sites.
    """

    scores: torch.Tensor
    sites: tuple[str, ...]

    def __post_init__(self) -> None:
        if self.scores.dim() != 2 or self.scores.shape[1] != len(self.sites):
            raise PlanError(f"a router has scores [steps, {len(self.sites)}], got {list(self.scores.shape)}")


@dataclass(frozen=True)
class Importance:
    """How much each token matters in each block at each step (TokenCache, Lou et al. 2024, w_l^t).

    Attributes:
        scores: `[steps, blocks, tokens]` float32 in 0..1, steps in execution order; high means compute.
    """

    scores: torch.Tensor

    def __post_init__(self) -> None:
        if self.scores.dim() != 3:
            raise PlanError(f"importances have shape [steps, blocks, tokens], got {list(self.scores.shape)}")


def save_learned(learned: Router | Importance, path: str | os.PathLike[str]) -> None:
    """Write a router or an importance as one safetensors file."""
    header = {"kind": type(learned).__name__.lower(), "version": 1}
    if isinstance(learned, Router):
        header["sites"] = list(learned.sites)
    tensors = {"scores": learned.scores.detach().float().cpu().contiguous()}
    safetensors.torch.save_file(tensors, path, metadata={_HEADER: json.dumps(header)})


def load_learned(path: str | os.PathLike[str]) -> Router | Importance:
    """Read a file that `save_learned` wrote.

    Raises:
        PlanError: there is no such file, or it is no router and no importance.
    """
    if not Path(path).is_file():
        raise PlanError(f"there is no file {path}")
    try:
        with safetensors.safe_open(path, framework="pt") as file:
            header = json.loads((file.metadata() or {})[_HEADER])
            scores = file.get_tensor("scores")
            return Router(scores, tuple(header["sites"])) if header["kind"] == "router" else Importance(scores)
    except (safetensors.SafetensorError, KeyError, ValueError) as error:
        raise PlanError(f"{path} is neither a router nor an importance: make one with `tcc train`") from error
