"""One form for every way of writing the same call."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from torch.utils import _pytree as pytree  # no public pytree module in torch 2.11-2.13

from tcc.errors import CallError

__all__ = ["Leaf", "bind", "normal_form"]


@dataclass(frozen=True)
class Leaf:
    """Stands for an input that an exported program takes."""

    number: int


def bind(
    signature: inspect.Signature | None, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """One form for every way of writing the same call, the normal form.

    Defaults are applied, keywords are made positional where they can be, and names are in order where it means nothing.
    """
    if signature is None:
        return args, kwargs
    try:
        bound = signature.bind(*args, **kwargs)
    except TypeError as error:
        raise CallError(f"the call does not fit the model's forward: {error}") from error
    bound.apply_defaults()
    return _in_order(bound.args), {name: _in_order(bound.kwargs[name]) for name in _names(signature, bound.kwargs)}


def normal_form(signature: inspect.Signature | None, spec: pytree.TreeSpec) -> tuple[list[Any], pytree.TreeSpec]:
    """The normal form of a call that was exported as it was written, with the structure `spec`: leaves and structure.

    A model is exported in its caller's own words: a decorator around its forward may read `kwargs` by name. A leaf is a
    `Leaf`, or the default of a parameter that was left out.
    """
    written = pytree.tree_unflatten([Leaf(number) for number in range(spec.num_leaves)], spec)
    return pytree.tree_flatten(bind(signature, *written))


def _names(signature: inspect.Signature, kwargs: Mapping[str, Any]) -> list[str]:
    """Keyword arguments in the signature's order, then others by name."""
    own = [name for name in signature.parameters if name in kwargs]
    return own + sorted(kwargs.keys() - own)


def _in_order(value: Any) -> Any:
    """The same value, with its dictionaries in the order of their keys."""
    if type(value) is dict:
        return {key: _in_order(value[key]) for key in sorted(value, key=str)}
    return type(value)(map(_in_order, value)) if type(value) in (list, tuple) else value
