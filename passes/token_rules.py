"""Token rules of operators that compute: products, norms, reductions, attention."""

from __future__ import annotations

from typing import Any

import torch
from torch import fx

from tcc.passes.graph import shape, value
from tcc.passes.paths import Path, at, operands
from tcc.passes.products import product
from tcc.passes.token_axis import Narrowing, NotTokenLocal, argument, own_dim, refuse_own, rule
from tcc.passes.tokens import Axis

aten = torch.ops.aten


@rule(aten.linear.default, aten.view_as_complex.default, aten.view_as_real.default)
def _linear(node: fx.Node, axis: Axis, size: int) -> Narrowing:
    refuse_own(node, axis, {len(shape(node)) - 1}, "mixes")
    return Narrowing({(0,): axis})


@rule(aten.mm.default, aten.bmm.default, aten.matmul.default, aten.addmm.default, aten.baddbmm.default,
      aten.outer.default, aten.einsum.default)  # fmt: skip
def _product(node: fx.Node, axis: Axis, size: int) -> Narrowing:
    """A factor carries the tokens where its label is that of the result's token dimension."""
    labels = product(node)
    if labels is None:
        raise NotTokenLocal(f"{node.target} '{node.args[0]}' takes a diagonal")
    label, found = labels.result[axis.dim], {}
    for path, own in (labels.factors | labels.addend).items():
        dim = own.find(label)
        if dim >= 0 and shape(at(node, path))[dim] != 1:
            found[path] = axis.at(dim)
    return Narrowing(found)


@rule(aten.layer_norm.default, aten.rms_norm.default, aten.group_norm.default)
def _norm(node: fx.Node, axis: Axis, size: int) -> Narrowing:
    rank = len(shape(node))
    first = 1 if node.target == aten.group_norm.default else rank - len(node.args[1])  # type: ignore[arg-type]
    refuse_own(node, axis, set(range(first, rank)), "normalises over")
    return Narrowing({(0,): axis})


#: Operators that mix one dimension, or several, and where the call names it.
_ALONG: dict[Any, tuple[int, str, Any]] = {
    aten.softmax.int: (1, "dim", -1),
    aten._softmax.default: (1, "dim", -1),
    aten.log_softmax.int: (1, "dim", -1),
    aten.cumsum.default: (1, "dim", -1),
    aten.cumprod.default: (1, "dim", -1),
    aten.flip.default: (1, "dims", ()),
    aten.roll.default: (2, "dims", ()),
    aten.topk.default: (2, "dim", -1),
    aten.sort.default: (1, "dim", -1),
    aten.sort.stable: (1, "dim", -1),
    aten.argsort.default: (1, "dim", -1),
    aten.kthvalue.default: (2, "dim", -1),
}


@rule(*_ALONG)
def _along_dim(node: fx.Node, axis: Axis, size: int) -> Narrowing:
    rank = len(shape(node.args[0]))  # type: ignore[arg-type]
    where = argument(node, *_ALONG[node.target])
    # a roll without dims is one of all elements
    dims = {own_dim(d, rank) for d in ([where] if isinstance(where, int) else where)} or {axis.dim}
    if node.target == aten.kthvalue.default and not argument(node, 3, "keepdim", False):
        return Narrowing({(0,): axis.at(axis.dim + (axis.dim >= min(dims)))})
    refuse_own(node, axis, dims, "mixes")
    return Narrowing({(0,): axis})


@rule(aten.gather.default, aten.scatter.src, aten.scatter.value, aten.scatter_add.default, aten.scatter_reduce.two)
def _by_index(node: fx.Node, axis: Axis, size: int) -> Narrowing:
    """Elements are read or written where a second value says, along another dimension than that of the tokens."""
    refuse_own(node, axis, {own_dim(argument(node, 1, "dim", 0), len(shape(node)))}, "looks up")
    found = {path: axis for path, _ in operands(node)}
    if any(shape(operand)[axis.dim] != shape(node)[axis.dim] for _, operand in operands(node)):
        raise NotTokenLocal(f"{node.target} takes a part of the token axis")
    return Narrowing(found)


