"""What `benchmarks/quality.py` compares: the rows of its tables, as data.

A row is a policy with its options. The lists are in the order in which they are worth running. A row that needs a file
that nobody has made yet is left out, and the run says so; `quality_learn.py` says how the files are made.
"""

from __future__ import annotations

import json
import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from tcc import data, plans
from tcc.info import ModelInfo
from tcc.plan import Action, CachePlan, Compute
from tcc.samplers import DDIM, Diffusion, Sampler, named

FEWER, MULTISTEP = "fewer steps", "DPM-Solver++ 2M"
#: The counts of the fewer-steps curve, for a run of so many steps; and those of a multistep solver.
FEWER_STEPS = {50: (40, 30, 25, 20, 17, 14, 12, 10, 8, 6), 20: (17, 15, 13, 11, 10, 9, 8, 7, 6, 5, 4)}
FEWER_MULTISTEP = {50: (25, 20, 17, 14, 12, 10, 8), 20: (10, 8, 7, 6, 5)}
ROUTER, DROPPER = "router-ddim{steps}.safetensors", "drop-router-ddim{steps}.safetensors"
PAIRS_ROUTER = "pairs-router-ddim{steps}.safetensors"
IMPORTANCE, NETWORK = "importance-ddim{steps}.safetensors", "network-importance-ddim{steps}.safetensors"
PRICED = "priced-importance-ddim{steps}.safetensors"  # trained with a price instead of a target: its steps differ
COMPARED, WHOLE_RUNS = "stream-importance-ddim{steps}.safetensors", "runs-importance-ddim{steps}.safetensors"
PROBES, WHOLE_RUN_PROBES = "probes-ddim{steps}.safetensors", "runs-probes-ddim{steps}.safetensors"
CALIBRATION = "calibration-ddim{steps}.safetensors"

RANDOM = ", random"  # how the controls' names end
SHARES = (0.5, 0.34, 0.26, 0.2, 0.16)  # of the steps, that a forecast computes
SHIPPED = Path(data.__file__).parent


def placed_file(share: float) -> str:
    """The file with the searched I-steps of a forecast, in which `{steps}` is the number of steps."""
    return f"i-steps-ddim{{steps}}-{share:g}.json"


def visited_file(share: float) -> str:
    """The file with the searched steps that DDIM visits, likewise."""
    return f"ddim-steps-ddim{{steps}}-{share:g}.json"


class Missing(Exception):  # noqa: N818 # no fault: the row waits for something
    """A row cannot be made yet; says what it waits for."""


@dataclass(frozen=True)
class Learned:
    """An option that is a file in the folder of learned things, or shipped with tcc; of a JSON file, its content.

    Attributes:
        file: its name, in which `{steps}` is the number of steps.
    """

    file: str

    def resolved(self, steps: int, folder: Path) -> Any:
        """The option's value.

        Raises:
            Missing: there is no such file.
        """
        name = self.file.format(steps=steps)
        path = next((place / name for place in (folder, SHIPPED) if (place / name).is_file()), None)
        if path is None:
            raise Missing(f"there is no {folder / name}")
        return json.loads(path.read_text()) if path.suffix == ".json" else str(path)


@dataclass(frozen=True)
class Share:
    """An option that is a number of steps: a share of all, rounded."""

    share: float


@dataclass(frozen=True, kw_only=True)
class Visits(Diffusion):
    """Visits some of the timesteps of a longer run, and no others.

    Attributes:
        of: the steps of the longer run.
        visited: those that are visited.
    """

    of: int
    visited: tuple[int, ...]

    def timesteps(self, num_steps: int | str) -> tuple[int, ...]:
        """The timesteps of the visited steps."""
        every = Diffusion().timesteps(self.of)
        return tuple(every[step] for step in self.visited)


