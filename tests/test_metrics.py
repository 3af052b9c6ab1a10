"""PSNR, the Frechet distance, and the classifier it is taken in."""

from __future__ import annotations

from importlib import resources
from pathlib import Path

import pytest
import safetensors.torch
import torch
import torch.nn.functional as F
from torch import Tensor

from tcc.data import fashion_mnist
from tcc.errors import CallError, ModelError
from tcc.metrics import (
    FEATURE_FILE,
    FeatureNetwork,
    Statistics,
    feature_network,
    frechet_distance,
    load_features,
    psnr,
    real_statistics,
    save_features,
)
from tcc.models import reference_model
from tcc.samplers import sample

DATA = Path(__file__).parents[2] / "shared" / "data" / "fashion-mnist"


def gaussian(mean: list[float], covariance: Tensor) -> Statistics:
    """Statistics by hand."""
    return Statistics(torch.tensor(mean, dtype=torch.float64), covariance.double(), 1000)


def random_covariance(size: int, seed: int) -> Tensor:
    """A positive definite matrix `[size, size]`."""
    root = torch.randn(size, size, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
    return root @ root.T + 0.1 * torch.eye(size, dtype=torch.float64)


@pytest.fixture(scope="module")
def images() -> Tensor:
    """2,000 test images of Fashion-MNIST, as the models see them, and their labels in `labels`."""
    if not DATA.is_dir():
        pytest.skip("the Fashion-MNIST files are not in ../shared/data, and they are too large to ship")
    return fashion_mnist.to_signal(fashion_mnist.load(DATA, "test")[0][:2000])


def features(images: Tensor) -> Tensor:
    """Features in the shipped network."""
    network = feature_network()
    return torch.cat([network(part) for part in images.split(500)])


def test_psnr_is_that_of_the_definition() -> None:
    """Peak 2: errors of 0.2 and 0.02 everywhere are 20 and 40 dB; equal images are infinitely good."""
    image = torch.zeros(2, 1, 4, 4)

    assert psnr(image + torch.tensor([0.2, 0.02]).view(2, 1, 1, 1), image).tolist() == pytest.approx([20.0, 40.0])
    assert psnr(image, image).tolist() == [float("inf")] * 2
    with pytest.raises(CallError, match="are not alike"):
        psnr(image, image[:1])


def test_gaussians_with_diagonal_covariances_have_a_closed_form() -> None:
    """The squared distance of the means, and of the standard deviations."""
    one = gaussian([0.0, 1.0, 2.0], torch.diag(torch.tensor([1.0, 4.0, 9.0])))
    two = gaussian([1.0, 1.0, 0.0], torch.diag(torch.tensor([4.0, 4.0, 0.0])))

    assert frechet_distance(one, two) == pytest.approx((1 + 4) + (1 + 0 + 9), rel=1e-12)
    assert frechet_distance(two, one) == pytest.approx(15.0, rel=1e-12)


def test_covariances_that_do_not_commute() -> None:
    """The trace of the root of C1 C2, from the eigenvalues of that product, which is not symmetric."""
    first, second = random_covariance(6, 0), random_covariance(6, 1)
    root = torch.linalg.eigvals(first @ second).real.sqrt().sum()
    wanted = float(torch.trace(first) + torch.trace(second) - 2 * root)

    zero = [0.0] * 6
    assert frechet_distance(gaussian(zero, first), gaussian(zero, second)) == pytest.approx(wanted, rel=1e-10)
    assert frechet_distance(gaussian(zero, first), gaussian(zero, first)) == pytest.approx(0, abs=1e-10)


def test_fewer_images_than_features_have_a_distance() -> None:
    """Covariances without full rank: the distance to itself is 0, and no NaN comes of a rounding below 0."""
    drawn = torch.randn(20, 64, generator=torch.Generator().manual_seed(0))
    few = Statistics.of(drawn)

    assert frechet_distance(few, few) == pytest.approx(0, abs=1e-5)
    assert frechet_distance(few, Statistics.of(drawn + 1)) == pytest.approx(64, abs=1e-4)


def test_statistics_are_the_mean_and_the_unbiased_covariance() -> None:
    """Of drawn features, in float64 although the features are float32."""
    drawn = torch.randn(50, 3, generator=torch.Generator().manual_seed(0)) + 1000
    exact = drawn.double()
    centred = exact - exact.sum(dim=0) / 50
    found = Statistics.of(drawn)

    torch.testing.assert_close(found.mean, exact.sum(dim=0) / 50, rtol=1e-14, atol=0)
    torch.testing.assert_close(found.covariance, centred.T @ centred / 49, rtol=1e-12, atol=1e-13)
    assert found.count == 50
    with pytest.raises(ValueError, match="needs at least 2 images, got 1"):
        Statistics.of(drawn[:1])


def test_the_shipped_network_is_small_fixed_and_frozen() -> None:
    """Below 1 MB; 128 features; eval mode, no gradients; statistics of 10,000 images with a proper covariance."""
    assert (resources.files("tcc.data") / FEATURE_FILE).stat().st_size < 1_000_000  # type: ignore[attr-defined]
    network, real = feature_network(), real_statistics()

    assert not network.training
    assert not any(parameter.requires_grad for parameter in network.parameters())
    assert network(torch.zeros(2, 1, 32, 32)).shape == (2, 128)
    assert real.count == 10_000
    assert torch.equal(real.covariance, real.covariance.T)
    assert torch.linalg.eigvalsh(real.covariance).min() > -1e-6


def test_the_shipped_network_knows_what_the_reference_model_draws() -> None:
    """Most images are taken for what they were drawn as; shirts are left out, which look like other classes."""
    labels = torch.tensor([0, 1, 2, 3, 5, 7, 8, 9]).repeat(2)
    drawn = torch.randn(16, 1, 32, 32, generator=torch.Generator().manual_seed(0))
    pictures = sample(reference_model(), drawn, labels, num_steps=10, cfg_scale=1.5)

    assert (feature_network().classify(pictures).argmax(dim=1) == labels).sum() >= 13


def test_the_shipped_network_classifies_test_images(images: Tensor) -> None:
    """At least 92 % of them; the shipped statistics are those of such images."""
    labels = fashion_mnist.load(DATA, "test")[1][:2000]
    found = features(images)

    assert (feature_network().head(found).argmax(dim=1) == labels).double().mean() >= 0.92
    assert frechet_distance(Statistics.of(found), real_statistics()) < 3


def test_the_distance_sees_noise_blur_and_missing_classes(images: Tensor) -> None:
    """Each is worse than another thousand real images, and more of it is worse still."""
    labels, half = fashion_mnist.load(DATA, "test")[1][:2000], images[:1000]
    noise = torch.randn(half.shape, generator=torch.Generator().manual_seed(0))

    def distance(changed: Tensor) -> float:
        return frechet_distance(Statistics.of(features(changed)), Statistics.of(features(images[1000:])))

    none = distance(half)
    assert none < distance(half + 0.1 * noise) < distance(half + 0.3 * noise)
    assert 10 * none < distance(F.avg_pool2d(half, 3, stride=1, padding=1))
    assert 2 * none < distance(images[labels != 9]) < distance(images[labels < 5])


def test_what_is_saved_is_loaded(tmp_path: Path) -> None:
    """Weights to float16, statistics to float32."""
    torch.manual_seed(0)
    network = FeatureNetwork(num_classes=3).eval()
    for parameter in network.parameters():
        parameter.data.copy_(parameter.half().float())
    real = Statistics.of(torch.randn(200, 128, generator=torch.Generator().manual_seed(0)))
    save_features(network, real, tmp_path / "f.safetensors")

    loaded, stored = load_features(tmp_path / "f.safetensors")
    x = torch.randn(2, 1, 32, 32, generator=torch.Generator().manual_seed(1))
    assert torch.equal(loaded.classify(x), network.classify(x))
    assert stored.count == 200
    torch.testing.assert_close(stored.covariance, real.covariance, rtol=1e-6, atol=1e-7)


def test_other_files_are_refused(tmp_path: Path) -> None:
    """No file, no safetensors file, and one that holds something else."""
    with pytest.raises(ModelError, match="there is no feature file at"):
        load_features(tmp_path / "nothing")
    (tmp_path / "text").write_text("hello")
    safetensors.torch.save_file({"x": torch.zeros(1)}, tmp_path / "other")
    for name in ("text", "other"):
        with pytest.raises(ModelError, match=f"{name} holds no feature network"):
            load_features(tmp_path / name)
