"""Random valid plans on random tiny models, compiled and compared with the reference interpreter.

`python -m tests.fuzz_plans --examples 5000` runs as many as asked; `tests/test_fuzz.py` runs some in every test run.
"""

from __future__ import annotations

import argparse
import functools
import sys
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import hypothesis
import hypothesis.strategies as st
import torch
from hypothesis import HealthCheck, Phase

import tcc
from tcc.errors import PlanError
from tcc.lowering import lower
from tcc.passes.sites import Site
from tcc.plan import Action, CachePlan, Compute, Hold, Reuse, Skip, TopK, Update
from tcc.plan.checks import check_sites
from tcc.plan.scores import Attended, Fixed, Norm, Probe, Score, Stale, Term
from tcc.program import build_program
from tcc.runtime import Session
from tcc.runtime.cuda_graphs import Record
from tcc.runtime.folding import Folding, find_folding
from tests import block_styles, joint_models, styles, tiny_models
from tests.odd_styles import ODD as ODD_STYLES
from tests.tiny_models import Case, relative_error, tensor_of

#: Both sides compute the same sums in another order; a step has a few hundred roundings of 6e-8.
TOLERANCE = 2e-5
MAX_STEPS = 8

#: (name or DiT options): widths 16-32, depth 1-3, 1-2 heads, 4-16 tokens, batch 1-2, with and without learned sigma.
DITS: tuple[dict[str, Any], ...] = (
    {"input_size": 8, "hidden_size": 16, "depth": 1, "num_heads": 1, "batch": 1},
    {"input_size": 8, "hidden_size": 32, "depth": 2, "num_heads": 2, "batch": 2},
    {"input_size": 4, "hidden_size": 16, "depth": 2, "num_heads": 1, "batch": 2, "learn_sigma": False},
    {"input_size": (4, 8), "hidden_size": 16, "depth": 3, "num_heads": 2, "batch": 1, "learn_sigma": False},
    {"input_size": (6, 4), "hidden_size": 32, "depth": 2, "num_heads": 2, "batch": 1},
    {"input_size": (6, 6), "hidden_size": 16, "depth": 3, "num_heads": 1, "batch": 2},
)
#: Several streams; branches that share a table, read more keys, choose experts, or cannot be pruned.
JOINT = ("joint", "joint, then single", "audio", "hf_sd3")
ODD = ("causal", "more keys", "experts", "linear attention", "windows", "bias of the query, by pair")
STYLES: dict[str, Callable[[], Case]] = {
    **{
        name: functools.partial(tiny_models.case, name)
        for name in ("separate", "parallel", "flat", "headless", "long_skip", "rescaled", "conv", "hf_pixart")
    },
    **{name: functools.partial(tiny_models.case, name) for name in ("uvit", "mdt", "mdtv2")},
    "rotary": styles.rotary,
    "masked": styles.masked,
    "written_out": styles.written_out,
    "tokens_first": styles.tokens_first,
    "channel_major": styles.channel_major,
    **{name: functools.partial(joint_models.joint, name) for name in JOINT},
    **{name: ODD_STYLES[name].case for name in ODD[:-1]},
    ODD[-1]: block_styles.STYLES[ODD[-1]].case,
}
MODELS: tuple[str, ...] = (*(f"dit{i}" for i in range(len(DITS))), *STYLES)


@functools.cache
def model(name: str) -> Case:
    """The case of that name in `MODELS`, or an odd style, captured once."""
    if name in STYLES or name in ODD_STYLES:
        return STYLES[name]() if name in STYLES else ODD_STYLES[name].case()
    return tiny_models.dit(**DITS[int(name.removeprefix("dit"))])


@dataclass(frozen=True)
class Example:
    """A model by name, a plan for it, whether every pass is verified, and whether the timesteps are known before."""

    model: str
    plan: tcc.CachePlan
    check: bool
    folded: bool = False

    def __repr__(self) -> str:
        """The plan as a table: one line per site, one column per step."""
        lines = [f"model {self.model}, {self.plan.num_steps} steps, check={self.check}, folded={self.folded}"]
        lines += [f"  {name} = {kept.tolist()}" for name, kept in self.plan.tokens.items()]
        lines += [f"  {name} = {score}" for name, score in self.plan.scores.items()]
        for site in self.plan.sites:
            cells = (_cell(action) for _, action in self.plan.column(site))
            lines.append(f"  {site:24} " + " | ".join(cells))
        return "\n".join(lines)


def _cell(action: Action) -> str:
    if isinstance(action, Update):
        return f"update {action.tokens} {action.attention}{'' if action.store else ' unstored'}"
    if isinstance(action, Reuse) and action.order:
        return f"reuse {action.coefficients}"
    return type(action).__name__.lower()


