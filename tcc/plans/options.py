"""What all policies do with their options, before each checks its own."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from typing import Any, ParamSpec

import numpy as np
import torch

from tcc.errors import PlanError
from tcc.info import ModelInfo
from tcc.plan import CachePlan

__all__ = ["plain_options"]

P = ParamSpec("P")


def plain_options(make: Callable[P, CachePlan]) -> Callable[P, CachePlan]:
    """The policy, which takes numpy's numbers too and refuses flags that are neither True nor False.

    A plan records its options, and its file holds Python's numbers alone. `"false"` would count as true.
    """
    flags = [name for name, at in inspect.signature(make).parameters.items() if isinstance(at.default, bool)]

    @functools.wraps(make)
    def made(*args: P.args, **options: P.kwargs) -> CachePlan:
        given = args[0] if args else options.get("info")
        if not isinstance(given, ModelInfo):
            raise PlanError(
                f"{make.__name__}(info, ...) takes what tcc.inspect(model, ...) returns, got {type(given).__name__}"
            )
        options.update({name: _plain(value) for name, value in options.items()})
        for name in flags:
            if not isinstance(options.get(name, True), bool):
                raise PlanError(f"{name}={options[name]!r}: expected True or False")
        return make(*args, **options)

    return made


def _plain(value: Any) -> Any:
    """Python's number for numpy's, alone or in a list."""
    if isinstance(value, np.generic):
        return value.item()
    if isinstance(value, (np.ndarray, torch.Tensor)) and (value.ndim == 0 or isinstance(value, np.ndarray)):
        return value.tolist()
    return [_plain(part) for part in value] if isinstance(value, (list, tuple)) else value
