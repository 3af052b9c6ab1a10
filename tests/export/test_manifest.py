"""What a loader must refuse: bundles that were cut, altered, swapped, or made to do harm."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from typer.testing import CliRunner

import tcc
from tcc.cli import app
from tcc.errors import BundleError, CallError
from tcc.export import load
from tcc.export import manifest as manifests
from tcc.export.manifest import TensorSpec
from tcc.export.slots import Slots
from tcc.plan.file import FORMAT
from tcc.plan.file import _digest as plan_digest
from tests.tiny_models import case

pytest.importorskip("onnx", reason="needs the ONNX packages: pip install 'tcc[onnx]'")
from tests.export.mutations import edit_graph, forge, recount, rewrite, seal  # needs the ONNX packages


@pytest.fixture
def folder(small: Path, tmp_path: Path) -> Path:
    """A copy of the bundle to spoil."""
    return Path(shutil.copytree(small, tmp_path / "bundle"))


def test_the_original_loads(small: Path) -> None:
    """And runs."""
    args, _ = case("separate").inputs(0)
    assert load(small)(*args).shape == args[0].shape


CHANGES: list[tuple[Callable[[dict[str, Any]], object], str]] = [
    (lambda d: d.update(version=1), r"version 1 of the format, and this tcc reads version 4"),
    (lambda d: d.update(version=True), r"version True of the format"),
    (lambda d: d.update(format="zip"), r"not the manifest of a bundle"),
    (lambda d: d.update(target="shell"), r"made for the target 'shell'; known: onnx, aoti"),
    (lambda d: d.update(target="tensorrt"), r"target 'tensorrt' with arch '': engines have one, no others"),
    (lambda d: d.update(arch="sm89"), r"target 'onnx' with arch 'sm89'"),
    (lambda d: d.update(extra=1), r"lacks fields, or has unknown ones: 'extra'"),
    (lambda d: d.pop("slots"), r"lacks fields, or has unknown ones: 'slots'"),
    (lambda d: d.update(steps=[]), r"there are 0 steps of 1 calls"),
    (lambda d: d.update(calls_per_step=0), r"there are 5 steps of 0 calls"),
    (lambda d: d.update(steps={}), r"manifest.steps is not a list"),
    (lambda d: d.update(hashes=[]), r"manifest.hashes is not an object"),
    (
        lambda d: d["graphs"][0].update(macs=2**63),
        r"manifest.graphs\[0\].macs is 9223372036854775808, larger than any",
    ),
    (
        lambda d: d["tools"].update(torch="\x1b[2J"),
        r"manifest.tools\['torch'\] is '\\x1b\[2J', which cannot be printed",
    ),
    (lambda d: d["tools"].update({"\ud800": "1"}), r"a name in manifest.tools is '\\ud800', which cannot be printed"),
    (lambda d: d["steps"][0].update(graph=7), r"step 0 runs graph 7, and there are 3"),
    (lambda d: d["steps"][0].update(graph=-1), r"step 0 runs graph -1"),
    (lambda d: d["steps"][0].update(graph=True), r"manifest.steps\[0\].graph is True, not of type int"),
    (lambda d: d["steps"][0].update(graph=0.0), r"manifest.steps\[0\].graph is 0.0, not of type int"),
    (lambda d: d["steps"][2].update(tensors={}), r"step 2: nothing is given for the input 'kept_0' of graph 1"),
    (lambda d: d["files"].update({"../x": d["files"].pop("plan.safetensors")}), r"'../x' is no file of a bundle"),
    (lambda d: d["files"].update({"/etc/passwd": {"bytes": 1, "sha256": ""}}), r"'/etc/passwd' is no file"),
    (lambda d: d["files"].update({"..": {"bytes": 1, "sha256": ""}}), r"'..' is no file"),
    (lambda d: d["files"].update({"a\0b": {"bytes": 1, "sha256": ""}}), r"is 'a\\x00b', which cannot be printed"),
    (lambda d: d["files"].pop("weights.safetensors"), r"the file 'weights.safetensors' is not listed"),
    (lambda d: d["graphs"][0].update(file="../step0.onnx"), r"the file '../step0.onnx' is not listed"),
    (lambda d: d["graphs"][0].update(stores=["slot:no"]), r"graph 0 stores 'slot:no', which is no slot"),
    (lambda d: d["graphs"][0].update(inputs=["y"]), r"graph 0 does not begin with the model's inputs"),
    (
        lambda d: d["graphs"][0].update(weights=["no.weight"]),
        r"step0.onnx: reads 'no.weight', which weights.safetensors does not have",
    ),
    (lambda d: d["slots"][0].update(shape=[2**31, 2]), r"has an impossible shape"),
    (lambda d: d["slots"][0].update(shape=[2**20, 2**20, 2**20]), r"more than the 1099511627776 of any tensor"),
    (lambda d: d["slots"][0].update(shape=[2**18, 2**18]), r"slots of 256 GiB; at most 64 GiB"),
    (lambda d: d["slots"][0].update(shape=[-1]), r"has an impossible shape"),
    (lambda d: d["slots"][0].update(shape=[1] * 99), r"has an impossible shape"),
    (lambda d: d["slots"][0].update(dtype="float3"), r"has the unknown dtype 'float3'"),
    (
        lambda d: d["slots"][0].update(shape=[4, 4]),
        r"the store 0 is slot:.*mlp.delta: float32 \[2, 12, 16\], and the manifest says slot:.* \[4, 4\]",
    ),
    (lambda d: d["slots"].append(d["slots"][0]), r"two slots have one name"),
    (lambda d: d["slots"].append(d["slots"][0] | {"name": "slot:big"}), r"no graph has the slot 'slot:big'"),
    (
        lambda d: d["inputs"][0].update(shape=[1], axes=[""]),
        r"not the plan that the manifest is for: .*input 'x' has shape \[2, 12, 16\]",
    ),
    (
        lambda d: d["inputs"][0].update(dtype="float64"),
        r"the input 0 is x: float32 .*, and the manifest says x: float64",
    ),
    (
        lambda d: d["outputs"].append(d["outputs"][0] | {"name": "more"}),
        r"the output 1 is none, and the manifest says more: float32 \[2, 12, 16\]",
    ),
    (lambda d: d["tensors"][0].update(shape=[3]), r"step 3: 'kept.2' is of another shape or dtype than at other steps"),
    (lambda d: d["tensors"][4].update(shape=[3]), r"tensors.safetensors: 'coefficients.4' is not as the manifest says"),
    (lambda d: d["hashes"].update(plan="0"), r"the hash of the plan is not that of plan.safetensors"),
    (lambda d: d["hashes"].update(weights="0"), r"the hash of the weights is not that of weights.safetensors"),
    (lambda d: d["hashes"].update(more="0"), r"hashes are of 'plan', 'graph' and 'weights', and there are others"),
    (lambda d: d["hashes"].update(graph="0"), r"the plan is for another model: its graph hash is"),
    (lambda d: d["slots"][0].update(name="kept"), r"'kept' is no name of a slot: slots are named 'slot:...'"),
    (lambda d: d["inputs"][0].update(name="slot:x"), r"'slot:x' is no name of a input: slots are named"),
    (lambda d: d["graphs"][0].update(stores=d["graphs"][0]["stores"] * 2), r"graph 0 takes or stores something twice"),
    (lambda d: d["steps"].pop(), r"no step runs graph 2"),
    (lambda d: d["steps"].append(d["steps"][0]), r"a plan of 5 steps, and the manifest has 6"),
    (lambda d: d["steps"][2].update(tensors=d["steps"][3]["tensors"]), r"step 2 gives graph 1 other token sets"),
    (lambda d: d["steps"][2]["tensors"].update(kept_1="no"), r"step 2: 'no' cannot be given for 'kept_1'"),
    (lambda d: d["steps"][3]["tensors"].update(kept_0="place.1"), r"step 3: 'place.1' is of another shape or dtype"),
    (
        lambda d: d.update(graphs=d["graphs"][:1] + d["graphs"][:0:-1]),
        r"the graph is 2, and the manifest says 1|is of another shape|cannot be given|nothing is given",
    ),
    (lambda d: d["inputs"][0].update(axes=["batch"]), r"'x' has other axes than dimensions, or an impossible range"),
    (lambda d: d["inputs"][0].update(values=-1), r"'x' has other axes than dimensions, or an impossible range"),
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


def test_files_must_be_the_ones_listed(folder: Path, small: Path) -> None:
    """Missing, longer, altered, linked; and a manifest that is missing, altered, no JSON, or too deep."""
    weights, manifest = folder / "weights.safetensors", folder / "manifest.json"
    content = weights.read_bytes()
    weights.unlink()
    with pytest.raises(BundleError, match=r"weights.safetensors: the bundle lacks this file"):
        load(folder)
    weights.symlink_to(small / "weights.safetensors")
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
    with pytest.raises(BundleError, match=r"slots of .* KiB; at most 10 B: pass max_slot_bytes"):
        load(folder, max_slot_bytes=10)


def resaved(folder: Path, plan: tcc.CachePlan) -> None:
    """Put another plan into a bundle, under hashes that fit."""
    plan.save(str(folder / "plan.safetensors"))
    seal(folder)


def test_the_steps_must_be_those_of_the_plan(folder: Path) -> None:
    """A plan that was replaced, whatever it is, does not go unnoticed: nor does a file that is no plan."""
    plan = tcc.CachePlan.load(str(folder / "plan.safetensors"))
    few, site = torch.tensor([0, 3, 6, 10]), "blocks.1.attn.delta"
    others = [
        (replace(plan, num_steps=6), r"a plan of 6 steps, and the manifest has 5: export anew"),
        (replace(plan, tokens={**plan.tokens, "few": few}), r"step 2 gives graph 1 other token sets, coefficients or"),
        (replace(plan, actions={**plan.actions, (4, site): tcc.Reuse(1, (3.0, -2.0))}), r"step 4 gives graph 2 other"),
        (
            replace(plan, actions={**plan.actions, (1, site): tcc.Skip()}),
            r"step 1 runs graph 0, which is for",
        ),
        (replace(plan, actions={**plan.actions, (4, site): tcc.Reuse()}), r"step 4 gives graph 2 other"),
    ]
    for other, message in others:
        resaved(folder, other)
        with pytest.raises(BundleError, match=message):
            load(folder)
    resaved(folder, replace(plan, policy={"name": "another"}))
    with pytest.raises(BundleError, match=r"step0.onnx: the plan, weights and steps is [0-9a-f]{64}, and the manifest"):
        load(folder)
    (folder / "plan.safetensors").write_bytes(b"no plan")
    seal(folder)
    with pytest.raises(BundleError, match=r"plan.safetensors: cannot be read as a plan .*; export the bundle anew"):
        load(folder)


def test_numbers_of_steps_have_an_end(folder: Path) -> None:
    """A plan is checked step by step: one that says that it has 2^62 of them is refused first."""
    path = folder / "plan.safetensors"
    tensors = load_file(path)
    with safe_open(path, framework="pt") as file:
        text = file.metadata()["plan"].replace('"num_steps": 5', f'"num_steps": {2**62}')
    save_file(tensors, path, metadata={"format": FORMAT, "plan": text, "sha256": plan_digest(text, tensors)})
    seal(folder)
    with pytest.raises(BundleError, match=r"4611686018427387904 steps at 2 sites: more than any plan has"):
        load(folder)


def test_token_sets_must_lie_among_the_tokens(folder: Path) -> None:
    """Positions that do not exist, and places that do not belong to them, never reach a graph."""
    path = folder / "tensors.safetensors"
    tensors = load_file(path)
    for name, tensor in (("kept.0", torch.tensor([0, 3, 6, 99])), ("place.1", tensors["place.1"].flip(0))):
        save_file(tensors | {name: tensor}, path)
        seal(folder)
        with pytest.raises(BundleError, match=r"step 2 gives graph 1 other token sets"):
            load(folder)
    save_file({name: tensor for name, tensor in tensors.items() if name != "kept.0"}, path)
    seal(folder)
    with pytest.raises(BundleError, match=r"tensors.safetensors: 'kept.0' is not as the manifest says"):
        load(folder)


def test_a_safetensors_file_must_be_one(folder: Path) -> None:
    """Also where its hash fits."""
    for name in ("weights.safetensors", "tensors.safetensors"):
        content = (folder / name).read_bytes()
        (folder / name).write_bytes((2**62).to_bytes(8, "little") + content[8:])
        seal(folder)
        with pytest.raises(BundleError, match=rf"{name}: cannot be read as safetensors \(.*\): export the bundle anew"):
            load(folder)
        (folder / name).write_bytes(content)


def test_a_graph_says_what_it_was_made_for(folder: Path) -> None:
    """A file for another step, weights of another shape, and a graph of unknown origin; all under hashes that fit."""
    first, second = (folder / f"step{number}.onnx" for number in (0, 1))
    content = first.read_bytes()
    first.write_bytes(second.read_bytes())
    seal(folder)
    with pytest.raises(BundleError, match=r"step0.onnx: the graph has \d+ operators, and the manifest says \d+: the"):
        load(folder)
    recount(folder)
    with pytest.raises(BundleError, match=r"step0.onnx: the graph is 1, and the manifest says 0: the bundle"):
        load(folder)
    first.write_bytes(content)
    edit_graph(first, lambda model: model.metadata_props.clear())
    recount(folder)
    seal(folder)
    with pytest.raises(BundleError, match=r"step0.onnx: its stamp, what it was made for, cannot be read"):
        load(folder)


def test_weights_are_those_that_the_graph_declares(folder: Path) -> None:
    """ONNX Runtime reads memory of another shape or dtype as if it had the declared one: also under forged stamps."""
    path, name = folder / "weights.safetensors", "embed.bias"
    tensors = load_file(path)
    for other in (tensors[name][:1].clone(), tensors[name].half(), tensors[name][None]):
        save_file(tensors | {name: other}, path)
        forge(folder)
        with pytest.raises(
            BundleError, match=r"step0.onnx: the weight 'embed.bias' is .*, and the graph declares \[16\]"
        ):
            load(folder)
    save_file(tensors, path)
    rewrite(folder, lambda d: d["graphs"][0]["weights"].remove(name))
    forge(folder)
    with pytest.raises(BundleError, match=r"'embed.bias' lies in a file that the manifest does not give to the graph"):
        load(folder)
    rewrite(folder, lambda d: d["graphs"][0]["weights"].append(name))
    forge(folder)
    load(folder)

    def without(model: Any) -> None:
        weights = model.graph.initializer
        weights.remove(next(tensor for tensor in weights if tensor.name == name))

    edit_graph(folder / "step0.onnx", without)
    seal(folder)
    with pytest.raises(BundleError, match=r"step0.onnx: the graph has no weight '.*', and the manifest gives it one"):
        load(folder)
    (folder / "step0.onnx").write_bytes(b"\xff" * 40)
    seal(folder)
    with pytest.raises(
        BundleError, match=r"step0.onnx: not a graph of ONNX that tcc wrote \(a number without an end\)"
    ):
        load(folder)


def test_a_forged_stamp_leaves_the_graph_as_it_is(folder: Path) -> None:
    """What a graph of ONNX takes and returns is read from it."""
    rewrite(folder, lambda d: d["slots"][0].update(shape=[4, 4]))
    forge(folder)
    with pytest.raises(
        BundleError, match=r"the (in|out)put '(slot|next):blocks.0.mlp.delta' is .*, and the manifest says"
    ):
        load(folder)


TEXTS = [
    (lambda text: text.replace('"slots":', '"slots": [], "slots":', 1), r"the name 'slots' comes twice in an object"),
    (lambda text: text.replace('"macs": ', '"macs": NaN, "x": ', 1), r"NaN is no number of JSON"),
    (lambda text: text.replace('"macs": ', '"macs": -Infinity, "x": ', 1), r"-Infinity is no number of JSON"),
    (lambda text: text.replace('"macs": ', '"macs": ' + "9" * 5000, 1), r"manifest.json: not JSON \(Exceeds the limit"),
]


@pytest.mark.parametrize(("change", "message"), TEXTS)
def test_json_leaves_nothing_open(folder: Path, change: Callable[[str], str], message: str) -> None:
    """What readers of JSON understand differently is refused."""
    path = folder / "manifest.json"
    path.write_text(change(path.read_text()))
    with pytest.raises(BundleError, match=message):
        load(folder)


def test_slots_that_do_not_fit_are_named() -> None:
    """Not by the allocator's own error."""
    with pytest.raises(BundleError, match=r"'slot:x': cpu has no memory for its 1073741824.0 MiB .*: use a larger"):
        Slots((TensorSpec("slot:x", (2**24, 2**24), "float32"),), torch.device("cpu"))


