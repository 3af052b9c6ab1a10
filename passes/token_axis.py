"""Which dimension of a value counts tokens, op by op: the rules that let a gather move above an op.

A rule answers one local question. Given a node and the token axis of its output, which operands carry the tokens too,
along which axis, such that the node computed on those operands' kept tokens alone gives its own kept tokens? Operands
that the answer leaves out are used whole. A rule that cannot answer raises `NotTokenLocal` with the reason, and the
sites behind the node are then not prunable.

The rule for the tensor operators that are marked pointwise stands here; the other families are in `token_rules` and
`shape_rules`. `rule` registers one for a custom operator (passes/README.md has an example).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from types import FunctionType
from typing import Any

import torch
from torch import fx

from tcc.errors import PassError
from tcc.passes.graph import operators_of, shape, sized_by_data, source_line
from tcc.passes.paths import Path, operands
from tcc.passes.products import product
from tcc.passes.tokens import Axis

__all__ = ["Narrowing", "NotTokenLocal", "Path", "broadcasts", "narrowing", "operands", "rule"]

aten = torch.ops.aten


class NotTokenLocal(Exception):  # noqa: N818 - an answer, not a failure
    """The node's kept tokens need more than the kept tokens of its operands; the message says why."""


@dataclass(frozen=True)
class Narrowing:
    """What computing a node for the kept tokens only needs.

    Attributes:
        operands: the operands to restrict to the kept tokens, with their token axis. The others are used whole.
        literals: literal arguments (target shapes) with their value for `size` kept tokens.
    """

    operands: dict[Path, Axis]
    literals: dict[Path, Any] = field(default_factory=dict)


Rule = Callable[[fx.Node, Axis, int], Narrowing]
_RULES: dict[Any, Rule] = {}
_BROADCASTING: set[Any] = set()


def rule(*targets: Any, broadcasts: bool = False) -> Callable[[Rule], Rule]:
    """Register a rule for operators: `rule(node, axis, size) -> Narrowing`.

    Args:
        targets: operators that it answers for: `torch.ops.aten.linear.default`, all overloads of
            `torch.ops.mylib.scale`, or what `torch.library.custom_op` returned.
        broadcasts: whether they repeat an operand along a dimension where it has 1, or leading ones that it lacks.

    The rule gets a node, its token axis and the number of kept tokens; it raises `NotTokenLocal` where tokens mix.

    Raises:
        PassError: a target is no operator, or what is registered is no function; and later, where the rule fails or
            gives an answer that does not fit its operator.
    """
    if not targets or any(isinstance(target, FunctionType) for target in targets):
        raise PassError("a rule needs its operators: write @rule(torch.ops.mylib.scale) above the function")
    found = [one for target in targets for one in operators_of(target)]

    def register(function: Rule) -> Rule:
        if not callable(function):
            raise PassError(f"the token rule of {found[0]} is {function!r}: give a function (node, axis, size)")
        own = function.__module__.startswith("tcc.passes.")
        _RULES.update(dict.fromkeys(found, function if own else _checked(function)))
        _BROADCASTING.update(found if broadcasts else ())
        return function

    return register


def _checked(function: Rule) -> Rule:
    """A rule from outside, whose mistakes name the operator."""

    def checked(node: fx.Node, axis: Axis, size: int) -> Narrowing:
        try:
            found = function(node, axis, size)
        except NotTokenLocal:
            raise
        except Exception as error:
            raise _mistake(node, f"raised {type(error).__name__}: {error}") from error
        if not isinstance(found, Narrowing) or not isinstance(found.operands, dict):
            raise _mistake(node, f"returned {found!r}: return Narrowing({{(0,): axis}}), or raise NotTokenLocal")
        given, count = dict(operands(node)), _tokens(node, axis)
        for path, own in found.operands.items():
            if path not in given:
                raise _mistake(node, f"names an operand at {path!r}: its operands stand at {list(given)}")
            sizes = shape(given[path])
            if not isinstance(own, Axis) or not 0 <= own.dim < len(sizes):
                raise _mistake(node, f"answers {own!r} for the operand at {path} of shape {list(sizes)}: give an Axis")
            if own.count(sizes) != count:
                raise _mistake(node, f"finds {own.count(sizes)} tokens, not {count}, in {path}")
        return found

    return checked


def _tokens(node: fx.Node, axis: Axis) -> int:
    """How many tokens the output has; of several outputs, the first that has such an axis."""
    outputs = node.meta["val"] if isinstance(node.meta["val"], (tuple, list)) else [node.meta["val"]]
    return next(axis.count(tuple(one.shape)) for one in outputs if axis.dim < one.dim())


def _mistake(node: fx.Node, what: str) -> PassError:
    return PassError(f"the token rule of {node.target} {what} (node '{node.name}', {source_line(node)})")


def narrowing(node: fx.Node, axis: Axis, size: int) -> Narrowing:
    """How `node` is computed for `size` kept tokens along `axis` of its output.

    Raises:
        NotTokenLocal: the node mixes tokens, or no rule is known for its operator.
    """
    if sized_by_data(node):
        raise NotTokenLocal(f"{node.target} has a size that depends on the data")
    found = pointwise if is_pointwise(node) else _RULES.get(node.target)
    if found is None:
        raise NotTokenLocal(f"no token rule for {node.target} (register one with tcc.passes.token_axis.rule)")
    return found(node, axis, size)


def broadcasts(node: fx.Node, path: Path, dim: int) -> bool:
    """Whether the operand of `node` at `path` may have 1, or nothing, where the result has its dimension `dim`."""
    labels = product(node)
    return is_pointwise(node) or node.target in _BROADCASTING if labels is None else labels.repeats(path, dim)


def is_pointwise(node: fx.Node) -> bool:
    """Whether every element of the value is computed from the elements that broadcasting lines up with it."""
    found = _RULES.get(node.target)
    return found is pointwise or (found is None and torch.Tag.pointwise in getattr(node.target, "tags", ()))


def argument(node: fx.Node, position: int, name: str, default: Any = None) -> Any:
    """An argument by position, or by name."""
    return node.args[position] if len(node.args) > position else node.kwargs.get(name, default)


def own_dim(index: int, rank: int) -> int:
    """A dimension counted from the first."""
    return index % rank if rank else 0


def refuse_own(node: fx.Node, axis: Axis, dims: set[int], verb: str) -> None:
    """Raise `NotTokenLocal` where the token axis is one of `dims`."""
    if axis.dim in dims:
        raise NotTokenLocal(f"{node.target} {verb} the token axis")


def resized(sizes: tuple[int, ...], axis: Axis, size: int) -> list[int]:
    """A shape for `size` kept tokens."""
    new = list(sizes)
    new[axis.dim] = axis.size(size)
    return new


@rule(aten._to_copy.default, aten.clone.default, aten.contiguous.default, aten.alias.default, aten.dropout.default,
      aten.zeros_like.default, aten.ones_like.default, aten.empty_like.default, aten.full_like.default,
      aten.polar.default, aten.complex.default)  # fmt: skip
def pointwise(node: fx.Node, axis: Axis, size: int) -> Narrowing:
    """Broadcasting: an operand carries the tokens where its aligned dimension is not of size 1."""
    if isinstance(node.meta["val"], (tuple, list)):
        raise NotTokenLocal(f"{node.target} has several outputs")
    rank, found = len(shape(node)), {}
    for path, operand in operands(node):
        sizes = shape(operand)
        dim = axis.dim - (rank - len(sizes))
        if dim >= 0 and sizes[dim] != 1:
            found[path] = axis.at(dim)
    return Narrowing(found)
