"""What a capture leaves in a model: `torch.export` runs it on fake tensors, and models keep what they compute."""

from __future__ import annotations

import contextlib
import functools
import gc
import sys
import types
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

from torch import nn
from torch._subclasses.fake_tensor import FakeTensor  # torch has no public ones (2.11-2.13)
from torch._subclasses.functional_tensor import FunctionalTensor

__all__ = ["no_leftovers"]

_CACHE = type(functools.lru_cache(lambda: None))
_FOREIGN = {*sys.stdlib_module_names, "torch"}  # objects of theirs are not looked into: loggers know each other
_LARGE = 10_000  # what has more entries is data, not a few tables


@contextlib.contextmanager
def no_leftovers(model: nn.Module) -> Iterator[None]:
    """Take out of the model and its code, afterwards, every fake tensor that was put there.

    `torch.export` puts back attributes of modules. Rotary tables are often kept elsewhere: in a plain object that a
    module has, in a dictionary, in a class or a file, or by `functools.lru_cache`. The next run or capture would find
    them there. What is kept in `__slots__`, and by code of other packages than those of the modules, is not found.

    Args:
        model: what is captured.
    """
    modules = list(model.modules())
    packages = {_package(type(module)) for module in modules} - _FOREIGN
    found = list(_reached([*map(vars, modules), *map(type, modules)], packages))
    before = [(item, _contents(item)) for item in found if _is(item, type) or _is_holder(item)]
    caches = [(item, item.cache_info().misses) for item in found if type(item) is _CACHE]
    try:
        yield
    finally:
        for holder, contents in before:
            _put_back(holder, contents)
        for cache, misses in caches:
            if cache.cache_info().misses != misses and any(map(_is_fake, _kept(cache))):
                cache.cache_clear()


def _put_back(holder: Any, contents: Any) -> None:
    """Put the contents back where fake tensors have taken their place."""
    if _is(holder, list):
        known = {id(item) for item in contents}
        if any(id(item) not in known and _is_fake(item) for item in holder):
            holder[:] = contents
        return
    now = _contents(holder)
    for name in [name for name, item in now.items() if item is not contents.get(name) and _is_fake(item)]:
        if _is(holder, type):
            setattr(holder, name, contents[name]) if name in contents else delattr(holder, name)
        elif name in contents:
            holder[name] = contents[name]
        else:
            del holder[name]


def _contents(holder: Any) -> Any:
    """What a list, a dictionary or a class holds now."""
    if _is(holder, list):
        return list(holder)
    return dict(vars(holder) if _is(holder, type) else dict.items(holder))


def _is_holder(item: Any) -> bool:
    return _is(item, dict, list) and len(item) <= _LARGE


def _is_fake(item: Any) -> bool:
    """Whether it is a fake tensor, or holds one."""
    return any(_is(part, FakeTensor, FunctionalTensor) for part in _reached([item]))


def _reached(roots: Iterable[Any], packages: Iterable[str] = ()) -> Iterator[Any]:
    """Everything that `roots` hold, and the classes and functions of `packages` that they are made of or call.

    Of objects that code holds, such as the constants of a file, no attributes: they may lead anywhere.
    """
    left, of_code, seen = list(roots), list[Any](), dict[int, Any]()  # which keeps what it knows by its number
    while left or of_code:
        by_code = not left  # last, so that what the model holds too is looked into
        item = (of_code if by_code else left).pop()
        if id(item) in seen:
            continue
        seen[id(item)] = item
        yield item
        code = _code(item, packages)
        if code is None and not by_code:
            left += _held(item)
        else:
            of_code += _parts(item) if code is None else code


def _code(item: Any, packages: Iterable[str]) -> Iterable[Any] | None:
    """What a class, a function or a file holds; None where the item is none of them."""
    if type(item) is _CACHE:
        return [item.__wrapped__, *_kept(item)]
    if _is(item, staticmethod, classmethod):
        return [item.__func__]
    if _is(item, types.FunctionType):
        cells = [cell.cell_contents for cell in item.__closure__ or () if cell != types.CellType()]
        return [*cells, vars(item), *([item.__globals__] if _package(item) in packages else [])]
    if _is(item, types.ModuleType):
        return [vars(item)] if item.__name__.partition(".")[0] in packages else []
    if _is(item, type):
        return [*item.__bases__, *vars(item).values()] if _package(item) in packages else []
    return None


def _held(item: Any) -> Iterable[Any]:
    """What an object holds; asked by its type, since a proxy may not let itself be asked."""
    kind, parts = type(item), _parts(item)
    if _is(item, nn.Module) or (_package(kind) in _FOREIGN and kind is not types.SimpleNamespace):
        return parts
    with contextlib.suppress(Exception):  # what has no attributes, or does not show them
        return [*parts, kind, object.__getattribute__(item, "__dict__")]
    return [*parts, kind]


def _parts(item: Any) -> Sequence[Any]:
    """What a container holds, if it is one."""
    if not _is(item, dict, list, tuple) or len(item) > _LARGE:
        return []
    return [*(dict.values(item) if _is(item, dict) else item)]


def _kept(cache: Any) -> list[Any]:
    """The results that a function with `lru_cache` keeps, among other things."""
    found = gc.get_referents(cache)
    links = [link for link in found if type(link).__name__ == "_lru_list_elem"]  # Python 3.12 has them in between
    return [item for item in (*found, *gc.get_referents(*links)) if not callable(item)]


def _is(item: Any, *kinds: type) -> bool:
    return issubclass(type(item), kinds)


def _package(item: Any) -> str:
    return str(item.__module__).partition(".")[0]
