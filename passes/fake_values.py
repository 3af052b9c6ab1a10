"""Fake values of calls: calls that are alike, in all blocks of a model and in all its variants, are evaluated once."""

from __future__ import annotations

import operator
from collections.abc import Hashable
from typing import Any

import torch
from torch import fx
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode

__all__ = ["Memo", "evaluate", "fake_mode_of", "memo_of", "refresh_strides"]


class _Unknown(Exception):  # noqa: N818 - an answer, not a failure
    """Something that two calls cannot be compared by."""


class Memo:
    """The fake values of one fake mode, by operator and by what its arguments are like.

    Attributes:
        evaluated: how many calls have been evaluated.
        found: how many calls were like one before.
    """

    def __init__(self) -> None:
        self.evaluated = self.found = 0
        self._values: dict[Hashable, Any] = {}
        self._facts: dict[int, tuple[Any, Hashable]] = {}  # with the tensor, so that no other gets its id

    def evaluate(self, target: Any, args: Any, kwargs: Any, mode: FakeTensorMode) -> Any:
        """What `target` returns under `mode`."""
        key = self._key(target, args, kwargs)
        if key is not None and key in self._values:
            self.found += 1
            return self._values[key]
        self.evaluated += 1
        with mode, torch.no_grad():
            new = target(*args, **kwargs)
        if key is not None and _is_plain(new):
            self._values[key] = new
        return new

    def _key(self, target: Any, args: Any, kwargs: Any) -> Hashable | None:
        schema = getattr(target, "_schema", None)
        if schema is not None and schema.is_mutable:
            return None
        try:
            return target, self._like(args), self._like(tuple(sorted(kwargs.items())))
        except _Unknown:
            return None

    def _like(self, arg: Any) -> Hashable:
        """What a result can depend on: of numbers also the type, since `x + 1` and `x + 1.0` differ in dtype."""
        if isinstance(arg, FakeTensor):
            if id(arg) not in self._facts:
                self._facts[id(arg)] = (arg, _facts(arg))
            return self._facts[id(arg)][1]
        if isinstance(arg, (tuple, list)):
            return type(arg).__name__, tuple(map(self._like, arg))
        if arg is None or isinstance(arg, (str, torch.dtype, torch.device, torch.layout, torch.memory_format)):
            return arg
        if type(arg) in (bool, int, float):
            return type(arg), repr(arg)
        raise _Unknown


def _facts(val: FakeTensor) -> Hashable:
    if not _is_plain(val):
        raise _Unknown
    like = (tuple(val.shape), val.stride(), val.storage_offset(), val.dtype, val.device)
    return *like, val.layout, val.requires_grad, val.is_conj(), val.is_neg()


def _is_plain(val: Any) -> bool:
    """Whether nothing of `val` depends on the data."""
    if isinstance(val, (tuple, list)):
        return all(map(_is_plain, val))
    if not isinstance(val, FakeTensor) or val.layout != torch.strided:
        return False
    return all(type(number) is int for number in (*val.shape, *val.stride(), val.storage_offset()))


def memo_of(mode: FakeTensorMode) -> Memo:
    """The values that were made under `mode`; they go when it goes."""
    memo: Memo = vars(mode).setdefault("_tcc_memo", Memo())
    return memo


def fake_mode_of(graph: fx.Graph) -> FakeTensorMode:
    """The fake mode under which the graph's values were made."""
    for node in graph.nodes:
        mode = getattr(node.meta.get("val"), "fake_mode", None)
        if isinstance(mode, FakeTensorMode):
            return mode
    return FakeTensorMode()


def evaluate(node: fx.Node, mode: FakeTensorMode) -> Any:
    """The fake value of `node` under `mode`, from the values of its inputs."""
    if node.op not in ("call_function", "call_method"):
        return node.meta["val"]
    args, kwargs = fx.map_arg((node.args, node.kwargs), lambda n: n.meta["val"])
    target: Any = node.target
    if node.op == "call_method":
        target = getattr(torch.Tensor, str(node.target))
    return memo_of(mode).evaluate(target, args, kwargs, mode)


def refresh_strides(graph: fx.Graph) -> None:
    """Note down how values lie in memory now: a view of what a pass has replaced may have the strides of before."""
    mode = fake_mode_of(graph)
    for node in graph.nodes:
        reads = isinstance(node.target, torch._ops.OpOverload) and not node.target._schema.is_mutable
        if (reads or node.target is operator.getitem) and _is_plain(kept := node.meta["val"]):
            new = evaluate(node, mode)
            if _strides(new) != _strides(kept):
                node.meta["val"] = new


def _strides(val: Any) -> list[tuple[int, ...]]:
    return [each.stride() for each in (val if isinstance(val, (tuple, list)) else [val])]
