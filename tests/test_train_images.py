"""Training images: folders of files, and the Fashion-MNIST files."""

from __future__ import annotations

import gzip
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file

from tcc.errors import TrainError
from tcc.train.images import Images, open_images, open_latents


def opened(folder: Path, **options: Any) -> Images:
    """The folder's images, as 8 x 8 RGB for three classes unless overridden."""
    return open_images(folder, **({"size": (8, 8), "channels": 3, "num_classes": 3} | options))


def write(path: Path, pixels: Any) -> None:
    """An image file."""
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.asarray(pixels, dtype=np.uint8)).save(path)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Two classes: one white square and one black; one red picture, twice as wide as high."""
    write(tmp_path / "b" / "x.png", np.full((8, 8), 255))
    write(tmp_path / "a" / "deeper" / "y.bmp", np.zeros((16, 16)))
    red = np.zeros((4, 8, 3))
    red[:, 2:6, 0] = 255
    write(tmp_path / "b" / "z.png", red)
    (tmp_path / "a" / "notes.txt").write_text("no image")
    return tmp_path


def test_folders_are_classes_in_alphabetical_order(folder: Path) -> None:
    """Sub-folders of a class count too, other files do not; pixels are in [-1, 1]."""
    images = opened(folder)
    assert len(images) == 3
    pixels, labels = images.take(torch.tensor([0, 1, 2, 0]))
    assert labels.tolist() == [0, 1, 1, 0]
    assert pixels.shape == (4, 3, 8, 8)
    assert pixels.dtype == torch.float32
    assert torch.equal(pixels[0], torch.full((3, 8, 8), -1.0))
    assert torch.equal(pixels[1], torch.full((3, 8, 8), 1.0))
    assert torch.equal(pixels[3], pixels[0])


def test_numbered_folders_are_classes_by_number(tmp_path: Path) -> None:
    """The number is the label, whichever others there are; what is hidden is no class."""
    for name in ("10", "2", "0", ".ipynb_checkpoints"):
        write(tmp_path / name / "x.png", np.full((8, 8), 0 if name == "10" else 255))
    write(tmp_path / "0" / ".trash" / "x.png", np.zeros((8, 8)))
    images = opened(tmp_path, num_classes=11)
    pixels, labels = images.take(torch.arange(len(images)))
    assert labels.tolist() == [0, 10, 2]
    assert pixels[:, 0, 0, 0].tolist() == [1.0, -1.0, 1.0]
    with pytest.raises(TrainError, match=r"10 is named by a number, .* the model knows labels 0\.\.9: name the"):
        opened(tmp_path, num_classes=10)


def test_what_would_shift_labels_is_refused(folder: Path) -> None:
    """A class without images; images that are in no class."""
    write(folder / "loose.png", np.zeros((8, 8)))
    with pytest.raises(TrainError, match=r"holds 1 images beside its sub-folders, such as loose\.png: move them"):
        opened(folder)
    (folder / "aa" / "deeper").mkdir(parents=True)
    with pytest.raises(TrainError, match=r"aa holds no images, and would count as a class: remove it"):
        opened(folder)


def test_pictures_are_covered_and_cropped_at_the_center(folder: Path) -> None:
    """The middle half of a wide picture is what is left: here all red, up to the filter's reach at the borders."""
    pixels, _ = opened(folder).take(torch.tensor([2]))
    assert torch.equal(pixels[0, 0, :, 2:6], torch.ones(8, 4))
    assert torch.equal(pixels[0, 1:], torch.full((2, 8, 8), -1.0))
    grey, _ = opened(folder, channels=1).take(torch.tensor([2]))
    assert grey.shape == (1, 1, 8, 8)
    tall, _ = opened(folder, size=(16, 4)).take(torch.tensor([0, 2]))
    assert tall.shape == (2, 3, 16, 4)


