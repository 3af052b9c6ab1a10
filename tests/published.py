"""The published models whose cost the papers state, and tokens and FLOPs as some of them count."""

from __future__ import annotations

import functools
import math

import torch

import tcc
from tcc.models import DiT, UViT
from tcc.plan import CachePlan, TopK, Update


@functools.cache
def dit_xl2() -> tcc.ModelInfo:
    """DiT-XL/2 at 256 x 256 pixels (32 x 32 latents, 256 tokens), built without memory."""
    with torch.device("meta"):
        model = DiT.from_name("DiT-XL/2", input_size=32).eval()
        return tcc.inspect(model, torch.zeros(2, 4, 32, 32), torch.zeros(2).long(), torch.zeros(2).long())


@functools.cache
def uvit_h2() -> tcc.ModelInfo:
    """U-ViT-H/2 at 256 x 256 pixels (32 x 32 latents, 258 tokens), built without memory."""
    with torch.device("meta"):
        model = UViT.from_name("UViT-H/2", input_size=32).eval()
        return tcc.inspect(model, torch.zeros(1, 4, 32, 32), torch.zeros(1).long(), torch.zeros(1).long())


def tera_flops(plan: CachePlan) -> float:
    """Of one guided image, as ToCa, DuCa, FORA and TaylorSeer state it: 2 FLOPs per MAC, two guidance branches."""
    return plan.macs * 2 * 2 / 1e12


def toca_tokens(block: int, i: int, ratio: float = 0.07) -> int:
    """Tokens of ToCa's schedule for 50 DDIM steps: `floor(256 ratio 2.5 (0.8 + 0.4 l / 27) (3 - 4 i / 50))`."""
    return math.floor(256 * (ratio * (0.8 + 0.4 * block / 27) * max(0.0, 3 - 4 * i / 50) * 2.5))


def updated_tokens(plan: CachePlan) -> list[int]:
    """The number of tokens of every update."""
    updates = [action.tokens for action in plan.actions.values() if isinstance(action, Update)]
    return [t.count if isinstance(t, TopK) else plan.tokens[t].numel() for t in updates]
