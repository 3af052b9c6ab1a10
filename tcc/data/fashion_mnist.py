"""Fashion-MNIST (Zalando Research, MIT licence) from its IDX files, as the reference model sees it."""

from __future__ import annotations

import gzip
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

CLASS_NAMES = (
    "T-shirt",
    "trousers",
    "pullover",
    "dress",
    "coat",
    "sandal",
    "shirt",
    "sneaker",
    "bag",
    "ankle boot",
)
_PREFIX = {"train": "train", "test": "t10k"}


def load(folder: str | Path, split: str = "train", size: int = 32) -> tuple[Tensor, Tensor]:
    """Read one split, padded with black to ``size``, or scaled down to it.

    Args:
        folder: holds ``train-images-idx3-ubyte`` and its three siblings, gzipped or not.
        split: ``train`` (60,000 images) or ``test`` (10,000).
        size: side of the images.

    Returns:
        Images uint8 ``[N, 1, size, size]`` and labels int64 ``[N]``.
    """
    images = torch.from_numpy(read_idx(_find(folder, f"{_PREFIX[split]}-images-idx3-ubyte")).copy())
    labels = torch.from_numpy(read_idx(_find(folder, f"{_PREFIX[split]}-labels-idx1-ubyte")).astype(np.int64))
    if len(images) != len(labels):
        raise ValueError(f"{folder} has {len(images)} {split} images, {len(labels)} labels: fetch it again")
    if size < images.shape[-1]:
        scaled = F.interpolate(images[:, None].float(), (size, size), mode="bilinear", antialias=True)
        return scaled.round().clamp(0, 255).byte(), labels
    before, after = (size - images.shape[-1]) // 2, (size - images.shape[-1] + 1) // 2
    return F.pad(images[:, None], (before, after, before, after)), labels


def to_signal(images: Tensor) -> Tensor:
    """Map uint8 pixels to float32 in [-1, 1]."""
    return images.float() / 127.5 - 1


def read_idx(path: str | Path) -> np.ndarray:
    """Read an IDX file of unsigned bytes, gzipped or not.

    Returns:
        uint8 array with the dimensions that the file's header states.
    """
    raw = Path(path).read_bytes()
    raw = gzip.decompress(raw) if raw[:2] == b"\x1f\x8b" else raw
    if len(raw) < 4 or raw[:3] != b"\x00\x00\x08":
        raise ValueError(f"{path} is not an IDX file of unsigned bytes")
    rank = raw[3]
    shape = np.frombuffer(raw, dtype=">u4", count=rank, offset=4)
    values = np.frombuffer(raw, dtype=np.uint8, offset=4 + 4 * rank)
    if values.size != np.prod(shape):
        raise ValueError(f"{path} is cut short: {values.size} bytes where its header says {np.prod(shape)}")
    return values.reshape(shape)


def _find(folder: str | Path, name: str) -> Path:
    """Locate an IDX file, gzipped or not."""
    for candidate in (Path(folder) / f"{name}.gz", Path(folder) / name):
        if candidate.is_file():
            return candidate
    raise FileNotFoundError(
        f"no {name}[.gz] in {folder}: put the four Fashion-MNIST IDX files there "
        "(Debian package dataset-fashion-mnist, or github.com/zalandoresearch/fashion-mnist)"
    )