#: Convolutions, and how many dimensions they go over; None for all but samples and channels.
_CONVOLUTIONS: dict[Any, int | None] = {
    aten.conv1d.default: 1, aten.conv1d.padding: 1, aten.conv2d.default: 2, aten.conv2d.padding: 2,
    aten.conv3d.default: 3, aten.conv3d.padding: 3, aten.convolution.default: None,
}  # fmt: skip


@rule(*_CONVOLUTIONS)
def _convolution(node: fx.Node, axis: Axis, size: int) -> Narrowing:
    """Each element alone where the kernel has size 1, stride 1 and no padding there; samples are always apart."""
    rank = len(shape(node))
    over = _CONVOLUTIONS[node.target] or rank - 2
    first = rank - over
    refuse_own(node, axis, {first - 1}, "makes")
    if axis.dim >= first:
        at = axis.dim - first
        kernel = shape(node.args[1])[2 + at]  # type: ignore[arg-type]
        steps = [argument(node, place, name, one) for place, name, one in ((3, "stride", 1), (4, "padding", 0))]
        stride, padding = (s if isinstance(s, (int, str)) else s[at % len(s)] for s in steps)
        if kernel != 1 or stride != 1 or padding not in (0, "same", "valid"):
            raise NotTokenLocal(f"{node.target} convolves over the token axis")
    return Narrowing({(0,): axis})


@rule(torch.ops.higher_order.flex_attention)
def _flex_attention(node: fx.Node, axis: Axis, size: int) -> Narrowing:
    raise NotTokenLocal(f"{node.target} gives its functions the positions of the tokens")


@rule(aten.mean.dim, aten.sum.dim_IntList, aten.amax.default, aten.amin.default, aten.var.correction,
      aten.linalg_vector_norm.default, aten.std.correction, aten.logsumexp.default, aten.prod.dim_int,
      aten.max.dim, aten.min.dim, aten.argmax.default, aten.argmin.default, aten.std.dim, aten.var.dim,
      aten.std_mean.dim, aten.std_mean.correction, aten.var_mean.dim, aten.var_mean.correction, aten.any.dim,
      aten.all.dim, aten.median.dim, aten.norm.ScalarOpt_dim)  # fmt: skip
def _reduce(node: fx.Node, axis: Axis, size: int) -> Narrowing:
    rank = len(shape(node.args[0]))  # type: ignore[arg-type]
    after = node.target in (aten.linalg_vector_norm.default, aten.norm.ScalarOpt_dim)
    dims = argument(node, 2 if after else 1, "dim")
    if dims is None or dims == []:
        raise NotTokenLocal(f"{node.target} reduces over all dimensions")
    gone = {own_dim(d, rank) for d in ([dims] if isinstance(dims, int) else dims)}
    result = value(node)
    if (result[0] if isinstance(result, tuple) else result).dim() == rank:
        refuse_own(node, axis, gone, "reduces over")
        return Narrowing({(0,): axis})
    kept = [d for d in range(rank) if d not in gone]
    return Narrowing({(0,): axis.at(kept[axis.dim])})


@rule(aten.embedding.default)
def _embedding(node: fx.Node, axis: Axis, size: int) -> Narrowing:
    refuse_own(node, axis, {len(shape(node)) - 1}, "makes")
    return Narrowing({(1,): axis})


@rule(aten.scaled_dot_product_attention.default, broadcasts=True)
def _attention(node: fx.Node, axis: Axis, size: int) -> Narrowing:
    """Queries are token-local: keys and values are used whole."""
    rank = len(shape(node))
    mask = argument(node, 3, "attn_mask")
    mask_path: Path = (3,) if len(node.args) > 3 else ("attn_mask",)
    refuse_own(node, axis, {rank - 1}, "makes")
    found: dict[Path, Axis] = {(0,): axis}
    if axis.dim == rank - 2:
        if argument(node, 5, "is_causal", False):
            raise NotTokenLocal("causal attention depends on the positions of the tokens")
    else:
        found |= {(i,): axis for i in (1, 2)}
    found = {path: axis for path, axis in found.items() if shape(at(node, path))[axis.dim] == shape(node)[axis.dim]}
    if isinstance(mask, fx.Node):
        dim = axis.dim - (rank - len(shape(mask)))
        if dim >= 0 and shape(mask)[dim] != 1:
            found[mask_path] = axis.at(dim)
    return Narrowing(found)
