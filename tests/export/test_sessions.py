"""How ONNX Runtime's sessions are made: the device, one copy of the weights, one arena."""

from __future__ import annotations

import functools
import types
from pathlib import Path
from typing import Any

import pytest
import torch

from tcc.errors import BundleError, ExportError
from tcc.export import load
from tcc.export.onnx_engine import _session, _shared
from tcc.export.verify import verify
from tests.export.bundles import flat_inputs, session
from tests.running import CLOSE
from tests.tiny_models import case

onnx = pytest.importorskip("onnx", reason="needs the ONNX packages: pip install 'tcc[onnx]'")
import onnxruntime  # noqa: E402 # is installed with them

CPU = torch.device("cpu")
BOTH = ["CUDAExecutionProvider", "CPUExecutionProvider"]


@pytest.fixture
def opened(written: Any, monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """The providers of sessions that were asked for, on a machine that seems to have a GPU; none is opened."""
    found: list[Any] = []
    written("dit")  # before the machine seems so

    def seem(path: str, options: Any, providers: list[Any]) -> None:
        found.extend(providers)
        raise RuntimeError("not opened")

    monkeypatch.setattr(onnxruntime, "InferenceSession", seem)
    monkeypatch.setattr(onnxruntime, "get_available_providers", lambda: BOTH)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    return found


def test_a_bundle_for_the_cpu_runs_on_the_gpu_where_there_is_one(written: Any, opened: list[Any]) -> None:
    """By ONNX Runtime's provider for CUDA, on the GPU that is asked for; unless the caller says otherwise."""
    folder = written("dit").folder
    assert written("dit").manifest.device == "cpu"
    for device, expected in (
        (None, ("CUDAExecutionProvider", {"device_id": 0})),
        ("cuda:1", ("CUDAExecutionProvider", {"device_id": 1})),
        ("cpu", ("CPUExecutionProvider", {})),
    ):
        opened.clear()
        with pytest.raises(BundleError, match="not opened"):
            load(folder, device=device)
        assert opened == [expected]


@pytest.mark.parametrize("missing", ["provider", "GPU"])
def test_without_a_provider_or_a_gpu_the_default_is_what_it_was_made_for(
    missing: str, written: Any, opened: list[Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Both are needed: ONNX Runtime's provider, and a GPU that torch sees."""
    if missing == "provider":
        monkeypatch.setattr(onnxruntime, "get_available_providers", lambda: BOTH[1:])
    else:
        monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(BundleError, match="not opened"):
        load(written("dit").folder)
    assert opened == [("CPUExecutionProvider", {})]


@pytest.mark.parametrize("told", ["by its providers", "by an error"])
def test_a_provider_that_does_not_load_is_told(
    told: str, written: Any, opened: list[Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """ONNX Runtime lists what it was compiled with; a session whose libraries are missing would run on the CPU."""
    settings: list[str] = []

    class Fallen:
        def __init__(self, path: str, options: Any, providers: list[Any]) -> None:
            settings.append(options.get_session_config_entry("session.disable_cpu_ep_fallback"))
            if told == "by an error":
                raise RuntimeError("graph nodes ..., but fallback to CPU EP has been explicitly disabled by the user.")

        def get_providers(self) -> list[str]:
            return BOTH[1:]

        def get_modelmeta(self) -> Any:
            return types.SimpleNamespace(custom_metadata_map={})

    monkeypatch.setattr(onnxruntime, "InferenceSession", Fallen)
    with pytest.raises(
        ExportError, match=r"step0.onnx: CUDAExecutionProvider was asked for on cuda:1, and .* load .* device='cpu'"
    ):
        load(written("dit").folder, device="cuda:1")
    assert settings == ["1"]


def test_without_packing_the_results_are_the_same(written: Any) -> None:
    """To the rounding of re-ordered sums."""
    runner = load(written("dit").folder, device="cpu", prepack=False)
    errors = list(verify(runner, session(case("dit")), functools.partial(flat_inputs, case("dit"))))
    assert max(error.relative for error in errors) < CLOSE


@pytest.mark.parametrize("prepack", [False, True])
def test_sessions_read_the_weights_where_they_are(prepack: bool, tmp_path: Path) -> None:
    """Without packing a session follows a change of their memory, so it has no copy; with packing it has one."""
    helper, kind = onnx.helper, onnx.TensorProto.FLOAT
    weight, x = torch.randn(64, 64), torch.randn(2, 3, 64)
    (tmp_path / "weights").write_bytes(weight.numpy().tobytes())
    tensor = onnx.TensorProto(name="w", dims=weight.shape, data_type=kind, data_location=onnx.TensorProto.EXTERNAL)
    tensor.external_data.add(key="location", value="weights")
    nodes = [helper.make_node("Transpose", ["w"], ["v"], perm=[1, 0]), helper.make_node("MatMul", ["x", "v"], ["y"])]
    ends = [helper.make_tensor_value_info(name, kind, [2, 3, 64]) for name in "xy"]
    graph = helper.make_graph(nodes, "g", ends[:1], ends[1:], [tensor])
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 22)], ir_version=10)
    onnx.save(model, tmp_path / "g.onnx")
    weights = {"w": _shared(onnxruntime, weight)}
    sessions = [_session(onnxruntime, tmp_path / "g.onnx", weights, BOTH[1], CPU, prepack) for _ in range(2)]
    first = x @ weight.T
    weight.mul_(2)
    for opened in sessions:
        (found,) = opened.run(None, {"x": x.numpy()})
        torch.testing.assert_close(torch.from_numpy(found), first if prepack else 2 * first, atol=1e-4, rtol=1e-4)
