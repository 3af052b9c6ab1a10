"""MACs: the published anchors, and every kind of product."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

import tcc
from tcc.models.dit import SIZES, DiT
from tcc.passes.macs import count, node_macs
from tests.graphs import Sketch
from tests.tiny_models import case

aten = torch.ops.aten


def meta_macs(name: str, input_size: int, depth: int | None = None) -> int:
    """MACs of a published size for one image, captured without weights."""
    with torch.device("meta"):
        model = DiT.from_name(name, input_size=input_size, **({"depth": depth} if depth else {})).eval()
        label = torch.zeros(1, dtype=torch.int64)
        return tcc.inspect(model, torch.empty(1, 4, input_size, input_size), label, label).macs


def test_the_anchor_dit_xl_2() -> None:
    """118.62 GMAC at 256 tokens, adaLN included."""
    assert meta_macs("DiT-XL/2", 32) == 118_621_421_568


@pytest.mark.parametrize(
    ("name", "input_size", "gmacs"),
    [("DiT-XL/2", 64, 524.5), ("DiT-L/2", 32, 80.7), ("DiT-B/2", 32, 23.0), ("DiT-S/2", 32, 6.05)],
)
def test_the_other_anchors(name: str, input_size: int, gmacs: float) -> None:
    """As published; blocks are alike, so that one and two of them tell what all of them cost."""
    one, two = (meta_macs(name, input_size, depth) for depth in (1, 2))
    depth = SIZES[name.removeprefix("DiT-").partition("/")[0]][0]
    total = (one + (depth - 1) * (two - one)) / 1e9
    assert abs(total - gmacs) <= 0.05


def test_a_block_costs_what_the_formula_says() -> None:
    """`12 N d^2 + 2 N^2 d` per image: what is computed from the stream; adaLN is the model's."""
    info = case("dit").info
    n, d = 16, 32
    assert info.sites["blocks.0.delta"].macs // info.batch == 12 * n * d * d + 2 * n * n * d


@pytest.mark.parametrize("name", ["dit", "hf_dit", "separate", "parallel", "flat"])
def test_the_count_is_half_the_flops_that_torch_counts(name: str) -> None:
    """Torch's own counter agrees on every product of a run; it knows attention where it is two matrix products."""
    which = case(name)
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter, torch.no_grad():
        which.model(*which.args, **which.kwargs)
    assert count(which.info.captured.gm.graph.nodes) * 2 == counter.get_total_flops()


PRODUCTS: dict[str, tuple[Any, list[tuple[int, ...]], int]] = {
    "linear": (aten.linear.default, [(2, 5, 3), (4, 3), (4,)], 2 * 5 * 4 * 3),
    "mm": (aten.mm.default, [(5, 3), (3, 4)], 5 * 4 * 3),
    "bmm": (aten.bmm.default, [(2, 5, 3), (2, 3, 4)], 2 * 5 * 4 * 3),
    "matmul": (aten.matmul.default, [(2, 6, 5, 3), (3, 4)], 2 * 6 * 5 * 4 * 3),
    "addmm": (aten.addmm.default, [(4,), (5, 3), (3, 4)], 5 * 4 * 3),
    "baddbmm": (aten.baddbmm.default, [(2, 5, 4), (2, 5, 3), (2, 3, 4)], 2 * 5 * 4 * 3),
    "attention": (
        aten.scaled_dot_product_attention.default,
        [(2, 3, 5, 8), (2, 3, 7, 8), (2, 3, 7, 6)],
        2 * 3 * 5 * 7 * (8 + 6),
    ),
    "conv2d": (aten.conv2d.default, [(2, 4, 8, 8), (6, 4, 2, 2), (6,), [2, 2]], 2 * 6 * 4 * 4 * 4 * 2 * 2),
    "conv1d": (aten.conv1d.default, [(2, 4, 9), (6, 4, 3)], 2 * 6 * 7 * 4 * 3),
    "grouped convolution": (
        aten.conv2d.default,
        [(1, 4, 8, 8), (4, 1, 3, 3), None, [1, 1], [1, 1], [1, 1], 4],  # type: ignore[list-item]
        4 * 8 * 8 * 9,
    ),
    "pointwise": (aten.add.Tensor, [(2, 5), (2, 5)], 0),
}


@pytest.mark.parametrize("name", PRODUCTS)
def test_every_kind_of_product(name: str) -> None:
    """One multiplication and one addition are one MAC; everything else is free."""
    target, arguments, macs = PRODUCTS[name]
    sketch = Sketch()
    args = [sketch.input("xyz"[i], *given) if isinstance(given, tuple) else given for i, given in enumerate(arguments)]
    node = sketch.call(target, *args)
    assert node_macs(node) == macs
    assert count(sketch.graph.nodes) == macs
