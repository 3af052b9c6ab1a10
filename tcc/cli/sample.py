"""`tcc sample`: draw images with a trained DiT, through a plan or without."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Annotated, Literal

import torch
import typer

from tcc import plans
from tcc.cli import options, screen
from tcc.cli.compile_bar import executables
from tcc.cli.sheet import SheetRow, draw_sheet
from tcc.cli.subjects import dit_inputs, load_pixel_dit, look
from tcc.data.fashion_mnist import CLASS_NAMES
from tcc.errors import PlanError
from tcc.models import Architecture, DiT
from tcc.plan import CachePlan
from tcc.runtime import Session
from tcc.samplers import Sampler, named
from tcc.samplers import sample as run_sampler

__all__ = ["class_names", "sample", "seeded_noise"]

PlanFile = Annotated[
    Path | None, typer.Option("--plan", metavar="FILE", help="A plan from tcc plan. Without: compute every step.")
]
Steps = Annotated[
    int | None,
    typer.Option(
        min=1, max=1000, help="Evaluations of the model. [dim]default: the plan's, or 50[/]", show_default=False
    ),
]
SamplerName = Annotated[
    Literal["ddim", "dpm-solver-2", "dpm-solver++2m", "dpm-solver++2s"],
    typer.Option(
        help="The solver; those of DPM-Solver++ are diffusers'. [bold]dpm-solver-2[/] evaluates twice per step: "
        "[bold]tcc plan --shifted[/] makes plans for it."
    ),
]
Out = Annotated[Path, typer.Option(metavar="FILE", callback=options.picture_file, help="The picture to write.")]


def sample(
    plan: PlanFile = None,
    classes: options.Classes = "0-9",
    steps: Steps = None,
    sampler: SamplerName = "ddim",
    cfg: options.Cfg = 1.5,
    seed: options.Seed = 0,
    out: Out = Path("samples.png"),
    backend: options.Backend = "inductor",
    regional: options.Regional = False,
    max_slot_bytes: options.MaxSlotBytes = None,
    model: options.WeightsName = "reference",
) -> None:
    """Draw images with a trained DiT, one per class label, through a cache plan.

    The reference model draws the ten classes of Fashion-MNIST: 0 T-shirt,
    1 trousers, 2 pullover, 3 dress, 4 coat, 5 sandal, 6 shirt, 7 sneaker, 8 bag,
    9 ankle boot. A plan is for one batch: images, times two under guidance.

    [bold]Examples[/]

      tcc sample --classes 7,7,7,9 --seed 1 --backend eager
      tcc plan --batch 6 -o keep=0.5 --out plan.safetensors
      tcc sample --plan plan.safetensors --classes 0,1,2
      tcc sample --sampler dpm-solver++2m --steps 12
    """
    dit, labels = load_pixel_dit(model), torch.tensor(options.numbers(classes, "--classes"))
    _check_labels(dit, labels)
    rows = len(labels) * (2 if cfg > 1 else 1)
    loaded, inputs = None if plan is None else CachePlan.load(str(plan)), dit_inputs(dit.config, rows)
    if loaded is not None:
        _check_plan(loaded, plan, inputs, steps)
    info = look(dit, inputs, {}, model)
    chosen = loaded or plans.full(info, num_steps=steps or 50)
    solver = _solver(sampler, chosen.num_steps)
    compiled = executables(info, {"plan": chosen}, backend, regional=regional, max_slot_bytes=max_slot_bytes)
    session = Session(compiled["plan"])
    start = time.perf_counter()
    with screen.bar("sampling") as bar:
        images = run_sampler(
            session, seeded_noise(dit, len(labels), seed), labels,
            num_steps=chosen.num_steps, sampler=solver, cfg_scale=cfg, null_class=dit.config.null_class, progress=bar,
        )  # fmt: skip
    seconds = time.perf_counter() - start
    draw_sheet(out, [SheetRow("", "", images)], class_names(dit, labels), "")
    screen.note(f"{len(labels)} images in {chosen.num_steps} steps, {seconds:.2f} s after compiling; wrote {out}")


def seeded_noise(model: Architecture, count: int, seed: int) -> torch.Tensor:
    """Unit Gaussian noise `[count, C, H, W]`, the same on every machine for the same seed."""
    shape = (count, model.config.in_channels, *model.config.input_size)
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def class_names(model: DiT, labels: torch.Tensor) -> list[str]:
    """Headings for the images: names for the ten classes of the reference model, else numbers."""
    known = model.config.num_classes == len(CLASS_NAMES)
    return [CLASS_NAMES[label] if known else str(label) for label in labels.tolist()]


def _solver(name: str, num_steps: int) -> Sampler:
    """The sampler, at whole timesteps, as the model is captured.

    Raises:
        typer.BadParameter: it has no run of so many evaluations.
    """
    made = named(name, **({"whole": True} if name == "dpm-solver-2" else {}))
    try:
        made.evaluations(num_steps)
    except ValueError as error:
        raise typer.BadParameter(str(error), param_hint="--sampler") from error
    return made


def _check_labels(model: DiT, labels: torch.Tensor) -> None:
    """Refuse labels that the model does not have."""
    classes = model.config.num_classes
    for label in labels.tolist():
        if label >= classes:
            raise typer.BadParameter(f"class {label}: the model has classes 0..{classes - 1}", param_hint="--classes")


def _check_plan(plan: CachePlan, path: Path | None, inputs: tuple[torch.Tensor, ...], steps: int | None) -> None:
    """Refuse a plan for other inputs, or another number of steps or rows, before anything is captured."""
    if plan.model and [axes[1:] for _, axes in plan.model.inputs] != [tuple(x.shape[1:]) for x in inputs]:
        made_for = ", ".join(f"{name} {list(axes)}" for name, axes in plan.model.inputs)
        raise PlanError(f"{path}: the plan is for another model, with the inputs {made_for}: make one for this model")
    if steps is not None and steps != plan.num_steps:
        raise PlanError(
            f"{path}: the plan has {plan.num_steps} steps and --steps is {steps}: leave --steps out, or make the "
            f"plan with tcc plan --steps {steps}"
        )
    rows = inputs[0].shape[0]
    planned = plan.model.inputs[0][1][0] if plan.model else rows
    if planned != rows:
        learned = plan.policy.get("name") in ("l2c", "learning_to_drop", "tokencache")
        trained = f" or tcc train ... --plan-batch {rows}" if learned else ""
        raise PlanError(
            f"{path}: the plan is for a batch of {planned}, and these classes and this guidance make {rows} rows: "
            f"make it with tcc plan --batch {rows}{trained}"
        )
