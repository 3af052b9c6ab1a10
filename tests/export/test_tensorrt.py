"""TensorRT bundles, with stand-ins for the libraries: what tcc itself does, not what TensorRT does."""

from __future__ import annotations

import functools
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

import tcc
from tcc.errors import BundleError, ExportError
from tcc.export import Runner, bundle, load
from tcc.export import tensorrt as builder
from tcc.export.machine import arch_of
from tcc.export.manifest import Manifest, read
from tcc.export.profiles import merge
from tcc.export.tensorrt_engine import open_tensorrt
from tcc.export.verify import verify
from tcc.plan import CachePlan, Update
from tests.export.bundles import STEPS, counts, flat_inputs, half, mixed, session
from tests.running import CLOSE
from tests.tiny_models import case

pytest.importorskip("onnxruntime", reason="needs the ONNX packages: pip install 'tcc[onnx]'")
stand_in = pytest.importorskip(
    "tests.export.stand_in_tensorrt", reason="needs the ONNX packages: pip install 'tcc[onnx]'"
)
CPU = torch.device("cpu")


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[tuple[Any, ...]]]:
    """What the stand-ins were asked, on a machine that believes that it has a GPU of sm89."""
    for name, module in stand_in.modules().items():
        monkeypatch.setitem(sys.modules, name, module)
    monkeypatch.setattr(builder, "gpu_arch", lambda target, arch: "sm89")
    monkeypatch.setattr("tcc.export.machine.arch_of", lambda device: "sm89")
    compile_program = builder.compile_program
    monkeypatch.setattr("tcc.export.targets.compile_program", lambda v, w, device: compile_program(v, w, CPU))
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: stand_in.Stream())
    monkeypatch.setattr(torch.cuda, "Event", stand_in.Event)
    stand_in.CALLS.clear()
    yield stand_in.CALLS
    stand_in.CALLS.clear()


def opened(folder: Path) -> Runner:
    """What `tcc.load` returns where there is a GPU."""
    manifest = read(folder)
    tensors, plan = load_file(folder / "tensors.safetensors"), CachePlan.load(str(folder / "plan.safetensors"))
    return Runner(plan, manifest, list(open_tensorrt(folder, manifest, CPU)), tensors, CPU)


def named(calls: list[tuple[Any, ...]], name: str) -> list[tuple[Any, ...]]:
    """The arguments of all calls of that name."""
    return [arguments for called, *arguments in calls if called == name]  # type: ignore[misc]


@pytest.mark.parametrize("target", ["tensorrt-onnx", "tensorrt"])
def test_engines_run_the_plan_on_bound_memory(target: str, tmp_path: Path, calls: list[tuple[Any, ...]]) -> None:
    """Two runs equal the compiled model; one engine per variant, nothing copied, one memory for all activations."""
    which = case("dit")
    written = bundle(which.model, mixed, (which.args, which.kwargs), tmp_path / "made", target=target)
    manifest: Manifest = written.manifest
    assert [graph.file for graph in manifest.graphs] == [f"step{number}.engine" for number in range(4)]
    assert {*manifest.files} == {"plan.safetensors", "tensors.safetensors", *(graph.file for graph in manifest.graphs)}
    assert (manifest.arch, manifest.device, manifest.tools["tensorrt"]) == ("sm89", "cuda", "11.0.0.stand.in")
    if target == "tensorrt-onnx":
        assert named(calls, "create_network") == [[1 << 1]] * 4  # strongly typed
        assert named(calls, "build") == [[frozenset()]] * 4  # neither TF32 nor REFIT
    else:
        for (settings,) in named(calls, "convert"):
            assert settings["immutable_weights"]
            assert settings["require_full_compilation"]
            assert settings["disable_tf32"]
            assert settings["use_explicit_typing"]
            assert not settings["attn_bias_is_causal"]
    calls.clear()
    runner = opened(written.folder)
    assert named(calls, "context") == [["USER_MANAGED"]] * 4
    assert len({address for address, _ in named(calls, "memory")}) == 1
    compiled = session(which)
    for _ in range(2):
        errors = list(verify(runner, compiled, functools.partial(flat_inputs, which)))
        assert max(error.relative for error in errors) < CLOSE
    assert runner.copied_bytes == 0
    assert named(calls, "execute") == [[stand_in.Stream.cuda_stream]] * (2 * STEPS)
    order = [name for name, *_ in calls if name in ("wait", "execute", "record")]
    assert order == ["wait", "execute", "record"] * (2 * STEPS)  # engines of two streams never share activations


