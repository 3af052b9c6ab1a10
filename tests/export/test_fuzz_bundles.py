"""What a loader must survive: more than 2,000 bundles that were cut, altered, swapped, or made to do harm.

Most have sizes, hashes and checksums counted anew, and many of the ONNX ones forged stamps, so that they reach what
lies behind. What still loads is run, by a process with bounds on its memory, while this one watches the time.
"""

from __future__ import annotations

import json
import queue
import subprocess
import sys
import threading
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from tests.export.deep_mutations import DEEP

PROGRAM = Path(__file__).with_name("fuzz_bundles.py")
#: Seconds that a copy may take; the machine may be busy, and the program itself counts processor time.
PATIENCE = 120
#: What makes another bundle each time; the other kinds may change a word that means nothing, such as a version.
NEVER_LOADS = {"shape", "dtype", "name", "tensors", "header", "plan", "kind of file", "remove", "body"}


def outcomes(count: int, *arguments: object, patience: float = PATIENCE) -> Counter[tuple[str, str]]:
    """What became of `count` spoiled copies of a bundle, by what was done to them, as a program tells."""
    command = [sys.executable, "-W", "ignore", *map(str, arguments)]
    lines: queue.Queue[str] = queue.Queue()
    found: Counter[tuple[str, str]] = Counter()
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as program:
        assert program.stdout is not None
        threading.Thread(target=lambda: [*map(lines.put, program.stdout or ()), lines.put("")], daemon=True).start()
        number = "the original"
        try:
            while line := lines.get(timeout=patience).strip():
                if line.isdigit():
                    number = line
                    continue
                kind, outcome = json.loads(line)
                assert outcome == "ran" or outcome.startswith("refused: "), f"copy {number}, {kind}: {outcome}"
                found[kind, outcome.partition(":")[0]] += 1
        except queue.Empty:
            pytest.fail(f"copy {number} hangs")
        finally:
            if program.poll() is None and found.total() < count:
                program.kill()
    assert (program.returncode, found.total()) == (0, count), f"the process died of copy {number}"
    return found


@pytest.mark.filterwarnings("ignore:.*torch.jit.script_method.*:DeprecationWarning")  # importing Inductor
@pytest.mark.parametrize(("target", "count"), [("onnx", 1500), pytest.param("aoti", 600, marks=pytest.mark.compiles)])
def test_spoiled_bundles_do_no_harm(target: str, count: int, request: Any, tmp_path: Path) -> None:
    """None crashes or hangs the process, writes a file, or swells; what is not refused runs."""
    if target == "onnx":
        pytest.importorskip("onnx", reason="needs the ONNX packages: pip install 'tcc[onnx]'")
    original = (
        request.getfixturevalue("small") if target == "onnx" else request.getfixturevalue("packaged")("dit").folder
    )
    found = outcomes(count, PROGRAM, original, tmp_path / "scratch", target, 0, count)
    kinds = {kind.partition(",")[0] for kind, _ in found}
    assert (target == "onnx") == ("body" in kinds)
    assert kinds >= {*DEEP, "cut", "flip", "swap", "grow", "overwrite", "remove"}
    assert not [kind for kind, outcome in found if outcome == "ran" and kind.partition(",")[0] in NEVER_LOADS]
    assert sum(n for (_, outcome), n in found.items() if outcome == "refused") > 0.9 * count


@pytest.mark.parametrize(
    ("program", "message"),
    [
        ("import os; print(0, flush=True); os.abort()", r"the process died of copy 0"),
        ("import time; print(0, flush=True); time.sleep(60)", r"copy 0 hangs"),
        ("import json; print(0); print(json.dumps(['cut', 'ValueError: raw']))", r"copy 0, cut: ValueError: raw"),
        ("import json; print(0); print(json.dumps(['cut', 'ran']))", r"the process died of copy 0"),
    ],
)
def test_harm_is_noticed(program: str, message: str) -> None:
    """A process that dies, hangs, or ends too early, and an error that is none of ours."""
    with pytest.raises((AssertionError, pytest.fail.Exception), match=message):
        outcomes(2, "-c", program, patience=3)
