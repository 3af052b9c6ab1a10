"""Solvers of higher order, against an ODE whose solution is known, and against diffusers."""

from __future__ import annotations

import itertools
import sys
from collections.abc import Callable

import numpy as np
import pytest
import torch
from torch import Tensor

from tcc.errors import CallError
from tcc.samplers import (
    DDIM,
    Diffusion,
    DPMSolver2,
    Evaluation,
    FlowEuler,
    Sampler,
    Scheduled,
    ddim_step,
    denoise,
    dpm_solver_2m,
    dpm_solver_2s,
    named,
    sample,
    timestep_dtype,
)

SPREAD = 0.5  # standard deviation of the data: Gaussian, so that the ODE can be solved by hand


def noise(count: int = 3) -> Tensor:
    """Seeded noise [B, 2, 4, 4]; float64, so that the solver's error is what is seen."""
    return torch.randn(count, 2, 4, 4, generator=torch.Generator().manual_seed(0), dtype=torch.float64)


def width(evaluation: Evaluation) -> float:
    """The standard deviation of noised data; every x of one trajectory is this times the same number."""
    bar = Diffusion().alpha_bar_at(evaluation.timestep)
    return (bar * SPREAD**2 + 1 - bar) ** 0.5


def exact_noise(x: Tensor, evaluation: Evaluation) -> Tensor:
    """The best guess of the noise in x, `[B, C, H, W]`."""
    bar = Diffusion().alpha_bar_at(evaluation.timestep)
    return x * (1 - bar) ** 0.5 / width(evaluation) ** 2


def error(sampler: Sampler, num_steps: int) -> float:
    """How far x is from the exact trajectory halfway down, relative to it."""
    middle = num_steps // 2
    evaluations = sampler.evaluations(num_steps)
    arrived = next(itertools.islice(denoise(sampler, exact_noise, noise(), num_steps), middle - 1, None))
    expected = noise() * width(evaluations[middle]) / width(evaluations[0])
    return float((arrived - expected).abs().max() / expected.abs().max())


@pytest.mark.parametrize(
    ("make", "order"),
    [
        (lambda: DDIM(clip=False), 1),
        (lambda: dpm_solver_2m(clip=False), 2),
        (lambda: dpm_solver_2s(clip=False), 2),
        (lambda: DPMSolver2(clip=False), 2),
        (lambda: DPMSolver2(clip=False, predict="noise"), 2),
    ],
)
def test_the_error_falls_with_the_order(make: Callable[[], Sampler], order: int) -> None:
    """Of Gaussian data: with twice as many evaluations, half the error for DDIM, and a quarter for DPM-Solver++."""
    pytest.importorskip("diffusers")
    few, more = error(make(), 40), error(make(), 80)

    assert 0.75 * 2**order < few / more < 1.4 * 2**order


