"""The training loop: seeded, resumable to the same result, alone or in several processes."""

from __future__ import annotations

import functools
import hashlib
import json
import math
import os
import time
from collections.abc import Callable
from dataclasses import dataclass
from numbers import Integral, Real
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from tcc.errors import TccError, TrainError
from tcc.tensors_file import write_tensors
from tcc.train.objective import Recipe, StepLoss
from tcc.train.weights import Weights
from tcc.train.world import World

__all__ = ["Report", "Settings", "train"]

_HEADER = "tcc.training"


@dataclass(frozen=True)
class Settings:
    """How long and how fast to train.

    Attributes:
        iterations: how many steps of the optimiser, in all; None is no limit.
        minutes: for how long, interruptions not counted; None is no limit. How many iterations that makes depends on
            the machine: only their number gives the same result everywhere.
        lr: learning rate of AdamW without weight decay.
        groups: groups of samples per iteration, dealt out to the processes. The gradient is their mean, so the result
            does not depend on the number of processes but for rounding. (Learning-to-Cache: 8 GPUs, one group each.)
        seed: seed of everything that is drawn; iteration and group are mixed into it, so no state has to be kept.
        save_every: seconds after which the state is saved.

    Raises:
        TrainError: a number is none or out of range, or nothing ends the training.
    """

    iterations: int | None = None
    minutes: float | None = None
    lr: float = 1e-3
    groups: int = 1
    seed: int = 0
    save_every: float = 30.0

    def __post_init__(self) -> None:
        if self.iterations is None and self.minutes is None:
            raise TrainError("nothing ends the training: give a number of iterations or of minutes")
        for name in ("iterations", "groups", "seed"):
            value = getattr(self, name)
            if value is not None and (isinstance(value, bool) or not isinstance(value, Integral)):
                raise TrainError(f"{name}={value!r}: expected a whole number")
            object.__setattr__(self, name, value if value is None else int(value))  # numpy's are none of JSON's
        for name in ("minutes", "lr", "save_every"):
            value = getattr(self, name)
            if value is not None and not (isinstance(value, Real) and math.isfinite(value)):
                raise TrainError(f"{name}={value!r}: expected a number, finite")
        if (self.iterations or 0) < 0 or (self.minutes or 0) < 0 or self.groups < 1 or not 0 < self.lr <= 100:
            raise TrainError(
                f"iterations={self.iterations}, minutes={self.minutes}, groups={self.groups}, lr={self.lr}: the "
                "learning rate is in (0, 100], there is at least one group, and nothing is negative"
            )


@dataclass(frozen=True)
class Report:
    """How training goes, after an iteration.

    Attributes:
        iteration: iterations done, those before a resumption counted.
        seconds: seconds spent, likewise; the mean of the processes.
        error: the iteration's mean squared difference of student and teacher.
        cost: what the weights cost, likewise.
        resumed: the iteration at which this run took up a state, or None.
    """

    iteration: int
    seconds: float
    error: float
    cost: float
    resumed: int | None

    @property
    def loss(self) -> float:
        """Error and cost."""
        return self.error + self.cost


def train(
    weights: Weights,
    recipe: Recipe,
    settings: Settings,
    *,
    state: Path | None = None,
    progress: Callable[[Report], None] | None = None,
    world: World | None = None,
) -> Report:
    """Train `weights` in place.

    Args:
        weights: what is learned.
        recipe: what to learn from.
        settings: how long and how fast.
        state: the file that the state is kept in. If it is there, training goes on from it, to the same result as
            without an interruption (bit for bit on one machine) where iterations are counted; the learning rate and
            the end may be others. A run that has reached its end, of iterations or of minutes, stays as it is.
        progress: called after every iteration, in every process.
        world: the processes that train together; see `join_world`.

    Returns:
        How it ended.

    Raises:
        TrainError: a loss or a gradient is not finite (names the denoising step), the state is that of another run or
            cannot be written, the weights decide nothing at a P-step of the recipe, or there are more processes than
            groups.
        TccError, KeyboardInterrupt: passed on, after the state of the last whole iteration has been saved.
    """
    run = _Run(weights, recipe, settings, state, world or World())
    try:
        while not run.done:
            run.iterate()
            if progress is not None:
                progress(run.report)
    except (KeyboardInterrupt, TccError):
        run.save()
        raise
    run.save()
    return run.report


