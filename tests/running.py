"""Running programs in tests: sessions without a backend, and plans to run."""

from __future__ import annotations

import functools
from typing import Any

import torch

import tcc
from tcc.lowering import lower
from tcc.plan import CachePlan, Compute, Hold
from tcc.program import build_program
from tcc.runtime import Executable, Session
from tests.tiny_models import Case, case, tensor_of

#: float32 sums in another order: a step has a few hundred roundings of 6e-8.
CLOSE = 2e-5
STEPS = 6


@functools.cache
def _executable(which: Case, key: int, check: bool) -> Executable:
    program = build_program(which.info.captured, which.info.analysis, PLANS[key], check=check)
    return lower(program, "eager", check=check)


PLANS: dict[int, CachePlan] = {}


def session(which: Case, plan: CachePlan, check: bool = False) -> Session:
    """A new session of the case's model under `plan`, without a backend; captured and compiled once per plan."""
    PLANS[id(plan)] = plan
    return Session(_executable(which, id(plan), check))


def compiled(which: Case, plan: CachePlan) -> tcc.CompiledModel:
    """The case's model by `tcc.compile`, without a backend."""
    return tcc.compile(which.model, plan, backend="eager", example_inputs=(which.args, which.kwargs))


def call(model: Any, which: Case, step: int) -> torch.Tensor:
    """The output of a call with the inputs of `step`."""
    args, kwargs = which.inputs(step)
    return tensor_of(model(*args, **kwargs))


def token_plan(name: str, **options: Any) -> CachePlan:
    """A token plan of six steps for the case of that name, at keep ratio one half; the same object every time."""
    return _token_plan(name, tuple(sorted(options.items())))


@functools.cache
def _token_plan(name: str, options: tuple[tuple[str, Any], ...]) -> CachePlan:
    paper = {"k1": 3, "k2": 1, "attention": "kept", "level": "block"}
    given = {**paper, "keep": 0.5, "tokens": "uniform"} | dict(options)
    return tcc.plans.tprr(case(name).info, num_steps=STEPS, **given)


def hold_plan(num_steps: int = 3) -> CachePlan:
    """Compute the last stream at step 0, hold it afterwards."""
    actions = {(s, "out.stream"): Hold() if s else Compute() for s in range(num_steps)}
    return CachePlan(num_steps=num_steps, actions=actions)
