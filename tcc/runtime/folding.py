"""Values that a run computes once, at its first step: they depend on the timesteps, and inputs that stay the same."""

from __future__ import annotations

import math
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import fx

from tcc.capture import Captured
from tcc.errors import CallError, PlanError
from tcc.passes.fold_timesteps import Fold, find_folds, fold_graph
from tcc.passes.sites import Analysis
from tcc.plan import CachePlan
from tcc.program.memory import in_units
from tcc.runtime.watch import is_readable, version_of

__all__ = ["Folded", "Folding", "find_folding"]

#: What is computed stands beside what is kept for a moment: of so many steps, less than a step's own activations.
STEPS_AT_ONCE = 8


@dataclass(frozen=True, eq=False)
class Folding:
    """What a run computes once.

    Attributes:
        folds: the values.
        gm: from the model's inputs to them.
        levels: the noise level of every step, `[steps, *shape of the input]`.
        level: its position among the inputs.
        fixed: the positions of the other inputs that `gm` reads.
        names: the names of all inputs.
    """

    folds: tuple[Fold, ...]
    gm: fx.GraphModule
    levels: torch.Tensor
    level: int
    fixed: tuple[int, ...]
    names: tuple[str, ...]

    @property
    def shapes(self) -> dict[str, tuple[tuple[int, ...], torch.dtype, torch.device]]:
        """Of every value, by the name of the input that variants read it from: with a row per step, or one for all."""
        vals = [node.meta["val"] for node in self.gm.graph.output_node().all_input_nodes]
        rows = [(len(self.levels),) if fold.per_step else () for fold in self.folds]
        return {
            fold.input: ((*row, *val.shape), val.dtype, val.device)
            for fold, row, val in zip(self.folds, rows, vals, strict=True)
        }

    @property
    def bytes(self) -> int:
        """What every session keeps of them."""
        return sum(math.prod(shape) * dtype.itemsize for shape, dtype, _ in self.shapes.values())

    def over_budget(self, slot_bytes: int, max_slot_bytes: int) -> PlanError:
        """The refusal where they and a plan's slots take more than the budget, and slots alone do not.

        Args:
            slot_bytes: what the plan's slots take.
            max_slot_bytes: the most bytes that one session may keep.
        """
        return PlanError(
            f"the plan's slots take {in_units(slot_bytes)} and what timesteps= computes once per run "
            f"{in_units(self.bytes)} for the captured batch, and max_slot_bytes allows {in_units(max_slot_bytes)}: "
            "compile without timesteps, or allow more"
        )


def find_folding(
    captured: Captured, analysis: Analysis, plan: CachePlan, timesteps: Sequence[float] | torch.Tensor
) -> Folding | None:
    """What a run of `plan` can compute once; None where that is nothing.

    Args:
        captured: the model's graph.
        analysis: what is known about it.
        plan: the plan: what it keeps from step to step is left to it.
        timesteps: the noise level of every step, in the order of the steps.

    Raises:
        PlanError: the model has no known noise level, or there are not as many timesteps as steps, or they are not
            numbers of the noise level's dtype.
    """
    if captured.noise_level is None:
        raise PlanError("timesteps: no noise level was found among the inputs; name it: tcc.compile(noise_level=...)")
    graph = captured.gm.graph
    nodes, inputs = {n.name: n for n in graph.nodes}, [n for n in graph.nodes if n.op == "placeholder"]
    kept = [site for name, site in analysis.sites.items() if name in plan.sites]
    names = {name for site in kept for name in (*site.values, *site.attention, site.stream_out) if name}
    changing = [*(inputs[position] for position in captured.samples), *(nodes[name] for name in names)]
    folds = find_folds(graph, captured.noise_level, changing)
    if not folds:
        return None
    gm = fold_graph(captured.gm, folds)
    read = [n for n, node in enumerate(m for m in gm.graph.nodes if m.op == "placeholder") if node.users]
    return Folding(
        folds, gm, _levels(captured, plan, timesteps), captured.noise_level,
        tuple(n for n in read if n != captured.noise_level), tuple(spec.name for spec in captured.inputs),
    )  # fmt: skip


def _levels(captured: Captured, plan: CachePlan, timesteps: Sequence[float] | torch.Tensor) -> torch.Tensor:
    assert captured.noise_level is not None
    spec, given = captured.inputs[captured.noise_level], torch.as_tensor(timesteps)
    if tuple(given.shape) != (plan.num_steps,):
        raise PlanError(f"timesteps: {list(given.shape)} numbers were given, but the plan has {plan.num_steps} steps")
    levels = given.to(spec.device, spec.dtype)
    if not spec.dtype.is_floating_point and not torch.equal(levels.double(), given.to(spec.device).double()):
        raise PlanError(f"timesteps: not all are {spec.dtype}, which the model's '{spec.name}' was captured with")
    return levels.reshape(-1, *(1 for _ in spec.shape)).expand(-1, *spec.shape).contiguous()


