"""Rewriting and compiling plans under one progress bar."""

from __future__ import annotations

import functools
import itertools
from collections.abc import Mapping

from tcc.cli import screen
from tcc.info import ModelInfo
from tcc.lowering import Compiled, Known, lower
from tcc.plan import CachePlan
from tcc.plan.checks import check_model
from tcc.runtime import Executable

__all__ = ["executables"]


def executables(
    info: ModelInfo,
    plans: Mapping[str, CachePlan],
    backend: str,
    *,
    regional: bool = False,
    max_slot_bytes: int | None = None,
) -> dict[str, Executable]:
    """Compile every plan for one model that was captured once; the bar moves on with each new variant.

    Args:
        info: the model.
        plans: the plans, by name.
        backend: what compiles.
        regional: see `tcc.compile`.
        max_slot_bytes: see `tcc.compile`.

    Raises:
        PlanError: a plan is not for this model, or its slots take more than `max_slot_bytes`.
    """
    for plan in plans.values():
        check_model(plan, info.key)
    with screen.status("rewriting the graph"):
        programs = {name: info.program(plan, max_slot_bytes=max_slot_bytes) for name, plan in plans.items()}
    kinds = {variant.kind for program in programs.values() for variant in program.variants}  # each is made once
    begun, runners = itertools.count(), dict[Known, Compiled]()
    with screen.bar("compiling", len(kinds)) as bar:

        def begin(name: str, line: str) -> None:
            bar(next(begun), len(kinds))
            bar.describe(f"{name}: {line}")

        compiled = {
            name: lower(program, backend, progress=functools.partial(begin, name), known=runners, regional=regional)
            for name, program in programs.items()
        }
        bar(len(kinds), len(kinds))
        bar.describe("compiled")
    return compiled
