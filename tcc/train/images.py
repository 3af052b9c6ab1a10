"""Images with labels to train on: a folder of files, or Fashion-MNIST."""

from __future__ import annotations

import hashlib
import zlib
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import numpy as np
import torch
from PIL import Image, UnidentifiedImageError
from torch import Tensor

from tcc.data import fashion_mnist
from tcc.errors import TrainError

__all__ = ["FolderImages", "Images", "MemoryImages", "open_images"]


class Images(Protocol):
    """Labelled images, by number."""

    def __len__(self) -> int:
        """How many there are."""

    def take(self, picked: Tensor) -> tuple[Tensor, Tensor]:
        """Images float32 `[N, C, H, W]` in [-1, 1] and labels int64 `[N]`, for numbers `[N]`."""

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
        names = [(label, path.name, path.stat().st_size) for path, label in self.files]
        return hashlib.sha256(repr(names).encode()).hexdigest()

    def _read(self, path: Path) -> Tensor:
        """One image, uint8 `[C, H, W]`."""
        try:
            with Image.open(path) as file:
                image = file.convert("L" if self.channels == 1 else "RGB")
        except (UnidentifiedImageError, OSError) as error:
            raise TrainError(f"{path} cannot be read as an image ({error}): repair or remove it") from error
        height, width = self.size
        scale = max(height / image.height, width / image.width)
        sizes = max(width, round(image.width * scale)), max(height, round(image.height * scale))
        image = image.resize(sizes, Image.Resampling.BICUBIC)
        left, top = (image.width - width) // 2, (image.height - height) // 2
        pixels = np.array(image.crop((left, top, left + width, top + height)))
        return torch.from_numpy(pixels).view(height, width, self.channels).permute(2, 0, 1)


def open_images(folder: str | Path, *, size: tuple[int, int], channels: int, num_classes: int) -> Images:
    """The images in `folder`: the Fashion-MNIST files, or one sub-folder of image files per class.

    Args:
        folder: where they are. Labels are the numbers of the sub-folders in alphabetical order.
        size: height and width to bring them to.
        channels: 1 or 3.
        num_classes: how many labels the model knows.

    Raises:
        TrainError: there is no such folder, it holds no images, or more classes than the model knows; its IDX files are
            damaged; or the model takes no pixels.
    """
    root = Path(folder)
    if channels not in (1, 3):
        raise TrainError(
            f"the model takes {channels} channels, the latents of an encoder, and images have 1 or 3: train without "
            "images on trajectories, or give tcc.train.Pairs your own Images"
        )
    if not root.is_dir():
        raise TrainError(f"there is no folder {root}: give one with images, or train without images on trajectories")
    if any(root.glob("train-images-idx3-ubyte*")):
        if channels != 1 or size[0] != size[1]:
            raise TrainError(
                f"{root} holds Fashion-MNIST, grey squares; the model takes {channels} x {size[0]} x {size[1]}"
            )
        try:
            return MemoryImages(*fashion_mnist.load(root, "train", size[0]))
        except (ValueError, EOFError, OSError, zlib.error) as error:
            raise TrainError(f"{root} holds damaged Fashion-MNIST files ({error}): fetch them again") from error
    known = set(Image.registered_extensions())
    classes = sorted(path for path in root.iterdir() if path.is_dir())
    files = tuple(
        (path, label)
        for label, inside in enumerate(classes)
        for path in sorted(inside.rglob("*"))
        if path.suffix.lower() in known
    )
    if not files:
        raise TrainError(
            f"{root} holds no images: expected one sub-folder per class with PNG, JPEG or other image files, as in "
            f"{root / 'class-a' / '0001.png'}, or the four Fashion-MNIST files (train-images-idx3-ubyte.gz, ...)"
        )
    if len(classes) > num_classes:
        raise TrainError(
            f"{root} has {len(classes)} sub-folders, one per class, and the model knows {num_classes} classes"
        )
    return FolderImages(files, size, channels)
