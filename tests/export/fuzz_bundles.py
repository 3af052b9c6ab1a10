"""Load, and run, many spoiled copies of a bundle: a program of its own, with bounds on memory, that a test watches.

    python fuzz_bundles.py ORIGINAL SCRATCH TARGET FIRST LAST

It prints the number of each copy before it is loaded, and then, as JSON, what was done to it and what came of it.
"""

from __future__ import annotations

import json
import os
import random
import resource
import shutil
import sys
import time
from pathlib import Path
from typing import Any

#: What loading and running a copy may take, on top of what the original took.
MEMORY, SECONDS = 2**30, 10.0
#: Calls are made with zeros; a bundle that loads takes no more than the original does.
LARGEST_INPUT = 2**24

_written: list[str] = []


def main(original: Path, scratch: Path, target: str, numbers: range) -> None:
    """Work on copies with these numbers, which are the seeds of what is done to them."""
    from tests.export.deep_mutations import spoil

    folder, cwd = scratch / "bundle", scratch / "cwd"
    cwd.mkdir(parents=True)
    os.chdir(cwd)
    assert attempt(original) == "ran"
    sys.addaudithook(_watch)
    _bound_memory()
    files = {path.name: path.read_bytes() for path in original.iterdir()}
    for number in numbers:
        _say(str(number))
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir()
        for name, content in files.items():
            (folder / name).write_bytes(content)
        kind = spoil(folder, random.Random(number), target)
        before, began = _listing(scratch), time.process_time()
        _written.clear()
        outcome = attempt(folder)
        seconds = time.process_time() - began
        if _written or _listing(scratch) != before:
            outcome = f"wrote {_written}"
        if seconds > SECONDS:
            outcome = f"took {seconds:.1f} s"
        _say(json.dumps([kind, outcome]))


def attempt(folder: Path) -> str:
    """Load a bundle and run all its steps: `ran`, `refused: ...`, or what went wrong otherwise."""
    import torch

    from tcc.errors import TccError
    from tcc.export import load

    try:
        runner = load(folder)
        specs = runner.manifest.inputs
        if sum(spec.bytes for spec in specs) > LARGEST_INPUT:
            return "takes inputs that the original does not take"
        for _ in range(runner.num_steps + 1):
            runner(*(torch.zeros(spec.shape, dtype=spec.torch_dtype) for spec in specs))
    except TccError as error:
        if "has no memory" in str(error):
            return f"tried to allocate too much: {error}"
        return f"refused: {error}" if str(error) else "refused without a word"
    except BaseException as error:
        return f"{type(error).__name__}: {error}"
    return "ran"


def _say(line: str) -> None:
    sys.stdout.write(line + "\n")
    sys.stdout.flush()


def _watch(event: str, args: tuple[Any, ...]) -> None:
    """Note files that are opened to be written, made or renamed."""
    if (event == "open" and isinstance(args[2], int) and args[2] & (os.O_WRONLY | os.O_RDWR | os.O_CREAT)) or event in (
        "os.rename", "os.mkdir", "os.symlink", "os.link", "os.chmod",
    ):  # fmt: skip
        _written.append(str(args[0]))


def _bound_memory() -> None:
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    limit = pages * resource.getpagesize() + MEMORY
    resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))


def _listing(scratch: Path) -> list[tuple[str, int, int]]:
    """Everything in and around the bundle, with sizes and times."""
    found = []
    for path in sorted(scratch.rglob("*")):
        state = path.lstat()
        found.append((str(path), state.st_size, state.st_mtime_ns))
    return found


if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).parents[2]))
    main(Path(sys.argv[1]), Path(sys.argv[2]), sys.argv[3], range(int(sys.argv[4]), int(sys.argv[5])))
