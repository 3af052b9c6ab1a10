"""The samplers, against the formulas of the papers and against diffusers."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from tcc.errors import CallError
from tcc.models import reference_model
from tcc.samplers import DDIM, Diffusion, DPMSolver2, FlowEuler, ddim_step, ddpm_step, guide, predict_x0, sample


class FakeModel:
    """Predicts a smooth function of its inputs, and records how it is called."""

    def __init__(self, learned_sigma: bool = False) -> None:
        self.learned_sigma = learned_sigma
        self.calls: list[tuple[Tensor, Tensor, Tensor]] = []
        self.resets = 0

    def reset(self) -> None:
        """Count how often a new image starts."""
        self.resets += 1

    def __call__(self, x: Tensor, t: Tensor, y: Tensor) -> Tensor:
        """Return [N, C or 2C, H, W]."""
        self.calls.append((x.clone(), t.clone(), y.clone()))
        eps = torch.tanh(x + y.view(-1, 1, 1, 1) / 10 + t.view(-1, 1, 1, 1) / 1000)
        return torch.cat([eps, torch.cos(3 * x)], dim=1) if self.learned_sigma else eps


def batch(count: int = 3, channels: int = 4) -> tuple[Tensor, Tensor]:
    """Seeded noise [B, C, 4, 4] and labels [B]."""
    generator = torch.Generator().manual_seed(0)
    return torch.randn(count, channels, 4, 4, generator=generator), torch.arange(count)


def public_respacing(count: int) -> list[int]:
    """The even-spacing rule of the public IDDPM code, for one section of 1000."""
    stride, position, points = 999 / (count - 1), 0.0, []
    for _ in range(count):
        points.append(round(position))
        position += stride
    return points


def test_twenty_steps_are_the_published_ones() -> None:
    """Twenty steps visit 999, 946, ..., 105, 53, 0."""
    timesteps = Diffusion().timesteps(20)

    assert timesteps[:2] == (999, 946)
    assert timesteps[-3:] == (105, 53, 0)
    assert len(timesteps) == 20


@pytest.mark.parametrize("count", [2, 7, 50, 91, 250, 999, 1000])
def test_even_spacing_agrees_with_the_public_rule(count: int) -> None:
    """N points, both ends included, rounded as the public code rounds them."""
    assert list(reversed(public_respacing(count))) == list(Diffusion().timesteps(str(count)))


def test_ddim_spacing_is_an_integer_stride() -> None:
    """The choice "ddim50" visits 980, 960, ..., 0; a count without a stride is refused."""
    assert Diffusion().timesteps("ddim50") == tuple(range(980, -1, -20))
    with pytest.raises(ValueError, match="no integer stride visits exactly 999 of 1000"):
        Diffusion().timesteps("ddim999")


@pytest.mark.parametrize("count", [0, -1, 1001])
def test_impossible_step_counts_are_refused(count: int) -> None:
    """num_steps must lie in the training range."""
    with pytest.raises(ValueError, match=rf"num_steps must lie in 1\.\.1000, got {count}"):
        Diffusion().timesteps(count)


@pytest.mark.parametrize("count", ["x", "ddimx", 2.5, True])
@pytest.mark.parametrize("solver", [DDIM(), DPMSolver2(), FlowEuler()], ids=["ddim", "dpm", "flow"])
def test_step_counts_are_whole_numbers(solver: Any, count: Any) -> None:
    """As a number or as text; nothing is rounded."""
    with pytest.raises(ValueError, match=r"num_steps=\S+: give a whole number of steps"):
        solver.evaluations(count)


def test_one_step_starts_from_the_noisy_end() -> None:
    """A single step goes from timestep 999 to the image."""
    (step,) = Diffusion().steps(1)

    assert step.timestep == 999
    assert step.is_last


def test_alpha_bar_is_the_product_of_the_linear_betas() -> None:
    """alpha_bar equals an independent numpy product in float64."""
    expected = np.cumprod(1 - np.linspace(1e-4, 0.02, 1000, dtype=np.float64))

    np.testing.assert_allclose(Diffusion().alpha_bar.numpy(), expected, rtol=1e-12)


def test_noise_and_prediction_are_inverse() -> None:
    """predict_x0 with the true noise returns the image that add_noise was given."""
    diffusion = Diffusion()
    x0, _ = batch()
    noise = torch.randn_like(x0)
    step = diffusion.steps(50)[20]
    noisy = diffusion.add_noise(x0, torch.full((3,), step.timestep), noise)

    torch.testing.assert_close(predict_x0(noisy, noise, step, clip=False), x0, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("clip", [True, False])
def test_ddim_equals_diffusers(clip: bool) -> None:
    """Fifty DDIM steps give the images of diffusers' DDIMScheduler over the same timesteps."""
    diffusers = pytest.importorskip("diffusers")
    noise, labels = batch()
    scheduler = diffusers.DDIMScheduler(
        beta_start=1e-4,
        beta_end=0.02,
        beta_schedule="linear",
        clip_sample=clip,
        set_alpha_to_one=True,
        timestep_spacing="leading",
        steps_offset=0,
    )
    scheduler.set_timesteps(50)
    x = noise
    for t in scheduler.timesteps:
        eps = FakeModel()(x, t.expand(3), labels)
        x = scheduler.step(eps, t, x, use_clipped_model_output=clip).prev_sample

    ours = sample(FakeModel(), noise, labels, num_steps="ddim50", clip=clip)

    torch.testing.assert_close(ours, x, rtol=1e-4, atol=1e-4)


