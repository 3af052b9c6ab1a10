"""Policies on the command line: their names, their options as text, and what their docstrings say about both."""

from __future__ import annotations

import contextlib
import difflib
import inspect
import os
import types
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

from rich.markup import escape
from rich.table import Table

from tcc.cli.options import BackwardsError, whole_numbers
from tcc.errors import PlanError
from tcc.plan import CachePlan
from tcc.plans import POLICIES

__all__ = ["PolicyOption", "describe", "find_policy", "option_table", "options_of", "parse_options", "policy_table"]

Policy = Callable[..., CachePlan]


@dataclass(frozen=True)
class PolicyOption:
    """An option of a policy.

    Attributes:
        name: its name.
        types: the types it may have, as annotated, without those that no text stands for, such as tensors.
        default: its default; `inspect.Parameter.empty` where it must be given.
        help: what the docstring says about it.
    """

    name: str
    types: tuple[Any, ...]
    default: Any
    help: str

    @property
    def forms(self) -> str:
        """What it may be, in words."""
        words = [word for kind in sorted(self.types, key=lambda kind: kind is types.NoneType) for word in _words(kind)]
        return " or ".join(dict.fromkeys(words))

    @property
    def default_text(self) -> str:
        """Its default as it would be typed."""
        return "must be given" if self.default is inspect.Parameter.empty else str(self.default).lower()

    def parse(self, text: str) -> Any:
        """The value that `text` stands for, by the first type that takes it.

        Raises:
            PlanError: none does.
        """
        try:
            for kind in self.types:
                with contextlib.suppress(ValueError):
                    return _READERS[_family(kind)](kind, text)
        except BackwardsError as error:
            raise PlanError(f"option {self.name}={text}: {error}") from error
        raise PlanError(f"option {self.name}={text}: give {self.forms}")


def find_policy(name: str) -> Policy:
    """The policy of that name.

    Raises:
        PlanError: there is none; names near ones, or all.
    """
    if name not in POLICIES:
        near = difflib.get_close_matches(name, POLICIES, n=1)
        raise PlanError(
            f"unknown policy '{name}': {f'did you mean {near[0]}? ' if near else ''}Policies are {', '.join(POLICIES)}"
        )
    return POLICIES[name]


def options_of(policy: Policy) -> dict[str, PolicyOption]:
    """The options of a policy, all but the model and the number of steps."""
    hints, meanings = get_type_hints(policy), _arguments(policy)
    return {
        name: PolicyOption(name, _types(hints[name]), parameter.default, meanings.get(name, ""))
        for name, parameter in inspect.signature(policy).parameters.items()
        if name not in ("info", "num_steps")
    }


def parse_options(name: str, given: Iterable[str]) -> dict[str, Any]:
    """The values of `name=value` texts, for the policy of that name.

    Raises:
        PlanError: the policy has no such option, needs one that is missing, or a value is none of an option's.
    """
    known, found = options_of(find_policy(name)), {}
    for text in given:
        option, equals, value = text.partition("=")
        if not equals or option not in known:
            takes = f"its options are {', '.join(known)}" if known else "it has none"
            what = f"policy {name} has no option '{option}'" if equals else f"'{text}' is not of the form name=value"
            raise PlanError(f"{what}; {takes} (tcc plan --policy {name} --explain)")
        found[option] = known[option].parse(value)
    for missing in known.values():
        if missing.default is inspect.Parameter.empty and missing.name not in found:
            raise PlanError(f"policy {name} needs -o {missing.name}=VALUE: {missing.forms}")
    return found


def describe(policy: Policy) -> str:
    """The docstring of a policy, without the part on its arguments."""
    return inspect.getdoc(policy).partition("\nArgs:")[0].rstrip()  # type: ignore[union-attr]


def policy_table() -> Table:
    """Every policy with the first line of its docstring."""
    table = Table(box=None, show_header=False, padding=(0, 2, 0, 0))
    for name, policy in POLICIES.items():
        table.add_row(name, escape(describe(policy).partition("\n")[0]))
    return table


def option_table(policy: Policy) -> Table:
    """Every option of a policy: what it may be, its default, and what it does."""
    table = Table("option", "values", "default", "meaning", box=None, padding=(0, 2, 0, 0))
    for option in options_of(policy).values():
        table.add_row(option.name, option.forms, option.default_text, escape(option.help))
    return table


def _arguments(policy: Policy) -> dict[str, str]:
    """What the `Args:` part of the docstring says about every argument."""
    meanings: dict[str, str] = {}
    part = inspect.getdoc(policy).partition("\nArgs:\n")[2].partition("\n\n")[0]  # type: ignore[union-attr]
    name = ""
    for line in part.splitlines():
        if line.startswith("     "):  # goes on
            meanings[name] += f" {line.strip()}"
        else:
            name, _, meaning = line.strip().partition(": ")
            meanings[name] = meaning
    return meanings


def _types(annotation: Any) -> tuple[Any, ...]:
    """The members of an annotation that text can stand for, the most special first."""
    members = get_args(annotation) if get_origin(annotation) in (Union, types.UnionType) else (annotation,)
    return tuple(sorted((m for m in members if _family(m) in _READERS), key=lambda m: list(_READERS).index(_family(m))))


def _family(kind: Any) -> Any:
    """What decides how a type is read."""
    if get_origin(kind) is Sequence:
        return Sequence
    if kind in (str, Path) or get_origin(kind) is os.PathLike:
        return str
    return Literal if get_origin(kind) is Literal else kind


def _choice(kind: Any, text: str) -> Any:
    return get_args(kind)[[str(member) for member in get_args(kind)].index(text)]


def _word(kind: Any, text: str) -> Any:
    values = {"none": None} if kind is types.NoneType else {"true": True, "yes": True, "false": False, "no": False}
    if text.lower() not in values:
        raise ValueError(text)
    return values[text.lower()]


def _numbers(kind: Any, text: str) -> Any:
    return whole_numbers(text) if get_args(kind)[0] is int else [float(part) for part in text.split(",")]


#: How a text is read as a value, family by family; earlier ones are tried first.
_READERS: dict[Any, Callable[[Any, str], Any]] = {
    Literal: _choice,
    types.NoneType: _word,
    bool: _word,
    int: lambda _, text: int(text),
    float: lambda _, text: float(text),
    Sequence: _numbers,
    str: lambda _, text: text,
}
_WORDS = {
    types.NoneType: "none",
    bool: "true or false",
    int: "a whole number",
    float: "a number",
    str: "a name or file",
}


def _words(kind: Any) -> list[str]:
    family = _family(kind)
    if family is Literal:
        return [str(member) for member in get_args(kind)]
    if family is Sequence:
        return ["numbers such as 0-3,7" if get_args(kind)[0] is int else "numbers such as 0.5,1"]
    return [_WORDS[family]]
