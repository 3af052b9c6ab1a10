"""Token rules by brute force: computing on the kept tokens equals keeping the tokens of the full result."""

from __future__ import annotations

import operator
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, fx
from torch.utils import _pytree as pytree

from tcc.passes.token_axis import Narrowing, NotTokenLocal, narrowing, operands
from tcc.passes.tokens import Axis
from tests.graphs import Sketch, take

aten = torch.ops.aten
KEPT = [0, 2, 3]
S = 5  # tokens


def call(target: Any, *args: Any, **kwargs: Any) -> Callable[[Sketch, list[fx.Node]], fx.Node]:
    """A call whose integer-named inputs `In(i)` are the sketch's inputs."""

    def build(sketch: Sketch, inputs: list[fx.Node]) -> fx.Node:
        filled = pytree.tree_map(lambda a: inputs[a.at] if isinstance(a, In) else a, (args, kwargs))
        return sketch.call(target, *filled[0], **filled[1])

    return build


class In:
    """Stands for an input of the sketch."""

    def __init__(self, at: int) -> None:
        self.at = at


X, Y, Z, M = In(0), In(1), In(2), In(3)
T1, T2, T0, JOINED = Axis(1), Axis(2), Axis(0), Axis(1, before=1, after=2)

#: name: (call, input shapes, token axis of the output)
LOCAL: dict[str, tuple[Any, list[tuple[int, ...]], Axis]] = {
    "unary": (call(aten.gelu.default, X), [(2, S, 3)], T1),
    "add": (call(aten.add.Tensor, X, Y), [(2, S, 3), (2, S, 3)], T1),
    "add a bias": (call(aten.add.Tensor, X, Y), [(2, S, 3), (3,)], T1),
    "multiply by a gate per sample": (call(aten.mul.Tensor, X, Y), [(2, S, 3), (2, 1, 3)], T1),
    "add positions": (call(aten.add.Tensor, Y, X), [(2, S, 3), (1, S, 3)], T1),
    "add positions without a batch": (call(aten.add.Tensor, X, Y), [(2, S, 3), (S, 3)], T1),
    "rotary table": (call(aten.mul.Tensor, X, Y), [(2, 4, S, 3), (S, 3)], T2),
    "where": (call(aten.where.self, In(3), X, Y), [(2, S, 3), (2, S, 3), (1,), (2, S, 1)], T1),
    "lerp": (call(aten.lerp.Tensor, X, Y, Z), [(2, S, 3), (2, S, 3), (3,)], T1),
    "cast": (call(aten._to_copy.default, X, dtype=torch.float64), [(2, S, 3)], T1),
    "clone": (call(aten.clone.default, X), [(2, S, 3)], T1),
    "linear": (call(aten.linear.default, X, Y, Z), [(2, S, 3), (4, 3), (4,)], T1),
    "linear without bias": (call(aten.linear.default, X, Y), [(2, S, 3), (4, 3)], T1),
    "linear on batch x tokens": (call(aten.linear.default, X, Y), [(2 * S, 3), (4, 3)], Axis(0, 2)),
    "mm rows": (call(aten.mm.default, X, Y), [(S, 3), (3, 4)], T0),
    "mm columns": (call(aten.mm.default, X, Y), [(4, 3), (3, S)], T1),
    "bmm rows": (call(aten.bmm.default, X, Y), [(2, S, 3), (2, 3, 4)], T1),
    "bmm columns": (call(aten.bmm.default, X, Y), [(2, 4, 3), (2, 3, S)], T2),
    "bmm batch": (call(aten.bmm.default, X, Y), [(S, 2, 3), (S, 3, 4)], T0),
    "matmul rows": (call(aten.matmul.default, X, Y), [(2, 4, S, 3), (3, 6)], T2),
    "matmul, broadcast batch": (call(aten.matmul.default, X, Y), [(1, S, 3), (2, 3, 4)], T1),
    "matmul batch": (call(aten.matmul.default, X, Y), [(2, S, 4, 3), (3, 6)], T1),
    "addmm": (call(aten.addmm.default, X, Y, Z), [(4,), (S, 3), (3, 4)], T0),
    "addmm, bias per token": (call(aten.addmm.default, X, Y, Z), [(S, 4), (S, 3), (3, 4)], T0),
    "baddbmm": (call(aten.baddbmm.default, X, Y, Z), [(2, S, 4), (2, S, 3), (2, 3, 4)], T1),
    "layer norm": (call(aten.layer_norm.default, X, [3], Y, Z), [(2, S, 3), (3,), (3,)], T1),
    "rms norm": (call(aten.rms_norm.default, X, [3], Y), [(2, S, 3), (3,)], T1),
    "softmax over channels": (call(aten.softmax.int, X, -1), [(2, S, 3)], T1),
    "softmax over keys": (call(aten._softmax.default, X, 3, False), [(2, 4, S, 6)], T2),
    "flip channels": (call(aten.flip.default, X, [2]), [(2, S, 3)], T1),
    "roll channels": (call(aten.roll.default, X, [1], [2]), [(2, S, 3)], T1),
    "cumsum of channels": (call(aten.cumsum.default, X, 2), [(2, S, 3)], T1),
    "mean of channels, kept": (call(aten.mean.dim, X, [-1], True), [(2, S, 3)], T1),
    "mean of channels, dropped": (call(aten.mean.dim, X, [-1]), [(2, S, 3)], T1),
    "sum over batch": (call(aten.sum.dim_IntList, X, [0]), [(2, S, 3)], T0),
    "amax": (call(aten.amax.default, X, [2]), [(2, S, 3)], T1),
    "variance": (call(aten.var.correction, X, [2], correction=0, keepdim=True), [(2, S, 3)], T1),
    "transpose tokens": (call(aten.transpose.int, X, 1, 2), [(2, S, 4, 3)], T2),
    "transpose others": (call(aten.transpose.int, X, -1, 0), [(2, S, 3)], T1),
    "permute": (call(aten.permute.default, X, [2, 0, 3, 1, 4]), [(2, S, 3, 4, 6)], Axis(3)),
    "t": (call(aten.t.default, X), [(S, 3)], T1),
    "unsqueeze before": (call(aten.unsqueeze.default, X, 1), [(2, S, 3)], T2),
    "unsqueeze behind": (call(aten.unsqueeze.default, X, -1), [(2, S, 3)], T1),
    "squeeze": (call(aten.squeeze.dim, X, 1), [(2, 1, S, 3)], T1),
    "squeeze a dimension that is not 1": (call(aten.squeeze.dim, X, 0), [(2, S, 3)], T1),
    "squeeze several": (call(aten.squeeze.dims, X, [0, 2]), [(1, S, 1, 3)], T0),
    "select before": (call(aten.select.int, X, 0, 1), [(3, 2, S, 4)], T1),
    "select behind": (call(aten.select.int, X, 2, 0), [(2, S, 3)], T1),
    "unbind": (call(aten.unbind.int, X), [(3, 2, S, 4)], T1),
    "unbind behind": (call(aten.unbind.int, X, 2), [(2, S, 3, 4)], T1),
    "slice": (call(aten.slice.Tensor, X, 2, 1, 3), [(2, S, 4)], T1),
    "split": (call(aten.split.Tensor, X, 2, -1), [(2, S, 4)], T1),
    "split with sizes": (call(aten.split_with_sizes.default, X, [1, 3], 2), [(2, S, 4)], T1),
    "chunk": (call(aten.chunk.default, X, 2, 2), [(2, S, 4)], T1),
    "chunk the batch": (call(aten.chunk.default, X, 2), [(2, S, 4)], T1),
    "index_select of channels": (call(aten.index_select.default, X, 2, In(1)), [(2, S, 4), (-2,)], T1),
    "pad channels": (call(aten.constant_pad_nd.default, X, [1, 2]), [(2, S, 4)], T1),
    "cat channels": (call(aten.cat.default, [X, Y], -1), [(2, S, 4), (2, S, 3)], T1),
    "cat channels of heads": (call(aten.cat.default, [X, Y], 3), [(2, 4, S, 1), (2, 4, S, 2)], T2),
    "slice off others before": (call(aten.slice.Tensor, X, 1, 3), [(2, 3 + S, 3)], T1),
    "slice off others after": (call(aten.slice.Tensor, X, 1, 0, S), [(2, S + 4, 3)], T1),
    "slice off from the end": (call(aten.slice.Tensor, X, -2, -S - 2, -2), [(2, 5 + S, 3)], T1),
    "slice off some of the others": (call(aten.slice.Tensor, X, 1, 2, 2**63 - 1), [(2, S + 7, 3)], Axis(1, 1, 1, 1, 4)),
    "others with the tokens": (call(aten.linear.default, X, Y), [(2 * (S + 3), 3), (4, 3)], Axis(0, 2, 1, 1, 2)),
    "a view of others with the tokens": (call(aten.view.default, X, [2, S + 3, 3, 4]), [(2, S + 3, 12)], JOINED),
    "join others": (call(aten.cat.default, [X, Y, Z], 1), [(2, 1, 3), (2, S, 3), (2, 2, 3)], JOINED),
    "join more others": (call(aten.cat.default, [X, Y], -2), [(2, S + 1, 3), (2, 2, 3)], JOINED),
    "stack before": (call(aten.stack.default, [X, Y], 0), [(2, S, 3), (2, S, 3)], T2),
    "stack behind": (call(aten.stack.default, [X, Y], -1), [(2, S, 3), (2, S, 3)], T1),
    "expand heads": (call(aten.expand.default, X, [2, 4, S, 3]), [(2, 1, S, 3)], T2),
    "expand with kept sizes": (call(aten.expand.default, X, [-1, 4, -1, -1]), [(2, 1, S, 3)], T2),
    "split heads": (call(aten.view.default, X, [2, S, 3, 4]), [(2, S, 12)], T1),
    "split heads, tokens left open": (call(aten.view.default, X, [2, -1, 3, 4]), [(2, S, 12)], T1),
    "merge heads": (call(aten.reshape.default, X, [2, S, 12]), [(2, S, 3, 4)], T1),
    "merge batch and tokens": (call(aten.view.default, X, [2 * S, 3]), [(2, S, 3)], Axis(0, 2)),
    "split batch and tokens": (call(aten.view.default, X, [2, S, 3]), [(2 * S, 3)], T1),
    "merge tokens and channels": (call(aten.view.default, X, [2, S * 3]), [(2, S, 3)], Axis(1, 1, 3)),
    "split tokens and channels": (call(aten.view.default, X, [2, S, 3]), [(2, S * 3)], T1),
    "merge batch and heads": (call(aten.view.default, X, [8, S, 3]), [(2, 4, S, 3)], T1),
    "as many channels as tokens": (call(aten.view.default, X, [S, S, S]), [(S, S, S)], T1),
    "batch as large as the tokens": (call(aten.view.default, X, [S * S, 3]), [(S, S, 3)], Axis(0, S)),
    "through a dimension of 1": (call(aten.view.default, X, [1, S, 1, 3]), [(1, 1, S, 3)], T1),
    "repeat the batch": (call(aten.repeat.default, X, [2, 1, 1]), [(2, S, 3)], T1),
    "repeat to a new batch": (call(aten.repeat.default, X, [4, 1, 1]), [(S, 3)], T1),
    "repeat_interleave": (call(aten.repeat_interleave.self_int, X, 2, 0), [(2, S, 3)], T1),
    "embedding": (call(aten.embedding.default, X, In(1)), [(6, 3), (-2, S)], T1),
    "einsum rows": (call(aten.einsum.default, "bqhd,bkhd->bhqk", [X, Y]), [(2, S, 4, 3), (2, 6, 4, 3)], T2),
    "einsum columns": (call(aten.einsum.default, "bqhd,bkhd->bhqk", [X, Y]), [(2, 6, 4, 3), (2, S, 4, 3)], Axis(3)),
    "einsum batch": (call(aten.einsum.default, "bij,bjk->bik", [X, Y]), [(S, 2, 3), (S, 3, 4)], T0),
    "einsum, open": (call(aten.einsum.default, "...ij, kj -> ...ik", [X, Y]), [(2, S, 4, 3), (6, 3)], T1),
    "einsum of three": (call(aten.einsum.default, "ni,ij,nj->n", [X, Y, Z]), [(S, 2), (2, 3), (S, 3)], T0),
    "matrix by vector": (call(aten.matmul.default, X, Y), [(2, S, 3), (3,)], T1),
    "outer": (call(aten.outer.default, X, Y), [(S,), (4,)], T0),
    "baddbmm, broadcast": (call(aten.baddbmm.default, X, Y, Z), [(S, 1), (2, S, 3), (2, 3, 4)], T1),
    "deviation of channels": (call(aten.std.correction, X, [-1], correction=0), [(2, S, 3)], T1),
    "logsumexp of channels": (call(aten.logsumexp.default, X, [2], True), [(2, S, 3)], T1),
    "product of channels": (call(aten.prod.dim_int, X, -1), [(2, S, 3)], T1),
    "highest channel": (call(aten.max.dim, X, -1), [(2, S, 3)], T1),
    "highest of the batch": (call(aten.min.dim, X, 0), [(2, S, 3)], T0),
    "place of the highest": (call(aten.argmax.default, X, -1, True), [(2, S, 3)], T1),
    "squeeze all": (call(aten.squeeze.default, X), [(1, S, 1, 3)], T0),
    "pad by mode": (call(aten.pad.default, X, [1, 2], "constant", 1.0), [(2, S, 4)], T1),
    "unsafe split": (call(aten.unsafe_split.Tensor, X, 2, -1), [(2, S, 4)], T1),
    "gated halves": (call(aten.glu.default, X), [(2, S, 4)], T1),
    "select_scatter": (call(aten.select_scatter.default, X, Y, 0, 1), [(2, S, 4), (S, 4)], T1),
    "select_scatter behind": (call(aten.select_scatter.default, X, Y, 2, 0), [(2, S, 4), (2, S)], T1),
    "look up channels": (call(aten.index.Tensor, X, [None, None, In(1)]), [(2, S, 4), (-2, 3)], T1),
    "look up samples": (call(aten.index.Tensor, X, [In(1)]), [(2, S, 4), (-2, 3)], T2),
    "look up samples, one each": (call(aten.index.Tensor, X, [In(1)]), [(2, S, 4), (-2,)], T1),
    "group norm of rows": (call(aten.group_norm.default, X, 2), [(S, 4)], T0),
    "tile": (call(aten.tile.default, X, [2]), [(2, S, 3)], T1),
    "tile to a new batch": (call(aten.tile.default, X, [2, 1, 1]), [(S, 3)], T1),
    "deviation of channels, plain": (call(aten.std.dim, X, [-1], True, True), [(2, S, 3)], T1),
    "variance of channels": (call(aten.var.dim, X, [2]), [(2, S, 3)], T1),
    "variance and mean": (call(aten.var_mean.correction, X, [-1], keepdim=True), [(2, S, 3)], T1),
    "deviation and mean": (call(aten.std_mean.dim, X, [0]), [(2, S, 3)], T0),
    "any channel": (call(aten.any.dim, X, 2), [(2, S, 3)], T1),
    "middle channel": (call(aten.median.dim, X, 0), [(2, S, 3)], T0),
    "norm of channels": (call(aten.norm.ScalarOpt_dim, X, 1, [-1], True), [(2, S, 3)], T1),
    "largest channels": (call(aten.topk.default, X, 2), [(2, S, 4)], T1),
    "largest of the batch": (call(aten.topk.default, X, 1, 0), [(2, S, 4)], T1),
    "sorted channels": (call(aten.sort.stable, X, stable=True, dim=-1), [(2, S, 4)], T1),
    "order of channels": (call(aten.argsort.default, X, -1, True), [(2, S, 4)], T1),
    "third channel": (call(aten.kthvalue.default, X, 3), [(2, S, 4)], T1),
    "third of another dimension": (call(aten.kthvalue.default, X, 2, 1), [(2, 3, S)], T1),
    "product of channels so far": (call(aten.cumprod.default, X, 2), [(2, S, 4)], T1),
    "pick channels": (call(aten.gather.default, X, 2, In(1)), [(2, S, 4), (-2, S, 2)], T1),
    "write channels": (call(aten.scatter.src, X, 2, In(1), Z), [(2, S, 4), (-2, S, 1), (2, S, 1)], T1),
    "write a number": (call(aten.scatter.value, X, -1, In(1), 3.0), [(2, S, 4), (-2, S, 1)], T1),
    "add to channels": (call(aten.scatter_add.default, X, 2, In(1), Z), [(2, S, 4), (-2, S, 3), (2, S, 3)], T1),
    "windows of channels": (call(aten.unfold.default, X, 2, 2, 1), [(2, S, 4)], T1),
    "convolution of channels": (call(aten.conv1d.default, X, Y, Z), [(2, 3, S), (4, 3, 1), (4,)], T2),
    "convolution of the other direction": (
        call(aten.conv2d.default, X, Y, None, [1, 1], [0, 1]),
        [(2, 3, S, 6), (4, 3, 1, 3)],
        T2,
    ),
    "convolution of samples": (
        call(aten.conv2d.padding, X, Y, None, [2, 2], "valid"),
        [(S, 3, 6, 6), (4, 3, 3, 3)],
        T0,
    ),
    "length of channels": (call(aten.linalg_vector_norm.default, X, 2, [-1], True), [(2, S, 3)], T1),
    "slice_scatter of channels": (
        call(aten.slice_scatter.default, X, Y, 2, 0, 4, 2),
        [(2, S, 4), (2, S, 2)],
        T1,
    ),
    "slice_scatter of all tokens": (
        call(aten.slice_scatter.default, X, Y, 1, 1, 2**63 - 1),
        [(2, S + 3, 3), (2, S + 2, 3)],
        JOINED,
    ),
    "slice_scatter of the tokens alone": (
        call(aten.slice_scatter.default, X, Y, 1, 1, -2),
        [(2, S + 3, 3), (2, S, 3)],
        JOINED,
    ),
    "slice_scatter before the tokens": (
        call(aten.slice_scatter.default, X, Y, 1, 0, 1),
        [(2, S + 3, 3), (2, 1, 3)],
        JOINED,
    ),
    "slice_scatter after the tokens": (
        call(aten.slice_scatter.default, X, Y, 1, S + 1, S + 3),
        [(2, S + 3, 3), (2, 2, 3)],
        JOINED,
    ),
    "pairs as complex": (call(aten.view_as_complex.default, X), [(2, S, 3, 2)], T1),
    "empty_like, filled": (call(aten.full_like.default, X, 3.0), [(2, S, 3)], T1),
    "polar": (call(aten.polar.default, X, Y), [(S, 3), (S, 3)], T0),
    "complex": (call(aten.complex.default, X, Y), [(S, 3), (S, 3)], T0),
    "attention, queries": (
        call(aten.scaled_dot_product_attention.default, X, Y, Z),
        [(2, 4, S, 8), (2, 4, 6, 8), (2, 4, 6, 8)],
        T2,
    ),
    "attention, mask per query": (
        call(aten.scaled_dot_product_attention.default, X, Y, Z, M),
        [(2, 4, S, 8), (2, 4, 6, 8), (2, 4, 6, 8), (2, 1, S, 6)],
        T2,
    ),
    "attention, mask for all queries": (
        call(aten.scaled_dot_product_attention.default, X, Y, Z, attn_mask=M),
        [(2, 4, S, 8), (2, 4, 6, 8), (2, 4, 6, 8), (2, 1, 1, 6)],
        T2,
    ),
    "attention, tokens as batch": (
        call(aten.scaled_dot_product_attention.default, X, Y, Z),
        [(S, 4, 7, 8), (S, 4, 6, 8), (S, 4, 6, 8)],
        T0,
    ),
}


