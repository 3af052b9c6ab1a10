"""Writing a bundle: a compiled program as a folder that runs without the model's Python code."""

from __future__ import annotations

import hashlib
import os
import platform
import shutil
import tempfile
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import nn
from torch.export import ExportedProgram

from tcc.driver import CompiledModel
from tcc.driver.prepare import Policy
from tcc.errors import BundleError, ExportError
from tcc.export import manifest as manifests
from tcc.export.graphs import model_outputs
from tcc.export.inputs import describe
from tcc.export.machine import Machine, versions
from tcc.export.manifest import PLAN, TENSORS, WEIGHTS, Manifest, Step, TensorSpec, dtype_name, file_entry
from tcc.export.stamp import stamp
from tcc.export.targets import TARGETS, Writer, write_profiles
from tcc.export.triton import VERSION, lay_out
from tcc.export.weights import collect
from tcc.info import inspect
from tcc.passes.base import run_passes
from tcc.passes.graph import copy_of, value
from tcc.passes.split_complex import SplitComplex, has_complex
from tcc.plan import CachePlan
from tcc.plan.checks import check_model
from tcc.program import Program, Variant

__all__ = ["Written", "bundle"]

_MEANINGS = {
    "kept": "token set: the positions of the kept tokens",
    "place": "token set: where each token stands among the kept ones, -1 for dropped ones",
    "coefficients": "forecast: the weights of the last values, newest first",
    "table": "scores: a table that they are computed from",
}


@dataclass(frozen=True)
class Written:
    """What exporting made.

    Attributes:
        folder: the bundle.
        manifest: its manifest.
        seconds: what each graph took.
    """

    folder: Path
    manifest: Manifest
    seconds: tuple[float, ...]


def bundle(
    model: nn.Module | ExportedProgram | CompiledModel,
    plan: CachePlan | Policy | None = None,
    example_inputs: tuple[tuple[Any, ...], dict[str, Any]] | None = None,
    out: str | os.PathLike[str] | None = None,
    *,
    target: str = "onnx",
    arch: str | None = None,
    profiles: bool = False,
    layout: str = "plain",
    progress: Callable[[str], None] | None = None,
) -> Written:
    """Export `model` under `plan` as a bundle: a manifest, the plan, the weights once, and a graph per variant.

    Args:
        model: a diffusion transformer in eval mode, an `ExportedProgram` of one, or what `tcc.compile` returned and was
            called once (then the plan and the inputs are its own, and left out here). If it was compiled with
            `calls_per_step=2`, the bundle notes it: each guidance branch then needs a `new_session()` of the runner.
        plan: a plan, or a policy.
        example_inputs: `(args, kwargs)` of a call; the bundle runs these shapes, dtypes and this device.
        out: the folder to make; it must not exist, or be empty.
        target: `onnx`, `aoti`, or an engine per graph: `tensorrt` (made by Torch-TensorRT), `tensorrt-onnx` (by
            TensorRT's own parser) or `tensorrt-rtx` (TensorRT for RTX, run by ONNX Runtime).
        arch: the GPU architecture that engines are for, such as `sm89`; the one of the GPU at hand if not given.
        profiles: for `tensorrt-onnx`: one engine, with an optimisation profile for each count, for all graphs that
            differ only in how many tokens they keep.
        layout: `plain`, or for ONNX `triton`: the folder becomes a model of a Triton model repository, under its own
            name; the bundle is its folder `1`.
        progress: called with a line of text before each graph.

    Raises:
        ExportError: the target or the layout is not known, a library or a GPU is missing (nothing has been done then),
            an operator has no form in the target, or there is something at `out`.
        CaptureError, AnalysisError, PlanError: see `tcc.compile`.
    """
    if out is None:
        raise ExportError("out is missing: name the folder to make, tcc.export.bundle(model, out='bundle')")
    if target not in TARGETS:
        raise ExportError(f"target={target!r}: use one of {', '.join(TARGETS)}")
    if layout not in _LAYOUTS or (layout != "plain" and target != "onnx"):
        raise ExportError(f"layout={layout!r} of target={target!r}: use plain, or triton for the target onnx")
    if profiles and target != "tensorrt-onnx":
        raise ExportError(
            f"profiles=True with target={target!r}: only tensorrt-onnx makes one engine of several graphs"
        )
    folder = Path(out).absolute()
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise ExportError(f"{folder} exists: name a new folder, or remove it first")
    machine, writer = TARGETS[target].machine(arch), write_profiles if profiles else TARGETS[target].write
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        draft = Path(tempfile.mkdtemp(prefix=f".{folder.name}.", dir=folder.parent))  # a bundle is whole, or not there
    except OSError as error:
        raise ExportError(f"{folder}: cannot be written ({error.strerror}): name another folder") from error
    try:
        program, chosen = _program(model, plan, example_inputs, progress)
        _check_slots(program, chosen)  # refused before anything is made
        calls = model.calls_per_step if isinstance(model, CompiledModel) else 1
        made, seconds = _write(program, chosen, draft, target, machine, writer, calls, progress or (lambda _: None))
        if layout == "triton":
            made, seconds = lay_out(draft, made), (sum(seconds),)
        if folder.exists():
            folder.rmdir()
        draft.chmod(0o755)
        draft.rename(folder)
    finally:
        shutil.rmtree(draft, ignore_errors=True)
    return Written(folder / _LAYOUTS[layout], made, seconds)


