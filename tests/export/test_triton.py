"""The layout of a Triton model repository: its structure, and sequences of requests with implicit state."""

from __future__ import annotations

import functools
import importlib.metadata
import importlib.util
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

import tcc
from tcc.errors import BundleError, ExportError
from tcc.export import bundle, load
from tcc.export.triton import lay_out
from tcc.export.verify import verify
from tcc.plan import CachePlan, Compute, Hold, Update
from tests.export.bundles import STEPS, flat_inputs, mixed, session
from tests.running import CLOSE
from tests.tiny_models import case, dit, relative_error, tensor_of

onnx = pytest.importorskip("onnx", reason="needs the ONNX packages: pip install 'tcc[onnx]'")
from tests.export.triton_server import Server, parse  # noqa: E402 # needs ONNX Runtime

MODELS = ("dit", "uvit", "hf_pixart")


@pytest.fixture(scope="module")
def repository(written: Any, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """A function: the folder of the tiny model of that name in a Triton model repository."""
    folder = tmp_path_factory.mktemp("repository")

    @functools.cache
    def make(name: str) -> Path:
        shutil.copytree(written(name).folder, folder / name)
        lay_out(folder / name, written(name).manifest)
        return folder / name

    return make


@pytest.mark.parametrize("name", MODELS)
def test_a_server_runs_sequences_at_the_same_time(name: str, repository: Any) -> None:
    """Two images step by turns, one ends early; then one starts anew under an id that was not ended."""
    which, server = case(name), Server(repository(name))
    first, second = session(which), session(which)
    for step in range(STEPS):
        for number, compiled, seed in ((7, first, step), (8, second, step + 50)):
            tensors = flat_inputs(which, seed)
            (found,) = server.infer(tensors, sequence_id=number, start=step == 0, end=number == 7 and step == STEPS - 1)
            assert relative_error(found, tensor_of(compiled(*tensors))) < CLOSE
    assert list(server.states) == [8]
    for step in range(3):
        tensors = flat_inputs(which, step)
        (found,) = server.infer(tensors, sequence_id=8, start=step == 0, end=False)
        assert relative_error(found, tensor_of(first(*tensors))) < CLOSE


@pytest.mark.parametrize("name", MODELS)
def test_the_version_folder_is_a_bundle(name: str, repository: Any) -> None:
    """Of one graph: `tcc.load` runs it, over and over, and its errors are those of rounding."""
    runner = load(repository(name) / "1")
    for _ in range(2):
        errors = list(verify(runner, session(case(name)), functools.partial(flat_inputs, case(name))))
        assert max(error.relative for error in errors) < CLOSE
    assert runner.copied_bytes == 0
    with pytest.raises(BundleError, match=rf"no bundle, it has no manifest.json: load {repository(name)}/1$"):
        load(repository(name))


def test_the_structure_of_the_repository(repository: Any) -> None:
    """The files that Triton looks for; every weight once, beside the graph; a graph that ONNX calls valid."""
    folder = repository("dit")
    files = sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file())
    parts = ["manifest.json", "model.onnx", "plan.safetensors", "tensors.safetensors", "weights.safetensors"]
    assert files == [*(f"1/{part}" for part in parts), "config.pbtxt"]
    graph = onnx.load(folder / "1" / "model.onnx", load_external_data=False).graph
    outside = [tensor for tensor in graph.initializer if tensor.external_data]
    assert len({tensor.name for tensor in outside}) == len(outside)
    assert {e.value for t in outside for e in t.external_data if e.key == "location"} == {"weights.safetensors"}
    assert (folder / "1" / "model.onnx").stat().st_size < 2**21
    onnx.checker.check_model(str(folder / "1" / "model.onnx"), full_check=True)
    assert sum(node.op_type == "If" for node in graph.node) == 1


