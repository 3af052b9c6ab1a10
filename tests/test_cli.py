"""The command line, on a tiny model and without compilation."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from typer.testing import CliRunner

from tcc.cli import app
from tcc.cli.compare import Task
from tcc.cli.sample import seeded_noise
from tcc.models import DiT, save_weights
from tcc.plan import CachePlan
from tcc.samplers import sample

Invoke = Callable[..., Any]
TINY_MODULE = """
import torch
from tcc.models import DiT

def make():
    torch.manual_seed(0)
    sizes = dict(input_size=8, patch_size=2, in_channels=1, hidden_size=32, depth=2, num_heads=2, num_classes=3)
    return DiT(**sizes), (torch.zeros(4, 1, 8, 8), torch.zeros(4).long(), torch.zeros(4).long()), {}

def branching():
    class Branches(torch.nn.Module):
        def forward(self, x):
            return x + 1 if x.sum() > 0 else x
    return Branches(), (torch.zeros(2),), {}

def wrong():
    return "a model"

def failing():
    return {}["no such key"]

def loose():
    return make()[0], torch.zeros(4, 1, 8, 8), {}
"""


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Invoke]:
    """Run a command in an empty folder that holds `tiny.py`; returns the result, which must have the exit code."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # tiny tensors: more threads only wait for each other
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setenv("COLUMNS", "200")
    (tmp_path / "tiny.py").write_text(TINY_MODULE)
    (tmp_path / "broken.py").write_text("1 / 0")

    def invoke(*arguments: str, exit_code: int = 0) -> Any:
        result = CliRunner().invoke(app, list(arguments))
        assert result.exit_code == exit_code, f"{result.output}\n{result.exception!r}"
        return result

    yield invoke
    torch.set_num_threads(threads)


@pytest.fixture
def weights(tmp_path: Path) -> str:
    """A weights file of a tiny DiT on 8x8 pixels with three classes and random weights."""
    torch.manual_seed(0)
    model = DiT(input_size=8, patch_size=2, in_channels=1, hidden_size=32, depth=2, num_heads=2, num_classes=3)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    save_weights(model, tmp_path / "tiny.safetensors", torch.float32)
    return str(tmp_path / "tiny.safetensors")


def plain(text: str) -> str:
    """Text without colours and line breaks."""
    return " ".join(re.sub(r"\x1b\[[0-9;]*m", "", text).split())


def written(path: str) -> Any:
    """The content of a JSON file in the current folder."""
    return json.loads(Path(path).read_text())


@pytest.mark.parametrize(
    ("command", "words"),
    [
        (
            (),
            ["token-caching compiler", "Start here", "tcc plan -o keep=0.5 --out plan.safetensors", "demo", "inspect"],
        ),
        (("demo",), ["realised share", "tcc demo --threads 2 --json demo.json", "--rounds"]),
        (("inspect",), ["A site is a value", "tcc inspect DiT-XL/2", "--json"]),
        (("plan",), ["bound", "--policies", "tcc plan -o keep=0.25 -o rotate=true", "--explain", "--png"]),
        (("sample",), ["ankle boot", "--plan", "--classes", "tcc plan --batch 6"]),
    ],
)
def test_help_teaches(run: Invoke, command: tuple[str, ...], words: list[str]) -> None:
    """Every help says what the command is for and shows how it is called."""
    text = plain(run(*command, "--help").output)

    for word in words:
        assert word in text


def test_without_a_command_the_help_is_shown(run: Invoke) -> None:
    """`tcc` alone teaches too."""
    assert "Start here" in run(exit_code=2).output


def test_a_mistyped_command_is_guessed(run: Invoke) -> None:
    """Commands are imported when they are asked for, and known by name before."""
    assert "Did you mean 'export'?" in plain(run("exprot", exit_code=2).output)


def test_version(run: Invoke) -> None:
    """`tcc --version` prints one line."""
    assert run("--version").output.startswith("tcc 0.")


def test_inspect_prints_and_writes_the_sites(run: Invoke) -> None:
    """The table and the JSON name the same sites."""
    result = run("inspect", "--model", "tiny:make", "--json", "sites.json")

    content = written("sites.json")
    assert content["grid"] == [4, 4]
    assert content["tokens"] == 16
    assert content["batch"] == 4
    assert content["sites"][0]["site"].startswith("blocks.0")
    for site in content["sites"]:
        assert site["site"] in result.output


def test_inspect_takes_the_model_as_an_argument(run: Invoke, weights: str) -> None:
    """A weights file or an import path may stand without --model."""
    assert "2 blocks, 16 tokens" in plain(run("inspect", weights).output)
    assert "2 blocks, 16 tokens" in plain(run("inspect", "tiny:make").output)


