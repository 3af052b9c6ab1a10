"""Where the operands of a call stand, and the call with other ones."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from torch import fx

__all__ = ["Path", "at", "operands", "substitute"]

#: Where an operand stands in a call: a position, a keyword, or either followed by an index into a list.
Path = tuple[int | str, ...]


def at(node: fx.Node, path: Path) -> Any:
    """The argument of `node` at `path`."""
    found: Any = node.args if isinstance(path[0], int) else node.kwargs
    for step in path:
        found = found[step]
    return found


def operands(node: fx.Node) -> Iterator[tuple[Path, fx.Node]]:
    """The node operands of a call, with their paths."""
    arguments: list[tuple[int | str, Any]] = [*enumerate(node.args), *node.kwargs.items()]
    for key, arg in arguments:
        if isinstance(arg, fx.Node):
            yield (key,), arg
        elif isinstance(arg, (list, tuple)):
            for i, item in enumerate(arg):
                if isinstance(item, fx.Node):
                    yield (key, i), item


def substitute(node: fx.Node, changes: Mapping[Path, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """The arguments of `node` with `changes`."""
    args: list[Any] = [list(a) if isinstance(a, (list, tuple)) else a for a in node.args]
    kwargs: dict[str, Any] = dict(node.kwargs)
    for path, new in changes.items():
        holder: Any = args if isinstance(path[0], int) else kwargs
        if len(path) == 1:
            holder[path[0]] = new
        else:
            inner = list(holder[path[0]])
            inner[path[1]] = new  # type: ignore[index]
            holder[path[0]] = inner
    return tuple(args), kwargs