def test_fashion_mnist_files_are_recognised(tmp_path: Path) -> None:
    """Padded to the model's size."""
    for name, shape in (("images-idx3", (2, 28, 28)), ("labels-idx1", (2,))):
        head = bytes([0, 0, 8, len(shape)]) + b"".join(size.to_bytes(4, "big") for size in shape)
        (tmp_path / f"train-{name}-ubyte.gz").write_bytes(gzip.compress(head + bytes([7] * int(np.prod(shape)))))
    images = opened(tmp_path, size=(32, 32), channels=1, num_classes=10)
    pixels, labels = images.take(torch.tensor([1]))
    assert len(images) == 2
    assert labels.tolist() == [7]
    assert pixels.shape == (1, 1, 32, 32)
    assert float(pixels[0, 0, 0, 0]) == -1
    assert float(pixels[0, 0, 16, 16]) == pytest.approx(7 / 127.5 - 1)
    small, _ = opened(tmp_path, size=(8, 8), channels=1, num_classes=10).take(torch.tensor([0]))
    assert small.unique().tolist() == [pytest.approx(7 / 127.5 - 1)], "scaled down, so not darker than the whole"
    digest = images.digest()
    (tmp_path / "train-labels-idx1-ubyte.gz").write_bytes(gzip.compress(bytes([0, 0, 8, 1, 0, 0, 0, 2, 7, 8])))
    assert opened(tmp_path, size=(32, 32), channels=1, num_classes=10).digest() != digest
    with pytest.raises(TrainError, match="holds no latents: expected one safetensors file per sample"):
        open_images(tmp_path, size=(8, 8), channels=4, num_classes=10)
    with pytest.raises(TrainError, match="holds Fashion-MNIST, grey squares; the model takes 3 x 8 x 8"):
        opened(tmp_path)
    with pytest.raises(TrainError, match=r"images of Fashion-MNIST with labels up to 8, and the model knows 8 "):
        opened(tmp_path, size=(32, 32), channels=1, num_classes=8)


def test_folders_without_images_say_what_was_expected(tmp_path: Path) -> None:
    """Missing, empty, flat, or with more classes than the model knows."""
    with pytest.raises(TrainError, match="there is no folder"):
        opened(tmp_path / "nothing")
    with pytest.raises(TrainError, match=r"holds no images: expected one sub-folder per class .*class-a.0001\.png"):
        opened(tmp_path)
    write(tmp_path / "flat.png", np.zeros((8, 8)))
    with pytest.raises(TrainError, match="holds no images"):
        opened(tmp_path)
    for label in "abcd":
        write(tmp_path / label / "x.png", np.zeros((8, 8)))
    with pytest.raises(TrainError, match="has 4 sub-folders, one per class, and the model knows 3"):
        opened(tmp_path)


def test_grey_images_of_16_bits_keep_their_range(tmp_path: Path) -> None:
    """Dark to bright as with 8 bits; pixels of no known range are refused."""
    ramp = np.linspace(0, 65535, 64).reshape(8, 8)
    (tmp_path / "a").mkdir()
    Image.fromarray(ramp.astype(np.uint16)).save(tmp_path / "a" / "x.png")
    for channels in (1, 3):
        found = opened(tmp_path, channels=channels).take(torch.tensor([0]))[0]
        expected = torch.from_numpy(ramp / 65535 * 2 - 1).float().expand(1, channels, 8, 8)
        torch.testing.assert_close(found, expected, atol=1 / 255, rtol=0)
    for pixels in (ramp.astype(np.float32), ramp.astype(np.int32) * 4):
        (tmp_path / "a" / "x.png").unlink(missing_ok=True)
        Image.fromarray(pixels).save(tmp_path / "a" / "x.tiff")
        with pytest.raises(TrainError, match=r"x\.tiff cannot be read as an image .*convert it to 8 bits\)"):
            opened(tmp_path).take(torch.tensor([0]))


def test_broken_files_are_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """When they are read, whatever the decoder stumbles on: no image, damaged parts, a size beyond all bounds."""
    write(tmp_path / "a" / "broken.png", np.zeros((8, 8)))
    broken = tmp_path / "a" / "broken.png"
    whole = broken.read_bytes()
    pixels = whole.index(b"IDAT") - 4
    short = whole[:pixels] + b"\0\0\0\4IDAT" + whole[pixels + 8 : pixels + 12] + bytes(30)  # and a nameless chunk
    for damage in (b"not a picture", whole[: pixels + 10], short):
        broken.write_bytes(damage)
        with pytest.raises(TrainError, match=r"broken\.png cannot be read as an image .*: repair or remove it"):
            opened(tmp_path).take(torch.tensor([0]))
    broken.write_bytes(whole)
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 10)
    with pytest.raises(TrainError, match=r"broken\.png cannot be read as an image"):
        opened(tmp_path).take(torch.tensor([0]))


