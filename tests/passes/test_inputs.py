"""What the inputs of a graph are: roles, axes and ranges, from dataflow."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import tcc
from tcc.passes.inputs import InputFacts, input_facts
from tests.tiny_models import Attention, case, fill, noise


def facts(model: nn.Module, *args: Any, **kwargs: Any) -> dict[str, InputFacts]:
    """What is known about the inputs of a model, by name."""
    return known(tcc.inspect(model, *args, **kwargs))


def known(info: tcc.ModelInfo) -> dict[str, InputFacts]:
    """The same of a captured model."""
    captured = info.captured
    found = input_facts(captured.gm.graph, info.analysis, captured.noise_level, captured.samples)
    return {spec.name: fact for spec, fact in zip(captured.inputs, found, strict=True)}


class Odd(nn.Module):
    """Tokens with inputs of every kind, in the roundabout ways of real models."""

    def __init__(self) -> None:
        super().__init__()
        self.label, self.words, self.place = nn.Embedding(7, 16), nn.Embedding(30, 16), nn.Embedding(50, 16)
        self.text, self.attn, self.mlp = nn.Linear(5, 16), Attention(16), nn.Linear(16, 16)
        self.keys = nn.Linear(16, 16)

    def forward(
        self, x: Tensor, sigma: Tensor, y: Tensor, ids: Tensor, text: Tensor, mask: Tensor, bias: Tensor,
        strength: Tensor, where: Tensor,
    ) -> Tensor:  # fmt: skip
        """Denoise `[B, S, D]`."""
        condition = self.label(y.reshape(-1, 1)[:, 0].long()) + strength[:, None] + torch.sin(sigma)[:, None]
        x = x + self.attn(x + condition[:, None] + torch.sin(where).sum(-1)[..., None])
        rows = torch.cat([self.text(text), self.words.weight[ids.flatten()].reshape(*ids.shape, 16)], dim=1)
        visible = torch.where(mask[:, None, None], 0.0, -1e4) + bias[:, None, None]
        x = x + F.scaled_dot_product_attention(x[:, None], self.keys(rows)[:, None], rows[:, None], visible)[:, 0]
        return x + self.mlp(x)


def test_every_kind_of_input() -> None:
    """Labels through reshapes and casts, ids by indexing, masks of booleans and of what is added."""
    args = (
        noise(2, 12, 16), torch.ones(2), torch.tensor([1, 2], dtype=torch.int32), torch.ones(2, 3, dtype=torch.int64),
        noise(2, 4, 5), torch.ones(2, 7, dtype=torch.bool), torch.zeros(2, 7), torch.ones(2), noise(2, 12, 3),
    )  # fmt: skip
    found = facts(fill(Odd()), *args)
    assert {name: (fact.role, fact.values) for name, fact in found.items()} == {
        "x": ("sample", 0), "sigma": ("timestep", 0), "y": ("label", 7), "ids": ("ids", 30), "text": ("embedding", 0),
        "mask": ("mask", 0), "bias": ("mask", 0), "strength": ("number", 0), "where": ("positions", 0),
    }  # fmt: skip
    assert found["text"].axes == ("batch", "rows", "channels")
    assert found["ids"].axes == found["mask"].axes == ("batch", "rows")
    assert found["where"].axes == ("batch", "rows", "coordinates")


@pytest.mark.parametrize(("name", "classes"), [("dit", 11), ("uvit", 11), ("mdt", 11), ("hf_dit", 11)])
def test_models_with_labels(name: str, classes: int) -> None:
    """Sample, timestep and label, whatever they are called; the table has a row more than there are classes."""
    found = list(known(case(name).info).values())
    assert sorted(fact.role for fact in found) == ["label", "sample", "timestep"]
    (label,) = (fact for fact in found if fact.role == "label")
    assert label.values == classes
    assert found[0].axes == ("batch", "channels", "height", "width")


def test_two_tables_bound_by_the_smaller() -> None:
    """A number that is looked up twice must be in both."""

    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.large, self.small = nn.Embedding(9, 16), nn.Embedding(4, 16)
            self.inner = copy.deepcopy(case("separate").model)  # a copy: it is filled with other weights

        def forward(self, x: Tensor, y: Tensor) -> Any:
            return self.inner(x + (self.large(y) + self.small(y))[:, None])

    assert facts(fill(Twice()), noise(2, 12, 16), torch.tensor([1, 2]))["y"].values == 4
