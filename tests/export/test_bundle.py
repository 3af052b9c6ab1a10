"""Writing a bundle: what models return, what is refused and when, and that nothing half-written stays behind."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from tcc.errors import ExportError
from tcc.export import bundle, load
from tcc.info import ModelInfo
from tcc.plan import CachePlan, Compute, Hold
from tests.running import CLOSE
from tests.tiny_models import relative_error

pytest.importorskip("onnx", reason="needs the ONNX packages: pip install 'tcc[onnx]'")

MINE = """
import torch
from torch import nn

class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.norm, self.up, self.down = nn.LayerNorm(16), nn.Linear(16, 32), nn.Linear(32, 16)
    def forward(self, x):
        return x + self.down(torch.relu(self.up(self.norm(x))))

class Mine(nn.Module):
    def __init__(self):
        super().__init__()
        self.label, self.blocks = nn.Embedding(4, 16), nn.Sequential(Block(), Block())
    def forward(self, x, t, y):
        time = torch.sin(t.float()).to(x.dtype)[:, None, None]
        h = x.flatten(2).transpose(1, 2) + self.label(y)[:, None] + time
        return self.blocks(h).transpose(1, 2).reshape(x.shape)
"""
ALONE = """
import sys

class Blocker:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in {"mine", "tests", "diffusers"} or name.startswith("tcc.models"):
            raise ImportError(f"{name} must not be needed")

sys.meta_path.insert(0, Blocker())
import torch, tcc
runner = tcc.load(sys.argv[1])
torch.manual_seed(0)
for step in range(runner.num_steps):
    inputs = [torch.randn(2, 16, 4, 4), torch.tensor([step, step]), torch.tensor([0, 1])]
    print(float(runner(*inputs).double().sum()))
from tcc.cli import app
app(["run", sys.argv[1], "--classes", "0,1", "--out", "images.safetensors"], standalone_mode=False)
app(["inspect", sys.argv[1], "--json", "bundle.json"], standalone_mode=False)
"""


EXAMPLE = (torch.randn(2, 16, 4, 4), torch.tensor([5, 5]), torch.tensor([0, 1]))


def mine() -> nn.Module:
    """The model of that source, as if imported from a file of the user's own."""
    namespace: dict[str, Any] = {"__name__": "mine"}
    exec(compile(MINE, "mine.py", "exec"), namespace)
    torch.manual_seed(0)
    model: nn.Module = namespace["Mine"]().eval()
    return model


class Returning(nn.Module):
    """That model, and something made of its output `o` and its input `x`."""

    def __init__(self, shape: Any) -> None:
        super().__init__()
        self.inner, self.shape = mine(), shape

    def forward(self, x: Tensor, t: Tensor, y: Tensor) -> Any:
        """Denoise."""
        return self.shape(self.inner(x, t, y), x)


def held(info: ModelInfo) -> CachePlan:
    """Two steps: one computes, one holds the stream."""
    return info.count(CachePlan(num_steps=2, actions={(0, "out.stream"): Compute(), (1, "out.stream"): Hold()}))


def test_all_tensors_that_a_model_returns_come_back(tmp_path: Path) -> None:
    """Out of any structure, flattened; one twice, an input as it is, a scalar; None is left out."""
    model = Returning(lambda o, x: {"sample": o, "more": [o, {"mean": o.mean()}, None], "x": x}).eval()
    written = bundle(model, held, (EXAMPLE, {}), tmp_path / "b")
    assert [spec.name for spec in written.manifest.outputs] == ["output_0", "output_1", "output_2", "output_3"]
    sample, again, mean, x = load(written.folder)(*EXAMPLE)
    with torch.no_grad():
        expected = model(*EXAMPLE)
    assert relative_error(sample, expected["sample"]) < CLOSE
    assert torch.equal(sample, again)
    torch.testing.assert_close(mean, expected["more"][1]["mean"], atol=1e-5, rtol=1e-5)
    assert torch.equal(x, EXAMPLE[0])


