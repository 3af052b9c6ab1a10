"""What the JSON of a measurement says of itself: the command, the commit, the date and the machine."""

from __future__ import annotations

import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from tcc import timing

__all__ = ["head"]


def head() -> dict[str, Any]:
    """To stand at the head of the file."""
    return {
        "command": " ".join(["tcc", *sys.argv[1:]]),
        "commit": _commit(),
        "date": time.strftime("%Y-%m-%d"),
        "machine": timing.machine(),
    }


def _commit() -> str | None:
    """The commit of the source tree, with a + where it has changes; None where tcc runs from no source tree."""
    try:
        _git("ls-files", "--error-unmatch", Path(__file__).name)
        return _git("describe", "--always", "--dirty=+", "--abbrev=12", "--exclude=*")
    except (OSError, subprocess.CalledProcessError):
        return None


def _git(*arguments: str) -> str:
    command = ["git", "-C", str(Path(__file__).parent), *arguments]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
