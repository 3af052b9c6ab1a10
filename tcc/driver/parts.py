"""What a model is made of: what must stay as it was when the model was captured."""

from __future__ import annotations

import functools
import types
import weakref
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.export import ExportedProgram

from tcc.errors import CallError

__all__ = ["Parts"]

_FUNCTIONS = (types.FunctionType, types.MethodType, types.BuiltinFunctionType, functools.partial, type)
#: What every module has, beside its layers and weights; `training` is set by others than the model.
_OF_MODULES = frozenset(vars(nn.Module()))
_LONGEST = 1024


@dataclass(frozen=True, eq=False)
class Parts:
    """What a model is made of; the values of its weights are not looked at, which may change in place.

    Attributes:
        objects: layers, weights, buffers, hooks and functions. What is called like a function, such as an attention
            processor, counts as its class and what it holds.
        settings: plain values and tensors among the attributes of layers, and of the objects that they hold, such as
            the scale of an adapter, by name.
        shadows: the names of those that stand before an attribute of the layer's class.
    """

    objects: tuple[Any, ...]
    settings: dict[str, Any]
    shadows: frozenset[str]

    @staticmethod
    def of(model: nn.Module | ExportedProgram) -> Parts:
        """Those that `model` has now; a program has none that could change."""
        layers = dict(model.named_modules()) if isinstance(model, nn.Module) else {}
        objects = tuple(part for layer in layers.values() for part in _objects(layer))
        settings, shadows = dict[str, Any](), set[str]()
        for path, layer in layers.items():
            found = _settings(layer)
            settings |= {f"{path}.{name}".lstrip("."): value for name, value in found.items()}
            shadows |= {f"{path}.{name}".lstrip(".") for name in found if hasattr(type(layer), name)}
        return Parts(objects, settings, frozenset(shadows))

    def check(self, then: Parts) -> None:
        """The objects are those of `then`.

        Raises:
            CallError: they are others.
        """
        same = len(self.objects) == len(then.objects) and all(map(_is_same, self.objects, then.objects))
        if not same:
            raise CallError(
                "layers, weights, buffers or functions of the model were replaced after it was compiled, by an "
                "adapter for example, or cast, or moved, and the compiled steps do not have them: call tcc.compile "
                "anew, or do that before the first call"
            )

    def changed(self, then: Parts) -> list[str]:
        """The settings of `then` that are others now, quoted; what the model computes may depend on them, or not.

        Those that `then` has not are new: what was captured did not read them, but where their class has such a name.
        """
        new = [name for name in self.shadows if name not in then.settings]
        return [f"'{name}'" for name, value in then.settings.items() if self.settings.get(name, ...) != value] + [
            f"'{name}'" for name in sorted(new)
        ]


def _objects(layer: nn.Module) -> list[Any]:
    held = vars(layer)
    hooks = (*held["_forward_pre_hooks"].values(), *held["_forward_hooks"].values())
    weights = (*held["_parameters"].values(), *held["_buffers"].values())
    kinds = [kind for weight in weights if weight is not None for kind in (weight.dtype, str(weight.device))]
    found = [layer, *weights, *hooks, *kinds]
    for part in held.values():
        if callable(part):
            found += [part] if isinstance(part, _FUNCTIONS) else [type(part), *getattr(part, "__dict__", {}).values()]
    return found


def _settings(layer: nn.Module) -> dict[str, Any]:
    """By name; of what is called like a function, `_objects` has them."""
    found: dict[str, Any] = {}
    for name, value in vars(layer).items():
        if name in _OF_MODULES:
            continue
        found[name] = _plain(value)
        if found[name] is ... and not callable(value) and not isinstance(value, types.ModuleType):
            found |= {f"{name}.{own}": _plain(each) for own, each in getattr(value, "__dict__", {}).items()}
    return {name: value for name, value in found.items() if value is not ...}


def _plain(value: Any) -> Any:
    """A copy of a plain value, or of a short collection of some; which tensor it is; `...` for anything else."""
    if isinstance(value, float):
        return f"{value:.9g}"  # code that scales a value for a call, and back, need not hit the last digit
    if value is None or isinstance(value, (bool, int, str)):
        return value
    if isinstance(value, torch.Tensor):
        return _Same(weakref.ref(value))
    if isinstance(value, dict) and len(value) <= _LONGEST:
        return {name: _plain(one) for name, one in value.items()}
    if isinstance(value, (list, tuple, set, frozenset)) and len(value) <= _LONGEST:
        return [_plain(one) for one in (sorted(value, key=str) if isinstance(value, (set, frozenset)) else value)]
    return ...


@dataclass(frozen=True, eq=False)
class _Same:
    """Which tensor it is; its values may change in place. Two are equal if they are of one tensor that lives."""

    tensor: weakref.ref[torch.Tensor]

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _Same) and self.tensor() is not None and self.tensor() is other.tensor()

    __hash__ = None  # type: ignore[assignment]


def _is_same(now: Any, then: Any) -> bool:
    """Whether a part is the one that it was; the values that an object holds may be equal instead."""
    return now is then or (isinstance(then, (int, float, str)) and type(now) is type(then) and bool(now == then))
