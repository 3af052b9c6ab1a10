"""A capture leaves a model as it was: no fake tensor stays in it, wherever it keeps what it has computed once."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import tcc
from tests.tiny_models import Block, Tokens, fill, noise


class Table:
    """A plain object that makes its table once."""

    def __init__(self) -> None:
        self.rows: Any = None
        self.by_size: dict[int, Tensor] = {}
        self.old = torch.ones(())
        self.all: list[Tensor] = [self.old]

    def attribute(self, size: int) -> Tensor:
        """As a list of tensors in an attribute."""
        if self.rows is None:
            self.rows = [torch.arange(size) / size]
        return self.rows[0]

    def new_attribute(self, size: int) -> Tensor:
        """In an attribute that was not there, within an object."""
        if not hasattr(self, "made"):
            self.made = Kept(torch.arange(size) / size)
        return self.made.table

    def dictionary(self, size: int) -> Tensor:
        """By size."""
        if size not in self.by_size:
            self.by_size[size] = torch.arange(size) / size
        return self.by_size[size]

    def in_a_list(self, size: int) -> Tensor:
        """Beside what is there."""
        if len(self.all) < 2:
            self.all.append(torch.arange(size) / size)
        return self.all[1]


class Kept:
    """Holds a table."""

    def __init__(self, table: Tensor) -> None:
        self.table = table


@functools.lru_cache
def of_the_file(size: int) -> Tensor:
    """A function that keeps what it returned."""
    return torch.arange(size) / size


class Keeps(nn.Module):
    """Adds a table that is made at the first call and kept."""

    def __init__(self, how: str) -> None:
        super().__init__()
        self.inner = fill(Tokens([Block(16), Block(16)]))
        self.table = Table()
        places: dict[str, Callable[[int], Tensor]] = {
            "of the file": of_the_file,
            "of the class": Keeps.of_the_class,
            "cached property": lambda size: self.cached_property,
        }
        self.how = places.get(how) or functools.partial(getattr(Table, how, Table.attribute), self.table)

    @staticmethod
    @functools.lru_cache
    def of_the_class(size: int) -> Tensor:
        """The same in a class."""
        return torch.arange(size) / size

    @functools.cached_property
    def cached_property(self) -> Tensor:
        """As an attribute of a module that was not there."""
        return torch.arange(12) / 12

    def forward(self, x: Tensor) -> Tensor:
        """Table and blocks."""
        return self.inner(x + self.how(x.shape[1])[:, None])


WAYS = [
    *("attribute", "new_attribute", "dictionary", "in_a_list", "of the file", "of the class"),
    pytest.param("cached property", marks=pytest.mark.filterwarnings("ignore:The tensor attribute")),
]


@pytest.fixture(autouse=True)
def empty() -> None:
    """Caches without what other tests have left."""
    of_the_file.cache_clear()
    Keeps.of_the_class.cache_clear()


@pytest.mark.parametrize("how", WAYS)
def test_a_model_runs_after_a_capture(how: str) -> None:
    """It gives tensors, and the values of a model that was never captured."""
    model, x = Keeps(how).eval(), noise(2, 12, 16)
    tcc.inspect(model, x)
    with torch.no_grad():
        given = model(x)
        assert type(given) is Tensor
        assert torch.equal(given, model.inner(x + (torch.arange(12) / 12)[:, None]))


@pytest.mark.parametrize("how", WAYS)
def test_a_model_is_captured_again_after_a_capture(how: str) -> None:
    """At another shape, as with `on_shape_change="recapture"`."""
    model = Keeps(how).eval()
    policy = functools.partial(tcc.plans.full, num_steps=1)
    fast = tcc.compile(model, policy, backend="eager", on_shape_change="recapture")
    found = [fast(noise(batch, 12, 16)) for batch in (2, 3)]
    with torch.no_grad():
        assert all(torch.equal(y, model(noise(len(y), 12, 16))) for y in found)


def test_what_was_kept_before_a_capture_stays() -> None:
    """Tables of real tensors are the same objects afterwards, and caches that gained nothing keep their entries."""
    model, x = Keeps("dictionary").eval(), noise(2, 12, 16)
    kept = model.table.by_size[12] = torch.arange(12) / 12
    model.table.rows, entry = [kept], of_the_file(5)
    tcc.inspect(model, x)
    assert model.table.by_size[12] is kept
    assert model.table.rows[0] is kept
    assert model.table.all[0] is model.table.old
    assert of_the_file(5) is entry
