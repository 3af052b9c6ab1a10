"""The scripts that measure scaling and GPUs, on tiny models and not compiled; the head of results."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import tarfile
import time
import venv
from importlib.util import find_spec
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
import typer

from tcc.cli import app
from tests.scripts import BENCHMARKS, modules_of

SCRIPTS = (
    "provenance", "step_speed", "quality_store", "quality_rows", "peers_models", "peers_methods", "peers_plans",
    "peers_probe", "peers", "scaling", "run_gpu", "whole_run",
)  # fmt: skip
needs_diffusers = pytest.mark.skipif(find_spec("diffusers") is None, reason="needs diffusers")


scripts = modules_of(*SCRIPTS)


def test_folders_of_results_are_there_before_the_work(scripts: dict[str, ModuleType], tmp_path: Path) -> None:
    """And not missing after it."""
    assert scripts["provenance"].results_folder(str(tmp_path / "a" / "b")).is_dir()


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_every_part_is_called_as_its_command_line_is(scripts: dict[str, ModuleType], device: str) -> None:
    """Options that a script does not have would be noticed on the GPU machine only."""
    bench: Any = typer.main.get_command(app).commands["bench"]  # type: ignore[attr-defined]
    parts = scripts["run_gpu"].parts(device)
    assert sum(part.seconds for part in parts) <= scripts["run_gpu"].LIMIT < 8 * 60
    for part in parts:
        words = [word.replace("{out}", "/tmp") for word in part.command]
        assert words[0] == sys.executable
        if words[1:5] == ["-P", "-m", "tcc", "bench"]:
            asked = bench.make_context("bench", words[5:]).params
        elif (name := Path(words[1]).stem) in ("peers", "scaling", "whole_run"):
            asked = vars(scripts[name].parse(words[2:]))
        else:
            assert words[1:4] == ["-P", "-m", "pytest"]
            assert any(word.endswith("test_cuda_graphs.py") for word in words)
            continue
        assert asked["device"] == device


def test_no_file_with_tests_for_a_gpu_is_left_out(scripts: dict[str, ModuleType]) -> None:
    """They are named, in an order of their own."""
    folder = Path(__file__).parent
    marked = {
        str(path.relative_to(folder)) for path in folder.rglob("test_*.py") if "pytest.mark.gpu\n" in path.read_text()
    }
    assert set(scripts["run_gpu"].TESTS) == marked


def test_parts_that_fail_or_take_too_long_say_so(scripts: dict[str, ModuleType], tmp_path: Path) -> None:
    """The others run; tables are of what was measured."""
    gpu = scripts["run_gpu"]

    def left_out(code: str, seconds: float = 60, needs: tuple[str, ...] = ()) -> Any:
        part = gpu.Part("part", "title", (sys.executable, "-c", code), 60, needs)
        gpu.clear(tmp_path, ["part"])
        (tmp_path / "gpu.json").touch()
        return gpu.run(part, tmp_path, seconds)["left out"]

    assert left_out("print('fine')") is None
    assert (tmp_path / "part" / "log.txt").read_text() == "fine\n"
    assert left_out("raise SystemExit('no memory')") == "exit code 1: no memory"
    child = (
        "import subprocess as s, sys; s.Popen([sys.executable, '-c', 'import time; print(1); time.sleep(60)']).wait()"
    )
    began = time.monotonic()
    assert left_out(f"print('test_a', flush=True); {child}", 1.5).startswith("stopped after ")
    assert time.monotonic() - began < 30
    assert (tmp_path / "part" / "log.txt").read_text().startswith("test_a\n")
    assert left_out("", needs=("no_such_package",)) == "no_such_package is not installed"
    gpu.pack(tmp_path, ["part", "other"])
    with tarfile.open(tmp_path / "gpu.tar.gz") as archive:
        assert archive.getnames() == ["gpu/gpu.json"]


def test_tables_are_of_this_run_alone(scripts: dict[str, ModuleType], tmp_path: Path) -> None:
    """What an earlier run measured is removed, and a folder of something else is not touched."""
    gpu = scripts["run_gpu"]
    line = gpu.Line(method="fora", family="f", package="tcc", mode="tcc", steps=4, speedup=1.5, bound=2.0)
    for name, row in (("xl", line.as_dict()), ("whole", {"plan": "full", "by steps": 0.51239})):
        (tmp_path / name).mkdir()
        (tmp_path / name / f"{name}.json").write_text(json.dumps({"rows": [row]}))
    entry = {"seconds": 3.0, "left out": None, "said": "the last line"}
    parts = [{"name": name, "title": name, **entry} for name in ("xl", "whole")]
    left = ["DBCache: cache_dit is not installed"]
    record = {"accelerator": "a GPU", "torch": "2", "commit": "abc", "left out": left, "parts": parts}
    text = gpu.summary(tmp_path, record)
    assert "- left out: DBCache: cache_dit is not installed" in text
    assert "| fora | tcc | 4 | 1.50x | 2.00x | 0.75 |" in text
    assert "| plan | by steps |\n| --- | --- |\n| full | 0.5124 |" in text
    with pytest.raises(SystemExit, match="holds something else than results of this script: name another folder"):
        gpu.clear(tmp_path, ["xl"])
    assert (tmp_path / "xl").is_dir()
    (tmp_path / "gpu.json").touch()
    gpu.clear(tmp_path, ["xl", "never ran"])
    text = gpu.summary(tmp_path, record)
    assert "fora" not in text
    assert "| full |" in text
    assert text.count("`the last line`") == 1


def test_the_script_runs_in_a_bare_checkout(tmp_path: Path) -> None:
    """With a Python that has what tcc needs, and not tcc: neither installed, nor by a path file."""
    root = BENCHMARKS.parent
    for folder in ("tcc", "passes", "export", "benchmarks"):
        shutil.copytree(root / folder, tmp_path / folder, ignore=shutil.ignore_patterns("__pycache__", "results"))
    venv.create(tmp_path / "bare", symlinks=True)
    packages = os.pathsep.join(path for path in sys.path if path.endswith("-packages"))
    given = {"DEVICE": "cpu", "PYTHON": str(tmp_path / "bare" / "bin" / "python"), "PYTHONPATH": packages}
    subprocess.run(
        ["bash", str(tmp_path / "benchmarks" / "run_gpu.sh"), str(tmp_path / "out"), "--only", "xl-one"],
        env={**os.environ, **given, "OMP_NUM_THREADS": "1", "TCC_COMMIT": "abc1234"},
        check=True,
    )
    record = json.loads((tmp_path / "out" / "gpu.json").read_text())
    assert record["commit"] == "abc1234"
    assert [(part["name"], part["left out"]) for part in record["parts"]] == [("xl-one", None)]
    assert "| fora interval=2 | tcc |" in (tmp_path / "out" / "gpu.md").read_text()
    with tarfile.open(tmp_path / "out" / "gpu.tar.gz") as archive:
        assert {"gpu/gpu.json", "gpu/gpu.md", "gpu/xl-one/xl-one.json", "gpu/xl-one/log.txt"} <= set(archive.getnames())


def test_time_and_memory_of_growing_models(scripts: dict[str, ModuleType], tmp_path: Path) -> None:
    """A row for every value of every factor; slots grow with tokens, and are a part of a run's peak."""
    scaling = scripts["scaling"]
    small = ["--tokens", "16", "64", "--batch", "1", "--blocks", "4", "--steps", "2", "6", "--variants", "2", "3"]
    options = ["--models", "dit", "--width", "32", "--rounds", "1", "--backend", "eager", "--threads", "1"]
    threads = torch.get_num_threads()
    assert scaling.main(["running", *small, *options, "--results", str(tmp_path)]) == 0
    torch.set_num_threads(threads)
    content = json.loads((tmp_path / "scaling-running.json").read_text())
    rows: dict[str, list[Any]] = {}
    for row in content["rows"]:
        rows.setdefault(row["by"], []).append(row)
    assert [(by, len(found)) for by, found in rows.items()] == [
        ("tokens", 2), ("batch", 1), ("blocks", 1), ("steps", 2), ("variants", 2),
    ]  # fmt: skip
    small_row, large = rows["tokens"]
    assert large["slot bytes"] == 4 * small_row["slot bytes"] > 0
    assert all(row["run peak"] >= row["full peak"] + row["slot bytes"] for row in rows["tokens"])
    assert all(1.0 <= row["peak ratio"] <= 1.05 for row in rows["tokens"])
    assert [row["variants"] for row in rows["variants"]] == [2, 3]
    assert all(row["run peak"] > row["slot bytes"] > 0 for row in (*rows["steps"], *rows["variants"]))
    assert [row["variants"] for row in rows["steps"]] == [2, 2]
    assert {"command", "commit", "processor", "torch"} <= set(content)
    assert (tmp_path / "scaling-running.png").read_bytes().startswith(b"\x89PNG")


