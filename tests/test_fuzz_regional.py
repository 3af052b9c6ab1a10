"""Random plans compiled regionally: copies of a sub-graph are given what it was made for, and results stay the same."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, fx

from tcc import Reference
from tcc.lowering import lower
from tcc.passes import repeats
from tcc.program import build_program
from tcc.runtime import Session
from tests import fuzz_plans
from tests.fuzz_plans import MODELS, TOLERANCE, Example, relative_error, tensor_of


class Checked(fx.Interpreter):
    """Runs a graph and looks at what its sub-graphs are called with, as compilers do that share their code."""

    calls = 0

    def call_function(self, target: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """The call's result."""
        if target is torch.ops.higher_order.invoke_subgraph:
            Checked.calls += 1
            for inner, given in zip(args[0].graph.find_nodes(op="placeholder"), args[2:], strict=True):
                made = inner.meta["val"]
                assert (made.shape, made.dtype, made.stride()) == (given.shape, given.dtype, given.stride())
        return super().call_function(target, args, kwargs)


def interpreted(gm: fx.GraphModule, _: list[Tensor]) -> Callable[..., Any]:
    """A backend."""
    return lambda *inputs: Checked(gm).run(*inputs)


def check(example: Example) -> None:
    """Compare a run of the example with the reference."""
    case = fuzz_plans.model(example.model)
    program = build_program(case.info.captured, case.info.analysis, example.plan)
    session = Session(lower(program, interpreted, regional=True))
    reference = Reference(case.model, example.plan, case.info)
    for call in range(example.plan.num_steps):
        args, kwargs = case.inputs(call)
        error = relative_error(*(tensor_of(f(*args, **kwargs)) for f in (session, reference)))
        assert error <= TOLERANCE, f"relative error {error:.3g} at call {call}:\n{example!r}"


def test_random_plans_in_regions_agree_with_the_reference(monkeypatch: pytest.MonkeyPatch) -> None:
    """Models this small would not be taken apart: here, every stretch that repeats is."""
    monkeypatch.setattr(repeats, "SPARSEST", 0)
    monkeypatch.setattr(Checked, "calls", 0)
    for name in MODELS:
        fuzz_plans.draw(3, 11, fuzz_plans.examples((name,)), check)
    assert Checked.calls > 300
