"""The manifest of a bundle: what is in the folder, what every input means, and which step runs which graph.

`manifest.json` is data from outside: every field is checked for its type and against the others before a file is
opened, and every file against its size and SHA-256 before it is used.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import math
import os
import re
import stat
import typing
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from tcc.errors import BundleError
from tcc.export.decode import Malformed, decode, parse

__all__ = [
    "COUNTER",
    "ENGINES",
    "MANIFEST",
    "PLAN",
    "TENSORS",
    "WEIGHTS",
    "FileEntry",
    "Graph",
    "Input",
    "Manifest",
    "Step",
    "TensorSpec",
]
__all__ += ["dtype_name", "file_entry", "next_of", "read", "write"]

FORMAT, VERSION = "tcc-bundle", 4
#: Targets whose graphs are engines: for one GPU architecture and one version of a library, with weights of their own.
ENGINES = ("tensorrt", "tensorrt-onnx", "tensorrt-rtx")
MANIFEST, PLAN, WEIGHTS, TENSORS = "manifest.json", "plan.safetensors", "weights.safetensors", "tensors.safetensors"
#: The slot of a graph that counts its steps itself.
COUNTER = "slot:step"
#: A manifest is a table, not data: 50 steps of 28 blocks take some 100 KiB.
MAX_MANIFEST_BYTES = 16 * 2**20
#: No dimension and no tensor is larger than this. Of ONNX and TensorRT, what a runner allocates is also held against
#: the inputs of the graphs.
MAX_DIM, MAX_DIMS, MAX_TENSOR_BYTES = 2**31 - 1, 16, 2**40
_FILE_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,199}")
_DTYPES = {
    str(dtype).removeprefix("torch."): dtype
    for dtype in (
        torch.float64, torch.float32, torch.float16, torch.bfloat16,
        torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8, torch.bool,
    )
}  # fmt: skip


@dataclass(frozen=True)
class TensorSpec:
    """A tensor that goes into or comes out of the graphs.

    Attributes:
        name: its name in the graphs.
        shape: its shape.
        dtype: its dtype, as torch names it.
        meaning: what it is, for people.
    """

    name: str
    shape: tuple[int, ...]
    dtype: str
    meaning: str = ""

    @property
    def torch_dtype(self) -> torch.dtype:
        """Its dtype."""
        return _DTYPES[self.dtype]

    @property
    def bytes(self) -> int:
        """Its size."""
        return math.prod(self.shape) * self.torch_dtype.itemsize


@dataclass(frozen=True)
class Input(TensorSpec):
    """What a call of the model takes.

    Attributes:
        role: its part in sampling: `sample`, `timestep`, `label`, ... (see `tcc.passes.inputs.InputFacts`).
        axes: the name of each dimension, "" where it is not known.
        values: whole numbers that are looked up lie in 0 to `values` - 1; 0 where nothing bounds them.
    """

    role: str = ""
    axes: tuple[str, ...] = ()
    values: int = 0

    def __str__(self) -> str:
        sizes = " x ".join(f"{size} {axis}".strip() for size, axis in zip(self.shape, self.axes, strict=True))
        bounds = f" in 0 to {self.values - 1}" if self.values else ""
        return f"{self.name}: {self.dtype}{bounds}, {sizes or 'one number'}; {self.meaning}"


@dataclass(frozen=True)
class FileEntry:
    """A file of the bundle: its size, and the SHA-256 of its content."""

    bytes: int
    sha256: str


@dataclass(frozen=True)
class Graph:
    """The graph of one variant.

    Attributes:
        file: the file that holds it.
        entry: its name in that file, where the file holds several; else "".
        inputs: the names of its inputs, in order: the model's, then slots, token sets, coefficients and tables.
        stores: the slots whose new values it returns after the model's outputs, or writes in place.
        weights: the names of the weights that it reads from `weights.safetensors`; none where it is an engine.
        macs: its MACs, for the captured batch.
        operators: how many operators it has.
        largest: of ONNX, the bytes of the largest value that it computes; else 0, since no loader could tell.
    """

    file: str
    entry: str
    inputs: tuple[str, ...]
    stores: tuple[str, ...]
    weights: tuple[str, ...]
    macs: int
    operators: int
    largest: int


@dataclass(frozen=True)
class Step:
    """What one step runs: the number of a graph, and by input name the tensor of `tensors.safetensors` that goes in."""

    graph: int
    tensors: dict[str, str]


@dataclass(frozen=True)
class Manifest:
    """A bundle's table of contents.

    Attributes:
        target: what the graphs are for: `onnx`, `aoti`, ...
        device: the type of device they were made for.
        arch: the GPU architecture that engines were built for, such as `sm89`; "" for graphs that are no engines.
        inputs: what a call takes, in order.
        outputs: what it returns.
        slots: what is kept from step to step.
        tensors: what the steps' token, coefficient and table inputs are.
        graphs: one per variant.
        steps: one per denoising step.
        calls_per_step: how many calls, of one guidance branch each, the exported model took at a step. A runner takes
            one: each branch needs a session of its own.
        files: every file by name, but this one.
        hashes: SHA-256 of what the bundle was made from: `plan`, `graph`, `weights`.
        tools: the versions that made it.
    """

    target: str
    device: str
    arch: str
    inputs: tuple[Input, ...]
    outputs: tuple[TensorSpec, ...]
    slots: tuple[TensorSpec, ...]
    tensors: tuple[TensorSpec, ...]
    graphs: tuple[Graph, ...]
    steps: tuple[Step, ...]
    calls_per_step: int
    files: dict[str, FileEntry]
    hashes: dict[str, str]
    tools: dict[str, str]

    @property
    def slot_bytes(self) -> int:
        """The bytes of one session's slots."""
        return sum(slot.bytes for slot in self.slots)

    @property
    def content(self) -> str:
        """SHA-256 of what all graphs belong to: the plan, the captured graph, the weights, and what every step runs."""
        made = (self.hashes, self.files[TENSORS].sha256, [dataclasses.asdict(step) for step in self.steps])
        return _digest(made)

    @property
    def bytes(self) -> int:
        """The bytes of all files but the manifest."""
        return sum(file.bytes for file in self.files.values())

    def inputs_of(self, graph: Graph) -> dict[str, TensorSpec]:
        """What goes into one of the graphs, by name; without what only steps give it, where no step runs it."""
        specs = {spec.name: spec for spec in (*self.inputs, *self.slots)}
        tensors = {spec.name: spec for spec in self.tensors}
        given = next((step.tensors for step in self.steps if self.graphs[step.graph] is graph), {})
        found = {name: specs.get(name) or tensors.get(given.get(name, "")) for name in graph.inputs}
        return {name: spec for name, spec in found.items() if spec is not None}

    def outputs_of(self, graph: Graph) -> dict[str, TensorSpec]:
        """What comes out of one of the graphs, by name: the model's outputs, then the new values of slots."""
        slots = {spec.name: spec for spec in self.slots}
        return {spec.name: spec for spec in self.outputs} | {next_of(name): slots[name] for name in graph.stores}


