"""`tcc run`: any bundle, by what its manifest says of its inputs."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import typer
from safetensors.torch import load_file, save_file
from typer.testing import CliRunner

from tcc.cli import app
from tcc.cli.feeds import Parts
from tcc.cli.run import _Calling, _count, _labels, _solver
from tcc.errors import CallError
from tcc.export.manifest import Input
from tcc.samplers import DDIM, DPMSolver2, Evaluation, denoise, guide
from tests.export.bundles import STEPS, session
from tests.tiny_models import case, relative_error, tensor_of

pytest.importorskip("onnx", reason="needs the ONNX packages: pip install 'tcc[onnx]'")


def run(*arguments: object) -> tuple[int, str]:
    """Exit code and output of `tcc run`, as one line."""
    result = CliRunner().invoke(app, ["run", *map(str, arguments)], env={"COLUMNS": "400"})
    return result.exit_code, " ".join(result.output.replace("│", " ").split())


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with tensors for the inputs of the tiny PixArt, and some that do not fit."""
    folder = tmp_path_factory.mktemp("files")
    text = case("hf_pixart").kwargs["encoder_hidden_states"]
    np.save(folder / "text.npy", text.double().numpy())
    np.save(folder / "objects.npy", np.array([{}], dtype=object), allow_pickle=True)
    np.save(folder / "labels.npy", np.array([3, 11]))
    save_file({"a": text, "b": text.clone()}, folder / "two.safetensors")
    save_file({"mask": case("hf_pixart").kwargs["encoder_attention_mask"]}, folder / "mask.safetensors")
    (folder / "cut.safetensors").write_bytes(b"\xff")
    return folder


@pytest.mark.parametrize("scale", [1.0, 4.0])
def test_a_model_with_text_is_drawn(scale: float, written: Any, files: Path) -> None:
    """The latents are those of a sampling loop by hand, around the compiled model; guidance halves the batch."""
    which, out = case("hf_pixart"), files / f"latents{scale}.safetensors"
    given = (f"encoder_hidden_states={files / 'text.npy'}", f"encoder_attention_mask={files / 'mask.safetensors'}")
    arguments = ("--input", given[0], "--input", given[1], "--cfg", scale, "--seed", 3, "--out", out)
    code, output = run(written("hf_pixart").folder, *arguments)
    assert code == 0, output
    compiled, kwargs = session(which), which.kwargs
    names = [spec.name for spec in which.info.captured.inputs]

    def evaluate(x: torch.Tensor, at: Evaluation) -> torch.Tensor:
        rows = torch.cat([x, x]) if scale > 1 else x
        feeds = kwargs | {"hidden_states": rows, "timestep": torch.full((2,), at.timestep)}
        found = tensor_of(compiled(*(feeds[name] for name in names)))
        return guide(found, scale, 4) if scale > 1 else found

    start = torch.randn(1 if scale > 1 else 2, 4, 8, 8, generator=torch.Generator().manual_seed(3))
    with torch.no_grad():
        *_, expected = denoise(DDIM(clip=False), evaluate, start, STEPS)
    assert relative_error(load_file(out)["images"], expected) < 1e-3  # of six steps that feed each other


def test_labels_that_fit_are_the_default(written: Any, files: Path) -> None:
    """Without classes: 0, 1, ...; a file of labels does as well, and then nothing is said of classes."""
    folder, out = written("dit").folder, files / "labels.safetensors"
    assert run(folder, "--out", out)[0] == 0
    by_default = load_file(out)
    assert by_default["labels"].tolist() == [0, 1]
    np.save(files / "y.npy", np.array([0, 1], dtype=np.int32))
    assert run(folder, "--out", out, "--input", f"y={files / 'y.npy'}")[0] == 0
    assert torch.equal(load_file(out)["images"], by_default["images"])


#: `TEXT` stands for the name of an input, `IN` for a folder with files.
REFUSED = [
    ("hf_pixart", "", "these inputs have no default: TEXT: float32, 2 batch x 7 rows x 24 channels; features of what"),
    (
        "hf_pixart",
        "",
        "encoder_attention_mask: float32, 2 batch x 7 rows; a mask: which rows count. Give each: --in",
    ),
    ("hf_pixart", "--input encoder_attention_mask=1", "this input has no default: TEXT: float32"),
    ("hf_pixart", "--input hidden_states=0", "no input is left that is drawn: hidden_states: float32, 2 batch x 4 ch"),
    ("hf_pixart", "--input words=IN/text.npy", "write NAME=FILE or NAME=NUMBER; the inputs are hidden_states: float32"),
    ("hf_pixart", "--input timestep=3", "timestep is the timestep, which the sampler gives"),
    ("hf_pixart", "--input TEXT=IN/no.npy", "there is no such file"),
    ("hf_pixart", "--input TEXT=red", "neither a .npy file, nor a .safetensors file, nor a number"),
    ("hf_pixart", "--input TEXT=IN/objects.npy", "objects.npy: cannot be read (Object arrays"),
    ("hf_pixart", "--input TEXT=IN/cut.safetensors", "cut.safetensors: cannot be read ("),
    ("hf_pixart", "--input TEXT=IN/two.safetensors", "holds a, b; name the tensor TEXT, or let it be alone"),
    ("hf_pixart", "--input TEXT=IN/mask.safetensors", "float32 [2, 7] does not fit TEXT: float32, 2 batch x 7 rows"),
    ("dit", "--input y=1.5", "y=1.5: neither a .npy file, nor a .safetensors file, nor a whole number"),
    ("dit", "--input y=IN/labels.npy", "int64 [2] holds 3 to 11, which does not fit y: int64 in 0 to 10, 2 batch"),
    ("dit", "--input y=1 --classes 1,2", "the bundle has no labels to choose"),
    ("dit", "--classes 1,11", "there is no label 11: y: int64 in 0 to 10, 2 batch; a label for each sample"),
    ("dit", "--sampler flow-euler", "flow-euler evaluates at fractions of timesteps, and the bundle takes whole ones"),
    ("dit", "--out IN/no.png", "draws [4, 8, 8], which is no picture of 1 or 3 channels: --out FILE.safetensors"),
]


