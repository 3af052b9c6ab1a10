"""`tcc train steps | errors`, on a tiny model."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from typer.testing import CliRunner

import tcc
from tcc.calibrate import Calibration
from tcc.cli import app
from tcc.models import save_weights
from tcc.models.dit import DiT
from tests.tiny_models import fill

Invoke = Callable[..., Any]
TINY = ["--model", "tiny.safetensors", "--images", "2"]


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Invoke:
    """Run a command in a folder that holds `tiny.safetensors`; it must have the exit code."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "200")
    model = fill(DiT(input_size=8, patch_size=2, in_channels=1, hidden_size=32, depth=2, num_heads=2, num_classes=3))
    assert isinstance(model, DiT)
    save_weights(model, "tiny.safetensors", torch.float32)

    def invoke(*arguments: str, exit_code: int = 0) -> Any:
        result = CliRunner().invoke(app, [*arguments])
        assert result.exit_code == exit_code, f"{result.output}\n{result.exception!r}"
        return result

    return invoke


def test_steps_are_placed_and_measured_again_on_unseen_noise(run: Invoke) -> None:
    """The plan is a forecast at the placement that was found, for the batch that was asked for."""
    options = ["--steps", "6", "--i-steps", "3", "--evaluations", "6", "--backend", "eager", "--plan-batch", "2"]
    run("train", "steps", *TINY, *options, "--out", "plan.safetensors", "--json", "out.json")
    plan, record = tcc.CachePlan.load("plan.safetensors"), json.loads(Path("out.json").read_text())
    assert plan.policy["name"] == "forecast"
    assert plan.model is not None
    assert plan.model.inputs[0][1][0] == 2
    assert len(plan.schedule.i_steps) == 3
    assert record["evaluations"] == 6
    assert record["quality"] >= record["start"]
    assert set(record["unseen"]) == {"start", "found"}


def test_steps_are_placed_the_same_for_the_same_seed(run: Invoke) -> None:
    """Noise and moves come from the seed."""
    options = ["--steps", "8", "--i-steps", "4", "--evaluations", "5", "--backend", "eager", "--plan-batch", "2"]
    for name in ("one", "two"):
        run("train", "steps", *TINY, *options, "--out", f"{name}.safetensors", "--seed", "3")
    one, two = (tcc.CachePlan.load(f"{name}.safetensors") for name in ("one", "two"))
    assert one.schedule == two.schedule


def test_more_i_steps_than_steps_are_refused(run: Invoke) -> None:
    """In one line."""
    result = run("train", "steps", *TINY, "--steps", "4", "--i-steps", "9", "--out", "p.safetensors", exit_code=1)
    assert "i_steps=9: expected a whole number, 1..4" in result.output


def test_errors_are_measured_for_smoothcache(run: Invoke) -> None:
    """The file goes straight into the policy; a loose threshold reuses, a strict one does not."""
    run("train", "errors", *TINY, "--steps", "5", "--back", "2", "--out", "errors.safetensors")
    measured = Calibration.load("errors.safetensors")
    assert (measured.num_steps, measured.back) == (5, 2)
    plan = ["plan", "--policy", "smoothcache", "--model", "tiny.safetensors", "--steps", "5", "--batch", "4"]
    plan += ["-o", "errors=errors.safetensors", "-o", "lookahead=2"]
    assert "IIIII" in run(*plan, "-o", "alpha=0").output
    assert "P" in run(*plan, "-o", "alpha=1e9").output.split("schedule")[1].split("\n")[0]
