"""Does every exported graph become one TensorRT engine? NVIDIA's parser and builder answer.

    python benchmarks/engines.py --without-driver --results benchmarks/results

Exports the models of the tests (DiT, U-ViT, PixArt, two to five blocks) under the plan of the tests (pruned tokens in
each attention mode, reuse, a forecast, a drop, a hold), and the DiT under one that chooses its tokens in the graph by
all that a score can be made of, in half precision, for the target `tensorrt-rtx` and every GPU generation. tcc refuses
a graph that does not become a single `EPContext` node: the whole graph in one engine. Needs `pip install 'tcc[rtx]'`
and NVIDIA's driver, or gcc and `--without-driver`. An engine that was built has not been run.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

import onnx
import pytest
import torch
from rich.console import Console
from rich.progress import track

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))  # the tests' models and plan

from provenance import provenance, results_folder  # noqa: E402

from tcc.errors import ExportError  # noqa: E402
from tcc.export import bundle  # noqa: E402
from tests.export import no_driver  # noqa: E402
from tests.export.bundles import half, planned  # noqa: E402

MODELS = {"dit": "DiT", "uvit": "U-ViT", "hf_pixart": "PixArt (diffusers)", "chosen": "DiT, tokens chosen in the graph"}
DTYPES = (torch.float16, torch.bfloat16)


@dataclass(frozen=True)
class Engines:
    """The graphs of one model, compiled for one GPU generation.

    Attributes:
        model: the model's name.
        dtype: its dtype.
        arch: the GPU generation.
        graphs: how many graphs there are.
        nodes: how many nodes they have when they are compiled: one each.
        operators: how many operators each one had before.
        bytes: the size of each engine, with its weights.
        weights: the size of the weights.
        seconds: what each took, with its export.
        said: why the provider refused, if it did.
    """

    model: str
    dtype: str
    arch: str
    graphs: int
    nodes: int
    operators: tuple[int, ...]
    bytes: tuple[int, ...]
    weights: int
    seconds: tuple[float, ...]
    said: str = ""


def build(name: str, dtype: torch.dtype, archs: list[str], folder: Path) -> Iterator[Engines]:
    """The engines of a model of the tests, for each GPU generation."""
    which, plan = planned(name)
    model, example = half(which, dtype)
    weights = sum(tensor.nbytes for tensor in model.state_dict().values())
    kind = str(dtype).removeprefix("torch.")
    for arch in archs:
        try:
            written = bundle(model, plan, example, folder / arch, target="tensorrt-rtx", arch=arch)
        except ExportError as error:
            yield Engines(MODELS[name], kind, arch, 0, 0, (), (), weights, (), str(error))
            continue
        graphs = written.manifest.graphs
        sizes = tuple(written.manifest.files[Path(graph.file).stem + ".engine"].bytes for graph in graphs)
        nodes = sum(
            len(onnx.load(written.folder / graph.file, load_external_data=False).graph.node) for graph in graphs
        )
        operators = tuple(graph.operators for graph in graphs)
        yield Engines(MODELS[name], kind, arch, len(graphs), nodes, operators, sizes, weights, written.seconds)


def table(engines: list[Engines]) -> str:
    """The results as Markdown: a row per model and dtype, engines of graphs per GPU generation."""
    archs = list(dict.fromkeys(each.arch for each in engines))
    lines = [f"| model | dtype | graphs | {' | '.join(archs)} |", "|---|---|---:|" + "---:|" * len(archs)]
    for key in dict.fromkeys((each.model, each.dtype) for each in engines):
        mine = [each for each in engines if (each.model, each.dtype) == key]
        cells = [f"{each.nodes} nodes, {sum(each.bytes) / 2**20:.1f} MiB" if each.nodes else "refused" for each in mine]
        lines.append(f"| {key[0]} | {key[1]} | {max(each.graphs for each in mine)} | {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def main(arguments: list[str] | None = None) -> int:
    """Export, report; returns 1 if a graph did not become one engine."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--archs", nargs="+", default=["sm89", "sm120"])
    parser.add_argument("--models", nargs="+", default=list(MODELS), choices=list(MODELS))
    parser.add_argument(
        "--without-driver", action="store_true", help="on a machine without a GPU: stand in for its driver"
    )
    parser.add_argument("--results", type=results_folder, help="also write engines.md and engines.json here")
    args = parser.parse_args(arguments)
    jobs = [(name, dtype) for name in args.models for dtype in DTYPES]
    engines: list[Engines] = []
    with tempfile.TemporaryDirectory() as folder, pytest.MonkeyPatch.context() as patch:
        if args.without_driver:
            no_driver.pretend(patch)
        for name, dtype in track(jobs, "building", console=Console(stderr=True)):
            engines += build(name, dtype, args.archs, Path(folder, f"{name}-{dtype}"))
    Console().print(table(engines))
    for each in engines:
        if each.said:
            Console(stderr=True).print(f"{each.model} {each.dtype} {each.arch}: {each.said}")
    if args.results:
        (args.results / "engines.md").write_text(table(engines))
        content = {
            **provenance(),
            "engines": [asdict(each) for each in engines],
        }
        (args.results / "engines.json").write_text(json.dumps(content, indent=1) + "\n")
    return 0 if all(each.nodes == each.graphs > 0 for each in engines) else 1


if __name__ == "__main__":
    sys.exit(main())
