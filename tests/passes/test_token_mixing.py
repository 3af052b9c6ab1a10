"""Operators that mix tokens: the refusal names them and what they do."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from tcc.passes.token_axis import NotTokenLocal, narrowing
from tcc.passes.tokens import Axis
from tests.graphs import Sketch
from tests.passes.test_token_axis import JOINED, T0, T1, T2, In, S, X, Y, Z, call

aten = torch.ops.aten

#: name: (call, input shapes, token axis, what the reason says)
MIXING: dict[str, tuple[Any, list[tuple[int, ...]], Axis, str]] = {
    "unknown operator": (
        call(aten.renorm.default, X, 2, 0, 1.0),
        [(2, S, 3)],
        T1,
        r"no token rule for aten.renorm.default \(register one with tcc.passes.token_axis.rule\)",
    ),
    "convolution of tokens": (call(aten.conv1d.default, X, Y), [(2, 3, S), (3, 3, 3)], T2, "convolves over"),
    "convolution with a stride": (call(aten.conv1d.default, X, Y, None, [2]), [(2, 3, S), (3, 3, 1)], T2, "convolves"),
    "convolution with padding": (
        call(aten.conv2d.default, X, Y, None, [1, 1], [0, 1]),
        [(2, 3, 4, S), (3, 3, 1, 1)],
        Axis(3),
        "convolves over",
    ),
    "convolution that makes tokens": (call(aten.conv1d.default, X, Y), [(2, 3, 4), (S, 3, 1)], T1, "makes the token"),
    "largest tokens": (call(aten.topk.default, X, 2, 1), [(2, S, 3)], T1, "topk.default mixes the token axis"),
    "pick tokens": (call(aten.gather.default, X, 1, Y), [(2, S, 3), (-2, S, 3)], T1, "looks up the token axis"),
    "pick for the first tokens": (
        call(aten.gather.default, X, 2, Y),
        [(2, S + 1, 3), (-2, S, 3)],
        T1,
        "takes a part of the token axis",
    ),
    "windows of tokens": (call(aten.unfold.default, X, 1, 2, 1), [(2, S + 1, 3)], T1, "cuts windows out of the token"),
    "linear over tokens": (call(aten.linear.default, X, Y), [(2, 3, 4), (S, 4)], T2, "mixes the token axis"),
    "norm over tokens": (call(aten.layer_norm.default, X, [S, 3]), [(2, S, 3)], T1, "normalises over the token axis"),
    "softmax over tokens": (call(aten.softmax.int, X, -2), [(2, S, 3)], T1, "mixes the token axis"),
    "flip tokens": (call(aten.flip.default, X, [1]), [(2, S, 3)], T1, "mixes the token axis"),
    "roll tokens": (call(aten.roll.default, X, [1], [1]), [(2, S, 3)], T1, "mixes the token axis"),
    "roll everything": (call(aten.roll.default, X, [1]), [(2, S, 3)], T1, "mixes the token axis"),
    "mean over tokens": (call(aten.mean.dim, X, [1], True), [(2, S, 3)], T1, "reduces over the token axis"),
    "squeeze a single token": (
        call(aten.squeeze.dim, X, 1),
        [(2, S, 3)],
        T1,
        "would drop the token axis of a single token",
    ),
    "look up tokens": (call(aten.index.Tensor, X, [None, In(1)]), [(2, 3, 4), (-2,)], T1, "looks up the token axis"),
    "look up two": (call(aten.index.Tensor, X, [In(1), In(1)]), [(3, 3, S), (-2,)], T1, "looks up 2 dimensions"),
    "group norm over tokens": (
        call(aten.group_norm.default, X, 1),
        [(2, 4, S)],
        T2,
        "normalises over the token axis",
    ),
    "length of all": (call(aten.linalg_vector_norm.default, X), [(S,)], T0, "reduces over all dimensions"),
    "slice_scatter of tokens": (
        call(aten.slice_scatter.default, X, Y, 1, 0, 2),
        [(2, S, 3), (2, 2, 3)],
        T1,
        "replaces a part of the token axis",
    ),
    "slice_scatter of some tokens": (
        call(aten.slice_scatter.default, X, Y, 1, 1, 3),
        [(2, S + 3, 3), (2, 2, 3)],
        JOINED,
        "divide the tokens among them",
    ),
    "einsum of a diagonal": (call(aten.einsum.default, "ii->i", [X]), [(S, S)], T0, "takes a diagonal"),
    "new dimension": (call(aten.unsqueeze.default, X, 1), [(2, 3)], T1, "makes the token axis"),
    "slice with a step": (call(aten.slice.Tensor, X, 1, 0, 2 * S, 2), [(2, 2 * S, 3)], T1, "cuts the token axis"),
    "split tokens": (call(aten.split.Tensor, X, S, 1), [(2, 2 * S, 3)], T1, "cuts the token axis"),
    "pad tokens": (call(aten.constant_pad_nd.default, X, [0, 0, 1, 0]), [(2, S - 1, 3)], T1, "cuts the token axis"),
    "divide the tokens": (
        call(aten.cat.default, [X, Y], 1),
        [(2, 2, 3), (2, 3, 3)],
        Axis(1, before=1),
        r"parts of \[2, 3\] divide the tokens among them",
    ),
    "join tokens": (call(aten.cat.default, [X, Y], 1), [(2, 2, 3), (2, 3, 3)], T1, "joins along the token axis"),
    "repeat tokens": (call(aten.repeat.default, X, [1, 5, 1]), [(2, 1, 3)], T1, "repeats the token axis"),
    "repeat each token": (
        call(aten.repeat_interleave.self_int, X, 5, 1),
        [(2, 1, 3)],
        T1,
        "repeats the token axis",
    ),
    "merge the grid": (call(aten.view.default, X, [2, 6, 4]), [(2, 2, 3, 4)], T1, "merges or splits the token axis"),
    "embedding channels": (call(aten.embedding.default, X, In(1)), [(6, S), (-2, 3)], T2, "makes the token axis"),
    "attention over channels": (
        call(aten.scaled_dot_product_attention.default, X, Y, Z),
        [(2, 4, 6, S)] * 3,
        Axis(3),
        "makes the token axis",
    ),
    "causal attention": (
        call(aten.scaled_dot_product_attention.default, X, Y, Z, None, 0.0, True),
        [(2, 4, S, 8)] * 3,
        T2,
        "causal attention depends on the positions of the tokens",
    ),
}


@pytest.mark.parametrize("name", MIXING)
def test_an_operator_that_mixes_tokens_says_so(name: str) -> None:
    """The refusal names the operator and what it does to the tokens."""
    build, shapes, axis, reason = MIXING[name]
    sketch = Sketch()
    kinds = [torch.int64 if sizes[0] == -2 else torch.float32 for sizes in shapes]
    inputs = [sketch.input("xyz"[i], *map(abs, sizes), dtype=kinds[i]) for i, sizes in enumerate(shapes)]
    with pytest.raises(NotTokenLocal, match=reason):
        narrowing(build(sketch, inputs), axis, 1 if "single" in name else 3)
