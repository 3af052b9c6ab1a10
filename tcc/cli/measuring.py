"""`tcc train steps | errors`: what is measured on sampling runs of the uncached model, not learned by gradients."""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

import torch
import typer
from torch import Tensor

from tcc.calibrate import calibrate
from tcc.cli import options, screen
from tcc.cli.sample import seeded_noise
from tcc.cli.subjects import dit_inputs, load_pixel_dit, look
from tcc.driver import CompiledModel
from tcc.driver import compile as compile_model
from tcc.info import ModelInfo
from tcc.models import DiT
from tcc.plan import CachePlan
from tcc.plan.picture import facts
from tcc.plans.forecast import even_steps, forecast
from tcc.samplers import sample
from tcc.train.placement import image_quality, search_steps

__all__ = ["errors", "steps"]

Level = Literal["block", "branch", "out"]
Steps = Annotated[int, typer.Option("--steps", min=2, max=1000, help="Denoising steps of one run.")]
Images = Annotated[int, typer.Option(min=1, help="Images of one run; their classes go round.")]
PlanBatch = Annotated[int, typer.Option(min=1, help="Rows of one model call under the plan.")]


@dataclass(frozen=True)
class _Run:
    """Runs of a sampler: the model, the labels and what they have in common."""

    dit: DiT
    labels: Tensor
    steps: int
    cfg: float

    @property
    def rows(self) -> int:
        return len(self.labels) * (2 if self.cfg > 1 else 1)

    @property
    def options(self) -> dict[str, Any]:
        return {"num_steps": self.steps, "cfg_scale": self.cfg}

    def noise(self, seed: int) -> Tensor:
        return seeded_noise(self.dit, len(self.labels), seed)

    def draw(self, model: Callable[..., Any], seed: int) -> Tensor:
        return sample(model, self.noise(seed), self.labels, null_class=self.dit.config.null_class, **self.options)


def _run(model: str, images: int, steps: int, cfg: float) -> _Run:
    dit = load_pixel_dit(model)
    return _Run(dit, torch.arange(images) % dit.config.num_classes, steps, cfg)


def steps(
    out: Annotated[
        Path, typer.Option(metavar="FILE", callback=options.tensors_file, help="The plan to write.", show_default=False)
    ],
    json: options.Json = None,
    model: options.WeightsName = "reference",
    num_steps: Steps = 50,
    i_steps: Annotated[int, typer.Option(min=2, help="How many steps compute everything.")] = 14,
    order: Annotated[int, typer.Option(min=0, help="Order of the forecast in between; 0 reuses.")] = 2,
    level: Annotated[Level, typer.Option(help="What is forecast; see [bold]tcc plan --policy forecast[/].")] = "block",
    images: Images = 10,
    cfg: options.Cfg = 1.5,
    evaluations: Annotated[int, typer.Option(min=1, help="Placements to measure.")] = 300,
    seed: Annotated[int, typer.Option(min=0, max=options.MAX_SEED, help="Seed of the noise and of the search.")] = 0,
    backend: options.Backend = "inductor",
    plan_batch: PlanBatch = 20,
) -> None:
    """Search where the computed steps stand, by the images that come out (policy forecast).

    Starts from evenly spread steps and moves one at a time. The result is measured
    again on noise that the search has not seen.

    [bold]Examples[/]

      tcc train steps --i-steps 18 --out forecast18.safetensors
      tcc train steps --steps 20 --i-steps 7 --order 1 --evaluations 100 --out forecast7.safetensors
    """
    options.check_apart({"--out": out, "--json": json}, model)
    run = _run(model, images, num_steps, cfg)
    info = look(run.dit, dit_inputs(run.dit.config, run.rows), {}, model)
    policy = functools.partial(_plan, info, num_steps, order, level)
    start = even_steps(num_steps, i_steps)
    compiled = compile_model(run.dit, policy(start), backend=backend)
    quality = _quality(run, compiled, policy, seed)
    with screen.bar("placing I-steps", evaluations) as bar:

        def progress(done: int, best: float) -> None:
            bar(done, evaluations)
            bar.describe(f"placing I-steps: {best:.1f} dB")

        found = search_steps(quality, start, num_steps=num_steps, evaluations=evaluations, seed=seed, progress=progress)
    unseen = _quality(run, compiled, policy, seed + 1)
    held_out = {"start": unseen(start), "found": unseen(found.i_steps)}
    target = look(run.dit, dit_inputs(run.dit.config, plan_batch), {}, model)
    plan = _plan(target, num_steps, order, level, found.i_steps)
    plan.save(str(out))
    screen.out().print(plan.summary(), soft_wrap=True, markup=False)
    screen.note(
        f"{found.evaluations} placements; PSNR {found.start:.1f} dB evenly spread, {found.quality:.1f} dB found; on "
        f"unseen noise {held_out['start']:.1f} and {held_out['found']:.1f} dB"
    )
    screen.note(f"wrote {out}")
    record = {"model": model, "evaluations": found.evaluations, "start": found.start, "quality": found.quality}
    screen.write_json(json, record | {"unseen": held_out, "plan": facts(plan)})


def _plan(info: ModelInfo, num_steps: int, order: int, level: Level, i_steps: tuple[int, ...]) -> CachePlan:
    return forecast(info, num_steps=num_steps, i_steps=i_steps, order=order, level=level)


def _quality(
    run: _Run, compiled: CompiledModel, policy: Callable[[tuple[int, ...]], CachePlan], seed: int
) -> Callable[[tuple[int, ...]], float]:
    with screen.status("sampling without a cache"):
        expected = run.draw(run.dit, seed)
    return image_quality(compiled, policy, run.noise(seed), run.labels, expected, cfg_scale=run.cfg)


def errors(
    out: Annotated[
        Path,
        typer.Option(
            metavar="FILE", callback=options.tensors_file, help="The measurement to write.", show_default=False
        ),
    ],
    model: options.WeightsName = "reference",
    num_steps: Steps = 50,
    back: Annotated[int, typer.Option(min=1, help="Compare with values up to so many steps older.")] = 3,
    images: Images = 10,
    cfg: options.Cfg = 1.5,
    seed: options.Seed = 0,
) -> None:
    """Measure how much every branch changes from step to step (for policies smoothcache and metric).

    [bold]Examples[/]

      tcc train errors --out errors50.safetensors
      tcc plan --policy smoothcache -o errors=errors50.safetensors -o alpha=0.1
    """
    options.check_apart({"--out": out}, model)
    run = _run(model, images, num_steps, cfg)
    info = look(run.dit, dit_inputs(run.dit.config, run.rows), {}, model)
    with screen.status("sampling without a cache"):
        measured = calibrate(info, lambda probe: run.draw(probe, seed), num_steps=num_steps, back=back)
    measured.save(out)
    screen.note(f"{len(measured.sites)} sites, {measured.num_steps} steps, up to {back} steps back; wrote {out}")