@dataclass(frozen=True)
class Row:
    """One row of a table.

    Attributes:
        name: its name, unique in a list.
        family: what it counts as in the plot: the method.
        policy: the policy's name in `tcc.plans`.
        options: the policy's options but `num_steps`.
        run_steps: the steps that it runs, where they are fewer than those of the run it is compared with.
        control: the name of the row that it is the control of: as many tokens or branches, chosen at random.
        shuffled: whether the plan's actions are dealt out anew, see `shuffle`.
        visits: a list of the steps that it visits, where those are not spread evenly.
        sampler: the name of its sampler.
        sampler_options: the sampler's options.
    """

    name: str
    family: str
    policy: str
    options: Mapping[str, Any] = field(default_factory=dict)
    run_steps: int | None = None
    control: str = ""
    shuffled: bool = False
    visits: Learned | None = None
    sampler: str = "ddim"
    sampler_options: Mapping[str, Any] = field(default_factory=dict)

    def plan(self, info: ModelInfo, steps: int, learned: Path) -> CachePlan:
        """Its plan for runs of `steps` steps.

        Raises:
            Missing: there is no such file in the folder `learned`.
            PlanError: the policy refuses the options.
        """
        options = dict(self.options)
        visited = self._visited(steps, learned)
        for name, value in self.options.items():
            if isinstance(value, Learned):
                options[name] = value.resolved(steps, learned)
            elif isinstance(value, Share):
                options[name] = max(2, round(value.share * steps))
        count = len(visited) or self.run_steps or steps
        plan: CachePlan = plans.POLICIES[self.policy](info, num_steps=count, **options)
        return shuffle(info, plan) if self.shuffled else plan

    def drawn_by(self, steps: int, learned: Path) -> tuple[Sampler, str]:
        """Its sampler, and what tells its images from those of plain DDIM with as many steps: nothing, if empty.

        Raises:
            Missing: there is no such file in the folder `learned`.
            CallError: the sampler needs diffusers.
        """
        if visited := self._visited(steps, learned):
            return DDIM(diffusion=Visits(of=steps, visited=visited)), str(list(visited))
        default = self.sampler == "ddim" and not self.sampler_options
        key = "" if default else f"{self.sampler} {sorted(self.sampler_options.items())}"
        return named(self.sampler, **self.sampler_options), key

    def _visited(self, steps: int, learned: Path) -> tuple[int, ...]:
        """The steps of the longer run that it visits, where it says so; else none."""
        return () if self.visits is None else tuple(self.visits.resolved(steps, learned))


def shuffle(info: ModelInfo, plan: CachePlan, seed: int = 0) -> CachePlan:
    """At every step, the actions of each kind of branch dealt out anew among the blocks: the same counts, at random.

    Raises:
        PlanError: the plan leaves too few values stored for that.
    """
    actions: dict[tuple[int, str], Action] = {}
    groups: dict[str, list[str]] = {}
    for site in plan.sites:
        groups.setdefault(site.split(".", 2)[-1], []).append(site)
    for step in range(plan.num_steps):
        for sites in groups.values():
            dealt: Sequence[Action] = [plan.action(step, site) for site in sites]
            if any(not isinstance(action, Compute) for action in dealt):
                dealt = random.Random(f"{seed} {step}").sample(dealt, len(dealt))
            actions |= {(step, site): action for site, action in zip(sites, dealt, strict=True)}
    return info.count(replace(plan, actions=actions, policy={**plan.policy, "shuffled": seed}, cost=None))


def control(row: Row, **changed: Any) -> Row:
    """The control of a row: the same with random choices, by changed options, or else shuffled."""
    options = {**row.options, **changed}
    return Row(row.name + RANDOM, row.family + RANDOM, row.policy, options, row.run_steps, row.name, not changed)


UNCACHED = Row("uncached", FEWER, "full")
#: The rows that the claims rest on, by the beginning of their names: those to run with the most samples.
CORE = (
    *(f"{count} steps" for count in (40, 30, 25, 20, 17, 14, 12, 11, 10, 8, 7, 6, 5, 4)),
    *("FORA N=2", "FORA N=3", "TaylorSeer N=3 O=2", "TaylorSeer N=6 O=2", "SmoothCache alpha=0.18"),
    *("forecast", "DDIM", MULTISTEP, "TokenCache 1.5x", "uniform tokens 1.5x", "L2C theta=0.1", "ToCa N=3", "DuCa N=3"),
    *("time cut 40%", "time cut 50%"),  # what routers must beat, at bounds around theirs
)


def fewer_steps(steps: int) -> list[Row]:
    """The time-quality curve of plain DDIM."""
    counts = FEWER_STEPS.get(steps) or tuple(range(steps - 1, 0, -1))
    return [Row(f"{count} steps", FEWER, "full", run_steps=count) for count in counts]


