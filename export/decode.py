"""JSON from outside, as values of known types."""

from __future__ import annotations

import dataclasses
import functools
import json
import typing
from typing import Any

__all__ = ["Malformed", "decode", "parse"]

#: 64 bits, like the numbers that sizes and counts are kept in.
MAX_INT = 2**63 - 1


class Malformed(Exception):  # noqa: N818 # becomes a BundleError that names the file
    """What is wrong with data from outside."""


def parse(text: bytes) -> Any:
    """JSON without what it leaves open: names that come twice, numbers that are none, nesting without end.

    Raises:
        Malformed: it is something else.
    """
    try:
        return json.loads(text, object_pairs_hook=_once, parse_constant=_no_number)
    except (ValueError, RecursionError) as error:
        raise Malformed(f"not JSON ({error})") from error


def decode(kind: Any, data: Any, where: str) -> Any:
    """`data` from JSON as a value of type `kind`: a dataclass, a tuple, a dict, an int or a str.

    Raises:
        Malformed: it is something else.
    """
    origin = typing.get_origin(kind)
    if origin is tuple:
        if not isinstance(data, list):
            raise Malformed(f"{where} is not a list")
        return tuple(decode(typing.get_args(kind)[0], item, f"{where}[{i}]") for i, item in enumerate(data))
    if not dataclasses.is_dataclass(kind) and origin is not dict:
        if type(data) is not kind:
            raise Malformed(f"{where} is {data!r:.60}, not of type {kind.__name__}")
        if isinstance(data, str) and not data.isprintable():
            raise Malformed(f"{where} is {data!r:.60}, which cannot be printed")
        if isinstance(data, int) and abs(data) > MAX_INT:
            raise Malformed(f"{where} is {data!r:.60}, larger than any number of a bundle")
        return data
    if not isinstance(data, dict):
        raise Malformed(f"{where} is not an object")
    if origin is dict:
        for key in data:
            decode(str, key, f"a name in {where}")
        return {key: decode(typing.get_args(kind)[1], item, f"{where}[{key!r:.60}]") for key, item in data.items()}
    hints = _fields(kind)
    if missing := hints.keys() ^ data.keys():
        raise Malformed(f"{where} lacks fields, or has unknown ones: {', '.join(sorted(missing))[:200]!r}")
    return kind(**{name: decode(hint, data[name], f"{where}.{name}") for name, hint in hints.items()})


@functools.cache
def _fields(kind: Any) -> dict[str, Any]:
    return typing.get_type_hints(kind)


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for name, item in pairs:
        if name in found:
            raise Malformed(f"the name {name!r:.60} comes twice in an object")
        found[name] = item
    return found


def _no_number(name: str) -> Any:
    raise Malformed(f"{name} is no number of JSON")
