"""Where `benchmarks/quality.py` keeps what it has measured: a folder of small files, written once each.

    settings.json                          what the numbers depend on; a store is of one setting
    <steps>/<row>-<digest>/seed<S>/<C>.safetensors     chunk C of a row: features `[N, 128]` float32 and PSNR `[N]`
    <steps>/<row>-<digest>/seconds.json    its time, beside that of the uncached run
    <steps>/uncached-<digest>/...          also has `images` `[N, 1, 32, 32]` float32: what PSNR is counted from

The digest is that of the plan's table: a policy that plans otherwise than it did begins a new row. Where a row is not
drawn by plain DDIM, a second digest tells its sampler and the steps that this visits.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
from collections.abc import Mapping
from dataclasses import fields, is_dataclass
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from torch import Tensor

from tcc.plan import CachePlan

Chunk = dict[str, Tensor]


def digest(plan: CachePlan) -> str:
    """What a plan does, as 10 hex digits: its table and tensors; not how it is called or what it costs.

    Fields at their default are left out, so that a new one changes no digest.
    """
    found = hashlib.sha256()
    for entry in fields(plan):
        if entry.name not in ("model", "cost", "policy") and getattr(plan, entry.name) is not entry.default:
            _feed(found, entry.name, getattr(plan, entry.name))
    return found.hexdigest()[:10]


def _feed(found: Any, name: str, value: Any) -> None:
    """Hash a value under its name, whatever a plan may hold."""
    if isinstance(value, Tensor):
        found.update(f"{name}:{value.dtype}{list(value.shape)}".encode() + value.contiguous().numpy().tobytes())
    elif isinstance(value, Mapping):
        for key in value:
            _feed(found, f"{name}.{key}", value[key])
    elif is_dataclass(value):
        found.update(f"{name}:{type(value).__name__}".encode())
        for entry in fields(value):
            if getattr(value, entry.name) != entry.default:
                _feed(found, f"{name}.{entry.name}", getattr(value, entry.name))
    else:
        found.update(f"{name}={value!r}".encode())


class Store:
    """A folder of measurements.

    Args:
        root: the folder; made if it is not there.
        settings: what all numbers in it depend on.
        reading: nothing will be measured, so that a new folder is not made for these settings.

    Raises:
        ValueError: the folder holds measurements with other settings.
    """

    def __init__(self, root: Path, settings: dict[str, Any], *, reading: bool = False) -> None:
        self.root, file = root, root / "settings.json"
        if not file.exists() and not reading:
            root.mkdir(parents=True, exist_ok=True)
            _write_json(file, settings)
        stored = json.loads(file.read_text()) if file.exists() else settings
        changed = [f"{k} {stored.get(k)} -> {v}" for k, v in settings.items() if stored.get(k) != v]
        if changed:
            raise ValueError(f"{root} is of other settings ({', '.join(changed)}): choose another --out")

    def row(self, steps: int, name: str, plan: CachePlan, drawn: str = "") -> Path:
        """The folder of a row; `drawn` tells its sampling from the default, where it is another."""
        slug = re.sub(r"[^A-Za-z0-9.]+", "-", name).strip("-")
        place = f"-{hashlib.sha256(drawn.encode()).hexdigest()[:10]}" if drawn else ""
        return self.root / str(steps) / f"{slug}-{digest(plan)}{place}"

    @staticmethod
    def has(row: Path, seed: int, chunk: int) -> bool:
        """Whether a chunk is there."""
        return _chunk(row, seed, chunk).is_file()

    @staticmethod
    def read(row: Path, seed: int, chunk: int) -> Chunk:
        """A chunk that is there."""
        return safetensors.torch.load_file(_chunk(row, seed, chunk))

    @staticmethod
    def write(row: Path, seed: int, chunk: int, content: Chunk) -> None:
        """Write a chunk, whole or not at all."""
        path = _chunk(row, seed, chunk)
        path.parent.mkdir(parents=True, exist_ok=True)
        partial = path.with_suffix(f".{os.getpid()}.partial")
        safetensors.torch.save_file({name: tensor.contiguous() for name, tensor in content.items()}, partial)
        os.replace(partial, path)

    @staticmethod
    def counted(row: Path) -> dict[int, int]:
        """How many chunks without a gap every seed has."""
        found = {}
        for folder in sorted(row.glob("seed*")):
            seed = int(folder.name.removeprefix("seed"))
            found[seed] = next(i for i in range(10**6) if not Store.has(row, seed, i))
        return found

    @staticmethod
    def gathered(row: Path, seed: int, chunks: int) -> tuple[Tensor, Tensor]:
        """Features and PSNR of the first chunks, in order."""
        parts = [Store.read(row, seed, chunk) for chunk in range(chunks)]
        return torch.cat([part["features"] for part in parts]), torch.cat([part["psnr"] for part in parts])

    @staticmethod
    def write_seconds(row: Path, content: dict[str, Any]) -> None:
        """Keep a row's time."""
        row.mkdir(parents=True, exist_ok=True)
        _write_json(row / "seconds.json", content)

    @staticmethod
    def seconds(row: Path) -> dict[str, Any] | None:
        """A row's time, where it has been measured."""
        file = row / "seconds.json"
        return json.loads(file.read_text()) if file.is_file() else None


def _chunk(row: Path, seed: int, chunk: int) -> Path:
    return row / f"seed{seed}" / f"{chunk:04d}.safetensors"


def _write_json(path: Path, content: Any) -> None:
    partial = path.with_suffix(f".{os.getpid()}.partial")
    partial.write_text(json.dumps(content, indent=1) + "\n")
    os.replace(partial, path)
