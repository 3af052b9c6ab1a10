"""How far images are from others: PSNR image by image, and the Frechet distance in a fixed classifier.

The distance is called FD (Fashion-MNIST CNN) after its features. It is no FID: it comes from another network, trained
on the data that it judges, and numbers of the two cannot be compared.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from importlib import resources
from pathlib import Path

import safetensors
import safetensors.torch
import torch
from torch import Tensor, nn

from tcc.errors import CallError, ModelError
from tcc.tensors_file import save_tensors

__all__ = [
    "FeatureNetwork",
    "Statistics",
    "feature_network",
    "frechet_distance",
    "load_features",
    "psnr",
    "real_statistics",
    "save_features",
]

FEATURE_FILE = "fd-fmnist-cnn.safetensors"
_REAL = "real."  # prefix of the statistics of real images in a feature file


class FeatureNetwork(nn.Module):
    """A small classifier of images `[B, 1, 32, 32]` in [-1, 1]; what it averages before its last layer are features.

    Args:
        num_classes: outputs of the last layer.
        channels: channels of the convolutions; the last number is that of the features.
    """

    def __init__(self, num_classes: int = 10, channels: tuple[int, ...] = (32, 64, 128, 128)) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        for number, (before, after) in enumerate(zip((1, *channels), channels, strict=False)):
            layers += [nn.Conv2d(before, after, 3, padding=1, bias=False), nn.BatchNorm2d(after), nn.ReLU()]
            layers += [nn.MaxPool2d(2)] if number < 2 else []  # 32 -> 16 -> 8
        self.body = nn.Sequential(*layers)
        self.head = nn.Linear(channels[-1], num_classes)

    def forward(self, images: Tensor) -> Tensor:
        """Features `[B, 128]`."""
        maps: Tensor = self.body(images)
        return maps.mean(dim=(2, 3))

    def classify(self, images: Tensor) -> Tensor:
        """Logits `[B, num_classes]`."""
        logits: Tensor = self.head(self(images))
        return logits


@dataclass(frozen=True)
class Statistics:
    """Mean and covariance of features.

    Attributes:
        mean: float64 `[F]`.
        covariance: float64 `[F, F]`, unbiased.
        count: of how many images.
    """

    mean: Tensor
    covariance: Tensor
    count: int

    @staticmethod
    def of(features: Tensor) -> Statistics:
        """The statistics of features `[N, F]`, in float64.

        Raises:
            ValueError: there are fewer than two images.
        """
        if len(features) < 2:
            raise ValueError(f"a covariance needs at least 2 images, got {len(features)}")
        exact = features.double()
        return Statistics(exact.mean(dim=0), torch.cov(exact.T), len(exact))


def frechet_distance(one: Statistics, two: Statistics) -> float:
    """The squared Frechet distance of two Gaussians (Dowson & Landau 1982; Heusel et al. 2017, eq. 6).

    `|m1 - m2|^2 + tr(C1 + C2 - 2 (C1 C2)^(1/2))`. The trace of the root is the sum of the roots of the eigenvalues of
    `C1^(1/2) C2 C1^(1/2)`, which is symmetric. The estimate from N images is biased upwards, the more the fewer:
    compare distances of equal N only.
    """
    values, vectors = torch.linalg.eigh(one.covariance)
    root = vectors * values.clamp(min=0).sqrt() @ vectors.T
    inner = torch.linalg.eigvalsh(root @ two.covariance @ root).clamp(min=0).sqrt().sum()
    spread = torch.trace(one.covariance) + torch.trace(two.covariance) - 2 * inner
    return float((one.mean - two.mean).square().sum() + spread)


def psnr(images: Tensor, reference: Tensor) -> Tensor:
    """Peak signal-to-noise ratio in dB of every image of `[B, C, H, W]` in [-1, 1] (peak 2): float64 `[B]`.

    Infinite where an image is identical to its reference.

    Raises:
        CallError: there are not as many references, or of another size.
    """
    if images.shape != reference.shape:
        raise CallError(f"psnr: images {list(images.shape)} and references {list(reference.shape)} are not alike")
    errors = (images.double() - reference.double()).square().flatten(1).mean(dim=1)
    return 10 * torch.log10(4 / errors)


def feature_network() -> FeatureNetwork:
    """The shipped classifier, in float32 and eval mode, without gradients; see tcc/data/README.md."""
    with resources.as_file(resources.files("tcc.data") / FEATURE_FILE) as path:
        return load_features(path)[0]


def real_statistics() -> Statistics:
    """The statistics of the 10,000 Fashion-MNIST test images in the shipped classifier."""
    with resources.as_file(resources.files("tcc.data") / FEATURE_FILE) as path:
        return load_features(path)[1]


def save_features(network: FeatureNetwork, real: Statistics, path: str | os.PathLike[str]) -> None:
    """Write a classifier in float16, and the statistics of real images in float32."""
    tensors = {n: t.detach().half().contiguous() for n, t in network.state_dict().items() if t.is_floating_point()}
    tensors |= {f"{_REAL}mean": real.mean.float(), f"{_REAL}covariance": real.covariance.float()}
    save_tensors(tensors, path, {"count": str(real.count)})


def load_features(path: str | os.PathLike[str]) -> tuple[FeatureNetwork, Statistics]:
    """Read what `save_features` wrote.

    Raises:
        ModelError: there is no such file, or it holds something else.
    """
    if not Path(path).is_file():
        raise ModelError(f"there is no feature file at {path}")
    try:
        with safetensors.safe_open(path, framework="pt") as file:
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
            count = int(file.metadata()["count"])
        real = Statistics(tensors.pop(f"{_REAL}mean").double(), tensors.pop(f"{_REAL}covariance").double(), count)
        network = FeatureNetwork(num_classes=len(tensors["head.bias"]))
        counters = {n: t for n, t in network.state_dict().items() if not t.is_floating_point()}  # of batch norm: unused
        network.load_state_dict({**tensors, **counters})
    except (safetensors.SafetensorError, KeyError, TypeError, ValueError, RuntimeError) as error:
        raise ModelError(f"{path} holds no feature network: make one with benchmarks/classifier.py") from error
    return network.eval().requires_grad_(False), real
