"""A whole sampling run as one recorded graph: what replays gives what the loop gives, for any noise."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from typing import Any

import pytest
import torch
from torch import Tensor

import tcc
from tcc.errors import CallError, PlanError
from tcc.runtime import whole_run
from tcc.runtime.whole_run import WholeRun
from tcc.samplers import sample
from tcc.timing import Timing
from tests.tapes import Tapes
from tests.tiny_models import case, dit, noise

STEPS = 6
LABELS = torch.tensor([1, 2])


def loop(model: Any, start: Tensor, labels: Tensor) -> Tensor:
    """DDIM with guidance: the sampler's arithmetic, and a model call at every step."""
    return sample(model, start, labels, num_steps=STEPS, cfg_scale=1.5, null_class=10)


def compiled() -> tcc.CompiledModel:
    """A plan with reuse and pruned tokens in one run."""
    which = case("dit")
    inputs = (torch.cat([which.args[0]] * 2), torch.zeros(4, dtype=torch.int64), torch.zeros(4, dtype=torch.int64))
    options: dict[str, Any] = {"keep": 0.5, "attention": "cached", "rotate": True}
    info = tcc.inspect(which.model, *inputs)
    plan = tcc.plans.tprr(info, num_steps=STEPS, k1=1, k2=1, **options)
    return tcc.compile(which.model, plan, example_inputs=(inputs, {}), backend="eager")


def choose(monkeypatch: pytest.MonkeyPatch, seconds: Mapping[str, float]) -> None:
    """Every way is called once, and takes so long."""

    def timed(calls: Mapping[str, Callable[[], object]], *, rounds: int) -> dict[str, Timing]:
        for call in calls.values():
            call()
        return {name: Timing((seconds[name],)) for name in calls}

    monkeypatch.setattr(whole_run, "time_calls", timed)


@pytest.mark.parametrize("faster", ["one graph", "by steps"])
def test_the_faster_way_runs_and_gives_what_the_loop_gives(monkeypatch: pytest.MonkeyPatch, faster: str) -> None:
    """Bit for bit, also for noise that was not there when the run was recorded; a replay runs no Python of the loop."""
    choose(monkeypatch, {"one graph": 1.0, "by steps": 1.0} | {faster: 0.5})
    model, called = compiled(), []

    def counted(*args: Any) -> Tensor:
        called.append(args)
        return loop(*args)

    run = WholeRun(model._executable(0), counted, recorder=Tapes())
    for seed in range(3):
        start = noise(2, 4, 8, 8, seed=seed)
        assert torch.equal(run(start, LABELS), loop(model.new_session(), start, LABELS))
    assert run.seconds[faster] == 0.5
    assert len(called) == {"one graph": 3, "by steps": 6}[faster]  # one by steps; warm-up and recording


def test_images_are_the_references(monkeypatch: pytest.MonkeyPatch) -> None:
    """The recorded run against the interpreter."""
    choose(monkeypatch, {"one graph": 0.5, "by steps": 1.0})
    model = compiled()
    run, start = WholeRun(model._executable(0), loop, recorder=Tapes()), noise(2, 4, 8, 8, seed=5)
    run(noise(2, 4, 8, 8, seed=4), LABELS)
    torch.testing.assert_close(run(start, LABELS), loop(tcc.Reference(case("dit").model, model.plan), start, LABELS))


def test_choosing_changes_neither_the_inputs_nor_the_random_numbers() -> None:
    """The first call times runs, and then gives what the loop gives, which draws noise and writes to its input."""
    model, start = compiled(), noise(2, 4, 8, 8)

    def drawing(called: Any, x: Tensor, y: Tensor) -> Tensor:
        x.mul_(0.5).add_(torch.randn(x.shape))
        return loop(called, x, y)

    torch.manual_seed(3)
    expected = drawing(model.new_session(), start.clone(), LABELS)
    for recorder in (Tapes(), None):
        run = WholeRun(model._executable(0), drawing, recorder=recorder)
        for _ in range(2):
            torch.manual_seed(3)
            given = start.clone()
            assert torch.equal(run(given, LABELS), expected)
            assert torch.equal(given, start)


def test_a_loop_that_reads_a_value_is_not_captured(monkeypatch: pytest.MonkeyPatch) -> None:
    """The stand-in refuses it as CUDA does: so the loops above read none, and nor does a session."""
    choose(monkeypatch, {"one graph": 0.5, "by steps": 1.0})
    run = WholeRun(compiled()._executable(0), lambda m, x, y: x * float(x.mean()), recorder=Tapes())
    with pytest.raises(
        CallError, match="cannot be captured as a CUDA graph: a value is read while a graph is captured"
    ):
        run(noise(2, 4, 8, 8), LABELS)


