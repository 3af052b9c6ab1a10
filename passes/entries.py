"""What one kind of step does at every span of sites, and what it notes down for scores."""

from __future__ import annotations

from dataclasses import dataclass

from tcc.passes.keys import Cross
from tcc.passes.sites import Site
from tcc.plan import Action
from tcc.plan.scores import Mapped

__all__ = ["NO_RECORDS", "Entry", "Records", "history"]


@dataclass(frozen=True)
class Entry:
    """What one kind of step does at one span of sites.

    Attributes:
        sites: sites that are added to the stream one after the other and share one slot (the sum), or a single site.
        action: the action; a token set is named by the number of its input (`"0"`, `"1"`, ...).
        depth: how many computed values the span keeps (1, or forecast order + 1).
        coefficients: the number of the coefficient input that a forecast reads.
        narrowing: the token set of each site, by number, where they differ: each within the one before. The slot then
            keeps, of every token, the sum of the sites that do not keep it; `action` is that of the last site.
    """

    sites: tuple[Site, ...]
    action: Action
    depth: int = 1
    coefficients: int = 0
    narrowing: tuple[str, ...] = ()

    @property
    def slots(self) -> tuple[str, ...]:
        """Slot names of the newest value: one, or K and V."""
        if len(self.sites) == 1:
            return self.sites[0].slots
        return (f"{self.sites[0].name}+{len(self.sites) - 1}",)

    @property
    def sets(self) -> tuple[tuple[Site, str], ...]:
        """The sites, each with its token set where they differ, else with `""`."""
        return tuple(zip(self.sites, self.narrowing or ("",) * len(self.sites), strict=True))


@dataclass(frozen=True)
class Records:
    """What one kind of step notes down for the scores of later steps.

    Attributes:
        maps: terms that read the attention of a branch that the step computes in full, each with where that is.
        ages: sites and what the step does there: `None` computes, `""` keeps no token, else the number of a token set.
        shape: `[B, S]`.
    """

    maps: tuple[tuple[Mapped, Site | Cross], ...] = ()
    ages: tuple[tuple[str, str | None], ...] = ()
    shape: tuple[int, int] = (1, 1)


NO_RECORDS = Records()


def history(slot: str, age: int) -> str:
    """The slot that keeps the value computed `age` computations before the newest."""
    return f"{slot}~{age}" if age else slot