def test_ddpm_step_draws_from_the_exact_posterior() -> None:
    """Mean and deviation are those of q(x_s | x_0) times q(x_t | x_s), multiplied out in numpy."""
    step = Diffusion().steps(20)[5]
    (x, _), eps = batch(), torch.full((3, 4, 4, 4), 0.3)
    x0 = ((x - math.sqrt(1 - step.alpha_bar) * eps) / math.sqrt(step.alpha_bar)).numpy()
    ratio = step.alpha_bar / step.alpha_bar_next
    precision = ratio / (1 - ratio) + 1 / (1 - step.alpha_bar_next)
    mean = (
        math.sqrt(ratio) / (1 - ratio) * x.numpy() + math.sqrt(step.alpha_bar_next) / (1 - step.alpha_bar_next) * x0
    ) / precision

    still = ddpm_step(x, eps, step, noise=torch.zeros_like(x), clip=False)
    moved = ddpm_step(x, eps, step, noise=torch.ones_like(x), clip=False)

    np.testing.assert_allclose(still.numpy(), mean, rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose((moved - still).numpy(), precision**-0.5, rtol=1e-4)


@pytest.mark.parametrize(("value", "kind"), [(-1.0, "posterior"), (1.0, "beta"), (0.0, "geometric mean")])
def test_learned_variance_lies_between_posterior_and_beta(value: float, kind: str) -> None:
    """Variance channels of -1, 1 and 0 mean the posterior variance, beta, and their geometric mean."""
    step = Diffusion().steps(20)[5]
    x, _ = batch()
    beta = 1 - step.alpha_bar / step.alpha_bar_next
    posterior = beta * (1 - step.alpha_bar_next) / (1 - step.alpha_bar)
    variances = {"posterior": posterior, "beta": beta, "geometric mean": math.sqrt(beta * posterior)}
    options = {"clip": False, "variance": torch.full_like(x, value)}

    still = ddpm_step(x, x, step, noise=torch.zeros_like(x), **options)
    moved = ddpm_step(x, x, step, noise=torch.ones_like(x), **options)

    torch.testing.assert_close(moved - still, torch.full_like(x, variances[kind] ** 0.5), rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("clip", [True, False])
def test_ddim_with_eta_one_is_ddpm(clip: bool) -> None:
    """With eta 1 a DDIM step equals an ancestral step in the same noise (DDIM section 4.1)."""
    step = Diffusion().steps(20)[7]
    (x, _), noise = batch(), torch.randn(3, 4, 4, 4, generator=torch.Generator().manual_seed(2))
    eps = FakeModel()(x, torch.zeros(3), torch.zeros(3))

    ddim = ddim_step(x, eps, step, noise=noise, eta=1.0, clip=clip)

    torch.testing.assert_close(ddim, ddpm_step(x, eps, step, noise=noise, clip=clip), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("sampler", ["ddim", "ddpm"])
def test_the_last_step_returns_the_predicted_image(sampler: str) -> None:
    """The last step adds no noise: its result is the (clamped) image it predicts."""
    step = Diffusion().steps(20)[-1]
    (x, _), noise = batch(), torch.ones(3, 4, 4, 4)
    eps = torch.zeros_like(x)

    if sampler == "ddim":
        result = ddim_step(x, eps, step, noise=noise, eta=1.0, clip=True)
    else:
        result = ddpm_step(x, eps, step, noise=noise, clip=True)

    torch.testing.assert_close(result, (x / math.sqrt(step.alpha_bar)).clamp(-1, 1), rtol=1e-5, atol=1e-6)


def test_guidance_extrapolates_all_channels() -> None:
    """By default every noise channel is guided; the variance channels stay conditional."""
    output = torch.randn(4, 8, 2, 2)
    cond, uncond = output[:2], output[2:]

    guided = guide(output, 1.5, channels=4)

    torch.testing.assert_close(guided[:, :4], uncond[:, :4] + 1.5 * (cond[:, :4] - uncond[:, :4]))
    assert torch.equal(guided[:, 4:], cond[:, 4:])


def test_first_three_channels_guidance_agrees_with_the_public_sampler() -> None:
    """Channels 0-2 are guided; channel 3 and the variance are the conditional half's."""
    output = torch.randn(4, 8, 2, 2)
    eps, rest = output[:, :3], output[:, 3:]
    cond, uncond = torch.split(eps, 2)
    half = uncond + 4.0 * (cond - uncond)
    public = torch.cat([torch.cat([half, half]), rest], dim=1)
    assert torch.equal(public[:2, :3], public[2:, :3])
    assert not torch.equal(public[:2, 3], public[2:, 3])

    assert torch.equal(public[:2], guide(output, 4.0, channels=4, guidance_channels="first-three"))


def test_first_three_channels_of_a_grey_image_are_its_one() -> None:
    """With one channel, first-three guides that channel and leaves the variance alone."""
    output = torch.randn(4, 2, 2, 2)

    assert torch.equal(guide(output, 2.0, 1), guide(output, 2.0, 1, guidance_channels="first-three"))


@pytest.mark.parametrize("guided", [True, False])
def test_one_call_per_step_of_one_shape_and_dtype(guided: bool) -> None:
    """The model is reset once, then called once per step, noisiest first, shapes and dtypes unchanging."""
    model = FakeModel()
    noise, labels = batch()
    options = {"cfg_scale": 2.0, "null_class": 9} if guided else {}

    sample(model, noise, labels, num_steps=5, **options)

    rows = 6 if guided else 3
    assert model.resets == 1
    assert [int(t[0]) for _, t, _ in model.calls] == [999, 749, 500, 250, 0]
    for x, t, y in model.calls:
        assert (x.shape, x.dtype) == ((rows, 4, 4, 4), torch.float32)
        assert (t.shape, t.dtype) == ((rows,), torch.int64)
        assert y.tolist() == [0, 1, 2] + ([9, 9, 9] if guided else [])
        assert torch.equal(x[:3], x[-3:])


@pytest.mark.parametrize(
    "output", [torch.zeros(3, 1, 4, 4), torch.zeros(1, 4, 4, 4), torch.zeros(3, 4, 4, 1), torch.zeros(()), None]
)
def test_an_output_that_would_be_broadcast_is_refused(output: Tensor | None) -> None:
    """One channel for an input of four would draw images, and wrong ones."""
    with pytest.raises(CallError, match=r"output is .* for an input \[3, 4, 4, 4\]: samplers need a tensor"):
        sample(lambda x, t, y: output, *batch(), num_steps=2)  # type: ignore[arg-type,return-value]


def test_guidance_scale_one_is_no_guidance() -> None:
    """Scale 1 needs no null class and equals guide() at scale 1."""
    noise, labels = batch()
    output = torch.randn(6, 4, 4, 4)

    torch.testing.assert_close(guide(output, 1.0, channels=4), output[:3], rtol=1e-5, atol=1e-6)
    sample(FakeModel(), noise, labels, num_steps=2)


def test_guidance_without_a_null_class_is_refused() -> None:
    """A model that names no null class cannot be guided unless the caller gives one."""
    with pytest.raises(ValueError, match="guidance needs a null class"):
        sample(FakeModel(), *batch(), num_steps=2, cfg_scale=2.0)


def test_unknown_sampler_is_refused() -> None:
    """The choices are named."""
    with pytest.raises(ValueError, match="unknown sampler 'euler': choose ddim, ddpm, dpm-solver"):
        sample(FakeModel(), *batch(), sampler="euler")


@pytest.mark.parametrize("sampler", ["ddim", "ddpm"])
@pytest.mark.parametrize("learned", [True, False])
def test_a_generator_makes_sampling_repeatable(sampler: str, learned: bool) -> None:
    """The same generator seed gives the same images, another seed gives others."""

    def draw(seed: int) -> Tensor:
        generator = torch.Generator().manual_seed(seed)
        options = {"sampler": sampler, "generator": generator, "num_steps": 4} | (
            {"eta": 0.5} if sampler == "ddim" else {}
        )
        return sample(FakeModel(learned_sigma=learned), *batch(), **options)

    assert torch.equal(draw(0), draw(0))
    assert not torch.equal(draw(0), draw(1))


def test_progress_counts_the_steps() -> None:
    """The callback hears every step once."""
    heard: list[tuple[int, int]] = []

    sample(FakeModel(), *batch(), num_steps=3, progress=lambda done, total: heard.append((done, total)))

    assert heard == [(1, 3), (2, 3), (3, 3)]


def test_the_reference_model_draws_images() -> None:
    """Eight guided steps of the shipped model give pixels in range, dark at the border, bright inside."""
    noise = torch.randn(4, 1, 32, 32, generator=torch.Generator().manual_seed(0))

    images = sample(reference_model(), noise, torch.tensor([0, 1, 2, 8]), num_steps=8, cfg_scale=2.0)

    assert images.shape == (4, 1, 32, 32)
    assert images.isfinite().all()
    assert images.abs().max() <= 1
    assert images[..., 0].mean() < -0.9
    assert images[..., 10:22, 12:20].mean() > -0.5
