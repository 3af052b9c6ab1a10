"""Methods side by side: the same noise, their steps timed in turns, their images compared with the uncached ones."""

from __future__ import annotations

import math
from collections.abc import Callable, Hashable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from tcc.metrics import psnr
from tcc.runtime import Executable, Session
from tcc.runtime.folding import Folding
from tcc.samplers import DDIM, Evaluation, Sampler, denoise, guide
from tcc.timing import Run, RunTiming, time_runs

__all__ = ["Job", "Method", "Row", "Task", "compare", "of_executable", "warm_up"]

Progress = Callable[[int, int], None]
Model = Callable[..., Any]
PLAIN = DDIM()


class Job(Protocol):
    """What every method has to do, step by step."""

    @property
    def device(self) -> torch.device:
        """Where the model runs."""

    def first_call(self) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """Inputs of one call: those of the first step, or like them."""

    def denoise(self, model: Model, num_steps: int, sampler: Sampler = PLAIN) -> Iterator[Tensor]:
        """One step per value; the last value is the result."""

    def timesteps(self, num_steps: int, sampler: Sampler = PLAIN) -> Sequence[float] | Tensor | None:
        """The noise level of every call of `denoise`, `[num_steps]`; None where it is not one number per call."""


@dataclass(frozen=True)
class Task:
    """What every method has to do: turn this noise into images of these classes.

    Attributes:
        noise: `[B, C, H, W]`.
        labels: `[B]`.
        null_class: the label of the unconditional half.
        cfg: the guidance scale; the batch is doubled, whatever it is.
        dtype: what the model computes in; the solver keeps the noise's.
    """

    noise: Tensor
    labels: Tensor
    null_class: int
    cfg: float
    dtype: torch.dtype = torch.float32

    @property
    def device(self) -> torch.device:
        """Where the noise is."""
        return self.noise.device

    def first_call(self) -> tuple[tuple[Tensor, Tensor, Tensor], dict[str, Any]]:
        """Noise at a noise level in the middle."""
        return self.inputs(self.noise, 500), {}

    def inputs(self, x: Tensor, timestep: float) -> tuple[Tensor, Tensor, Tensor]:
        """The model's inputs for a step: the batch doubled, conditional half first; float32 times if not whole."""
        y = torch.cat([self.labels, torch.full_like(self.labels, self.null_class)])
        dtype = torch.int64 if isinstance(timestep, int) else torch.float32
        return torch.cat([x, x]).to(self.dtype), torch.full((len(y),), timestep, dtype=dtype, device=x.device), y

    def denoise(self, model: Model, num_steps: int, sampler: Sampler = PLAIN) -> Iterator[Tensor]:
        """One step per value; the last value is the images. The same as `tcc.samplers.sample`, in steps."""

        def evaluate(x: Tensor, evaluation: Evaluation) -> Tensor:
            with torch.no_grad():
                output = model(*self.inputs(x, evaluation.timestep))
                return guide(output.to(x.dtype), self.cfg, x.shape[1])

        return denoise(sampler, evaluate, self.noise, num_steps)

    def timesteps(self, num_steps: int, sampler: Sampler = PLAIN) -> Sequence[float]:
        """Those of the sampler."""
        return [evaluation.timestep for evaluation in sampler.evaluations(num_steps)]


@dataclass(frozen=True)
class Method:
    """One way to do the task.

    Attributes:
        name: its name in the table.
        open: returns a model whose next call is step 0.
        kinds: the kind of every step: steps of a kind run the same code.
        bound: the speedup that its MACs allow against the uncached run.
        slot_bytes: the bytes of its slots.
        compile_seconds: what compiling took; 0 where nothing was compiled for it.
        sampler: what it draws with.
    """

    name: str
    open: Callable[[], Model]
    kinds: tuple[Hashable, ...]
    bound: float = 1.0
    slot_bytes: int = 0
    compile_seconds: float = 0.0
    sampler: Sampler = PLAIN

    @property
    def num_steps(self) -> int:
        """Its denoising steps."""
        return len(self.kinds)


