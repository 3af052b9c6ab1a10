"""The training script, on a synthetic data set of a few images."""

from __future__ import annotations

import gzip
import importlib.util
import struct
import sys
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
import safetensors.torch
import torch

from tcc.data import fashion_mnist
from tcc.models import DiT, load_dit, save_weights

SCRIPT = Path(__file__).parents[1] / "benchmarks" / "train_reference.py"
TINY = "--width 16 --depth 1 --heads 2 --patch 16 --batch 8 --threads 1 --log-every 2 --sheet-every 100"


@pytest.fixture(scope="module")
def script() -> ModuleType:
    """The script as a module."""
    spec = importlib.util.spec_from_file_location("train_reference", SCRIPT)
    assert spec
    assert spec.loader
    module = importlib.util.module_from_spec(spec)
    sys.modules["train_reference"] = module  # dataclasses look their module up by name
    spec.loader.exec_module(module)
    return module


@pytest.fixture(autouse=True)
def _own_threads_and_seed() -> object:
    """Give back the thread count and the random state that the script sets."""
    threads, state = torch.get_num_threads(), torch.get_rng_state()
    yield
    torch.set_num_threads(threads)
    torch.set_rng_state(state)


def write_idx(path: Path, values: np.ndarray, *, zipped: bool = True) -> None:
    """Write unsigned bytes as an IDX file."""
    header = b"\x00\x00\x08" + bytes([values.ndim]) + struct.pack(f">{values.ndim}I", *values.shape)
    content = header + values.astype(np.uint8).tobytes()
    path.write_bytes(gzip.compress(content) if zipped else content)


@pytest.fixture
def data(tmp_path: Path) -> Path:
    """A folder like Fashion-MNIST's with 32 training and 10 test images."""
    folder = tmp_path / "data"
    folder.mkdir()
    random = np.random.default_rng(0)
    for prefix, count in (("train", 32), ("t10k", 10)):
        write_idx(folder / f"{prefix}-images-idx3-ubyte.gz", random.integers(0, 256, (count, 28, 28)))
        write_idx(folder / f"{prefix}-labels-idx1-ubyte.gz", np.arange(count) % 10)
    return folder


def run(script: ModuleType, data: Path, out: Path, options: str) -> int:
    """Run the script's command line."""
    return script.main(["--data", str(data), "--out", str(out), *TINY.split(), *options.split()])


def test_idx_files_read_gzipped_or_not(tmp_path: Path) -> None:
    """read_idx returns the array that was written, from both forms."""
    values = np.arange(24).reshape(2, 3, 4)
    for zipped in (True, False):
        write_idx(tmp_path / "x", values, zipped=zipped)
        np.testing.assert_array_equal(fashion_mnist.read_idx(tmp_path / "x"), values)


def test_images_are_padded_evenly(data: Path) -> None:
    """28x28 images sit in the middle of 32x32, and 0..255 maps to [-1, 1]."""
    images, labels = fashion_mnist.load(data, "test")

    assert images.shape == (10, 1, 32, 32)
    assert labels.tolist() == list(range(10))
    raw = fashion_mnist.read_idx(data / "t10k-images-idx3-ubyte.gz")
    np.testing.assert_array_equal(images[:, 0, 2:30, 2:30].numpy(), raw)
    assert images[:, 0, :2].sum() + images[:, 0, :, 30:].sum() == 0
    assert fashion_mnist.to_signal(torch.tensor([0, 255], dtype=torch.uint8)).tolist() == [-1.0, 1.0]


@pytest.mark.parametrize(("content", "message"), [(b"PK12", "is not an IDX file"), (None, "is cut short")])
def test_damaged_idx_files_are_refused(tmp_path: Path, content: bytes | None, message: str) -> None:
    """A file of another kind and a truncated file are told apart."""
    write_idx(tmp_path / "x", np.zeros((2, 3)), zipped=False)
    (tmp_path / "x").write_bytes(content or (tmp_path / "x").read_bytes()[:-1])

    with pytest.raises(ValueError, match=message):
        fashion_mnist.read_idx(tmp_path / "x")


