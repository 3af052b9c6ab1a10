"""What every file of results says of itself: the command, the commit, the versions and the hardware."""

from __future__ import annotations

import os
import shlex
import subprocess
import sys
from pathlib import Path
from typing import Any

from tcc.timing import machine


def provenance() -> dict[str, Any]:
    """To stand at the head of a JSON file. Of paths outside the folder only names are told."""
    words = [f"benchmarks/{Path(sys.argv[0]).name}", *(_told(word) for word in sys.argv[1:])]
    return {"command": shlex.join(["python", *words]), "commit": commit(), **machine()}


def results_folder(path: str) -> Path:
    """The folder that `--results` names, made now: after minutes of measuring it is too late to miss it."""
    Path(path).mkdir(parents=True, exist_ok=True)
    return Path(path)


def commit() -> str:
    """The commit of the checkout, marked where code differs from it; without git, what TCC_COMMIT says."""
    changed = ["status", "--porcelain", "--", ":/passes", ":/tcc", ":/export", ":/benchmarks/*.py"]
    try:
        found = [_git(*command) for command in (["rev-parse", "--short", "HEAD"], changed)]
    except (OSError, subprocess.CalledProcessError):  # no git, or no repository
        return os.environ.get("TCC_COMMIT", "unknown")
    return found[0] + ("-changed" if found[1] else "")


def _git(*command: str) -> str:
    where = Path(__file__).parent
    return subprocess.run(["git", *command], capture_output=True, text=True, check=True, cwd=where).stdout.strip()


def _told(word: str) -> str:
    return Path(word).name if Path(word).is_absolute() else word