@needs_diffusers
def test_planning_rows_and_the_model_of_two_streams(scripts: dict[str, ModuleType], tmp_path: Path) -> None:
    """All its streams are seen; a third of its blocks has two; the picture is drawn from the rows."""
    scaling = scripts["scaling"]
    model, args, kwargs = scaling.two_streams(3, side=4)
    info = scaling.tcc.inspect(model, *args, **kwargs)
    assert len(info.blocks) == 3
    assert info.num_tokens == 16
    before = {"capture": 1.0, "analyse": 1.0}
    rows = [
        scaling.planned("two streams", info, before, policy, steps, variants)
        for policy, steps, variants in (("reuse", 4, 2), ("tokens", 4, 2), ("routers", 6, 3))
    ]
    assert [row["variants"] for row in rows] == [2, 2, 3]
    assert all(row["plan + program"] == row["plan"] + row["program"] > 0 for row in rows)
    scaling.plot_planning(rows, tmp_path / "p.png")
    assert (tmp_path / "p.png").read_bytes().startswith(b"\x89PNG")


def test_results_say_where_they_come_from(
    scripts: dict[str, ModuleType], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Command, commit and machine, and no path of the machine; without git, the commit that the caller names."""
    module = scripts["provenance"]
    monkeypatch.setattr(sys, "argv", ["/somewhere/benchmarks/peers.py", "--results", "/somewhere/else/results"])
    head = module.provenance()
    assert head["command"] == "python benchmarks/peers.py --results results"
    assert {"commit", "processor", "threads", "accelerator", "torch", "python"} <= set(head)
    monkeypatch.setenv("PATH", str(tmp_path))  # where there is no git
    monkeypatch.setenv("TCC_COMMIT", "abc1234")
    assert module.commit() == "abc1234"