def test_without_a_recorder_the_loop_runs_as_it_is() -> None:
    """On CPUs; for one set of shapes too."""
    model, start = compiled(), noise(2, 4, 8, 8)
    run = model.whole_run(loop)
    assert torch.equal(run(start, LABELS), loop(model.new_session(), start, LABELS))
    assert run.seconds == {}
    with pytest.raises(CallError, match=r"the run's inputs are .*, and those of the first call were "):
        run(start[:1], LABELS[:1])
    with pytest.raises(PlanError, match="nothing is compiled yet"):
        tcc.compile(case("dit").model, model.plan).whole_run(loop)


@pytest.mark.parametrize(
    ("steps", "message"),
    [
        (STEPS - 2, "the loop ended after 4 of the plan's 6 steps: make the plan with as many steps as the loop calls"),
        (STEPS + 3, "the plan's 6 steps are over, and the noise level goes on"),
    ],
)
@pytest.mark.parametrize("recorder", [None, Tapes()])
def test_a_loop_of_other_steps_is_refused(recorder: Tapes | None, steps: int, message: str) -> None:
    """As calls of a session are; nothing was captured."""

    def other(model: Any, start: Tensor, labels: Tensor) -> Tensor:
        x, y = torch.cat([start, start]), torch.cat([labels, labels])
        for step in range(steps):
            x = x - 0.1 * model(x, torch.full((4,), 900 - 50 * step), y)[:, :4]
        return x

    run = WholeRun(compiled()._executable(0), other, recorder=recorder)
    with pytest.raises(CallError, match=message):
        run(noise(2, 4, 8, 8), LABELS)
    assert run.seconds == {}


def test_inputs_and_results_are_tensors() -> None:
    """Everything else would be that of the first call."""
    model, start = compiled(), noise(2, 4, 8, 8)
    with pytest.raises(CallError, match=r"input 2 of the run is 1\.5: a run is called with tensors alone"):
        model.whole_run(loop)(start, LABELS, 1.5)  # type: ignore[arg-type]
    with pytest.raises(CallError, match="the loop returned a tuple: return the one tensor that a run makes"):
        model.whole_run(lambda *args: (loop(*args), None))(start, LABELS)  # type: ignore[arg-type, return-value]


def test_a_run_that_begins_in_the_middle() -> None:
    """Image to image: its steps are those of the plan from there on."""
    which, levels = case("dit"), torch.tensor([900, 700, 500, 300])
    policy = functools.partial(tcc.plans.fora, num_steps=4, interval=2)
    given: dict[str, Any] = {"example_inputs": (which.args, {}), "backend": "eager", "timesteps": levels}
    model = tcc.compile(which.model, policy, **given)

    def rest(call: Any, x: Tensor) -> Tensor:
        for level in levels[1:]:
            x = x - 0.1 * call(x, level.expand(2), which.args[2])[:, :4]
        return x

    expected = rest(model.new_session(start_step=1), which.args[0])
    model.reset(start_step=1)
    assert torch.equal(model.whole_run(rest)(which.args[0]), expected)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="CUDA graphs need a CUDA device, and there is none")
@pytest.mark.parametrize("faster", ["one graph", "by steps"])
@pytest.mark.parametrize("mode", ["default", "reduce-overhead"])
def test_a_run_on_a_gpu(monkeypatch: pytest.MonkeyPatch, faster: str, mode: str) -> None:
    """The same with CUDA graphs and Inductor."""
    choose(monkeypatch, {"one graph": 1.0, "by steps": 1.0} | {faster: 0.5})
    model = dit().model.cuda()
    inputs = tuple(x.cuda() for x in (torch.zeros(4, 4, 8, 8), torch.zeros(4).long(), torch.zeros(4).long()))
    plan = tcc.plans.tprr(tcc.inspect(model, *inputs), num_steps=STEPS, k1=1, k2=1, keep=0.5)
    made = tcc.compile(model, plan, example_inputs=(inputs, {}), mode=mode)
    run = made.whole_run(loop)
    for seed in range(3):
        start = noise(2, 4, 8, 8, seed=seed).cuda()
        torch.testing.assert_close(run(start, LABELS.cuda()), loop(made.new_session(), start, LABELS.cuda()))