class _Run:
    """The state of a run, and what changes it."""

    def __init__(self, weights: Weights, recipe: Recipe, settings: Settings, path: Path | None, world: World) -> None:
        if world.size > settings.groups:
            raise TrainError(
                f"{world.size} processes share {settings.groups} group(s) of samples per iteration: give at least as "
                "many groups as processes"
            )
        # a recipe or weights of one's own may have none
        decided, needed = (getattr(part, "choices", {}) for part in (weights, recipe))
        if decided and (missing := sorted(set(needed) - set(decided))):
            raise TrainError(
                f"the recipe has a P-step {missing[0]}, at which the weights decide nothing: make both with the same "
                "choices"
            )
        self.weights, self.recipe, self.settings, self.path, self.world = weights, recipe, settings, path, world
        self.parameters = [parameter for parameter in weights.parameters() if parameter.requires_grad]
        # the loss of an early step is about 1e-6, and a token's share of its gradient far below AdamW's usual epsilon
        self.optimiser = torch.optim.AdamW(self.parameters, lr=settings.lr, weight_decay=0.0, eps=1e-15)
        self.report = Report(0, 0.0, math.nan, math.nan, None)
        if path is not None and path.is_file():
            self._resume(path)
        self._check_together()
        self.good = self._tensors()
        self.started = time.monotonic() - self.report.seconds
        self.saved = time.monotonic()

    @property
    def done(self) -> bool:
        """Whether the end is reached."""
        limits = (self.settings.iterations, self.report.iteration), (self.settings.minutes, self.report.seconds / 60)
        return any(limit is not None and spent >= limit for limit, spent in limits)

    def iterate(self) -> None:
        """One step of the optimiser, all groups."""
        self.optimiser.zero_grad(set_to_none=True)
        losses: list[StepLoss] = []
        for group in range(self.world.rank, self.settings.groups, self.world.size):
            losses += self.recipe.accumulate(self.weights, self._draws(group))
        bad = [loss.step for loss in losses if not math.isfinite(loss.total)]
        seconds = time.monotonic() - self.started
        sums = [len(losses), sum(x.error for x in losses), sum(x.cost for x in losses), seconds, len(bad)]
        first = [float(bad[:1] == [step]) for step in range(self.recipe.num_steps)]
        total = self.world.average_gradients(
            self.parameters, self.settings.groups, torch.tensor([*sums, *first], dtype=torch.float64)
        )
        self._check(total)
        self.optimiser.step()
        self.weights.settle()
        count = float(total[0])
        self.report = Report(
            self.report.iteration + 1,
            float(total[3]) / self.world.size,  # the same in all processes: they stop together
            float(total[1]) / count,
            float(total[2]) / count,
            self.report.resumed,
        )
        self.good = self._tensors()
        if time.monotonic() - self.saved >= self.settings.save_every:
            self.save()

    def _check_together(self) -> None:
        """All processes begin at one iteration.

        Raises:
            TrainError: they do not: some have found a state, and others have not.
        """
        at = torch.zeros(self.world.size, dtype=torch.float64, device=self.parameters[0].device)
        at[self.world.rank] = self.report.iteration
        begun = [int(iteration) for iteration in self.world.sum(at)]
        if len(set(begun)) > 1:
            raise TrainError(
                f"the processes go on from iterations {begun}: each of them reads {self.path}, so put it where all of "
                "them see it, or remove it"
            )

    def _check(self, total: Tensor) -> None:
        """Stop in all processes alike where a number is not finite."""
        where = total[5:].nonzero().flatten().tolist()
        gradients = [p.grad for p in self.parameters if p.grad is not None]
        fine = all(bool(grad.isfinite().all()) for grad in gradients)
        if not where and not float(total[4]) and fine:
            return
        what = f"the loss of denoising step {where[0]}" if where else "the gradient"
        kept = f"; the state before it is in {self.path}" if self.path else ""
        raise TrainError(
            f"{what} is not finite in iteration {self.report.iteration + 1}{kept}: check that model and images are "
            "finite, or go on with a lower learning rate"
        )

    def _draws(self, group: int) -> torch.Generator:
        """The random numbers of one group of this iteration: the same in whichever process."""
        text = f"{self.settings.seed} {self.report.iteration} {group}"
        seed = int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "little") >> 1
        return torch.Generator().manual_seed(seed)

    @functools.cached_property
    def _identity(self) -> dict[str, Any]:
        """What a state must agree with to be gone on from."""
        shapes = [list(parameter.shape) for parameter in self.parameters]
        named = {"seed": self.settings.seed, "groups": self.settings.groups, "parameters": shapes}
        identity: dict[str, Any] = json.loads(json.dumps(named | self.weights.describe() | self.recipe.describe()))
        return identity

    def _tensors(self) -> tuple[Report, dict[str, Tensor]]:
        """A copy of everything that training changes."""
        tensors = {f"weights.{name}": tensor for name, tensor in self.weights.state_dict().items()}
        for index, entry in self.optimiser.state_dict()["state"].items():
            tensors |= {f"optimiser.{index}.{name}": tensor for name, tensor in entry.items()}
        return self.report, {name: tensor.detach().cpu().clone() for name, tensor in tensors.items()}

    def save(self) -> None:
        """Write the state after the last whole iteration, replacing the file in one go."""
        self.saved = time.monotonic()
        if self.path is None or not self.world.speaks:
            return
        report, tensors = self.good
        header = {"iteration": report.iteration, "seconds": report.seconds, "run": self._identity}
        header |= {"losses": [repr(report.error), repr(report.cost)]}
        partial = self.path.with_name(self.path.name + ".partial")
        write_tensors(tensors, partial, {_HEADER: json.dumps(header)}, what="the training's state", error=TrainError)
        os.replace(partial, self.path)

    def _resume(self, path: Path) -> None:
        """Take up the state in `path`."""
        try:
            with safe_open(path, framework="pt") as file:
                header = json.loads((file.metadata() or {})[_HEADER])
                tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - not a dict
            stored, asked = dict(header["run"]), self._identity
            changed = [name for name in stored.keys() | asked.keys() if stored.get(name) != asked.get(name)]
            if changed:
                text = ", ".join(f"{name} was {stored.get(name)} and is {asked.get(name)}" for name in sorted(changed))
                raise TrainError(f"{path} is the state of another run ({text}): remove it, or write to another place")
            last, cost = map(float, header["losses"])
            self.report = Report(int(header["iteration"]), float(header["seconds"]), last, cost, header["iteration"])
            moments = self._moments(tensors)
            self.weights.load_state_dict(_under("weights.", tensors))
            groups = self.optimiser.state_dict()["param_groups"]
            self.optimiser.load_state_dict({"state": moments, "param_groups": groups})
        except TrainError:
            raise
        except (SafetensorError, OSError, KeyError, IndexError, TypeError, ValueError, RuntimeError) as error:
            raise TrainError(
                f"{path} is no state of a training ({error}): remove it, or write to another place"
            ) from error

    def _moments(self, tensors: dict[str, Tensor]) -> dict[int, dict[str, Tensor]]:
        """What the optimiser knows of each parameter that it has moved; AdamW itself would go on without."""
        found: dict[int, dict[str, Tensor]] = {}
        for name, tensor in _under("optimiser.", tensors).items():
            index, _, entry = name.partition(".")
            found.setdefault(int(index), {})[entry] = tensor
        if self.report.iteration and not found:
            raise ValueError("it has nothing of the optimiser")
        for number, entries in found.items():
            shape = self.parameters[number].shape
            if any(entries[name].shape != shape for name in ("exp_avg", "exp_avg_sq")) or entries["step"].numel() != 1:
                raise ValueError(f"the optimiser's moments of parameter {number} are of another shape")
        return found


def _under(prefix: str, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """The entries whose names start with `prefix`, without it."""
    return {name.removeprefix(prefix): tensor for name, tensor in tensors.items() if name.startswith(prefix)}
