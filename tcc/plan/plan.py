"""The cache plan: which sites are recomputed, partly recomputed or reused at which denoising step.

A plan is data. It is checked when it is made, checked again against a model before anything compiles, and saved as
one safetensors file.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, fields
from typing import TYPE_CHECKING, Any

import torch

from tcc.errors import PlanError
from tcc.plan.actions import COMPUTE, Action, Compute, Hold, Reuse, Skip, TopK, Update
from tcc.plan.facts import Cost, ModelKey, Schedule
from tcc.plan.numbers import whole
from tcc.plan.scores import Mapped, Score, Stale, check_score, check_table
from tcc.plan.site_name import SITE_KINDS, SiteName

if TYPE_CHECKING:
    from tcc.info import ModelInfo
    from tcc.program.memory import Memory

__all__ = ["CachePlan", "check_slot_dtype"]


@dataclass(frozen=True, repr=False, eq=False)
class CachePlan:
    """The table step x site -> action, with the token sets and the scores it names.

    Sites that the plan does not name are computed at every step and never stored. A named site is computed and stored
    at every step that gives it no other action.

    Attributes:
        num_steps: the denoising steps of one run, numbered 0.. in execution order.
        actions: `{(step, site): action}`.
        tokens: `{name: [k] int64}`, sorted positions in the stream.
        scores: `{name: score}`, what dynamic token sets (`TopK`) are chosen by.
        tables: `{name: tensor}`, floating-point tensors that the scores read.
        slot_dtype: what slots keep values in that are wider: `torch.bfloat16`, or a float8 type. Values are rounded
            when they are stored, after those out of its range have been clamped to it, and computed with as they are.
            None keeps them as they are computed.
        model: the model it was made for, or None for a plan written by hand.
        policy: the policy that made it, with its options, for the record.
        cost: what it costs, where a policy has counted it.

    Raises:
        PlanError: a contradiction, with the step and the site.
    """

    num_steps: int
    actions: Mapping[tuple[int, str], Action]
    tokens: Mapping[str, torch.Tensor] = field(default_factory=dict)
    model: ModelKey | None = None
    policy: Mapping[str, Any] = field(default_factory=dict)
    cost: Cost | None = None
    scores: Mapping[str, Score] = field(default_factory=dict)
    tables: Mapping[str, torch.Tensor] = field(default_factory=dict)
    slot_dtype: torch.dtype | None = None

    def __post_init__(self) -> None:
        object.__setattr__(self, "num_steps", whole("num_steps", self.num_steps))
        if self.num_steps < 1:
            raise PlanError(f"num_steps={self.num_steps}: expected a whole number, 1 or more: a plan has steps")
        for name in ("actions", "tokens", "scores", "tables"):
            _check_named(name, getattr(self, name))
        check_slot_dtype(self.slot_dtype)
        for name, kept in self.tokens.items():
            _check_tokens(name, kept)
        for name, table in self.tables.items():
            check_table(name, table)
        for name, score in self.scores.items():
            check_score(name, score, self.tables)
        for at, action in self.actions.items():
            if not (isinstance(at, tuple) and len(at) == 2 and isinstance(at[1], str)):
                raise PlanError(f"actions: the key {at!r:.60} is no pair (step, site), such as (1, 'blocks.0.delta')")
            self._check_action(*at, action)
        object.__setattr__(
            self, "actions", {(int(step), site): action for (step, site), action in self.actions.items()}
        )
        for site in self.sites:
            self._check_reads(site)
        for name, (step, site) in self._first_choices().items():
            self._check_score_reads(f"step {step}, site '{site}'", step, name)

    def __eq__(self, other: object) -> bool:
        """Whether all fields are equal: the same table, model, policy and cost."""
        if not isinstance(other, CachePlan):
            return NotImplemented
        mine, theirs = ([getattr(plan, each.name) for each in fields(CachePlan)] for plan in (self, other))
        return all(map(_equal, mine, theirs))

    def __hash__(self) -> int:
        """Equal for equal plans."""
        return hash((self.num_steps, frozenset(self.actions.items())))

    @functools.cached_property
    def sites(self) -> tuple[str, ...]:
        """The sites that the plan names, in the order of their first mention."""
        return tuple(dict.fromkeys(site for _, site in self.actions))

    def action(self, step: int, site: str) -> Action:
        """The action at `step` for `site`."""
        return self.actions.get((step, site), COMPUTE)

    def at(self, step: int) -> dict[str, Action]:
        """The action of every named site at `step`."""
        return {site: self.action(step, site) for site in self.sites}

    def column(self, site: str) -> Iterator[tuple[int, Action]]:
        """The actions of `site`, step by step."""
        return ((step, self.action(step, site)) for step in range(self.num_steps))

    def computes(self, step: int, branch: str) -> bool:
        """Whether `step` computes the whole of `branch`: no site that keeps a part of it has another action."""
        sites = (site for site in self.sites if SiteName.parse(site).keeps_part_of(branch))
        return all(isinstance(self.action(step, site), Compute) for site in sites)

    def score_of(self, tokens: TopK) -> Score:
        """The score that a dynamic set is chosen by."""
        return self.scores[tokens.score]

    @property
    def schedule(self) -> Schedule:
        """The steps as a line of I and P."""
        mixed = {step for (step, _), action in self.actions.items() if not isinstance(action, Compute)}
        return Schedule("".join("P" if step in mixed else "I" for step in range(self.num_steps)))

    @property
    def macs(self) -> int:
        """MACs of the whole run, per image and guidance branch.

        Raises:
            PlanError: the plan has not been counted on a model (policies do it; else `tcc.inspect(...).count(plan)`).
        """
        return sum(self._cost().step_macs)

    @property
    def bound(self) -> float:
        """The speedup that the MACs allow: uncached MACs / planned MACs. A bound, not a speedup."""
        return self._cost().full_macs * self.num_steps / max(1, self.macs)

    @property
    def slot_bytes(self) -> int:
        """The bytes of all slots, for the captured batch."""
        return self._cost().slot_bytes

    def memory(self, info: ModelInfo, max_slot_bytes: int | None = None) -> Memory:
        """The slots that a session of the plan allocates, known before it runs; `.table()` shows them."""
        return info.memory(self, max_slot_bytes)

    def save(self, path: str) -> None:
        """Write the plan as one safetensors file: a JSON header and the token sets."""
        from tcc.plan.file import save  # here: plan_file builds plans

        save(self, path)

    @staticmethod
    def load(path: str) -> CachePlan:
        """Read a plan written by `save`.

        Raises:
            PlanError: the file is truncated, altered, or not a plan.
        """
        from tcc.plan.file import load

        return load(path)

    def __repr__(self) -> str:
        """One line; `summary()` and `plot()` say more."""
        name = self.policy.get("name", "by hand")
        bound = "" if self.cost is None else f", bound {self.bound:.2f}x"
        letters = str(self.schedule)
        shown = letters if len(letters) <= 50 else f"{letters[:47]}..."
        return f"<CachePlan {name}: {self.num_steps} steps {shown}, {len(self.sites)} sites{bound}>"

    def summary(self) -> str:
        """A few lines about the plan: schedule, actions, token sets, cost."""
        from tcc.plan.picture import summary

        return summary(self)

    def plot(self, path: str) -> None:
        """Draw steps x sites with the action of each as a PNG (or any format matplotlib writes)."""
        from tcc.plan.picture import plot

        plot(self, path)

    def _cost(self) -> Cost:
        if self.cost is None:
            raise PlanError(
                "the plan has no cost yet: count it with info.count(plan), where info = tcc.inspect(model, ...)"
            )
        return self.cost

    def _check_action(self, step: int, site: str, action: Action) -> None:
        where = f"step {step}, site '{site}'"
        if type(step) is not int:  # numpy's are whole numbers too
            whole(f"site '{site}': step", step)
        if not isinstance(action, Action):
            raise PlanError(f"{where}: {action!r} is not an action: write an instance, such as Reuse()")
        if not 0 <= step < self.num_steps:
            raise PlanError(f"{where}: the plan has steps 0..{self.num_steps - 1}")
        name = SiteName.parse(site)
        kind = name.kind
        if kind not in SITE_KINDS or not name.owner or str(name) != site:
            kinds = ", ".join("." + k for k in SITE_KINDS)
            raise PlanError(f"{where}: not a site name; sites end in {kinds}, or so and @stream")
        if isinstance(action, Hold) != (kind in ("stream", "skip")) and not isinstance(action, Compute):
            allowed = "compute or hold" if kind in ("stream", "skip") else "compute, update, reuse or skip"
            raise PlanError(f"{where}: {type(action).__name__.lower()} is not for this kind of site; use {allowed}")
        if kind == "kv" and isinstance(action, Skip):
            raise PlanError(f"{where}: keys and values cannot be skipped; skip the branch's delta")
        if isinstance(action, Update) and isinstance(action.tokens, str) and action.tokens not in self.tokens:
            known = ", ".join(self.tokens) or "none"
            raise PlanError(f"{where}: unknown token set '{action.tokens}' (the plan has: {known})")
        if isinstance(action, Update) and isinstance(action.tokens, TopK) and action.tokens.score not in self.scores:
            known = ", ".join(self.scores) or "none"
            raise PlanError(f"{where}: unknown score '{action.tokens.score}' (the plan has: {known})")

    def _check_reads(self, site: str) -> None:
        """Every value read was stored earlier in the same run."""
        stored = 0
        updates = [step for step, action in self.column(site) if isinstance(action, Update)]
        for step, action in self.column(site):
            if isinstance(action, Compute):
                stored += 1
                continue
            if isinstance(action, Skip):
                continue
            need = action.order + 1 if isinstance(action, Reuse) else 1
            if need > 1 and updates:
                raise PlanError(
                    f"step {step}, site '{site}': a forecast combines computed values, but step {updates[0]} updates "
                    "only some tokens of the site: compute it there, or reuse with order=0"
                )
            if stored < need:
                raise PlanError(
                    f"step {step}, site '{site}': {type(action).__name__.lower()} reads {need} stored value(s), but "
                    f"{stored} were computed before it in the run: compute the site at {need - stored} earlier step(s)"
                )

    def _first_choices(self) -> dict[str, tuple[int, str]]:
        """The scores that choose tokens, each with the first step and site that they are used at."""
        rows = sorted(self.actions.items(), key=lambda row: row[0][0], reverse=True) if self.scores else []
        return {a.tokens.score: at for at, a in rows if isinstance(a, Update) and isinstance(a.tokens, TopK)}

    def _check_score_reads(self, where: str, step: int, name: str) -> None:
        """What a score reads of earlier steps exists: maps of branches, and the age of a site's tokens."""
        for _, term in self.scores[name].terms:
            if isinstance(term, Mapped) and not any(self.computes(s, term.branch) for s in range(step)):
                raise PlanError(
                    f"{where}: score '{name}' reads how branch '{term.branch}' attended, but no earlier step computes "
                    "the branch in full: compute it at an earlier step"
                )
            if not isinstance(term, Stale):
                continue
            column = list(self.column(term.site)) if term.site in self.sites else []
            if not any(
                isinstance(a, Update) and isinstance(a.tokens, TopK) and a.tokens.score == name for _, a in column
            ):
                raise PlanError(
                    f"{where}: score '{name}' counts the age of the tokens of '{term.site}', but the plan never "
                    "updates that site with a set chosen by the score: update it so, or name another site"
                )
            if not any(isinstance(a, Compute) for s, a in column if s < step):
                raise PlanError(
                    f"{where}: score '{name}' counts the age of the tokens of '{term.site}', which no earlier step "
                    "computes: compute it at an earlier step"
                )


