"""What a graph was made for, written into the file that holds it.

A manifest is a list beside the graphs, and a checksum is counted anew by whoever edits it. So every graph of ONNX, and
every variant of an AOTInductor package, carries a *stamp*: its part of the manifest as the exporter wrote it. A loader
compares the two before anything runs. All tensors are contiguous: strides follow from shapes.
"""

from __future__ import annotations

import hashlib
import json
import zipfile
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path, PurePosixPath

import torch

from tcc.errors import BundleError
from tcc.export.decode import Malformed, decode, parse
from tcc.export.machine import processor, refuse_processor
from tcc.export.manifest import MANIFEST, WEIGHTS, Input, Manifest, TensorSpec, file_entry
from tcc.export.weights import load_tensors

__all__ = ["KEY", "compare", "expected", "package_stamps", "read_stamp", "stamp"]

#: The name of the stamp among what ONNX lets a model say of itself, and its file in a package.
KEY, FILE = "tcc.stamp", "tcc_stamps.json"
#: What the stamp of a compiled variant says beyond the manifest: the processor that it needs.
_FOR = "processor"
#: Where packages keep compiled variants, and further files; all other members are a few bytes each.
_CODE, _EXTRA = "data/aotinductor/", "data/extra/"
_SUFFIXES = (".so", ".json", ".cubin", ".hsaco", ".spv", ".ptx", ".fatbin", ".bin")
#: Of the generated sources, which a loader could compile, nothing is kept but the name.
_EMPTY = ".cpp"
_OTHERS = ("archive_format", "archive_version", "byteorder", "version", ".data/serialization_id", ".data/version")


def expected(manifest: Manifest, number: int, weights: Mapping[str, torch.Tensor]) -> dict[str, str]:
    """The stamp that graph `number` must carry, if it is the one that the manifest describes.

    Args:
        manifest: the manifest.
        number: the number of the graph.
        weights: the tensors of the weights' file.
    """
    graph, slots = manifest.graphs[number], {spec.name: spec for spec in manifest.slots}
    given = manifest.inputs_of(graph)
    stamp = {"graph": str(number), "device": manifest.device, "plan, weights and steps": manifest.content}
    stamp |= {f"input {place}": _named(name, given.get(name)) for place, name in enumerate(graph.inputs)}
    stamp |= {f"output {place}": _named(spec.name, spec) for place, spec in enumerate(manifest.outputs)}
    stamp |= {f"store {place}": _named(name, slots[name]) for place, name in enumerate(graph.stores)}
    for name in graph.weights:
        tensor = weights.get(name)
        stamp[f"weight {name!r}"] = "missing" if tensor is None else _text(tensor.dtype, tuple(tensor.shape))
    return stamp


def compare(where: str, found: Mapping[str, str], wanted: Mapping[str, str]) -> None:
    """Raise where a graph was made for something else than the manifest says.

    Raises:
        BundleError: names the first difference.
    """
    for name in {**wanted, **found}:
        if found.get(name) != wanted.get(name):
            raise BundleError(
                f"{where}: the {name:.80} is {found.get(name, 'none'):.120}, and the manifest says "
                f"{wanted.get(name, 'none'):.120}: the bundle was altered; export it anew"
            )


def read_stamp(where: str, text: str) -> dict[str, str]:
    """A stamp from its text.

    Raises:
        BundleError: it is none.
    """
    try:
        stamp: dict[str, str] = decode(dict[str, str], parse(text.encode(errors="replace")), "stamp")
    except Malformed as error:
        raise BundleError(f"{where}: its stamp, what it was made for, cannot be read ({error}): export anew") from error
    return stamp


def stamp(folder: Path, manifest: Manifest) -> Manifest:
    """Write the stamps of all graphs into their files; the weights, tensors and plan are there, and listed.

    Engines are not stamped: they say themselves what they take.

    Returns:
        The manifest with all files of the folder.
    """
    if manifest.target in _STAMPS:
        _STAMPS[manifest.target](folder, manifest, load_tensors(folder / WEIGHTS))
    names = sorted(path.name for path in folder.iterdir() if path.is_file() and path.name != MANIFEST)
    return replace(manifest, files={name: manifest.files.get(name) or file_entry(folder / name) for name in names})


