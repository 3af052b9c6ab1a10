"""Write complex numbers as pairs of real ones, for what runs graphs of real numbers alone."""

from __future__ import annotations

import operator
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import fx

from tcc.passes.base import Pass
from tcc.passes.graph import emit, shape, value
from tcc.passes.token_axis import argument

__all__ = ["SplitComplex", "has_complex"]

aten = torch.ops.aten
_REAL = {torch.complex32: torch.float16, torch.complex64: torch.float32, torch.complex128: torch.float64}


@dataclass(frozen=True)
class SplitComplex(Pass):
    """Compute with pairs `[..., 2]`, of real and imaginary parts, in place of complex values `[...]`.

    Before: `view_as_real(view_as_complex(x) * z)`, a rotary embedding, with `x` of shape `[B, S, H, d, 2]`
    After:  `stack([x0 * z0 - x1 * z1, x0 * z1 + x1 * z0], -1)` with `x0 = select(x, -1, 0)` and so on

    1. A weight becomes a weight of pairs, on the same memory.
    2. A real value is replaced where everything complex that it is computed from has a rule below. Where something has
       none, or is an input of the model, that value stays as it was.
    """

    def run(self, gm: fx.GraphModule) -> int:
        """Edit `gm`; see the class."""
        edit = _Edit(gm)
        return sum(edit.visit(node) for node in list(gm.graph.nodes))


def has_complex(graph: fx.Graph) -> bool:
    """Whether a value of the graph is complex."""
    return any(_is_complex(_first(node)) for node in graph.nodes)


@dataclass
class _Edit:
    """One run of the pass over one graph."""

    gm: fx.GraphModule
    pairs: dict[fx.Node, fx.Node] = field(default_factory=dict)

    def visit(self, node: fx.Node) -> bool:
        """Find the pairs of a complex value, or replace a real one that is computed from some."""
        complex_inputs = [n for n in node.all_input_nodes if _is_complex(_first(n))]
        if node.op == "get_attr" and _is_complex(_first(node)):
            self.pairs[node] = self._weight(node)
        if node.op != "call_function" or not (complex_inputs or _is_complex(_first(node))):
            return False
        if node.target not in _RULES or any(n not in self.pairs for n in complex_inputs):
            return False
        with self.gm.graph.inserting_before(node):
            new = _RULES[node.target](self, node)
        if new is None or _first(new).dtype != _REAL.get(_first(node).dtype, _first(node).dtype):
            return False  # numbers without dimensions do not widen others, and their pairs do
        if _is_complex(_first(node)):
            self.pairs[node] = new
            return False
        node.replace_all_uses_with(new)
        return True

    def _weight(self, node: fx.Node) -> fx.Node:
        name = f"pairs_of_{str(node.target).replace('.', '_')}"  # captured names begin otherwise
        self.gm.register_buffer(name, torch.view_as_real(getattr(self.gm, str(node.target)).detach().resolve_conj()))
        with self.gm.graph.inserting_after(node):
            new = self.gm.graph.get_attr(name)
        new.meta = {**node.meta, "val": torch.view_as_real(value(node).resolve_conj())}
        if "weight" in node.meta:
            new.meta["weight"] = f"{node.meta['weight']}.pairs"
        return new

    def call(self, like: fx.Node, target: Any, *args: Any, **kwargs: Any) -> fx.Node:
        """A new call, in the place of `like`."""
        return emit(self.gm.graph, target, args, kwargs, like=like)

    def again(self, node: fx.Node, args: tuple[Any, ...]) -> fx.Node | None:
        """The call of `node` with these arguments, on pairs; None where real numbers are among the complex ones."""
        if any(n not in self.pairs and _first(n).is_floating_point() for n in node.all_input_nodes):
            return None
        given, kwargs = fx.map_arg((args, node.kwargs), lambda n: self.pairs.get(n, n))
        return self.call(node, node.target, *given, **kwargs)

    def over_pairs(self, like: fx.Node, x: fx.Node) -> fx.Node:
        """The pairs of a complex value, or a real value for both parts of each."""
        if x in self.pairs or not shape(x):
            return self.pairs.get(x, x)
        return self.call(like, aten.unsqueeze.default, x, -1)

    def parts(self, node: fx.Node, pair: fx.Node) -> tuple[fx.Node, fx.Node]:
        """Real and imaginary part of a pair."""
        real, imaginary = (self.call(node, aten.select.int, pair, -1, part) for part in (0, 1))
        return real, imaginary

    def joined(self, node: fx.Node, real: fx.Node, imaginary: fx.Node) -> fx.Node:
        """The pair of two parts."""
        return self.call(node, aten.stack.default, [real, imaginary], -1)


Rule = Callable[[_Edit, fx.Node], fx.Node | None]
_RULES: dict[Any, Rule] = {}


def _rule(*targets: Any) -> Callable[[Rule], Rule]:
    def register(function: Rule) -> Rule:
        _RULES.update(dict.fromkeys(targets, function))
        return function

    return register


def _first(node: fx.Node) -> Any:
    """The value, or the first of several: an operator's are all of one dtype."""
    found = node.meta.get("val")
    return found[0] if isinstance(found, (tuple, list)) and found else found


def _is_complex(found: Any) -> bool:
    return isinstance(found, torch.Tensor) and found.is_complex()


# --- where complex numbers begin and end


@_rule(aten.view_as_complex.default)
def _from_pairs(edit: _Edit, node: fx.Node) -> fx.Node | None:
    x: Any = node.args[0]
    return x  # type: ignore[no-any-return]


@_rule(aten.view_as_real.default)
def _to_pairs(edit: _Edit, node: fx.Node) -> fx.Node | None:
    return edit.pairs[node.all_input_nodes[0]]


