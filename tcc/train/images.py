"""What to train on: a folder of images, Fashion-MNIST, or a folder of latents."""

from __future__ import annotations

import hashlib
import zlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import safetensors
import safetensors.torch
import torch
from PIL import Image
from torch import Tensor

from tcc.data import fashion_mnist
from tcc.errors import TrainError

__all__ = ["FolderImages", "FolderLatents", "Images", "MemoryImages", "open_images", "open_latents"]


class Images(Protocol):
    """Images or latents, by number, with what the model is told of them."""

    def __len__(self) -> int:
        """How many there are."""

    def take(self, picked: Tensor) -> tuple[Tensor, Any]:
        """Images float32 `[N, C, H, W]` in [-1, 1] and labels int64 `[N]`, or the like, for numbers `[N]`."""

    def digest(self) -> str:
        """Tells these images from others, so that a training does not go on with those."""


@dataclass(frozen=True)
class MemoryImages:
    """Images that are held in memory.

    Attributes:
        pixels: uint8 `[count, C, H, W]`.
        labels: int64 `[count]`.
    """

    pixels: Tensor
    labels: Tensor

    def __len__(self) -> int:
        return len(self.pixels)

    def take(self, picked: Tensor) -> tuple[Tensor, Tensor]:
        """See `Images`."""
        return fashion_mnist.to_signal(self.pixels[picked]), self.labels[picked]

    def digest(self) -> str:
        """See `Images`: of all pixels and labels."""
        found = hashlib.sha256(self.pixels.numpy().tobytes())
        found.update(self.labels.numpy().tobytes())
        return found.hexdigest()


@dataclass(frozen=True)
class FolderImages:
    """Image files that are read when they are asked for.

    Attributes:
        files: the files and their labels.
        size: height and width; images are resized until they cover it, and cropped at the center.
        channels: 1 (grey) or 3 (RGB).
    """

    files: tuple[tuple[Path, int], ...]
    size: tuple[int, int]
    channels: int

    def __len__(self) -> int:
        return len(self.files)

    def take(self, picked: Tensor) -> tuple[Tensor, Tensor]:
        """See `Images`."""
        chosen = [self.files[number] for number in picked.tolist()]
        pixels = torch.stack([self._read(path) for path, _ in chosen])
        return fashion_mnist.to_signal(pixels), torch.tensor([label for _, label in chosen])

    def digest(self) -> str:
        """See `Images`: of the files' labels, names and sizes, for reading all of them would take long."""
        return _digest([(label, path.name, path.stat().st_size) for path, label in self.files])

    def _read(self, path: Path) -> Tensor:
        """One image, uint8 `[C, H, W]`."""
        try:
            with Image.open(path) as file:
                image = _of_bytes(file).convert("L" if self.channels == 1 else "RGB")
        except Exception as error:  # what its decoders raise of damaged bytes has no common base
            raise TrainError(
                f"{path} cannot be read as an image ({error}): repair or remove it, and begin anew: a "
                "training goes on with the files that it began with"
            ) from error
        height, width = self.size
        scale = max(height / image.height, width / image.width)
        sizes = max(width, round(image.width * scale)), max(height, round(image.height * scale))
        image = image.resize(sizes, Image.Resampling.BICUBIC)
        left, top = (image.width - width) // 2, (image.height - height) // 2
        pixels = np.array(image.crop((left, top, left + width, top + height)))
        return torch.from_numpy(pixels).view(height, width, self.channels).permute(2, 0, 1)