def test_one_engine_has_a_profile_for_each_count(tmp_path: Path, calls: list[tuple[Any, ...]]) -> None:
    """Graphs that differ in that alone share a file; the others have their own; all compute the same as before."""
    which = case("dit")
    example = (which.args, which.kwargs)
    written = bundle(which.model, counts, example, tmp_path / "made", target="tensorrt-onnx", profiles=True)
    manifest = written.manifest
    assert [(g.file, g.entry) for g in manifest.graphs] == [
        ("step0.engine", ""), ("step1.engine", "0"), ("step1.engine", "1")
    ]  # fmt: skip
    assert {*manifest.files} == {"plan.safetensors", "tensors.safetensors", "step0.engine", "step1.engine"}
    runner = opened(written.folder)
    assert named(calls, "profile") == [[0], [1]]
    model = tcc.compile(which.model, counts, example_inputs=example, backend="eager")
    inputs = functools.partial(flat_inputs, which)
    errors = list(verify(runner, lambda *tensors: model.session._run(list(tensors)), inputs))
    assert len(errors) == 4
    assert max(error.relative for error in errors) < CLOSE
    for entry in ("7", "-1", "one"):
        graphs = tuple(replace(graph, entry=entry) for graph in manifest.graphs)
        with pytest.raises(BundleError, match=rf"step0.engine: the engine has no optimisation profile '{entry}'"):
            open_tensorrt(written.folder, replace(manifest, graphs=graphs), CPU)
    swapped = (manifest.graphs[0], replace(manifest.graphs[1], entry="1"), manifest.graphs[2])
    with pytest.raises(BundleError, match=r"step1.engine: the optimisation profile 1 is for other shapes"):
        open_tensorrt(written.folder, replace(manifest, graphs=swapped), CPU)


def reshaping(count: int, target: list[int]) -> Any:
    """An ONNX graph that reshapes an input of `[count, 6]`."""
    helper, kinds = stand_in.onnx.helper, stand_in.onnx.TensorProto
    graph = helper.make_graph(
        [helper.make_node("Reshape", ["x", "target"], ["y"])],
        "graph",
        [helper.make_tensor_value_info("x", kinds.FLOAT, [count, 6])],
        [helper.make_tensor_value_info("y", kinds.FLOAT, None)],
        [helper.make_tensor("target", kinds.INT64, [len(target)], target)],
    )
    return helper.make_model(graph)


def test_graphs_are_one_where_a_single_number_differs() -> None:
    """Two numbers, or one beside a -1 that nothing explains, keep graphs apart."""
    (merged,) = merge([reshaping(4, [2, 2, 6]), reshaping(8, [2, 4, 6])])
    assert (merged.numbers, merged.shapes) == ((0, 1), ({"x": (4, 6)}, {"x": (8, 6)}))
    assert stand_in.onnx.numpy_helper.to_array(merged.model.graph.initializer[0]).tolist() == [2, -1, 6]
    assert merged.model.graph.input[0].type.tensor_type.shape.dim[0].dim_param == "x.0"
    for other in (reshaping(8, [4, 4, 3]), reshaping(8, [8, 6]), reshaping(8, [2, 4, 3, 2])):
        assert [each.numbers for each in merge([reshaping(4, [2, 2, 6]), other])] == [(0,), (1,)]
    assert [each.numbers for each in merge([reshaping(4, [-1, 2, 6]), reshaping(8, [-1, 4, 6])])] == [(0,), (1,)]


def test_profiles_are_refused_where_they_do_not_apply(tmp_path: Path, calls: list[tuple[Any, ...]]) -> None:
    """Graphs that differ in more than counts, and other targets."""
    which = case("dit")
    example = (which.args, which.kwargs)
    plan = CachePlan(num_steps=1, actions={})
    with pytest.raises(ExportError, match=r"no two graphs differ only in how many tokens they keep"):
        bundle(which.model, plan, example, tmp_path / "made", target="tensorrt-onnx", profiles=True)
    with pytest.raises(ExportError, match=r"profiles=True with target='onnx': only tensorrt-onnx"):
        bundle(which.model, plan, example, tmp_path / "made", profiles=True)
    assert not list(tmp_path.iterdir())


