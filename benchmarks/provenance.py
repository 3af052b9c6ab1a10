"""What every file of results says of itself: the command, the commit, the versions and the hardware."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

from tcc.timing import machine


def provenance() -> dict[str, Any]:
    """To stand at the head of a JSON file. Of paths outside the folder only names are told."""
    words = [f"benchmarks/{Path(sys.argv[0]).name}", *(_told(word) for word in sys.argv[1:])]
    return {"command": " ".join(["python", *words]), "commit": commit(), **machine()}


def commit() -> str:
    """The commit of the checkout, marked where code differs from it."""
    changed = ["status", "--porcelain", "--", ":/passes", ":/tcc", ":/export", ":/benchmarks/*.py"]
    found = [
        subprocess.run(["git", *command], capture_output=True, text=True, check=False, cwd=Path(__file__).parent).stdout
        for command in (["rev-parse", "--short", "HEAD"], changed)
    ]
    return found[0].strip() + ("-changed" if found[1].strip() else "")


def _told(word: str) -> str:
    return Path(word).name if Path(word).is_absolute() else word
