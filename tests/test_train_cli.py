"""`tcc train`, on a tiny model: alone, interrupted, and in two processes."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors
import safetensors.torch
import torch
from PIL import Image
from typer.testing import CliRunner

import tcc
from tcc.cli import app
from tcc.learned import Importance, Probes, Router, load_learned
from tcc.models import save_weights
from tcc.models.dit import DiT
from tcc.plan import Skip
from tcc.train.weights import Budget
from tests.test_train_recipes import sites, tiny
from tests.tiny_models import fill, uvit

Invoke = Callable[..., Any]
SHORT = ["--model", "tiny.safetensors", "--steps", "6", "--batch", "4", "--plan-batch", "2"]


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Invoke:
    """Run a command in a folder that holds `tiny.safetensors` and images in `photos`; it must have the exit code."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "200")
    sizes = {"input_size": 8, "patch_size": 2, "in_channels": 1, "hidden_size": 32, "depth": 2, "num_heads": 2}
    model = fill(DiT(**sizes, num_classes=3))
    save_weights(model, "tiny.safetensors", torch.float32)  # type: ignore[arg-type]
    draw = np.random.default_rng(0)
    for label in "ab":
        Path("photos", label).mkdir(parents=True)
        for number in range(3):
            Image.fromarray(draw.integers(256, size=(8, 8), dtype=np.uint8)).save(f"photos/{label}/{number}.png")

    def invoke(*arguments: str, exit_code: int = 0) -> Any:
        result = CliRunner().invoke(app, ["train", *arguments])
        assert result.exit_code == exit_code, f"{result.output}\n{result.exception!r}"
        return result

    return invoke


def plain(text: str) -> str:
    """Text without colours and line breaks."""
    return " ".join(re.sub(r"\x1b\[[0-9;]*m", "", text).split())


def router(path: str) -> Router:
    """A router file."""
    found = load_learned(path)
    assert isinstance(found, Router)
    return found


def torchrun(*commands: list[str]) -> subprocess.CompletedProcess[str]:
    """Run commands of `tcc train` one after the other, in two processes."""
    code = """import json, sys\nfrom tcc.cli import app
for words in json.loads(sys.argv[1]):
    app(words, standalone_mode=False) and sys.exit(1)
"""
    Path("commands.py").write_text(code)
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "commands.py"]
    return subprocess.run(
        [*launcher, json.dumps([["train", *words] for words in commands])],
        env=os.environ | {"OMP_NUM_THREADS": "1"}, capture_output=True, text=True, timeout=300, check=False,
    )  # fmt: skip


def content(path: str) -> tuple[dict[str, str], dict[str, list[Any]]]:
    """Everything that a safetensors file holds, bit for bit; the order of its header is not fixed."""
    with safetensors.safe_open(path, "pt") as file:
        tensors = {name: file.get_tensor(name).nan_to_num(-1).tolist() for name in file.keys()}  # noqa: SIM118
        return file.metadata(), tensors


def test_a_router_of_a_uvit_for_dpm_solver_2(run: Invoke) -> None:
    """P-steps are the first evaluations of solver steps, all but one; on runs, and on pairs of latents in files."""
    save_weights(uvit().model, "uvit.safetensors", torch.float32)  # type: ignore[arg-type]
    given = ["router", "--model", "uvit.safetensors", "--sampler", "dpm-solver-2", "--batch", "2", "--plan-batch", "2"]
    files = ["--out", "plan.safetensors", "--learned", "scores.safetensors", "--iterations", "1", "--lambda", "100"]
    run(*given, *files, "--steps", "6", "-o", "theta=1")
    assert router("scores.safetensors").p_steps == (2, 4)
    plan = tcc.CachePlan.load("plan.safetensors")
    assert plan.schedule.letters == "IIPIPI"
    assert plan.policy["name"] == "l2c"

    result = run(*given, *files, "--steps", "7", exit_code=2)
    assert "dpm-solver-2 evaluates twice per step: give an even number" in plain(result.output)
    Path("latents").mkdir()
    safetensors.torch.save_file({"x": torch.randn(4, 8, 8), "y": torch.tensor(1)}, "latents/0.safetensors")
    Path("plan.state.safetensors").unlink()
    run(*given, *files, "--steps", "6", "--data", "latents")
    assert router("scores.safetensors").p_steps == (2, 4)


