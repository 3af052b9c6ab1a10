"""What a loader must survive: bundles that were cut, altered, swapped, or made to do harm."""

from __future__ import annotations

import json
import random
import resource
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

import tcc
from tcc.errors import BundleError, TccError
from tcc.export import bundle, load
from tcc.export.manifest import _digest
from tests.tiny_models import case

pytest.importorskip("onnx", reason="needs the ONNX packages: pip install 'tcc[onnx]'")

MUTATIONS = 2000


@pytest.fixture(scope="module")
def original(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small bundle: three steps, two graphs, a token set."""
    which = case("separate")
    tokens = {"few": torch.arange(0, 12, 3)}
    actions = {(1, "blocks.0.mlp.delta"): tcc.Update("few"), (2, "blocks.0.mlp.delta"): tcc.Update("few")}
    plan = tcc.CachePlan(num_steps=3, actions=actions, tokens=tokens)
    return bundle(which.model, plan, (which.args, {}), tmp_path_factory.mktemp("bundle") / "original").folder


@pytest.fixture
def folder(original: Path, tmp_path: Path) -> Path:
    """A copy of the bundle to spoil."""
    return Path(shutil.copytree(original, tmp_path / "bundle"))


def rewrite(folder: Path, change: Callable[[dict[str, Any]], object]) -> None:
    """Change the manifest and make its checksum fit again, as someone who means harm would."""
    path = folder / "manifest.json"
    document = json.loads(path.read_text())
    change(document)
    body = {key: value for key, value in document.items() if key not in ("format", "version", "sha256")}
    path.write_text(json.dumps(document | {"sha256": _digest(body)}))


def test_the_original_loads(original: Path) -> None:
    """And runs."""
    args, _ = case("separate").inputs(0)
    assert load(original)(*args).shape == args[0].shape


CHANGES: list[tuple[Callable[[dict[str, Any]], object], str]] = [
    (lambda d: d.update(version=1), r"version 1 of the format, and this tcc reads version 2"),
    (lambda d: d.update(version=True), r"version True of the format"),
    (lambda d: d.update(format="zip"), r"not the manifest of a bundle"),
    (lambda d: d.update(target="shell"), r"made for the target 'shell'; known: onnx, aoti"),
    (lambda d: d.update(target="tensorrt"), r"target 'tensorrt' with arch '': engines have one, no others"),
    (lambda d: d.update(arch="sm89"), r"target 'onnx' with arch 'sm89'"),
    (lambda d: d.update(extra=1), r"lacks fields, or has unknown ones: extra"),
    (lambda d: d.pop("slots"), r"lacks fields, or has unknown ones: slots"),
    (lambda d: d.update(steps=[]), r"there are no steps"),
    (lambda d: d.update(steps={}), r"manifest.steps is not a list"),
    (lambda d: d.update(hashes=[]), r"manifest.hashes is not an object"),
    (lambda d: d["steps"][0].update(graph=7), r"step 0 runs graph 7, and there are 2"),
    (lambda d: d["steps"][0].update(graph=-1), r"step 0 runs graph -1"),
    (lambda d: d["steps"][0].update(graph=True), r"manifest.steps\[0\].graph is True, not of type int"),
    (lambda d: d["steps"][0].update(graph=0.0), r"manifest.steps\[0\].graph is 0.0, not of type int"),
    (lambda d: d["steps"][1].update(tensors={}), r"step 1: nothing is given for the input 'kept_0' of graph 1"),
    (lambda d: d["files"].update({"../x": d["files"].pop("plan.safetensors")}), r"'../x' is no file of a bundle"),
    (lambda d: d["files"].update({"/etc/passwd": {"bytes": 1, "sha256": ""}}), r"'/etc/passwd' is no file"),
    (lambda d: d["files"].update({"..": {"bytes": 1, "sha256": ""}}), r"'..' is no file"),
    (lambda d: d["files"].update({"a\0b": {"bytes": 1, "sha256": ""}}), r"is no file"),
    (lambda d: d["files"].pop("weights.safetensors"), r"the file 'weights.safetensors' is not listed"),
    (lambda d: d["graphs"][0].update(file="../step0.onnx"), r"the file '../step0.onnx' is not listed"),
    (lambda d: d["graphs"][0].update(stores=["slot:no"]), r"graph 0 stores 'slot:no', which is no slot"),
    (lambda d: d["graphs"][0].update(inputs=["y"]), r"graph 0 does not begin with the model's inputs"),
    (lambda d: d["graphs"][0].update(weights=["no.weight"]), r"step0.onnx: .*no.weight"),
    (lambda d: d["slots"][0].update(shape=[2**31, 2]), r"has an impossible shape"),
    (lambda d: d["slots"][0].update(shape=[2**20, 2**20, 2**20]), r"more than the 1099511627776 of any tensor"),
    (lambda d: d["slots"][0].update(shape=[2**18, 2**18]), r"slots of 256.0 GiB; at most 64.0 GiB"),
    (lambda d: d["slots"][0].update(shape=[-1]), r"has an impossible shape"),
    (lambda d: d["slots"][0].update(shape=[1] * 99), r"has an impossible shape"),
    (lambda d: d["slots"][0].update(dtype="float3"), r"has the unknown dtype 'float3'"),
    (lambda d: d["slots"][0].update(shape=[4, 4]), r"the (in|out)put .* is .*, and the manifest says"),
    (lambda d: d["slots"].append(d["slots"][0]), r"two slots have one name"),
    (lambda d: d["slots"].append(d["slots"][0] | {"name": "slot:big"}), r"no graph has the slot 'slot:big'"),
    (lambda d: d["inputs"][0].update(shape=[1]), r"the input .* is .*, and the manifest says"),
    (lambda d: d["outputs"].append(d["outputs"][0] | {"name": "more"}), r"the output 'more' is None"),
    (lambda d: d["tensors"][0].update(shape=[3]), r"tensors.safetensors: 'kept.0' is not as the manifest says"),
    (lambda d: d.update(device="xpu"), r"device 'xpu': bundles are for 'cpu' or 'cuda'"),
]


@pytest.mark.parametrize(("change", "message"), CHANGES)
def test_a_manifest_that_contradicts_is_refused(
    folder: Path, change: Callable[[dict[str, Any]], object], message: str
) -> None:
    """Even where its checksum fits."""
    rewrite(folder, change)
    with pytest.raises(BundleError, match=message):
        load(folder)


def test_files_must_be_the_ones_listed(folder: Path, original: Path) -> None:
    """Missing, longer, altered, linked; and a manifest that is missing, altered, no JSON, or too deep."""
    weights, manifest = folder / "weights.safetensors", folder / "manifest.json"
    content = weights.read_bytes()
    weights.unlink()
    with pytest.raises(BundleError, match=r"weights.safetensors: the bundle lacks this file"):
        load(folder)
    weights.symlink_to(original / "weights.safetensors")
    with pytest.raises(BundleError, match=r"weights.safetensors: not a plain file"):
        load(folder)
    weights.unlink()
    weights.write_bytes(content + b"\0")
    with pytest.raises(BundleError, match=rf"{len(content) + 1} bytes, and the manifest says {len(content)}"):
        load(folder)
    weights.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    with pytest.raises(BundleError, match=r"weights.safetensors: the content does not match the manifest"):
        load(folder)
    weights.write_bytes(content)
    text = manifest.read_text()
    manifest.write_text(text.replace('"steps"', '"stops"'))
    with pytest.raises(BundleError, match=r"manifest.json: the content does not match its checksum"):
        load(folder)
    manifest.write_text(text[:-20])
    with pytest.raises(BundleError, match=r"manifest.json: not JSON"):
        load(folder)
    manifest.write_text("[" * 100_000)
    with pytest.raises(BundleError, match=r"manifest.json: not JSON"):
        load(folder)
    with manifest.open("wb") as file:
        file.truncate(2**27)
    with pytest.raises(BundleError, match=r"134217728 bytes; a manifest has at most"):
        load(folder)
    with pytest.raises(
        BundleError, match=r"nowhere: no bundle, it has no manifest.json: name a folder that tcc export wrote"
    ):
        load(folder / "nowhere")


def test_a_bundle_may_be_large_if_the_caller_says_so(folder: Path) -> None:
    """The bound on slots is the caller's to move; a small one refuses a harmless bundle."""
    with pytest.raises(BundleError, match=r"slots of 0.0 GiB; at most 0.0 GiB: pass max_slot_bytes"):
        load(folder, max_slot_bytes=10)


def mutate(folder: Path, draw: random.Random) -> str:
    """Spoil a bundle in one way; returns what was done."""
    path = draw.choice(sorted(p for p in folder.iterdir()))
    other = draw.choice(sorted(p for p in folder.iterdir() if p != path))
    content = bytearray(path.read_bytes())
    match kind := draw.choice(["cut", "flip", "swap", "grow", "remove", "overwrite", "field", "value"]):
        case "cut":
            path.write_bytes(content[: draw.randrange(len(content))])
        case "flip":
            content[draw.randrange(len(content))] ^= 1 << draw.randrange(8)
            path.write_bytes(content)
        case "swap":
            path.write_bytes(other.read_bytes())
            other.write_bytes(content)
        case "grow":
            path.write_bytes(content + draw.randbytes(draw.randrange(1, 100)))
        case "remove":
            path.unlink()
        case "overwrite":
            start = draw.randrange(len(content))
            content[start : start + 16] = draw.randbytes(16)
            path.write_bytes(content)
        case "field":
            rewrite(folder, lambda d: _spoil(d, draw, remove=True))
        case "value":
            rewrite(folder, lambda d: _spoil(d, draw, remove=False))
    return f"{kind} {path.name}"


HOSTILE: list[Any] = [
    "../x", "/etc/passwd", "..", "", "\0", "\ud800", "a" * 10_000, -1, 2**31, 2**63, 2**200, 1e308, float("nan"),
    float("inf"), True, None, [], {}, [[]] * 50, {"a": {}}, "weights.safetensors", "manifest.json", "float32", 0,
]  # fmt: skip


def _spoil(document: dict[str, Any], draw: random.Random, *, remove: bool) -> None:
    """Remove a random field of the manifest, or put something hostile in its place."""
    places = list(_places(document))
    holder, key = draw.choice([(h, k) for h, k in places if k not in ("format", "version", "sha256")])
    if remove:
        del holder[key]
    else:
        holder[key] = draw.choice(HOSTILE)


def _places(value: Any) -> Iterator[tuple[Any, Any]]:
    items = list(value.items()) if isinstance(value, dict) else list(enumerate(value))
    for key, item in items:
        yield value, key
        if isinstance(item, dict | list):
            yield from _places(item)


def test_spoiled_bundles_are_refused(original: Path, tmp_path: Path) -> None:
    """2,000 of them: each is refused with one of our errors, or is still a bundle; nothing is written or swells.

    Where only words changed (a meaning, a version of a tool) and the checksum was made to fit, a bundle still loads.
    """
    names = {path.name: path.read_bytes() for path in original.iterdir()}
    folder = tmp_path / "bundle"
    folder.mkdir()
    before, refused = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, 0
    for number in range(MUTATIONS):
        for name, content in names.items():
            (folder / name).write_bytes(content)
        what = mutate(folder, random.Random(number))
        listing = sorted(path.name for path in folder.iterdir())
        try:
            load(folder)
        except TccError as error:
            refused += bool(str(error))
        assert sorted(path.name for path in folder.iterdir()) == listing, what
        assert sorted(path.name for path in tmp_path.iterdir()) == ["bundle"], what
    assert refused > 0.9 * MUTATIONS
    grown = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
    assert grown < 2**19, f"loading took {grown} KiB"
