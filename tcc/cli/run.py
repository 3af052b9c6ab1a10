"""`tcc run`: draw samples with a bundle; the model's code is not needed."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Annotated, Literal

import torch
import typer

from tcc.cli import options, screen
from tcc.cli.feeds import Parts, parts_of, read_inputs
from tcc.cli.sheet import SheetRow, draw_sheet
from tcc.errors import CallError
from tcc.export import Runner, load
from tcc.samplers import Evaluation, Sampler, denoise, guide, named
from tcc.tensors_file import save_tensors

__all__ = ["run"]

Folder = Annotated[Path, typer.Argument(metavar="BUNDLE", help="A folder written by tcc export.", show_default=False)]
Inputs = Annotated[
    list[str] | None,
    typer.Option(
        "--input",
        metavar="NAME=VALUE",
        help="A tensor for one of the bundle's inputs: a .npy or .safetensors file with all rows of a call, or a "
        "number that fills it. Repeat it for several.",
        show_default=False,
    ),
]
Classes = Annotated[
    str | None,
    typer.Option(help="Class labels, one sample each: [bold]0,1,2[/] or [bold]0-9[/]. [dim]default: 0, 1, ...[/]"),
]
Cfg = Annotated[
    float | None,
    typer.Option(
        min=1.0,
        help="Guidance scale. Above 1 the first half of a call's rows is with, the second without conditions. "
        "[dim]default: 1.5 with --null-class, else 1[/]",
        callback=options.finite,
    ),
]
NullClass = Annotated[
    int | None,
    typer.Option(help="The label that means no class, for guidance: 10 for the reference model.", show_default=False),
]
SamplerName = Annotated[
    Literal["ddim", "ddpm", "dpm-solver-2", "dpm-solver++2m", "dpm-solver++2s", "flow-euler"],
    typer.Option(help="The solver; [bold]flow-euler[/] for models of a flow."),
]
TimestepScale = Annotated[
    float, typer.Option(help="What the sampler's timesteps (up to 1000) are multiplied by: 0.001 for Flux.")
]
Clip = Annotated[
    bool | None,
    typer.Option("--clip/--no-clip", help="Keep samples in [-1, 1]. [dim]default: where they have 1 or 3 channels[/]"),
]
Device = Annotated[
    str | None, typer.Option(help="cpu or cuda. [dim]default: what it was made for; cuda where ONNX Runtime has it[/]")
]
Prepack = Annotated[
    bool,
    typer.Option(
        "--prepack/--no-prepack",
        help="ONNX on a CPU: a copy of the weights for each graph, laid out for its products; without it a run is a "
        "little slower and needs less memory.",
    ),
]
Out = Annotated[
    Path,
    typer.Option(
        metavar="FILE", callback=options.samples_file, help="A picture (.png), or the numbers (.safetensors)."
    ),
]


def run(
    folder: Folder,
    inputs: Inputs = None,
    classes: Classes = None,
    cfg: Cfg = None,
    null_class: NullClass = None,
    sampler: SamplerName = "ddim",
    timestep_scale: TimestepScale = 1.0,
    clip: Clip = None,
    seed: options.Seed = 0,
    out: Out = Path("samples.png"),
    device: Device = None,
    prepack: Prepack = True,
) -> None:
    """Draw samples with a bundle.

    The sampler, the guidance and the noise are this command's; the bundle holds
    only the model under its plan, and says what its inputs are ([bold]tcc inspect[/]).
    Noise, timesteps and labels are filled in; all else is yours to give.

    [bold]Examples[/]

      tcc run bundle --classes 7,9 --null-class 10
      tcc run bundle --classes 0,1,2,3 --out latents.safetensors
      tcc run pixart --input encoder_hidden_states=text.npy --cfg 4.5 --out latents.safetensors
    """
    runner = load(folder, device=device, prepack=prepack)
    parts = parts_of(folder, runner.manifest.inputs, read_inputs(runner.manifest.inputs, inputs or ()))
    scale = cfg or (1.0 if null_class is None else 1.5)
    count = _count(folder, parts.sample.shape, runner.manifest.outputs[0].shape, out, guided=scale > 1)
    labels = _labels(folder, parts, classes, null_class, count, scale > 1)
    solver = _solver(sampler, parts, runner.num_steps, timestep_scale, clip)
    start = time.perf_counter()
    with torch.no_grad(), screen.bar("sampling") as bar:
        noise = torch.randn(count, *parts.sample.shape[1:], generator=torch.Generator().manual_seed(seed))
        calling = _Calling(runner, parts, labels, scale, timestep_scale)
        drawing = denoise(solver, calling, noise.to(runner.device), runner.num_steps)
        for done in range(1, runner.num_steps + 1):
            samples = next(drawing)
            bar(done, runner.num_steps)
    seconds = time.perf_counter() - start
    own = [] if labels is None else labels[:count].tolist()
    if out.suffix == ".safetensors":
        save_tensors({"images": samples.cpu().contiguous(), "labels": torch.tensor(own, dtype=torch.int64)}, out)
    else:
        draw_sheet(out, [SheetRow("", "", samples.cpu())], list(map(str, own)) or [""] * count, "")
    screen.note(f"{count} samples in {runner.num_steps} steps, {seconds:.2f} s; wrote {out}")


class _Calling:
    """The bundle as a sampler calls it: from the samples `[N, C, ...]` of an evaluation to the guided output."""

    def __init__(
        self, runner: Runner, parts: Parts, labels: torch.Tensor | None, scale: float, timestep_scale: float
    ) -> None:
        self._runner, self._parts, self._scale, self._timestep_scale = runner, parts, scale, timestep_scale
        self._fixed = {name: tensor.to(runner.device) for name, tensor in parts.given.items()}
        if parts.label is not None and labels is not None:
            self._fixed[parts.label.name] = labels.to(runner.device, parts.label.torch_dtype).reshape(parts.label.shape)

    def __call__(self, x: torch.Tensor, evaluation: Evaluation) -> torch.Tensor:
        sample, timestep = self._parts.sample, self._parts.timestep
        rows = torch.cat([x, x]) if self._scale > 1 else x
        feeds = self._fixed | {sample.name: rows.to(sample.torch_dtype)}
        if timestep is not None:
            level = evaluation.timestep * self._timestep_scale
            feeds[timestep.name] = torch.full(timestep.shape, level, dtype=timestep.torch_dtype, device=x.device)
        found = self._runner(**feeds)
        output = (found if isinstance(found, torch.Tensor) else found[0]).float()
        return guide(output, self._scale, x.shape[1]) if self._scale > 1 else output


def _count(folder: Path, sample: tuple[int, ...], output: tuple[int, ...], out: Path, *, guided: bool) -> int:
    """How many samples a run draws; refuses shapes that samplers or the file cannot take."""
    if len(sample) < 2 or len(output) != len(sample) or output[:1] + output[2:] != sample[:1] + sample[2:]:
        raise CallError(
            f"{folder}: returns {list(output)} for a sample {list(sample)}, which no sampler of this command takes: "
            "call tcc.load(folder) in a sampling loop of your own"
        )
    if guided and sample[0] % 2:
        raise CallError(f"{folder}: made for a batch of {sample[0]}, and guidance takes two rows per sample: --cfg 1")
    if out.suffix != ".safetensors" and (len(sample) != 4 or sample[1] not in (1, 3)):
        raise CallError(
            f"{folder}: draws {list(sample[1:])}, which is no picture of 1 or 3 channels: --out FILE.safetensors"
        )
    return sample[0] // 2 if guided else sample[0]


def _labels(
    folder: Path, parts: Parts, classes: str | None, null_class: int | None, count: int, guided: bool
) -> torch.Tensor | None:
    """The labels of all rows, those without a class last; None where the bundle takes none.

    Raises:
        typer.BadParameter: labels or guidance are asked for, and the bundle has nothing for them.
        CallError: the labels do not fit the bundle.
    """
    if parts.label is None:
        if classes is not None or null_class is not None:
            raise typer.BadParameter("the bundle has no labels to choose", param_hint="--classes, --null-class")
        if guided and not parts.given:  # two halves alike: fewer samples, and no guidance
            raise typer.BadParameter("the bundle has no condition to leave out", param_hint="--cfg")
        return None
    if guided and null_class is None:
        raise typer.BadParameter("guidance needs the label that means no class", param_hint="--null-class")
    known = parts.label.values or count
    chosen = [i % known for i in range(count)] if classes is None else options.numbers(classes, "--classes")
    rows = [*chosen, *([null_class] * len(chosen) if guided and null_class is not None else [])]
    if len(chosen) != count:
        raise CallError(
            f"{folder}: made for a batch of {parts.sample.shape[0]}, and these classes and this guidance make "
            f"{len(rows)} rows: give {count} classes{' with guidance' if guided else ''}, or export for another batch"
        )
    if wrong := [label for label in rows if parts.label.values and not 0 <= label < parts.label.values]:
        raise CallError(f"{folder}: there is no label {wrong[0]}: {parts.label}")
    return torch.tensor(rows)


def _solver(name: str, parts: Parts, num_steps: int, timestep_scale: float, clip: bool | None) -> Sampler:
    """The sampler, at the timesteps that the bundle takes.

    Raises:
        typer.BadParameter: it has no run of so many evaluations, or the bundle takes whole timesteps and it has others.
    """
    sample, timestep = parts.sample.shape, parts.timestep
    whole = timestep is not None and not timestep.torch_dtype.is_floating_point
    settings = (
        {} if name == "flow-euler" else {"clip": (len(sample) == 4 and sample[1] in (1, 3)) if clip is None else clip}
    )
    made = named(name, **settings, **({"whole": True} if name == "dpm-solver-2" and whole else {}))
    try:
        levels = [evaluation.timestep * timestep_scale for evaluation in made.evaluations(num_steps)]
    except ValueError as error:
        raise typer.BadParameter(str(error), param_hint="--sampler") from error
    if whole and any(not float(level).is_integer() for level in levels):
        raise typer.BadParameter(
            f"{name} evaluates at fractions of timesteps, and the bundle takes whole ones", param_hint="--sampler"
        )
    return made
