"""Make what the learned rows of `benchmarks/quality.py` need: routers, importances, calibrations, placed I-steps.

    python benchmarks/quality_learn.py --learned FOLDER --data FASHION_MNIST --steps 50 20 [--only router]

What is there is not made again, and a stopped training goes on. Every file takes at most 15 minutes on two idle cores.
All noise is drawn from seeds that `quality.py` does not use.
"""

from __future__ import annotations

import argparse
import functools
import json
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import torch
from quality_rows import CALIBRATION, FORECAST_SHARES, IMPORTANCE, NETWORK, PAIRS_ROUTER, PROBES, ROUTER, placed_file
from rich.console import Console

import tcc
from tcc import plans
from tcc.calibrate import calibrate
from tcc.models import reference_model
from tcc.plans.forecast import even_steps
from tcc.samplers import sample
from tcc.train.placement import image_quality, search_steps

CFG, SEED = 1.5, 987_654_321
#: What `tcc train` makes, and its options. The I-steps of all are every other step.
TRAINED: dict[str, tuple[str, ...]] = {
    ROUTER: ("router", "--recipe", "trajectory", "--cfg", "1.5"),
    PAIRS_ROUTER: ("router", "--recipe", "pairs"),
    IMPORTANCE: ("predictor", "--form", "table", "--recipe", "trajectory", "--cfg", "1.5", "--target", "0.5"),
    PROBES: ("predictor", "--form", "stream", "--recipe", "trajectory", "--cfg", "1.5", "--target", "0.5"),
    NETWORK: ("predictor", "--form", "network", "--recipe", "trajectory", "--cfg", "1.5", "--target", "0.5"),
}


def train(path: Path, options: Sequence[str], steps: int, data: Path, minutes: float) -> None:
    """Run `tcc train` for one file; its plan and its state stand beside it.

    Raises:
        CalledProcessError: the command failed.
    """
    plan, partial = path.with_suffix(".plan.safetensors"), path.with_suffix(".partial.safetensors")
    command = [sys.executable, "-m", "tcc", "train", *options, "--steps", str(steps), "--minutes", str(minutes)]
    command += ["--data", str(data)] if "pairs" in options else []
    subprocess.run([*command, "--out", str(plan), "--learned", str(partial)], check=True)
    partial.replace(path)


def measure(path: Path, steps: int, images: int) -> None:
    """Calibrate the uncached model on so many images."""
    model, noise, labels = _draws(images)
    info = tcc.inspect(model, *(torch.zeros(2 * images, *shape, dtype=d) for shape, d in _INPUTS))
    run = functools.partial(sample, noise=noise, labels=labels, num_steps=steps, cfg_scale=CFG, null_class=10)
    calibrate(info, lambda recorder: run(recorder), num_steps=steps).save(path)


def place(path: Path, steps: int, share: float, images: int, evaluations: int, console: Console) -> None:
    """Search where the I-steps of a forecast stand, by the PSNR of a few images."""
    model, noise, labels = _draws(images)
    expected = sample(model, noise, labels, num_steps=steps, cfg_scale=CFG)
    policy = functools.partial(plans.full, num_steps=steps)
    example = tuple(torch.zeros(2 * images, *shape, dtype=d) for shape, d in _INPUTS)
    compiled = tcc.compile(model, policy, example_inputs=(example, {}))
    assert compiled.info is not None
    quality = image_quality(
        compiled,
        lambda i_steps: plans.forecast(compiled.info, num_steps=steps, i_steps=i_steps),
        noise,
        labels,
        expected,
        cfg_scale=CFG,
        null_class=10,
    )
    start = even_steps(steps, max(2, round(share * steps)))
    found = search_steps(quality, start, num_steps=steps, evaluations=evaluations)
    console.print(f"{path.name}: {found.start:.2f} dB evenly spread, {found.quality:.2f} dB found: {found.i_steps}")
    path.write_text(json.dumps(list(found.i_steps)) + "\n")


_INPUTS = (((1, 32, 32), torch.float32), ((), torch.int64), ((), torch.int64))


def _draws(images: int) -> tuple[tcc.models.DiT, torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(SEED)
    return reference_model(), torch.randn(images, 1, 32, 32, generator=generator), torch.arange(images) % 10


def main(arguments: list[str] | None = None) -> int:
    """Make what is missing."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--learned", type=Path, default=Path("learned"), help="folder to fill")
    parser.add_argument("--data", type=Path, default=Path("../shared/data/fashion-mnist"), help="folder of IDX files")
    parser.add_argument("--steps", type=int, nargs="+", default=[50, 20])
    parser.add_argument("--only", nargs="+", default=[""], help="files whose name holds one of these words")
    parser.add_argument("--minutes", type=float, default=10.0, help="of every training")
    parser.add_argument("--images", type=int, default=20, help="of a calibration and of a search")
    parser.add_argument("--evaluations", type=int, default=200, help="of a search")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    args, console = parser.parse_args(arguments), Console(highlight=False)
    torch.set_num_threads(args.threads)
    args.learned.mkdir(parents=True, exist_ok=True)
    for steps in args.steps:
        jobs = {CALIBRATION: lambda path, s=steps: measure(path, s, args.images)}
        jobs |= {
            placed_file(share): lambda path, s=steps, share=share: place(
                path, s, share, args.images, args.evaluations, console
            )
            for share in FORECAST_SHARES
        }
        jobs |= {
            file: lambda path, s=steps, options=options: train(path, options, s, args.data, args.minutes)
            for file, options in TRAINED.items()
        }
        for file, make in jobs.items():
            path = args.learned / file.format(steps=steps)
            if not path.exists() and any(word in path.name for word in args.only):
                console.print(f"making {path}")
                make(path)
    return 0


if __name__ == "__main__":
    sys.exit(main())
