"""`tcc run`: draw images with a bundle; the model's code is not needed."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Annotated

import torch
import typer
from safetensors.torch import save_file

from tcc.cli import options, screen
from tcc.cli.sheet import SheetRow, draw_sheet
from tcc.errors import CallError
from tcc.export import Runner, load
from tcc.samplers import sample

__all__ = ["run"]

Folder = Annotated[Path, typer.Argument(metavar="BUNDLE", help="A folder written by tcc export.", show_default=False)]
Device = Annotated[str | None, typer.Option(help="cpu or cuda. [dim]default: what it was exported for[/]")]
NullClass = Annotated[
    int | None,
    typer.Option(help="The label that means no class, for guidance: 10 for the reference model.", show_default=False),
]
Out = Annotated[
    Path,
    typer.Option(metavar="FILE", callback=options.in_a_folder, help="A picture (.png), or the numbers (.safetensors)."),
]


def run(
    folder: Folder,
    classes: options.Classes = "0-9",
    cfg: options.Cfg = 1.5,
    null_class: NullClass = None,
    seed: options.Seed = 0,
    out: Out = Path("samples.png"),
    device: Device = None,
) -> None:
    """Draw images with a bundle of a class-conditional model, by DDIM.

    The sampler, the guidance and the noise are this command's; the bundle holds
    only the model under its plan. For other models write the loop yourself,
    around [bold]tcc.load(folder)[/].

    [bold]Examples[/]

      tcc run bundle --classes 7,9 --null-class 10
      tcc run bundle --classes 0,1,2,3 --cfg 1 --out latents.safetensors
    """
    runner, labels = load(folder, device=device), torch.tensor(options.numbers(classes, "--classes"))
    shape = _check(runner, folder, len(labels), cfg, null_class)
    noise = torch.randn(len(labels), *shape, generator=torch.Generator().manual_seed(seed))
    where = torch.device(device or runner.manifest.device)
    start = time.perf_counter()
    with screen.bar("sampling") as bar:
        images = sample(
            runner, noise.to(where), labels.to(where),
            num_steps=runner.num_steps, cfg_scale=cfg, null_class=null_class, progress=bar,
        )  # fmt: skip
    seconds = time.perf_counter() - start
    if out.suffix == ".safetensors":
        save_file({"images": images.cpu().contiguous(), "labels": labels}, out)
    else:
        draw_sheet(out, [SheetRow("", "", images.cpu())], [str(label) for label in labels.tolist()], "")
    screen.note(f"{len(labels)} images in {runner.num_steps} steps, {seconds:.2f} s; wrote {out}")


def _check(runner: Runner, folder: Path, images: int, cfg: float, null_class: int | None) -> tuple[int, ...]:
    """The shape of an image; refuses what the bundle cannot draw."""
    inputs = runner.manifest.inputs
    if [len(spec.shape) for spec in inputs] != [4, 1, 1]:
        raise CallError(
            f"{folder}: takes {', '.join(f'{s.name} {list(s.shape)}' for s in inputs)}, and this command draws with "
            "models that take images, timesteps and labels: call tcc.load(folder) in a sampling loop of your own"
        )
    if cfg > 1 and null_class is None:
        raise typer.BadParameter("guidance needs the label that means no class", param_hint="--null-class")
    rows = images * (2 if cfg > 1 else 1)
    if inputs[0].shape[0] != rows:
        raise CallError(
            f"{folder}: made for a batch of {inputs[0].shape[0]}, and these classes and this guidance make {rows} "
            "rows: give as many classes as fit, or export a plan for another batch"
        )
    return inputs[0].shape[1:]
