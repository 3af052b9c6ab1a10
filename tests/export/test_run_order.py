"""What a runner notices of a caller that is at another step: the same as the compiled model does."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from typer.testing import CliRunner

import tcc
from tcc.cli import app
from tcc.errors import BundleError, CallError, ExportError
from tcc.export import bundle, load
from tcc.export.manifest import read
from tests.export.bundles import STEPS, flat_inputs
from tests.running import hold_plan
from tests.tiny_models import case, tensor_of

pytest.importorskip("onnx", reason="needs the ONNX packages: pip install 'tcc[onnx]'")
SHARED = r"step 1 of {}: .* Two guidance branches share one session, .*runner.new_session\(\)`, or both in one call"


@pytest.fixture(scope="module")
def twice(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """A model that was compiled for two calls at each of three steps, and its bundle."""
    which = case("dit")
    example = (which.args, which.kwargs)
    model = tcc.compile(which.model, hold_plan(), backend="eager", calls_per_step=2, example_inputs=example)
    return model, bundle(model, None, None, tmp_path_factory.mktemp("twice") / "made").folder


def test_two_guidance_branches_in_one_session_are_refused(written: Any) -> None:
    """At the second branch's first call, which runs nothing; in sessions of their own each gets its image."""
    runner = load(written("dit").folder, device="cpu")
    x, t, y = flat_inputs(case("dit"), 0)
    runner(x, t, y)
    with pytest.raises(CallError, match=SHARED.format(STEPS)):
        runner(x, t, (y + 1) % 11)
    assert runner.step == 1
    other = runner.new_session()
    other(x, t, (y + 1) % 11)
    assert (runner.step, other.step) == (1, 1)
    runner(*flat_inputs(case("dit"), 1))


def test_a_bundle_of_two_calls_per_step_says_so(twice: Any) -> None:
    """In the manifest, in the error, and where it is shown; sessions of their own compute what the model does."""
    model, folder = twice
    assert read(folder).calls_per_step == 2
    shown = CliRunner().invoke(app, ["inspect", str(folder)], env={"COLUMNS": "300"}).output
    assert "2 calls each: a session (new_session) for each guidance branch" in " ".join(shown.split())
    runner = load(folder, device="cpu")
    x, t, y = flat_inputs(case("dit"), 0)
    runner(x, t, y)
    with pytest.raises(CallError, match=r"compiled with calls_per_step=2; a runner takes one call per step"):
        runner(x, t, (y + 1) % 11)
    runner.reset()
    branches = (runner, runner.new_session())
    for step in range(3):
        x, t, y = flat_inputs(case("dit"), step)
        for branch, label in zip(branches, (y, (y + 1) % 11), strict=True):
            torch.testing.assert_close(branch(x, t, label), tensor_of(model(x, t, label)))


def test_an_image_that_was_not_finished(written: Any) -> None:
    """The next one is refused at its first call, unless the caller says that it begins; then it is the same image."""
    which, runner = case("dit"), load(written("dit").folder, device="cpu")
    expected = [runner(*flat_inputs(which, step)) for step in range(STEPS)]
    for step in range(3):
        runner(*flat_inputs(which, step))
    first = flat_inputs(which, 0)
    with pytest.raises(
        CallError, match=rf"step 3 of {STEPS}: the noise level went back, .* call reset\(\).*runner\.run_s"
    ):
        runner(*first)
    assert runner.step == 3
    runner.reset()
    for step in range(STEPS):
        assert torch.equal(runner(*flat_inputs(which, step)), expected[step])


def test_more_steps_than_the_plan_has(written: Any) -> None:
    """A scheduler that goes on after the plan's last step; a step by its number is the caller's word."""
    which, runner = case("dit"), load(written("dit").folder, device="cpu")
    x, _, y = flat_inputs(which, 0)
    for step in range(STEPS):
        runner(x + step, torch.full((2,), 900 - 100 * step), y)
    last = (x, torch.full((2,), 100), y)
    with pytest.raises(CallError, match=r"the plan's 6 steps are over, and the noise level goes on from 400 to 100"):
        runner(*last)
    runner.run_step(0, *last)
    runner.run_step(1, x, torch.full((2,), 500), y)
    assert runner.step == 2


def test_steps_without_slots_may_run_in_any_order(tmp_path: Path) -> None:
    """A plan that only computes keeps nothing: branches and repeated levels are as they are in the model."""
    which = case("dit")
    plan = which.info.count(tcc.CachePlan(num_steps=2, actions={}))
    runner = load(bundle(which.model, plan, (which.args, which.kwargs), tmp_path / "made").folder, device="cpu")
    x, t, y = flat_inputs(which, 0)
    for level, label in ((t, y), (t, y + 0), (t, (y + 1) % 11), (t + 1, y), (t, y)):
        runner(x, level, label)


def test_what_is_no_step_path_or_device_is_told(written: Any) -> None:
    """And changes nothing."""
    folder = written("dit").folder
    runner, inputs = load(folder, device="cpu:0"), flat_inputs(case("dit"), 0)
    for step in (0.0, True, "1", None):
        with pytest.raises(CallError, match=rf"step {step!r} is no whole number: steps are 0 to 5"):
            runner.run_step(step, *inputs)  # type: ignore[arg-type]
    assert type(runner.step) is int
    runner.run_step(np.int64(0), *inputs)  # type: ignore[arg-type]
    assert (runner.step, type(runner.step)) == (1, int)
    with pytest.raises(BundleError, match=r"^None is no path: name the folder that tcc export wrote"):
        load(None)  # type: ignore[arg-type]
    for device in ("cpu:1", "meta", 3.5):
        with pytest.raises(BundleError, match=rf"unknown device '{device}': use cpu or cuda"):
            load(folder, device=device)  # type: ignore[arg-type]


def test_slots_that_no_bundle_holds_are_refused_at_export(tmp_path: Path) -> None:
    """Before anything is written."""
    which = case("dit")
    model = tcc.compile(
        which.model, hold_plan(), backend="eager", slot_dtype=torch.float8_e4m3fn, example_inputs=(which.args, {})
    )
    with pytest.raises(ExportError, match=r"slot_dtype=torch.float8_e4m3fn: bundles do not hold .* torch.bfloat16$"):
        bundle(model, None, None, tmp_path / "made")
    assert not list(tmp_path.iterdir())
