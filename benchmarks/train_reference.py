"""Train the reference model: a class-conditional DiT on Fashion-MNIST.

    python benchmarks/train_reference.py --data FOLDER --out RUN [--init WEIGHTS] [--minutes 90]

Writes into RUN, and continues from there when started again after a kill:
    checkpoint.safetensors   model, average, optimiser and progress (replaced atomically)
    weights.safetensors      the averaged (EMA) weights in float16: what tcc ships
    samples_<step>.png       a sheet of samples, one class per column
    log.txt                  one line per report
"""

from __future__ import annotations

import argparse
import contextlib
import copy
import dataclasses
import json
import math
import os
import sys
import time
from collections.abc import Callable
from pathlib import Path

import matplotlib.image
import safetensors.torch
import torch
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn
from safetensors import safe_open
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from tcc.data import fashion_mnist
from tcc.models import DiT, load_weights, save_weights
from tcc.samplers import Diffusion, sample

WARMUP_STEPS = 200
FINAL_LR = 0.05  # share of the peak learning rate at the end
DIFFUSION = Diffusion()


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Settings:
    """What a run does; stored in its checkpoint, so that a resumed run must agree.

    Attributes:
        width: width D of the stream.
        depth: number of blocks.
        heads: attention heads.
        patch: patch size.
        batch: images per step.
        lr: peak learning rate.
        ema: decay of the averaged weights.
        min_snr: gamma of the min-SNR loss weight (Hang et al. 2023, for noise prediction); 0: none.
        steps: length of the schedule in steps; 0 for none.
        minutes: length of the schedule in minutes of training; 0 for none. With both, whichever is reached
            first ends the schedule.
        seed: seeds everything.
        bf16: run the model under bfloat16 autocast.
    """

    width: int = 128
    depth: int = 12
    heads: int = 4
    patch: int = 4
    batch: int = 64
    lr: float = 1e-3
    ema: float = 0.9995
    min_snr: float = 5.0
    steps: int = 20000
    minutes: float = 0.0
    seed: int = 0
    bf16: bool = False

    def __post_init__(self) -> None:
        """Refuse a schedule without an end."""
        if self.steps <= 0 and self.minutes <= 0:
            raise ValueError("give the schedule an end: --steps N, --minutes M, or both")

    def share_done(self, step: int, seconds: float) -> float:
        """Share of the schedule behind us, in [0, 1]."""
        by_steps = step / self.steps if self.steps > 0 else 0.0
        by_time = seconds / (60 * self.minutes) if self.minutes > 0 else 0.0
        return min(1.0, max(by_steps, by_time))

    def learning_rate(self, step: int, seconds: float) -> float:
        """Linear warm-up over 200 steps, cosine decay to 5 % over the schedule."""
        cosine = (1 + math.cos(math.pi * self.share_done(step, seconds))) / 2
        return self.lr * min(1.0, (step + 1) / WARMUP_STEPS) * (FINAL_LR + (1 - FINAL_LR) * cosine)