def _program(
    model: nn.Module | ExportedProgram | CompiledModel,
    plan: CachePlan | Policy | None,
    example_inputs: tuple[tuple[Any, ...], dict[str, Any]] | None,
    progress: Callable[[str], None] | None,
) -> tuple[Program, CachePlan]:
    if isinstance(model, CompiledModel):
        if plan is not None or example_inputs is not None:
            raise ExportError("a compiled model has its own plan and inputs: leave both out, bundle(model, out=...)")
        if model.program is None:
            raise ExportError("nothing is compiled yet: call the model once, or pass example_inputs to tcc.compile")
        return model.whole_program(), model.plan
    if plan is None or example_inputs is None:
        raise ExportError("exporting a model needs a plan and example_inputs, ((x, t, y), {})")
    if [type(part) for part in example_inputs] != [tuple, dict]:
        raise ExportError("example_inputs is a pair (args, kwargs), a tuple and a dict: write ((x, t, y), {})")
    if not isinstance(plan, CachePlan) and not callable(plan):
        raise ExportError(f"the plan is {plan!r:.60}: use a policy, or tcc.CachePlan.load of a file")
    info = inspect(model, *example_inputs[0], **example_inputs[1])
    chosen = plan if isinstance(plan, CachePlan) else plan(info)
    check_model(chosen, info.key)
    return info.program(chosen, progress=progress), chosen


def _check_slots(program: Program, plan: CachePlan) -> None:
    try:
        for slot in program.slots:
            dtype_name(slot.dtype)
    except BundleError as error:
        raise ExportError(
            f"slot_dtype={plan.slot_dtype}: {error}: give the plan another one, such as torch.bfloat16"
        ) from error


def _in_reals(variant: Variant) -> Variant:
    """The variant without the complex numbers that are its own: ONNX has none, and servers take none."""
    if not has_complex(variant.gm.graph):
        return variant
    copy = copy_of(variant.gm)
    run_passes(copy, [SplitComplex()], label="reals", verified=True)
    return replace(variant, gm=copy)


def _write(
    program: Program,
    plan: CachePlan,
    folder: Path,
    target: str,
    machine: Machine,
    writer: Writer,
    calls_per_step: int,
    progress: Callable[[str], None],
) -> tuple[Manifest, tuple[float, ...]]:
    outputs = _outputs(program)
    program = replace(program, variants=tuple(map(_in_reals, program.variants)))
    plan.save(str(folder / PLAN))
    weights = collect(program.variants)
    weights.save(folder / WEIGHTS)
    tensors, steps = _tensors(program)
    save_file(tensors or {"none": torch.zeros(0)}, folder / TENSORS)
    graphs, seconds = writer(program, weights, folder, machine, progress)
    for path in folder.iterdir():
        path.chmod(0o644)
    files = {name: file_entry(folder / name) for name in (PLAN, WEIGHTS, TENSORS)}
    captured, content = program.captured, files[WEIGHTS].sha256
    if machine.arch:  # engines hold their weights
        (folder / WEIGHTS).unlink()
        del files[WEIGHTS]
    made = Manifest(
        target=target,
        device="cuda" if machine.arch else captured.inputs[0].device.type,
        arch=machine.arch,
        inputs=describe(captured),
        outputs=outputs,
        slots=tuple(
            TensorSpec(f"slot:{s.name}", s.shape, dtype_name(s.dtype), f"kept from step to step: {s.name}")
            for s in program.slots
        ),
        tensors=tuple(
            TensorSpec(name, tuple(t.shape), dtype_name(t.dtype), _MEANINGS[name.rpartition(".")[0]])
            for name, t in tensors.items()
        ),
        graphs=graphs,
        steps=steps,
        calls_per_step=calls_per_step,
        files=files,
        hashes={"plan": files[PLAN].sha256, "graph": captured.hash, "weights": content},
        tools={"python": platform.python_version(), **versions("tcc"), **machine.tools},
    )
    made = stamp(folder, made)
    manifests.write(made, folder)
    manifests.read(folder)  # what cannot be read must not leave this function
    return made, seconds


def _tensors(program: Program) -> tuple[dict[str, torch.Tensor], tuple[Step, ...]]:
    """The tensors that steps give their graphs, each once, and the step table."""
    names: dict[str, str] = {}
    tensors: dict[str, torch.Tensor] = {}
    steps = []
    for binding in program.bindings:
        used = {}
        for name, tensor in binding.tensors.items():
            kind, content = name.rpartition("_")[0], tensor.detach().cpu().contiguous()
            key = kind + hashlib.sha256(content.numpy().tobytes() + str(tuple(content.shape)).encode()).hexdigest()
            if key not in names:
                names[key] = f"{kind}.{len(names)}"
                tensors[names[key]] = content.clone()
            used[name] = names[key]
        steps.append(Step(binding.variant, used))
    return tensors, tuple(steps)


def _outputs(program: Program) -> tuple[TensorSpec, ...]:
    return tuple(
        TensorSpec(name, tuple(value(node).shape), dtype_name(value(node).dtype), "output of the model's forward")
        for name, node in model_outputs(program.variants[0]).items()
    )


#: Layouts, and where in the folder the bundle is.
_LAYOUTS = {"plain": "", "triton": VERSION}