@pytest.mark.parametrize("clip", [True, False])
def test_the_first_step_of_dpm_solver_is_ddims(clip: bool) -> None:
    """Of first order it is DDIM, clamped alike (Lu et al. 2022b, section 4)."""
    pytest.importorskip("diffusers")
    x = 2 * noise()
    sampler, process = dpm_solver_2m(clip=clip), Diffusion()
    first, second = (int(e.timestep) for e in sampler.evaluations(10)[:2])
    run = sampler.run(x, 10)
    next(run)
    moved = run.send(torch.tanh(x))

    bars = {"alpha_bar": float(process.alpha_bar[first]), "alpha_bar_next": float(process.alpha_bar[second])}
    step = type(process.steps(2)[0])(timestep=first, **bars)
    expected = ddim_step(x, torch.tanh(x), step, noise=None, eta=0.0, clip=clip)
    torch.testing.assert_close(moved, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.filterwarnings("ignore:__array__:DeprecationWarning")  # numpy's, of diffusers
@pytest.mark.parametrize("name", ["dpm-solver++2m", "dpm-solver++2s"])
def test_a_scheduler_samples_as_in_a_pipeline(name: str) -> None:
    """The loop of a pipeline, written out, gives the same images; the model is called once per evaluation."""
    pytest.importorskip("diffusers")
    labels, calls = torch.arange(3), []

    def model(x: Tensor, t: Tensor, y: Tensor) -> Tensor:
        calls.append(int(t[0]))
        return torch.tanh(x + t.view(-1, 1, 1, 1) / 1000)

    images = sample(model, noise().float(), labels, num_steps=6, sampler=name)
    scheduler = named(name).scheduler  # type: ignore[attr-defined]
    scheduler.set_timesteps(timesteps=calls.copy())
    x = noise().float()
    for t in scheduler.timesteps:
        x = scheduler.step(model(x, t.expand(3), labels), t, x).prev_sample

    assert len(calls) == 12
    torch.testing.assert_close(images, x, rtol=1e-5, atol=1e-6)
    assert images.abs().max() <= 1


@pytest.mark.filterwarnings("ignore:__array__:DeprecationWarning")  # numpy's, of diffusers
def test_evaluations_know_their_place_in_a_solver_step() -> None:
    """Multistep solvers take one evaluation per step; singlestep ones take two, but for the last two steps."""
    diffusers = pytest.importorskip("diffusers")

    assert [e.stage for e in dpm_solver_2m().evaluations(5)] == [0] * 5
    assert [e.stage for e in dpm_solver_2s().evaluations(8)] == [0, 1, 0, 1, 0, 1, 0, 0]
    assert [e.stage for e in Scheduled(scheduler=diffusers.HeunDiscreteScheduler()).evaluations(5)] == [0, 1, 0, 1, 0]
    assert timestep_dtype(dpm_solver_2m().evaluations(5)) == torch.int64
    pndm = diffusers.PNDMScheduler()  # it begins with twelve evaluations for three steps
    pndm.set_timesteps(6)
    assert [e.timestep for e in Scheduled(scheduler=pndm).evaluations(15)] == pndm.timesteps.tolist()
    with pytest.raises(ValueError, match="HeunDiscreteScheduler has no run of 4 evaluations; the nearest are of 3 and"):
        Scheduled(scheduler=diffusers.HeunDiscreteScheduler()).evaluations(4)


def test_a_scheduler_gets_the_settings_that_it_asks_for() -> None:
    """Flows that shift with the resolution want `mu`, and get it; the error says where it goes."""
    diffusers = pytest.importorskip("diffusers")
    flow = diffusers.FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True)
    with pytest.raises(ValueError, match=r"set_timesteps\(4\) with no further settings: .*mu.*\{name: value\}"):
        Scheduled(scheduler=flow).evaluations(4)
    with pytest.raises(ValueError, match=r"set_timesteps\(4\) with nu: .*unexpected keyword argument 'nu'"):
        Scheduled(scheduler=flow, settings={"nu": 1.0}).evaluations(4)
    flow.set_timesteps(4, mu=1.15)
    found = Scheduled(scheduler=flow, settings={"mu": 1.15}).evaluations(4)
    assert [e.timestep for e in found] == flow.timesteps.tolist()


@pytest.mark.filterwarnings("ignore:__array__:DeprecationWarning", "ignore:.*algorithm_types:FutureWarning")
@pytest.mark.parametrize("predict", ["image", "noise"])
def test_dpm_solver_2_is_diffusers_on_its_own_timesteps(predict: str) -> None:
    """At whole timesteps, with every step of second order and the least noise at the end, the two coincide."""
    diffusers = pytest.importorskip("diffusers")
    ours = DPMSolver2(predict=predict, clip=False, whole=True)  # type: ignore[arg-type]
    evaluations = ours.evaluations(12)
    scheduler = diffusers.DPMSolverSinglestepScheduler(
        algorithm_type="dpmsolver++" if predict == "image" else "dpmsolver",
        lower_order_final=False,
        final_sigmas_type="sigma_min",
    )
    scheduler.set_timesteps(timesteps=[int(e.timestep) for e in evaluations])
    x = noise().float()
    for t in scheduler.timesteps:
        x = scheduler.step(torch.tanh(2 * x), t, x).prev_sample

    *_, images = denoise(ours, lambda x, _: torch.tanh(2 * x), noise().float(), 12)

    assert timestep_dtype(evaluations) == torch.int64
    torch.testing.assert_close(images, x, rtol=1e-4, atol=1e-4)


def test_dpm_solver_2_evaluates_where_uvits_code_does() -> None:
    """Of U-ViT's process (timesteps 1..1000): even in time, and halfway in log-SNR by interpolation of log alpha."""
    process = Diffusion(schedule="scaled-linear", beta_start=0.00085, beta_end=0.012, first_timestep=1)
    found = [e.timestep for e in DPMSolver2(diffusion=process).evaluations(20)]

    known = np.arange(1, 1001) / 1000
    log_alpha = 0.5 * np.log(1 - np.linspace(0.00085**0.5, 0.012**0.5, 1000) ** 2).cumsum()
    ends = np.linspace(1, 1e-3, 11)
    at_ends = np.interp(ends, known, log_alpha)
    log_snr = at_ends - 0.5 * np.log(1 - np.exp(2 * at_ends))
    middle = (log_snr[:-1] + log_snr[1:]) / 2
    halfway = np.interp(-0.5 * np.logaddexp(0, -2 * middle), log_alpha[::-1], known[::-1])
    np.testing.assert_allclose(found, 1000 * np.stack([ends[:-1], halfway], axis=1).reshape(-1), rtol=1e-6)
    assert [e.stage for e in DPMSolver2().evaluations(6)] == [0, 1] * 3


