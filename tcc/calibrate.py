"""Measure how much every site changes from step to step, on the uncached model, in any sampling loop."""

from __future__ import annotations

import json
import math
import os
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import safetensors
import torch
from torch import fx

from tcc.errors import PlanError
from tcc.info import ModelInfo
from tcc.passes.sites import Site
from tcc.plan.numbers import whole
from tcc.tensors_file import write_tensors

__all__ = ["Calibration", "Recorder", "calibrate"]

_HEADER = "tcc.calibration"
_TABLES = ("absolute", "square", "absolute_change", "square_change")


@dataclass(frozen=True)
class Calibration:
    """Sizes of the sites' values, and of their changes over 1, 2, ... steps; means over elements and samples.

    Attributes:
        sites: the names of the sites.
        absolute: mean |v|, float64 `[steps, sites]`.
        square: mean v^2, likewise.
        absolute_change: mean |v - v'| with v' the value k steps earlier, `[back, steps, sites]` for k = 1 .. back; NaN
            at the first k steps.
        square_change: mean (v - v')^2, likewise.

    Raises:
        PlanError: the shapes do not agree, or a number is not finite.
    """

    sites: tuple[str, ...]
    absolute: torch.Tensor
    square: torch.Tensor
    absolute_change: torch.Tensor
    square_change: torch.Tensor

    def __post_init__(self) -> None:
        steps = self.absolute.shape[0] if self.absolute.dim() else 0
        back = self.absolute_change.shape[0] if self.absolute_change.dim() else 0
        sizes, changes = (steps, len(self.sites)), (back, steps, len(self.sites))
        for name, expected in zip(_TABLES, (sizes, sizes, changes, changes), strict=True):
            if tuple(getattr(self, name).shape) != expected:
                raise PlanError(
                    f"a calibration of {len(self.sites)} sites has tables [steps, sites] and [back, steps, sites], "
                    f"and '{name}' is {list(getattr(self, name).shape)}"
                )
        for name in _TABLES:
            self._check_finite(name)

    def _check_finite(self, name: str) -> None:
        bad = ~getattr(self, name).isfinite()
        if name.endswith("_change"):
            for k in range(1, self.back + 1):
                bad[k - 1, :k] = False  # nothing is so many steps earlier
        if bool(bad.any()):
            *_, step, column = bad.nonzero()[0].tolist()
            raise PlanError(
                f"step {step}, site '{self.sites[column]}': the measured '{name}' is not finite: check that the "
                "model's weights and inputs are, and measure anew"
            )

    @property
    def num_steps(self) -> int:
        """The steps of the measured run."""
        return self.absolute.shape[0]

    @property
    def back(self) -> int:
        """How many steps back changes were measured."""
        return self.absolute_change.shape[0]

    def relative_l1(self, back: int) -> torch.Tensor:
        """|v - v'|_1 / |v|_1 with v' the value `back` steps earlier, `[steps, sites]`; 0 where neither is anything."""
        change = self.absolute_change[back - 1]
        return torch.where(change == 0, change, change / self.absolute)

    def columns(self, sites: Sequence[str], num_steps: int, back: int) -> list[int]:
        """The columns of `sites`, for a plan of `num_steps` steps that looks `back` steps back.

        Raises:
            PlanError: the measurement lacks a site, or is of another number of steps, or looks less far back.
        """
        if self.num_steps != num_steps:
            raise PlanError(f"the calibration measured {self.num_steps} steps, and num_steps={num_steps}: measure anew")
        if self.back < back:
            raise PlanError(
                f"the calibration looks {self.back} steps back, and {back} are needed: measure with back={back}"
            )
        missing = [site for site in sites if site not in self.sites]
        if missing:
            raise PlanError(f"the calibration did not measure site '{missing[0]}': measure this model, with that site")
        return [self.sites.index(site) for site in sites]

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write it as one safetensors file.

        Raises:
            PlanError: the file cannot be written.
        """
        header = json.dumps({"version": 1, "sites": list(self.sites)})
        tables = {name: getattr(self, name).contiguous() for name in _TABLES}
        write_tensors(tables, path, {_HEADER: header}, what="the calibration", error=PlanError)

    @staticmethod
    def of(errors: Calibration | str | os.PathLike[str]) -> Calibration:
        """`errors` itself, or what its file holds (see `load`).

        Raises:
            PlanError: it is neither a calibration nor the file of one.
        """
        if not isinstance(errors, (Calibration, str, os.PathLike)):
            raise PlanError(f"errors={errors!r:.40}: give a Calibration, or its file (`tcc train errors` writes one)")
        return errors if isinstance(errors, Calibration) else Calibration.load(errors)

    @staticmethod
    def load(path: str | os.PathLike[str]) -> Calibration:
        """Read a file that `save` wrote.

        Raises:
            PlanError: there is no such file, it is no calibration, or one of numbers that are not finite.
        """
        if not Path(path).is_file():
            raise PlanError(f"there is no file {path}")
        try:
            with safetensors.safe_open(path, framework="pt") as file:
                header = json.loads((file.metadata() or {})[_HEADER])
                return Calibration(tuple(header["sites"]), *(file.get_tensor(name) for name in _TABLES))
        except PlanError as error:
            raise PlanError(f"{path}: {error}") from error
        except (safetensors.SafetensorError, KeyError, ValueError) as error:
            raise PlanError(f"{path} is not a calibration: make one with `tcc train errors`") from error


def calibrate(
    info: ModelInfo,
    run: Callable[[Recorder], object],
    *,
    num_steps: int,
    back: int = 3,
    sites: Sequence[str] | None = None,
) -> Calibration:
    """Measure the uncached model in a sampling loop.

    Args:
        info: the model, inspected with the inputs of the loop's calls.
        run: runs the loop (once or several times) with what it is given in place of the model, for example
            `lambda model: sample(model, noise, labels, num_steps=50)`.
        num_steps: the denoising steps of a run.
        back: how many steps back changes are measured; that many values of each site are kept at a time.
        sites: what to measure; branch outputs and deltas, if None.

    Raises:
        PlanError: an unknown site, or no run was finished.
    """
    recorder = Recorder(info, num_steps=num_steps, back=back, sites=sites)
    run(recorder)
    return recorder.result()


class Recorder:
    """Stands in for the uncached model in a sampling loop, and measures its sites as the calls go by.

    Sums are formed at each call; besides them only the last `back` values of each site are kept.

    Args:
        info: the model.
        num_steps: the denoising steps of a run.
        back: how many steps back changes are measured.
        sites: what to measure; branch outputs and deltas, if None.

    Raises:
        PlanError: an unknown site, or a number that is not at least 1.
    """

    def __init__(self, info: ModelInfo, *, num_steps: int, back: int = 3, sites: Sequence[str] | None = None) -> None:
        num_steps, back = whole("num_steps", num_steps), whole("back", back)
        if min(num_steps, back) < 1:
            raise PlanError(f"num_steps={num_steps}, back={back}: both are at least 1")
        names = [n for n, s in info.sites.items() if s.kind in ("out", "delta")] if sites is None else list(sites)
        for name in names:
            if name not in info.sites:
                raise PlanError(f"site '{name}': the model has no such site (tcc inspect lists them all)")
        self.num_steps = num_steps
        self._info = info
        self._sites = [info.sites[name] for name in names]
        self._runs = torch.zeros(num_steps, 1, dtype=torch.float64)
        self._sizes = torch.zeros(2, num_steps, len(names), dtype=torch.float64)
        self._changes = torch.zeros(2, back, num_steps, len(names), dtype=torch.float64)
        self._back = back
        self._levels: list[float] = []
        self.reset()

    def reset(self) -> None:
        """Start a new run: the next call is step 0."""
        self.step = 0
        self._past: list[deque[list[torch.Tensor]]] = [deque(maxlen=self._back) for _ in self._sites]

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Run the model and measure one step.

        Raises:
            PlanError: it is called at another noise level than at this step of the first run.
        """
        inputs = self._info.captured.flatten(args, kwargs)
        place = self._info.captured.noise_level
        if place is not None and inputs[place].numel():
            self._check_level(float(inputs[place].detach().max()))
        with torch.no_grad():
            outputs = _Watch(self._info.captured.gm, self._sites, self._measure).run(*inputs)
        self._runs[self.step] += 1
        if self.step + 1 == self.num_steps:
            self.reset()
        else:
            self.step += 1
        return self._info.captured.unflatten(list(outputs))

    def result(self) -> Calibration:
        """The means over all runs.

        Raises:
            PlanError: no run came to its last step, or the last one did not, or a value was not finite.
        """
        if not bool(self._runs.all()):
            done = int(self._runs.count_nonzero())
            raise PlanError(
                f"{done} of {self.num_steps} steps were measured: run the sampling loop with num_steps={done}"
            )
        if self.step:
            raise PlanError(
                f"the last run ended after {self.step} of {self.num_steps} steps: num_steps counts the calls of the "
                "model in a run; call reset() before a run where one was left"
            )
        changes = self._changes / self._runs
        for k in range(1, self._back + 1):
            changes[:, k - 1, :k] = torch.nan
        sizes = self._sizes / self._runs
        return Calibration(tuple(site.name for site in self._sites), sizes[0], sizes[1], changes[0], changes[1])

    def _check_level(self, level: float) -> None:
        """All runs go through the same noise levels; a loop of more calls than steps does not."""
        if len(self._levels) == self.step:
            self._levels.append(level)
        known = self._levels[self.step]
        if not math.isclose(level, known, rel_tol=1e-3):
            raise PlanError(
                f"step {self.step} is called at noise level {level:g}, and was at {known:g} in the run before: "
                f"num_steps={self.num_steps} counts the calls of the model in a run, those of guidance that calls it "
                "twice too; call reset() before a run where one was left"
            )

    def _measure(self, column: int, parts: list[torch.Tensor]) -> None:
        """Add a site's value at this step, in one or more parts, to the sums."""
        self._sizes[:, self.step, column] += _means(parts)
        for k, earlier in enumerate(self._past[column]):
            self._changes[:, k, self.step, column] += _means([a - b for a, b in zip(parts, earlier, strict=True)])
        self._past[column].appendleft(parts)


