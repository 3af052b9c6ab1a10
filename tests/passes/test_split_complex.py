"""SplitComplex computes with pairs of real numbers in place of complex ones."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, fx, nn

from tcc.capture import capture
from tcc.passes.graph import copy_of, write_code
from tcc.passes.split_complex import SplitComplex
from tests.graphs import edits, text

Function = Callable[[Tensor, Tensor], Any]
B, S, D = 2, 3, 4


class Of(nn.Module):
    """A function of complex `[B, S, D]` values and a complex table `[S, D]`, which are given and returned as pairs."""

    def __init__(self, function: Function) -> None:
        super().__init__()
        self.function = function
        angles = torch.linspace(0, 3, S * D).reshape(S, D)
        self.register_buffer("table", torch.polar(torch.full((S, D), 0.9), angles))
        self.register_buffer("turned", self.table.conj())
        self.register_buffer("table_pairs", torch.ones(S, D, 2))

    def forward(self, x: Tensor) -> Any:
        """Pairs from pairs."""
        found = self.function(torch.view_as_complex(x), self.table)
        return torch.view_as_real(found) if isinstance(found, Tensor) and found.is_complex() else found


def given() -> Tensor:
    """Pairs `[B, S, D, 2]`."""
    return torch.randn(B, S, D, 2, generator=torch.Generator().manual_seed(0))


def graph(function: Function) -> fx.GraphModule:
    """The captured graph."""
    return capture(Of(function).eval(), (given(),), {}).gm


def complex_values(gm: fx.GraphModule) -> list[str]:
    """The nodes whose value is complex."""
    found = [(n.name, n.meta.get("val")) for n in gm.graph.nodes]
    firsts = [(name, val[0] if isinstance(val, (tuple, list)) and val else val) for name, val in found]
    return [name for name, val in firsts if isinstance(val, torch.Tensor) and val.is_complex()]


FUNCTIONS: dict[str, Function] = {
    "rotary": lambda z, t: z * t,
    "by itself": lambda z, t: z * z,
    "real tensor": lambda z, t: z * torch.linspace(1, 2, D),
    "real tensor first": lambda z, t: torch.linspace(1, 2, D) * z,
    "number": lambda z, t: 3.0 * z - z * 2,
    "over a real tensor": lambda z, t: z / torch.linspace(1, 2, D),
    "over a number": lambda z, t: z / 2,
    "sums": lambda z, t: (z + t) - t * 2,
    "negative": lambda z, t: -z,
    "conjugate": lambda z, t: z * t.conj(),
    "parts": lambda z, t: z.real * 2 + (z * t).imag,
    "from parts": lambda z, t: z * torch.complex(t.real, torch.ones(1)),
    "from angles": lambda z, t: z * torch.polar(torch.ones(D), torch.linspace(0, 1, D)),
    "unsqueezed": lambda z, t: (z.unsqueeze(-1) * t.unsqueeze(-1).unsqueeze(0)).squeeze(-1),
    "reshaped": lambda z, t: (z.reshape(B, S * D) * t.reshape(-1)).view(B, S, D),
    "flattened": lambda z, t: (z * t).flatten(1),
    "expanded": lambda z, t: z * t.expand(B, S, D),
    "repeated": lambda z, t: z.repeat(1, 1, 2) * t.repeat(1, 2),
    "turned": lambda z, t: (z.transpose(-1, 1) * t.permute(-1, 0)).permute(0, -1, 1),
    "cut": lambda z, t: z[:, 1:, :-1] * t[1:, -3:],
    "selected": lambda z, t: z[:, -1] * t.select(-2, 0),
    "joined": lambda z, t: torch.cat([z, t.unsqueeze(0)]) * torch.cat([t, t], -1)[:, 2:6],
    "stacked": lambda z, t: torch.stack([z, z * t], -1).flatten(-2),
    "split": lambda z, t: torch.cat([a * b for a, b in zip(z.split([1, 3], -1), t.split([1, 3], -1), strict=True)], -1),
    "chunks": lambda z, t: torch.cat([a * b for a, b in zip(z.chunk(2, -1), t.chunk(2, -1), strict=True)], -1),
    "unbound": lambda z, t: z.unbind(0)[0] * t - z.unbind(0)[1],
    "indexed": lambda z, t: z * t[torch.tensor([2, 0, 1])],
    "rows": lambda z, t: z * t.index_select(-2, torch.tensor([2, 0, 1])),
    "flipped": lambda z, t: z * t.flip(-1),
    "padded": lambda z, t: z * nn.utils.rnn.pad_sequence([t[:2], t], batch_first=True),
    "wider": lambda z, t: z.to(torch.complex128) * t,
    "a number without dimensions": lambda z, t: z * torch.tensor(2.0) / torch.tensor(4.0),
    "alpha": lambda z, t: torch.add(z, t, alpha=3),
    "read twice": lambda z, t: torch.view_as_real(z * t).sum(-1) + (z * t).real,
}


@pytest.mark.parametrize("name", FUNCTIONS)
def test_pairs_take_the_place_of_complex_numbers(name: str) -> None:
    """No complex value is left, the outputs are as before, and a second run finds nothing."""
    gm = graph(FUNCTIONS[name])
    expected = gm(given())
    assert complex_values(gm)
    assert edits(gm, SplitComplex()) > 0
    assert complex_values(gm) == []
    for found, wanted in zip(gm(given()), expected, strict=True):
        assert found.dtype == wanted.dtype
        torch.testing.assert_close(found, wanted, rtol=1e-6, atol=1e-6)
    assert edits(gm, SplitComplex()) == 0


LEFT_ALONE: dict[str, Function] = {
    "no rule": lambda z, t: (z * t).exp(),
    "no rule for these": lambda z, t: z / t,
    "real and complex": lambda z, t: z + torch.ones(D),
    "complex alpha": lambda z, t: torch.add(z, t, alpha=2j),
    "joined with real": lambda z, t: torch.cat([z, torch.ones(B, S, D)]),
    "wide number without dimensions": lambda z, t: z + torch.tensor(2.0 + 1j, dtype=torch.complex128),
    "a complex number": lambda z, t: z * (1 + 2j),
    "no complex numbers": lambda z, t: torch.ones(2) + 1,
}


@pytest.mark.parametrize("name", LEFT_ALONE)
def test_the_rest_is_left_alone(name: str) -> None:
    """What is computed from a value without a rule stays complex, all of it."""
    gm = graph(LEFT_ALONE[name])
    before = text(gm)
    assert edits(gm, SplitComplex()) == 0
    assert text(gm) == before


def test_a_wide_real_number_without_dimensions_widens_nothing() -> None:
    """As in the model: float64 times complex64 is complex64 where the number has no dimensions."""
    gm = graph(lambda z, t: z * torch.tensor(3.0, dtype=torch.float64))
    assert edits(gm, SplitComplex()) == 1
    assert gm(given())[0].dtype == torch.float32


def test_a_conjugated_weight() -> None:
    """What is only marked as conjugated in memory, and a weight that is called like one of pairs."""

    class Turned(Of):
        def forward(self, x: Tensor) -> Tensor:
            z = torch.view_as_complex(x)
            return torch.view_as_real(z * self.turned * self.table) + self.table_pairs

    gm = capture(Turned(FUNCTIONS["rotary"]).eval(), (given(),), {}).gm
    expected = gm(given())[0]
    assert edits(gm, SplitComplex()) == 1
    torch.testing.assert_close(gm(given())[0], expected, rtol=1e-6, atol=1e-6)


def test_a_part_of_a_graph_can_be_left_alone() -> None:
    """One output is computed with pairs, and the other one with complex numbers as before."""
    gm = graph(lambda z, t: (torch.view_as_real(z * t), torch.view_as_real((z * t).exp())))
    expected = gm(given())
    assert edits(gm, SplitComplex()) == 1
    for found, wanted in zip(gm(given()), expected, strict=True):
        torch.testing.assert_close(found, wanted, rtol=1e-6, atol=1e-6)


def test_complex_inputs_and_outputs_stay() -> None:
    """They are the model's own."""

    class Complex(nn.Module):
        def forward(self, x: Tensor, z: Tensor) -> tuple[Tensor, Tensor]:
            y = torch.view_as_complex(x)
            return torch.view_as_real(y * z), y * 2

    gm = capture(Complex().eval(), (given(), torch.ones(D, dtype=torch.complex64)), {}).gm
    assert edits(gm, SplitComplex()) == 0


def test_weights_of_pairs_lie_where_the_weights_lie() -> None:
    """A copy of the graph gets them, and the graph that it is a copy of is as it was."""
    gm = graph(FUNCTIONS["rotary"])
    copy, before = copy_of(gm), text(gm)
    edits(copy, SplitComplex())
    write_code(copy)
    weight = next(node for node in copy.graph.nodes if node.op == "get_attr")
    original = next(node for node in gm.graph.nodes if node.op == "get_attr")
    pairs, table = getattr(copy, weight.target), getattr(gm, original.target)
    assert pairs.data_ptr() == table.data_ptr()
    assert list(pairs.shape) == [S, D, 2]
    assert text(gm) == before
    assert not hasattr(gm, weight.target)
