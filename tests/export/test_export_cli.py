"""`tcc export`, `tcc run` and `tcc inspect` on a bundle."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from typer.testing import CliRunner

from tcc.cli import app
from tcc.cli.bundles import ranges
from tcc.driver import compile
from tcc.metrics import psnr
from tcc.models import reference_model
from tcc.plan import CachePlan
from tcc.samplers import sample

pytest.importorskip("onnx", reason="needs the ONNX packages: pip install 'tcc[onnx]'")


def tcc(*arguments: str) -> tuple[int, str]:
    """Exit code and output of a command."""
    result = CliRunner().invoke(app, list(arguments))
    return result.exit_code, " ".join(result.output.split())


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a bundle of the reference model under a forecast of four steps, and the numbers of its export."""
    folder = tmp_path_factory.mktemp("cli")
    plan, bundle = str(folder / "plan.safetensors"), str(folder / "bundle")
    assert tcc("plan", "--policy", "forecast", "--steps", "4", "--batch", "4", "-o", "i_steps=2", "--out", plan)[0] == 0
    code, output = tcc(
        "export", "--plan", plan, "--out", bundle, "--verify", "--backend", "eager", "--json", str(folder / "n.json")
    )
    assert code == 0, output
    assert "onnx for cpu, 4 steps" in output
    assert "weights.safetensors" in output
    return folder


def test_export_verifies_and_writes_numbers(folder: Path) -> None:
    """The errors of all steps, and the files with their sizes."""
    numbers = json.loads((folder / "n.json").read_text())
    assert [error["step"] for error in numbers["errors"]] == [0, 1, 2, 3]
    assert max(error["relative"] for error in numbers["errors"]) < 1e-5
    files = numbers["bundle"]["files"]
    assert files["weights.safetensors"] == (folder / "bundle" / "weights.safetensors").stat().st_size
    assert sum(files.values()) == numbers["bundle"]["bytes"]
    assert sum(files.values()) < 1.1 * files["weights.safetensors"] + files["plan.safetensors"] + 2**21 * 4


def test_inspect_prints_a_bundle(folder: Path) -> None:
    """Inputs, slots, graphs and which steps they run."""
    code, output = tcc("inspect", str(folder / "bundle"), "--json", str(folder / "m.json"))
    assert code == 0
    assert "graphs for 4 steps" in output
    assert "step0.onnx" in output
    assert "4 x 1 x 32 x 32" in output
    assert json.loads((folder / "m.json").read_text())["target"] == "onnx"


def test_run_draws(folder: Path) -> None:
    """Guidance, a picture or the numbers; the same seed draws the same: the images of the compiled model, to 60 dB."""
    bundle, numbers = str(folder / "bundle"), folder / "images.safetensors"
    arguments = ("run", bundle, "--classes", "7,9", "--null-class", "10")
    assert tcc(*arguments, "--out", str(folder / "images.png"))[0] == 0
    assert (folder / "images.png").stat().st_size > 1000
    assert tcc(*arguments, "--out", str(numbers))[0] == 0
    first = load_file(numbers)
    assert first["images"].shape == (2, 1, 32, 32)
    assert tcc(*arguments, "--out", str(numbers))[0] == 0
    assert first["images"].equal(load_file(numbers)["images"])
    inputs = (torch.zeros(4, 1, 32, 32), torch.zeros(4, dtype=torch.int64), torch.zeros(4, dtype=torch.int64))
    plan = CachePlan.load(str(folder / "plan.safetensors"))
    compiled = compile(reference_model(), plan, example_inputs=(inputs, {}), backend="eager")
    noise = torch.randn(2, 1, 32, 32, generator=torch.Generator().manual_seed(0))
    images = sample(compiled, noise, torch.tensor([7, 9]), num_steps=4, cfg_scale=1.5)
    assert psnr(first["images"], images).min() >= 60


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            ("--classes", "1,2,3", "--null-class", "10"),
            "made for a batch of 4, and these classes and this guidance make 6",
        ),
        (("--classes", "1,2", "--cfg", "1.5"), "guidance needs the label that means no class"),
        (("--classes", "1,2", "--null-class", "10", "--device", "moon"), "unknown device 'moon'"),
    ],
)
def test_run_refuses(folder: Path, arguments: tuple[str, ...], message: str) -> None:
    """Another batch, guidance without a null class, a device that there is not."""
    code, output = tcc("run", str(folder / "bundle"), *arguments, "--out", str(folder / "no.png"))
    assert code != 0
    assert message in output
    assert not (folder / "no.png").exists()


def test_a_model_for_triton(folder: Path, tmp_path: Path) -> None:
    """Its version folder is verified and inspected as a bundle; the folder above says where that is."""
    arguments = ("--plan", str(folder / "plan.safetensors"), "--out", str(tmp_path / "dit"), "--layout", "triton")
    code, output = tcc("export", *arguments, "--verify", "--backend", "eager", "--json", str(tmp_path / "n.json"))
    assert code == 0, output
    assert max(error["relative"] for error in json.loads((tmp_path / "n.json").read_text())["errors"]) < 1e-5
    assert (tmp_path / "dit" / "config.pbtxt").exists()
    code, output = tcc("inspect", str(tmp_path / "dit"))
    assert code == 1
    assert f"load {tmp_path}/dit/1" in output
    code, output = tcc("inspect", str(tmp_path / "dit" / "1"))
    assert code == 0
    assert "model.onnx" in output


def test_export_refuses_an_existing_folder(folder: Path) -> None:
    """Nothing is overwritten."""
    code, output = tcc("export", "--plan", str(folder / "plan.safetensors"), "--out", str(folder / "bundle"))
    assert code == 1
    assert "exists: name a new folder, or remove it first" in output


def test_ranges() -> None:
    """Runs of numbers, in short."""
    assert ranges([0, 1, 2, 5, 7, 8]) == "0-2, 5, 7-8"
    assert ranges([]) == ""
