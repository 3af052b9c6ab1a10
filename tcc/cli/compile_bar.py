"""Rewriting and compiling plans under one progress bar."""

from __future__ import annotations

import functools
import itertools
from collections.abc import Mapping

from tcc.checks import check_model
from tcc.cli import screen
from tcc.info import ModelInfo
from tcc.plan import CachePlan
from tcc.program import build_program
from tcc.runtime import Executable, lower

__all__ = ["executables"]


def executables(info: ModelInfo, plans: Mapping[str, CachePlan], backend: str) -> dict[str, Executable]:
    """Compile every plan for one model that was captured once; the bar moves on with each variant.

    Raises:
        PlanError: a plan is not for this model.
    """
    for plan in plans.values():
        check_model(plan, info.key)
    with screen.status("rewriting the graph"):
        programs = {name: build_program(info.captured, info.analysis, plan) for name, plan in plans.items()}
    total, begun = sum(len(program.variants) for program in programs.values()), itertools.count()
    with screen.bar("compiling", total) as bar:

        def begin(name: str, line: str) -> None:
            bar(next(begun), total)
            bar.describe(f"{name}: {line}")

        compiled = {
            name: lower(program, backend, progress=functools.partial(begin, name)) for name, program in programs.items()
        }
        bar(total, total)
        bar.describe("compiled")
    return compiled
