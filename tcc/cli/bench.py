"""`tcc bench`: plans beside the uncached model, of any model: seconds, bounds, errors, memory, compiling."""

from __future__ import annotations

import shlex
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Literal

import torch
import typer
from torch.utils import _pytree as pytree  # no public pytree module in torch 2.11-2.13

from tcc import timing
from tcc.cli import options, record, screen
from tcc.cli.calls import Calls
from tcc.cli.compare import Task
from tcc.cli.demo import make_plans
from tcc.cli.harness import Harness, device_named
from tcc.cli.lines import UNCACHED, Line, failures, plot, table
from tcc.cli.policies import find_policy, parse_options
from tcc.cli.sample import seeded_noise
from tcc.cli.subjects import Subject, load_subject, look
from tcc.errors import ModelError, PlanError
from tcc.info import ModelInfo
from tcc.models import Architecture
from tcc.plan import CachePlan
from tcc.plan.checks import check_model
from tcc.plan.picture import facts

__all__ = ["bench"]

_FILE = ".safetensors"

Plans = Annotated[
    list[str] | None,
    typer.Argument(
        metavar="[PLAN]...",
        help="Plan files, and policies with their options, as in [bold]'fora interval=3'[/]. Without: those of "
        "[bold]tcc demo[/].",
        show_default=False,
    ),
]
Steps = Annotated[
    int | None,
    typer.Option(min=1, max=1000, help="Denoising steps. [dim]default: the plan files', or 20[/]", show_default=False),
]
Fewer = Annotated[bool, typer.Option(help="Also the uncached model with as many steps as each plan's MACs allow.")]
FoldTimesteps = Annotated[
    bool,
    typer.Option(
        "--fold-timesteps",
        help="Also every plan with its timesteps known: what depends on them and on unchanging inputs alone is "
        "computed once per run. No bound has that, so the realised share may be above 1.",
    ),
]
Device = Annotated[str, typer.Option(help="Where the model runs, such as [bold]cuda[/].")]
Dtype = Annotated[Literal["float32", "bfloat16", "float16"], typer.Option(help="What the model computes in.")]
Mode = Annotated[
    Literal["default", "reduce-overhead"],
    typer.Option(help="Of the compilers; [bold]reduce-overhead[/] replays CUDA graphs."),
]
Png = Annotated[
    Path | None,
    typer.Option(metavar="FILE", callback=options.picture_file, help="Draw speedup against closeness to the uncached."),
]


@dataclass(frozen=True)
class Request:
    """A plan that is asked for.

    Attributes:
        name: its name in the table.
        text: how it is asked for.
        family: what it counts as in the plot: its policy.
        make: makes it, for so many steps.
        steps: the steps that it has, where it is made already.
    """

    name: str
    text: str
    family: str
    make: Callable[[ModelInfo, int], CachePlan]
    steps: int | None = None


def bench(
    plan: Plans = None,
    model: options.ModelName = "reference",
    input_size: options.InputSize = 32,
    batch: options.Batch = 20,
    steps: Steps = None,
    fewer: Fewer = True,
    fold_timesteps: FoldTimesteps = False,
    cfg: options.Cfg = 1.5,
    seed: options.Seed = 0,
    rounds: options.Rounds = 5,
    seconds: options.Seconds = 120.0,
    threads: options.Threads = None,
    backend: options.Backend = "inductor",
    mode: Mode = "default",
    regional: options.Regional = False,
    device: Device = "cpu",
    dtype: Dtype = "float32",
    json: options.Json = None,
    png: Png = None,
) -> None:
    """Measure plans side by side: the uncached model eager and compiled, fewer steps, and every plan.

    All in one process, on the same weights and noise, their steps in turns. Speedups
    are over the uncached model under [bold]torch.compile[/]; the [bold]bound[/] is what the MACs allow,
    the [bold]realised share[/] one over the other. Seconds are of a whole run: medians of
    every step, summed. [bold]peak[/] is weights and what a run allocates at most.

    Models of tcc draw with DDIM and guidance, half of the batch for each branch. A
    model of your own is called as its function says; its steps are Euler steps of
    a flow, and errors tell nothing of its images.

    [bold]Examples[/]

      tcc bench --backend eager --rounds 1                     a quick look, not compiled
      tcc bench plan.safetensors 'fora interval=2' --json bench.json --png bench.png
      tcc bench 'tprr keep=0.25 attention=cached level=out' --model DiT-S/2 --batch 2 --threads 1 --fold-timesteps
      tcc bench 'forecast i_steps=7' --model mymodels:flux --steps 20 --device cuda --dtype bfloat16
    """
    options.check_apart({"--png": png, "--json": json})
    requests = _distinct([_request(text) for text in plan or ()])
    count = _steps(requests, steps)
    subject = _subject(model, batch, input_size, device_named(device), getattr(torch, dtype))
    task = _task(subject, subject.model, seed, cfg) if isinstance(subject.model, Architecture) else None
    args, kwargs = (subject.args, subject.kwargs) if task is None else task.first_call()
    with torch.no_grad():
        torch.set_num_threads(threads or timing.faster_threads(lambda: subject.model(*args, **kwargs), rounds=3))
    info = look(subject.model, args, kwargs, subject.label)
    plans = _plans(requests, info, count)
    harness = Harness(
        subject.model,
        task or Calls(info.captured, args, kwargs, seed),
        info,
        steps=count,
        branches=1 if task is None else 2,
        images=task is not None and not subject.random and task.noise.shape[1] in (1, 3),
        backend=backend,
        mode=mode,
        regional=regional,
    )
    lines = _measure(harness, plans, fewer, fold_timesteps, rounds, seconds)
    title = _title(subject.label, info, count, dtype, backend)
    screen.out().print(table(lines, title))
    if any(line.reason for line in lines):
        screen.note(failures(lines))
    if png is not None:
        plot(lines, title, png)
        screen.note(f"wrote {png}")
    settings = {"model": subject.label, "batch": info.batch, "steps": count, "seed": seed}
    settings |= {"backend": backend, "mode": mode, "regional": regional, "dtype": dtype}
    rows = [line.as_dict() for line in lines]
    shown = {name: facts(made) for (name, _), made in plans.items()}
    screen.write_json(json, {**record.head(), **settings, "rows": rows, "plans": shown})