@pytest.mark.parametrize(("name", "arguments", "message"), REFUSED)
def test_what_does_not_fit_is_refused(name: str, arguments: str, message: str, written: Any, files: Path) -> None:
    """Before anything is drawn, by what the input is."""
    given = arguments.replace("TEXT", "encoder_hidden_states").replace("IN/", f"{files}/").split()
    code, output = run(written(name).folder, "--out", files / "no.safetensors", *given)
    assert code != 0
    assert message.replace("TEXT", "encoder_hidden_states") in output
    assert not (files / "no.safetensors").exists()
    assert not (files / "no.png").exists()


def test_samples_that_no_sampler_takes_are_refused() -> None:
    """Outputs unlike the sample, and an odd batch under guidance; tokens `[B, S, D]` are fine."""
    where, out = Path("bundle"), Path("out.safetensors")
    assert _count(where, (4, 16, 8), (4, 16, 8), out, guided=True) == 2
    with pytest.raises(CallError, match=r"returns \[2, 9\] for a sample \[2, 4, 8, 8\], which no sampler"):
        _count(where, (2, 4, 8, 8), (2, 9), out, guided=False)
    with pytest.raises(CallError, match=r"made for a batch of 3, and guidance takes two rows per sample: --cfg 1"):
        _count(where, (3, 4, 8, 8), (3, 8, 8, 8), out, guided=True)


def parts(channels: int, level: str) -> Parts:
    """The inputs of a bundle that draws two images of 8 x 8, told its noise level in a dtype."""
    sample = Input("x", (2, channels, 8, 8), "float32", role="sample", axes=("batch", "channels", "height", "width"))
    return Parts(sample, Input("sigma", (2,), level, role="timestep", axes=("batch",)), None, {})


def test_guidance_needs_a_condition() -> None:
    """Of a bundle that takes a latent and a noise level alone both halves of a call would be alike."""
    where, given = Path("bundle"), parts(4, "float32")
    assert _labels(where, given, None, None, 2, guided=False) is None
    with pytest.raises(typer.BadParameter, match="the bundle has no condition to leave out") as caught:
        _labels(where, given, None, None, 1, guided=True)
    assert caught.value.param_hint == "--cfg"
    assert _labels(where, replace(given, given={"text": torch.zeros(2, 3)}), None, None, 1, guided=True) is None


def test_a_flow_is_told_fractions() -> None:
    """The sampler's timesteps times the scale; of several outputs the first is the velocity."""
    told = []

    def bundle(x: torch.Tensor, sigma: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        told.append(sigma.tolist())
        return torch.ones_like(x), x

    given = parts(4, "float32")
    bundle.device = torch.device("cpu")  # type: ignore[attr-defined]
    calling = _Calling(bundle, given, None, 1.0, 0.001)  # type: ignore[arg-type]
    *_, image = denoise(_solver("flow-euler", given, 4, 0.001, None), calling, torch.zeros(2, 4, 8, 8), 4)
    assert told == [pytest.approx([level, level]) for level in (1.0, 0.75, 0.5, 0.25)]
    assert torch.allclose(image, torch.full_like(image, -1.0))


def test_pixels_are_clipped_and_latents_are_not() -> None:
    """Where nothing is said; a solver between the timesteps takes whole ones where the model does."""
    assert _solver("ddim", parts(3, "int64"), 4, 1.0, None) == DDIM(clip=True)
    assert _solver("ddim", parts(4, "int64"), 4, 1.0, None) == DDIM(clip=False)
    assert _solver("ddim", parts(4, "int64"), 4, 1.0, True) == DDIM(clip=True)
    assert _solver("dpm-solver-2", parts(4, "int64"), 4, 1.0, None) == DPMSolver2(clip=False, whole=True)
    assert _solver("dpm-solver-2", parts(4, "float32"), 4, 1.0, None) == DPMSolver2(clip=False)
    with pytest.raises(typer.BadParameter, match="evaluat"):
        _solver("dpm-solver-2", parts(4, "float32"), 3, 1.0, None)