def test_what_a_runtime_raises_is_told(small: Path) -> None:
    """With the step and the graph; the run then starts anew, since its slots may be half written."""
    runner = load(small)
    (x,), _ = case("separate").inputs(0)
    runner(x)

    def broken(*_: Any) -> Any:
        raise RuntimeError("out of order")

    runner._steps[1] = (broken, {})
    with pytest.raises(CallError, match=r"step 1, graph 0: the onnx runtime failed \(out of order\): check the values"):
        runner(x)
    assert runner.step == 0
    with pytest.raises(CallError, match=r"input 'x' is sparse_coo float32 \[2, 12, 16\] on cpu, expected float32"):
        runner(x.to_sparse())
    with pytest.raises(CallError, match=r"input 'x' is float32 \[2, 12, 16\] on meta, expected float32"):
        runner(x.to("meta"))


def test_a_file_that_cannot_be_read_is_named(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """For want of permission, say."""
    read_bytes, file_entry = Path.read_bytes, manifests.file_entry

    def denied(path: Path) -> Any:
        raise PermissionError("not yours")

    monkeypatch.setattr(manifests, "file_entry", denied)
    with pytest.raises(BundleError, match=r"plan.safetensors: cannot be read \(not yours\)"):
        load(folder)
    monkeypatch.setattr(manifests, "file_entry", file_entry)
    monkeypatch.setattr(Path, "read_bytes", denied)
    with pytest.raises(BundleError, match=r"manifest.json: cannot be read \(not yours\)"):
        load(folder)
    monkeypatch.setattr(Path, "read_bytes", read_bytes)


def test_what_a_bundle_says_is_shown_as_it_is(folder: Path) -> None:
    """Words of a bundle are no markup for the terminal."""
    rewrite(folder, lambda d: d["tools"].update({"torch": "[/red]"}) or d["inputs"][0].update(meaning="[/bold] noise"))
    shown = CliRunner().invoke(app, ["inspect", str(folder)])
    assert shown.exit_code == 0, shown.output
    assert "[/red]" in shown.output
    assert "[/bold]" in shown.output