def next_of(slot: str) -> str:
    """The output of a graph that holds the next value of a slot."""
    return slot.replace("slot:", "next:", 1)


def dtype_name(dtype: torch.dtype) -> str:
    """A dtype's name in manifests.

    Raises:
        BundleError: bundles do not hold tensors of that dtype.
    """
    name = str(dtype).removeprefix("torch.")
    if name not in _DTYPES:
        raise BundleError(f"bundles do not hold tensors of {dtype}: cast it to one of {', '.join(_DTYPES)}")
    return name


def file_entry(path: Path) -> FileEntry:
    """Size and SHA-256 of a file."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(2**20):
            digest.update(block)
        return FileEntry(file.tell(), digest.hexdigest())


def write(manifest: Manifest, folder: Path) -> None:
    """Write `manifest.json` into `folder`."""
    body = dataclasses.asdict(manifest)
    document = {"format": FORMAT, "version": VERSION, "sha256": _digest(body), **body}
    (folder / MANIFEST).write_text(json.dumps(document, indent=1) + "\n")


def read(folder: Path) -> Manifest:
    """Read the manifest in `folder` and check it, and every file that it names, before anything is used.

    Raises:
        BundleError: a file is missing, altered or not a plain file; or the manifest is not one of this version, does
            not match its checksum, or contradicts itself.
    """
    path = folder / MANIFEST
    if not os.path.lexists(path):
        inner = next(folder.glob(f"*/{MANIFEST}"), None) if folder.is_dir() else None
        hint = f"load {inner.parent}" if inner else "name a folder that tcc export wrote"
        raise BundleError(f"{folder}: no bundle, it has no {MANIFEST}: {hint}")
    _plain_file(path, at_most=MAX_MANIFEST_BYTES)
    try:
        document = parse(path.read_bytes())
    except OSError as error:
        raise BundleError(f"{path}: cannot be read ({error})") from error
    except Malformed as error:
        raise BundleError(f"{path}: {error}: the file was altered; export the bundle anew") from error
    if not isinstance(document, dict) or document.get("format") != FORMAT:
        raise BundleError(f'{path}: not the manifest of a bundle (no "format": "{FORMAT}")')
    if document.get("version") != VERSION or isinstance(document["version"], bool):
        raise BundleError(
            f"{path}: version {document.get('version')!r} of the format, and this tcc reads version {VERSION}: "
            "export the bundle anew, or use the tcc that made it"
        )
    body = {key: document[key] for key in document if key not in ("format", "version", "sha256")}
    if _digest(body) != document.get("sha256"):
        raise BundleError(f"{path}: the content does not match its checksum: it was altered; export the bundle anew")
    try:
        manifest = decode(Manifest, body, "manifest")
        _check(manifest)
    except Malformed as error:
        raise BundleError(f"{path}: {error}") from error
    for name, entry in manifest.files.items():
        _check_file(folder / name, entry)
    return typing.cast(Manifest, manifest)


def _digest(body: Any) -> str:
    try:
        return hashlib.sha256(json.dumps(body, sort_keys=True).encode()).hexdigest()
    except (ValueError, RecursionError):
        return "cannot be counted"


def _check(manifest: Manifest) -> None:
    """Raise `Malformed` where the manifest contradicts itself."""
    for what in ("input", "output", "slot", "tensor"):
        names = [spec.name for spec in getattr(manifest, f"{what}s")]
        if len({*names}) != len(names):
            raise Malformed(f"two {what}s have one name")
        if other := [name for name in names if name.startswith("slot:") != (what == "slot")]:
            raise Malformed(f"{other[0]!r:.80} is no name of a {what}: slots are named 'slot:...', and nothing else is")
    for spec in (*manifest.inputs, *manifest.outputs, *manifest.slots, *manifest.tensors):
        _check_spec(spec)
    for name in manifest.files:
        if not _FILE_NAME.fullmatch(name) or name == MANIFEST:
            raise Malformed(f"{name!r:.80} is no file of a bundle: file names are letters, digits, '.', '_' and '-'")
    if manifest.device not in ("cpu", "cuda"):
        raise Malformed(f"device {manifest.device!r:.40}: bundles are for 'cpu' or 'cuda'")
    if (manifest.target in ENGINES) != bool(manifest.arch):
        raise Malformed(f"target {manifest.target!r:.40} with arch {manifest.arch!r:.40}: engines have one, no others")
    files = [graph.file for graph in manifest.graphs]
    if manifest.target == "tensorrt-rtx":  # a graph names its engine, the file beside it
        files += [str(Path(file).with_suffix(".engine")) for file in files]
    for name in (PLAN, *(() if manifest.arch else (WEIGHTS,)), TENSORS, *files):
        if name not in manifest.files:
            raise Malformed(f"the file {name!r:.80} is not listed")
    _check_hashes(manifest)
    _check_steps(manifest)
    _check_graphs(manifest)


def _check_hashes(manifest: Manifest) -> None:
    if manifest.hashes.keys() != {"plan", "graph", "weights"}:
        raise Malformed("hashes are of 'plan', 'graph' and 'weights', and there are others")
    for what, name in (("plan", PLAN), ("weights", WEIGHTS)):  # engines have their weights inside
        if name in manifest.files and manifest.files[name].sha256 != manifest.hashes[what]:
            raise Malformed(f"the hash of the {what} is not that of {name}: the file belongs to another bundle")


def _check_graphs(manifest: Manifest) -> None:
    slots, inputs = {s.name for s in manifest.slots}, tuple(spec.name for spec in manifest.inputs)
    used: set[str] = set()
    for number, graph in enumerate(manifest.graphs):
        if graph.inputs[: len(inputs)] != inputs:
            raise Malformed(f"graph {number} does not begin with the model's inputs")
        if unknown := set(graph.stores) - slots:
            raise Malformed(f"graph {number} stores {min(unknown)!r:.80}, which is no slot")
        if len({*graph.inputs}) != len(graph.inputs) or len({*graph.stores}) != len(graph.stores):
            raise Malformed(f"graph {number} takes or stores something twice")
        used |= {*graph.inputs, *graph.stores}
    if idle := slots - used:
        raise Malformed(f"no graph has the slot {min(idle)!r:.80}")
    if idle_graphs := set(range(len(manifest.graphs))) - {step.graph for step in manifest.steps}:
        raise Malformed(f"no step runs graph {min(idle_graphs)}")


def _check_steps(manifest: Manifest) -> None:
    if not manifest.steps or manifest.calls_per_step < 1:
        raise Malformed(f"there are {len(manifest.steps)} steps of {manifest.calls_per_step} calls")
    slots, tensors = {s.name for s in manifest.slots}, {t.name: (t.shape, t.dtype) for t in manifest.tensors}
    kinds: dict[tuple[int, str], tuple[tuple[int, ...], str]] = {}
    for number, step in enumerate(manifest.steps):
        if not 0 <= step.graph < len(manifest.graphs):
            raise Malformed(f"step {number} runs graph {step.graph}, and there are {len(manifest.graphs)}")
        for name in manifest.graphs[step.graph].inputs[len(manifest.inputs) :]:
            if name not in slots and name not in step.tensors:
                raise Malformed(f"step {number}: nothing is given for the input {name!r:.80} of graph {step.graph}")
        for name, key in step.tensors.items():
            if key not in tensors or name in slots:
                raise Malformed(f"step {number}: {key!r:.80} cannot be given for {name!r:.80}")
            if kinds.setdefault((step.graph, name), tensors[key]) != tensors[key]:
                raise Malformed(f"step {number}: {key!r:.80} is of another shape or dtype than at other steps")


def _check_spec(spec: TensorSpec) -> None:
    if spec.dtype not in _DTYPES:
        raise Malformed(f"{spec.name!r:.80} has the unknown dtype {spec.dtype!r:.40}")
    if len(spec.shape) > MAX_DIMS or any(not 0 <= size <= MAX_DIM for size in spec.shape):
        raise Malformed(f"{spec.name!r:.80} has an impossible shape")
    if spec.bytes > MAX_TENSOR_BYTES:
        raise Malformed(f"{spec.name!r:.80} has {spec.bytes} bytes, more than the {MAX_TENSOR_BYTES} of any tensor")
    if isinstance(spec, Input) and (len(spec.axes) != len(spec.shape) or not 0 <= spec.values <= MAX_DIM):
        raise Malformed(f"{spec.name!r:.80} has other axes than dimensions, or an impossible range")


def _check_file(path: Path, entry: FileEntry) -> None:
    size = _plain_file(path)
    if size != entry.bytes:
        raise BundleError(f"{path}: {size} bytes, and the manifest says {entry.bytes}: the file was cut or altered")
    try:
        found = file_entry(path)
    except OSError as error:
        raise BundleError(f"{path}: cannot be read ({error})") from error
    if found != entry:
        raise BundleError(f"{path}: the content does not match the manifest: the file was altered")


def _plain_file(path: Path, at_most: int | None = None) -> int:
    """The size of a file that is neither a link nor a device."""
    try:
        found = os.lstat(path)
    except (OSError, ValueError) as error:
        raise BundleError(f"{path}: the bundle lacks this file ({error}): export it anew") from error
    if not stat.S_ISREG(found.st_mode):
        raise BundleError(f"{path}: not a plain file: a bundle holds files alone, no links or folders")
    if at_most is not None and found.st_size > at_most:
        raise BundleError(f"{path}: {found.st_size} bytes; a manifest has at most {at_most}")
    return found.st_size