def _stamp_onnx(folder: Path, manifest: Manifest, weights: Mapping[str, torch.Tensor]) -> None:
    import onnx

    for number, graph in enumerate(manifest.graphs):
        model = onnx.load(folder / graph.file, load_external_data=False)
        onnx.helper.set_model_props(model, {KEY: json.dumps(expected(manifest, number, weights))})
        (folder / graph.file).write_bytes(model.SerializeToString())


def _stamp_package(folder: Path, manifest: Manifest, weights: Mapping[str, torch.Tensor]) -> None:
    """Add the stamps of all variants to their package, with the hashes of their files."""
    for file in dict.fromkeys(graph.file for graph in manifest.graphs):
        with zipfile.ZipFile(folder / file, "a", zipfile.ZIP_STORED) as package:
            stamps = {
                graph.entry: expected(manifest, number, weights) | {_FOR: processor()} | _code(package, graph.entry)
                for number, graph in enumerate(manifest.graphs)
                if graph.file == file
            }
            root = package.namelist()[0].partition("/")[0]
            package.writestr(f"{root}/{_EXTRA}{FILE}", json.dumps(stamps))


_STAMPS = {"onnx": _stamp_onnx, "aoti": _stamp_package}


def package_stamps(path: Path) -> dict[str, dict[str, str]]:
    """The stamps in a package by the names of variants, after a look at the list of its files.

    The library that loads the package unpacks all of them, so that nothing may have a name of its own choice, be a
    pickle, or grow. What the stamps say of the compiled files is checked here.

    Raises:
        BundleError: the package is none of tcc's, a compiled file is not the one that was stamped, or it was compiled
            for another processor.
    """
    try:
        with zipfile.ZipFile(path) as package:
            _check_members(path, package)
            found = decode(dict[str, dict[str, str]], parse(package.read(_member(package, _EXTRA + FILE))), "stamps")
            for entry, stamp in found.items():
                where = f"{path}: {entry!r:.40}"
                compare(where, {k: v for k, v in stamp.items() if k.startswith("file ")}, _code(package, entry))
                refuse_processor(where, stamp.get(_FOR, "unknown"))
    except BundleError:
        raise
    except Exception as error:  # zipfile raises BadZipFile, NotImplementedError, EOFError, struct.error, ...
        raise BundleError(f"{path}: not a package that tcc wrote ({error}): export the bundle anew") from error
    return {
        entry: {k: v for k, v in stamp.items() if k != _FOR and not k.startswith("file ")}
        for entry, stamp in found.items()
    }


def _check_members(path: Path, package: zipfile.ZipFile) -> None:
    names = package.namelist()
    if len(set(names)) != len(names):
        raise BundleError(f"{path}: the package has two files of one name: it was altered; export the bundle anew")
    for member in package.infolist():
        inner = member.filename.partition("/")[2]
        kind = PurePosixPath(inner)
        known = inner in (*_OTHERS, _EXTRA + FILE) or (
            inner.startswith(_CODE)
            and len(kind.parts) == 4
            and (kind.suffix in _SUFFIXES or (kind.suffix == _EMPTY and member.file_size == 0))
        )
        if not known or ".." in kind.parts or not member.filename.isprintable() or "\\" in member.filename:
            raise BundleError(
                f"{path}: the package holds {member.filename!r:.80}, which no export writes: do not use it"
            )
        if member.compress_type != zipfile.ZIP_STORED or member.file_size != member.compress_size:
            raise BundleError(f"{path}: {member.filename!r:.80} is compressed, which no export does: do not use it")


def _code(package: zipfile.ZipFile, entry: str) -> dict[str, str]:
    """The SHA-256 of every file of a variant."""
    found = {}
    for name in package.namelist():
        folder, _, file = name.rpartition("/")
        if folder.endswith(f"/{_CODE}{entry}"):
            found[f"file {file}"] = hashlib.sha256(package.read(name)).hexdigest()
    return found


def _member(package: zipfile.ZipFile, inner: str) -> str:
    return next(name for name in package.namelist() if name.partition("/")[2] == inner)


def _named(name: str, spec: TensorSpec | None) -> str:
    if spec is None:
        return f"{name}: not given"
    bounds = f", 0 to {spec.values - 1}" if isinstance(spec, Input) and spec.values else ""
    return f"{name}: {_text(spec.torch_dtype, spec.shape)}{bounds}"


def _text(dtype: torch.dtype, shape: tuple[int, ...]) -> str:
    return f"{str(dtype).removeprefix('torch.')} {list(shape)}"