class _Draft:
    """A plan that is drawn block by block and step by step, and is valid at every point."""

    def __init__(self, draw: Callable[[Any], Any], info: tcc.ModelInfo) -> None:
        self.draw, self.info = draw, info
        self.num_steps = draw(st.integers(1, MAX_STEPS))
        self.tokens = self._token_sets()
        self.scores = [f"S{i}" for i in range(draw(st.integers(0, 2)))]
        kinds = draw(st.integers(1, 3))
        self.rows = [0, *(draw(st.integers(0, kinds)) for _ in range(self.num_steps - 1))]
        self.choices: dict[Any, Any] = {}
        self.actions: dict[tuple[int, str], Action] = {}
        self.alike = draw(st.booleans())

    def plan(self) -> tcc.CachePlan:
        for block in range(len(self.info.blocks) + 1):
            sites = [s for s in self.info.sites.values() if s.block == block]
            for site in self._pick_sites(sites, block):
                self._fill_column(site)
        rows = list(self.actions.items())
        if self.draw(st.booleans()):  # the order in which a plan names its sites means nothing
            rows.reverse()
        return self._with_scores(dict(rows))

    def _token_sets(self) -> dict[str, torch.Tensor]:
        n = self.info.num_tokens
        sets = self.draw(st.lists(st.sets(st.integers(0, n - 1), min_size=1), min_size=1, max_size=3))
        return {f"T{i}": torch.tensor(sorted(kept)) for i, kept in enumerate(sets)}

    def _with_scores(self, actions: dict[tuple[int, str], Action]) -> CachePlan:
        """The plan with scores that are valid for it: terms that it does not allow are drawn and left out."""
        tables = _tables(self.info)
        drawn: dict[str, Score] = {}
        for name in self.scores:
            fixed = ((1.0, Fixed(self.draw(st.sampled_from(["one", "each"])))),)
            drawn[name] = Score(fixed, shared=self.draw(st.booleans()))
        for name in self.scores:
            for term in self.draw(st.lists(self._terms(name, actions), max_size=2)):
                weight = self.draw(st.sampled_from([1.0, 0.25, -1.0]))
                wider = drawn | {name: replace(drawn[name], terms=(*drawn[name].terms, (weight, term)))}
                drawn = wider if self._is_valid(actions, wider, tables) else drawn
            for options in self.draw(st.lists(st.sampled_from(_OPTIONS), max_size=2)):
                wider = drawn | {name: replace(drawn[name], **options)}
                drawn = wider if self._is_valid(actions, wider, tables) else drawn
        return self._made(actions, drawn, tables)

    def _made(
        self, actions: dict[tuple[int, str], Action], scores: dict[str, Score], tables: dict[str, torch.Tensor]
    ) -> CachePlan:
        return CachePlan(self.num_steps, actions, self.tokens, scores=scores, tables=tables)

    def _is_valid(self, *parts: Any) -> bool:
        try:
            check_sites(self._made(*parts), self.info.analysis)
        except PlanError:
            return False
        return True

    def _terms(self, score: str, actions: dict[tuple[int, str], Action]) -> st.SearchStrategy[Term]:
        """Terms for a score; ages of the sites that it chooses tokens for."""
        sites = self.info.sites.values()
        values = [s.name for s in sites]
        streams = [s.name for s in sites if s.kind == "stream"]
        options: list[st.SearchStrategy[Term]] = [
            st.sampled_from(values).map(Norm),
            st.sampled_from(streams).map(lambda site: Probe(site, "hidden", "offset", "weight", "one")),
        ]
        branches = [s.name.removesuffix(".kv") for s in sites if s.kind == "kv"]
        aged = {site for (_, site), a in actions.items() if isinstance(a, Update) and _chosen_by(a) == score}
        options += [st.sampled_from(branches).map(Attended)] * bool(branches)
        options += [st.sampled_from(sorted(aged)).map(Stale)] * bool(aged)
        return st.integers(0, len(options) - 1).flatmap(options.__getitem__)

    def _sets(self) -> st.SearchStrategy[str | TopK]:
        """Static sets, and dynamic ones of half the tokens, or of a quarter."""
        n = self.info.num_tokens
        dynamic = [TopK(name, max(1, n // part)) for name in self.scores for part in (2, 4)]
        return st.one_of(st.sampled_from([*sorted(self.tokens), *dynamic]), st.sampled_from([*dynamic, "T0"]))

    def _once(self, key: Any, strategy: st.SearchStrategy[Any]) -> Any:
        """One draw per key; where all blocks are alike, the key has no block in it."""
        if key not in self.choices:
            self.choices[key] = self.draw(strategy)
        return self.choices[key]

    def _pick_sites(self, sites: list[Site], block: int) -> list[Site]:
        """Sites of one block that do not overlap, keys first: what the others may do depends on them."""
        here = 0 if self.alike else block
        kinds = ("kv", "stream", "skip", "block", "out", "delta")
        by_kind = {kind: [s for s in sites if s.kind == kind] for kind in kinds}
        levels = ["none", "branch", "branch", *(["block", "block"] if by_kind["block"] else [])]
        picked = [s for s in by_kind["kv"] if self._once(("kv", here), st.booleans())]
        level = self._once(("level", here), st.sampled_from(levels))
        if level == "block":
            picked += by_kind["block"]
        elif level == "branch":
            for out, delta in zip(by_kind["out"], by_kind["delta"], strict=True):
                branch = out.name.rsplit(".", 2)[1]
                kind = self._once(("branch", here, branch), st.sampled_from(["out", "delta", "delta", "none"]))
                picked += {"out": [out], "delta": [delta], "none": []}[kind]
        for kind in ("stream", "skip"):
            held = bool(by_kind[kind]) and self._once((kind, block), st.sampled_from([False, True, False]))
            picked += by_kind[kind] if held else []
        return picked

    def _fill_column(self, site: Site) -> None:
        here = site.name if not self.alike else site.name.removeprefix(self._block_name(site))
        forecasts = self._once(("forecasts", here), st.sampled_from([False, True, False]))
        stored = 0
        for step in range(self.num_steps):
            row = self.rows[step]
            wanted = self._once((here, row), self._action(site, forecasts)) if row else Compute()
            action = self._repair(site, step, wanted, stored)
            stored += isinstance(action, Compute)
            self.actions[step, site.name] = action

    def _block_name(self, site: Site) -> str:
        return self.info.blocks[site.block] if site.block < len(self.info.blocks) else "out"

    def _action(self, site: Site, forecasts: bool) -> st.SearchStrategy[Action]:
        if site.kind in ("stream", "skip"):
            return st.sampled_from([Compute(), Hold()])
        options: list[st.SearchStrategy[Action]] = [st.just(Reuse()), st.just(Compute())]
        if site.kind != "kv":
            options.append(st.just(Skip()))
        if forecasts:
            options += [_forecasts()] * 2
        elif site.prunable:
            attention = st.sampled_from(["kept", "kept", "current", "cached"])
            store = st.sampled_from([True, True, False])
            options += [st.builds(Update, self._sets(), attention, store)] * 3
        # st.one_of would take a strategy that is listed twice only once
        return st.integers(0, len(options) - 1).flatmap(options.__getitem__)

    def _repair(self, site: Site, step: int, action: Action, stored: int) -> Action:
        """The nearest valid action: nothing is read before it is stored, and attention agrees with the keys."""
        need = action.order + 1 if isinstance(action, Reuse) else 0 if isinstance(action, (Compute, Skip)) else 1
        if stored < need:
            return Compute()
        if not isinstance(action, Update) or site.kind == "kv" or not site.attention:
            return action
        keys = [s for s in self.info.sites.values() if s.kind == "kv" and s.attention[0] in site.attention]
        theirs = [self.actions.get((step, s.name), Compute()) for s in keys]
        if action.attention == "kept" and not all(isinstance(t, Compute) for t in theirs):
            action = replace(action, attention="cached")
        if action.attention == "cached":
            sets = {t.tokens for t in theirs if isinstance(t, Update)}
            same = len(sets) == 1 and all(isinstance(t, Update) for t in theirs)
            return replace(action, tokens=sets.pop()) if same else replace(action, attention="current")
        return action


def _chosen_by(action: Update) -> str:
    return action.tokens.score if isinstance(action.tokens, TopK) else ""


#: Ways to take the highest; those that the grid or the counts do not allow are left out.
_OPTIONS: tuple[dict[str, Any], ...] = (
    {"cell": 2, "bonus": 0.5},
    {"cell": 2, "per_cell": True},
    {"cell": 1, "bonus": -0.25},
)


def _tables(info: tcc.ModelInfo) -> dict[str, torch.Tensor]:
    """What scores read, the same for all plans of a model: no two tokens have nearly the same score."""
    batch, tokens, width = info.batch, info.num_tokens, info.analysis.stream_shape[-1]
    shapes = {"one": (tokens,), "each": (batch, tokens), "hidden": (width, 4), "offset": (4,), "weight": (4,)}
    return {name: tiny_models.noise(*sizes, seed=20 + i) for i, (name, sizes) in enumerate(shapes.items())}


def _forecasts() -> st.SearchStrategy[Action]:
    weight = st.floats(-2, 2, width=16)

    def of_order(order: int) -> st.SearchStrategy[Action]:
        return st.tuples(*[weight] * (order + 1)).map(lambda weights: Reuse(order, weights))

    return st.integers(1, 3).flatmap(of_order)


@st.composite
def examples(draw: Callable[[Any], Any], names: tuple[str, ...] = MODELS) -> Example:
    """A model out of `names` and a valid plan for it; every pass is verified for about one example in eight."""
    name = draw(st.sampled_from(names))
    check = draw(st.sampled_from([False] * 4 + [True] + [False] * 3))  # in the middle: the ends are drawn more often
    plan = _Draft(draw, model(name).info).plan()
    folded = (plan.num_steps + len(plan.sites)) % 3 == 0  # not drawn, so that seeds keep their plans
    return Example(name, plan, check, folded)


def worst_error(
    example: Example, runs: int = 2, backend: str = "eager", recorder: Callable[[], Record] | None = None
) -> tuple[float, int]:
    """Run the example's plan, replayed where a recorder is given, and the reference; the largest error and its call."""
    case = model(example.model)
    program = build_program(case.info.captured, case.info.analysis, example.plan, check=example.check)
    executable = lower(program, backend, check=example.check, folding=_folding(case, example))
    session = Session(replace(executable, recorder=recorder))
    reference = tcc.Reference(case.model, example.plan, case.info)
    worst = (0.0, -1)
    for call in range(runs * example.plan.num_steps):
        args, kwargs = case.inputs(call)
        result, expected = (tensor_of(f(*args, **kwargs)) for f in (session, reference))
        error = relative_error(result, expected)
        worst = max(worst, (error if error == error else float("inf"), call))
    return worst


def _folding(case: Case, example: Example) -> Folding | None:
    """What a run of the example computes once, where asked and where the model has one noise level for all samples."""
    captured = case.info.captured
    if not example.folded or captured.noise_level is None:
        return None
    levels = captured.flatten(case.args, case.kwargs)[captured.noise_level].flatten()
    same = levels.numel() > 0 and bool((levels == levels[0]).all())
    steps = levels[:1].expand(example.plan.num_steps)
    return find_folding(captured, case.info.analysis, example.plan, steps) if same else None


def check_example(example: Example, runs: int = 2, backend: str = "eager") -> None:
    """Fail where the compiled plan differs from the reference by more than rounding."""
    error, call = worst_error(example, runs, backend)
    assert error <= TOLERANCE, f"relative error {error:.3g} at call {call} (allowed {TOLERANCE}):\n{example!r}"


def draw(count: int, seed: int, drawn: st.SearchStrategy[Example], done: Callable[[Example], object]) -> None:
    """Call `done` with `count` examples; the smallest that it refuses is the one whose error comes out.

    Args:
        count: how many examples.
        seed: the same seed draws the same examples.
        drawn: what is drawn.
        done: called with every example.
    """

    @hypothesis.seed(seed)
    @hypothesis.settings(
        max_examples=count,
        deadline=None,
        database=None,
        phases=[Phase.generate, Phase.shrink],
        suppress_health_check=list(HealthCheck),
    )
    @hypothesis.given(drawn)
    def attempt(example: Example) -> None:
        done(example)

    attempt()


def run(
    count: int,
    seed: int,
    names: tuple[str, ...] = MODELS,
    done: Callable[[Example], object] = lambda _: None,
    backend: str = "eager",
) -> None:
    """Check `count` examples, as `draw` draws them; `done` is called with every one that agrees."""

    def check(example: Example) -> None:
        check_example(example, backend=backend)
        done(example)

    draw(count, seed, examples(names), check)


def main(argv: list[str] | None = None) -> int:
    """The command line: 0 where all examples agree, 1 with seed and smallest failing plan where one does not."""
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    parser = argparse.ArgumentParser(prog="python -m tests.fuzz_plans", description=__doc__)
    parser.add_argument("--examples", type=int, default=1000, help="how many plans to try (default 1000)")
    parser.add_argument("--seed", type=int, default=0, help="seed of the first round (default 0)")
    parser.add_argument("--round", type=int, default=250, help="examples per seed (default 250)")
    parser.add_argument("--models", nargs="*", default=list(MODELS), choices=MODELS, help="models to draw from")
    parser.add_argument("--backend", default="eager", help="what compiles the plans: eager (default) or inductor")
    options = parser.parse_args(argv)
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns) as progress:
        task = progress.add_task("plans", total=options.examples)
        for number, start in enumerate(range(0, options.examples, options.round)):
            count, seed = min(options.round, options.examples - start), options.seed + number
            progress.update(task, description=f"plans, seed {seed}", completed=start)
            try:
                run(count, seed, tuple(options.models), lambda _: progress.advance(task), options.backend)
            except Exception as error:
                progress.stop()
                lines = (f"{type(error).__name__}: {error}", *getattr(error, "__notes__", ()))
                sys.stderr.write("\n".join((f"mismatch with --seed {seed} --round {options.round}:", *lines, "")))
                return 1
    sys.stdout.write(f"{options.examples} plans agree with the reference (seeds {options.seed}..{seed})\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
