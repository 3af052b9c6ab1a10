"""What is given as a number, a name, a plan or a model, and is none: refused at once, by one of our errors."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import tcc
from tcc.calibrate import Recorder
from tcc.errors import CallError, PlanError, TccError, TrainError
from tcc.plan import CachePlan, Reuse, TopK, Update
from tcc.plan.scores import Fixed, Score
from tcc.train import Budget, Calls, RouterWeights
from tests.tiny_models import dit

SITE = "blocks.0.attn.delta"


def compiled() -> tcc.CompiledModel:
    """A small model, prepared."""
    case = dit()
    return tcc.compile(case.model, CachePlan(2, {}), example_inputs=(case.args, case.kwargs), backend="eager")


def called(call: Callable[..., Any]) -> Any:
    """What training calls the model with."""
    return Calls(lambda generator: (torch.zeros(2, 3), None), call).example()


REFUSED: dict[str, tuple[Callable[[], Any], type[TccError], str]] = {
    "steps": (lambda: CachePlan(2.0, {}), PlanError, r"num_steps=2\.0: expected a whole number"),
    "steps, a bool": (lambda: CachePlan(True, {}), PlanError, "num_steps=True: expected a whole number"),
    "a step": (lambda: CachePlan(2, {(1.0, SITE): Reuse()}), PlanError, r"attn.delta': step=1\.0: expected a whole"),
    "a site": (lambda: CachePlan(2, {(1, 3): Reuse()}), PlanError, r"the key \(1, 3\) is no pair \(step, site\)"),
    "actions": (lambda: CachePlan(2, [1]), PlanError, r"actions=\[1\]: expected a dict, by \(step, site\)"),
    "token sets": (lambda: CachePlan(2, {}, None), PlanError, "tokens=None: expected a dict, by name"),
    "a set's name": (lambda: CachePlan(2, {}, {1: torch.tensor([0])}), PlanError, "tokens: 1 is no name"),
    "a table": (lambda: CachePlan(2, {}, tables={"f": [1.0]}), PlanError, "table 'f': expected a .* tensor, got list"),
    "a count": (lambda: TopK("s", 4.0), PlanError, r"TopK: count=4\.0: expected a whole number"),
    "an order": (lambda: Reuse("1", (2.0, -1.0)), PlanError, "Reuse: order='1': expected a whole number"),
    "a coefficient": (lambda: Reuse(1, ("a", 1.0)), PlanError, "Reuse: coefficient='a': expected a number"),
    "terms": (lambda: Score((1.0, Fixed("f"))), PlanError, r"1\.0 is not a term"),
    "a weight": (lambda: Score((("1", Fixed("f")),)), PlanError, r"of Fixed\(table='f'\)='1': expected a number"),
    "float4": (lambda: CachePlan(2, {}, slot_dtype=torch.float4_e2m1fn_x2), PlanError, "slot_dtype=torch.float4"),
    "no sign": (lambda: CachePlan(2, {}, slot_dtype=torch.float8_e8m0fnu), PlanError, "slot_dtype=torch.float8_e8m0"),
    "a plan": (lambda: compiled().with_plan(None), PlanError, "plan=None is neither a plan nor a policy"),
    "a loop": (lambda: compiled().whole_run(None), CallError, "loop=None cannot be called"),
    "a start": (lambda: compiled().new_session(start_step=0.0), PlanError, r"start_step=0\.0: a step is a whole"),
    "calls": (lambda: tcc.compile(dit().model, CachePlan(2, {}), calls_per_step="2"), CallError, "are whole numbers"),
    "info": (lambda: tcc.plans.full("x", num_steps=3), PlanError, r"full\(info, ...\) takes what .* got str"),
    "level": (lambda: tcc.plans.tprr(dit().info, num_steps=6, level=[]), PlanError, r"level=\[\]: use one of block"),
    "blocks": (lambda: tcc.plans.tprr(dit().info, num_steps=6, blocks=torch.tensor(2)), PlanError, "blocks=2: give a"),
    "a price": (lambda: Budget(price=math.inf), PlanError, "Budget: price=inf: expected a number"),
    "choices": (lambda: RouterWeights(4, ["a"], {1.5: ("a",)}), TrainError, r"P-step 1\.5: steps are whole numbers"),
    "what calls": (lambda: called(lambda x, t, y: (x, t, y)), TrainError, r"a tuple: expected the pair \(args"),
    "runs": (lambda: Recorder(dit().info, num_steps=4.5), PlanError, r"num_steps=4\.5: expected a whole number"),
    "a model": (lambda: tcc.inspect("m", torch.zeros(1)), CallError, "model='m' is no model: give an nn.Module"),
}  # fmt: skip


@pytest.mark.parametrize("name", REFUSED)
def test_it_is_refused(name: str) -> None:
    """The message names what was given and what it may be."""
    make, error, message = REFUSED[name]
    with pytest.raises(error, match=message):
        make()


def test_a_picture_that_cannot_be_written(tmp_path: Path) -> None:
    """As a file that cannot."""
    with pytest.raises(PlanError, match=r"nowhere/x\.png: .*No such file or directory"):
        CachePlan(2, {}).plot(tmp_path / "nowhere" / "x.png")


def test_numbers_of_numpy_and_torch_are_numbers(tmp_path: Path) -> None:
    """The plan is the same as with Python's, and its file too."""
    ours = CachePlan(
        np.int64(3),
        {(np.int64(2), SITE): Reuse(np.int64(1), (torch.tensor(1.5), np.float32(-0.5)))}
        | {(1, "blocks.1.mlp.delta"): Update(TopK("s", np.int64(4)))},
        scores={"s": Score([(np.float32(1), Fixed("f"))], bonus=torch.tensor(0.5), cell=np.int64(2))},
        tables={"f": torch.ones(16)},
    )
    python = CachePlan(
        3,
        {(2, SITE): Reuse(1, (1.5, -0.5)), (1, "blocks.1.mlp.delta"): Update(TopK("s", 4))},
        scores={"s": Score(((1.0, Fixed("f")),), bonus=0.5, cell=2)},
        tables={"f": torch.ones(16)},
    )
    assert ours == python
    counted = dit().info.count(ours)
    counted.save(tmp_path / "plan.safetensors")
    assert CachePlan.load(tmp_path / "plan.safetensors") == counted
