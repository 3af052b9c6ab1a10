"""How much of the saved arithmetic becomes saved time, for layer plans and token plans.

DiT, 256 tokens, batch 2, float32: plans of one I-step and one, two or three P-steps against the compiled uncached
model, one process, runs from their first step to their last, their steps interleaved, medians per step. The models
have random weights: this is about speed alone.

    python benchmarks/step_speed.py --models DiT-S/2 DiT-B/2 --json benchmarks/results/step_speed.json

Columns: the milliseconds of an I-step and of the P-step after it; of that P-step and of the whole plan `bound`, the
ratio of MACs, `speedup`, that of times, and `realised`, speedup / bound; the last also of plans with 2 and 3 P-steps
after an I-step, which are runs of their own. Each plan is compared with the uncached model compiled with the *same*
options of Inductor (`--options`): `freezing` is Inductor's, which packs the weights of matrix products once (a copy of
the weights per variant); `timesteps` tells what is compiled the timesteps of its run, so that modulations are computed
once, in the first step, for all of the two to five steps of a run here (of forecasts that step is not counted). The
profile below the table says where the time of each step goes.
"""

from __future__ import annotations

import argparse
import functools
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
import torch._inductor.config
from provenance import provenance
from rich.console import Console
from rich.progress import track
from rich.table import Table
from torch.profiler import ProfilerActivity, profile

import tcc
from tcc.models import DiT
from tcc.reference import Reference
from tcc.timing import Run, RunTiming, time_runs

TPRR, RANDOM = tcc.plans.tprr, tcc.plans.random_units
P_STEPS = (1, 2, 3)
Policy = functools.partial[tcc.CachePlan]


def tokens(after: int, keep: float, **options: Any) -> Policy:
    """The same tokens at each of so many P-steps."""
    return functools.partial(TPRR, num_steps=1 + after, k1=after, k2=after, keep=keep, **options)


#: Plans with so many P-steps after an I-step; some have I-steps before or after, which are not counted.
PLANS: dict[str, Callable[[int], Policy]] = {
    "FORA": lambda p: functools.partial(tcc.plans.fora, num_steps=2 + p, interval=1 + p),
    "FORA, after the gate": lambda p: functools.partial(tcc.plans.fora, num_steps=2 + p, interval=1 + p, sites="delta"),
    "half of the branches": lambda p: functools.partial(RANDOM, num_steps=1 + p, interval=1 + p),
    "forecast": lambda p: functools.partial(tcc.plans.forecast, num_steps=2 + p, i_steps=[0, 1]),
    "keep 0.5": lambda p: tokens(p, 0.5, attention="kept", level="block"),
    "keep 0.25": lambda p: tokens(p, 0.25, attention="kept", level="block"),
    "keep 0.5, cached": lambda p: tokens(p, 0.5, attention="cached", level="out"),
}
GROUPS = {
    "matrix products": ("mm", "linear"),
    "attention": ("attention",),
    "copies": ("copy_",),
    "convolution": ("conv",),
}
NAMES = ("model", "options", "plan")
Options = dict[str, Any]
Inputs = tuple[torch.Tensor, ...]
TIMESTEPS = (900, 700, 500, 300, 100)  # of the longest run


def build_model(name: str, seed: int = 0) -> tuple[DiT, Inputs]:
    """The DiT with random weights (its zero-initialised gates would hide errors), and one call's inputs."""
    torch.manual_seed(seed)
    model = DiT.from_name(name, input_size=32).eval()
    for parameter in model.parameters():
        parameter.data.normal_(0, 0.02)
    return model, (torch.randn(2, 4, 32, 32), torch.tensor([500, 500]), torch.tensor([1, 2]))


def compile_plain(model: DiT, inputs: Inputs, options: Options) -> Any:
    """The uncached model under `torch.compile`, called once."""
    compiled = torch.compile(model, fullgraph=True, options=options or None)
    with torch.no_grad():
        compiled(*inputs)
    return compiled


def at(inputs: Inputs, step: int) -> Inputs:
    """The inputs of a run's step."""
    x, t, y = inputs
    return x, torch.full_like(t, TIMESTEPS[step]), y


