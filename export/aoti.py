"""AOTInductor: all variants compiled into one package, without their weights."""

from __future__ import annotations

import shutil
import subprocess
import tempfile
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from tcc.errors import ExportError
from tcc.export.graphs import example, with_weights
from tcc.export.weights import Weights
from tcc.passes.base import run_passes
from tcc.passes.write_slots import WriteSlots
from tcc.program import Variant

__all__ = ["compile_aoti", "package_aoti"]

#: Weights stay outside, so that all variants use one copy. The wrapper only calls kernels: optimising it saves nothing.
_OPTIONS = {
    "aot_inductor.package": True,
    "aot_inductor.package_constants_in_so": False,
    "aot_inductor.compile_wrapper_opt_level": "O0",
}


def compile_aoti(variant: Variant, weights: Weights) -> tuple[list[str], tuple[str, ...]]:
    """Compile one variant; its slots are written in place.

    Returns:
        The files that make it up, and the names of its inputs.

    Raises:
        ExportError: the compiler fails.
    """
    from torch._inductor import aot_compile  # imported here: it is slow

    gm = with_weights(variant, weights)
    gm.meta["stores"] = variant.stores
    run_passes(gm, [WriteSlots()], label="aoti")
    nodes = [node for node in gm.graph.nodes if node.op == "placeholder"]
    inputs = tuple(map(example, nodes))
    try:
        with warnings.catch_warnings(), torch.no_grad(), torch.autocast(inputs[0].device.type, enabled=False):
            warnings.filterwarnings("ignore", message=".*LeafSpec", category=FutureWarning)
            module = torch.export.export(gm, inputs, strict=False).module(check_guards=False)
            found: Any = aot_compile(module, inputs, options=_OPTIONS)
    except Exception as error:
        raise ExportError(f"AOTInductor cannot compile the graph: {str(error).strip().splitlines()[0]}") from error
    return [str(file) for file in found], tuple(str(node.meta.get("input", node.target)) for node in nodes)


def package_aoti(variants: Sequence[list[str]], path: Path) -> tuple[str, ...]:
    """Write compiled variants as one package; returns their names in it."""
    from torch._inductor.package.package import package_aoti as package

    names = tuple(f"step{number}" for number in range(len(variants)))
    with tempfile.TemporaryDirectory() as folder:
        kept: dict[str, Any] = {}
        for name, files in zip(names, variants, strict=True):
            kept[name] = [_kept(file, Path(folder)) for file in files]
        package(str(path), kept)
    return names


def _kept(file: str, folder: Path) -> str:
    """What is packed in place of a compiled variant's `file`.

    A generated source is not needed to run, and holds paths of this machine: an empty file takes its place. Its name is
    needed, as torch 2.11 finds the metadata of a variant by the name of its source alone, without which it says
    `File not found: _metadata.json`. (2.13 and 2.15 find it without.)
    """
    if file.endswith(".cpp"):
        empty = folder / Path(file).name
        empty.touch()
        return str(empty)
    return _stripped(file, folder) if file.endswith(".so") else file


def _stripped(file: str, folder: Path) -> str:
    """A library without its symbol table, which is half of it, where the machine has a tool for that; else `file`."""
    tool = shutil.which("strip")
    if tool is None:
        return file
    copy = shutil.copy(file, folder)
    done = subprocess.run([tool, "--strip-unneeded", copy], check=False, capture_output=True)
    return str(copy) if done.returncode == 0 else file