def test_inspect_of_a_published_size_makes_no_weights(run: Invoke) -> None:
    """DiT-S/8 is captured without memory, and labelled as random."""
    text = plain(run("inspect", "DiT-S/8", "--batch", "1").output)

    assert "DiT-S/8, random weights: 12 blocks, 16 tokens" in text


@pytest.mark.parametrize(
    ("name", "title"),
    [
        ("UViT-S/4", "UViT-S/4, random weights: 13 blocks, 66 tokens (grid 8 x 8 from token 2 on), batch 1"),
        ("MDT-S/8", "MDT-S/8, random weights: 12 blocks, 16 tokens (grid 4 x 4), batch 1"),
    ],
)
def test_inspect_knows_all_families(run: Invoke, name: str, title: str) -> None:
    """By size, as DiT."""
    assert title in " ".join(plain(run("inspect", name, "--batch", "1").output).split())


def test_plan_is_shown_saved_and_drawn(run: Invoke) -> None:
    """Summary, plan file, picture and JSON agree; inspect reads the file."""
    made = run(
        "plan", "--model", "tiny:make", "--policy", "tprr", "--steps", "6", "-o", "k1=1", "-o", "keep=0.25",
        "-o", "attention=cached", "-o", "blocks=1", "-o", "rotate=true",
        "--out", "plan.safetensors", "--png", "plan.png", "--json", "plan.json",
    )  # fmt: skip

    plan, content = CachePlan.load("plan.safetensors"), written("plan.json")
    assert plan.summary() in made.output
    assert content["schedule"] == str(plan.schedule) == "IPIPIP"
    assert content["bound"] == plan.bound > 1
    assert content["policy"]["blocks"] == [1]
    assert Path("plan.png").read_bytes().startswith(b"\x89PNG")
    shown = run("inspect", "plan.safetensors", "--json", "again.json")
    assert shown.output.startswith(plan.summary())
    assert written("again.json")["bound"] == plan.bound


def test_fora_and_full_plans(run: Invoke) -> None:
    """The other policies have their own options."""
    assert (
        "schedule IIPPIPPI"
        in run("plan", "--model", "tiny:make", "-p", "fora", "-o", "interval=3", "--steps", "8").output
    )
    assert "schedule IIII" in run("plan", "--model", "tiny:make", "-p", "full", "--steps", "4").output


def test_sample_through_a_plan(run: Invoke, weights: str) -> None:
    """A plan made for the batch draws a picture."""
    run("plan", "--model", weights, "--batch", "4", "--steps", "5", "-o", "keep=0.5", "--out", "plan.safetensors")
    result = run("sample", "--model", weights, "--plan", "plan.safetensors", "--classes", "0,2", "--backend", "eager")

    assert "2 images in 5 steps" in plain(result.output)
    assert Path("samples.png").read_bytes().startswith(b"\x89PNG")


def test_sample_with_another_solver(run: Invoke, weights: str) -> None:
    """A shifted plan under DPM-Solver-2; a count that the solver has no run of is refused."""
    given = ["--model", weights, "--steps", "4"]
    made = run("plan", *given, "--batch", "2", "-p", "fora", "-o", "interval=2", "--shifted", "--out", "p.safetensors")
    assert "schedule IIPI" in made.output
    options = ["--sampler", "dpm-solver-2", "--backend", "eager"]
    run("sample", "--model", weights, "--plan", "p.safetensors", "--classes", "1", "--out", "out.png", *options)
    assert Path("out.png").read_bytes().startswith(b"\x89PNG")
    result = run("sample", "--model", weights, "--steps", "5", "--classes", "1", *options, exit_code=2)
    assert "two evaluations per step: an even number of them, got 5" in plain(result.stderr)


def test_sample_without_a_plan_and_without_guidance(run: Invoke, weights: str) -> None:
    """No plan: every step computed. Guidance 1: the batch is not doubled."""
    result = run(
        "sample", "--model", weights, "--classes", "0-2", "--steps", "3", "--cfg", "1", "--backend", "eager",
        "--out", "three.png",
    )  # fmt: skip

    assert "3 images in 3 steps" in plain(result.output)
    assert Path("three.png").is_file()


