"""What the options of policies may be: the checks that they share. A bool is no number here."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from numbers import Integral

from tcc.errors import PlanError

__all__ = ["check_i_steps", "check_keep", "check_known", "check_number", "check_seed", "check_share", "check_whole"]


def check_whole(name: str, value: object, least: int, most: int | None = None) -> None:
    """Refuse what is not a whole number of at least `least`, and of at most `most` where it is given."""
    if not _is_whole(value) or value < least or (most is not None and value > most):  # type: ignore[operator]
        allowed = f"{least} or more" if most is None else f"{least}..{most}"
        raise PlanError(f"{name}={value!r}: expected a whole number, {allowed}")


def check_known(name: str, value: object, known: Sequence[str]) -> None:
    """Refuse what is none of the values that an option has."""
    if value not in known:
        raise PlanError(f"{name}={value!r}: use one of {', '.join(known)}")


def check_number(
    name: str, value: object, least: float = -math.inf, most: float = math.inf, what: str = "a number"
) -> None:
    """Refuse what is not a finite number in `least`..`most`; `what` says what the number is."""
    number = isinstance(value, (int, float)) and not isinstance(value, bool)
    if not number or not least <= value <= most or abs(value) == math.inf:  # type: ignore[operator, arg-type]
        allowed = f"{least:g}..{most:g}" if most < math.inf else f"{least:g} or more" if least > -math.inf else "finite"
        raise PlanError(f"{name}={value}: expected {what}, {allowed}")


def check_share(name: str, value: object) -> None:
    """Refuse what is not a share, 0..1."""
    check_number(name, value, 0, 1, "a share")


def check_keep(keep: object, name: str = "keep") -> None:
    """Refuse a keep ratio outside (0, 1]."""
    if isinstance(keep, bool) or not isinstance(keep, (int, float)) or not 0 < keep <= 1:
        raise PlanError(
            f"{name}={keep}: the keep ratio is in (0, 1]; to reuse all tokens use a reuse plan such as fora"
        )


def check_seed(seed: object) -> None:
    """Refuse what numpy's generators do not take as a seed."""
    check_whole("seed", seed, 0)


def check_i_steps(name: str, steps: object, num_steps: int) -> tuple[int, ...]:
    """The steps in order, each once.

    Raises:
        PlanError: they are not all steps of the run, or the first step is not among them, which has nothing to reuse.
    """
    found = list(steps) if isinstance(steps, Iterable) else []
    if not all(_is_whole(step) and 0 <= step < num_steps for step in found) or 0 not in found:
        raise PlanError(f"{name}={steps!r}: steps are 0..{num_steps - 1}, and the first computes everything")
    return tuple(sorted({int(step) for step in found}))


def _is_whole(value: object) -> bool:
    return isinstance(value, Integral) and not isinstance(value, bool)  # numpy's whole numbers too
