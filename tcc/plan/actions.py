"""What can happen to a site at a step."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar, Literal, get_args

from tcc.errors import PlanError
from tcc.plan.numbers import number, whole

__all__ = ["COMPUTE", "Action", "Attention", "Compute", "Hold", "Reuse", "Skip", "TopK", "Update"]

Attention = Literal["kept", "current", "cached"]


@dataclass(frozen=True)
class Compute:
    """The site is computed and stored."""

    letter: ClassVar[str] = "I"


@dataclass(frozen=True)
class TopK:
    """A dynamic token set: the `count` tokens of each sample with the highest score, chosen in the graph.

    The same `TopK` at several sites of a step is one set. Of tokens with equal scores, the first ones are taken.

    Attributes:
        score: the name of a score of the plan.
        count: how many tokens are kept, over all grid cells.
    """

    score: str
    count: int

    def __post_init__(self) -> None:
        object.__setattr__(self, "count", whole("TopK: count", self.count))
        if self.count < 1:
            raise PlanError(f"TopK(count={self.count}): at least one token must be kept")


@dataclass(frozen=True)
class Update:
    """Some tokens are recomputed; the others have their stored value.

    Attributes:
        tokens: the name of a token set of the plan, or a dynamic set.
        attention: what the kept queries see: `kept` (the kept tokens alone), `current` (keys and values of all
            tokens, computed now) or `cached` (keys and values from the branch's `kv` slot, whose kept rows are
            refreshed first).
        store: whether the recomputed tokens are stored, or all tokens keep the value that was stored before.
    """

    letter: ClassVar[str] = "U"
    tokens: str | TopK
    attention: Attention = "kept"
    store: bool = True

    def __post_init__(self) -> None:
        if not isinstance(self.tokens, (str, TopK)):
            raise PlanError(
                f"Update(tokens={type(self.tokens).__name__}): give the name of a token set, and the set itself to "
                "CachePlan(tokens={name: positions})"
            )
        if self.attention not in get_args(Attention):
            raise PlanError(f"Update(attention={self.attention!r}): use one of {', '.join(get_args(Attention))}")
        if not isinstance(self.store, bool):
            raise PlanError(f"Update(store={self.store!r:.60}): use True or False")


@dataclass(frozen=True)
class Reuse:
    """The stored value stands in for the site.

    Attributes:
        order: 0 for the stored value itself; m > 0 for a fixed linear combination of the last m + 1 computed values.
        coefficients: its m + 1 weights, newest value first.
    """

    letter: ClassVar[str] = "R"
    order: int = 0
    coefficients: tuple[float, ...] = ()

    def __post_init__(self) -> None:
        object.__setattr__(self, "order", whole("Reuse: order", self.order))
        expected = self.order + 1 if self.order else 0
        if self.order < 0 or len(self.coefficients) != expected:
            raise PlanError(
                f"Reuse(order={self.order}) takes {expected} coefficients (newest first), got {len(self.coefficients)}"
            )
        weights = tuple(number("Reuse: coefficient", c) or 0.0 for c in self.coefficients)  # -0.0 is equal to 0.0
        if not all(map(math.isfinite, weights)):
            raise PlanError(f"Reuse(order={self.order}): the coefficients must be finite, got {self.coefficients}")
        object.__setattr__(self, "coefficients", weights)


@dataclass(frozen=True)
class Hold:
    """Like reuse, on a stream or a skip: what only fed it is not computed at all."""

    letter: ClassVar[str] = "H"


@dataclass(frozen=True)
class Skip:
    """The site is zero, and nothing is stored: the branch is dropped."""

    letter: ClassVar[str] = "-"


Action = Compute | Update | Reuse | Hold | Skip
COMPUTE = Compute()
