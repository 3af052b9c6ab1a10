"""The scripts that measure compile time and the order of tokens: what they compare is what they say."""

from __future__ import annotations

import functools
from types import ModuleType
from typing import Any

import pytest
import torch

import tcc
from tests.scripts import modules_of

scripts = modules_of(
    "provenance", "step_speed", "peers_models", "ablation_table", "ablation", "token_order", "compile_time"
)


@pytest.mark.parametrize("keep", [64, 128])
def test_all_ways_to_gather_and_scatter_do_the_same(
    scripts: dict[str, ModuleType], keep: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Apart and fused to the bit; slices do as much, on the tokens that stand first."""

    def uncompiled(function: Any, **_: object) -> Any:
        return function

    monkeypatch.setattr(torch, "compile", uncompiled)
    made: dict[str, Any] = {name: call() for name, call in scripts["token_order"].ends_of_a_run(keep).items()}
    assert list(made["gather, fused"].shape) == [2, keep, 384]
    for end in ("gather", "scatter"):
        assert torch.equal(made[f"{end}, apart"], made[f"{end}, fused"])
        assert made[f"{end}, slices"].shape == made[f"{end}, fused"].shape


@pytest.mark.parametrize(("name", "variants"), [("plain", 1), ("plan", 2), ("2 variants", 2), ("5 variants", 5)])
def test_plans_have_the_variants_of_their_names(scripts: dict[str, ModuleType], name: str, variants: int) -> None:
    """So the seconds of five variants are of five."""
    model, inputs = scripts["compile_time"].build(3, 32)
    info = tcc.inspect(model, *inputs)
    program = info.program(scripts["compile_time"].policy_of(name)(info))
    assert len(program.variants) == variants


@pytest.mark.parametrize("after", [1, 2, 3])
def test_so_many_p_steps_are_counted(scripts: dict[str, ModuleType], after: int) -> None:
    """In every plan of `step_speed`: one full step, and the cheaper ones after it."""
    step_speed, (model, inputs) = scripts["step_speed"], scripts["compile_time"].build(3, 32)
    info = tcc.inspect(model, *inputs)
    for policy in step_speed.PLANS.values():
        plan = policy(after)(info)
        first, *others = (plan.cost.step_macs[step] for step in step_speed.counted(plan))
        assert first == plan.cost.full_macs
        assert len(others) == after
        assert max(others) < 0.9 * first


def test_runs_whose_timesteps_are_known(scripts: dict[str, ModuleType], monkeypatch: pytest.MonkeyPatch) -> None:
    """They compute modulations once, are called with those timesteps, and give the same."""
    step_speed = scripts["step_speed"]
    model, inputs = scripts["compile_time"].build(3, 32)
    monkeypatch.setattr(step_speed.tcc, "compile", functools.partial(tcc.compile, backend="eager"))
    for name in ("FORA", "keep 0.25"):
        for compiled in step_speed.compile_plans(model, step_speed.PLANS[name], inputs, {}, True).values():
            assert compiled.new_session().folded_bytes > 0
            with torch.no_grad():
                steps = list(step_speed.whole_run(compiled, inputs).start())
            assert len(steps) == compiled.plan.num_steps
            assert not torch.equal(steps[0], steps[1])
            assert step_speed.error(model, compiled, inputs) < 1e-5
            step_speed.p_step(compiled, inputs)()


def test_a_plan_is_measured_by_whole_runs(scripts: dict[str, ModuleType], monkeypatch: pytest.MonkeyPatch) -> None:
    """The seconds of a plan are those of its own steps: I-step and every P-step after it."""
    step_speed, compile_time = scripts["step_speed"], scripts["compile_time"]
    model, inputs = compile_time.build(3, 32)
    eager = functools.partial(tcc.compile, backend="eager")
    monkeypatch.setattr(step_speed.tcc, "compile", eager)
    plans = step_speed.compile_plans(model, step_speed.PLANS["forecast"], inputs, {})
    assert [compiled.plan.num_steps for compiled in plans.values()] == [3, 4, 5]

    cost = plans[3].plan.cost
    timing = tcc.timing.RunTiming(range(5), ((9.0, 4.0, 1.0, 2.0, 3.0),), None)
    found = step_speed.whole_plan(5.0, timing, plans[3].plan)
    assert (found["I"], found["P"]) == (4000.0, 1000.0)
    assert found["plan speedup"] == 2.0  # 4 steps of 5 s in 4 + 1 + 2 + 3
    assert found["plan bound"] == 4 * cost.full_macs / sum(cost.step_macs[1:])
