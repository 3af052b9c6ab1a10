"""What each rewrite of the compiler is worth: a waterfall from the eager model to everything that tcc does.

Every row has one rewrite more than the row above; float8 slots take the place of bfloat16 ones. Plans alternate I- and
P-steps; of the one that caches keys and values, two P-steps follow each I-step, or nobody would read what they update.
The model has random weights: this is about speed and memory alone. All rows of a plan and the uncached model run in one
process, interleaved step by step; medians of each kind of step.

    python benchmarks/ablation.py --threads 1 --results benchmarks/results

writes `waterfall.json`, `.md` and `.png` (with `--model PixArt-like`, `waterfall-PixArt-like.json` and so on), anew
after every plan: five to ten minutes each. Plans that the files have from the same commit, settings and machine, and
that are not measured again (`--plans`), stay there.

A rewrite that finds nothing to do in a plan has the numbers of the row above; the table says `as above`.

The rows of the uncached model are those timed with the first plan; `uncached ms` in the JSON is that of each plan.

Columns: milliseconds of an I-step and of a P-step (the first step of a run is a kind of its own: it also computes
what is folded); `run`, a whole run's time over that of the compiled uncached model, as a speedup; the bound that the
plan's MACs allow, and the realised share, speedup / bound (above 1 where folding saves products that the bound
counts); the seconds that compiling took; the bytes of slots, and of what is computed once per run; the error, the
largest relative difference of the first steps' outputs from the reference interpreter's (with narrow slots: from the
reference with wide ones).

Seconds of compiling are cold: every row has an empty cache folder of Inductor's, after Inductor has compiled something
small, which builds its headers (as in `compile_time.py`, but all in one process). They are measured once, and are those
of a clock: other work on the machine shows. They are from the captured model and the plan to compiled variants; of the
uncached model they are its first call under `torch.compile`, capture and one step included.

Rows up to `+ timesteps folded` are made by default, given `timesteps=`. Those below are options. Own variants for
stores: steps that differ in nothing but what they store share a variant otherwise, and store alike; a plan whose slots
take more than `max_slot_bytes` gets one for each. Buffers are shared by default as well, wherever no step needs two
slots at once. Of these plans that is so with Delta-DiT's alone, and only where stores have variants of their own: the
row stands below that one, where it can be seen. Regional compilation and narrow slots: `regional=` and `slot_dtype=`.

What was measured before, operators alone (DiT-S/2, batch 2, one thread, processor time), and why some rewrites of the
literature have no pass here:

- Timesteps without labels: the embedding of the timestep, two products of 384 rows, takes 0.18 ms of a P-step of
  50 ms. All of the modulations, which depend on the label too, take 4.3 ms: `FoldTimesteps` folds both, and what it
  computes once for 50 steps takes 20 ms. Of a step that reuses all branches, the dead parts are 2.7 ms of 6.7 ms.
- Of PixArt-XL/2 with 120 text tokens, the keys and values of the prompt and its projection are 9.7 of the 149 GMAC of a
  step, and of the 43.7 GMAC of a P-step that recomputes a quarter of the tokens: folding saves 22 % of that one.
- Gathers in the first normalisation, scatters in what follows the last product, a contiguous token order: Inductor
  makes one loop of each gather and scatter and its neighbours already, and slices would cost as much
  (`token_order.py`). What is stored in part was a full copy: keys and values of 12 blocks took 3.7 ms of a P-step of
  96 ms, and take 1.7 ms by rows (`WriteRows`).
"""

from __future__ import annotations

import argparse
import functools
import time
from collections.abc import Callable, Hashable, Iterator
from dataclasses import dataclass, replace
from typing import Any, TypeVar

import torch
from ablation_table import earlier_rows, show, write
from compile_time import build_headers
from peers_models import Subject, dit, pixart
from provenance import provenance, results_folder
from rich.progress import track
from torch import fx

