"""Python's numbers for what is given as numbers: a plan's file, and its comparisons, hold no others."""

from __future__ import annotations

import operator
from typing import Any

from tcc.errors import PlanError

__all__ = ["number", "whole"]


def whole(what: str, value: Any) -> int:
    """A whole number, numpy's too; no bool.

    Raises:
        PlanError: it is none; `what` says what it is.
    """
    if isinstance(value, bool):
        raise PlanError(f"{what}={value}: expected a whole number")
    try:
        return operator.index(value)
    except TypeError as error:
        raise PlanError(f"{what}={value!r:.60}: expected a whole number") from error


def number(what: str, value: Any) -> float:
    """A number, numpy's and a tensor's too; no bool, and no text.

    Raises:
        PlanError: it is none; `what` says what it is.
    """
    try:
        if not isinstance(value, (bool, str)):
            return float(value)
    except (TypeError, ValueError, RuntimeError):
        pass
    raise PlanError(f"{what}={value!r:.60}: expected a number")
