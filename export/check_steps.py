"""The step table of a bundle, held against the plan that lies beside it."""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Hashable, Iterator, Mapping
from dataclasses import replace
from pathlib import Path

import torch

from tcc.errors import BundleError, PlanError
from tcc.export.manifest import COUNTER, PLAN, Manifest, Step
from tcc.plan import CachePlan, Compute, ModelKey, Reuse, TopK, Update
from tcc.plan.checks import check_model

__all__ = ["check_steps", "read_plan"]


def read_plan(folder: Path) -> CachePlan:
    """The plan of a bundle.

    Raises:
        BundleError: the file is no plan.
    """
    try:
        return CachePlan.load(str(folder / PLAN))
    except PlanError as error:
        raise BundleError(f"{error}; export the bundle anew") from error


def check_steps(folder: Path, manifest: Manifest, plan: CachePlan, tensors: Mapping[str, torch.Tensor]) -> None:
    """Raise where the steps of a bundle are not those of its plan.

    Compared are the model (where the plan names one), the number of steps, the token sets, coefficients and tables that
    every step gives its graph (at a step that computes, maybe those of the next updates), and that steps share a graph
    only where the plan treats them alike. A graph that counts its steps itself has its own tables.

    Raises:
        BundleError: names the step and what differs.
    """
    where = folder / PLAN
    model = plan.model
    if model is not None:
        inputs = tuple((spec.name, spec.shape) for spec in manifest.inputs)
        try:
            check_model(plan, ModelKey(manifest.hashes["graph"], inputs, model.num_tokens))
        except PlanError as error:
            raise BundleError(f"{where}: not the plan that the manifest is for: {error}") from error
    if plan.num_steps != len(manifest.steps):
        raise BundleError(
            f"{where}: a plan of {plan.num_steps} steps, and the manifest has {len(manifest.steps)}: export anew"
        )
    if any(slot.name == COUNTER for slot in manifest.slots) and manifest.target == "onnx":
        return
    rows: dict[int, Hashable] = {}
    contents = {name: _content(tensor) for name, tensor in tensors.items()}
    for number, step in enumerate(manifest.steps):
        if rows.setdefault(step.graph, _row(plan, number)) != _row(plan, number):
            raise BundleError(
                f"{where}: step {number} runs graph {step.graph}, which is for steps that the plan treats otherwise: "
                "the step table was altered; export the bundle anew"
            )
        count = _count(step, tensors)
        other = model is not None and count not in (0, model.num_tokens)
        given, wanted = _given(step, contents), Counter(_wanted(plan, number, count))
        if other or wanted - given or (given - wanted) - Counter(_may_read(plan, number, count)):
            raise BundleError(
                f"{where}: step {number} gives graph {step.graph} other token sets, coefficients or tables than the "
                "plan has: the step table was altered; export the bundle anew"
            )


def _row(plan: CachePlan, step: int) -> Hashable:
    """What the plan does at a step, with numbers for its token sets and coefficients: alike for steps of one graph."""
    sets: dict[str | TopK, int] = {}
    weights: dict[tuple[float, ...], int] = {}
    row: list[Hashable] = []
    for action in plan.at(step).values():
        if isinstance(action, Update):
            number = sets.setdefault(action.tokens, len(sets))
            row.append((replace(action, tokens=str(number)), _size(plan, action.tokens)))
        elif isinstance(action, Reuse) and action.order:
            row.append((action.order, weights.setdefault(action.coefficients, len(weights))))
        else:
            row.append(action)
    return tuple(row)


def _size(plan: CachePlan, tokens: str | TopK) -> int:
    return tokens.count if isinstance(tokens, TopK) else plan.tokens[tokens].numel()


def _count(step: Step, tensors: Mapping[str, torch.Tensor]) -> int:
    """How many tokens there are, kept or not; 0 where the step has no token set."""
    return next((tensors[key].numel() for name, key in step.tensors.items() if name.startswith("place_")), 0)


def _wanted(plan: CachePlan, step: int, count: int) -> Iterator[Hashable]:
    """What the plan's actions at a step read."""
    actions = list(plan.at(step).values())
    chosen = dict.fromkeys(action.tokens for action in actions if isinstance(action, Update))
    for tokens in chosen:
        if isinstance(tokens, str):
            yield "tokens", _content(plan.tokens[tokens]), _places(plan, tokens, count)
    for weights in dict.fromkeys(
        action.coefficients for action in actions if isinstance(action, Reuse) and action.order
    ):
        yield "coefficients", _content(torch.tensor(weights, dtype=torch.float32))
    scores = [plan.score_of(tokens) for tokens in chosen if isinstance(tokens, TopK)]
    for name in {name for score in scores for name in score.tables}:
        yield "table", _content(plan.tables[name].to(torch.float32))


def _may_read(plan: CachePlan, step: int, count: int) -> Iterator[Hashable]:
    """What sites may read where they compute: who updates which tokens next, where neighbours keep one sum."""
    found: dict[str | TopK, None] = {}
    for site in plan.sites:
        if isinstance(plan.action(step, site), Compute):
            updates = [(at, action.tokens) for at, action in plan.column(site) if isinstance(action, Update)]
            later = [tokens for at, tokens in updates if at > step] or [tokens for _, tokens in updates[-1:]]
            found |= dict.fromkeys(later[:1])
    for tokens in found:
        if isinstance(tokens, str):
            yield "tokens", _content(plan.tokens[tokens]), _places(plan, tokens, count)


def _places(plan: CachePlan, tokens: str, count: int) -> str:
    kept = plan.tokens[tokens]
    place = torch.full((count,), -1, dtype=torch.int64)
    place[kept[kept < count]] = torch.arange(int((kept < count).sum()))
    return _content(place)


def _given(step: Step, contents: Mapping[str, str]) -> Counter[Hashable]:
    """What a step gives its graph, in the same form; a token set is its positions and its places."""
    found: Counter[Hashable] = Counter()
    for name, key in step.tensors.items():
        kind, _, number = name.rpartition("_")
        if kind == "kept":
            found["tokens", contents[key], contents.get(step.tensors.get(f"place_{number}", ""), "")] += 1
        elif kind != "place" or f"kept_{number}" not in step.tensors:
            found[kind, contents[key]] += 1
    return found


def _content(tensor: torch.Tensor) -> str:
    flat = tensor.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()
    return hashlib.sha256(f"{tensor.dtype} {list(tensor.shape)}".encode() + flat).hexdigest()