@pytest.mark.parametrize("other", [3, "epsilon"])
def test_a_returned_value_that_is_no_tensor_is_refused(other: Any, tmp_path: Path) -> None:
    """By its place and value, before anything is written."""
    model = Returning(lambda o, _: (o, other)).eval()
    with pytest.raises(ExportError, match=rf"value 1 of the 2 that the model returns is {other!r}, not a tensor"):
        bundle(model, held, (EXAMPLE, {}), tmp_path / "b")
    assert not list(tmp_path.iterdir())


def test_one_tensor_beside_none_is_the_output(tmp_path: Path) -> None:
    """As many models return it."""
    written = bundle(Returning(lambda o, _: (o, None)).eval(), held, (EXAMPLE, {}), tmp_path / "b")
    assert [spec.name for spec in written.manifest.outputs] == ["output"]
    assert isinstance(load(written.folder)(*EXAMPLE), Tensor)


def test_an_export_that_stops_leaves_nothing(tmp_path: Path) -> None:
    """The folder appears when it is whole: not after an interruption in the middle of a graph."""
    seen = []

    def stop(line: str) -> None:
        seen.append(line)
        if line == "writing graph 2/2":
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        bundle(mine(), held, (EXAMPLE, {}), tmp_path / "b", progress=stop)
    assert "writing graph 1/2" in seen
    assert not list(tmp_path.iterdir())


def test_a_folder_that_cannot_be_made_is_refused_at_once(tmp_path: Path) -> None:
    """Before the model is captured: below a file, and where the user may not write."""
    captured = []

    def policy(info: ModelInfo) -> CachePlan:
        captured.append(info)
        return held(info)

    (tmp_path / "file").write_text("mine")
    with pytest.raises(ExportError, match=r"file/b: cannot be written \((File exists|Not a directory)\): name another"):
        bundle(mine(), policy, (EXAMPLE, {}), tmp_path / "file" / "b")
    if os.geteuid():  # root may write anywhere
        (tmp_path / "locked").mkdir(mode=0o500)
        with pytest.raises(ExportError, match=r"locked/b: cannot be written \(Permission denied\): name another"):
            bundle(mine(), policy, (EXAMPLE, {}), tmp_path / "locked" / "b")
    assert not captured


def test_wrong_arguments_are_named(tmp_path: Path) -> None:
    """A plan's file name for the plan, and a call's arguments that are no pair."""
    with pytest.raises(ExportError, match=r"the plan is 'plan.safetensors': use a policy, or tcc.CachePlan.load"):
        bundle(mine(), "plan.safetensors", (EXAMPLE, {}), tmp_path / "b")  # type: ignore[arg-type]
    with pytest.raises(ExportError, match=r"example_inputs is a pair \(args, kwargs\), a tuple and a dict"):
        bundle(mine(), held, EXAMPLE, tmp_path / "b")  # type: ignore[arg-type]


def test_devices_and_dtypes_that_are_not_there_are_named(tmp_path: Path) -> None:
    """A GPU where there is none; bfloat16 on a CPU, which ONNX Runtime has no operators for."""
    half = (EXAMPLE[0].bfloat16(), *EXAMPLE[1:])
    folder = bundle(mine().bfloat16(), held, (half, {}), tmp_path / "half").folder
    with pytest.raises(ExportError, match=r"cannot run the graph on cpu .* load it on a GPU, or export .* in float32"):
        load(folder)
    if not torch.cuda.is_available():
        with pytest.raises(ExportError, match=r"device cuda: torch sees no CUDA device here: load with device='cpu'"):
            load(folder, device="cuda")


def test_a_bundle_needs_nothing_of_the_model(tmp_path: Path) -> None:
    """A process that cannot import the model's code, nor any of tcc's models, loads, runs, draws and inspects."""
    model = mine()
    written = bundle(model, held, (EXAMPLE, {}), tmp_path / "b")
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", ALONE, str(written.folder)],
        capture_output=True, text=True, check=False, cwd=tmp_path,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    torch.manual_seed(0)
    with torch.no_grad():
        first = model(torch.randn(2, 16, 4, 4), torch.tensor([0, 0]), torch.tensor([0, 1]))
    assert float(done.stdout.split()[0]) == pytest.approx(float(first.double().sum()), abs=1e-3)
    assert (tmp_path / "images.safetensors").exists()
    assert (tmp_path / "bundle.json").exists()