@_rule(aten.real.default, aten.imag.default)
def _part(edit: _Edit, node: fx.Node) -> fx.Node | None:
    return edit.parts(node, edit.pairs[node.all_input_nodes[0]])[node.target is aten.imag.default]


@_rule(aten.complex.default)
def _from_parts(edit: _Edit, node: fx.Node) -> fx.Node | None:
    real, imaginary = (edit.call(node, aten.expand.default, part, list(shape(node))) for part in node.args)
    return edit.joined(node, real, imaginary)


@_rule(aten.polar.default)
def _from_angles(edit: _Edit, node: fx.Node) -> fx.Node | None:
    length, angle = node.args
    parts = (edit.call(node, target, angle) for target in (aten.cos.default, aten.sin.default))
    real, imaginary = (edit.call(node, aten.mul.Tensor, length, part) for part in parts)
    return edit.joined(node, real, imaginary)


@_rule(aten._to_copy.default)
def _cast(edit: _Edit, node: fx.Node) -> fx.Node | None:
    x: Any = node.args[0]
    if x not in edit.pairs or not _is_complex(value(node)):  # from or to real numbers
        return None
    kwargs = {**node.kwargs, **({"dtype": _REAL[value(node).dtype]} if "dtype" in node.kwargs else {})}
    return edit.call(node, node.target, edit.pairs[x], **kwargs)


# --- arithmetic


@_rule(aten.mul.Tensor, aten.div.Tensor)
def _product(edit: _Edit, node: fx.Node) -> fx.Node | None:
    a, b = node.args
    if not (isinstance(a, fx.Node) and isinstance(b, fx.Node)):
        return None if isinstance(b, complex) else _alike(edit, node)  # by a real number
    if not (a in edit.pairs and b in edit.pairs):
        dividing = b in edit.pairs and node.target is aten.div.Tensor
        return None if dividing else edit.call(node, node.target, edit.over_pairs(node, a), edit.over_pairs(node, b))
    if node.target is aten.div.Tensor:
        return None
    (a0, a1), (b0, b1) = edit.parts(node, edit.pairs[a]), edit.parts(node, edit.pairs[b])
    products = [edit.call(node, aten.mul.Tensor, *pair) for pair in ((a0, b0), (a1, b1), (a0, b1), (a1, b0))]
    real = edit.call(node, aten.sub.Tensor, products[0], products[1])
    return edit.joined(node, real, edit.call(node, aten.add.Tensor, products[2], products[3]))


@_rule(aten.add.Tensor, aten.sub.Tensor)
def _sum(edit: _Edit, node: fx.Node) -> fx.Node | None:
    real = isinstance(node.kwargs.get("alpha", 1), (int, float))
    return _alike(edit, node) if real and all(x in edit.pairs for x in node.args) else None


@_rule(aten._conj.default, aten._conj_physical.default, aten.conj_physical.default)
def _conjugate(edit: _Edit, node: fx.Node) -> fx.Node | None:
    real, imaginary = edit.parts(node, edit.pairs[node.all_input_nodes[0]])
    return edit.joined(node, real, edit.call(node, aten.neg.default, imaginary))


# --- what moves values


@_rule(operator.getitem, aten.neg.default, aten.clone.default, aten.alias.default, aten.index.Tensor,
       aten.resolve_conj.default)  # fmt: skip
def _alike(edit: _Edit, node: fx.Node) -> fx.Node | None:
    """The same call on pairs: it says nothing of dimensions, or counts them from the first."""
    return edit.again(node, node.args)


@_rule(aten.pad_sequence.default)
def _padded(edit: _Edit, node: fx.Node) -> fx.Node | None:
    filling = argument(node, 2, "padding_value", 0.0)
    return _alike(edit, node) if filling == 0 else None


def _along(position: int, *others: int, made: bool = False) -> Rule:
    """Of a call with dimensions at these positions; they are those of what is `made`, or of what is given."""

    def rule(edit: _Edit, node: fx.Node) -> fx.Node | None:
        rank, args = len(shape(node if made else node.all_input_nodes[0])), list(node.args)
        for each in (position, *others):
            if each < len(args):  # else the first dimension
                dims: Any = args[each]
                args[each] = [dim % rank for dim in dims] if isinstance(dims, (list, tuple)) else dims % rank
        return edit.again(node, tuple(args))

    return rule


def _sized(last: int | None) -> Rule:
    """Of a call that says something of every dimension: of the pairs it says `last`, or that they stay last."""

    def rule(edit: _Edit, node: fx.Node) -> fx.Node | None:
        x, given, *rest = node.args
        sizes: Any = given
        rank = len(shape(node))
        own = [dim % rank for dim in sizes] + [rank] if last is None else [*sizes, last]
        return edit.again(node, (x, own, *rest))

    return rule


_RULES |= {
    aten.slice.Tensor: _along(1),
    aten.select.int: _along(1),
    aten.unbind.int: _along(1),
    aten.squeeze.dim: _along(1),
    aten.squeeze.dims: _along(1),
    aten.index_select.default: _along(1),
    aten.flip.default: _along(1),
    aten.transpose.int: _along(1, 2),
    aten.split.Tensor: _along(2),
    aten.split_with_sizes.default: _along(2),
    aten.chunk.default: _along(2),
    aten.unsqueeze.default: _along(1, made=True),
    aten.cat.default: _along(1, made=True),
    aten.stack.default: _along(1, made=True),
    aten.reshape.default: _sized(2),
    aten.view.default: _sized(2),
    aten.expand.default: _sized(2),
    aten.repeat.default: _sized(1),
    aten.permute.default: _sized(None),
}
