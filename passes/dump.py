"""`TCC_DUMP=<folder>`: the graph before and after every pass, as text files in the order of the passes."""

from __future__ import annotations

import os
import re
from pathlib import Path

from torch import fx

from tcc.passes.graph import graph_text

__all__ = ["write"]


def write(label: str, number: int, name: str, graph: fx.Graph) -> None:
    """Write `graph` to `$TCC_DUMP/<label>/<number>_<name>.txt`; nothing where TCC_DUMP is not set."""
    folder = os.environ.get("TCC_DUMP")
    if not folder:
        return
    path = Path(folder) / re.sub(r"[^\w.-]+", "_", label)
    path.mkdir(parents=True, exist_ok=True)
    (path / f"{number:03d}_{name}.txt").write_text(graph_text(graph) + "\n")