class _Watch(fx.Interpreter):
    """Runs a graph, and reports every site as soon as its values are there."""

    def __init__(
        self, gm: fx.GraphModule, sites: Sequence[Site], report: Callable[[int, list[torch.Tensor]], None]
    ) -> None:
        super().__init__(gm)
        self._sites, self._report = sites, report
        self._values: dict[str, torch.Tensor] = {name: torch.empty(0) for site in sites for name in site.values}
        last = {node.name: place for place, node in enumerate(gm.graph.nodes)}
        self._due: dict[str, list[int]] = {}
        for column, site in enumerate(sites):
            self._due.setdefault(max(site.values, key=last.__getitem__), []).append(column)

    def run_node(self, n: fx.Node) -> Any:
        """Compute a node; see the class."""
        result = super().run_node(n)
        if n.name in self._values:
            self._values[n.name] = result
        for column in self._due.get(n.name, ()):
            site = self._sites[column]
            values = [self._values[name].float() for name in site.values]
            self._report(column, values if site.kind == "kv" else [torch.stack(values).sum(0)])
        return result


def _means(parts: Sequence[torch.Tensor]) -> torch.Tensor:
    """Mean magnitude and mean square over the elements of all parts, float64 `[2]`."""
    flat = torch.cat([part.flatten() for part in parts])
    return torch.stack([flat.abs().mean(dtype=torch.float64), flat.square().mean(dtype=torch.float64)]).cpu()
