"""A plan as one safetensors file: the table as JSON in the header, the token sets and the scores' tables as tensors.

Nothing in the file is executed. A checksum over header and tensors tells a file that was cut or altered.
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import asdict
from typing import Any

import torch
from safetensors import SafetensorError, safe_open

from tcc.errors import PlanError, TccError
from tcc.plan.actions import Action, Compute, Hold, Reuse, Skip, TopK, Update
from tcc.plan.facts import Cost, ModelKey
from tcc.plan.plan import CachePlan
from tcc.plan.scores import Attended, Entropy, Fixed, Norm, Probe, Score, Stale, Term
from tcc.tensors_file import write_tensors

__all__ = ["load", "save"]

FORMAT = "tcc-plan-1"
#: Steps times sites; checking a plan goes over them all.
MAX_TABLE = 10**7
_KINDS: dict[str, type[Any]] = {c.__name__.lower(): c for c in (Compute, Update, Reuse, Hold, Skip)}
_TERMS: dict[str, type[Any]] = {c.__name__.lower(): c for c in (Fixed, Norm, Attended, Entropy, Stale, Probe)}


def save(plan: CachePlan, path: str) -> None:
    """Write `plan` to `path`.

    Raises:
        PlanError: the file cannot be written.
    """
    kinds: list[dict[str, Any]] = []
    rows: list[list[Any]] = []
    for (step, site), action in plan.actions.items():
        entry = _encode(action)
        if entry not in kinds:
            kinds.append(entry)
        rows.append([step, site, kinds.index(entry)])
    body = {
        "num_steps": plan.num_steps,
        "kinds": kinds,
        "actions": rows,
        "tokens": list(plan.tokens),
        "scores": {name: _encode_score(score) for name, score in plan.scores.items()},
        "tables": list(plan.tables),
        "model": None if plan.model is None else asdict(plan.model),
        "policy": dict(plan.policy),
        "cost": None if plan.cost is None else asdict(plan.cost),
        "slot_dtype": None if plan.slot_dtype is None else str(plan.slot_dtype).removeprefix("torch."),
    }
    tensors = {f"tokens.{i}": kept.contiguous() for i, kept in enumerate(plan.tokens.values())}
    tensors |= {f"tables.{i}": table.detach().cpu().clone() for i, table in enumerate(plan.tables.values())}
    try:
        text = json.dumps(body)  # in this order: a policy's options are shown as they were given
    except (TypeError, ValueError) as error:
        raise PlanError(
            f"{path}: the plan's policy holds more than numbers, strings, lists and dicts ({error})"
        ) from error
    # safetensors refuses an empty file of tensors on some versions: one empty tensor marks the format
    tensors["format"] = torch.zeros(0, dtype=torch.int64)
    header = {"format": FORMAT, "plan": text, "sha256": _digest(text, tensors)}
    write_tensors(tensors, path, header, what="the plan", error=PlanError)


def load(path: str) -> CachePlan:
    """Read the plan in `path`.

    Raises:
        PlanError: there is no such file, it cannot be read, is no plan, or does not match its checksum.
    """
    try:
        with safe_open(path, framework="pt") as file:
            meta = file.metadata() or {}
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - not a dict
    except FileNotFoundError as error:
        raise PlanError(f"{path}: there is no such file: make a plan with `tcc plan --out {path}`") from error
    except (SafetensorError, OSError, ValueError) as error:
        raise PlanError(
            f"{path}: cannot be read as a plan ({error}): the file is truncated, altered or not a plan"
        ) from error
    if meta.get("format") != FORMAT:
        raise PlanError(
            f"{path}: not a plan of format {FORMAT} (found {meta.get('format')!r}): make it anew with `tcc plan`"
        )
    text = meta.get("plan", "")
    if _digest(text, tensors) != meta.get("sha256"):
        raise PlanError(f"{path}: the content does not match its checksum: the file was altered; make the plan anew")
    try:
        return _decode(json.loads(text), tensors)
    except TccError:
        raise
    except (KeyError, TypeError, ValueError, AttributeError, IndexError, OverflowError, RecursionError) as error:
        raise PlanError(f"{path}: the plan's table is malformed ({type(error).__name__}: {error})") from error


def _decode(body: dict[str, Any], tensors: dict[str, torch.Tensor]) -> CachePlan:
    sites = len({site for _, site, _ in body["actions"]})
    if isinstance(body["num_steps"], int) and body["num_steps"] > MAX_TABLE // max(sites, 1):
        raise PlanError(f"{body['num_steps']} steps at {sites} sites: more than any plan has; make the plan anew")
    kinds = [_action(entry) for entry in body["kinds"]]
    model, cost = body["model"], body["cost"]
    if model is not None:
        inputs = tuple((str(name), tuple(map(int, sizes))) for name, sizes in model["inputs"])
        model = ModelKey(str(model["graph_hash"]), inputs, int(model["num_tokens"]))
    if cost is not None:
        cost = Cost(cost["full_macs"], tuple(cost["step_macs"]), cost["slot_bytes"])
    dtype = body.get("slot_dtype")  # none in older files
    if dtype is not None and not isinstance(getattr(torch, dtype, None), torch.dtype):
        raise PlanError(f"the plan's slot_dtype {dtype!r:.40} is none of this torch version")
    return CachePlan(
        num_steps=body["num_steps"],
        actions={(step, site): kinds[kind] for step, site, kind in body["actions"]},
        tokens={name: tensors[f"tokens.{i}"] for i, name in enumerate(body["tokens"])},
        model=model,
        policy=dict(body["policy"]),
        cost=cost,
        scores={name: _score(entry) for name, entry in body.get("scores", {}).items()},  # none in older files
        tables={name: tensors[f"tables.{i}"] for i, name in enumerate(body.get("tables", ()))},
        slot_dtype=getattr(torch, dtype) if dtype else None,
    )


def _encode(action: Action) -> dict[str, Any]:
    return {"kind": type(action).__name__.lower(), **asdict(action)}


def _action(entry: dict[str, Any]) -> Action:
    fields = {key: val for key, val in entry.items() if key != "kind"}
    if isinstance(fields.get("tokens"), dict):
        fields["tokens"] = TopK(**fields["tokens"])
    if "coefficients" in fields:
        fields["coefficients"] = tuple(map(float, fields["coefficients"]))
    action: Action = _KINDS[entry["kind"]](**fields)
    return action


def _encode_score(score: Score) -> dict[str, Any]:
    terms = [[weight, {"kind": type(term).__name__.lower(), **asdict(term)}] for weight, term in score.terms]
    return {**asdict(score), "terms": terms}


def _score(entry: dict[str, Any]) -> Score:
    return Score(**{**entry, "terms": tuple((weight, _term(fields)) for weight, fields in entry["terms"])})


def _term(entry: dict[str, Any]) -> Term:
    term: Term = _TERMS[entry["kind"]](**{key: val for key, val in entry.items() if key != "kind"})
    return term


def _digest(text: str, tensors: dict[str, torch.Tensor]) -> str:
    digest = hashlib.sha256(text.encode())
    for name, tensor in sorted(tensors.items()):
        digest.update(f"{name} {tensor.dtype} {list(tensor.shape)}".encode())
        digest.update(tensor.reshape(-1).view(torch.uint8).numpy().tobytes())  # numpy lacks some dtypes
    return digest.hexdigest()