@dataclass(frozen=True)
class FolderLatents:
    """Latents in safetensors files, one sample in each: tensor `x`, and further ones that the model is told.

    Attributes:
        files: the files.
        only: the one tensor that the model is told; None for all but `x`, by name.
        shape: of every `x`; None where they only have to agree.
        labels: how many labels there are, of which `only` is one; None where it is anything.
    """

    files: tuple[Path, ...]
    only: str | None = None
    shape: tuple[int, ...] | None = None
    labels: int | None = None

    def __len__(self) -> int:
        return len(self.files)

    def take(self, picked: Tensor) -> tuple[Tensor, Any]:
        """The tensors `x`, `[N, ...]`, and the others, `[N, ...]` by name or that which is the only one.

        Raises:
            TrainError: a file cannot be read, lacks a tensor, or has another than is expected.
        """
        samples = [self._read(self.files[number]) for number in picked.tolist()]
        try:
            told = {name: torch.stack([sample[name] for sample in samples]) for name in samples[0]}
        except (KeyError, RuntimeError) as error:
            names = ", ".join(self.files[number].name for number in picked.tolist())
            raise TrainError(f"the samples {names} have other tensors, or of other shapes ({error})") from error
        x = told.pop("x")
        return x, told if self.only is None else told[self.only]

    def digest(self) -> str:
        """See `Images`: of the files' names and sizes."""
        return _digest([(path.name, path.stat().st_size) for path in self.files])

    def _read(self, path: Path) -> dict[str, Tensor]:
        try:
            sample = safetensors.torch.load_file(path)
        except (safetensors.SafetensorError, OSError) as error:
            raise TrainError(f"{path} cannot be read as safetensors ({error}): repair or remove it") from error
        for name in ("x", *([] if self.only is None else [self.only])):
            if name not in sample:
                raise TrainError(f"{path} has no tensor '{name}': it has {', '.join(sorted(sample)) or 'none'}")
        if self.shape is not None and tuple(sample["x"].shape) != self.shape:
            raise TrainError(f"{path} has a tensor 'x' of {list(sample['x'].shape)}: expected {list(self.shape)}")
        if self.only is not None and self.labels is not None:
            _check_label(path, self.only, sample[self.only], self.labels)
        return sample


def open_latents(
    folder: str | Path, *, only: str | None = None, shape: tuple[int, ...] | None = None, labels: int | None = None
) -> FolderLatents:
    """The latents in `folder` and its sub-folders: see `FolderLatents`. They are as the model takes them, scaled.

    Args:
        folder: where they are.
        only: see `FolderLatents`.
        shape: likewise.
        labels: likewise.

    Raises:
        TrainError: there is no such folder, it holds no safetensors files, or the first is not as it should be.
    """
    root = _folder(folder)
    files = tuple(path for path in _visible(root) if path.suffix == ".safetensors")
    if not files:
        raise TrainError(
            f"{root} holds no latents: expected one safetensors file per sample, with the latent as tensor 'x' and "
            f"what the model is told of it {f'as {only!r}' if only else 'as others'}"
        )
    found = FolderLatents(files, only, shape, labels)
    found.take(torch.tensor([0]))
    return found


def open_images(
    folder: str | Path, *, size: tuple[int, int], channels: int, num_classes: int, null_class: int | None = None
) -> Images:
    """The images in `folder`: the Fashion-MNIST files, or one sub-folder of image files per class.

    Args:
        folder: where they are. Labels count the sub-folders from 0 in alphabetical order; where all of them are named
            by numbers, the numbers are the labels. Hidden ones are left out.
        size: height and width to bring them to.
        channels: 1 or 3; of other models the folder holds latents with a label `y`, see `open_latents`.
        num_classes: how many classes the model knows.
        null_class: the label after those, of no class; latents may have it.

    Raises:
        TrainError: there is no such folder, it or a class of it holds no images, there are more classes than the
            model knows, or labels that it does not, or images beside them; or its IDX files are damaged.
    """
    root = _folder(folder)
    if channels not in (1, 3):
        known = num_classes if null_class is None else max(num_classes, null_class + 1)
        return open_latents(root, only="y", shape=(channels, *size), labels=known)
    if any(root.glob("train-images-idx3-ubyte*")):
        if channels != 1 or size[0] != size[1]:
            raise TrainError(
                f"{root} holds Fashion-MNIST, grey squares; the model takes {channels} x {size[0]} x {size[1]}"
            )
        return _open_fashion_mnist(root, size[0], num_classes)
    classes, loose = _classes(root)
    numbered = all(name.isdecimal() for name in classes)
    labels = {name: int(name) if numbered else place for place, name in enumerate(classes)}
    files = tuple((path, labels[name]) for name, inside in classes.items() for path in inside)
    if not files:
        raise TrainError(
            f"{root} holds no images: expected one sub-folder per class with PNG, JPEG or other image files, as in "
            f"{root / 'class-a' / '0001.png'}, or the four Fashion-MNIST files (train-images-idx3-ubyte.gz, ...)"
        )
    if len(classes) > num_classes:
        raise TrainError(
            f"{root} has {len(classes)} sub-folders, one per class, and the model knows {num_classes} classes"
        )
    for name in (name for name, label in labels.items() if label >= num_classes):
        raise TrainError(
            f"{root / name} is named by a number, which is the label of its images, and the model knows labels "
            f"0..{num_classes - 1}: name the sub-folders by labels, or not by numbers alone"
        )
    for name in (name for name, inside in classes.items() if not inside):
        raise TrainError(f"{root / name} holds no images, and would count as a class: remove it, or add its images")
    if loose:
        raise TrainError(
            f"{root} holds {len(loose)} images beside its sub-folders, such as {loose[0].name}: move them into their "
            "classes' folders"
        )
    return FolderImages(files, size, channels)


