"""Engines for GPUs, as far as a machine without one can tell.

What is missing is named before any work is done, altered engines are never opened, and TensorRT for RTX really builds.
"""

from __future__ import annotations

import json
import platform
import random
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from typer.testing import CliRunner

import tcc
from tcc.cli import app
from tcc.errors import BundleError, ExportError
from tcc.export import bundle, load
from tcc.export.machine import refuse_other, refuse_processor
from tcc.export.manifest import file_entry, read
from tests.export import no_driver
from tests.export.bundles import mixed
from tests.tiny_models import case

pytest.importorskip("onnx", reason="needs the ONNX packages: pip install 'tcc[onnx]'")
from tests.export.mutations import mutate, rewrite  # needs the ONNX packages

ROOT = Path(__file__).parents[2]
TARGETS = ("tensorrt", "tensorrt-onnx", "tensorrt-rtx")


@pytest.mark.parametrize(
    ("target", "package", "extra"),
    [
        ("tensorrt", "tensorrt", "gpu"),
        ("tensorrt-onnx", "tensorrt", "gpu"),
        ("tensorrt-rtx", "onnxruntime_ep_nv_tensorrt_rtx", "rtx"),
        ("tensorrt-rtx", "onnxruntime", "rtx"),
    ],
)
def test_a_missing_library_is_named_before_any_work(
    target: str, package: str, extra: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With what to install; the model is not looked at, and no folder is made."""
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(
        ExportError, match=rf"target='{target}' needs the package {package}: pip install 'tcc\[{extra}\]'"
    ):
        bundle(torch.nn.Identity(), mixed, ((), {}), tmp_path / "deep" / "new", target=target, arch="sm89")
    assert not list(tmp_path.iterdir())


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
@pytest.mark.parametrize("target", ["tensorrt", "tensorrt-onnx"])
def test_tensorrt_needs_the_gpu_that_it_builds_for(
    target: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where there is none, the message says where to export instead."""
    stand_in = type(sys)("tensorrt")
    stand_in.__dict__["__version__"] = "11.0"
    for name in ("tensorrt", "torch_tensorrt"):
        monkeypatch.setitem(sys.modules, name, stand_in)
    with pytest.raises(ExportError, match=rf"target='{target}' builds engines on the GPU that they are for, and torch"):
        bundle(torch.nn.Identity(), mixed, ((), {}), tmp_path / "new", target=target)
    with pytest.raises(ExportError, match=r"arch='ada': GPU architectures are named sm89"):
        bundle(torch.nn.Identity(), mixed, ((), {}), tmp_path / "new", target=target, arch="ada")


@pytest.mark.parametrize("target", ["onnx", "aoti"])
def test_graphs_for_any_device_have_no_architecture(target: str, tmp_path: Path) -> None:
    """Nobody shall believe that such a bundle is for one GPU."""
    with pytest.raises(ExportError, match=rf"target='{target}' is for no GPU architecture, and arch='sm89' was given"):
        bundle(torch.nn.Identity(), mixed, ((), {}), tmp_path / "new", target=target, arch="sm89")


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_the_command_line_says_what_is_missing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In one sentence, with exit code 1, and without a folder."""
    for package in ("tensorrt", "torch_tensorrt", "onnxruntime_ep_nv_tensorrt_rtx"):
        monkeypatch.setitem(sys.modules, package, None)
    info = tcc.inspect(case("dit").model, *case("dit").args)
    plan = tmp_path / "plan.safetensors"
    info.count(tcc.CachePlan(num_steps=1, actions={})).save(str(plan))
    for target in TARGETS:
        command = ["export", "--plan", str(plan), "--out", str(tmp_path / "out"), "--target", target, "--arch", "sm89"]
        result = CliRunner().invoke(app, command)
        assert result.exit_code == 1
        assert f"target='{target}' needs the package" in " ".join(result.output.split())
    assert not (tmp_path / "out").exists()


@pytest.fixture(scope="module")
def original(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A bundle with engines in name alone: bytes that no library made, where the engines lie."""
    plan = tcc.CachePlan(num_steps=3, actions={(1, "blocks.0.mlp.delta"): tcc.Reuse()})
    which = case("separate")
    folder = bundle(which.model, plan, (which.args, {}), tmp_path_factory.mktemp("engines") / "original").folder
    (folder / "weights.safetensors").unlink()
    graphs = json.loads((folder / "manifest.json").read_text())["graphs"]
    files = {}
    for number, graph in enumerate(graphs):
        (folder / graph["file"]).unlink()
        graph.update(file=f"step{number}.engine", weights=[])
        (folder / graph["file"]).write_bytes(random.Random(number).randbytes(5000))
        files[graph["file"]] = vars(file_entry(folder / graph["file"]))

    def change(document: dict[str, Any]) -> None:
        kept = {
            name: entry
            for name, entry in document["files"].items()
            if not name.endswith((".onnx", "weights.safetensors"))
        }
        document.update(target="tensorrt-onnx", arch="sm89", device="cuda", graphs=graphs, files=kept | files)
        document["tools"]["tensorrt"] = "11.0"

    rewrite(folder, change)
    return folder


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_a_bundle_says_what_it_needs(original: Path) -> None:
    """And on what it was to run."""
    assert read(original).arch == "sm89"
    with pytest.raises(
        ExportError, match=r"its tensorrt-onnx engines run on an NVIDIA GPU \(sm89\); torch sees none here"
    ):
        load(original)
    with pytest.raises(ExportError, match=r"run on an NVIDIA GPU \(sm89\); it was to be loaded on cpu"):
        load(original, device="cpu")


def test_an_engine_that_a_graph_names_must_be_listed(original: Path, tmp_path: Path) -> None:
    """TensorRT for RTX has two files for a graph, and both are checked."""
    folder = Path(shutil.copytree(original, tmp_path / "bundle"))
    (folder / "step0.onnx").write_bytes(b"names step0.engine")

    def change(document: dict[str, Any]) -> None:
        document.update(target="tensorrt-rtx")
        document["graphs"][0].update(file="step0.onnx")
        document["files"]["step0.onnx"] = vars(file_entry(folder / "step0.onnx"))
        del document["files"]["step0.engine"]

    rewrite(folder, change)
    with pytest.raises(BundleError, match=r"the file 'step0.engine' is not listed"):
        read(folder)


def test_engines_run_on_the_version_and_the_gpu_they_were_built_for(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every other one is refused, and the message says to export anew."""
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    cuda, tools = torch.device("cuda"), {"tensorrt": "11.0.1"}
    refuse_other("bundle", "sm90", tools, cuda, tensorrt="11.0.1")
    with pytest.raises(
        BundleError, match=r"built with tensorrt 11.0.1, and 11.1.0 is installed: .* export the bundle anew"
    ):
        refuse_other("bundle", "sm90", tools, cuda, tensorrt="11.1.0")
    with pytest.raises(BundleError, match=r"built with tensorrt an unknown version, and 11.0.1 is installed"):
        refuse_other("bundle", "sm90", {}, cuda, tensorrt="11.0.1")
    with pytest.raises(
        BundleError, match=r"engines are for sm89, and cuda is sm90: export the bundle anew with arch='sm90'"
    ):
        refuse_other("bundle", "sm89", tools, cuda, tensorrt="11.0.1")


def test_code_runs_on_processors_that_have_its_instructions(monkeypatch: pytest.MonkeyPatch) -> None:
    """Others would end the process with it; newer ones have those of older ones."""
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: "AVX2")
    kind = platform.machine()
    for level in ("DEFAULT", "AVX2"):
        refuse_processor("bundle", f"{kind} {level}")
    for built in (f"{kind} AVX512", f"{kind} SVE256", "alpha AVX2", "unknown"):
        with pytest.raises(
            BundleError, match=rf"compiled for a processor of {built}, and this is one of {kind} AVX2: .*"
        ):
            refuse_processor("bundle", built)


def test_an_altered_engine_is_never_opened(original: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """An engine is a program: of 400 spoiled bundles, only those reach TensorRT whose engines are whole."""
    engines = {path.name: path.read_bytes() for path in original.glob("*.engine")}
    opened: list[str] = []

    def engine_opener(folder: Path, *_: object) -> None:
        for graph in read(folder).graphs:
            entry = read(folder).files[graph.file]
            assert file_entry(folder / graph.file) == entry
        opened.append(folder.name)
        raise BundleError("opened")

    for target in TARGETS:
        monkeypatch.setitem(tcc.export.runner._OPEN, target, engine_opener)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    with pytest.raises(BundleError, match="opened"):
        load(original)
    assert opened == ["original"]
    for number in range(400):
        folder = Path(shutil.copytree(original, tmp_path / "bundle"))
        what = mutate(folder, random.Random(number))
        same = all(
            (folder / name).exists() and (folder / name).read_bytes() == content for name, content in engines.items()
        )
        opened.clear()
        with pytest.raises((BundleError, ExportError)):
            load(folder)
        assert not opened or same, what
        shutil.rmtree(folder)


BUILD = """
import json, sys
sys.path.insert(0, sys.argv[1])
from pathlib import Path
import onnx, pytest, tcc, torch
from tests.export import no_driver
from tests.export.bundles import chosen, counts, half, mixed
from tests.tiny_models import case
from tcc.export import bundle, tensorrt_rtx
from tcc.export.profiles import merge

with pytest.MonkeyPatch.context() as patch:
    no_driver.pretend(patch)
    model, example = half(case("dit"))
    for name, arch, plan in (
        ("mixed", "sm89", mixed), ("chosen", "sm89", chosen), ("full", "sm120", tcc.CachePlan(num_steps=1, actions={}))
    ):
        bundle(model, plan, example, f"{sys.argv[2]}/{name}", target="tensorrt-rtx", arch=arch)
    try:
        bundle(model, mixed, example, f"{sys.argv[2]}/none", target="tensorrt-rtx", arch="sm77")
    except Exception as error:
        print(type(error).__name__, error)
    made = bundle(model, counts, example, f"{sys.argv[2]}/graphs")
    sources = [onnx.load(made.folder / graph.file, load_external_data=False) for graph in made.manifest.graphs]
    for source in sources:
        del source.metadata_props[:]  # the stamp: each graph has its own
    merged = merge(sources)[1]
    onnx.save(merged.model, made.folder / "merged.onnx")
    ((name,),) = {tuple(shapes) for shapes in merged.shapes}
    shapes = ",".join(f"{name}:{shapes[name][0]}" for shapes in merged.shapes)
    settings = {f"nv_profile_{which}_shapes": shapes for which in ("min", "opt", "max")}
    settings |= {"nv_target_sm": "sm89", "nv_multi_profile_enable": "1"}
    onnxruntime = tensorrt_rtx._plugin()[0]
    options = tensorrt_rtx._options(onnxruntime, torch.device("cuda"), settings)
    compiled = f"{sys.argv[2]}/profiles.onnx"
    onnxruntime.ModelCompiler(options, made.folder / "merged.onnx", True).compile_to_file(compiled)
    print("profiles", shapes, [node.op_type for node in onnx.load(compiled).graph.node])
"""


@pytest.mark.skipif(bool(no_driver.missing()), reason=no_driver.missing())
def test_tensorrt_rtx_builds_an_engine_for_every_graph(tmp_path: Path) -> None:
    """NVIDIA's own parser and builder, for two architectures; the graphs are one node each, beside their engines.

    Also where tokens are chosen in the graph.
    """
    import onnx

    done = subprocess.run(
        [sys.executable, "-c", BUILD, str(ROOT), str(tmp_path)], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr[-2000:]
    assert "ExportError TensorRT for RTX cannot compile the graph for sm77" in done.stdout
    assert (
        "profiles kept_0:8,kept_0:4 ['EPContext']" in done.stdout
    )  # what tensorrt-onnx gives TensorRT with --profiles
    made = {tmp_path / name: read(tmp_path / name) for name in ("mixed", "chosen", "full")}
    assert [manifest.arch for manifest in made.values()] == ["sm89", "sm89", "sm120"]
    for folder, manifest in made.items():
        assert "weights.safetensors" not in manifest.files
        assert manifest.tools["onnxruntime-ep-nv-tensorrt-rtx-cu13"]
        for number, graph in enumerate(manifest.graphs):
            proto = onnx.load(folder / graph.file, load_external_data=False).graph
            (node,) = proto.node
            attributes = {a.name: onnx.helper.get_attribute_value(a) for a in node.attribute}
            assert (node.op_type, attributes["ep_cache_context"]) == ("EPContext", f"step{number}.engine".encode())
            assert {value.name for value in proto.input} == set(manifest.inputs_of(graph))
            assert {value.name for value in proto.output} == set(manifest.outputs_of(graph))
            assert manifest.files[f"step{number}.engine"].bytes > 10_000
