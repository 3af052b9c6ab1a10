"""`tcc bench` on tiny models, not compiled; its rows as table, JSON and plot."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from typer.testing import CliRunner

from tcc.cli import app
from tcc.cli.calls import Calls
from tcc.cli.harness import COMPILED, ISOLATED, TCC, Harness, known_options, with_compilation
from tcc.cli.lines import UNCACHED, Line, _own_part, failures, front, markdown, plot, table
from tcc.models import DiT, save_weights
from tcc.timing import Compilation
from tests.tiny_models import case, fill

Invoke = Callable[..., Any]
OWN_MODULE = """
import torch
from tests.tiny_models import case

class Own(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.inner = case("dit").model
    def forward(self, hidden, *, timestep, return_dict=True):
        return {"sample": self.inner(hidden, timestep, torch.zeros_like(timestep))}

def make():
    x = case("dit").args[0]
    return Own(), (x,), {"timestep": torch.full((len(x),), 900)}
"""


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Invoke]:
    """Run `tcc bench` in an empty folder, on one thread and without a compiler; the result has the exit code."""
    threads = torch.get_num_threads()
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    (tmp_path / "own_model.py").write_text(OWN_MODULE)
    sizes = {"input_size": 8, "patch_size": 2, "in_channels": 1, "hidden_size": 32, "depth": 2, "num_heads": 2}
    save_weights(fill(DiT(**sizes, num_classes=3)), tmp_path / "tiny.safetensors", torch.float32)  # type: ignore[arg-type]

    def invoke(*arguments: str, exit_code: int = 0) -> Any:
        options = ["--backend", "eager", "--rounds", "1", "--threads", "1"]
        result = CliRunner().invoke(app, ["bench", *arguments, *options])
        assert result.exit_code == exit_code, f"{result.output}\n{result.exception!r}"
        return result

    yield invoke
    torch.set_num_threads(threads)


def plain(text: str) -> str:
    """Text without colours and line breaks."""
    return " ".join(re.sub(r"\x1b\[[0-9;]*m", "", text).split())


def test_plans_and_policies_beside_the_uncached_model(run: Invoke) -> None:
    """A plan file and two policies; the JSON has what the table shows and says how it was measured."""
    given = ["--model", "tiny.safetensors", "--batch", "4"]
    plan = CliRunner().invoke(
        app, ["plan", *given, "--steps", "5", "-p", "fora", "-o", "interval=2", "--out", "f.safetensors"]
    )
    assert plan.exit_code == 0, plan.output
    asked = ("f.safetensors", "full", "tprr keep=0.5 blocks=0-1", "--fold-timesteps")
    found = run(*asked, *given, "--json", "b.json", "--png", "b.png")

    content = json.loads(Path("b.json").read_text())
    rows = {(row["method"], row["mode"]): row for row in content["rows"]}
    baseline, planned = rows["uncached", "torch.compile"], rows["f", "tcc"]
    assert baseline["speedup"] == rows["uncached", "eager"]["bound"] == 1
    assert planned["steps"] == content["steps"] == 5
    assert planned["bound"] == content["plans"]["f"]["bound"] == pytest.approx(baseline["macs"] / planned["macs"])
    assert planned["speedup"] == pytest.approx(baseline["seconds"] / planned["seconds"])
    assert planned["realised_share"] == pytest.approx(planned["speedup"] / planned["bound"])
    assert planned["cache_bytes"] == content["plans"]["f"]["slot_bytes"] > 0
    assert planned["peak_bytes"] >= rows["uncached", "tcc"]["peak_bytes"] + planned["cache_bytes"]
    assert rows["full", "tcc"]["identical"]
    assert rows["full", "tcc"]["error"] == 0
    assert 0 < planned["error"] < 1
    assert 5 < planned["psnr"] < 100
    folded = rows["f, timesteps known", "tcc"]  # the same images, and more is kept; the bound does not change
    assert folded["psnr"] == pytest.approx(planned["psnr"], rel=1e-4)
    assert (folded["bound"], folded["macs"]) == (planned["bound"], planned["macs"])
    assert folded["cache_bytes"] > planned["cache_bytes"]
    assert planned["graph_breaks"] == planned["recompiles"] == baseline["graph_breaks"] == 0
    assert {method for method, mode in rows if mode == "tcc"} > {"3 steps", "4 steps", "tprr keep=0.5 blocks=0-1"}
    assert {"command", "commit", "date", "machine", "seed", "backend", "dtype"} <= set(content)
    assert Path("b.png").read_bytes().startswith(b"\x89PNG")
    assert "realised" in plain(found.output)
    assert "backend eager" in plain(found.output)


def test_a_model_of_ones_own_is_called_as_its_function_says(run: Invoke) -> None:
    """It draws no images, so there is no PSNR; that steps differ shows in the errors of reuse."""
    given = ("--model", "own_model:make", "--steps", "4", "--no-fewer", "--fold-timesteps", "--json", "b.json")
    run("full", "fora interval=2", *given)

    rows = {(row["method"], row["mode"]): row for row in json.loads(Path("b.json").read_text())["rows"]}
    assert {row["psnr"] for row in rows.values()} == {None}
    assert rows["full", "tcc"]["error"] == rows["uncached", "tcc"]["error"] == 0
    assert 1e-6 < rows["fora interval=2", "tcc"]["error"] < 1
    folded, planned = (rows[f"fora interval=2{known}", "tcc"]["error"] for known in (", timesteps known", ""))
    assert folded == pytest.approx(planned, rel=1e-4)


def test_a_plan_whose_timesteps_are_not_known_has_a_row_with_the_reason() -> None:
    """The rows of its samples have noise levels of their own, or the model shows none."""
    for name, levels in ("dit", torch.tensor([900, 899])), ("separate", None):
        which = case(name)
        args = which.args if levels is None else (which.args[0], levels, *which.args[2:])
        calls = Calls(which.info.captured, args, which.kwargs, seed=0)
        harness = Harness(which.model, calls, which.info, steps=2, backend="eager")
        harness.add_folded("full", "full", harness.full)
        (line,) = harness.failed
        assert line.method == "full, timesteps known"
        assert line.reason == "the calls have no noise level that is one number at every step"
        assert not harness.entries


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("fora interval=2", "--model", "nothing"), "unknown model 'nothing'"),
        (("fora 'x",), "fora 'x: no closing quotation: a policy is written as 'NAME OPTION=VALUE ...'"),
        (("foro",), "unknown policy 'foro': did you mean fora?"),
        (("fora intervals=2",), "policy fora has no option 'intervals'; its options are"),
        (("none.safetensors",), "none.safetensors: there is no such file: make a plan"),
        (("fora interval=2", "--batch", "3"), "a batch of 3: guidance takes two rows for an image"),
        (("fora interval=2", "--device", "foo"), "--device foo: torch knows no such device: give cpu, cuda or cuda:1"),
        (("fora interval=2", "--device", "cuda:99"), "CUDA devices here: give cpu"),
    ],
)
def test_what_cannot_be_measured_is_one_line(run: Invoke, arguments: tuple[str, ...], message: str) -> None:
    """What is missing, and what there is."""
    result = run(*(arguments if "--model" in arguments else (*arguments, "--model", "tiny.safetensors")), exit_code=1)

    assert plain(result.stderr).startswith("error: ")
    assert message in plain(result.stderr)


def test_no_seconds_are_too_few(run: Invoke) -> None:
    """A negative limit is a slip."""
    assert "greater than or equal to 0" in plain(run("full", "--seconds", "-1", exit_code=2).stderr)


def test_plans_of_other_steps_or_batches_are_refused(run: Invoke) -> None:
    """The error says what to give."""
    given = ["--model", "tiny.safetensors", "--batch", "4"]
    CliRunner().invoke(app, ["plan", *given, "--steps", "5", "--out", "p.safetensors"])

    steps = run("p.safetensors", *given, "--steps", "7", exit_code=1)
    batch = run("p.safetensors", *given[:2], "--batch", "6", exit_code=1)

    assert "p: the plan has 5 steps, and 7 are measured: give --steps 5" in plain(steps.stderr)
    assert "the plan is for another batch size" in plain(batch.stderr)


def test_plans_of_one_file_name_are_told_apart(run: Invoke) -> None:
    """By their paths; what is asked for twice is measured once, and a plan is not taken for the uncached model."""
    given = ["--model", "tiny.safetensors", "--batch", "4"]
    policies = {"a/p": ["fora", "-o", "interval=2"], "b/p": ["fora", "-o", "interval=4"], "b/uncached": ["full"]}
    for name, policy in policies.items():
        Path(name).parent.mkdir(exist_ok=True)
        options = ["--policy", *policy, "--steps", "4", "--out", f"{name}.safetensors"]
        assert CliRunner().invoke(app, ["plan", *given, *options]).exit_code == 0
    names = [f"{name}.safetensors" for name in policies]

    run(*names, names[0], *given, "--no-fewer", "--json", "bench.json")

    found = json.loads(Path("bench.json").read_text())
    rows = [row for row in found["rows"] if row["method"] != UNCACHED]
    assert [row["method"] for row in rows] == list(found["plans"]) == names
    assert len({row["bound"] for row in rows}) == 3
    assert found["batch"] == 4


class Shifted(torch.nn.Module):
    """One code for all instances, compiled for each."""

    def __init__(self, shift: int) -> None:
        super().__init__()
        self.shift = shift

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Add it."""
        return x + self.shift


def test_rows_that_torch_cannot_isolate_are_all_compiled(monkeypatch: pytest.MonkeyPatch) -> None:
    """As in torch 2.11: no row falls back to eager after eight, and recompiles, which are of all, are not told."""
    count, compile_one, line = [], torch.compile, Line(method="m", family="F", package="p", mode=COMPILED, steps=1)
    done = Compilation(1.0, 0, 3)

    def of_2_13(model: Any, *, backend: Any, isolate_recompiles: bool, recompile_limit: int) -> Any:
        raise NotImplementedError

    def of_2_11(model: Any, *, backend: Any) -> Any:
        return compile_one(model, backend=backend)

    def backend(gm: Any, inputs: Any) -> Any:
        count.append(gm)
        return gm.forward

    monkeypatch.setattr(torch, "compile", of_2_13)
    assert known_options(ISOLATED) == ISOLATED
    assert with_compilation(line, done).recompiles == 3
    monkeypatch.setattr(torch, "compile", of_2_11)
    with torch._dynamo.config.patch(recompile_limit=8, accumulated_recompile_limit=256):
        assert known_options(ISOLATED) == {}
        for shift in range(10):
            model = torch.compile(Shifted(shift), backend=backend)
            assert torch.equal(model(torch.zeros(2)), torch.full((2,), float(shift)))
    assert len(count) == 10
    assert with_compilation(line, done).recompiles is None
    assert with_compilation(replace(line, mode=TCC), done).recompiles == 3


def test_a_row_without_numbers_is_shown_with_its_reason() -> None:
    """In the table it is empty; below, its reason stands once for all rows that share it."""
    common: dict[str, Any] = {"family": "F", "package": "p", "steps": 4}
    lines = [
        Line(method="fine", mode="eager", **common, speedup=1.5, bound=2.0, psnr=math.inf),
        Line(method="[broken]", mode="eager", **common, reason="RuntimeError: no"),
        Line(method="[broken]", mode="torch.compile", **common, reason="RuntimeError: no"),
    ]
    cells = {str(column.header): list(column.cells) for column in table(lines, "title").columns}
    assert list(cells) == [
        "method",
        "mode",
        "steps",
        "speedup",
        "bound",
        "realised\nshare",
        "PSNR\ndB",
    ]  # what is known
    assert cells["speedup"] == ["1.50x", "", ""]
    assert cells["realised\nshare"] == ["0.75", "", ""]
    assert cells["PSNR\ndB"] == ["identical", "", ""]
    assert failures(lines) == "not measured: [broken] (eager), [broken] (torch.compile): RuntimeError: no"
    assert markdown(lines).count("\n| ") == 2
    for line in lines:
        written = json.loads(json.dumps(line.as_dict(), allow_nan=False))
        assert Line.of_dict(written) == line


def test_the_front_has_what_nothing_beats(tmp_path: Path) -> None:
    """Slower and worse is off it, faster or better is on it; the same without images, by the error."""
    points = {"slow, good": (1.0, 40.0), "fast, bad": (3.0, 20.0), "beaten": (2.0, 19.0), "between": (2.0, 30.0)}
    common: dict[str, Any] = {"family": "F", "package": "p", "mode": "tcc", "steps": 4}
    images = [Line(method=name, **common, speedup=x, psnr=dB) for name, (x, dB) in points.items()]
    others = [Line(method=name, **common, speedup=x, error=10 ** (-dB / 20)) for name, (x, dB) in points.items()]
    for lines in (images, others):
        assert [line.method for line in front(lines)] == ["slow, good", "between", "fast, bad"]
        plot(lines, "title", tmp_path / "front.png")
        assert (tmp_path / "front.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize(
    ("method", "family", "text"),
    [
        ("FORA N=2", "tcc: FORA", "N=2"),
        ("14 steps", "fewer steps", "14"),
        ("forecast 34%, steps searched", "tcc: forecast, steps searched", "34%"),
        ("MagCache 0.24 K=5, diffusers' steps", "tcc: MagCache", "0.24 K=5"),
        ("DBCache F1B0 0.24, cache-dit's steps", "tcc: DBCache", "F1B0 0.24"),
        ("PyramidAttentionBroadcast N=4, cross 6", "PyramidAttentionBroadcast", "N=4, cross 6"),
    ],
)
def test_points_are_labelled_with_what_the_legend_leaves_out(method: str, family: str, text: str) -> None:
    """The settings alone."""
    assert _own_part(Line(method=method, family=family, package="p", mode=COMPILED, steps=1)) == text