def whole_run(compiled: tcc.CompiledModel, inputs: Inputs) -> Run:
    """A run of the plan as a sampling loop would make it: through the session; every step is of a kind of its own."""

    def start() -> Iterator[torch.Tensor]:
        session = compiled.new_session()
        return (session(*at(inputs, step)) for step in range(compiled.plan.num_steps))

    return Run(range(compiled.plan.num_steps), start)


def counted(plan: tcc.CachePlan) -> range:
    """The last I-step before a P-step, and the P-steps after it."""
    assert plan.cost is not None
    full = [macs == plan.cost.full_macs for macs in plan.cost.step_macs]
    first = max(step for step in range(len(full) - 1) if full[step] and not full[step + 1])
    end = next((step for step in range(first + 1, len(full)) if full[step]), len(full))
    return range(first, end)


def p_step(compiled: tcc.CompiledModel, inputs: Inputs) -> Any:
    """A call that runs the first P-step again and again."""
    session, step = compiled.new_session(), counted(compiled.plan)[1]
    for before in range(step + 1):
        session(*at(inputs, before))

    def call() -> Any:
        session.step = step
        return session(*at(inputs, step))

    return call


def error(model: DiT, compiled: tcc.CompiledModel, inputs: Inputs) -> float:
    """Largest relative difference of the first P-step from the reference interpreter."""
    reference, session = Reference(model, compiled.plan), compiled.new_session()
    for step in range(counted(compiled.plan)[1] + 1):
        wanted, got = reference(*at(inputs, step)), session(*at(inputs, step))
    return float((wanted - got).abs().max() / wanted.abs().max())


def breakdown(call: Any, steps: int = 5) -> dict[str, float]:
    """Milliseconds of one step by kind of kernel; what is left is Inductor's own loops and the dispatch."""
    with torch.no_grad(), profile(activities=[ProfilerActivity.CPU]) as profiled:
        for _ in range(steps):
            call()
    found = dict.fromkeys([*GROUPS, "generated loops and dispatch"], 0.0)
    for event in profiled.key_averages():
        name = next((g for g, words in GROUPS.items() if any(w in event.key for w in words)), None)
        found[name or "generated loops and dispatch"] += event.self_cpu_time_total / steps / 1e3
    return {name: round(ms, 3) for name, ms in found.items()}


def measure(of: str, label: str, rounds: int, only: list[str]) -> list[dict[str, Any]]:
    """All rows of one model with `default` options, `freezing`, or `timesteps` known."""
    options = {"freezing": True} if label == "freezing" else {}
    model, inputs = build_model(of)
    plain = compile_plain(build_model(of)[0], inputs, options)
    names = [name for name in PLANS if not only or name in only]
    plans = {
        name: compile_plans(model, PLANS[name], inputs, options, label == "timesteps")
        for name in track(names, "compiling")
    }
    runs = {"uncached": Run(("full",) * max(P_STEPS), lambda: (plain(*inputs) for _ in P_STEPS))}
    runs |= {f"{name} {n}": whole_run(each, inputs) for name, by in plans.items() for n, each in by.items()}
    with torch.no_grad():
        time_runs(runs, rounds=2)  # warms up
        timed = time_runs(runs, rounds=rounds)
        profiles = {name: breakdown(p_step(by[1], inputs)) for name, by in plans.items()}
        profiles["uncached"] = breakdown(lambda: plain(*inputs))
    full = timed["uncached"].by_kind["full"].median
    head = {"model": of, "options": label}
    rows = [{**head, "plan": "uncached", "I": full * 1e3, "profile": profiles["uncached"]}]
    for name, by in plans.items():
        found = {n: whole_plan(full, timed[f"{name} {n}"], each.plan) for n, each in by.items()}
        rows.append({
            **head, "plan": name, **found[1], **{f"plan realised, {n} P": found[n]["plan realised"] for n in (2, 3)},
            "error": error(model, by[1], inputs), "slot_bytes": by[1].plan.cost.slot_bytes, "profile": profiles[name],
        })  # fmt: skip
    return rows


def compile_plans(
    model: DiT, plan: Callable[[int], Policy], inputs: Inputs, options: Options, known: bool = False
) -> dict[int, tcc.CompiledModel]:
    """The plan by its number of P-steps; variants that are alike are compiled once, if timesteps are not `known`."""
    given: dict[str, Any] = {"example_inputs": (inputs, {}), "options": options}
    if known:
        steps = {n: plan(n).keywords["num_steps"] for n in P_STEPS}
        return {n: tcc.compile(model, plan(n), timesteps=TIMESTEPS[: steps[n]], **given) for n in P_STEPS}
    first = tcc.compile(model, plan(P_STEPS[0]), **given)
    return {n: first if n == P_STEPS[0] else first.with_plan(plan(n)).prepare(*inputs) for n in P_STEPS}


