"""Which input is the noise level."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

import tcc
from tcc.capture import capture
from tcc.errors import CaptureError
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


class Denoiser(nn.Module):
    """A model of vectors, conditioned in the way of its kind."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.kind = kind
        self.table, self.labels, self.mlp = nn.Embedding(9, 8), nn.Embedding(4, 8), nn.Linear(1, 8)
        self.sizes = nn.Linear(24, 8)

    def forward(self, x: Tensor, y: Tensor, strength: Tensor, timestep: Tensor, sizes: Tensor, mask: Tensor) -> Tensor:
        """`x` and what it is conditioned on."""
        waves = (sizes[..., None] * torch.arange(4.0)).sin().flatten(1)
        x = x + self.sizes(waves) + self.labels(y) + mask[:, None]
        if self.kind == "table":
            x = x + self.table(timestep)
        if self.kind == "mlp":
            x = x + self.mlp(timestep[:, None])
        if self.kind == "frames":
            x = x + (timestep[..., None] * torch.arange(8.0)).sin().mean(1)
        return x + self.mlp(strength[:, None]) if self.kind in ("strength", "mlp") else x


T = torch.tensor([5, 5])
KINDS: dict[str, tuple[Tensor, str | None]] = {
    "table": (T, "timestep"),  # and no label is taken for it
    "mlp": (T.float(), "timestep"),  # and no strength
    "frames": (torch.ones(2, 6), "timestep"),  # a noise level for each frame, and no sizes that become waves
    "unused": (T, "timestep"),  # its value tells, though the output does not depend on it
}


@pytest.mark.parametrize("kind", KINDS)
def test_a_noise_level_without_waves_is_known_by_its_name(kind: str) -> None:
    """Among numbers that there is one of for each sample; dataflow says which inputs those are."""
    t, expected = KINDS[kind]
    args = (torch.randn(2, 8), T - 4, torch.ones(2), t, torch.ones(2, 6), torch.ones(2, dtype=torch.bool))
    captured = capture(Denoiser(kind).eval(), args, {})
    level = noise_level(captured.gm.graph)
    assert level is not None
    assert captured.inputs[level].name == expected
    assert [captured.inputs[position].name for position in captured.samples] == ["x"]


class Patches(nn.Module):
    """A model of a sequence of patches that returns an image."""

    def forward(self, text: Tensor, x: Tensor) -> Tensor:
        """Put the patches where they belong, `[B, 4 * 4, C * 4]` to `[B, C, 8, 8]`."""
        out = (x + text.mean()).view(-1, 4, 4, 3, 2, 2).permute(0, 3, 1, 4, 2, 5)
        return out.reshape(-1, 3, 8, 8)


def test_the_sample_may_be_in_patches() -> None:
    """It has as many elements as the output, whose dimensions something else has."""
    captured = capture(Patches().eval(), (torch.randn(2, 2, 8, 5), torch.randn(2, 16, 12)), {})
    assert [captured.inputs[position].name for position in captured.samples] == ["x"]


class Plain(nn.Module):
    """A model with inputs of no telling names."""

    def __init__(self, two: bool) -> None:
        super().__init__()
        self.two, self.mlp, self.labels = two, nn.Linear(1, 8), nn.Embedding(4, 8)

    def forward(self, x: Tensor, y: Tensor, u: Tensor, v: Tensor) -> Tensor:
        """`x` and its conditions."""
        x = x + self.labels(y) + self.mlp(u[:, None])
        return x + self.mlp(v[:, None]) if self.two else x + v


@pytest.mark.parametrize(("two", "expected"), [(True, None), (False, "u")])
def test_the_only_real_number_is_the_noise_level(two: bool, expected: str | None) -> None:
    """Of two, nothing tells which; a label is none."""
    v = torch.ones(2) if two else torch.ones(2, 8)
    captured = capture(Plain(two).eval(), (torch.randn(2, 8), T - 4, torch.ones(2), v), {})
    level = noise_level(captured.gm.graph)
    assert (None if level is None else captured.inputs[level].name) == expected


def test_a_noise_level_can_be_named() -> None:
    """And a name that is no input is refused with those that are; the table says where none is known."""
    which = case("separate")
    captured = capture(which.model, which.args, which.kwargs, level="x")
    assert captured.noise_level == 0
    with pytest.raises(
        CaptureError, match=r"noise_level='sigma': the model has no tensor input of that name; .* are x"
    ):
        tcc.compile(
            which.model,
            tcc.CachePlan(1, {}),
            example_inputs=(which.args, which.kwargs),
            backend="eager",
            noise_level="sigma",
        )
    assert "steps are counted, not watched" in str(which.info.table().caption)
    assert case("dit").info.table().caption is None
