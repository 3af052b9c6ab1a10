"""Ways to spoil what lies behind the checksums of a bundle: its tensors, plan, graphs and packages."""

from __future__ import annotations

import contextlib
import json
import random
import warnings
import zipfile
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

import tcc
from tcc.export.manifest import PLAN, TENSORS, WEIGHTS
from tcc.plan.file import FORMAT
from tcc.plan.file import _digest as plan_digest
from tests.export.mutations import (
    BODIES,
    BYTES,
    HOSTILE,
    LISTS,
    Change,
    edit_graph,
    forge,
    places,
    recount,
    rezip,
    seal,
)

__all__ = ["DEEP", "spoil"]


# -- tensors, weights, plan


def _save(tensors: dict[str, torch.Tensor], path: Path) -> None:
    save_file({name: tensor.contiguous().clone() for name, tensor in tensors.items()}, path)


def _tensors(folder: Path, draw: random.Random) -> None:
    """Other values for what steps give their graphs: positions that do not exist, numbers that are none."""
    path = folder / TENSORS
    tensors = load_file(path)
    name = draw.choice(sorted(tensors))
    found = tensors[name]
    whole = not found.is_floating_point()
    bad = draw.choice([-1, -(2**62), 10**6, 2**62]) if whole else draw.choice([float("nan"), float("inf"), 7.0])
    ways = [found.clone().fill_(bad), found.flip(0) + (1 if whole else 0.5), found[:0], found.double(), None]
    tensors[name] = draw.choice(ways)
    _save({key: tensor for key, tensor in tensors.items() if tensor is not None}, path)


def _weights(folder: Path, draw: random.Random) -> None:
    """Weights of other names, shapes and dtypes."""
    path = folder / WEIGHTS
    tensors = load_file(path)
    name = draw.choice(sorted(tensors))
    found = tensors.pop(name)
    ways = (
        {name: found[:1] if found.dim() else found[None], "x": found},
        {name: found.double()},
        {name: found[None]},
        {},
    )
    _save(tensors | draw.choice(ways), path)


def _header(folder: Path, draw: random.Random) -> None:
    """A safetensors file whose header does not fit its bytes."""
    path = folder / draw.choice([PLAN, TENSORS, WEIGHTS])
    content = path.read_bytes()
    length = int.from_bytes(content[:8], "little")
    header, data = content[8 : 8 + length], content[8 + length :]
    match draw.randrange(5):
        case 0:
            content = draw.choice([0, 1, 2**20, 2**40, 2**63, 2**64 - 1]).to_bytes(8, "little") + content[8:]
        case 1:
            content = content[: 8 + draw.randrange(length)]
        case 2:
            content = content[:8] + header.replace(b'"data_offsets":[', b'"data_offsets":[9', 1) + data
        case 3:
            swapped = header.replace(b'"F32"', b'"I64"', 1).replace(b'"I64"', b'"F16"', 1)
            content = content[:8] + swapped + data
        case _:
            text = json.loads(header)
            entry = text[draw.choice([key for key in text if key != "__metadata__"])]
            entry["shape"] = draw.choice([[2**40], [2**62, 4], [-1], [], [1] * 1000])
            new = json.dumps(text).encode()
            content = len(new).to_bytes(8, "little") + new + data
    path.write_bytes(content)


def _plan(folder: Path, draw: random.Random) -> None:
    """Another plan than the one that was exported, or none at all."""
    path = folder / PLAN
    old = tcc.CachePlan.load(str(path))
    sites = {site: tcc.Reuse() for site in old.sites if not site.endswith(("stream", "skip"))}
    match draw.randrange(4):
        case 0:
            tcc.CachePlan(num_steps=old.num_steps + draw.choice([-1, 1, 1000]), actions={}).save(str(path))
        case 1:
            tcc.CachePlan(num_steps=old.num_steps, actions={}).save(str(path))
        case 2:
            actions = {(old.num_steps - 1, site): action for site, action in sites.items()}
            tcc.CachePlan(num_steps=old.num_steps, actions=actions).save(str(path))
        case _:
            path.write_bytes(draw.randbytes(2000))


def _plan_text(folder: Path, draw: random.Random) -> None:
    """Something hostile in the plan's table, under a checksum that fits."""
    path = folder / PLAN
    tensors = load_file(path)
    with safe_open(path, framework="pt") as file:
        body = json.loads(file.metadata()["plan"])
    holder, key = draw.choice(list(places(body)))
    holder[key] = draw.choice([item for item in HOSTILE if item != "\ud800"])
    text = json.dumps(body)
    save_file(tensors, path, metadata={"format": FORMAT, "plan": text, "sha256": plan_digest(text, tensors)})


# -- graphs of ONNX