def test_what_is_no_engine_or_another_one_is_refused(tmp_path: Path, calls: list[tuple[Any, ...]]) -> None:
    """By the file's name, when the bundle is opened; in half precision, whose types are the model's."""
    model, example = half(case("dit"))
    actions = {(1, "blocks.0.mlp.delta"): Update("few")}
    plan = CachePlan(num_steps=2, actions=actions, tokens={"few": torch.arange(0, 16, 3)})
    folder = bundle(model, plan, example, tmp_path / "made", target="tensorrt-onnx").folder
    assert {spec.dtype for spec in read(folder).slots} == {"float16"}
    opened(folder)
    first, second = folder / "step0.engine", folder / "step1.engine"
    content = first.read_bytes()
    first.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    with pytest.raises(BundleError, match=r"step0.engine: the content does not match the manifest"):
        read(folder)
    first.write_bytes(content)
    manifest = read(folder)
    first.write_bytes(second.read_bytes())
    with pytest.raises(
        BundleError, match=r"step0.engine: the engine has other tensors than the manifest says: \['kept_0'"
    ):
        open_tensorrt(folder, manifest, CPU)
    first.write_bytes(b"no engine")
    with pytest.raises(BundleError, match=r"step0.engine: TensorRT cannot load the engine: export the bundle anew"):
        open_tensorrt(folder, manifest, CPU)


def test_what_tensorrt_refuses_is_told(tmp_path: Path, calls: list[tuple[Any, ...]]) -> None:
    """The parser's first errors; a build that gives nothing; a converter that raises."""
    machine = builder.tensorrt_machine(None)
    (tmp_path / "source.onnx").write_bytes(b"no model")
    with pytest.raises(ExportError, match=r"TensorRT cannot read the graph: error 0; error 1; error 2$"):
        builder.compile_onnx(tmp_path / "source.onnx", tmp_path / "out", machine)
    stand_in.onnx.save(stand_in.onnx.ModelProto(doc_string="refuse"), tmp_path / "source.onnx")
    with pytest.raises(ExportError, match=r"TensorRT cannot build an engine of the graph"):
        builder.compile_onnx(tmp_path / "source.onnx", tmp_path / "out", machine)
    assert not (tmp_path / "out").exists()


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="engines need a CUDA device, and there is none")
@pytest.mark.parametrize(
    ("target", "package"),
    [
        ("tensorrt", "torch_tensorrt"),
        ("tensorrt-onnx", "tensorrt"),
        ("tensorrt-rtx", "onnxruntime_ep_nv_tensorrt_rtx"),
    ],
)
def test_engines_compute_what_the_compiled_model_computes(target: str, package: str, tmp_path: Path) -> None:
    """On a GPU, in half precision, at every step of two runs: without stand-ins."""
    pytest.importorskip(package, reason=f"target {target} needs {package}")
    arch = arch_of(torch.device("cuda"))
    if target == "tensorrt-rtx" and arch not in ("sm86", "sm89") and int(arch.removeprefix("sm")) < 120:
        pytest.skip(f"TensorRT for RTX does not run on {arch}")
    which = case("dit")
    model, (args, _) = half(which)
    example = (tuple(value.cuda() for value in args), {})
    runner = load(bundle(model.cuda(), mixed, example, tmp_path / "made", target=target).folder)
    compiled = tcc.compile(model, mixed, example_inputs=example, backend="eager")

    def inputs(step: int) -> list[torch.Tensor]:
        return [x.half().cuda() if x.is_floating_point() else x.cuda() for x in flat_inputs(which, step)]

    for _ in range(2):
        errors = list(verify(runner, lambda *tensors: compiled.session._run(list(tensors)), inputs))
        assert len(errors) == STEPS
        assert max(error.relative for error in errors) < 2e-2
    assert runner.copied_bytes == 0