def _equal(one: Any, other: Any) -> bool:
    """Also of mappings to tensors."""
    if isinstance(one, Mapping) and isinstance(other, Mapping):
        return one.keys() == other.keys() and all(_equal(one[name], other[name]) for name in one)
    if isinstance(one, torch.Tensor) and isinstance(other, torch.Tensor):
        return one.dtype == other.dtype and torch.equal(one, other)
    return bool(one == other)


def check_slot_dtype(dtype: Any) -> None:
    """Slots may be kept in a floating-point type.

    Raises:
        PlanError: it is none.
    """
    if dtype is not None and not (isinstance(dtype, torch.dtype) and dtype.is_floating_point and _has_sign(dtype)):
        raise PlanError(f"slot_dtype={dtype!r}: use a floating-point type, such as torch.bfloat16")


def _has_sign(dtype: torch.dtype) -> bool:
    """Whether numbers can be cast to it one by one, negative ones too: not to float4 in pairs, and powers of two."""
    try:
        return float(torch.tensor(-1.0).to(dtype).float()) == -1.0
    except (RuntimeError, TypeError):
        return False


def _check_named(what: str, given: Any) -> None:
    if not isinstance(given, Mapping):
        key = "(step, site)" if what == "actions" else "name"
        raise PlanError(f"{what}={given!r:.60}: expected a dict, by {key}")
    for name in (name for name in given if what != "actions" and not isinstance(name, str)):
        raise PlanError(f"{what}: {name!r:.60} is no name: expected a dict, by name")


def _check_tokens(name: str, kept: torch.Tensor) -> None:
    if not isinstance(kept, torch.Tensor):
        raise PlanError(f"token set '{name}': expected an int64 tensor of positions, got {type(kept).__name__}")
    if kept.dim() != 1 or kept.dtype != torch.int64 or kept.numel() == 0:
        raise PlanError(
            f"token set '{name}': expected a non-empty 1-D int64 tensor, got {kept.dtype} {list(kept.shape)}"
        )
    if int(kept[0]) < 0 or bool((kept[1:] <= kept[:-1]).any()):
        raise PlanError(f"token set '{name}': positions must be >= 0, sorted and distinct")
