"""What the commands share on the terminal: results on stdout, progress and errors on stderr, tables as JSON."""

from __future__ import annotations

import contextlib
import json
import os
import sys
from collections.abc import Iterator
from contextvars import ContextVar
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeElapsedColumn
from rich.status import Status

from tcc.tables import PIPE_WIDTH

__all__ = ["STDOUT", "Bar", "bar", "err", "fail", "json_to", "note", "out", "status", "write_json"]


#: In place of a file: stdout.
STDOUT = "-"
_aside: ContextVar[bool] = ContextVar("_aside", default=False)


def json_to(path: Path | None) -> None:
    """Say where this command's numbers will go: all else keeps away from stdout if that is where."""
    _aside.set(str(path) == STDOUT)


def out() -> Console:
    """Where results go: stderr if the command's numbers go to stdout."""
    stream = sys.stderr if _aside.get() else sys.stdout
    return Console(file=stream, width=None if stream.isatty() else PIPE_WIDTH, highlight=False)


def err() -> Console:
    """Where progress and errors go, so that results can be piped."""
    return Console(stderr=True, highlight=False)


def fail(message: str) -> None:
    """Print an error as one red line."""
    err().print(f"[bold red]error:[/] [red]{escape(message)}[/]", soft_wrap=True)


def note(message: str) -> None:
    """Print a remark: what was written, or how to read a number."""
    out().print(f"[dim]{escape(message)}[/]", soft_wrap=True)


@contextlib.contextmanager
def status(text: str) -> Iterator[Status]:
    """A spinner while the block runs; for work whose length is not known. Its `update` changes the text."""
    # this stderr, wherever the block sends its own
    with Console(file=sys.stderr, highlight=False).status(escape(text)) as shown:
        yield shown


class Bar:
    """One line of a progress display.

    Args:
        progress: the display.
        task: its line.
    """

    def __init__(self, progress: Progress, task: TaskID) -> None:
        self._progress = progress
        self._task = task

    def __call__(self, done: int, total: int) -> None:
        """Show `done` of `total`: the form in which the library reports progress."""
        self._progress.update(self._task, completed=done, total=total)

    def advance(self, text: str | None = None) -> None:
        """One more is done; the next one is called `text`."""
        self._progress.advance(self._task)
        if text is not None:
            self.describe(text)

    def describe(self, text: str) -> None:
        """Say what is being done now."""
        self._progress.update(self._task, description=escape(text))


@contextlib.contextmanager
def bar(text: str, total: int | None = None) -> Iterator[Bar]:
    """A progress bar while the block runs."""
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, console=err()) as progress:
        yield Bar(progress, progress.add_task(escape(text), total=total))


def write_json(path: str | os.PathLike[str] | None, content: Any) -> None:
    """Write `content` as indented JSON, where a path is given, and say so; `-` is stdout."""
    if str(path) == STDOUT:
        sys.stdout.write(json.dumps(content, indent=2) + "\n")
    elif path is not None:
        Path(path).write_text(json.dumps(content, indent=2) + "\n")
        note(f"wrote {path}")