def _of_bytes(image: Image.Image) -> Image.Image:
    """The same image with a byte for each channel: PIL would cut off what is brighter than 255 of 65535.

    Raises:
        ValueError: its values have no known range.
    """
    if image.mode == "F":
        raise ValueError("its pixels are floating-point numbers of no known range: convert it to 8 bits")
    if not image.mode.startswith("I"):
        return image
    values = np.asarray(image)
    if values.min() < 0 or values.max() > 65535:
        raise ValueError("its pixels have more than 16 bits: convert it to 8 bits")
    return Image.fromarray(np.round(values / 257).astype(np.uint8))


def _classes(root: Path) -> tuple[dict[str, list[Path]], list[Path]]:
    """The images of every sub-folder, in the order of the classes, and those beside the sub-folders."""
    known = set(Image.registered_extensions())
    shown = [path for path in sorted(root.iterdir()) if not path.name.startswith(".")]
    names = [path.name for path in shown if path.is_dir()]
    found = {name: [path for path in _visible(root / name) if path.suffix.lower() in known] for name in names}
    return found, [path for path in shown if path.is_file() and path.suffix.lower() in known]


def _visible(root: Path) -> list[Path]:
    """All files in a folder and its sub-folders, sorted, but hidden ones and those in hidden folders."""
    return [
        path
        for path in sorted(root.rglob("*"))
        if path.is_file() and not any(part.startswith(".") for part in path.relative_to(root).parts)
    ]


def _check_label(path: Path, name: str, label: Tensor, count: int) -> None:
    if label.dim() or label.dtype != torch.int64:
        found = f"of shape {list(label.shape)} and dtype {label.dtype}"
        raise TrainError(f"{path} has a tensor '{name}' {found}: a label is one number, int64")
    if not 0 <= int(label) < count:
        raise TrainError(
            f"{path} has label {int(label)}, and the model knows labels 0..{count - 1}: give latents with its labels"
        )


def _open_fashion_mnist(root: Path, size: int, num_classes: int) -> MemoryImages:
    try:
        images = MemoryImages(*fashion_mnist.load(root, "train", size))
    except (ValueError, EOFError, OSError, zlib.error) as error:
        raise TrainError(f"{root} holds damaged Fashion-MNIST files ({error}): fetch them again") from error
    last = int(images.labels.max()) if len(images) else -1
    if not 0 <= last < num_classes:
        raise TrainError(
            f"{root} holds {len(images)} images of Fashion-MNIST with labels up to {last}, and the model knows "
            f"{num_classes} classes: give a model of 10 classes, or other images"
        )
    return images


def _folder(folder: str | Path) -> Path:
    root = Path(folder)
    if not root.is_dir():
        raise TrainError(f"there is no folder {root}: give one with images, or train without images on trajectories")
    return root


def _digest(files: list[Any]) -> str:
    return hashlib.sha256(repr(files).encode()).hexdigest()