def whole_plan(full: float, timing: RunTiming, plan: tcc.CachePlan) -> dict[str, float]:
    """What an I-step and the P-steps after it take, all together and the first P-step alone."""
    assert plan.cost is not None
    seconds = [timing.by_kind[step].median for step in counted(plan)]
    macs, full_macs = [plan.cost.step_macs[step] for step in counted(plan)], plan.cost.full_macs
    whole = ratios(full * len(macs), sum(seconds), full_macs * len(macs), sum(macs))
    step = ratios(full, seconds[1], full_macs, macs[1])
    return {
        "I": seconds[0] * 1e3, "P": seconds[1] * 1e3,
        **{f"P {k}": v for k, v in step.items()}, **{f"plan {k}": v for k, v in whole.items()},
    }  # fmt: skip


def ratios(full_seconds: float, seconds: float, full_macs: int, macs: int) -> dict[str, float]:
    """Bound, speedup, and the share of the one that the other is."""
    bound, speedup = full_macs / macs, full_seconds / seconds
    return {"bound": bound, "speedup": speedup, "realised": speedup / bound}


def show(rows: list[dict[str, Any]], console: Console) -> None:
    """The table, and the profile below it."""
    table = Table(title=f"256 tokens, batch 2, fp32, {torch.get_num_threads()} threads; medians, interleaved")
    numbers = [f"{of} {what}" for of in ("P", "plan") for what in ("bound", "speedup", "realised")]
    numbers += [f"plan realised, {n} P" for n in (2, 3)]
    for column in (*NAMES, "I ms", "P ms", *numbers, "error", "slot KiB"):
        table.add_column(column, justify="left" if column in NAMES else "right")
    for row in rows:
        cells = [f"{row[k]:.2f}" if k in row else "" for k in ("I", "P", *numbers)]
        extra = [f"{row['error']:.1e}", f"{row['slot_bytes'] / 1024:.0f}"] if "error" in row else ["", ""]
        table.add_row(*(row[name] for name in NAMES), *cells, *extra)
    console.print(table)
    groups = Table(
        title="where the time goes: ms per full or P-step (in brackets: the full step's, divided by the bound)"
    )
    for column in (*NAMES, *rows[0]["profile"]):
        groups.add_column(column, justify="left" if column in NAMES else "right")
    full: dict[str, float] = {}
    for row in rows:
        full = row["profile"] if row["plan"] == "uncached" else full
        ideal = {k: f" ({v / row['P bound']:.2f})" if "P" in row else "" for k, v in full.items()}
        spent = (f"{ms:.2f}{ideal[k]}" for k, ms in row["profile"].items())
        groups.add_row(*(row[name] for name in NAMES), *spent)
    console.print(groups)


def run_one(model: str, label: str, args: argparse.Namespace, console: Console) -> list[dict[str, Any]]:
    """One model with one set of options in this process."""
    console.print(f"compiling and measuring {model} with {label} options ...")
    with torch._inductor.config.patch(freezing=label == "freezing"):  # Dynamo must know of freezing too
        return measure(model, label, args.rounds, args.only)


def main() -> None:
    """Measure, print, write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", default=["DiT-S/2"], help="names that tcc.models knows, such as DiT-B/2")
    parser.add_argument("--rounds", type=int, default=21, help="runs of every plan")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--only", nargs="+", default=[], choices=list(PLANS), help="these plans")
    parser.add_argument("--options", nargs="+", default=["default"], choices=["default", "freezing", "timesteps"])
    parser.add_argument("--json", type=Path, help="write the rows and the machine here")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    console, head = Console(width=150), provenance()
    rows: list[dict[str, Any]] = []
    for model in args.models:
        for label in args.options:
            rows += run_one(model, label, args, console)
            if args.json:  # each time: a run that is stopped leaves what it has
                args.json.write_text(json.dumps({**head, "rows": rows}, indent=1) + "\n")
    show(rows, console)


if __name__ == "__main__":
    main()
