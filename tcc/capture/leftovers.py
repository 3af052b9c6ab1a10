"""What a capture leaves in a model: `torch.export` runs it on fake tensors, and models keep what they compute."""

from __future__ import annotations

import contextlib
import functools
import sys
from collections.abc import Iterable, Iterator
from typing import Any

from torch import nn
from torch._subclasses.fake_tensor import FakeTensor  # torch has no public ones (2.11-2.13)
from torch._subclasses.functional_tensor import FunctionalTensor

__all__ = ["no_leftovers"]

_Holder = dict[Any, Any] | list[Any]
_CACHE = type(functools.lru_cache(lambda: None))
_FOREIGN = {*sys.stdlib_module_names, "torch"}  # what is of their classes is not looked into: loggers know each other


@contextlib.contextmanager
def no_leftovers(model: nn.Module) -> Iterator[None]:
    """Take out of the model, afterwards, every fake tensor that was put there.

    `torch.export` puts back attributes of modules. Rotary tables are often kept elsewhere: in a plain object that a
    module has, in a dictionary, or by `functools.lru_cache`. The next run or capture would find them there.

    Args:
        model: what is captured.
    """
    roots = [vars(module) for module in model.modules()]
    holders = [item for item in _reached(roots) if isinstance(item, (dict, list))]
    before = [(holder, dict(holder) if isinstance(holder, dict) else list(holder)) for holder in holders]
    caches = [(cache, cache.cache_info().misses) for cache in _caches(model)]
    try:
        yield
    finally:
        for holder, contents in before:
            _put_back(holder, contents)
        for cache, misses in caches:
            if cache.cache_info().misses != misses:
                cache.cache_clear()


def _put_back(holder: _Holder, contents: _Holder) -> None:
    """Put the contents back where fake tensors have taken their place."""
    if isinstance(holder, list):
        if any(map(_is_fake, holder)):
            holder[:] = contents
        return
    assert isinstance(contents, dict)
    for name in [name for name, item in holder.items() if item is not contents.get(name) and _is_fake(item)]:
        if name in contents:
            holder[name] = contents[name]
        else:
            del holder[name]


def _is_fake(item: Any) -> bool:
    """Whether it is a fake tensor, or holds one."""
    return any(isinstance(part, (FakeTensor, FunctionalTensor)) for part in _reached([item]))


def _reached(roots: Iterable[Any]) -> Iterator[Any]:
    """Everything that is held by `roots`: in containers, and as attributes of objects."""
    left, seen = list(roots), dict[int, Any]()  # which keeps what it knows by its number
    while left:
        item = left.pop()
        if id(item) in seen:
            continue
        seen[id(item)] = item
        yield item
        if isinstance(item, (dict, list, tuple)):
            left += item.values() if isinstance(item, dict) else item
        elif _package(type(item)) not in _FOREIGN and hasattr(item, "__dict__"):
            left.append(vars(item))


def _caches(model: nn.Module) -> set[Any]:
    """The caches of the classes of the model's modules, and of the files that these are written in."""
    classes = {base for module in model.modules() for base in type(module).__mro__ if _package(base) not in _FOREIGN}
    files = [sys.modules[base.__module__] for base in classes if base.__module__ in sys.modules]
    found = [item for place in (*classes, *files) for item in list(vars(place).values())]
    plain = (item.__func__ if isinstance(item, (staticmethod, classmethod)) else item for item in found)
    return {item for item in plain if isinstance(item, _CACHE)}


def _package(kind: type) -> str:
    return str(kind.__module__).partition(".")[0]
