"""The Python in the READMEs runs, and prints what they say."""

from __future__ import annotations

import contextlib
import io
import re
import shlex
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

import tcc
from tcc.passes.fold_timesteps import Fold
from tcc.passes.pipeline import StepKind, lowering_passes, storing_passes, variant_passes
from tcc.program import build_program
from tests.tiny_models import case

ROOT = Path(__file__).parents[1]
FENCE = re.compile(r"^```([^\n]*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
NOT_RUN = "# not run"


@dataclass(frozen=True)
class Block:
    """A fenced block: its info string, its text, and the line that the text starts at."""

    info: str
    text: str
    line: int


def blocks(document: str) -> Iterator[Block]:
    """The fenced blocks of a document, in order."""
    for found in FENCE.finditer(document):
        yield Block(found[1].strip(), found[2], document.count("\n", 0, found.start(2)) + 1)


def without_line_numbers(text: str) -> str:
    """Text in which places of errors are the same wherever a block stands."""
    return re.sub(r"line \d+", "line N", text).strip()


@pytest.mark.compiles
@pytest.mark.filterwarnings("ignore:.*torch.jit.script_method.*:DeprecationWarning")  # importing Inductor
@pytest.mark.parametrize("name", ["README.md", "passes/README.md"])
def test_the_python_blocks_run(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """All blocks of a file share one namespace; a `text output` block is what was printed since the one before.

    Test functions that a block defines are called. A block that begins with `# not run` is left out.
    """
    monkeypatch.chdir(tmp_path)
    document = (ROOT / name).read_text()
    namespace: dict[str, Any] = {"__name__": "__main__"}
    printed, called = io.StringIO(), set()
    for block in blocks(document):
        if block.info == "python" and not block.text.startswith(NOT_RUN):
            source = "\n" * (block.line - 1) + block.text  # errors then name the line of the file
            with contextlib.redirect_stdout(printed):
                exec(compile(source, name, "exec", dont_inherit=True), namespace)
                for test in [key for key in namespace if key.startswith("test_") and key not in called]:
                    called.add(test)
                    namespace[test]()
        elif block.info == "text output":
            assert without_line_numbers(printed.getvalue()) == without_line_numbers(block.text), f"line {block.line}"
            printed = io.StringIO()


def test_blocks_that_do_not_run_say_why() -> None:
    """`# not run` is followed by the reason."""
    for name in ("README.md", "passes/README.md"):
        for block in blocks((ROOT / name).read_text()):
            first = block.text.partition("\n")[0]
            assert not first.startswith(NOT_RUN) or len(first) > len(NOT_RUN) + 3, f"{name}, line {block.line}"


def commands(name: str) -> Iterator[list[list[str]]]:
    """The calls of tcc in each shell block of a document, as words without the comments."""
    for block in blocks((ROOT / name).read_text()):
        if block.info == "sh":
            yield [words for line in block.text.splitlines() if (words := shlex.split(line, True))[:1] == ["tcc"]]


def after(words: list[str], option: str) -> str:
    """What an option of a call is given; "" without the option."""
    return words[words.index(option) + 1] if option in words else ""


@pytest.mark.parametrize("name", ["README.md", "benchmarks/README.md"])
def test_shell_blocks_can_be_run_as_they_are(name: str) -> None:
    """No training goes on with the state of another, and what is measured on a named model was planned for it."""
    benches = 0
    for calls in commands(name):
        trained = [after(words, "--out") for words in calls if words[1] == "train"]
        assert len(set(trained)) == len(trained)
        plans = {(after(w, "--out"), after(w, "--model"), after(w, "--batch")) for w in calls if w[1] == "plan"}
        for words in calls:
            if words[1] == "bench":
                benches += 1
                assert (words[2], after(words, "--model"), after(words, "--batch")) in plans
    assert benches


def test_the_table_of_passes_is_the_pipeline() -> None:
    """passes/README.md names the passes that run, in order."""
    table = re.findall(r"^\| \d+ \| `(\w+)` \|", (ROOT / "passes/README.md").read_text(), re.MULTILINE)

    assert [item.name for item in variant_passes(StepKind((), frozenset(), (), 0))] == table


def test_the_other_table_of_passes_is_what_runs_when_a_variant_is_compiled() -> None:
    """With every option, for a step that reuses something."""
    table = re.findall(r"^\| `(\w+)` \|", (ROOT / "passes/README.md").read_text(), re.MULTILINE)
    info = case("dit").info
    program = build_program(info.captured, info.analysis, tcc.plans.fora(info, num_steps=4, interval=2), check=False)
    first = lowering_passes(program.variants[1].kind, folds=(Fold("linear", True),), num_steps=2, regional=True)
    assert [item.name for item in (*first, *storing_passes([]))] == [name for name in table if name != "NarrowSlots"]
