"""What a plan looks like: a few lines of text, its facts for programs, and a picture of steps x sites."""

from __future__ import annotations

import os
import textwrap
from collections import Counter
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

import torch

from tcc.errors import PlanError
from tcc.plan.actions import Action, Reuse, TopK, Update
from tcc.plan.plan import CachePlan
from tcc.plan.scores import Score
from tcc.program.memory import in_units

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

__all__ = ["facts", "plot", "summary"]

#: Label and colour of every action, in the order of the legend; lightness differs too, for grey print.
_LOOKS = {
    "compute": "#1f3a5f",
    "update, attention cached": "#7a86c8",
    "update, attention current": "#3f8fc0",
    "update, attention kept": "#6bbfb5",
    "forecast": "#e0a04f",
    "reuse": "#f5d490",
    "hold": "#d07c5c",
    "skip": "#e4e4e4",
}
_SHOWN = 6  # sizes of token sets, and scores, that a summary spells out
_WIDTH = 100  # characters to a line of the schedule
_CHARACTER = 0.094  # inches that a character of the title takes, on average and with a margin


def facts(plan: CachePlan) -> dict[str, Any]:
    """What `summary` says, for programs: plain values that JSON can hold. MACs and bytes are None while not counted."""
    cost = plan.cost
    return {
        "policy": dict(plan.policy),
        "num_steps": plan.num_steps,
        "schedule": str(plan.schedule),
        "sites": len(plan.sites),
        "actions": dict(_counts(plan)),
        "tokens": {
            name: {"k": kept.numel(), "share": _share(plan, kept.numel())} for name, kept in plan.tokens.items()
        },
        "scores": {name: _formula(score) for name, score in plan.scores.items()},
        "num_tokens": plan.model.num_tokens if plan.model else None,
        "macs": plan.macs if cost else None,
        "full_macs": cost.full_macs * plan.num_steps if cost else None,
        "bound": plan.bound if cost else None,
        "slot_bytes": plan.slot_bytes if cost else None,
        "slot_dtype": _name(plan.slot_dtype) if plan.slot_dtype else None,
    }


def summary(plan: CachePlan) -> str:
    """A few lines about `plan`: schedule, actions, token sets, cost."""
    letters = str(plan.schedule)
    rows = [("policy", _policy(plan))]
    rows += [("schedule" if i == 0 else "", letters[i : i + _WIDTH]) for i in range(0, len(letters), _WIDTH)]
    computed = letters.count("I")
    rows.append(("steps", f"{plan.num_steps}: {computed} I, {plan.num_steps - computed} P"))
    counts = ", ".join(f"{count} {name}" for name, count in _counts(plan)) or "every site computed, none stored"
    rows.append(("actions", f"{counts} ({len(plan.sites)} sites)" if plan.sites else counts))
    rows += [("tokens" if i == 0 else "", line) for i, line in enumerate(_token_lines(plan))]
    if plan.cost is None:
        rows.append(("cost", "not counted yet: info.count(plan), with info = tcc.inspect(model, ...)"))
    else:
        full = plan.cost.full_macs * plan.num_steps
        rows.append(("MACs", f"{_giga(plan.macs)} of {_giga(full)} GMAC per run, image and guidance branch"))
        rows.append(("bound", f"{plan.bound:.2f}x: the speedup that the MACs allow; measure to know the real one"))
        kept = f", wider values rounded to {_name(plan.slot_dtype)}" if plan.slot_dtype else ""
        rows.append(("slots", f"{in_units(plan.slot_bytes)} for the batch it was made for{kept}"))
    return "\n".join(f"{name:<9}{text}" for name, text in rows)


def plot(plan: CachePlan, path: str | os.PathLike[str]) -> None:
    """Draw steps x sites, coloured by action, as a PNG (or any format that matplotlib writes).

    Args:
        plan: the plan.
        path: where to; the suffix chooses the format.

    Raises:
        PlanError: no such format is written.
    """
    from matplotlib.figure import Figure  # here: matplotlib is slow to import, and only this needs it

    sites = plan.sites or ("(no site is cached)",)
    width = min(24.0, 3.4 + 0.19 * max(plan.num_steps, 24))
    title = textwrap.wrap(_title(plan), int(width / _CHARACTER))
    height = min(30.0, 1.9 + 0.19 * max(len(sites), 3)) + 0.18 * (len(title) - 1)
    figure = Figure(figsize=(width, height), dpi=120, layout="constrained")
    axes = figure.add_subplot()
    labels = _draw_cells(axes, plan, sites)
    _label_axes(axes, plan, sites)
    _legend(figure, labels)
    figure.suptitle("\n".join(title), fontsize=11, x=0.02, ha="left")
    try:
        figure.savefig(path)
    except (ValueError, OSError) as error:  # names the formats that there are, or what the system says
        raise PlanError(f"{os.fspath(path)}: {error}") from error


def _draw_cells(axes: Axes, plan: CachePlan, sites: tuple[str, ...]) -> list[str]:
    """Fill the table, one cell for each step and site; returns the labels that occur, in the order of the legend."""
    from matplotlib.colors import ListedColormap

    table = [[_label(plan.action(step, site)) for step in range(plan.num_steps)] for site in sites]
    number = {label: i for i, label in enumerate(_LOOKS)}
    axes.pcolormesh(
        [[number[label] for label in row] for row in table],
        cmap=ListedColormap(list(_LOOKS.values())),
        vmin=-0.5,
        vmax=len(_LOOKS) - 0.5,
        edgecolors="white",
        linewidth=0.6,
    )
    return [label for label in _LOOKS if any(label in row for row in table)]


