"""Tables that `print` shows as it shows text."""

from __future__ import annotations

import io
import sys

from rich.console import Console
from rich.table import Table

__all__ = ["PIPE_WIDTH", "TextTable"]

PIPE_WIDTH = 140  # where stdout is a file or a pipe it has no width of its own


class TextTable(Table):
    """A table of rich whose `str` is the table: as wide as the terminal, without colours."""

    def __str__(self) -> str:
        text = io.StringIO()
        width = None if sys.stdout.isatty() else PIPE_WIDTH
        Console(file=text, force_terminal=False, width=width, highlight=False).print(self)
        return text.getvalue().rstrip("\n")
