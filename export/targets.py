"""What a program can be exported for: how its graphs are written, and what that needs."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from tcc.errors import ExportError
from tcc.export.aoti import compile_aoti, package_aoti
from tcc.export.graphs import input_names
from tcc.export.machine import Machine, versions
from tcc.export.manifest import WEIGHTS, Graph
from tcc.export.onnx import require_onnx, write_onnx
from tcc.export.onnx_operators import largest_value
from tcc.export.profiles import merge
from tcc.export.tensorrt import compile_onnx, compile_program, tensorrt_machine, torch_tensorrt_machine
from tcc.export.tensorrt_rtx import compile_context, rtx_machine
from tcc.export.weights import Weights, places
from tcc.program import Program, Variant

__all__ = ["TARGETS", "Target", "Writer", "write_profiles"]

Progress = Callable[[str], None]
Graphs = tuple[tuple[Graph, ...], tuple[float, ...]]
#: Writes the graphs into a folder that has the weights; returns them and the seconds of each.
Writer = Callable[[Program, Weights, Path, Machine, Progress], Graphs]


@dataclass(frozen=True)
class Target:
    """One way to export.

    Attributes:
        machine: what the graphs are made for and with, given the GPU architecture that the caller asks for. It is
            called before any work is done, and raises `ExportError` where a library or a GPU is missing.
        write: the writer.
    """

    machine: Callable[[str | None], Machine]
    write: Writer


def _onnx_machine(arch: str | None) -> Machine:
    require_onnx()
    return _any_gpu("onnx", arch, "onnx", "onnxscript", "onnxruntime")


def _any_gpu(target: str, arch: str | None, *packages: str) -> Machine:
    if arch is not None:
        raise ExportError(f"target={target!r} is for no GPU architecture, and arch={arch!r} was given: leave it out")
    return Machine("", versions("torch", *packages))


def _write_onnx(program: Program, weights: Weights, folder: Path, machine: Machine, progress: Progress) -> Graphs:
    where = places(folder / WEIGHTS)

    def write(number: int, variant: Variant) -> Graph:
        name = f"step{number}.onnx"
        operators = write_onnx(variant, weights, where, folder / name)
        return _graph(variant, name, operators, _used(variant, weights), largest_value(folder / name))

    return _timed(program, progress, "writing", write)


def _write_aoti(program: Program, weights: Weights, folder: Path, machine: Machine, progress: Progress) -> Graphs:
    made: list[list[str]] = []

    def write(number: int, variant: Variant) -> Graph:
        files, inputs = compile_aoti(variant, weights)
        made.append(files)
        return Graph(
            "steps.pt2", f"step{number}", inputs, _stores(variant), _used(variant, weights), variant.macs,
            _operators(variant), 0,
        )  # fmt: skip

    graphs = _timed(program, progress, "compiling", write)
    package_aoti(made, folder / "steps.pt2")
    return graphs


def _write_engines(compile: Callable[[Path, Path, Machine], None], suffix: str) -> Writer:
    """A writer that compiles the ONNX form of each graph; the engine holds its weights itself."""

    def write_all(program: Program, weights: Weights, folder: Path, machine: Machine, progress: Progress) -> Graphs:
        where, source = places(folder / WEIGHTS), folder / "source.onnx"

        def write(number: int, variant: Variant) -> Graph:
            operators = write_onnx(variant, weights, where, source)
            compile(source, folder / f"step{number}{suffix}", machine)
            source.unlink()
            return _graph(variant, f"step{number}{suffix}", operators, ())

        return _timed(program, progress, "compiling", write)

    return write_all


def write_profiles(program: Program, weights: Weights, folder: Path, machine: Machine, progress: Progress) -> Graphs:
    """Write TensorRT engines, one for all graphs that differ only in how many tokens they keep.

    Raises:
        ExportError: no two graphs do.
    """
    import onnx

    where = places(folder / WEIGHTS)
    sources = [folder / f"source{number}.onnx" for number in range(len(program.variants))]

    def write(number: int, variant: Variant) -> Graph:
        return _graph(variant, "", write_onnx(variant, weights, where, sources[number]), ())

    written, spent = _timed(program, progress, "writing", write)
    graphs, seconds = list(written), list(spent)
    groups = merge([onnx.load(source, load_external_data=False) for source in sources])
    if len(groups) == len(sources):
        raise ExportError(
            "profiles=True: no two graphs differ only in how many tokens they keep, so each needs an engine of its "
            "own: leave profiles out"
        )
    for group in groups:
        progress(f"compiling graph {', '.join(str(number + 1) for number in group.numbers)}/{len(sources)}")
        began, name = time.perf_counter(), f"step{group.numbers[0]}.engine"
        onnx.save(group.model, sources[group.numbers[0]])
        compile_onnx(sources[group.numbers[0]], folder / name, machine, group.shapes)
        for profile, number in enumerate(group.numbers):
            graphs[number] = replace(graphs[number], file=name, entry=str(profile) if group.shapes else "")
            seconds[number] += (time.perf_counter() - began) / len(group.numbers)
    for source in sources:
        source.unlink()
    return tuple(graphs), tuple(seconds)


def _write_tensorrt(program: Program, weights: Weights, folder: Path, machine: Machine, progress: Progress) -> Graphs:
    def write(number: int, variant: Variant) -> Graph:
        engine = compile_program(variant, weights, torch.device("cuda"))
        (folder / f"step{number}.engine").write_bytes(engine)
        return _graph(variant, f"step{number}.engine", _operators(variant), ())

    return _timed(program, progress, "compiling", write)


def _timed(program: Program, progress: Progress, doing: str, write: Callable[[int, Variant], Graph]) -> Graphs:
    """Every graph, written, and the seconds that it took."""
    graphs, seconds = [], []
    for number, variant in enumerate(program.variants):
        progress(f"{doing} graph {number + 1}/{len(program.variants)}")
        began = time.perf_counter()
        graphs.append(write(number, variant))
        seconds.append(time.perf_counter() - began)
    return tuple(graphs), tuple(seconds)


def _graph(variant: Variant, file: str, operators: int, used: tuple[str, ...], largest: int = 0) -> Graph:
    return Graph(file, "", input_names(variant), _stores(variant), used, variant.macs, operators, largest)


def _stores(variant: Variant) -> tuple[str, ...]:
    return tuple(f"slot:{slot}" for slot in variant.stores)


def _used(variant: Variant, weights: Weights) -> tuple[str, ...]:
    """The names of the weights that a graph reads."""
    nodes = (node for node in variant.gm.graph.nodes if node.op == "get_attr")
    return tuple(dict.fromkeys(weights.names[str(node.target)] for node in nodes))


def _operators(variant: Variant) -> int:
    return sum(node.op == "call_function" for node in variant.gm.graph.nodes)


TARGETS = {
    "onnx": Target(_onnx_machine, _write_onnx),
    "aoti": Target(lambda arch: _any_gpu("aoti", arch), _write_aoti),
    "tensorrt": Target(torch_tensorrt_machine, _write_tensorrt),
    "tensorrt-onnx": Target(tensorrt_machine, _write_engines(compile_onnx, ".engine")),
    "tensorrt-rtx": Target(rtx_machine, _write_engines(compile_context, ".onnx")),
}
