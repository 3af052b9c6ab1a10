"""Does every exported graph become one TensorRT engine? NVIDIA's parser and builder answer, on a machine without a GPU.

    python benchmarks/engines.py --compiler rtx_compile.py --python RTX_VENV/bin/python --results benchmarks/results

Exports the models of the tests (DiT, U-ViT, PixArt, two to five blocks) under the plan of the tests (pruned tokens in
each attention mode, reuse, a forecast, a drop, a hold) in half precision, and has every ONNX graph compiled for every
GPU generation. The compiler is a script that is called with a model file and a target such as `sm89`, and exits with 0
if the result is a single `EPContext` node: the whole graph in one engine. It runs in an environment of its own, with
`onnxruntime` and `onnxruntime-ep-nv-tensorrt-rtx-cu13`. An engine that was built has not been run.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import track

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))  # the tests' models and plan

from tcc import timing  # noqa: E402
from tcc.export import Manifest, bundle  # noqa: E402
from tests.export.bundles import mixed  # noqa: E402
from tests.tiny_models import BUILDERS  # noqa: E402

MODELS = {"dit": "DiT", "uvit": "U-ViT", "hf_pixart": "PixArt (diffusers)"}
DTYPES = (torch.float16, torch.bfloat16)


@dataclass(frozen=True)
class Engine:
    """One graph, compiled for one target.

    Attributes:
        model: the model's name.
        dtype: its dtype.
        graph: the graph's file.
        operators: how many operators it has.
        target: the GPU generation.
        single: whether the whole graph is one engine.
        said: what the compiler said.
    """

    model: str
    dtype: str
    graph: str
    operators: int
    target: str
    single: bool
    said: str


def export(name: str, dtype: torch.dtype, folder: Path) -> Manifest:
    """The bundle of a model of the tests in `dtype`."""

    def cast(value: Any) -> Any:
        return value.to(dtype) if isinstance(value, torch.Tensor) and value.is_floating_point() else value

    which = BUILDERS[name]()
    args, kwargs = tuple(map(cast, which.args)), {key: cast(value) for key, value in which.kwargs.items()}
    return bundle(which.model.to(dtype), mixed, (args, kwargs), folder).manifest


def build(python: str, compiler: Path, path: Path, target: str) -> tuple[bool, str]:
    """Compile one graph; whether it became one engine, and the compiler's last line."""
    done = subprocess.run([python, str(compiler), str(path), target], capture_output=True, text=True, check=False)
    lines = (done.stdout + done.stderr).strip().splitlines()
    return done.returncode == 0, lines[-1] if lines else f"exit code {done.returncode}"


def table(engines: list[Engine]) -> str:
    """The results as Markdown: a row per model and dtype, engines over graphs per target."""
    targets = list(dict.fromkeys(engine.target for engine in engines))
    lines = [f"| model | dtype | graphs | {' | '.join(targets)} |", "|---|---|---:|" + "---:|" * len(targets)]
    for key in dict.fromkeys((engine.model, engine.dtype) for engine in engines):
        mine = [engine for engine in engines if (engine.model, engine.dtype) == key]
        graphs = len({engine.graph for engine in mine})
        cells = []
        for target in targets:
            single = sum(engine.single for engine in mine if engine.target == target)
            cells.append(f"{single} of {graphs} one engine")
        lines.append(f"| {key[0]} | {key[1]} | {graphs} | {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def main(arguments: list[str] | None = None) -> int:
    """Export, compile, report; returns 1 if a graph did not become one engine."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--compiler", type=Path, required=True, help="the script that compiles one graph")
    parser.add_argument("--python", default=sys.executable, help="the interpreter that runs it")
    parser.add_argument("--targets", nargs="+", default=["sm89", "sm120"])
    parser.add_argument("--models", nargs="+", default=list(MODELS), choices=list(MODELS))
    parser.add_argument("--results", type=Path, help="also write engines.md and engines.json here")
    args = parser.parse_args(arguments)
    jobs = [(name, dtype) for name in args.models for dtype in DTYPES]
    engines: list[Engine] = []
    with tempfile.TemporaryDirectory() as folder:
        for name, dtype in track(jobs, "building", console=Console(stderr=True)):
            kind = str(dtype).removeprefix("torch.")
            path = Path(folder, f"{name}-{kind}")
            for graph in export(name, dtype, path).graphs:
                for target in args.targets:
                    single, said = build(args.python, args.compiler, path / graph.file, target)
                    engines.append(Engine(MODELS[name], kind, graph.file, graph.operators, target, single, said))
    Console().print(table(engines))
    for engine in engines:
        if not engine.single:
            Console(stderr=True).print(f"{engine.model} {engine.dtype} {engine.graph} {engine.target}: {engine.said}")
    if args.results:
        (args.results / "engines.md").write_text(table(engines))
        commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=False)
        content = {
            "command": " ".join(["python benchmarks/engines.py", *(Path(a).name or a for a in sys.argv[1:])]),
            "commit": commit.stdout.strip(),
            "machine": timing.machine(),
            "engines": [asdict(engine) for engine in engines],
        }
        (args.results / "engines.json").write_text(json.dumps(content, indent=1) + "\n")
    return 0 if all(engine.single for engine in engines) else 1


if __name__ == "__main__":
    sys.exit(main())
