"""Which input is the noise level."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from tcc.capture import capture
from tcc.passes.noise_level import noise_level
from tests.tiny_models import case


def found(name: str) -> str | None:
    """The name of the noise level of a tiny model."""
    captured = case(name).info.captured
    level = noise_level(captured.gm.graph)
    assert captured.noise_level == level
    return None if level is None else captured.inputs[level].name


@pytest.mark.parametrize(
    ("name", "expected"), [("dit", "t"), ("hf_dit", "timestep"), ("hf_pixart", "timestep"), ("separate", None)]
)
def test_it_is_the_timestep(name: str, expected: str | None) -> None:
    """Of labels, masks and text none is taken for it; a model without a noise level has none."""
    assert found(name) == expected


class Rotary(nn.Module):
    """Embeds guidance and token positions by waves too, and has waves of products and of look-ups."""

    def __init__(self) -> None:
        super().__init__()
        self.linear, self.table = nn.Linear(8, 8), nn.Embedding(4, 8)

    def forward(self, x: Tensor, places: Tensor, y: Tensor, pooled: Tensor, t: Tensor, guidance: Tensor) -> Tensor:
        """Add up."""
        frequencies = torch.arange(8.0)
        waves = (t[:, None] * frequencies).cos() + (guidance[:, None] * frequencies).sin()
        waves = waves + self.linear(pooled).sin() + self.table(y).cos()
        out: Tensor = x * (places[:, :1] * frequencies).cos() + waves
        return out


def test_other_waves_are_not_taken_for_it() -> None:
    """The fewest dimensions, before a product or a look-up, and the first of two."""
    x = torch.randn(2, 8)
    args = (x, torch.randn(2, 3), torch.tensor([1, 2]), x + 1, torch.tensor([5.0, 5.0]), torch.tensor([2.0, 2.0]))
    captured = capture(Rotary().eval(), args, {})
    level = noise_level(captured.gm.graph)
    assert level is not None
    assert captured.inputs[level].name == "t"
