"""The published model whose FLOPs the papers state, and FLOPs as they count them."""

from __future__ import annotations

import functools

import torch

import tcc
from tcc.models import DiT
from tcc.plan import CachePlan


@functools.cache
def dit_xl2() -> tcc.ModelInfo:
    """DiT-XL/2 at 256 x 256 pixels (32 x 32 latents, 256 tokens), built without memory."""
    with torch.device("meta"):
        model = DiT.from_name("DiT-XL/2", input_size=32).eval()
        return tcc.inspect(model, torch.zeros(2, 4, 32, 32), torch.zeros(2).long(), torch.zeros(2).long())


def tera_flops(plan: CachePlan) -> float:
    """Of one guided image, as ToCa, DuCa, FORA and TaylorSeer state it: 2 FLOPs per MAC, two guidance branches."""
    return plan.macs * 2 * 2 / 1e12