class Trainer:
    """A run: the model, its average, the optimiser, and how far they have come."""

    def __init__(self, settings: Settings, images: Tensor, labels: Tensor, *, device: str, fast: bool) -> None:
        torch.manual_seed(settings.seed)
        self.settings = settings
        self.images, self.labels = images.to(device), labels.to(device)
        self.model = DiT(
            input_size=images.shape[-1],
            patch_size=settings.patch,
            in_channels=1,
            hidden_size=settings.width,
            depth=settings.depth,
            num_heads=settings.heads,
            num_classes=len(fashion_mnist.CLASS_NAMES),
            learn_sigma=False,
        ).to(device)
        self.average = copy.deepcopy(self.model).eval().requires_grad_(False)
        trained = [parameter for parameter in self.model.parameters() if parameter.requires_grad]
        self.optimiser = torch.optim.AdamW(trained, betas=(0.9, 0.99), weight_decay=0.0, fused=True)
        self.loss_of: Callable[..., Tensor] = torch.compile(self._loss) if fast else self._loss
        self.step, self.seconds = 0, 0.0

    def start_from(self, weights: Path) -> None:
        """Take over given weights, for the model and for its average."""
        load_weights(self.model, weights)
        load_weights(self.average, weights)

    @property
    def done(self) -> bool:
        """Whether the schedule has ended."""
        return self.settings.share_done(self.step, self.seconds) >= 1.0

    def train_step(self) -> Tensor:
        """Make one step and return its loss, a scalar.

        All randomness is seeded by the step's number, so a resumed run repeats what an unbroken one does.
        """
        started = time.monotonic()
        for group in self.optimiser.param_groups:
            group["lr"] = self.settings.learning_rate(self.step, self.seconds)
        torch.manual_seed(self.settings.seed * 1_000_003 + self.step)
        picked = self._picked()
        x0 = fashion_mnist.to_signal(self.images[picked])
        # One timestep from each of B equal strata: the loss depends on t more than on anything else.
        strata = torch.randperm(len(x0)) + torch.rand(len(x0))
        t = (strata / len(x0) * DIFFUSION.num_train_steps).long().to(x0.device)
        noise = torch.randn(x0.shape).to(x0.device)
        with self._attention():
            loss = self.loss_of(DIFFUSION.add_noise(x0, t, noise), t, self.labels[picked], noise, self._weight(t))
            loss.backward()
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        self.optimiser.step()
        self.optimiser.zero_grad()
        self._update_average()
        self.step += 1
        self.seconds += time.monotonic() - started
        return loss.detach()

    @torch.no_grad()
    def test_loss(self, images: Tensor, labels: Tensor) -> float:
        """Unweighted noise error of the averaged weights on given images, in one fixed noise."""
        generator = torch.Generator().manual_seed(0)
        x0 = fashion_mnist.to_signal(images)
        t = ((torch.arange(len(x0)) + 0.5) / len(x0) * DIFFUSION.num_train_steps).long()
        noise = torch.randn(x0.shape, generator=generator)
        device = self.images.device
        noisy = DIFFUSION.add_noise(x0, t, noise).to(device)
        predicted = self.average(noisy, t.to(device), labels.to(device)).cpu()
        return (predicted - noise).square().mean().item()

    def save(self, out: Path) -> None:
        """Write the checkpoint and the averaged weights, each replaced atomically."""
        tensors = {f"model.{name}": tensor for name, tensor in self.model.state_dict().items()}
        tensors |= {f"average.{name}": tensor for name, tensor in self.average.state_dict().items()}
        for index, state in self.optimiser.state_dict()["state"].items():
            tensors |= {f"optimiser.{index}.{name}": tensor for name, tensor in state.items()}
        tensors = {name: tensor.cpu().contiguous() for name, tensor in tensors.items()}
        progress = {"step": self.step, "seconds": self.seconds, "settings": dataclasses.asdict(self.settings)}
        partial = out / "checkpoint.partial"
        safetensors.torch.save_file(tensors, partial, metadata={"progress": json.dumps(progress)})
        os.replace(partial, out / "checkpoint.safetensors")
        save_weights(self.average, out / "weights.safetensors")

    def resume(self, path: Path) -> None:
        """Continue from a checkpoint of a run with the same settings."""
        with safe_open(path, framework="pt") as file:
            progress = json.loads(file.metadata()["progress"])
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        stored, asked = progress["settings"], dataclasses.asdict(self.settings)
        changed = [f"{name} {stored.get(name)} -> {asked[name]}" for name in asked if stored.get(name) != asked[name]]
        if changed:
            raise ValueError(f"{path} is of a run with other settings ({', '.join(changed)}): choose another --out")
        self.model.load_state_dict(_under("model.", tensors))
        self.average.load_state_dict(_under("average.", tensors))
        state: dict[int, dict[str, Tensor]] = {}
        for name, tensor in _under("optimiser.", tensors).items():
            index, _, field = name.partition(".")
            state.setdefault(int(index), {})[field] = tensor
        groups = self.optimiser.state_dict()["param_groups"]
        self.optimiser.load_state_dict({"state": state, "param_groups": groups})
        self.step, self.seconds = progress["step"], progress["seconds"]

    def _loss(self, x: Tensor, t: Tensor, y: Tensor, noise: Tensor, weight: Tensor) -> Tensor:
        with torch.autocast(x.device.type, torch.bfloat16, enabled=self.settings.bf16):
            predicted = self.model(x, t, y)
        return (weight * (predicted.float() - noise).square().mean(dim=(1, 2, 3))).mean()

    def _weight(self, t: Tensor) -> Tensor:
        """Loss weight min(SNR, gamma) / SNR of each timestep, ``[B]``."""
        alpha_bar = DIFFUSION.alpha_bar.to(t.device)[t]
        snr = alpha_bar / (1 - alpha_bar)
        gamma = self.settings.min_snr
        return (snr.clamp(max=gamma) / snr if gamma > 0 else torch.ones_like(snr)).float()

    def _picked(self) -> Tensor:
        """Which images this step sees, ``[batch]``: every image once per epoch, in the epoch's own order."""
        count, batch = len(self.images), min(self.settings.batch, len(self.images))
        epoch, position = divmod(self.step, count // batch)
        order = torch.randperm(count, generator=torch.Generator().manual_seed(self.settings.seed + epoch))
        return order[position * batch : (position + 1) * batch].to(self.images.device)

    @torch.no_grad()
    def _update_average(self) -> None:
        decay = min(self.settings.ema, (1 + self.step) / (10 + self.step))
        pairs = zip(self.average.parameters(), self.model.parameters(), strict=True)
        own, new = zip(*pairs, strict=True)
        torch._foreach_lerp_(own, [parameter.detach() for parameter in new], 1 - decay)

    def _attention(self) -> contextlib.AbstractContextManager[None]:
        # The fused CPU attention is six times slower in bfloat16 than in float32 going backward (torch 2.13).
        slow = self.settings.bf16 and self.images.device.type == "cpu"
        return sdpa_kernel(SDPBackend.MATH) if slow else contextlib.nullcontext()


def _under(prefix: str, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """The entries whose names start with a prefix, without it."""
    return {name.removeprefix(prefix): tensor for name, tensor in tensors.items() if name.startswith(prefix)}


def sample_sheet(model: DiT, path: Path, *, rows: int = 4, num_steps: int = 50, cfg_scale: float = 2.0) -> None:
    """Draw a sheet of samples, one class per column, from one fixed noise; each pixel drawn 3x3."""
    classes, size = model.config.num_classes, model.config.input_size[0]
    device = next(model.parameters()).device
    noise = torch.randn(rows * classes, 1, size, size, generator=torch.Generator().manual_seed(1))
    labels = torch.arange(classes).repeat(rows)
    images = sample(model, noise.to(device), labels.to(device), num_steps=num_steps, cfg_scale=cfg_scale).cpu()
    sheet = images.view(rows, classes, size, size).permute(0, 2, 1, 3).reshape(rows * size, classes * size)
    sheet = sheet.repeat_interleave(3, dim=0).repeat_interleave(3, dim=1)
    matplotlib.image.imsave(path, sheet.numpy(), cmap="gray", vmin=-1, vmax=1)


class Report(contextlib.AbstractContextManager["Report"]):
    """Tells how a run goes: a progress bar on a terminal, plain lines elsewhere, and always a log file."""

    def __init__(self, trainer: Trainer, log: Path) -> None:
        self.trainer = trainer
        self.file = log.open("a")
        self.bar = Progress(
            *(TextColumn("step {task.fields[step]}"), BarColumn(), TextColumn("{task.percentage:.0f} %")),
            *(TimeElapsedColumn(), TextColumn("{task.fields[line]}")),
            disable=not sys.stdout.isatty(),
        )
        self.task = self.bar.add_task("training", total=1.0, line="", step=trainer.step)

    def __enter__(self) -> Report:
        self.bar.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.bar.stop()
        self.file.close()

    def tick(self) -> None:
        """Move the bar."""
        share = self.trainer.settings.share_done(self.trainer.step, self.trainer.seconds)
        self.bar.update(self.task, completed=share, step=self.trainer.step)

    def line(self, text: str) -> None:
        """Report one line."""
        self.file.write(text + "\n")
        self.file.flush()
        self.bar.update(self.task, line=text)
        if self.bar.disable:
            print(text, flush=True)


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Every:
    """After how many steps to report, to save, and to draw a sheet of samples."""

    log: int
    save: int
    sheet: int


def train(trainer: Trainer, out: Path, test: tuple[Tensor, Tensor], every: Every) -> None:
    """Run the schedule to its end, reporting, saving and drawing on the way."""
    losses: list[Tensor] = []
    with Report(trainer, out / "log.txt") as report:
        while not trainer.done:
            losses.append(trainer.train_step())
            report.tick()
            if trainer.step % every.log == 0 or trainer.done:
                share = trainer.settings.share_done(trainer.step, trainer.seconds)
                report.line(
                    f"step {trainer.step}  {share:.1%}  loss {torch.stack(losses).mean().item():.4f}  "
                    f"{trainer.seconds / 60:.1f} min  {trainer.seconds / trainer.step:.3f} s/step"
                )
                losses.clear()
            if trainer.step % every.save == 0 or trainer.done:
                trainer.save(out)
            if trainer.step % every.sheet == 0 or trainer.done:
                sample_sheet(trainer.average, out / f"samples_{trainer.step:06d}.png")
                report.line(f"step {trainer.step}  test loss of the average {trainer.test_loss(*test):.5f}")


def parse(arguments: list[str] | None) -> argparse.Namespace:
    """Read the command line; every field of Settings is an option."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, default=Path("../shared/data/fashion-mnist"), help="folder of IDX files")
    parser.add_argument("--out", type=Path, default=Path("train_reference_out"), help="folder of the run")
    parser.add_argument("--init", type=Path, help="weights to start from")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--compile", action="store_true", help="compile the loss with Inductor")
    parser.add_argument("--log-every", type=int, default=100)
    parser.add_argument("--save-every", type=int, default=500)
    parser.add_argument("--sheet-every", type=int, default=2000)
    for field in dataclasses.fields(Settings):
        option = f"--{field.name.replace('_', '-')}"
        if isinstance(field.default, bool):
            parser.add_argument(option, action=argparse.BooleanOptionalAction, default=field.default)
        else:
            parser.add_argument(option, type=type(field.default), default=field.default)
    return parser.parse_args(arguments)


def main(arguments: list[str] | None = None) -> int:
    """Train, or say in one line why not."""
    args = parse(arguments)
    torch.set_num_threads(args.threads)
    try:
        settings = Settings(**{field.name: getattr(args, field.name) for field in dataclasses.fields(Settings)})
        images, labels = fashion_mnist.load(args.data, "train")
        test_images, test_labels = fashion_mnist.load(args.data, "test")
        trainer = Trainer(settings, images, labels, device=args.device, fast=args.compile)
        args.out.mkdir(parents=True, exist_ok=True)
        if (args.out / "checkpoint.safetensors").exists():
            trainer.resume(args.out / "checkpoint.safetensors")
        elif args.init:
            trainer.start_from(args.init)
    except (ValueError, FileNotFoundError) as error:
        print(f"train_reference: {error}", file=sys.stderr)
        return 2
    every = Every(log=args.log_every, save=args.save_every, sheet=args.sheet_every)
    train(trainer, args.out, (test_images[:1000], test_labels[:1000]), every)
    return 0


if __name__ == "__main__":
    sys.exit(main())
