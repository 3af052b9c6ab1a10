"""`tcc export`: a model and a plan as a bundle that runs without the model's Python code."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Literal

import torch
import typer
from rich.table import Table
from torch.utils import _pytree as pytree  # no public pytree module in torch 2.11-2.13

from tcc.cli import options, screen
from tcc.cli.bundles import made_for
from tcc.cli.subjects import Subject, load_subject
from tcc.driver import compile
from tcc.errors import ExportError
from tcc.export import Written, bundle, load
from tcc.export.inputs import random_inputs
from tcc.export.verify import StepError, verify
from tcc.plan import CachePlan

__all__ = ["check", "export"]

Target = Annotated[
    Literal["onnx", "aoti", "tensorrt", "tensorrt-onnx", "tensorrt-rtx"],
    typer.Option(
        help="[bold]onnx[/]: for ONNX Runtime, any device. [bold]aoti[/]: one AOTInductor package. Engines for "
        "one GPU: [bold]tensorrt[/] (by Torch-TensorRT), [bold]tensorrt-onnx[/] (by TensorRT's parser), "
        "[bold]tensorrt-rtx[/] (TensorRT for RTX, run by ONNX Runtime)."
    ),
]
Arch = Annotated[
    str | None,
    typer.Option(
        metavar="ARCH", help="The GPU that engines are for, such as sm89; else the one at hand.", show_default=False
    ),
]
Profiles = Annotated[
    bool,
    typer.Option(
        "--profiles", help="tensorrt-onnx: one engine for graphs that differ only in how many tokens they keep."
    ),
]
Layout = Annotated[
    Literal["plain", "triton"],
    typer.Option(help="[bold]triton[/]: the folder of a model in a Triton model repository, one graph for all steps."),
]
PlanFile = Annotated[Path, typer.Option("--plan", metavar="FILE", help="A plan from tcc plan.", show_default=False)]
Out = Annotated[Path, typer.Option(metavar="FOLDER", help="The folder to make.", show_default=False)]
Verify = Annotated[
    bool, typer.Option("--verify", help="Then run every step beside the compiled model, and print the errors.")
]
#: The largest relative error of a verified bundle, by the dtype of its outputs: rounding of re-ordered sums.
_ALLOWED = {torch.float64: 1e-10, torch.float32: 1e-4, torch.float16: 2e-2, torch.bfloat16: 1e-1}


def export(
    plan: PlanFile,
    out: Out,
    target: Target = "onnx",
    arch: Arch = None,
    profiles: Profiles = False,
    layout: Layout = "plain",
    verify: Verify = False,
    backend: options.Backend = "inductor",
    json: options.Json = None,
    model: options.ModelName = "reference",
    input_size: options.InputSize = 32,
) -> None:
    """Write a bundle: the weights once, a graph per kind of step, and the table of steps.

    A bundle runs in a process that never imports the model's code: with
    [bold]tcc.load[/] from Python, or [bold]tcc run[/]. It is for the batch of the plan.

    [bold]Examples[/]

      tcc plan -p forecast --batch 4 --out plan.safetensors
      tcc export --plan plan.safetensors --out bundle --verify
      tcc export --plan plan.safetensors --out engines --target tensorrt-rtx --arch sm89
      tcc inspect bundle
      tcc run bundle --classes 7,9 --null-class 10
    """
    loaded = CachePlan.load(str(plan))
    if loaded.model is None:
        raise ExportError(f"{plan}: the plan belongs to no model: make it with tcc plan, or with info.count(plan)")
    subject = load_subject(model, batch=loaded.model.inputs[0][1][0], input_size=input_size)
    with screen.status("exporting") as status:
        written = bundle(
            subject.model,
            loaded,
            (subject.args, subject.kwargs),
            out,
            target=target,
            arch=arch,
            profiles=profiles,
            layout=layout,
            progress=status.update,
        )
    screen.out().print(_table(written))
    errors = check(written.folder, subject, loaded, backend) if verify else []
    screen.write_json(json, {"bundle": facts(written), "errors": [vars(error) for error in errors]})


def check(folder: Path, subject: Subject, plan: CachePlan, backend: str) -> list[StepError]:
    """Verify a bundle and print the error of every step.

    Raises:
        ExportError: an error is larger than rounding explains, or the bundle needs a GPU that is not there.
    """
    runner = load(folder)
    with screen.status("compiling, to compare with") as status:
        compiled = compile(
            subject.model, plan, example_inputs=(subject.args, subject.kwargs), backend=backend, progress=status.update
        )
    leaves, spec = pytree.tree_flatten((subject.args, subject.kwargs))
    places = [i for i, leaf in enumerate(leaves) if isinstance(leaf, torch.Tensor)]
    given = [leaves[i] for i in places]

    def call(*tensors: torch.Tensor) -> Any:
        filled = dict(zip(places, tensors, strict=True))
        args, kwargs = pytree.tree_unflatten([filled.get(i, leaf) for i, leaf in enumerate(leaves)], spec)
        return compiled(*args, **kwargs)

    allowed = _ALLOWED[runner.manifest.outputs[0].torch_dtype]
    errors = []
    table = Table(title=f"{folder}: difference from the compiled model ({backend})")
    for column in ("step", "graph", "largest", "relative"):
        table.add_column(column, justify="right")
    with screen.bar("verifying") as bar:
        for error in verify(runner, call, random_inputs(runner.manifest.inputs, given, runner.num_steps)):
            errors.append(error)
            bar(error.step + 1, runner.num_steps)
            table.add_row(str(error.step), str(error.graph), f"{error.largest:.2e}", f"{error.relative:.2e}")
    screen.out().print(table)
    worst = max(errors, key=lambda error: error.relative)
    if not worst.relative <= allowed:
        raise ExportError(
            f"{folder}: step {worst.step} differs by {worst.relative:.2e} of the largest value, and {allowed:g} is "
            "allowed: do not ship this bundle; please report the model and the plan"
        )
    return errors


def facts(written: Written) -> dict[str, Any]:
    """What was written, for programs."""
    manifest = written.manifest
    return {
        "folder": str(written.folder),
        "target": manifest.target,
        "arch": manifest.arch,
        "bytes": manifest.bytes,
        "files": {name: file.bytes for name, file in manifest.files.items()},
        "graphs": [
            {"file": graph.file, "operators": graph.operators, "macs": graph.macs, "seconds": seconds}
            for graph, seconds in zip(manifest.graphs, written.seconds, strict=True)
        ],
    }


def _table(written: Written) -> Table:
    manifest = written.manifest
    table = Table(title=f"{written.folder}: {made_for(manifest)}, {len(manifest.steps)} steps")
    for column in ("file", "bytes", "seconds", "operators"):
        table.add_column(column, justify="left" if column == "file" else "right")
    for name, file in manifest.files.items():
        made = [(g, s) for g, s in zip(manifest.graphs, written.seconds, strict=True) if g.file == name]
        seconds = f"{sum(s for _, s in made):.1f}" if made else ""
        table.add_row(name, f"{file.bytes:,}", seconds, f"{sum(g.operators for g, _ in made)}" if made else "")
    table.add_row("[bold]all[/]", f"{manifest.bytes:,}", f"{sum(written.seconds):.1f}", "")
    return table