def sketched(name: str) -> tuple[fx.Node, list[fx.Node], Axis]:
    """The node, its input nodes, and the token axis of its output; a size of -2 stands for 2, of integers."""
    build, shapes, axis = LOCAL[name]
    sketch = Sketch()
    inputs = []
    for i, sizes in enumerate(shapes):
        kind = torch.int64 if sizes[0] == -2 else torch.bool if name == "where" and i == 3 else torch.float64
        inputs.append(sketch.input("xyzm"[i], *map(abs, sizes), dtype=kind))
    return build(sketch, inputs), inputs, axis


def real(node: fx.Node, seed: int) -> Tensor:
    """Real data for an input."""
    val = node.meta["val"]
    generator = torch.Generator().manual_seed(seed)
    if val.dtype.is_floating_point:
        return torch.randn(val.shape, generator=generator, dtype=val.dtype)
    return torch.randint(0, 2, val.shape, generator=generator).to(val.dtype)


@pytest.mark.parametrize("name", LOCAL)
def test_the_kept_tokens_of_a_call_are_the_call_on_kept_tokens(name: str) -> None:
    """The rule's operands, gathered, and its literals give exactly the kept tokens of the full result."""
    node, inputs, axis = sketched(name)
    data = {n: real(n, seed) for seed, n in enumerate(inputs)}
    found = narrowing(node, axis, len(KEPT))
    assert found.operands, "a rule that narrows nothing proves nothing"
    args, kwargs = fx.map_arg((node.args, node.kwargs), data.__getitem__)
    full = node.target(*args, **kwargs)
    less: dict[fx.Node, Tensor] = dict(data)
    for path, operand in operands(node):
        if path in found.operands:
            less[operand] = take(data[operand], found.operands[path], KEPT)
    args, kwargs = fx.map_arg((node.args, node.kwargs), less.__getitem__)
    args = [found.literals.get((i,), arg) for i, arg in enumerate(args)]
    narrow = node.target(*args, **kwargs)
    for one, other in zip(pytree.tree_leaves(narrow), pytree.tree_leaves(full), strict=True):
        torch.testing.assert_close(one, take(other, axis, KEPT), rtol=1e-12, atol=1e-12)