@pytest.mark.parametrize("recipe", ["pairs", "trajectory"])
def test_a_router_becomes_a_plan(run: Invoke, recipe: str) -> None:
    """Plan, scores and numbers are written, and agree; the table is that of pairs."""
    data = ["--data", "photos"] if recipe == "pairs" else []
    files = ["--out", "plan.safetensors", "--learned", "scores.safetensors", "--json", "numbers.json"]
    result = run("router", *SHORT, *data, *files, "--iterations", "4", "--lambda", "100", "-o", "theta=0.6")
    scores = router("scores.safetensors")
    assert scores.p_steps == (1, 3, 5)
    plan = tcc.CachePlan.load("plan.safetensors")
    assert plan.num_steps == 6
    assert plan.model is not None
    assert plan.model.inputs[0][1] == (2, 1, 8, 8)
    reused = {(step, site) for (step, site), action in plan.actions.items() if isinstance(action, tcc.Reuse)}
    below = (scores.scores <= 0.6).nonzero().tolist()
    assert reused == {(step, scores.sites[unit]) for step, unit in below}
    numbers = json.loads(Path("numbers.json").read_text())
    assert numbers["recipe"] == recipe
    assert numbers["iterations"] == 4
    assert numbers["share_below"] == pytest.approx(len(below) / 12)
    assert "4 iterations in" in plain(result.output)
    assert Path("plan.state.safetensors").is_file()


def test_a_router_for_dropping_becomes_a_plan_that_drops(run: Invoke) -> None:
    """Nothing is reused, and what the router does not ask for is left out."""
    files = ["--out", "plan.safetensors", "--learned", "scores.safetensors"]
    run("router", *SHORT, *files, "--drop", "--iterations", "2", "-o", "theta=0.6")
    scores, plan = router("scores.safetensors"), tcc.CachePlan.load("plan.safetensors")
    dropped = [key for key, action in plan.actions.items() if action == Skip()]
    assert len(dropped) == int((scores.scores <= 0.6).sum()) > 0
    assert not any(isinstance(action, tcc.Reuse) for action in plan.actions.values())


def test_the_same_command_goes_on(run: Invoke) -> None:
    """With more iterations, from where it stopped, to the same scores as in one go."""
    options = ["router", *SHORT, "--data", "photos", "--learned", "scores.safetensors"]
    run(*options, "--out", "a.safetensors", "--iterations", "2")
    result = run(*options, "--out", "a.safetensors", "--iterations", "5")
    assert "going on from a.state.safetensors" in plain(result.output)
    two = router("scores.safetensors").scores
    run(*options, "--out", "b.safetensors", "--iterations", "5")
    assert torch.equal(two.nan_to_num(), router("scores.safetensors").scores.nan_to_num())
    result = run(*options, "--out", "a.safetensors", "--iterations", "5", "--seed", "1", exit_code=1)
    assert "state of another run (seed was 0 and is 1)" in plain(result.output)


def test_a_training_that_ran_out_of_time_stays_as_it_is(run: Invoke) -> None:
    """The same command again writes the same plan and scores, and tells the same numbers."""
    files = ["--out", "plan.safetensors", "--learned", "scores.safetensors", "--json", "numbers.json"]
    written = []
    for _ in range(2):
        run("predictor", "--form", "stream", *SHORT, *files, "--minutes", "0.005")
        numbers = json.loads(Path("numbers.json").read_text())
        written.append((numbers, content("plan.safetensors"), content("scores.safetensors")))
    assert written[0] == written[1]
    assert written[0][0]["iterations"] > 0