def test_demo_compares_in_the_same_noise(run: Invoke, weights: str) -> None:
    """One row per method; the compiled uncached model draws what the eager one draws; JSON says how it was measured."""
    result = run(
        "demo", "--model", weights, "--steps", "6", "--rounds", "1", "--seconds", "1", "--threads", "1",
        "--backend", "eager", "--json", "demo.json",
    )  # fmt: skip

    content = written("demo.json")
    rows = {row["method"]: row for row in content["rows"]}
    assert rows["uncached, compiled"]["psnr"] is None  # identical
    assert rows["uncached, compiled"]["speedup"] == 1.0
    assert rows["FORA, every 3rd step"]["bound"] == content["plans"]["FORA, every 3rd step"]["bound"]
    for name in ("tokens, keep 1/2", "tokens, keep 1/4"):
        row = rows[name]
        assert row["realised_share"] == pytest.approx(row["speedup"] / row["bound"])
        assert row["slot_bytes"] > 0
        assert 5 < row["psnr"] < 100
    assert {"command", "commit", "date", "machine", "seed"} <= set(content)
    assert Path("demo.png").read_bytes().startswith(b"\x89PNG")
    text = plain(result.output)
    assert "realised share" in text
    assert re.search(rf"\b{content['machine']['threads']} threads?\b", text)
    assert "Same noise, backend eager: nothing is compiled" in text
    assert "(backend eager, not compiled); 1 interleaved rounds" in text


def test_the_demo_draws_what_the_sampler_draws(weights: str) -> None:
    """The stepwise loop that is timed equals `tcc.samplers.sample`, bit by bit."""
    from tcc.models import load_dit

    model = load_dit(weights)
    task = Task(seeded_noise(model, 3, seed=1), torch.arange(3), null_class=3, cfg=1.5)

    *_, images = task.denoise(model, 4)

    expected = sample(model, task.noise, task.labels, num_steps=4, cfg_scale=1.5)
    torch.testing.assert_close(images, expected, rtol=0, atol=0)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("inspect", "nothing"), "unknown model 'nothing': use 'reference', a size such as DiT-S/2"),
        (("inspect", "DiT-S/3"), "unknown DiT size 'DiT-S/3'"),
        (("inspect", "none.safetensors"), "there is no weight file at none.safetensors"),
        (("inspect", "tiny:missing"), "cannot import 'tiny:missing'"),
        (("inspect", "nowhere:make"), "cannot import 'nowhere:make'"),
        (("inspect", "tiny:make()"), "not of the form package.module:callable"),
        (("inspect", "tiny:wrong"), "must return (model, args, kwargs), and returned str"),
        (("inspect", "tiny:torch"), "'tiny:torch' is no function but module"),
        (("inspect", "tiny:failing"), "'tiny:failing' failed: KeyError: 'no such key' (tcc --debug shows where)"),
        (("inspect", "tiny:loose"), "must return args as a tuple and kwargs as a dict, and returned Tensor and dict"),
        (("inspect", "broken:make"), "importing 'broken' failed: ZeroDivisionError: division by zero"),
        (("inspect", "tiny:branching"), "torch.export could not capture Branches"),
        (("plan", "--model", "tiny:make", "-o", "keep=1.5"), "the keep ratio is in (0, 1]"),
        (("plan", "--model", "tiny:make", "-o", "blocks=7"), "there is no block 7; the model has blocks 0..1"),
        (("sample", "--model", "DiT-S/2"), "DiT-S/2 has random weights and would draw noise"),
        (("sample", "--plan", "none.safetensors"), "none.safetensors: there is no such file: make a plan with"),
    ],
)
def test_an_error_is_one_line_and_exit_code_1(run: Invoke, arguments: tuple[str, ...], message: str) -> None:
    """What tcc raises on purpose is shown without a traceback, on stderr."""
    result = run(*arguments, exit_code=1)

    assert plain(result.stderr).startswith("error: ")
    assert message in plain(result.stderr)
    assert "Traceback" not in result.output


def test_a_plan_for_another_run_is_refused(run: Invoke, weights: str) -> None:
    """Another batch or step count: the error says which plan to make."""
    run("plan", "--model", weights, "--batch", "4", "--steps", "5", "--out", "plan.safetensors")
    given = ("sample", "--model", weights, "--plan", "plan.safetensors", "--backend", "eager")

    batch = run(*given, "--classes", "0,1,2", exit_code=1)
    steps = run(*given, "--classes", "0,1", "--steps", "7", exit_code=1)

    assert "the plan is for a batch of 4, and these classes and this guidance make 6 rows" in plain(batch.stderr)
    assert plain(batch.stderr).endswith("tcc plan --batch 6")
    assert "the plan has 5 steps and --steps is 7" in plain(steps.stderr)
    plan = CachePlan.load("plan.safetensors")
    replace(plan, policy={"name": "tokencache"}).save("plan.safetensors")
    learned = run(*given, "--classes", "0,1,2", exit_code=1)
    assert plain(learned.stderr).endswith("tcc plan --batch 6 or tcc train ... --plan-batch 6")


