"""A capture leaves a model as it was: no fake tensor stays in it, wherever it keeps what it has computed once."""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any, ClassVar

import pytest
import torch
from torch import Tensor, nn

import tcc
from tests import tables
from tests.tiny_models import Block, Tokens, fill, noise

Make = Callable[[int], Tensor]
BY_SIZE: dict[int, Tensor] = {}


def fresh(size: int) -> Tensor:
    """The table, made anew."""
    return torch.arange(size) / size


def looked_up(known: dict[int, Tensor], size: int) -> Tensor:
    """The table of a dictionary, made where it lacks."""
    if size not in known:
        known[size] = fresh(size)
    return known[size]


class Kept:
    """Holds a table."""

    def __init__(self, table: Tensor) -> None:
        self.table = table


class Attributes(dict[str, int]):
    """A dictionary that has attributes."""

    table: Tensor | None = None


class Table:
    """A plain object that makes its table once, in one of many ways."""

    of_all: ClassVar[dict[int, Tensor]] = {}
    last: ClassVar[Tensor | None] = None

    def __init__(self) -> None:
        self.rows: Any = None
        self.by_size: dict[int, Tensor] = {}
        self.old = torch.ones(())
        self.all: list[Tensor] = [self.old]
        self.space, self.subclass = SimpleNamespace(table=None), Attributes()
        self.closure = remembering(fresh)

    def attribute(self, size: int) -> Tensor:
        """As a list of tensors in an attribute."""
        if self.rows is None:
            self.rows = [fresh(size)]
        return self.rows[0]

    def new_attribute(self, size: int) -> Tensor:
        """In an attribute that was not there, within an object."""
        if not hasattr(self, "made"):
            self.made = Kept(fresh(size))
        return self.made.table

    def dictionary(self, size: int) -> Tensor:
        """By size."""
        return looked_up(self.by_size, size)

    def in_a_list(self, size: int) -> Tensor:
        """Beside what is there."""
        if len(self.all) < 2:
            self.all.append(fresh(size))
        return self.all[1]

    def in_a_namespace(self, size: int) -> Tensor:
        """As an attribute of an object of the standard library."""
        self.space.table = fresh(size) if self.space.table is None else self.space.table
        return self.space.table

    def beside_a_dictionary(self, size: int) -> Tensor:
        """As an attribute of a dictionary."""
        self.subclass.table = fresh(size) if self.subclass.table is None else self.subclass.table
        return self.subclass.table

    def in_the_class(self, size: int) -> Tensor:
        """For all objects."""
        return looked_up(self.of_all, size)

    def as_the_class(self, size: int) -> Tensor:
        """As an attribute of the class."""
        Table.last = fresh(size) if Table.last is None else Table.last
        return Table.last

    def in_the_file(self, size: int) -> Tensor:
        """For everybody."""
        return looked_up(BY_SIZE, size)

    def in_a_closure(self, size: int) -> Tensor:
        """In a variable of the function that made the function."""
        return self.closure(size)

    @functools.lru_cache  # noqa: B019 - as people write it
    def by_a_method(self, size: int) -> Tensor:
        """With the object as a part of the key."""
        return fresh(size)

    def by_another_file(self, size: int) -> Tensor:
        """By what a function calls."""
        return tables.of_another_file(size)


def remembering(make: Make) -> Make:
    """A decorator of one's own."""
    known: dict[int, Tensor] = {}

    @functools.wraps(make)
    def found(size: int) -> Tensor:
        if size not in known:
            known[size] = make(size)
        return known[size]

    return found


@functools.lru_cache
def of_the_file(size: int) -> Tensor:
    """A function that keeps what it returned."""
    return fresh(size)


class Keeps(nn.Module):
    """Adds a table that is made at the first call and kept."""

    def __init__(self, how: str) -> None:
        super().__init__()
        self.inner = fill(Tokens([Block(16), Block(16)]))
        self.table = Table()
        places: dict[str, Make] = {
            "of the file": of_the_file,
            "of the class": Keeps.of_the_class,
            "cached property": lambda size: self.cached_property,
        }
        self.how = places.get(how) or functools.partial(getattr(Table, how, Table.attribute), self.table)

    @staticmethod
    @functools.lru_cache
    def of_the_class(size: int) -> Tensor:
        """The same in a class."""
        return fresh(size)

    @functools.cached_property
    def cached_property(self) -> Tensor:
        """As an attribute of a module that was not there."""
        return fresh(12)

    def forward(self, x: Tensor) -> Tensor:
        """Table and blocks."""
        return self.inner(x + self.how(x.shape[1])[:, None])


WAYS = [
    *("attribute", "new_attribute", "dictionary", "in_a_list", "in_a_namespace", "beside_a_dictionary", "in_the_class"),
    *("as_the_class", "in_the_file", "in_a_closure", "by_a_method", "by_another_file", "of the file", "of the class"),
    pytest.param("cached property", marks=pytest.mark.filterwarnings("ignore:The tensor attribute")),
]


@pytest.fixture(autouse=True)
def empty() -> None:
    """Caches without what other tests have left."""
    for cache in (of_the_file, Keeps.of_the_class, Table.by_a_method, tables.kept):
        cache.cache_clear()
    BY_SIZE.clear()
    Table.of_all.clear()
    Table.last = None


@pytest.mark.parametrize("how", WAYS)
def test_a_model_is_captured_again_and_runs(how: str) -> None:
    """At another shape, and then without tcc: tensors, with the values of a model that was never captured."""
    model, x = Keeps(how).eval(), noise(2, 12, 16)
    tcc.inspect(model, noise(3, 12, 16))
    tcc.inspect(model, x)
    with torch.no_grad():
        given = model(x)
        assert type(given) is Tensor
        assert torch.equal(given, model.inner(x + fresh(12)[:, None]))


def test_what_was_kept_before_a_capture_stays() -> None:
    """Tables of real tensors are the same objects afterwards, and caches without fake ones keep their entries."""
    model, x = Keeps("dictionary").eval(), noise(2, 12, 16)
    kept = model.table.by_size[12] = torch.arange(12) / 12
    model.table.rows, entry = [kept], of_the_file(5)
    model.how = lambda size: model.table.dictionary(size) * sizes(size)[0]
    one = sizes(1)
    tcc.inspect(model, x)
    assert sizes.cache_info().currsize == 2
    assert sizes(1) is one
    assert model.table.by_size[12] is kept
    assert model.table.rows[0] is kept
    assert model.table.all[0] is model.table.old
    assert of_the_file(5) is entry


@functools.lru_cache
def sizes(size: int) -> list[float]:
    """Keeps what is no tensor."""
    return [size / 2]


class Proxy:
    """Stands for something that is not there yet, as a request of a web server does."""

    def __getattribute__(self, name: str) -> Any:
        raise RuntimeError("working outside of request context")


class Silent(dict[str, int]):
    """Does not show what it holds."""

    def values(self) -> Any:
        """Never."""
        raise RuntimeError("no values")


PROXY, SILENT, LONG = Proxy(), Silent(a=1), list(range(20_000))


def test_what_does_not_let_itself_be_asked_is_passed_by(monkeypatch: pytest.MonkeyPatch) -> None:
    """In the file of a model, and in the model."""
    model = Keeps("attribute").eval()
    vars(model.table).update(proxy=PROXY, silent=SILENT, long=LONG)
    monkeypatch.setitem(sys.modules, "not_there", None)
    monkeypatch.setattr(Kept, "__module__", "not_there")
    assert tcc.inspect(model, noise(2, 12, 16)).num_tokens == 12
    assert model.table.rows is None