class Folded:
    """The folded values of one session's run.

    Attributes:
        tensors: the inputs of variants, by name: of a value that depends on the noise level a row for every step.
    """

    def __init__(self, folding: Folding) -> None:
        self._folding = folding
        self.tensors = {
            name: torch.zeros(shape, dtype=dtype, device=device)
            for name, (shape, dtype, device) in folding.shapes.items()
        }
        self._given: list[tuple[torch.Tensor, int | None]] = []
        self._known: list[torch.Tensor] = []
        self._differs: dict[int, torch.Tensor] = {}

    def begin(self, inputs: list[torch.Tensor]) -> None:
        """Compute the values of a run whose first call is this one."""
        folding = self._folding
        self._given = [(inputs[n], version_of(inputs[n])) for n in folding.fixed]
        self._known = [inputs[n].clone() for n in folding.fixed]
        positions = [0 if n == folding.level else None for n in range(len(inputs))]
        compute = torch.func.vmap(folding.gm, in_dims=tuple(positions))
        for first in range(0, len(folding.levels), STEPS_AT_ONCE):
            part = slice(first, first + STEPS_AT_ONCE)
            given = [folding.levels[part] if n == folding.level else tensor for n, tensor in enumerate(inputs)]
            with torch.no_grad(), warnings.catch_warnings():
                warnings.filterwarnings("ignore", message="There is a performance drop", category=UserWarning)
                values = compute(*given)
            for fold, val in zip(folding.folds, values, strict=True):
                kept = self.tensors[fold.input]
                if fold.per_step:
                    kept[part].copy_(val)
                elif first == 0:
                    kept.copy_(val[0])
            del values, val  # before the next are computed

    def check(self, inputs: list[torch.Tensor], step: int, *, first: bool = False, last: bool = False) -> None:
        """Compare a call with what the values were computed for; a run's first call only with the timesteps.

        Where reading a value would wait for the device, that is done at the last step of a run.

        Raises:
            CallError: the noise level is not that of the step, or another input has changed within the run; the values
                of a run in progress are as they were.
        """
        folding = self._folding
        pairs = [(folding.level, folding.levels[step])]
        if first:
            self._differs = {}
        else:
            pairs += self._replaced(inputs)
        if is_readable(inputs[folding.level]):
            for position, expected in pairs:
                if not torch.equal(inputs[position], expected):
                    raise CallError(_told(folding, position, step, inputs[folding.level]))
            return
        for position, expected in pairs:
            differs = (inputs[position] != expected).any()
            self._differs[position] = self._differs.get(position, differs) | differs
        if last and not _recording(inputs[folding.level]):
            for position, differs in self._differs.items():
                if bool(differs):
                    raise CallError(_told(folding, position, step, None))

    def _replaced(self, inputs: list[torch.Tensor]) -> Iterator[tuple[int, torch.Tensor]]:
        """The positions of conditions that may be others than the run began with, and what those held.

        Where reading waits for a device, those that are not the very tensors, or have another version: what is written
        past PyTorch is not seen there.
        """
        for position, (given, version), known in zip(self._folding.fixed, self._given, self._known, strict=True):
            same = inputs[position] is given and version is not None and version == version_of(given)
            if not same or is_readable(given):
                yield position, known


def _recording(tensor: torch.Tensor) -> bool:
    """Whether calls are being recorded, so that nothing can be read; the calls before that warm up are compared."""
    return tensor.is_cuda and torch.cuda.is_current_stream_capturing()


def _told(folding: Folding, position: int, step: int, given: torch.Tensor | None) -> str:
    name = folding.names[position]
    if position != folding.level:
        return (
            f"input '{name}' changed within the run, at step {step} or before: what depends on it was computed once, "
            "at the first step. Call reset() to begin a new run, or compile without timesteps"
        )
    now = "is another" if given is None else f"is {given.flatten()[0].item():g}"
    at = f"at step {step}" + (" or before" if given is None else "")
    return (
        f"noise level '{name}' {now} {at}, where timesteps={folding.levels[step].flatten()[0].item():g} was "
        "compiled in: give tcc.compile(timesteps=...) the scheduler's timesteps, in the order of the steps"
    )
