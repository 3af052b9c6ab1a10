"""Running a bundle: `tcc.load`."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Protocol

import torch

from tcc.errors import BundleError, CallError, ExportError
from tcc.export.aoti_engine import open_aoti
from tcc.export.check_steps import check_steps, read_plan
from tcc.export.manifest import ENGINES, TENSORS, Input, Manifest, read
from tcc.export.onnx_engine import has_cuda, open_onnx
from tcc.export.slots import Slots
from tcc.export.tensorrt_engine import open_tensorrt
from tcc.export.tensorrt_rtx import open_rtx
from tcc.export.weights import load_tensors
from tcc.plan import CachePlan
from tcc.program.memory import in_units
from tcc.runtime.watch import Advice, Watch

__all__ = ["Engine", "Runner", "load"]

#: Whole numbers of inputs on a CPU are held against their range; larger inputs would cost more than they are worth.
MAX_CHECKED = 2**16


class Engine(Protocol):
    """A graph that can run; called with its inputs by name and the slots, which it updates; returns the outputs."""

    def __call__(self, feeds: Mapping[str, torch.Tensor], slots: Slots) -> list[torch.Tensor]:
        """Run the graph."""


_OPEN: dict[str, Callable[..., Any]] = {
    "onnx": open_onnx,
    "aoti": open_aoti,
    "tensorrt": open_tensorrt,
    "tensorrt-onnx": open_tensorrt,
    "tensorrt-rtx": open_rtx,
}


def load(
    path: str | os.PathLike[str],
    *,
    device: str | torch.device | None = None,
    max_slot_bytes: int = 2**36,
    max_value_bytes: int = 2**36,
    prepack: bool = True,
) -> Runner:
    """Load a bundle, to run it without the model's Python code.

    Args:
        path: the bundle's folder.
        device: where to run. If not given: a CUDA device where the bundle is of ONNX graphs and both torch and ONNX
            Runtime can use one, else the device that it was exported for.
        max_slot_bytes: refuse a bundle whose slots are larger than this.
        max_value_bytes: refuse a bundle of ONNX that says of itself that it computes a single value larger than this; a
            graph that computes a larger one than it says is refused anyway.
        prepack: let ONNX Runtime, on a CPU, keep a copy of the weights for each graph that is laid out for its matrix
            products. Without, the weights are in memory once, and steps take 3 (large batches) to 12 % longer.

    Returns:
        A runner: call it like the model, once per denoising step.

    Raises:
        BundleError: the bundle is incomplete, altered or malformed, or its engines are for another GPU or version;
            nothing of it has been run then.
        ExportError: the library that runs it is missing, or has no such device.
    """
    try:
        folder = Path(path)
    except TypeError as error:
        raise BundleError(f"{path!r:.80} is no path: name the folder that tcc export wrote") from error
    manifest = read(folder)
    if manifest.target not in _OPEN:
        raise BundleError(f"{folder}: made for the target {manifest.target!r:.40}; known: {', '.join(_OPEN)}")
    _refuse_larger(folder, "slots", "max_slot_bytes", manifest.slot_bytes, max_slot_bytes)
    largest = max(graph.largest for graph in manifest.graphs)
    _refuse_larger(folder, "a value", "max_value_bytes", largest, max_value_bytes)
    where = _device(device or _default_device(manifest))
    if manifest.target in ENGINES and (where.type != "cuda" or not torch.cuda.is_available()):
        raise ExportError(
            f"{folder}: its {manifest.target} engines run on an NVIDIA GPU ({manifest.arch}); "
            + ("torch sees none here" if where.type == "cuda" else f"it was to be loaded on {where}")
        )
    if where.type == "cuda" and not torch.cuda.is_available():
        raise ExportError(f"device {where}: torch sees no CUDA device here: load with device='cpu'")
    if where.type == "cuda" and (where.index or 0) >= torch.cuda.device_count():
        raise ExportError(f"device {where}: torch sees {torch.cuda.device_count()} CUDA devices here: name one of them")
    if manifest.target == "aoti" and where.type != manifest.device:
        raise ExportError(
            f"{folder}: compiled for {manifest.device}, and it was to be loaded on {where}: export it there"
        )
    tensors, plan = load_tensors(folder / TENSORS), read_plan(folder)
    for spec in manifest.tensors:
        found = tensors.get(spec.name)
        if found is None or (tuple(found.shape), found.dtype) != (spec.shape, spec.torch_dtype):
            raise BundleError(f"{folder / TENSORS}: {spec.name!r:.80} is not as the manifest says")
    check_steps(folder, manifest, plan, tensors)
    if where.type == "cuda" and where.index is None:
        where = torch.device("cuda", torch.cuda.current_device())  # what callers' tensors say
    settings = {"prepack": prepack} if manifest.target == "onnx" else {}
    engines = _OPEN[manifest.target](folder, manifest, where, **settings)
    return Runner(plan, manifest, engines, {name: tensor.to(where) for name, tensor in tensors.items()}, where)


def _refuse_larger(folder: Path, what: str, option: str, found: int, allowed: int) -> None:
    if found > allowed:
        raise BundleError(
            f"{folder}: {what} of {in_units(found)}; at most {in_units(allowed)}: pass {option} if that is meant"
        )


def _default_device(manifest: Manifest) -> str:
    """Graphs of ONNX run on any device; all others on what they were made for."""
    return "cuda" if manifest.target == "onnx" and torch.cuda.is_available() and has_cuda() else manifest.device


def _device(name: str | torch.device) -> torch.device:
    try:
        device = torch.device(name)
    except (RuntimeError, TypeError):
        device = torch.device("meta")
    if device.type not in ("cpu", "cuda") or (device.type == "cpu" and device.index):
        raise BundleError(f"unknown device {str(name)!r:.40}: use cpu or cuda")
    return torch.device("cpu") if device.type == "cpu" else device  # tensors say "cpu" without a number


def _check(spec: Input, tensor: Any, device: torch.device) -> None:
    """Raise where a call does not give what the manifest says."""
    found = (tensor.dtype, tuple(tensor.shape), tensor.device) if isinstance(tensor, torch.Tensor) else type(tensor)
    if found != (spec.torch_dtype, spec.shape, device) or tensor.layout != torch.strided:
        raise CallError(
            f"input '{spec.name}' is {_described(tensor)}, expected {spec.dtype} {list(spec.shape)} on {device}: a "
            "bundle runs what it was exported with"
        )
    if spec.values and tensor.device.type == "cpu" and 0 < tensor.numel() <= MAX_CHECKED:
        low, high = (int(value) for value in tensor.aminmax())
        if low < 0 or high >= spec.values:
            raise CallError(
                f"input '{spec.name}' holds {low if low < 0 else high}, and the model looks it up in a table of "
                f"{spec.values}: give 0 to {spec.values - 1}"
            )


def _described(tensor: Any) -> str:
    if not isinstance(tensor, torch.Tensor):
        return "None" if tensor is None else f"of type {type(tensor).__name__}"
    kind = "" if tensor.layout == torch.strided else f"{str(tensor.layout).removeprefix('torch.')} "
    return f"{kind}{str(tensor.dtype).removeprefix('torch.')} {list(tensor.shape)} on {tensor.device}"


class Runner:
    """One run at a time through a bundle: its own slots and its own step counter.

    Call it like the model, once per step, with positional or named tensors. After the last step it starts again by
    itself. It returns the model's output tensor, or a tuple where the model has several.

    Attributes:
        plan: the plan that it was made from.
        manifest: what the bundle holds.
        device: where it runs.
        step: the next step.
        copied_bytes: what has been copied since the start, because a caller's tensor was not contiguous.
    """

    def __init__(
        self,
        plan: CachePlan,
        manifest: Manifest,
        engines: list[Engine],
        tensors: dict[str, torch.Tensor],
        device: torch.device,
    ) -> None:
        self.plan, self.manifest, self.step, self.copied_bytes = plan, manifest, 0, 0
        self._shared = (plan, manifest, engines, tensors, device)
        self._slots = Slots(manifest.slots, device)
        self.device = device
        self._steps = [
            (engines[step.graph], {name: tensors[key] for name, key in step.tensors.items()}) for step in manifest.steps
        ]
        self._watch = _watch(manifest)

    def __repr__(self) -> str:
        """What it runs, and where it is."""
        return f"<Runner: {self.manifest.target} on {self.device}, step {self.step} of {self.num_steps} is next>"

    def __reduce_ex__(self, protocol: Any) -> Any:
        """What pickle and copy ask for.

        Raises:
            CallError: always.
        """
        raise CallError("a runner cannot be pickled or copied: read the bundle again, or take runner.new_session()")

    @property
    def num_steps(self) -> int:
        """The steps of one run."""
        return len(self._steps)

    @property
    def slot_bytes(self) -> int:
        """The bytes of the buffers that are kept from step to step."""
        return self._slots.bytes

    def new_session(self) -> Runner:
        """Own slots and own step counter, for another image or guidance branch at the same time; the rest is shared."""
        return Runner(*self._shared)

    def reset(self) -> None:
        """Start a new run: the next call is step 0."""
        self.step = 0
        if self._watch is not None:
            self._watch.forget()

    def run_step(self, step: int, *args: torch.Tensor, **kwargs: torch.Tensor) -> Any:
        """Run step `step`, which must be the next one (or 0, which starts a new run).

        Raises:
            CallError: it is not the next one, the plan has no such step, or the call is not as the manifest says.
        """
        if isinstance(step, bool) or not hasattr(step, "__index__"):
            raise CallError(f"step {step!r:.40} is no whole number: steps are 0 to {self.num_steps - 1}")
        if step not in (0, self.step) or step >= self.num_steps:
            raise CallError(
                f"step {step} was called but the next step is {self.step} of {self.num_steps}: a plan's steps run in "
                "order. Call reset() to start a new run, and new_session() for a second run at the same time"
            )
        feeds = self._feeds(self._given(args, kwargs))  # before the step changes: a refused call changes nothing
        self.step = int(step)
        if self._watch is not None:
            self._watch.forget()  # the caller says where it is
        return self._run(feeds)

    def __call__(self, *args: torch.Tensor, **kwargs: torch.Tensor) -> Any:
        """Run the next step.

        Raises:
            CallError: a tensor is missing, unknown, or of another shape, dtype or device than the manifest says; or the
                noise level tells that the caller is at another step, or that two guidance branches share this session
                (see `tcc.runtime.watch`). Nothing was run then.
        """
        tensors = self._given(args, kwargs)
        if self._watch is not None:
            self._watch.check(tensors, self.step)
        return self._run(self._feeds(tensors))

    def _run(self, feeds: dict[str, torch.Tensor]) -> Any:
        engine, tensors = self._steps[self.step]
        try:
            outputs = engine(feeds | tensors, self._slots)
        except Exception as error:  # runtimes raise what they like; slots may be half written
            step = self.step
            self.reset()
            raise CallError(
                f"step {step}, graph {self.manifest.steps[step].graph}: the {self.manifest.target} runtime failed "
                f"({str(error).strip()[:500]}): check the values of the inputs, and the free memory; the "
                "next call is step 0"
            ) from error
        self.step = (self.step + 1) % len(self._steps)
        return outputs[0] if len(outputs) == 1 else tuple(outputs)

    def _given(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> list[torch.Tensor]:
        """The tensors of a call, in the manifest's order."""
        names = [spec.name for spec in self.manifest.inputs]
        given = dict(zip(names, args, strict=False)) | kwargs
        if len(args) > len(names) or given.keys() != set(names) or len(given) != len(args) + len(kwargs):
            raise CallError(
                f"called with {len(args)} tensors and {sorted(kwargs)}; the bundle takes {', '.join(names)}"
            )
        for spec in self.manifest.inputs:
            _check(spec, given[spec.name], self.device)
        return [given[name] for name in names]

    def _feeds(self, tensors: list[torch.Tensor]) -> dict[str, torch.Tensor]:
        feeds = {}
        for spec, tensor in zip(self.manifest.inputs, tensors, strict=True):
            feeds[spec.name] = tensor.detach().resolve_neg().contiguous()
            self.copied_bytes += 0 if feeds[spec.name].data_ptr() == tensor.data_ptr() else tensor.nbytes
        return feeds


def _watch(manifest: Manifest) -> Watch | None:
    """What tells that a caller is at another step; None where all steps are alike and keep nothing."""
    if len({step.graph for step in manifest.steps}) == 1 and not manifest.slots:
        return None
    roles, calls = [spec.role for spec in manifest.inputs], manifest.calls_per_step
    level = roles.index("timestep") if "timestep" in roles else None
    samples = tuple(place for place, role in enumerate(roles) if role == "sample")
    branches = (
        "call each branch in a session of its own, `other = runner.new_session()`, or both in one call as a doubled "
        "batch"
    )
    if calls > 1:
        branches += f". The model was compiled with calls_per_step={calls}; a runner takes one call per step"
    advice = Advice(branches, "`runner.new_session()`", "runner.run_step")
    return Watch(level, samples, 0, len(manifest.steps), advice)
