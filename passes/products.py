"""Products of two values in one form: which dimension of each factor becomes which dimension of the result."""

from __future__ import annotations

import string
from collections.abc import Collection, Iterator
from dataclasses import dataclass

import torch
from torch import fx

from tcc.passes.graph import shape
from tcc.passes.paths import Path

__all__ = ["Product", "product", "with_dimension"]

aten = torch.ops.aten
_BATCH = 0x1000  # labels of leading dimensions: no letters, so that they never meet those of an einsum
_SUMS = {aten.addmm.default, aten.baddbmm.default}
_MATMULS = {aten.mm.default, aten.bmm.default, aten.matmul.default, *_SUMS}


@dataclass(frozen=True)
class Product:
    """A product as an einsum: one label for every dimension of the factors and of the result.

    Attributes:
        factors: the labels of every factor, by its place in the call.
        result: the labels of the result.
        addend: the labels of what is added to it, likewise; {} where nothing is.
    """

    factors: dict[Path, str]
    result: str
    addend: dict[Path, str]

    def repeats(self, path: Path, dim: int) -> bool:
        """Whether the operand at `path` may have 1, or nothing, where the result has its dimension `dim`."""
        return path in self.addend or ord(self.result[dim]) >= _BATCH

    def summed(self) -> set[str]:
        """The labels that several factors share and the result does not have."""
        labels = [set(found) for found in self.factors.values()]
        return {label for found in labels for label in found if sum(label in o for o in labels) > 1} - set(self.result)


def product(node: fx.Node) -> Product | None:
    """The product that `node` computes, or None: it is none of two computed values, or has a form that is not read."""
    if node.target in _MATMULS:
        first = 1 if node.target in _SUMS else 0
        return _matmul(node, first)
    if node.target is aten.outer.default:
        return Product({(0,): "m", (1,): "n"}, "mn", {})
    if node.target is aten.einsum.default:
        return _einsum(node)
    return None


def _matmul(node: fx.Node, first: int) -> Product:
    ranks = [len(shape(node.args[at])) for at in (first, first + 1)]  # type: ignore[arg-type]
    rows, columns = "m" if ranks[0] > 1 else "", "n" if ranks[1] > 1 else ""
    left = _leading(ranks[0] - len(rows) - 1) + rows + "k"
    right = _leading(ranks[1] - len(columns) - 1) + "k" + columns
    result = _leading(len(shape(node)) - len(rows + columns)) + rows + columns
    addend: dict[Path, str] = {(0,): result[len(result) - len(shape(node.args[0])) :]} if first else {}  # type: ignore[arg-type]
    factors: dict[Path, str] = {(first,): left, (first + 1,): right}
    return Product(factors, result, addend)


def _leading(count: int) -> str:
    """Labels for leading dimensions, aligned at the last of them."""
    return "".join(chr(_BATCH + i) for i in reversed(range(count)))


def _einsum(node: fx.Node) -> Product | None:
    equation, factors = str(node.args[0]).replace(" ", ""), list(node.args[1])  # type: ignore[arg-type]
    inputs, arrow, result = equation.partition("->")
    terms = inputs.split(",")
    if not arrow:
        letters = [c for c in inputs if c.isalpha()]
        result = ("..." if "..." in inputs else "") + "".join(sorted(c for c in letters if letters.count(c) == 1))
    labelled = list(_without_ellipsis(terms, [len(shape(f)) for f in factors]))
    width = len(shape(node)) - len(result.replace("...", ""))
    if any(len(set(labels)) < len(labels) for labels in labelled):  # a diagonal
        return None
    return Product({(1, i): labels for i, labels in enumerate(labelled)}, result.replace("...", _leading(width)), {})


def _without_ellipsis(terms: list[str], ranks: list[int]) -> Iterator[str]:
    for term, rank in zip(terms, ranks, strict=True):
        yield term.replace("...", _leading(rank - len(term.replace("...", ""))))


def with_dimension(node: fx.Node, paths: Collection[Path], dim: int) -> str | None:
    """The equation of einsum `node` if the factors at `paths` had the result's dimension `dim` too, in front.

    None where it is no einsum that can be read, or one of them has that dimension.
    """
    labels = product(node) if node.target is aten.einsum.default else None
    if labels is None or any(labels.result[dim] in labels.factors[path] for path in paths):
        return None
    used = sorted({*"".join(labels.factors.values()), *labels.result})
    free = (c for c in string.ascii_letters if c not in used)
    letters = {c: c if ord(c) < _BATCH else next(free) for c in used}
    terms = [labels.result[dim] * (path in paths) + found for path, found in labels.factors.items()]
    return "".join(letters.get(c, c) for c in f"{','.join(terms)}->{labels.result}")