def test_clamping_keeps_prediction_in_range() -> None:
    """With predictions clamped to [-1, 1], what the noise implies agrees with them: both forms end in range."""
    for predict in ("image", "noise"):
        solver = DPMSolver2(predict=predict)  # type: ignore[arg-type]
        *_, images = denoise(solver, lambda x, _: -9 * torch.ones_like(x), noise(), 8)
        assert 0.9 < images.min() <= images.max() < 1.1


def test_impossible_runs_of_dpm_solver_2_are_refused() -> None:
    """Odd counts, steps without a whole timestep in between, and unknown predictions."""
    with pytest.raises(ValueError, match="two evaluations per step: an even number of them, got 7"):
        DPMSolver2().evaluations(7)
    with pytest.raises(ValueError, match="no whole timestep lies between"):
        DPMSolver2(whole=True).evaluations(1200)
    with pytest.raises(ValueError, match="predict='velocity': use 'image' or 'noise'"):
        DPMSolver2(predict="velocity")  # type: ignore[arg-type]


def velocity(x: Tensor, evaluation: Evaluation) -> Tensor:
    """The best guess of noise - image for the Gaussian data."""
    s = evaluation.timestep / 1000
    return x * (s - (1 - s) * SPREAD**2) / ((1 - s) ** 2 * SPREAD**2 + s**2)


def test_euler_follows_the_flow() -> None:
    """Half the error with twice the steps; a straight flow (one image) in one step; as diffusers at its levels."""
    few, more = (
        float((list(denoise(FlowEuler(), velocity, noise(), n))[-1] - SPREAD * noise()).abs().max()) for n in (40, 80)
    )
    assert 1.6 < few / more < 2.4
    (image,) = denoise(FlowEuler(), lambda x, _: x - 0.25, noise(), 1)
    torch.testing.assert_close(image, torch.full_like(image, 0.25))

    diffusers = pytest.importorskip("diffusers")
    scheduler = diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0)
    scheduler.set_timesteps(sigmas=[1 - i / 6 for i in range(6)])
    ours = FlowEuler(shift=3.0)
    assert [e.timestep for e in ours.evaluations(6)] == pytest.approx(scheduler.timesteps.tolist(), rel=1e-5)
    x = noise().float()
    for t in scheduler.timesteps:
        x = scheduler.step(torch.tanh(2 * x), t, x).prev_sample
    *_, images = denoise(ours, lambda x, _: torch.tanh(2 * x), noise().float(), 6)
    torch.testing.assert_close(images, x, rtol=1e-4, atol=1e-5)
    wrapped = Scheduled(scheduler=diffusers.FlowMatchEulerDiscreteScheduler())
    assert len(list(denoise(wrapped, velocity, noise().float(), 5))) == 5


@pytest.mark.filterwarnings("ignore:__array__:DeprecationWarning")  # numpy's, of diffusers
def test_a_schedulers_noise_is_the_generators() -> None:
    """Whatever the global one is at."""
    diffusers = pytest.importorskip("diffusers")
    drawn = []
    for seed in (1, 2):
        torch.manual_seed(seed)
        sampler = Scheduled(scheduler=diffusers.EulerAncestralDiscreteScheduler())
        own = torch.Generator().manual_seed(5)
        drawn.append(
            sample(lambda x, t, y: torch.tanh(x), noise(), torch.arange(3), num_steps=4, sampler=sampler, generator=own)
        )
    assert torch.equal(*drawn)


def test_fractional_timesteps_reach_the_model() -> None:
    """As float32, for every call of a run; whole ones as int64."""
    seen: list[Tensor] = []

    def model(x: Tensor, t: Tensor, y: Tensor) -> Tensor:
        seen.append(t)
        return torch.zeros_like(x)

    for name in ("dpm-solver-2", "ddim"):
        sample(model, noise(), torch.arange(3), num_steps=4, sampler=name)

    assert [t.dtype for t in seen] == [torch.float32] * 4 + [torch.int64] * 4
    assert float(seen[1][0]) % 1 != 0


def test_a_missing_diffusers_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    """The message says what to install."""
    monkeypatch.setitem(sys.modules, "diffusers", None)

    with pytest.raises(CallError, match=r"pip install 'tcc\[diffusers\]'"):
        named("dpm-solver++2m")


def test_options_belong_to_samplers() -> None:
    """A name takes the options of its sampler; a sampler has its own."""
    with pytest.raises(ValueError, match="sampler 'ddpm' has no option eta; it has clip, diffusion"):
        named("ddpm", eta=0.5)
    with pytest.raises(ValueError, match="clip: options of a sampler that is given by its name"):
        sample(lambda x, t, y: x, noise(), torch.arange(3), sampler=DDIM(), clip=False)
    with pytest.raises(ValueError, match="unknown spacing 'cosine': choose time or log-snr"):
        named("dpm-solver++2m", spacing="cosine")
