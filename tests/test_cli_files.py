"""What commands are to write: refused before any work, where it cannot be written or would destroy something."""

from __future__ import annotations

import contextvars
import json
import os
import re
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from tcc.cli import app
from tcc.errors import PlanError
from tcc.plan import CachePlan, ModelKey


@pytest.fixture(autouse=True)
def _folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """An empty folder, and a wide terminal."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "300")


def refused(*arguments: str) -> str:
    """What a command says that refuses its options; no model is loaded for it."""
    result = CliRunner().invoke(app, [*arguments, *(["BUNDLE"] if arguments[0] == "run" else ["--model", "nothing"])])
    assert result.exit_code == 2, result.output
    return " ".join(re.sub(r"\x1b\[[0-9;]*m|│", "", result.output).split())


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("plan", "--out", "x.bogus"), "x.bogus: this is a .safetensors file: name it x.safetensors"),
        (("plan", "--out", "x"), "x: this is a .safetensors file"),
        (("plan", "--png", "x.bogus"), "x.bogus: no such file is written: use one of .png, .avif, .eps"),
        (("plan", "--png", "x"), "x: no such file is written"),
        (("sample", "--out", "x.safetensors"), "x.safetensors: no such file is written"),
        (("demo", "--out", "x.txt"), "x.txt: no such file is written"),
        (("run", "--out", "x.txt"), "x.txt: no such file is written: use one of .png, .safetensors, "),
    ],
)
def test_files_are_named_as_what_can_be_written(arguments: tuple[str, ...], message: str) -> None:
    """Pictures by what matplotlib writes, plans as plans."""
    assert message in refused(*arguments)


@pytest.mark.parametrize(
    "arguments", [("plan", "--out"), ("plan", "--png"), ("plan", "--json"), ("sample", "--out"), ("run", "--out")]
)
def test_nothing_but_a_file_is_overwritten(arguments: tuple[str, ...]) -> None:
    """A writer that replaces what is there would put a file in the place of a pipe."""
    name = "pipe.safetensors" if arguments[0] == "run" or arguments == ("plan", "--out") else "pipe.png"
    os.mkfifo(name)
    assert f"{name} is a device or a pipe: name a file" in refused(*arguments, name)
    assert Path(name).is_fifo()


@pytest.mark.parametrize("what", ["the folder", "the file"])
def test_what_cannot_be_written_is_refused(what: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A folder of others, and a file that is read-only. Patched: to the superuser everything is allowed."""
    path, asked = tmp_path / "plan.safetensors", os.access
    path.touch()
    closed = tmp_path if what == "the folder" else path

    def access(at: Any, mode: int) -> bool:
        return asked(at, mode) and not (Path(at) == closed and mode & os.W_OK)

    monkeypatch.setattr(os, "access", access)
    assert "plan.safetensors cannot be written" in refused("plan", "--out", "plan.safetensors")


@pytest.mark.parametrize(
    ("arguments", "first"),
    [
        (("plan", "--out", "x.safetensors", "--json", "../{}/x.safetensors"), "--out"),
        (("plan", "--png", "x.png", "--json", "x.png"), "--png"),
        (("demo", "--out", "x.png", "--json", "x.png"), "--out"),
        (("bench", "--png", "x.png", "--json", "x.png"), "--png"),
    ],
)
def test_no_file_is_written_twice(arguments: tuple[str, ...], first: str, tmp_path: Path) -> None:
    """However the paths are spelled."""
    said = refused(*(text.format(tmp_path.name) for text in arguments))
    assert f"is the file of {first} too: name another one" in said
    assert f"Invalid value for {arguments[-2]}" in said


def test_numbers_can_be_piped(capsys: pytest.CaptureFixture[str]) -> None:
    """`--json -` is stdout, and nothing else is written there."""
    arguments = ["plan", "-p", "fora", "--steps", "2", "--json", "-"]
    contextvars.copy_context().run(app, arguments, standalone_mode=False)  # what the command sets ends with it
    shown = capsys.readouterr()
    assert json.loads(shown.out)["num_steps"] == 2
    assert "fora" in shown.err
    assert not Path("-").exists()


def test_a_plan_for_another_model_is_not_blamed_on_its_batch() -> None:
    """A plan with another batch could be made; no batch helps a plan for other inputs."""
    key = ModelKey("0" * 64, (("x", (4, 1, 16, 16)), ("sigma", (4,))), 16)
    CachePlan(2, {}, model=key).save("other.safetensors")
    result = CliRunner().invoke(app, ["sample", "--plan", "other.safetensors", "--backend", "eager"])
    assert isinstance(result.exception, PlanError) or "is for another model" in result.output
    assert "for another model, with the inputs x [4, 1, 16, 16], sigma [4]" in f"{result.exception} {result.output}"


def test_the_size_of_the_reference_model_is_not_chosen() -> None:
    """Also where no model is named."""
    result = CliRunner().invoke(app, ["inspect", "--input-size", "16"])
    assert result.exit_code == 2
    assert "reference is for one size of its input" in " ".join(result.output.replace("│", " ").split())


def test_a_plan_is_for_inputs_of_its_own(tmp_path: Path) -> None:
    """What is asked for and cannot be is refused, not skipped."""
    path = tmp_path / "plan.safetensors"
    CachePlan(2, {}).save(path)
    for option in ("--batch", "--input-size"):
        result = CliRunner().invoke(app, ["inspect", str(path), option, "4"])
        assert result.exit_code == 2
        said = " ".join(result.output.replace("│", " ").split())
        assert option in said
        assert ("is for inputs of its own" if option == "--batch" else "is for one size of its input") in said
    assert CliRunner().invoke(app, ["inspect", str(path)]).exit_code == 0


@pytest.mark.parametrize("command", [("sample",), ("bench",), ("demo",), ("run", "."), ("train", "router")])
def test_a_guidance_scale_is_a_finite_number(command: tuple[str, ...]) -> None:
    """Bounds let it through, and images would be NaN."""
    result = CliRunner().invoke(app, [*command, "--cfg", "inf"])
    assert result.exit_code == 2
    assert "inf is no finite number" in " ".join(result.output.replace("│", " ").split())
    assert CliRunner().invoke(app, [*command, "--cfg", "nan"]).exit_code == 2