import tcc
from tcc.info import ModelInfo
from tcc.lowering import lower
from tcc.passes.graph import graph_text
from tcc.passes.pipeline import ALL, Rewrites
from tcc.plan import CachePlan
from tcc.program import Program, build_program
from tcc.reference import Reference
from tcc.runtime import Session
from tcc.runtime.folding import Folding, find_folding
from tcc.timing import Run, RunTiming, time_runs

Made = TypeVar("Made")
PLANS: dict[str, Callable[..., CachePlan]] = {
    "FORA, N=2": functools.partial(tcc.plans.fora, interval=2),
    "L2C-like, half of the branches": functools.partial(tcc.plans.bottom_up, share=0.5),
    "a quarter of the tokens, kept": functools.partial(
        tcc.plans.tprr, k1=1, k2=1, keep=0.25, attention="kept", level="block"
    ),
    "half of the tokens, cached": functools.partial(
        tcc.plans.tprr, k1=2, k2=2, keep=0.5, attention="cached", level="out", rotate=True
    ),
    "a half to an eighth of the tokens, by depth": functools.partial(
        tcc.plans.tprr, k1=1, k2=1, keep=0.5, keep_last=0.125, tokens="random", attention="kept", level="block"
    ),
    "Delta-DiT, N=2": tcc.plans.delta_dit,
}
MODELS: dict[str, Callable[[], Subject]] = {
    "DiT-S/2": functools.partial(dit, "DiT-S/2"),
    "DiT-B/2": functools.partial(dit, "DiT-B/2"),
    "PixArt-like": pixart,
}
DEFAULT = "DiT-S/2"
APART = replace(ALL, share_buffers=False)
NOTHING = replace(
    APART, merge_runs=False, merge_spans=False, drop_dead_stores=False, drop_dead_parts=False, write_rows=False
)
OWN = replace(ALL, share_variants=False)


@dataclass(frozen=True)
class Row:
    """One row of a plan's waterfall.

    Attributes:
        label: what it has more than the row above.
        rewrites: the rewrites that are made.
        folds: whether timesteps are given, so that what depends on them is computed once per run.
        regional: whether what a variant repeats is compiled once.
        slot_dtype: what slots keep wider values in.
    """

    label: str
    rewrites: Rewrites
    folds: bool = False
    regional: bool = False
    slot_dtype: torch.dtype | None = None


ROWS = (
    Row("+ slots, pruned tokens", NOTHING),
    Row("+ merged runs", replace(NOTHING, merge_runs=True)),
    Row("+ summed slots", replace(NOTHING, merge_runs=True, merge_spans=True)),
    Row("+ dead stores dropped", replace(APART, drop_dead_parts=False, write_rows=False)),
    Row("+ dead parts dropped", replace(APART, write_rows=False)),
    Row("+ rows written in place", APART),
    Row("+ timesteps folded", APART, folds=True),
    Row("+ own variants for stores", replace(OWN, share_buffers=False), folds=True),
    Row("+ buffers shared", OWN, folds=True),
    Row("+ regional compilation", OWN, folds=True, regional=True),
    Row("+ bfloat16 slots", OWN, folds=True, regional=True, slot_dtype=torch.bfloat16),
    Row("+ float8 slots", OWN, folds=True, regional=True, slot_dtype=torch.float8_e4m3fn),
)


@dataclass(frozen=True)
class Candidate:
    """The uncached model (`plan` ""), or a plan under the rewrites of a row.

    Attributes:
        timed: the row whose times it has: its own, or one above that runs the same.
        does: what it runs, where it is a plan.
    """

    plan: str
    label: str
    timed: str
    run: Run
    does: Hashable = None
    compile_seconds: float = 0.0
    bound: float = 1.0
    slot_bytes: int = 0
    folded_bytes: int = 0
    error: float = 0.0


@dataclass(frozen=True)
class Setting:
    """A model, one call's inputs `(x, t, y)` of a batch of two, and the timesteps of a run."""

    model: torch.nn.Module
    inputs: tuple[torch.Tensor, ...]
    info: ModelInfo
    timesteps: tuple[int, ...]

    def call(self, step: int) -> tuple[torch.Tensor, ...]:
        """The inputs at `step`."""
        x, t, y = self.inputs
        return x, torch.full_like(t, self.timesteps[step]), y