def _measure(
    harness: Harness, plans: Mapping[tuple[str, str], CachePlan], fewer: bool, fold: bool, rounds: int, seconds: float
) -> list[Line]:
    """The rows: uncached, fewer steps, the plans."""
    with screen.status("compiling") as shown:
        harness.say = lambda text: shown.update(f"compiling {text}")
        harness.add_uncached()
        if fewer:
            counts = {max(1, round(harness.steps / made.bound)) for made in plans.values()}
            harness.add_fewer([count for count in counts if count < harness.steps])
        for (name, family), made in plans.items():
            harness.add_plan(name, family, made)
            if fold:
                harness.add_folded(name, family, made)
    with screen.bar("measuring, all in turns") as bar:
        return harness.measure(rounds, seconds, progress=bar)


def _request(text: str) -> Request:
    """What `text` asks for.

    Raises:
        PlanError: no plan can be read there, or there is no such policy or option.
    """
    if text.endswith(_FILE) and "=" not in text:
        loaded = CachePlan.load(text)
        family = str(loaded.policy.get("name", "plan"))
        return Request(Path(text).stem, text, family, lambda info, _: loaded, loaded.num_steps)
    try:
        name, *given = shlex.split(text) or [text]
    except ValueError as error:
        raise PlanError(f"{text}: {str(error).lower()}: a policy is written as 'NAME OPTION=VALUE ...'") from error
    policy, chosen = find_policy(name), parse_options(name, given)
    return Request(text, text, name, lambda info, steps: policy(info, num_steps=steps, **chosen))


def _distinct(requests: Sequence[Request]) -> list[Request]:
    """The same, each once; files of one name in several folders are named with their paths."""
    once = list({request.text: request for request in requests}.values())
    names = Counter([UNCACHED, *(request.name for request in once)])
    return [replace(request, name=request.text) if names[request.name] > 1 else request for request in once]


def _plans(requests: Sequence[Request], info: ModelInfo, steps: int) -> dict[tuple[str, str], CachePlan]:
    """The plans, by name and family; those of `tcc demo` where none is asked for.

    Raises:
        TccError: a policy refuses the model or its options, or a plan is for another model.
    """
    with screen.status("planning"):
        made = {(request.name, request.family): request.make(info, steps) for request in requests}
        if not requests:
            demo = make_plans(info, steps)
            made = {(name, name.partition(",")[0]): found for name, found in demo.items() if found.bound > 1}
    for found in made.values():
        check_model(found, info.key)
    return made


def _steps(requests: Sequence[Request], asked: int | None) -> int:
    """The steps of all.

    Raises:
        PlanError: they differ.
    """
    counts = {request.name: request.steps for request in requests if request.steps is not None}
    count = asked or next(iter(counts.values()), 20)
    for name, found in counts.items():
        if found != count:
            raise PlanError(
                f"{name}: the plan has {found} steps, and {count} are measured: give --steps {found}, or make it with "
                f"tcc plan --steps {count}"
            )
    return count


def _subject(name: str, batch: int, input_size: int, device: torch.device, dtype: torch.dtype) -> Subject:
    """The model on its device; random weights such that no gate is zero and hides errors."""
    with screen.status(f"loading {name}"):
        found = load_subject(name, batch=batch, input_size=input_size)
        if found.random:
            generator = torch.Generator().manual_seed(0)
            for parameter in found.model.parameters():
                parameter.data.normal_(0, 0.02, generator=generator)
        found.model.to(device=device, dtype=dtype)

    def moved(leaf: object) -> object:
        if not isinstance(leaf, torch.Tensor):
            return leaf
        return leaf.to(device=device, dtype=dtype if leaf.is_floating_point() else leaf.dtype)

    args, kwargs = pytree.tree_map(moved, (found.args, found.kwargs))
    return replace(found, args=args, kwargs=kwargs)


def _task(subject: Subject, model: Architecture, seed: int, cfg: float) -> Task:
    """Images to draw with a model of tcc's.

    Raises:
        ModelError: the batch is odd, or the model has no null class.
    """
    rows, config = len(subject.args[0]), model.config
    if config.null_class is None:
        raise ModelError(f"{subject.label} has no null class, and guidance needs one")
    if rows % 2:
        raise ModelError(f"a batch of {rows}: guidance takes two rows for an image, so give an even number")
    noise = seeded_noise(model, rows // 2, seed).to(subject.args[0].device)
    labels = torch.arange(rows // 2, device=noise.device) % config.num_classes
    return Task(noise, labels, config.null_class, cfg, dtype=subject.args[0].dtype)


def _title(label: str, info: ModelInfo, steps: int, dtype: str, backend: str) -> str:
    """What was run, and where."""
    where = timing.machine()
    on_gpu = info.captured.inputs[0].device.type == "cuda"
    device = (
        where["accelerator"]
        if on_gpu
        else f"{where['processor']}, {where['threads']} thread{'s' * (where['threads'] != 1)}"
    )
    inputs = ", ".join(f"{spec.name} {list(spec.shape)}" for spec in info.captured.inputs)
    return f"{label}: {inputs}; {steps} steps; {dtype} on {device}, torch {where['torch']}, backend {backend}"