def test_a_constant_has_as_many_rows_as_are_asked_for() -> None:
    """It has no operand to narrow; its size is a literal."""
    node = Sketch().call(aten.full.default, [2, S, 3], 1.0)
    assert narrowing(node, T1, 2) == Narrowing({}, {(0,): [2, 2, 3]})


def test_real_pairs_carry_the_tokens_of_complex_numbers() -> None:
    """But the dimension of 2 is none of tokens."""
    sketch = Sketch()
    pairs = sketch.call(aten.view_as_complex.default, sketch.input("x", 2, S, 3, 2))
    node = sketch.call(aten.view_as_real.default, pairs)
    assert narrowing(node, T1, 3).operands == {(0,): T1}
    with pytest.raises(NotTokenLocal, match="mixes the token axis"):
        narrowing(node, Axis(3), 3)


def test_a_part_of_a_split_is_narrowed_with_it() -> None:
    """The axis of a part is the axis of the parts."""
    sketch = Sketch()
    parts = sketch.call(aten.unbind.int, sketch.input("x", 3, 2, S, 4))
    found = narrowing(sketch.call(operator.getitem, parts, 1), T1, 3)
    assert found.operands == {(0,): T1}


def test_one_part_of_a_split_may_hold_all_tokens() -> None:
    """A split between the tokens and others, for the kept tokens: the others keep their size."""
    sketch = Sketch()
    x = sketch.input("x", 2, 3 + S, 4)
    parts = sketch.call(aten.split_with_sizes.default, x, [3, S], 1)
    axis = narrowing(sketch.call(operator.getitem, parts, 1), T1, 2).operands[(0,)]
    found = narrowing(parts, axis, 2)
    assert found == Narrowing({(0,): Axis(1, before=3)}, {(1,): [3, 2]})
    data = real(x, 1)
    text, kept = take(data, Axis(1, before=3), KEPT[:2]).split([3, 2], 1)
    assert torch.equal(kept, take(data[:, 3:], T1, KEPT[:2]))
    assert torch.equal(text, data[:, :3])