@dataclass(frozen=True)
class Row:
    """What was measured of a method.

    Attributes:
        method: the method.
        seconds: seconds for the batch: medians per kind of step, summed over the steps.
        speedup: measured, over the baseline.
        psnr: dB against the reference images, mean over images; infinite where they are identical.
        images: its images `[B, C, H, W]`.
        timing: the samples.
    """

    method: Method
    seconds: float
    speedup: float
    psnr: float
    images: Tensor
    timing: RunTiming

    @property
    def realised_share(self) -> float:
        """Measured speedup / bound."""
        return self.speedup / self.method.bound

    def as_dict(self) -> dict[str, Any]:
        """The row for programs."""
        by_kind = {str(kind): [t.median, t.p90, len(t.samples)] for kind, t in self.timing.by_kind.items()}
        return {
            "method": self.method.name,
            "steps": self.method.num_steps,
            "seconds": self.seconds,
            "speedup": self.speedup,
            "bound": self.method.bound,
            "realised_share": self.realised_share,
            "psnr": self.psnr if math.isfinite(self.psnr) else None,
            "slot_bytes": self.method.slot_bytes,
            "compile_seconds": self.method.compile_seconds,
            "rounds": len(self.timing.rounds),
            "step_median_p90_samples": by_kind,
        }


def of_executable(name: str, executable: Executable, bound: float, num_steps: int | None = None) -> Method:
    """The method that runs a compiled plan; with `num_steps`, its first steps only (of an uncached plan).

    All its runs are of one session: where variants are recorded, that of the last `warm_up` of the executable has them.
    """
    bindings, session = executable.program.bindings[:num_steps], Session(executable)

    def begin() -> Session:
        session.reset()
        return session

    return Method(
        name=name,
        open=begin,
        kinds=tuple(binding.variant for binding in bindings),
        bound=bound,
        slot_bytes=executable.program.slot_bytes,
        compile_seconds=sum(executable.compile_seconds),
    )


def warm_up(task: Job, executables: Sequence[Executable], progress: Progress | None = None) -> None:
    """Run every variant twice, out of order: the values are meaningless, the work is that of the real steps.

    Where timesteps are folded, a run begins first, and every step has its own timestep: others are refused.
    """
    args, kwargs = task.first_call()
    first = [{binding.variant: step for step, binding in enumerate(e.program.bindings)} for e in executables]
    done, total = 0, 2 * sum(map(len, first))
    for executable, steps in zip(executables, first, strict=True):
        session, tensors = Session(executable), executable.program.captured.flatten(args, kwargs)
        if executable.folding is not None:
            session.run(_at(executable.folding, tensors, 0))
        for step in [*steps.values()] * 2:
            session.step = step
            session.run(_at(executable.folding, tensors, step))
            done += 1
            if progress is not None:
                progress(done, total)


def _at(folding: Folding | None, tensors: list[Tensor], step: int) -> list[Tensor]:
    """The inputs with the noise level of that step, where it is compiled in."""
    if folding is None:
        return tensors
    return [folding.levels[step] if place == folding.level else tensor for place, tensor in enumerate(tensors)]


def compare(
    task: Job,
    methods: Sequence[Method],
    *,
    baseline: str,
    reference: Tensor | None = None,
    rounds: int,
    at_most: float,
    progress: Progress | None = None,
) -> list[Row]:
    """Run and time all methods in turns.

    Args:
        task: what to do.
        methods: the methods, warmed up; their names differ.
        baseline: the name of the method that speedups are over.
        reference: the images that errors are counted from; by default those of the first method.
        rounds: how often each is run.
        at_most: seconds after which no further round begins.
        progress: called as `progress(steps_done, all_steps)`.
    """
    assert len({method.name for method in methods}) == len(methods), "methods of one name would share their numbers"
    runs = {
        m.name: Run(m.kinds, lambda m=m: task.denoise(m.open(), m.num_steps, m.sampler))  # type: ignore[misc]
        for m in methods
    }
    timings = time_runs(runs, rounds=rounds, at_most=at_most, progress=progress)
    images = timings[methods[0].name].result if reference is None else reference
    return [
        Row(
            method=method,
            seconds=timings[method.name].seconds,
            speedup=timings[baseline].seconds / timings[method.name].seconds,
            psnr=float(psnr(timings[method.name].result, images).mean()),
            images=timings[method.name].result,
            timing=timings[method.name],
        )
        for method in methods
    ]