def setting_of(subject: Subject, steps: int) -> Setting:
    """All runs begin with the same noise, and no step changes it: what is measured is the model."""
    noise = torch.randn(2, *subject.shape, generator=torch.Generator().manual_seed(0))
    inputs = (noise, torch.tensor([0, 0]), torch.tensor([1, 2]))
    timesteps = tuple(round(999 * (1 - step / steps)) for step in range(steps))
    return Setting(subject.model, inputs, tcc.inspect(subject.model, *inputs), timesteps)


def uncached(setting: Setting, label: str, model: Callable[..., Any]) -> Candidate:
    """The model without a plan: all steps are of one kind."""
    steps = range(len(setting.timesteps))

    def start() -> Iterator[Any]:
        for step in steps:
            with torch.no_grad():
                yield model(*setting.call(step))

    return Candidate("", label, label, Run(["I" for _ in steps], start))


def outputs_of(setting: Setting, plan: CachePlan, steps: int) -> list[torch.Tensor]:
    """What the reference interpreter gives for the first steps."""
    reference = Reference(setting.model, plan, setting.info)
    return [reference(*setting.call(step)) for step in range(steps)]


def from_cold(make: Callable[[], Made]) -> tuple[Made, float]:
    """What `make` gives, and its seconds with an empty cache folder of Inductor's."""
    from torch._inductor.utils import fresh_cache  # there is no public way (torch 2.11-2.13); here: slow to import

    with fresh_cache():
        start = time.perf_counter()
        return make(), time.perf_counter() - start


def candidate(
    setting: Setting,
    name: str,
    plan: CachePlan,
    row: Row,
    wanted: list[torch.Tensor],
    backend: str,
    above: Candidate | None,
) -> Candidate:
    """`plan` under the rewrites of `row`, compiled and run once; its first outputs are compared with those `wanted`.

    Where it does what the row `above` does, it has that one's numbers.
    """
    info, bound, begun = setting.info, plan.bound, time.perf_counter()
    plan = replace(plan, slot_dtype=row.slot_dtype)
    program = build_program(info.captured, info.analysis, plan, rewrites=row.rewrites)
    folding = find_folding(info.captured, info.analysis, plan, setting.timesteps) if row.folds else None
    building, does = time.perf_counter() - begun, what_it_does(program, row, folding)
    if above and above.does == does:
        return replace(above, label=row.label)
    executable, seconds = from_cold(lambda: lower(program, backend, regional=row.regional, folding=folding))
    session = Session(executable)

    def start() -> Iterator[Any]:
        session.reset()
        for step in range(plan.num_steps):
            yield session(*setting.call(step))

    outputs = start()
    error = max(difference(next(outputs), each) for each in wanted)
    for _ in outputs:  # every variant has run
        pass
    return Candidate(
        name, row.label, row.label, Run(kinds(program), start), does, building + seconds, bound, session.slot_bytes,
        session.folded_bytes, error,
    )  # fmt: skip


def what_it_does(program: Program, row: Row, folding: Folding | None) -> Hashable:
    """All that a row's program does, whatever its nodes are called: what is alike needs one measurement."""
    graphs: list[str] = []

    def note(gm: fx.GraphModule, _: list[torch.Tensor]) -> Callable[..., Any]:
        graphs.extend(graph_text(part.graph) for part in gm.modules() if isinstance(part, fx.GraphModule))
        return gm.forward

    extras = lower(program, note, regional=row.regional, folding=folding).extras
    return tuple(graphs), extras, tuple(b.variant for b in program.bindings), program.slots, row.regional


def kinds(program: Program) -> list[str]:
    """I or P for every step: whether it takes the MACs of the first; the first is of its own kind."""
    macs = [program.variants[binding.variant].macs for binding in program.bindings]
    return ["first", *("I" if count == macs[0] else "P" for count in macs[1:])]


