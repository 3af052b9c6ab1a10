"""How much of the saved arithmetic becomes saved time, for layer plans and token plans.

DiT, 256 tokens, batch 2, float32: plans of one I-step and one P-step against the compiled uncached model, one process,
interleaved, medians. The models have random weights: this is about speed alone.

    python benchmarks/step_speed.py --models DiT-S/2 DiT-B/2 --json benchmarks/results/step_speed.json

Columns: the milliseconds of both steps; of the P-step alone and of the whole plan `bound`, the ratio of MACs,
`speedup`, that of times, and `realised`, speedup / bound; the last also with 2 and 3 P-steps after each I-step. Each
plan is compared with the uncached model compiled with the *same* options. `--freeze` adds Inductor's `freezing`, which
packs the weights of matrix products once (a copy of the weights per variant). The profile below the table says where
the time of each step goes.
"""

from __future__ import annotations

import argparse
import functools
import json
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
from tcc.timing import time_calls

KEPT = functools.partial(tcc.plans.tprr, num_steps=2, k1=1, k2=1, attention="kept", level="block")
PLANS: dict[str, Any] = {
    "FORA": functools.partial(tcc.plans.fora, num_steps=4, interval=2),
    "FORA, after the gate": functools.partial(tcc.plans.fora, num_steps=4, interval=2, sites="delta"),
    "half of the branches": functools.partial(tcc.plans.random_units, num_steps=2),
    "forecast": functools.partial(tcc.plans.forecast, num_steps=3, i_steps=[0, 1]),
    "keep 0.5": functools.partial(KEPT, keep=0.5),
    "keep 0.25": functools.partial(KEPT, keep=0.25),
    "keep 0.5, cached": functools.partial(
        tcc.plans.tprr, num_steps=2, k1=1, k2=1, keep=0.5, attention="cached", level="out"
    ),
}
GROUPS = {
    "matrix products": ("mm", "linear"),
    "attention": ("attention",),
    "copies": ("copy_",),
    "convolution": ("conv",),
}
NAMES = ("model", "options", "plan")
Options = dict[str, Any]


def build_model(name: str, seed: int = 0) -> tuple[DiT, tuple[torch.Tensor, ...]]:
    """The DiT with random weights (its zero-initialised gates would hide errors), and one call's inputs."""
    torch.manual_seed(seed)
    model = DiT.from_name(name, input_size=32).eval()
    for parameter in model.parameters():
        parameter.data.normal_(0, 0.02)
    return model, (torch.randn(2, 4, 32, 32), torch.tensor([500, 500]), torch.tensor([1, 2]))


def compile_plain(model: DiT, inputs: tuple[torch.Tensor, ...], options: Options) -> Any:
    """The uncached model under `torch.compile`, called once."""
    compiled = torch.compile(model, fullgraph=True, options=options or None)
    with torch.no_grad():
        compiled(*inputs)
    return compiled


def step_of(compiled: tcc.CompiledModel, inputs: tuple[torch.Tensor, ...], step: int) -> Any:
    """A call that runs that step again and again, as a sampling loop would: through the session."""
    session = compiled.new_session()
    for _ in range(compiled.plan.num_steps):
        session(*inputs)

    def call() -> Any:
        session.step = step
        return session(*inputs)

    return call


def p_step(compiled: tcc.CompiledModel) -> int:
    """The step with the fewest MACs."""
    macs = compiled.plan.cost.step_macs
    return macs.index(min(macs))


def error(model: DiT, compiled: tcc.CompiledModel, inputs: tuple[torch.Tensor, ...]) -> float:
    """Largest relative difference of the P-step from the reference interpreter."""
    reference, session = Reference(model, compiled.plan), compiled.new_session()
    for _ in range(p_step(compiled) + 1):
        wanted, got = reference(*inputs), session(*inputs)
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


def measure(of: str, label: str, options: Options, rounds: int, only: list[str]) -> list[dict[str, Any]]:
    """All rows of one model for one set of Inductor options."""
    model, inputs = build_model(of)
    plain = compile_plain(build_model(of)[0], inputs, options)
    names = [name for name in PLANS if not only or name in only]
    plans = {n: tcc.compile(model, PLANS[n], example_inputs=(inputs, {}), options=options) for n in track(names)}
    calls: dict[str, Any] = {"full": lambda: plain(*inputs)}
    for name, compiled in plans.items():
        calls[f"{name}: I"] = step_of(compiled, inputs, 0)
        calls[f"{name}: P"] = step_of(compiled, inputs, p_step(compiled))
    with torch.no_grad():
        times = {name: taken.median for name, taken in time_calls(calls, rounds=rounds, warmup=3).items()}
        profiles = {name: breakdown(call) for name, call in calls.items() if not name.endswith(": I")}
    full = times["full"]
    head = {"model": of, "options": label}
    rows: list[dict[str, Any]] = [{**head, "plan": "uncached", "I": full * 1e3, "profile": profiles["full"]}]
    for name, compiled in plans.items():
        cost, first, last = compiled.plan.cost, times[f"{name}: I"], times[f"{name}: P"]
        macs = cost.step_macs[p_step(compiled)]
        step = ratios(full, last, cost.full_macs, macs)
        whole, *more = (
            ratios((1 + n) * full, first + n * last, (1 + n) * cost.full_macs, cost.step_macs[0] + n * macs)
            for n in (1, 2, 3)
        )
        rows.append({
            **head, "plan": name, "I": first * 1e3, "P": last * 1e3,
            **{f"P {k}": v for k, v in step.items()}, **{f"plan {k}": v for k, v in whole.items()},
            **{f"plan realised, {n} P": each["realised"] for n, each in enumerate(more, start=2)},
            "error": error(model, compiled, inputs), "slot_bytes": cost.slot_bytes, "profile": profiles[f"{name}: P"],
        })  # fmt: skip
    return rows


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


def run_one(model: str, freeze: bool, args: argparse.Namespace, console: Console) -> list[dict[str, Any]]:
    """One model with one set of options in this process."""
    torch.set_num_threads(args.threads)
    label, options = ("freezing", {"freezing": True}) if freeze else ("default", {})
    console.print(f"compiling and measuring {model} with {label} options ...")
    with torch._inductor.config.patch(options):  # Dynamo must know of freezing too
        return measure(model, label, options, args.rounds, args.only)


def main() -> None:
    """Measure, print, write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", default=["DiT-S/2"], help="names that tcc.models knows, such as DiT-B/2")
    parser.add_argument("--rounds", type=int, default=21, help="samples per step")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--only", nargs="+", default=[], choices=list(PLANS), help="these plans")
    parser.add_argument("--freeze", action="store_true", help="also measure with Inductor's freezing")
    parser.add_argument("--json", type=Path, help="write the rows and the machine here")
    args = parser.parse_args()
    console = Console(width=150)
    kinds = [False, True] if args.freeze else [False]
    rows = [row for model in args.models for freeze in kinds for row in run_one(model, freeze, args, console)]
    show(rows, console)
    if args.json:
        args.json.write_text(json.dumps({**provenance(), "rows": rows}, indent=1) + "\n")


if __name__ == "__main__":
    main()