def test_a_plan_for_another_model_is_refused(run: Invoke, weights: str) -> None:
    """The graph hash tells."""
    run("plan", "--model", weights, "--batch", "4", "--steps", "5", "--out", "plan.safetensors")
    other = DiT(input_size=8, patch_size=2, in_channels=1, hidden_size=32, depth=1, num_heads=2, num_classes=3)
    save_weights(other, "other.safetensors")
    given = ("--plan", "plan.safetensors", "--classes", "0,1", "--backend", "eager")

    result = run("sample", "--model", "other.safetensors", *given, exit_code=1)

    assert "the plan is for another model: its graph hash is" in plain(result.stderr)


@pytest.mark.parametrize("option", ["--out", "--png", "--json"])
def test_a_file_in_no_folder_is_a_usage_error(run: Invoke, option: str) -> None:
    """Said before the model is loaded."""
    result = run("plan", "--model", "nothing", option, "no/such/folder/plan", exit_code=2)

    assert "there is no folder no/such/folder: make it first" in plain(result.output)
    assert option in result.output


@pytest.mark.parametrize(
    ("classes", "message"),
    [("0;1", "is not a list of numbers"), ("0,9", "classes 0..2"), ("2-1", "the range 2-1 runs backwards")],
)
def test_bad_classes_are_a_usage_error(run: Invoke, weights: str, classes: str, message: str) -> None:
    """Exit code 2, naming the option."""
    result = run("sample", "--model", weights, "--classes", classes, "--backend", "eager", exit_code=2)

    assert message in plain(result.output)
    assert "--classes" in result.output


def test_a_seed_fits_into_63_bits(run: Invoke) -> None:
    """As torch's generators take it; said before a model is loaded."""
    output = plain(run("sample", "--seed", str(10**20), "--model", "nothing", exit_code=2).output)
    assert "value for '--seed'" in output
    run("sample", "--seed", str(2**63 - 2), "--model", "nothing", exit_code=1)


def test_debug_shows_the_traceback(run: Invoke) -> None:
    """`tcc --debug` lets the error through."""
    result = CliRunner().invoke(app, ["--debug", "inspect", "nothing"])

    assert type(result.exception).__name__ == "ModelError"


PLAN = ["plan", "--model", "tiny:make", "--policy", "fora", "--steps", "4"]


def test_slots_are_narrowed_and_kept_to_a_budget(run: Invoke) -> None:
    """`--slot-dtype` is part of the plan; `--max-slot-bytes` refuses what needs more, in any unit."""
    run(*PLAN, "--out", "wide.safetensors")
    run(*PLAN, "--out", "narrow.safetensors", "--slot-dtype", "bfloat16", "--max-slot-bytes", "16KiB")
    wide, narrow = (CachePlan.load(f"{name}.safetensors") for name in ("wide", "narrow"))
    assert wide.cost is not None
    assert narrow.cost is not None
    assert (wide.cost.slot_bytes, narrow.cost.slot_bytes) == (2**15, 2**14)
    assert (wide.slot_dtype, narrow.slot_dtype) == (None, torch.bfloat16)
    message = plain(run(*PLAN, "--max-slot-bytes", "16384", exit_code=1).output)
    assert "slots take 32 KiB for the captured batch, and max_slot_bytes allows 16 KiB" in message
    assert (
        "slots in bfloat16 (slot_dtype=torch.bfloat16, on the command line --slot-dtype bfloat16) saves 16" in message
    )


def test_a_size_that_is_none_is_refused(run: Invoke) -> None:
    """With the units there are."""
    output = plain(run(*PLAN, "--max-slot-bytes", "20 MB", exit_code=2).output)
    assert "'20 MB' is no size: write bytes, such as 1048576, or 512KiB, 20MiB" in output
    assert "bfloat16" in plain(run(*PLAN, "--slot-dtype", "int8", exit_code=2).output)


def test_sampling_keeps_to_a_budget_and_compiles_regionally(run: Invoke, weights: str) -> None:
    """Both reach the compiler."""
    run(*PLAN, "--model", weights, "--batch", "2", "--out", "plan.safetensors")
    sample_it = ["sample", "--model", weights, "--plan", "plan.safetensors", "--classes", "1", "--backend", "eager"]
    run(*sample_it, "--regional", "--out", "regional.png", "--max-slot-bytes", "16KiB")
    run(*sample_it, "--out", "whole.png")
    assert Path("regional.png").read_bytes() == Path("whole.png").read_bytes()
    assert "max_slot_bytes allows 1 KiB" in plain(run(*sample_it, "--max-slot-bytes", "1KiB", exit_code=1).output)