def _onnx(folder: Path, draw: random.Random) -> None:
    """A graph that takes, reads or does something else."""

    def edit(model: Any) -> None:
        graph = model.graph
        value = draw.choice([*graph.input, *graph.output])
        weight = draw.choice([tensor for tensor in graph.initializer if tensor.external_data])
        node = draw.choice(list(graph.node))
        match draw.randrange(9):
            case 0:
                dims = value.type.tensor_type.shape.dim
                if dims:
                    draw.choice(list(dims)).dim_value = draw.choice([0, 1, 2**20, 2**62, -1])
            case 1:
                value.type.tensor_type.elem_type = draw.choice([1, 6, 7, 10, 11])
            case 2:
                value.name = draw.choice(["x2", "slot:new", ""])
            case 3:
                entry = draw.choice(list(weight.external_data))
                entry.value = draw.choice(["../x", "/etc/passwd", "0", "-1", str(2**62), "*/_ORT_MEM_ADDR_/*"])
            case 4:
                weight.dims[:] = draw.choice([[1], [2**40], [2**31, 2**31], []])
            case 5:
                graph.node.remove(node)
            case 6:
                node.op_type = draw.choice(["Identity", "Reshape", "NoSuchOperator"])
            case 7:
                model.metadata_props.clear()
            case _:
                node.input[:] = list(node.input)[::-1]

    edit_graph(draw.choice(sorted(folder.glob("*.onnx"))), edit)


def _body(folder: Path, draw: random.Random) -> None:
    """A graph that loops, chooses or swells."""
    edit_graph(draw.choice(sorted(folder.glob("*.onnx"))), BODIES[draw.choice(sorted(BODIES))])
    recount(folder)


# -- packages of AOTInductor


def _package(folder: Path, draw: random.Random) -> None:
    """A package of other files: code in other places or cut, pickles, paths out of the folder, other stamps."""
    path = folder / "steps.pt2"
    if draw.random() < 0.1:
        rezip(path, lambda files: None, zipfile.ZIP_DEFLATED)
        return

    def edit(files: dict[str, bytes]) -> None:
        one, other = draw.sample([name for name in files if name.endswith(".so")], 2)
        (stamps,) = [name for name in files if name.endswith("tcc_stamps.json")]
        match draw.randrange(7):
            case 0:
                files[one], files[other] = files[other], files[one]
            case 1:
                files[one] = files[one][: draw.randrange(len(files[one]))]
            case 2:
                files[draw.choice(_ESCAPES)] = b"x"
            case 3:
                del files[draw.choice(list(files))]
            case 4:
                holder, key = draw.choice(list(places(document := json.loads(files[stamps]))))
                holder[key] = draw.choice([item for item in HOSTILE if item != "\ud800"])
                files[stamps] = json.dumps(document).encode()
            case 5:
                files[stamps] = draw.choice([b"", b"[" * 100_000, b"{}", b'{"step0": {}, "step0": {}}', b"\xff"])
            case _:
                content = bytearray(files[one])
                content[draw.randrange(len(content))] ^= 1 << draw.randrange(8)
                files[one] = bytes(content)

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of zipfile, about names
        rezip(path, edit)


_ESCAPES = [
    "steps/../../x", "/tmp/tcc-escaped", "steps/data/aotinductor/step0/../../../../x", "steps/data/weights/weight_0",
    "steps/models/model.json", "steps/data/sample_inputs/model.pt", "steps/data/aotinductor/step0/a/b.so",
    "steps/data/aotinductor/step9/x.so", "steps/data/aotinductor/step0/x.pkl", "steps\\..\\x", "steps/data/extra/x",
]  # fmt: skip

#: Kinds whose checksums are left as they are: those are what is spoiled, or there is nothing to count.
_UNSEALED = ("text", "kind of file", "remove", "manifest")
DEEP: dict[str, Change] = {
    **LISTS,
    "tensors": _tensors,
    "weights": _weights,
    "header": _header,
    "plan": _plan,
    "plan text": _plan_text,
}
_OF_TARGET: dict[str, dict[str, Change]] = {"onnx": {"onnx": _onnx, "body": _body}, "aoti": {"package": _package}}


def spoil(folder: Path, draw: random.Random, target: str) -> str:
    """Spoil a bundle in one way that reaches what lies behind the checksums; returns what was done."""
    ways = {**BYTES, **DEEP, **_OF_TARGET[target]}
    kind = draw.choice(sorted(ways))
    ways[kind](folder, draw)
    if kind in _UNSEALED:
        return kind
    with contextlib.suppress(Exception):  # a manifest that cannot be read, or shapes that nobody can write down
        seal(folder)
        if target == "onnx" and kind not in BYTES and draw.random() < 0.5:
            forge(folder)
            return f"{kind}, forged"
    return kind