def test_an_interruption_says_how_to_go_on(run: Invoke, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing is lost but the iteration that was running."""
    from tcc.train.pairs import Pairs

    honest, calls = Pairs.accumulate, []

    def interrupted(self: Pairs, *arguments: Any) -> Any:
        calls.append(1)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return honest(self, *arguments)

    options = ["router", *SHORT, "--data", "photos", "--out", "plan.safetensors", "--learned", "scores.safetensors"]
    monkeypatch.setattr(Pairs, "accumulate", interrupted)
    result = run(*options, "--iterations", "5", exit_code=130)
    assert "stopped; plan.state.safetensors holds the state: the same command goes on from there" in plain(
        result.output
    )
    assert not Path("plan.safetensors").exists()
    run(*options, "--iterations", "5")
    resumed = router("scores.safetensors").scores
    Path("plan.state.safetensors").unlink()
    run(*options, "--iterations", "5")
    assert torch.equal(resumed.nan_to_num(), router("scores.safetensors").scores.nan_to_num())


def test_longer_cycles_and_guidance_need_trajectories(run: Invoke) -> None:
    """The schedule is that of tprr; scores stand where its P-steps are."""
    files = ["--out", "plan.safetensors", "--learned", "scores.safetensors"]
    run("router", *SHORT, *files, "--k1", "2", "--k2", "2", "--cfg", "1.5", "--iterations", "1", "--sites", "delta")
    scores = router("scores.safetensors")
    assert scores.p_steps == (1, 2, 4, 5)
    assert scores.sites[0].endswith(".delta")
    data = ["--data", "photos"]
    for wrong, message in (
        (["--recipe", "pairs"], "give --data"),
        ([*data, "--k1", "2"], "pairs have one P-step each"),
        ([*data, "--cfg", "2"], "pairs are without guidance"),
        ([*data, "--recipe", "trajectory"], "trajectories begin from noise: leave out --data, or use --recipe pairs"),
        ([*data, "--groups", "3"], "4 images do not make 3 equal groups"),
    ):
        assert message in plain(run("router", *SHORT, "--out", "x.safetensors", *wrong, exit_code=2).output)


def test_user_mistakes_are_one_line(run: Invoke, monkeypatch: pytest.MonkeyPatch) -> None:
    """An empty folder, a model that is no DiT file, a learning rate of zero, a seed or a device that is none."""
    Path("empty").mkdir()
    out = ["--out", "plan.safetensors", "--iterations", "1"]
    result = run("router", *SHORT, *out, "--data", "empty", exit_code=1)
    assert "error: empty holds no images: expected one sub-folder per class" in plain(result.output)
    assert "has random weights" in plain(run("router", "--model", "DiT-S/2", *out, exit_code=1).output)
    assert "unknown model 'nothing'" in plain(run("router", "--model", "nothing", *out, exit_code=1).output)
    assert "the learning rate is in (0, 100]" in plain(run("router", *SHORT, *out, "--lr", "0", exit_code=1).output)
    assert "policy l2c has no option 'keep'" in plain(run("router", *SHORT, *out, "-o", "keep=1", exit_code=1).output)
    assert not Path("plan.safetensors").exists()
    assert "value for '--seed'" in plain(run("router", *SHORT, *out, "--seed", "9" * 20, exit_code=2).output)
    monkeypatch.setattr("torch.cuda.device_count", lambda: 0)
    result = run("router", *SHORT, *out, "--device", "cuda", exit_code=1)
    assert "error: --device cuda: torch sees 0 CUDA devices here: give cpu" in plain(result.output)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["-o", "budget=9"], "bound"),
        (["-o", "keep=2"], "keep"),
        (["-o", "budget=1.1", "-o", "keep=0.5", "-o", "pruned=1"], "nothing to solve for"),
    ],
)
@pytest.mark.parametrize("form", ["table", "stream"])
def test_what_the_policy_refuses_is_said_before_training(
    run: Invoke, form: str, options: list[str], message: str
) -> None:
    """Costs and options do not depend on what is learned."""
    given = ["predictor", *SHORT, "--form", form, "--iterations", "1", "--out", "plan.safetensors"]
    assert message in plain(run(*given, *options, exit_code=1).output)
    assert not Path("plan.state.safetensors").exists()


def test_a_state_is_of_one_model_and_of_its_images(run: Invoke) -> None:
    """The same command with other weights, or other images, does not go on from it."""
    given = ["router", *SHORT, "--out", "plan.safetensors", "--iterations", "1", "--data", "photos"]
    run(*given)
    file = next(path for path in Path("photos").rglob("*") if path.is_file())
    content = file.read_bytes()
    file.write_bytes(content + b"0")
    assert "is the state of another run (images' digest was" in plain(run(*given, exit_code=1).output)
    file.write_bytes(content)
    weights = safetensors.torch.load_file("tiny.safetensors")
    with safetensors.safe_open("tiny.safetensors", "pt") as opened:
        header = opened.metadata()
    weights[min(weights)] += 1
    safetensors.torch.save_file(weights, "tiny.safetensors", metadata=header)
    assert "is the state of another run (model's weights was" in plain(run(*given, exit_code=1).output)


@pytest.mark.parametrize(
    ("options", "budget", "held"),
    [
        ([], Budget(0.0, 0.5, 0.0), 0.5),
        (["--target", "0.25"], Budget(0.0, 0.25, 0.0), 0.25),
        (["--lambda", "1e-3"], Budget(1e-3), None),
        (["--lambda", "1e-3", "--target", "0.25"], Budget(1e-3, 0.25, 0.0), 0.25),
        (["--target", "0.25", "--target-strength", "3"], Budget(0.0, 0.25, 3.0), None),
    ],
)
def test_predictors_are_held_at_half_unless_something_else_is_asked_for(
    run: Invoke, monkeypatch: pytest.MonkeyPatch, options: list[str], budget: Budget, held: float | None
) -> None:
    """A mean of 0.5 is what was best; a price, another target, and a price of missing it are what they are."""
    asked: list[Any] = []
    monkeypatch.setattr("tcc.cli.train.run_training", lambda *arguments: asked.extend(arguments))
    run("predictor", *SHORT, "--out", "plan.safetensors", *options)
    assert asked[1] == budget
    assert asked[3](tiny().info, sites(), {1: sites()}).predictor.held == held
    wrong = run("predictor", *SHORT, "--out", "plan.safetensors", "--target-strength", "2", exit_code=2)
    assert "there is no target to miss: give --target" in plain(wrong.output)
    wrong = run("predictor", *SHORT, "--out", "plan.safetensors", "--target", "0", exit_code=2)
    assert "--target: weights are held at a mean between 0 and 1, not at 0" in plain(wrong.output)


@pytest.mark.parametrize(
    ("command", "option", "instead"),
    [
        ("predictor", "k1=3", "give --k1"),
        ("predictor", "boundary=0.2", "give --boundary"),
        ("predictor", "level=block", "give --sites"),
        ("predictor", "importance=x", "it is what is learned"),
        ("router", "router=x", "it is what is learned"),
        ("router", "sites=delta", "give --sites"),
    ],
)
def test_what_training_decides_is_no_option_of_the_plan(run: Invoke, command: str, option: str, instead: str) -> None:
    """A plan with other P-steps than those that were trained would contradict itself."""
    result = run(command, *SHORT, "--out", "plan.safetensors", "-o", option, exit_code=2)
    assert f"{option.partition('=')[0]} is decided by the training" in plain(result.output)
    assert instead in plain(result.output)


def test_steps_that_were_not_learned_are_told(run: Invoke) -> None:
    """One pair teaches one step, and the others follow it; without any iteration there is nothing to plan by."""
    given = [*SHORT, "--data", "photos", "--out", "plan.safetensors"]
    result = run("predictor", *given, "--iterations", "1", "--learned", "scores.safetensors")
    assert re.search(r"1 iterations left out P-steps \d, \d, for which nothing was learned", plain(result.output))
    found = load_learned("scores.safetensors")
    assert isinstance(found, Importance)
    assert all(torch.equal(row, found.scores[0]) for row in found.scores)
    assert float(found.scores[0].std()) > 0
    result = run("router", *SHORT, "--out", "other.safetensors", "--minutes", "0", exit_code=1)
    assert "0 iterations learned nothing, so there is nothing to plan by" in plain(result.output)


def test_pairs_of_a_predictor_come_in_even_numbers(run: Invoke) -> None:
    """An odd run's plan has its P-steps elsewhere."""
    odd = [*SHORT, "--steps", "5", "--data", "photos", "--iterations", "1", "--out", "plan.safetensors"]
    assert "give an even number" in plain(run("predictor", *odd, exit_code=2).output)


@pytest.mark.parametrize("option", ["--out", "--learned", "--json"])
def test_what_cannot_be_written_is_said_before_training(run: Invoke, option: str) -> None:
    """Not after it, when the time is spent."""
    for path, message in (("nowhere/x", "there is no folder nowhere: make it first"), ("photos", "photos is a folder")):
        result = run("router", *SHORT, "--iterations", "1", "--out", "plan.safetensors", option, path, exit_code=2)
        assert message in plain(result.output)
    assert not Path("plan.state.safetensors").exists()


def test_files_that_would_be_written_over_each_other_are_refused(run: Invoke) -> None:
    """Before training: plan, scores, numbers, the training's state, and the model that is read."""
    for files, message in (
        (["--out", "a.safetensors", "--learned", "./a.safetensors"], "a.safetensors is the file of --out too"),
        (["--out", "b.safetensors", "--learned", "b.state.safetensors"], "is the file of the training's state too"),
        (["--out", "a.safetensors", "--json", "a.safetensors"], "is the file of --out too: name another one"),
        (["--out", "tiny.safetensors"], "is the file of --model too"),
    ):
        assert message in plain(run("router", *SHORT, "--iterations", "1", *files, exit_code=2).output)
    twice = ["--model", "tiny.safetensors", "--out", "a.safetensors", "--json", "a.safetensors"]
    assert "is the file of --out too" in plain(run("steps", *twice, exit_code=2).output)
    over = ["--model", "tiny.safetensors", "--out", "tiny.safetensors"]
    assert "is the file of --model too" in plain(run("errors", *over, exit_code=2).output)


def test_help_teaches(run: Invoke) -> None:
    """What is learned, from what, and examples."""
    text = plain(run("--help").output)
    assert "router" in text
    assert "predictor" in text
    for command in ("router", "predictor"):
        text = plain(run(command, "--help").output)
        assert "--recipe" in text
        assert "Examples" in text
        assert "Larger caches more" in text


def test_two_processes_are_one_with_the_same_batch(run: Invoke) -> None:
    """By torchrun, a router on pairs and a predictor on runs from noise; the sums are made in another order.

    A mistake is said once, though both make it.
    """
    shared = [*SHORT, "--groups", "2", "--iterations", "4"]
    trainings = {"router": ["router", *shared, "--data", "photos"], "predictor": ["predictor", *shared]}
    launched = []
    for name, options in trainings.items():
        run(*options, "--out", f"{name}1.safetensors", "--learned", f"{name}1.scores.safetensors")
        launched.append([*options, "--out", f"{name}2.safetensors", "--learned", f"{name}2.scores.safetensors"])
    done = torchrun(*launched, ["router", *shared, "--lr", "0", "--out", "x.safetensors"])
    assert done.returncode == 1, done.stderr
    for name in trainings:
        assert done.stdout.count(f"wrote {name}2.safetensors") == 1, done.stderr
        one, two = (load_learned(f"{name}{count}.scores.safetensors").scores for count in (1, 2))  # type: ignore[union-attr]
        torch.testing.assert_close(two, one, rtol=1e-4, atol=1e-5, equal_nan=True)
    assert plain(done.stderr).count("error: iterations=4, minutes=None, groups=2, lr=0.0") == 1


@pytest.mark.parametrize("form", ["table", "network", "stream"])
def test_a_predictor_becomes_a_plan(run: Invoke, form: str) -> None:
    """Every form; options of the policy are taken, and the schedule of the training is that of the plan."""
    files = ["--out", "plan.safetensors", "--learned", "scores.safetensors"]
    schedule = ["--k1", "1", "--k2", "2", "--boundary", "0.2", "--sites", "block"]
    run("predictor", *SHORT, *files, *schedule, "--form", form, "--iterations", "2", "-o", "keep=0.25")
    plan = tcc.CachePlan.load("plan.safetensors")
    assert str(plan.schedule) == "IPIPPI"
    assert {site.rsplit(".", 1)[0] for site in plan.sites if site.endswith("delta")} == {"blocks.0", "blocks.1"}
    kept = {action.tokens for action in plan.actions.values() if isinstance(action, tcc.Update)}
    assert all(isinstance(name, tcc.TopK) == (form == "stream") for name in kept)
    assert {name.count if isinstance(name, tcc.TopK) else len(plan.tokens[name]) for name in kept} == {4}
    found = load_learned("scores.safetensors")
    assert isinstance(found, Probes if form == "stream" else Importance)
    scores = found.mean if isinstance(found, Probes) else found.scores  # type: ignore[union-attr]
    assert scores.shape == (6, 2, 16)
    assert float((scores[1] - 0.5).abs().max()) > 0
