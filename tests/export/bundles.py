"""Plans and bundles for the tests of exporting."""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import nn

import tcc
from tcc.export.inputs import describe, random_inputs
from tcc.export.manifest import Manifest
from tcc.info import ModelInfo
from tcc.plan import Action, CachePlan, Compute, Hold, Reuse, Skip, TopK, Update
from tcc.plan.scores import Attended, Fixed, Norm, Probe, Score, Stale
from tests.tiny_models import Case, case, noise

__all__ = [
    "STEPS",
    "allowed_bytes",
    "bundle_bytes",
    "chosen",
    "counts",
    "flat_inputs",
    "half",
    "mixed",
    "planned",
    "session",
]

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
    """The tensors of a call, in the order of the graph's inputs; all are other ones at each step."""
    return _random(which)(step)


@functools.cache
def _random(which: Case) -> Callable[[int], list[torch.Tensor]]:
    captured = which.info.captured
    return random_inputs(describe(captured), captured.flatten(which.args, which.kwargs), STEPS)


def chosen(info: ModelInfo) -> CachePlan:
    """Half of the tokens, chosen in the graph for each sample by all that a score can be made of."""
    tokens, width, first = info.num_tokens, info.analysis.stream_shape[-1], info.blocks[0]
    terms = (
        (1.0, Probe(f"{first}.stream", "hidden", "offset", "weight", "one")), (0.5, Attended(f"{first}.attn")),
        (0.5, Norm(f"{first}.mlp.out")), (0.5, Norm(f"{first}.attn.kv")), (0.25, Stale(f"{first}.mlp.out")),
        (0.25, Fixed("each")),
    )  # fmt: skip
    shapes = {"one": (tokens,), "each": (info.batch, tokens), "hidden": (width, 4), "offset": (4,), "weight": (4,)}
    tables = {name: noise(*sizes, seed=40 + i) for i, (name, sizes) in enumerate(shapes.items())}
    kept = Update(TopK("best", tokens // 2), "cached")
    sites = [site.name for site in info.sites.values() if site.kind in ("out", "kv")]
    actions: dict[tuple[int, str], Action] = {
        (step, site): kept if step % 3 else Compute() for step in range(STEPS) for site in sites
    }
    return info.count(CachePlan(STEPS, actions, scores={"best": Score(terms)}, tables=tables))


def planned(name: str) -> tuple[Case, Callable[[ModelInfo], CachePlan]]:
    """The tiny model of that name and the mixed plan; `chosen` is the tiny DiT with tokens chosen in the graph."""
    return (case("dit"), chosen) if name == "chosen" else (case(name), mixed)


def bundle_bytes(folder: Path) -> int:
    """The bytes of all files of a bundle."""
    return sum(path.stat().st_size for path in folder.iterdir())


def allowed_bytes(model: nn.Module, manifest: Manifest) -> float:
    """What a bundle may take: 1.1 times the weights, the plan, and 2 MB for each graph."""
    weights = sum(tensor.nbytes for tensor in (*model.parameters(), *model.buffers()))
    return 1.1 * weights + manifest.files["plan.safetensors"].bytes + 2e6 * len(manifest.graphs)


def session(which: Case, plan: Callable[[ModelInfo], CachePlan] = mixed) -> Any:
    """The compiled model under a plan, called with flat tensors."""
    model = tcc.compile(which.model, plan, example_inputs=(which.args, which.kwargs), backend="eager")
    return lambda *tensors: model.session._run(list(tensors))


def half(which: Case, dtype: torch.dtype = torch.float16) -> tuple[nn.Module, tuple[tuple[Any, ...], dict[str, Any]]]:
    """A copy of the model in `dtype`, and the arguments of a call."""

    def cast(value: Any) -> Any:
        return value.to(dtype) if isinstance(value, torch.Tensor) and value.is_floating_point() else value

    args, kwargs = tuple(map(cast, which.args)), {key: cast(value) for key, value in which.kwargs.items()}
    return copy.deepcopy(which.model).to(dtype), (args, kwargs)