def test_the_configuration_by_tritons_own_schema(repository: Any) -> None:
    """What the stand-in's schema reads, the one that NVIDIA ships reads too."""
    try:
        package = importlib.metadata.distribution("tritonclient")
    except importlib.metadata.PackageNotFoundError:
        pytest.skip(
            "NVIDIA's schema comes with tritonclient, which pins older packages: pip install --no-deps tritonclient"
        )
    from google.protobuf import text_format

    file = package.locate_file("tritonclient/grpc/model_config_pb2.py")
    spec = importlib.util.spec_from_file_location("model_config_pb2", str(file))  # its package imports gRPC
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    path = repository("dit") / "config.pbtxt"
    theirs: Any = text_format.Parse(path.read_text(), module.ModelConfig())
    assert theirs.SerializeToString() == parse(path).SerializeToString()


def test_one_variant_needs_no_choice(tmp_path: Path) -> None:
    """A plan that only computes: no `If`, and no slot but the counter."""
    which = case("dit")
    plan = which.info.count(CachePlan(num_steps=2, actions={}))
    made = bundle(which.model, plan, (which.args, which.kwargs), tmp_path / "dit", layout="triton")
    assert [slot.name for slot in made.manifest.slots] == ["slot:step"]
    assert not [node for node in onnx.load(made.folder / "model.onnx").graph.node if node.op_type == "If"]
    (found,) = Server(tmp_path / "dit").infer(flat_inputs(which, 0), sequence_id=1, start=True, end=True)
    with torch.no_grad():
        assert relative_error(found, which.model(*flat_inputs(which, 0))) < CLOSE


def test_steps_of_a_variant_look_their_tokens_up(tmp_path: Path) -> None:
    """Four steps of one variant take turns with two token sets: the graph's own table says which step has which."""
    which, site = case("dit"), "blocks.1.mlp.delta"
    sets = {"even": torch.arange(0, 16, 2), "odd": torch.arange(1, 16, 2)}
    turns = {(step, site): Update("odd" if step % 2 else "even") for step in range(1, 5)}
    plan = which.info.count(CachePlan(num_steps=5, actions={(0, site): Compute(), **turns}, tokens=sets))
    made = bundle(which.model, plan, (which.args, which.kwargs), tmp_path / "dit", layout="triton")
    compiled = tcc.compile(which.model, plan, example_inputs=(which.args, which.kwargs), backend="eager")
    server = Server(made.folder.parent)
    for step in range(5):
        tensors = flat_inputs(which, step)
        (found,) = server.infer(tensors, sequence_id=1, start=step == 0, end=step == 4)
        assert relative_error(found, compiled(*tensors)) < CLOSE


def test_bfloat16_stays_inside(tmp_path: Path) -> None:
    """Triton's backend takes no bfloat16: inputs, outputs and state are float32, which holds all its values."""
    which = dit(depth=1)
    half = (which.args[0].bfloat16(), *which.args[1:])
    plan = CachePlan(num_steps=2, actions={(0, "out.stream"): Compute(), (1, "out.stream"): Hold()})
    made = bundle(which.model.bfloat16(), plan, (half, {}), tmp_path / "half", layout="triton")
    specs = (*made.manifest.inputs, *made.manifest.outputs, *made.manifest.slots)
    assert {spec.name: spec.dtype for spec in specs} == {
        "x": "float32", "t": "int64", "y": "int64", "output": "float32",
        "slot:step": "int64", "slot:out.stream": "float32",
    }  # fmt: skip
    onnx.checker.check_model(str(made.folder / "model.onnx"), full_check=True)
    kinds = {onnx.TensorProto.BFLOAT16, onnx.TensorProto.INT64}
    assert {t.data_type for t in onnx.load(made.folder / "model.onnx").graph.initializer} <= kinds


def test_other_targets_have_no_such_layout(tmp_path: Path) -> None:
    """Only the graphs of ONNX can be put together."""
    which = case("dit")
    with pytest.raises(
        ExportError, match=r"layout='triton' of target='aoti': use plain, or triton for the target onnx"
    ):
        bundle(which.model, mixed, (which.args, {}), tmp_path / "new", target="aoti", layout="triton")
    assert not list(tmp_path.iterdir())