@pytest.mark.parametrize(
    "damage",
    # The cut archive has the time in it: named, so that two processes that share the tests name it alike.
    [b"no IDX file", bytes([0, 0, 8, 9, 0]), pytest.param(gzip.compress(b"short", mtime=0)[:-9], id="cut")],
)
def test_damaged_idx_files_are_named(tmp_path: Path, damage: bytes) -> None:
    """Whatever the reader stumbles on."""
    for name in ("images-idx3", "labels-idx1"):
        (tmp_path / f"train-{name}-ubyte.gz").write_bytes(damage)
    with pytest.raises(TrainError, match=r"holds damaged Fashion-MNIST files .*: fetch them again"):
        opened(tmp_path, size=(32, 32), channels=1, num_classes=10)


def test_other_images_have_another_digest(folder: Path) -> None:
    """So that a training that was stopped does not go on with them."""
    before = opened(folder).digest()
    assert opened(folder).digest() == before
    first = opened(folder).files[0][0]  # type: ignore[attr-defined]
    first.write_bytes(first.read_bytes() + b"0")
    assert opened(folder).digest() != before


def test_latents_are_files_of_tensors(tmp_path: Path) -> None:
    """By name, or a label alone; what is missing, broken or of another shape is named."""
    draw = torch.Generator().manual_seed(0)
    rows = [
        {"x": torch.randn(4, 8, 8, generator=draw), "y": torch.tensor(i), "prompt": torch.full((3, 2), float(i))}
        for i in range(3)
    ]
    for number, row in enumerate(rows):
        save_file(row, tmp_path / f"{number}.safetensors")
    x, told = open_latents(tmp_path).take(torch.tensor([2, 0]))
    assert torch.equal(x, torch.stack([rows[2]["x"], rows[0]["x"]]))
    assert told["y"].tolist() == [2, 0]
    assert told["prompt"].shape == (2, 3, 2)
    labelled = open_images(tmp_path, size=(8, 8), channels=4, num_classes=3)
    assert labelled.take(torch.tensor([1]))[1].tolist() == [1]
    before = labelled.digest()
    with pytest.raises(TrainError, match=r"0\.safetensors has no tensor 'label': it has prompt, x, y"):
        open_latents(tmp_path, only="label")
    save_file({"x": torch.zeros(4, 4, 4), "y": torch.tensor(0)}, tmp_path / "3.safetensors")
    other = open_latents(tmp_path, only="y")
    with pytest.raises(TrainError, match=r"3\.safetensors has a tensor 'x' of \[4, 4, 4\]: expected \[4, 8, 8\]"):
        open_images(tmp_path, size=(8, 8), channels=4, num_classes=3).take(torch.tensor([3]))
    assert other.digest() != before
    with pytest.raises(TrainError, match=r"the samples 0\.safetensors, 3\.safetensors have other tensors"):
        other.take(torch.tensor([0, 3]))
    (tmp_path / "4.safetensors").write_bytes(b"none")
    with pytest.raises(TrainError, match=r"4\.safetensors cannot be read as safetensors"):
        open_latents(tmp_path).take(torch.tensor([4]))


@pytest.mark.parametrize(
    ("label", "message"),
    [
        (torch.tensor(4), r"0\.safetensors has label 4, and the model knows labels 0\.\.3"),
        (torch.tensor(-1), r"has label -1, and the model knows"),
        (torch.tensor([1]), r"'y' of shape \[1\] and dtype torch\.int64: a label is one number, int64"),
        (torch.tensor(1.0), r"'y' of shape \[\] and dtype torch\.float32"),
    ],
)
def test_labels_of_latents_are_the_models(tmp_path: Path, label: torch.Tensor, message: str) -> None:
    """A class or, where the model has one, the null class; else the file is named."""
    content = {"x": torch.zeros(4, 8, 8)}
    options: dict[str, Any] = {"size": (8, 8), "channels": 4, "num_classes": 3}
    save_file(content | {"y": torch.tensor(3)}, tmp_path / "0.safetensors")
    assert open_images(tmp_path, **options, null_class=3).take(torch.tensor([0]))[1].tolist() == [3]
    with pytest.raises(TrainError, match=r"0\.safetensors has label 3, and the model knows labels 0\.\.2"):
        open_images(tmp_path, **options)
    save_file(content | {"y": label}, tmp_path / "0.safetensors")
    with pytest.raises(TrainError, match=message):
        open_images(tmp_path, **options, null_class=3)