def difference(got: torch.Tensor, wanted: torch.Tensor) -> float:
    """Largest difference over the largest value."""
    return float((got - wanted).abs().max() / wanted.abs().max())


def lines(candidates: list[Candidate], times: dict[str, RunTiming]) -> list[dict[str, Any]]:
    """The rows of the table; speedups are over the compiled uncached model, the second candidate."""
    compiled, found = times[key(candidates[1])], []
    for each in candidates:
        timing = times[key(each)]
        medians = {kind: taken.median * 1e3 for kind, taken in timing.by_kind.items()}
        speedup = compiled.seconds / timing.seconds
        found.append({
            "plan": each.plan or "uncached", "row": each.label, "first ms": medians.get("first"), "I ms": medians["I"],
            "P ms": medians.get("P"), "run": speedup, "bound": each.bound, "realised share": speedup / each.bound,
            "compile_seconds": each.compile_seconds, "slot_bytes": each.slot_bytes, "folded_bytes": each.folded_bytes,
            "error": each.error, "as": None if each.timed == each.label else each.timed,
            "uncached ms": compiled.by_kind["I"].median * 1e3,
        })  # fmt: skip
    return found


def key(each: Candidate) -> str:
    """Its name among all that are timed."""
    return f"{each.plan}: {each.timed}"


def measure(
    setting: Setting, plans: list[str], backend: str, rounds: int, checked: int
) -> Iterator[list[dict[str, Any]]]:
    """The uncached model's rows and those of the first plan, then the rows of each further plan.

    Rows are compiled, checked, and timed in turns with the uncached model.
    """
    if backend != "eager":
        build_headers()
    plain = setting.model if backend == "eager" else torch.compile(setting.model, fullgraph=True, backend=backend)
    eager, compiled = uncached(setting, "eager", setting.model), uncached(setting, "compiled", plain)
    next(eager.run.start())
    _, seconds = from_cold(lambda: next(compiled.run.start()))
    both = [eager, replace(compiled, compile_seconds=seconds)]
    for number, name in enumerate(plans):
        made: list[Candidate] = []
        plan = PLANS[name](setting.info, num_steps=len(setting.timesteps))
        wanted = outputs_of(setting, plan, checked)
        for row in track(ROWS, f"compiling {name}"):
            made.append(candidate(setting, name, plan, row, wanted, backend, made[-1] if made else None))
        print(f"timing {name}", flush=True)
        found = lines(both + made, time_runs({key(each): each.run for each in both + made}, rounds=rounds))
        yield found[2 if number else 0 :]


def main() -> None:
    """Measure, write after every plan, print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default=DEFAULT, choices=[*MODELS])
    parser.add_argument("--plans", nargs="+", default=list(PLANS), choices=list(PLANS))
    parser.add_argument("--steps", type=int, default=20, help="steps of a run, over which folding pays")
    parser.add_argument("--rounds", type=int, default=3, help="runs of every row")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--backend", default="inductor")
    parser.add_argument("--results", type=results_folder, help="write the table as JSON, Markdown and a plot here")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    subject = MODELS[args.model]()
    name = "waterfall" if args.model == DEFAULT else f"waterfall-{args.model.replace('/', '-')}"
    head = {**provenance(), "model": args.model, "steps": args.steps, "rounds": args.rounds, "backend": args.backend}
    earlier = earlier_rows(args.results / f"{name}.json", head, args.plans) if args.results else []
    threads = f"{args.threads} thread{'s' * (args.threads > 1)}"
    title = f"{subject.label}, batch 2, fp32, {threads}, {args.steps} steps, medians of {args.rounds} rounds"
    order, found = ["uncached", *PLANS], list[dict[str, Any]]()
    for own in measure(setting_of(subject, args.steps), args.plans, args.backend, args.rounds, min(4, args.steps)):
        found += own
        if args.results:
            write(sorted(found + earlier, key=lambda line: order.index(line["plan"])), head, title, args.results / name)
    show(found, title)


if __name__ == "__main__":
    main()