def test_a_killed_run_resumes_to_the_same_weights(
    script: ModuleType, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Six steps, and six steps killed in the fifth and resumed from the third, end bit-identical."""
    options = "--steps 6 --save-every 3"
    assert run(script, data, tmp_path / "whole", options) == 0

    def dies_in_the_fifth(trainer: object, step: object = script.Trainer.train_step) -> object:
        if trainer.step == 4:
            raise KeyboardInterrupt
        return step(trainer)

    with monkeypatch.context() as patch:
        patch.setattr(script.Trainer, "train_step", dies_in_the_fifth)
        with pytest.raises(KeyboardInterrupt):
            run(script, data, tmp_path / "killed", options)
    assert run(script, data, tmp_path / "killed", options) == 0

    whole = safetensors.torch.load_file(tmp_path / "whole" / "checkpoint.safetensors")
    killed = safetensors.torch.load_file(tmp_path / "killed" / "checkpoint.safetensors")
    assert whole.keys() == killed.keys()
    assert all(torch.equal(whole[name], killed[name]) for name in whole)


def test_a_run_leaves_weights_a_sheet_and_a_log(script: ModuleType, data: Path, tmp_path: Path) -> None:
    """The averaged weights load as a DiT, the sheet is a picture, the log has a line per report."""
    assert run(script, data, tmp_path / "out", "--steps 4") == 0

    stored = safetensors.torch.load_file(tmp_path / "out" / "weights.safetensors")
    assert {name for name in stored if stored[name].dtype != torch.float16} == {"pos_embed"}
    assert load_dit(tmp_path / "out" / "weights.safetensors").config.patch_size == 16
    assert (tmp_path / "out" / "samples_000004.png").read_bytes()[:4] == b"\x89PNG"
    lines = (tmp_path / "out" / "log.txt").read_text().splitlines()
    assert [line.split()[1] for line in lines] == ["2", "4", "4"]
    assert "test loss of the average" in lines[-1]


def test_training_lowers_the_loss(script: ModuleType, data: Path, tmp_path: Path) -> None:
    """Sixty steps on 32 images lower the loss."""
    assert run(script, data, tmp_path / "out", "--steps 60 --log-every 20 --lr 0.01") == 0

    lines = (tmp_path / "out" / "log.txt").read_text().splitlines()
    losses = [float(line.split("loss ")[1].split()[0]) for line in lines if "  loss " in line]
    assert losses[-1] < losses[0]


def test_given_weights_are_the_start(script: ModuleType, data: Path, tmp_path: Path) -> None:
    """With --init and a learning rate of 0 the result is the given weights."""
    sizes = {
        "input_size": 32,
        "patch_size": 16,
        "in_channels": 1,
        "hidden_size": 16,
        "depth": 1,
        "num_heads": 2,
    }
    start = DiT(**sizes, num_classes=10, learn_sigma=False)
    save_weights(start, tmp_path / "w.safetensors")

    assert run(script, data, tmp_path / "out", f"--steps 2 --lr 0 --init {tmp_path / 'w.safetensors'}") == 0

    given, result = load_dit(tmp_path / "w.safetensors"), load_dit(tmp_path / "out" / "weights.safetensors")
    for name, tensor in given.state_dict().items():
        torch.testing.assert_close(result.state_dict()[name], tensor, rtol=1e-3, atol=1e-6)


def test_the_schedule_follows_the_clock_or_the_steps(script: ModuleType) -> None:
    """The share done is the larger of steps and minutes; the rate warms up, decays, and ends at 5 %."""
    settings = script.Settings(steps=1000, minutes=10.0, lr=1.0)

    assert settings.share_done(100, 300.0) == 0.5
    assert settings.share_done(600, 300.0) == 0.6
    assert settings.share_done(100, 6000.0) == 1.0
    assert settings.learning_rate(0, 0.0) == pytest.approx(1 / 200)
    assert settings.learning_rate(500, 0.0) == pytest.approx((1 + 0.05) / 2)
    assert settings.learning_rate(1000, 0.0) == pytest.approx(0.05)


def test_every_image_is_seen_once_per_epoch(script: ModuleType, data: Path) -> None:
    """The batches of an epoch partition the data set, and the next epoch has another order."""
    images, labels = fashion_mnist.load(data)
    settings = script.Settings(width=16, depth=1, heads=2, patch=16, batch=8)
    trainer = script.Trainer(settings, images, labels, device="cpu", fast=False)
    epochs = []
    for start in (0, 4):
        picked = []
        for trainer.step in range(start, start + 4):
            picked += trainer._picked().tolist()
        epochs.append(picked)

    assert sorted(epochs[0]) == sorted(epochs[1]) == list(range(32))
    assert epochs[0] != epochs[1]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ("--steps 0", "give the schedule an end"),
        ("--steps 2 --data nowhere", r"no train-images-idx3-ubyte[.gz] in nowhere"),
        ("--steps 2 --init nowhere.pt", "there is no weight file at nowhere.pt"),
        ("--steps 2 --patch 5", "is not a multiple of patch_size 5"),
    ],
)
def test_mistakes_get_one_line(
    script: ModuleType,
    data: Path,
    tmp_path: Path,
    options: str,
    message: str,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """A wrong command line ends with code 2 and one line that names the offender."""
    assert run(script, data, tmp_path / "out", options) == 2
    errors = capsys.readouterr().err
    assert message in errors
    assert errors.count("\n") == 1


def test_other_settings_cannot_resume(
    script: ModuleType, data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A checkpoint of other settings is refused, and the difference named."""
    assert run(script, data, tmp_path / "out", "--steps 2") == 0

    assert run(script, data, tmp_path / "out", "--steps 4 --lr 0.5") == 2
    assert "run with other settings (lr 0.001 -> 0.5, steps 2 -> 4): choose another --out" in capsys.readouterr().err