def _label_axes(axes: Axes, plan: CachePlan, sites: tuple[str, ...]) -> None:
    """Step numbers below, I and P above, sites at the left from the first one down."""
    ticks = range(0, plan.num_steps, 5 if plan.num_steps > 12 else 1)
    axes.set_xticks([tick + 0.5 for tick in ticks], [str(tick) for tick in ticks], fontsize=8)
    axes.set_yticks([row + 0.5 for row in range(len(sites))], list(sites), fontsize=7, family="monospace")
    axes.invert_yaxis()
    axes.tick_params(length=0)
    axes.set_xlabel("step (noisiest first)", fontsize=9)
    for spine in axes.spines.values():
        spine.set_visible(False)
    size = min(8.0, 500 / plan.num_steps)
    for step, letter in enumerate(str(plan.schedule)):
        axes.annotate(
            letter,
            (step + 0.5, 1.0),
            xycoords=("data", "axes fraction"),
            xytext=(0, 3),
            textcoords="offset points",
            ha="center",
            fontsize=size,
            family="monospace",
            color="black" if letter == "I" else "#999999",
            weight="bold" if letter == "I" else "normal",
        )


def _legend(figure: Figure, labels: list[str]) -> None:
    from matplotlib.patches import Patch

    patches = [Patch(facecolor=_LOOKS[label], label=label) for label in labels]
    figure.legend(handles=patches, loc="outside lower center", ncols=len(patches), frameon=False, fontsize=8)


def _title(plan: CachePlan) -> str:
    bound = f"   bound\N{NO-BREAK SPACE}{plan.bound:.2f}x" if plan.cost else ""
    return _policy(plan) + bound


def _label(action: Action) -> str:
    """The action's entry in the legend."""
    if isinstance(action, Update):
        return f"update, attention {action.attention}"
    if isinstance(action, Reuse) and action.order:
        return "forecast"
    return type(action).__name__.lower()


def _counts(plan: CachePlan) -> list[tuple[str, int]]:
    """How often each action occurs over all steps and named sites, in the order of the legend."""
    counts = Counter(_label(plan.action(step, site)) for site in plan.sites for step in range(plan.num_steps))
    return [(label, counts[label]) for label in _LOOKS if counts[label]]


def _policy(plan: CachePlan) -> str:
    options = [f"{key}={_short(option)}" for key, option in plan.policy.items() if key != "name"]
    name = str(plan.policy.get("name", "written by hand"))
    return f"{name}({', '.join(options)})" if options else name


def _short(option: Any) -> str:
    """An option's value; a run of consecutive numbers as `first..last`."""
    if isinstance(option, (list, tuple)) and len(option) > 2 and option == list(range(option[0], option[-1] + 1)):
        return f"{option[0]}..{option[-1]}"
    return f"{option:g}" if isinstance(option, float) else str(option)


def _token_lines(plan: CachePlan) -> list[str]:
    """The static token sets by their size, and what dynamic ones are chosen by."""
    sizes: dict[int, list[str]] = {}
    for name, kept in plan.tokens.items():
        sizes.setdefault(kept.numel(), []).append(name)
    lines = [f"{_sets(names)}: {_out_of(plan, size)}" for size, names in [*sizes.items()][:_SHOWN]]
    if rest := [*sizes.items()][_SHOWN:]:
        lines.append(
            f"and {_sets([n for _, names in rest for n in names])}: {_range(sorted(size for size, _ in rest))}"
        )
    dynamic = _dynamic(plan)
    lines += [f"top {_range(dynamic[name])} by {name}: {_formula(plan.scores[name])}" for name in [*dynamic][:_SHOWN]]
    return lines + ([f"and by {len(dynamic) - _SHOWN} more scores"] if len(dynamic) > _SHOWN else [])


def _sets(names: list[str]) -> str:
    """One set by its name, several by their number."""
    return names[0] if len(names) == 1 else f"{len(names)} sets"


def _out_of(plan: CachePlan, count: int) -> str:
    share = _share(plan, count)
    return f"{count} of {plan.model.num_tokens} ({share:.0%})" if plan.model and share is not None else str(count)


def _dynamic(plan: CachePlan) -> dict[str, list[int]]:
    """The scores that choose tokens, in the order of the plan, each with the sizes of its sets."""
    found: dict[str, set[int]] = {}
    for action in plan.actions.values():
        if isinstance(action, Update) and isinstance(action.tokens, TopK):
            found.setdefault(action.tokens.score, set()).add(action.tokens.count)
    return {name: sorted(found[name]) for name in plan.scores if name in found}


def _range(counts: list[int]) -> str:
    return str(counts[0]) if len(counts) == 1 else f"{counts[0]}..{counts[-1]}"


def _formula(score: Score) -> str:
    """A score in one line: its weighted terms, and how the highest are taken."""
    terms = []
    for weight, term in score.terms:
        of = next(iter(asdict(term).values()))
        terms.append(f"{weight:g} {type(term).__name__.lower()}({of})")
    text = " + ".join(terms)
    if score.cell:
        text += f", cells of {score.cell} x {score.cell}"
    if score.bonus:
        text += f", bonus {score.bonus:g}"
    return text + (", per cell" if score.per_cell else "") + (", shared by the batch" if score.shared else "")


def _share(plan: CachePlan, count: int) -> float | None:
    return count / plan.model.num_tokens if plan.model else None


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _giga(macs: int) -> str:
    return f"{macs / 1e9:.4g}"
