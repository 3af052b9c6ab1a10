"""Plans and bundles for the tests of exporting."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import nn

import tcc
from tcc.info import ModelInfo
from tcc.plan import Action, CachePlan, Compute, Hold, Reuse, Skip, Update
from tests.tiny_models import Case

__all__ = ["STEPS", "counts", "flat_inputs", "half", "mixed", "session"]

STEPS = 6


def mixed(info: ModelInfo) -> CachePlan:
    """Every kind of action in four kinds of steps: reuse, a forecast, a drop, a hold, pruned tokens in each mode.

    The attention of two blocks is pruned, with keys of the kept tokens, of all tokens, and kept ones.
    """
    first, last = info.blocks[0], info.blocks[-1]
    one, two, kv = f"{first}.attn.delta", f"{last}.attn.delta", f"{first}.attn.kv"
    mlp, end = f"{last}.mlp.out", "out.stream"
    start, stop = info.image_tokens
    others = [i for i in range(info.num_tokens) if not start <= i < stop]
    kept = torch.tensor(sorted([*others, *range(start, stop, 2)]))
    actions: dict[tuple[int, str], Action] = {(step, site): Compute() for step in (0, 4) for site in (one, two, kv)}
    actions |= {(step, site): Compute() for step in (0, 1, 4) for site in (mlp, end)}
    actions |= {
        (1, one): Update("even", "kept"), (1, two): Update("even", "current"), (1, f"{first}.mlp.delta"): Skip(),
        (2, one): Update("even", "cached"), (2, kv): Update("even"), (2, two): Reuse(), (2, mlp): Reuse(1, (1.5, -0.5)),
        (3, end): Hold(), (5, end): Hold(),
    }  # fmt: skip
    return info.count(CachePlan(num_steps=STEPS, actions=actions, tokens={"even": kept}))


def counts(info: ModelInfo) -> CachePlan:
    """Two kinds of P-steps that differ in how many tokens they keep, after I-steps."""
    start, stop = info.image_tokens
    others = [i for i in range(info.num_tokens) if not start <= i < stop]
    tokens = {name: torch.tensor(sorted([*others, *range(start, stop, n)])) for name, n in (("half", 2), ("few", 4))}
    sites = [f"{block}.{branch}.delta" for block in info.blocks for branch in ("attn", "mlp")]
    actions: dict[tuple[int, str], Action] = {(step, site): Compute() for step in (0, 2) for site in sites}
    for step, name in ((1, "half"), (3, "few")):
        actions |= {(step, site): Update(name, "kept") for site in sites}
    return info.count(CachePlan(num_steps=4, actions=actions, tokens=tokens))


def flat_inputs(which: Case, step: int) -> list[torch.Tensor]:
    """The tensors of a call, in the order of the graph's inputs."""
    args, kwargs = which.inputs(step)
    return which.info.captured.flatten(args, kwargs)


def session(which: Case) -> Any:
    """The compiled model under the mixed plan, called with flat tensors."""
    model = tcc.compile(which.model, mixed, example_inputs=(which.args, which.kwargs), backend="eager")
    return lambda *tensors: model.session._run(list(tensors))


def half(which: Case, dtype: torch.dtype = torch.float16) -> tuple[nn.Module, tuple[tuple[Any, ...], dict[str, Any]]]:
    """A copy of the model in `dtype`, and the arguments of a call."""

    def cast(value: Any) -> Any:
        return value.to(dtype) if isinstance(value, torch.Tensor) and value.is_floating_point() else value

    args, kwargs = tuple(map(cast, which.args)), {key: cast(value) for key, value in which.kwargs.items()}
    return copy.deepcopy(which.model).to(dtype), (args, kwargs)
