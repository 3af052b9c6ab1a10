"""Make what the learned rows of `benchmarks/quality.py` need: routers, importances, calibrations, placed I-steps.

    python benchmarks/quality_learn.py --learned FOLDER --data FASHION_MNIST --steps 50 20 [--only router]

What is there is not made again, and a stopped training goes on. Every file takes at most 15 minutes on two idle cores;
`--results` writes what the trainings took.
All noise is drawn from seeds that `quality.py` does not use.
"""

from __future__ import annotations

import argparse
import functools
import json
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from provenance import provenance
from quality_rows import (
    CALIBRATION,
    COMPARED,
    DROPPER,
    IMPORTANCE,
    NETWORK,
    PAIRS_ROUTER,
    PRICED,
    PROBES,
    SHARES,
    WHOLE_RUN_PROBES,
    WHOLE_RUNS,
    Visits,
    placed_file,
    visited_file,
)
from safetensors import safe_open

import tcc
from tcc import plans
from tcc.calibrate import calibrate
from tcc.metrics import psnr
from tcc.models import reference_model
from tcc.plans.forecast import even_steps
from tcc.samplers import sample
from tcc.train.placement import image_quality, search_steps

CFG, SEED = 1.5, 987_654_321
#: How predictors are trained, so that forms and recipes can be compared.
PREDICTORS = ("--recipe", "pairs", "--target", "0.5", "--iterations", "1500")
#: What `tcc train` makes, and its options. Routers trained on whole runs ship with tcc.
TRAINED: dict[str, tuple[str, ...]] = {
    PAIRS_ROUTER: ("router", "--recipe", "pairs", "--lambda", "1.5e-6", "--iterations", "1200"),
    DROPPER: ("router", "--recipe", "pairs", "--drop", "--target", "0.7"),
    IMPORTANCE: ("predictor", "--form", "table", *PREDICTORS),
    NETWORK: ("predictor", "--form", "network", *PREDICTORS),
    PROBES: ("predictor", "--form", "stream", *PREDICTORS),
    COMPARED: ("predictor", "--form", "table", *PREDICTORS, "--compare", "stream"),
    WHOLE_RUN_PROBES: ("predictor", "--form", "stream", "--target", "0.5", "--iterations", "60"),
    WHOLE_RUNS: ("predictor", "--form", "table", "--target", "0.5", "--iterations", "60"),  # as many calls of the model
    PRICED: ("predictor", "--form", "table", "--recipe", "pairs", "--lambda", "2e-6", "--iterations", "1500"),
}
Quality = Callable[[tuple[int, ...]], float]


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


def state_of(path: Path) -> Path:
    """Where `tcc train` leaves its state for this file."""
    return path.with_suffix(".plan.state.safetensors")


def trained(path: Path, options: Sequence[str]) -> dict[str, Any]:
    """What a training took, by its state, which stands beside its plan."""
    with safe_open(state_of(path), "pt") as state:
        told = json.loads(state.metadata()["tcc.training"])
    return {
        "file": path.name,
        "options": " ".join(options),
        "iterations": told["iteration"],
        "seconds": told["seconds"],
    }


def measure(path: Path, steps: int, images: int) -> None:
    """Calibrate the uncached model on so many images."""
    model, noise, labels = _draws(images)
    info = tcc.inspect(model, *(torch.zeros(2 * images, *shape, dtype=d) for shape, d in _INPUTS))
    run = functools.partial(sample, noise=noise, labels=labels, num_steps=steps, cfg_scale=CFG, null_class=10)
    calibrate(info, lambda recorder: run(recorder), num_steps=steps).save(path)


def forecast_quality(steps: int, images: int, backend: str) -> Quality:
    """How near a forecast comes to the uncached images, by its I-steps: dB, mean over so many images."""
    model, noise, labels = _draws(images)
    expected = sample(model, noise, labels, num_steps=steps, cfg_scale=CFG)
    example = tuple(torch.zeros(2 * images, *shape, dtype=d) for shape, d in _INPUTS)
    policy = functools.partial(plans.full, num_steps=steps)
    compiled = tcc.compile(model, policy, example_inputs=(example, {}), backend=backend)
    info = compiled.info
    assert info is not None
    forecast = functools.partial(plans.forecast, info, num_steps=steps)
    options = {"cfg_scale": CFG, "null_class": model.config.null_class}
    return image_quality(compiled, lambda chosen: forecast(i_steps=chosen), noise, labels, expected, **options)


def ddim_quality(steps: int, images: int, _backend: str) -> Quality:
    """How near DDIM comes to the uncached images, by the steps that it visits; as `forecast_quality`."""
    model, noise, labels = _draws(images)
    expected = sample(model, noise, labels, num_steps=steps, cfg_scale=CFG)

    def quality(visited: tuple[int, ...]) -> float:
        places = Visits(of=steps, visited=visited)
        drawn = sample(model, noise, labels, num_steps=len(visited), cfg_scale=CFG, diffusion=places)
        return float(psnr(drawn, expected).clamp(max=140).mean())

    return quality


def place(path: Path, quality: Quality, steps: int, share: float, evaluations: int) -> None:
    """Search the best places for a share of the steps."""
    start = even_steps(steps, max(2, round(share * steps)))
    found = search_steps(quality, start, num_steps=steps, evaluations=evaluations)
    print(f"{path.name}: {found.start:.2f} dB evenly spread, {found.quality:.2f} dB found: {found.i_steps}", flush=True)
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
    parser.add_argument("--minutes", type=float, default=15.0, help="of every training, at most")
    parser.add_argument("--images", type=int, default=20, help="of a calibration and of a search")
    parser.add_argument("--evaluations", type=int, default=200, help="of a search")
    parser.add_argument("--backend", default="inductor", help="of a search")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--results", type=Path, help="write what the trainings took here")
    args = parser.parse_args(arguments)
    torch.set_num_threads(args.threads)
    args.learned.mkdir(parents=True, exist_ok=True)
    for steps in args.steps:
        for file, make in jobs(args, steps).items():
            path = args.learned / file.format(steps=steps)
            if not path.exists() and any(word in path.name for word in args.only):
                print(f"making {path}", flush=True)
                make(path)
    if args.results is not None:
        paths = {args.learned / file.format(steps=n): TRAINED[file] for n in args.steps for file in TRAINED}
        rows = [trained(path, options) for path, options in paths.items() if state_of(path).exists()]
        text = json.dumps({**provenance(), "rows": rows}, indent=1)
        (args.results / "training.json").write_text(text + "\n")
    return 0


def jobs(args: argparse.Namespace, steps: int) -> dict[str, Callable[[Path], None]]:
    """What makes each file."""
    found: dict[str, Callable[[Path], None]] = {
        CALIBRATION: functools.partial(measure, steps=steps, images=args.images)
    }
    qualities = {placed_file: forecast_quality, visited_file: ddim_quality}
    qualities = {file: functools.cache(quality) for file, quality in qualities.items()}  # one model for all shares
    for share in SHARES:
        for file, quality in qualities.items():
            found[file(share)] = lambda path, quality=quality, share=share: place(
                path, quality(steps, args.images, args.backend), steps, share, args.evaluations
            )
    for file, options in TRAINED.items():
        found[file] = functools.partial(train, options=options, steps=steps, data=args.data, minutes=args.minutes)
    return found


if __name__ == "__main__":
    sys.exit(main())
