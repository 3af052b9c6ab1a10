"""What a model may compute with though ONNX, or its runtime, has no operator for it: written in others."""

from __future__ import annotations

import functools
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

import tcc
from tcc.export import bundle, load
from tcc.export.manifest import WEIGHTS
from tcc.passes.graph import graph_text
from tests.running import CLOSE
from tests.tiny_models import Block, Tokens, fill, noise, relative_error

pytest.importorskip("onnx", reason="needs the ONNX packages: pip install 'tcc[onnx]'")


class Masks(nn.Module):
    """Attends by a mask of truth values that is chosen in the graph, as HunyuanVideo does."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = fill(Tokens([Block(16), Block(16)]))

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """What the mask leaves, and the mask."""
        positive = x > 0
        mask = torch.where(x[:, :1] > 0.5, positive.roll(1, 1), positive).masked_fill(x > 1, True)
        return self.inner(x * mask), mask


def test_truth_values_are_chosen_without_an_operator_that_runtimes_lack(tmp_path: Path) -> None:
    """ONNX Runtime has no `Where` of them on a CPU; a mask that is returned keeps its name."""
    model, x = Masks().eval(), noise(2, 12, 16)
    plan = functools.partial(tcc.plans.full, num_steps=1)
    runner = load(bundle(model, plan, ((x,), {}), tmp_path / "made").folder)
    found, mask = runner(x)
    with torch.no_grad():
        expected = model(x)
    assert mask.any()
    assert torch.equal(mask, expected[1])
    assert relative_error(found, expected[0]) < CLOSE


class Turns(nn.Module):
    """Turns pairs of channels by complex numbers that it has, as the rotary embedding of Qwen-Image does."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = fill(Tokens([Block(16), Block(16)]))
        self.register_buffer("table", torch.polar(torch.ones(12, 8), torch.linspace(0, 3, 96).reshape(12, 8)))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Turned and back, around the blocks."""
        turned = torch.view_as_complex(x.unflatten(-1, (-1, 2))) * self.table
        y = self.inner(torch.view_as_real(turned).flatten(2))
        return torch.view_as_real(torch.view_as_complex(y.unflatten(-1, (-1, 2))) * self.table.conj()).flatten(2)


def test_complex_numbers_of_a_model_are_written_as_pairs(tmp_path: Path) -> None:
    """ONNX has none. The program that the bundle was made of stays as it was."""
    model, x = Turns().eval(), noise(2, 12, 16)
    compiled = tcc.compile(model, functools.partial(tcc.plans.fora, num_steps=3, interval=2), backend="eager")
    compiled(x)
    program = compiled.whole_program()
    before = [graph_text(variant.gm.graph) for variant in program.variants]
    runner = load(bundle(compiled, out=tmp_path / "made").folder)
    assert [graph_text(variant.gm.graph) for variant in program.variants] == before
    assert "table.pairs" in load_file(tmp_path / "made" / WEIGHTS)
    compiled.reset()
    for seed in range(6):
        x = noise(2, 12, 16, seed=seed)
        assert relative_error(runner(x), compiled(x)) < CLOSE


class Looks(nn.Module):
    """Looks rows of a table up by positions in int32, as Z-Image does: ONNX gathers rows by int64 alone."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = fill(Tokens([Block(16), Block(16)]))
        self.register_buffer("table", torch.linspace(-1, 1, 5 * 16).reshape(5, 16))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """The rows that positions in the values of `x` name."""
        return self.inner(x + self.table[x[..., 0].abs().clamp(max=4).to(torch.int32)])


class Widens(nn.Module):
    """Sums products of float32 and float64 numbers, as the rotary table of HiDream does: ONNX wants one type."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = fill(Tokens([Block(16), Block(16)]))
        self.register_buffer("rates", torch.linspace(0, 1, 16, dtype=torch.float64))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Angles in float64, and the blocks in float32."""
        return self.inner(x + torch.einsum("bs,d->bsd", x[..., 0], self.rates).cos().float())


class Permutes(nn.Module):
    """Normalises channels between two permutations, as UVit2D does: ONNX Runtime may not turn what sessions share."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = fill(Tokens([Block(16), Block(16)]))
        self.conv = fill(nn.Conv2d(16, 16, 1))
        self.scale = nn.Parameter(torch.linspace(0.5, 2, 16))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Blocks, and a map of 4 x 3 pixels."""
        y = self.conv(self.inner(x).mT.unflatten(-1, (4, 3)))
        y = y.permute(0, 2, 3, 1)
        y = y * torch.rsqrt(y.pow(2).mean(-1, keepdim=True) + 1e-6) * self.scale
        return self.conv(y.permute(0, 3, 1, 2)).flatten(2).mT


@pytest.mark.parametrize("build", [Looks, Widens, Permutes])
def test_a_bundle_computes_what_the_model_computes(build: type[nn.Module], tmp_path: Path) -> None:
    """Each of these models failed in ONNX Runtime as it was first written."""
    model, x = build().eval(), noise(2, 12, 16)
    runner = load(bundle(model, functools.partial(tcc.plans.full, num_steps=1), ((x,), {}), tmp_path / "made").folder)
    with torch.no_grad():
        assert relative_error(runner(x), model(x)) < CLOSE