def multistep(steps: int) -> list[Row]:
    """The same of a solver that remembers, as forecasts do: clamped as DDIM is, steps even in time or in log-SNR.

    It converges to the solution of the ODE, and not to the images of DDIM that PSNR is counted from: look at FD.
    """
    counts = FEWER_MULTISTEP.get(steps) or tuple(range(steps // 2, 0, -1))
    spacings: dict[str, dict[str, Any]] = {MULTISTEP: {}, f"{MULTISTEP} log-SNR": {"spacing": "log-snr"}}
    return [
        Row(f"{name}, {count} steps", name, "full", run_steps=count, sampler="dpm-solver++2m", sampler_options=options)
        for name, options in spacings.items()
        for count in counts
    ]


def comparison(steps: int) -> list[Row]:
    """Every method at several budgets, and its controls."""
    parts = (branch_rows, token_rows, learned_branch_rows, toca_rows, hold_rows, rule_rows)
    return [UNCACHED, *fewer_steps(steps), *multistep(steps), *(row for part in parts for row in part())]


def branch_rows() -> list[Row]:
    """Methods that reuse or forecast by a fixed schedule."""
    rows = [Row(f"FORA N={n}", "FORA", "fora", {"interval": n}) for n in (2, 3, 4)]
    for share in SHARES:
        rows += [
            Row(f"DDIM {share:.0%}, steps searched", "fewer steps, searched", "full",
                visits=Learned(visited_file(share))),
            Row(f"forecast {share:.0%}", "forecast", "forecast", {"i_steps": Share(share)}),
            Row(f"forecast {share:.0%}, steps searched", "forecast, steps searched", "forecast",
                {"i_steps": Learned(placed_file(share))}),
        ]  # fmt: skip
    rows += [
        Row(f"TaylorSeer N={n} O={order}", "TaylorSeer", "taylorseer", {"interval": n, "order": order})
        for n, order in ((2, 2), (3, 1), (3, 2), (4, 2), (6, 2))
    ]
    return rows


def token_rows() -> list[Row]:
    """Token plans: learned importance, and the same counts at random and spread evenly; the paper's defaults."""
    budgets: dict[str, dict[str, Any]] = {
        "1.3x": {"budget": 1.3},
        "1.5x": {"budget": 1.5},
        "K=3,2 2x": {"k1": 3, "k2": 2, "budget": 2.0},
    }
    rows = []
    for name, options in budgets.items():
        learned = Row(f"TokenCache {name}", "TokenCache", "tokencache", {"importance": Learned(IMPORTANCE), **options})
        spread = Row(f"uniform tokens {name}", "uniform tokens", "tokencache", {**options, "scores": "uniform"})
        rows += [spread, learned, control(learned, scores="random", importance=None)]
    placed = {"importance": Learned(PRICED), "schedule": "percentile", "i_steps": Share(0.4), "budget": 2.0}
    probes = {"importance": Learned(PROBES), "budget": 1.5}
    rows += [Row("TokenCache percentile 2x", "TokenCache", "tokencache", placed)]
    rows += [control(rows[-1], scores="random")]
    rows += [Row("TokenCache probes 1.5x", "TokenCache probes", "tokencache", probes)]
    paper = {"k1": 3, "k2": 1, "keep": 0.5, "attention": "kept", "level": "block"}
    rows += [Row("TPRR, paper's defaults", "TPRR", "tprr", paper)]
    return rows


def toca_rows() -> list[Row]:
    """ToCa and DuCa, whose scores are computed in the graph."""
    rows = []
    for policy, name in (("toca", "ToCa"), ("duca", "DuCa")):
        for n in (2, 3, 4):
            row = Row(f"{name} N={n}", name, policy, {"interval": n})
            rows += [row, control(row, score="random")] if n == 3 else [row]
    return rows


def learned_branch_rows() -> list[Row]:
    """Methods whose router was trained."""
    rows = []
    for theta in (0.1, 0.5):
        row = Row(f"L2C theta={theta}", "L2C", "l2c", {"router": Learned(ROUTER), "theta": theta})
        rows += [row, control(row)]
    rows += [Row("L2C pairs theta=0.1", "L2C", "l2c", {"router": Learned(PAIRS_ROUTER), "theta": 0.1})]
    rows += [
        Row(f"SmoothCache alpha={a}", "SmoothCache", "smoothcache", {"errors": Learned(CALIBRATION), "alpha": a})
        for a in (0.08, 0.18, 0.35)
    ]
    rows += [Row("learning to drop", "drops", "learning_to_drop", {"router": Learned(DROPPER)})]
    return rows


def hold_rows() -> list[Row]:
    """Methods that hold the stream or a run of blocks."""
    rows = [Row(f"DeepCache N={n}", "DeepCache", "deepcache", {"interval": n, "rear": 3}) for n in (2, 3)]
    rows += [
        Row(f"Delta-DiT N={n}", "Delta-DiT", "delta_dit", {"interval": n, "span": span}) for n, span in ((2, 6), (3, 8))
    ]
    rows += [Row("Faster Diffusion", "Faster Diffusion", "faster_diffusion")]
    return rows


def rule_rows() -> list[Row]:
    """Rules by hand, and drops."""
    rows = [Row(f"{name.replace('_', ' ')} 50%", "rules", name) for name in ("bottom_up", "top_down", "random_units")]
    rows += [Row("metric 50%", "rules", "metric", {"errors": Learned(CALIBRATION)})]
    rows += [Row(f"time cut {cut:.0%}", "time cut", "time_cut", {"cut": cut}) for cut in (0.4, 0.5, 0.8)]
    rows += [Row(f"random drop {share:.0%}", "drops", "random_drop", {"share": share}) for share in (0.1, 0.3)]
    return rows


def ablation(steps: int) -> list[Row]:
    """Rows that differ from a base in one option each, all with the same MACs: `keep` is what the budget leaves.

    The base is TokenCache with a learned table, every other step a P-step. All predictors are trained alike (see
    `quality_learn.py`), but for what their rows say.
    """
    base: dict[str, Any] = {"importance": Learned(IMPORTANCE), "budget": 1.32}
    knobs: dict[str, dict[str, Any]] = {
        "base": {},
        "attention: kept": {"attention": "kept"},
        "attention: current": {"attention": "current"},
        "attention: reused, MLP pruned": {"attention": "reused"},
        "predictor: network": {"importance": Learned(NETWORK)},
        "predictor: probes": {"importance": Learned(PROBES)},
        "predictor: probes, trained on whole runs": {"importance": Learned(WHOLE_RUN_PROBES)},
        "predictor: table with a price": {"importance": Learned(PRICED)},
        "trained on: the stream": {"importance": Learned(COMPARED)},
        "trained on: whole runs": {"importance": Learned(WHOLE_RUNS)},
        "scores: random": {"scores": "random"},
        "scores: norm": {"scores": "norm"},
        "scores: uniform": {"scores": "uniform"},
        "level: branch, after the gate": {"level": "branch"},
        "level: block": {"level": "block"},
        "schedule: even": {"schedule": "even"},
        "predictor: table with a price, schedule: percentile": {
            "importance": Learned(PRICED),
            "schedule": "percentile",
        },
        "two P-steps in a row": {"k1": 2, "k2": 2},
        "two P-steps in a row, refresh: no": {"k1": 2, "k2": 2, "refresh": False},
        "two P-steps in a row, sets: cycle": {"k1": 2, "k2": 2, "sets": "cycle"},
        "three P-steps in a row, then one": {"k1": 3, "k2": 1},
        "one P-step in a row, then three": {"k1": 1, "k2": 3},
        "three P-steps in a row, then one, boundary: 0.25": {"k1": 3, "k2": 1, "boundary": 0.25},
        "one P-step in a row, then three, boundary: 0.75": {"k1": 1, "k2": 3, "boundary": 0.75},
        "rotate: 1": {"rotate": 1.0},
        "select: grid": {"select": "grid", "cell": 2},
        "select: grid, cell: 4": {"select": "grid", "cell": 4},
        "own set for every block": {"share": False},
        "own set for every block, select: grid": {"share": False, "select": "grid", "cell": 2},
        "own set for every block, adapt: step": {"share": False, "adapt": "step"},
        "last 2 blocks in full": {"last_full": 2},
        "9 blocks pruned": {"pruned": 9},
        "7 blocks pruned": {"pruned": 7},
    }
    rows = [Row(name, name.partition(":")[0], "tokencache", {**base, **options}) for name, options in knobs.items()]
    return [UNCACHED, *fewer_steps(steps), *rows]
