"""The options of policies on the command line: how they are read, refused, listed and explained."""

from __future__ import annotations

import os
import re
from collections.abc import Sequence
from typing import Any, Literal

import pytest
import torch
from typer.testing import CliRunner

from tcc.cli import app
from tcc.cli.policies import options_of
from tcc.learned import Router
from tcc.plan import CachePlan
from tcc.plans import POLICIES


def run(*arguments: str, exit_code: int = 0) -> Any:
    """Run `tcc plan` on a wide terminal; the result must have the exit code."""
    result = CliRunner().invoke(app, ["plan", *arguments], env={"COLUMNS": "200"})
    assert result.exit_code == exit_code, f"{result.output}\n{result.exception!r}"
    return result


def plain(text: str) -> str:
    """Text without colours and line breaks."""
    return " ".join(re.sub(r"\x1b\[[0-9;]*m", "", text).split())


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("-p", "full", "-o", "keep=1"), "policy full has no option 'keep'; it has none"),
        (("-p", "fora", "-o", "k1=1"), "policy fora has no option 'k1'; its options are interval, sites"),
        (("-o", "interval"), "'interval' is not of the form name=value; its options are k1, k2, boundary"),
        (("-o", "k1=1.5"), "option k1=1.5: give a whole number"),
        (("-o", "keep=half"), "option keep=half: give a number"),
        (("-o", "rotate=maybe"), "option rotate=maybe: give true or false"),
        (("-o", "level=layer"), "option level=layer: give block or branch or out"),
        (("-o", "blocks=a-b"), "option blocks=a-b: give numbers such as 0-3,7 or none"),
        (("-o", "blocks=5-2"), "option blocks=5-2: the range 5-2 runs backwards: write 2-5"),
        (("-p", "forecast", "-o", "i_steps=0,3-2"), "option i_steps=0,3-2: the range 3-2 runs backwards"),
        (("-p", "l2c"), "policy l2c needs -o router=VALUE: a name or file"),
        (("-p", "flora"), "unknown policy 'flora': did you mean fora? Policies are full, fora"),
    ],
)
def test_bad_options_of_a_policy_are_one_line(arguments: tuple[str, ...], message: str) -> None:
    """It says what would be valid; no model is loaded for it."""
    result = run("--model", "nothing", *arguments, exit_code=1)

    assert plain(result.stderr).startswith(f"error: {message}")


def test_policies_are_listed() -> None:
    """Every one, with the first line of its docstring."""
    listed = plain(run("--policies").output)

    for name, policy in POLICIES.items():
        assert f"{name} {plain(str(policy.__doc__)[:60])}" in listed


@pytest.mark.parametrize("name", POLICIES)
def test_every_policy_explains_its_options(name: str) -> None:
    """Docstring, and for every option what it may be, its default and what it does: nothing is left out."""
    explained = plain(run("--policy", name, "--explain").output)

    assert explained.startswith(f"{name}: {plain(str(POLICIES[name].__doc__)[:60])}")
    for option in options_of(POLICIES[name]).values():
        assert option.types, f"{option.name} cannot be given as text"
        assert option.help
        assert f"{option.name} {option.forms[:8]}" in explained


def test_token_plans_say_where_their_defaults_come_from() -> None:
    """On the command line too."""
    for name in ("tokencache", "tprr"):
        assert "benchmarks/results/ablation.md" in plain(run("--policy", name, "--explain").output)


def documented(
    info: object,
    *,
    num_steps: int,
    count: int = 3,
    share: float = 0.5,
    which: Literal["first", "last"] = "first",
    blocks: Sequence[int] | None = None,
    weights: Sequence[float] | torch.Tensor | None = None,
    flag: bool = False,
    source: Router | str | os.PathLike[str] | None = None,
) -> CachePlan:
    """A policy with an option of every type.

    Args:
        info: the model.
        num_steps: denoising steps.
        count: how many, on
            two lines.
        share: a share.
        which: a choice.
        blocks: whole numbers.
        weights: numbers.
        flag: yes or no.
        source: an object or its file.
    """
    raise NotImplementedError


@pytest.mark.parametrize(
    ("option", "text", "value"),
    [
        ("count", "4", 4),
        ("share", "4", 4.0),
        ("share", "1e-3", 1e-3),
        ("which", "last", "last"),
        ("blocks", "0-2,5", [0, 1, 2, 5]),
        ("blocks", "none", None),
        ("weights", "0.5,1", [0.5, 1.0]),
        ("flag", "true", True),
        ("flag", "No", False),
        ("source", "router.pt", "router.pt"),
        ("source", "none", None),
    ],
)
def test_option_values_are_read_by_their_annotation(option: str, text: str, value: Any) -> None:
    """Whole numbers, numbers, choices, lists, truth values, files; objects that have no text are left out."""
    read = options_of(documented)[option].parse(text)

    assert read == value
    assert type(read) is type(value)


def test_the_meaning_of_an_option_is_its_docstring() -> None:
    """On one line, however many it takes there."""
    assert options_of(documented)["count"].help == "how many, on two lines."
    assert options_of(documented)["count"].default_text == "3"


@pytest.mark.parametrize("name", POLICIES)
def test_every_policy_names_its_source(name: str) -> None:
    """A paper by its number, or that there is none; above the options, where `--explain` begins."""
    text = str(POLICIES[name].__doc__).partition("Args:")[0]
    assert re.search(r"arXiv \d{4}\.\d{5}\b|\bOf no paper\b", text), name


@pytest.mark.parametrize(
    ("name", "option", "message"),
    [
        ("mine:f", "--batch", "mine:f returns the inputs of its own call: choose them there"),
        ("mine:f", "--input-size", "mine:f returns the inputs of its own call: choose them there"),
        ("reference", "--input-size", "reference is for one size of its input: leave this out"),
        ("tiny.safetensors", "--input-size", "tiny.safetensors is for one size of its input"),
    ],
)
@pytest.mark.parametrize("command", ["plan", "bench", "inspect"])
def test_sizes_are_asked_for_where_tcc_makes_the_inputs(command: str, name: str, option: str, message: str) -> None:
    """An explicit value that would do nothing is refused, before or after the name of the model; a default is not."""
    for given in (("--model", name, option, "4"), (option, "4", "-m", name)):
        result = CliRunner().invoke(app, [command, *given], env={"COLUMNS": "200"})
        assert result.exit_code == 2, result.output
        assert message in plain(result.output.replace("│", ""))
        assert option in plain(result.output)


def test_inspect_looks_at_one_thing() -> None:
    """One of two would not be shown."""
    result = CliRunner().invoke(app, ["inspect", "--model", "DiT-S/2", "UViT-S/2"], env={"COLUMNS": "200"})
    assert result.exit_code == 2
    assert "give one thing to look at, UViT-S/2 or --model DiT-S/2" in plain(result.output.replace("│", ""))


def test_inspect_knows_the_model_by_its_argument() -> None:
    """Wherever it stands."""
    result = CliRunner().invoke(app, ["inspect", "--batch", "3", "mine:f"], env={"COLUMNS": "200"})
    assert result.exit_code == 2
    assert "mine:f returns the inputs of its own call" in plain(result.output.replace("│", ""))
