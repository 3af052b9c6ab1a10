"""How much of a P-step's saved arithmetic becomes saved time.

DiT-S/2, 256 tokens, batch 2, float32: the P-step with one token set for all blocks against the compiled full step, one
process, interleaved, medians. The model has random weights: this is about speed alone.

    python benchmarks/step_speed.py --json benchmarks/results/step_speed.json

Columns: `bound` is the MAC ratio of the two steps, `speedup` the ratio of their medians, `realised` speedup / bound.
Each P-step is compared with the full step compiled with the *same* options. `--freeze` adds Inductor's `freezing`,
which packs the weights of matrix products once (a copy of the weights per variant). The profile below the table says
where the time of each step goes.
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
from rich.table import Table
from torch.profiler import ProfilerActivity, profile

import tcc
from tcc.models import DiT
from tcc.reference import Reference
from tcc.timing import time_calls

KEEP_RATIOS = (0.5, 0.25)
GROUPS = {
    "matrix products": ("mm", "linear"),
    "attention": ("attention",),
    "copies": ("copy_",),
    "convolution": ("conv",),
}
Options = dict[str, Any]


def build_model(seed: int = 0) -> tuple[DiT, tuple[torch.Tensor, ...]]:
    """DiT-S/2 with random weights (its zero-initialised gates would hide errors), and one call's inputs."""
    torch.manual_seed(seed)
    model = DiT.from_name("DiT-S/2", input_size=32).eval()
    for parameter in model.parameters():
        parameter.data.normal_(0, 0.02)
    return model, (torch.randn(2, 4, 32, 32), torch.tensor([500, 500]), torch.tensor([1, 2]))


def compile_plain(model: DiT, inputs: tuple[torch.Tensor, ...], options: Options) -> Any:
    """The uncached model under `torch.compile`, called once."""
    compiled = torch.compile(model, fullgraph=True, options=options or None)
    with torch.no_grad():
        compiled(*inputs)
    return compiled


def compile_plan(model: DiT, inputs: tuple[torch.Tensor, ...], keep: float, options: Options) -> tcc.CompiledModel:
    """A two-step plan: one I-step, one P-step with the same kept tokens in every block."""
    policy = functools.partial(tcc.plans.tprr, num_steps=2, k1=1, k2=1, keep=keep, attention="kept")
    return tcc.compile(model, policy, example_inputs=(inputs, {}), options=options)


def p_step(compiled: tcc.CompiledModel, inputs: tuple[torch.Tensor, ...]) -> Any:
    """A call that runs the P-step again and again, as a sampling loop would: through the session."""
    session = compiled.new_session()
    session(*inputs)

    def call() -> Any:
        session.step = 1
        return session(*inputs)

    return call


def error(model: DiT, compiled: tcc.CompiledModel, inputs: tuple[torch.Tensor, ...]) -> float:
    """Largest relative difference of the P-step from the reference interpreter."""
    reference, session = Reference(model, compiled.plan), compiled.new_session()
    for _ in range(2):
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


def measure(label: str, options: Options, rounds: int) -> list[dict[str, Any]]:
    """All rows for one set of Inductor options."""
    model, inputs = build_model()
    plain = compile_plain(build_model()[0], inputs, options)
    plans = {keep: compile_plan(model, inputs, keep, options) for keep in KEEP_RATIOS}
    calls: dict[str, Any] = {"full": lambda: plain(*inputs)}
    calls |= {f"P {keep}": p_step(compiled, inputs) for keep, compiled in plans.items()}
    with torch.no_grad():
        times = time_calls(calls, rounds=rounds, warmup=3)
        profiles = {name: breakdown(call) for name, call in calls.items()}
    full = times["full"].median
    rows: list[dict[str, Any]] = [{"options": label, "step": "full", "ms": full * 1e3, "profile": profiles["full"]}]
    for keep, compiled in plans.items():
        cost, median = compiled.plan.cost, times[f"P {keep}"].median
        bound = cost.full_macs / cost.step_macs[1]
        rows.append({
            "options": label, "step": f"P keep {keep}", "ms": median * 1e3, "speedup": full / median, "bound": bound,
            "realised": full / median / bound, "error": error(model, compiled, inputs), "slot_bytes": cost.slot_bytes,
            "profile": profiles[f"P {keep}"],
        })  # fmt: skip
    return rows


def show(rows: list[dict[str, Any]], console: Console) -> None:
    """The table, and the profile below it."""
    table = Table(title=f"DiT-S/2, 256 tokens, batch 2, fp32, {torch.get_num_threads()} threads; medians, interleaved")
    for column in ("Inductor options", "step", "ms", "speedup", "bound", "realised", "error", "slot KiB"):
        table.add_column(column, justify="left" if column in ("Inductor options", "step") else "right")
    for row in rows:
        cells = [f"{row[k]:.3f}" if k in row else "" for k in ("speedup", "bound", "realised")]
        extra = [f"{row['error']:.1e}", f"{row['slot_bytes'] / 1024:.0f}"] if "error" in row else ["", ""]
        table.add_row(row["options"], row["step"], f"{row['ms']:.2f}", *cells, *extra)
    console.print(table)
    groups = Table(title="where the time goes: ms per step (in brackets: the full step's, divided by the bound)")
    for column in ("Inductor options", "step", *rows[0]["profile"]):
        groups.add_column(column, justify="left" if column in ("Inductor options", "step") else "right")
    full: dict[str, float] = {}
    for row in rows:
        full = row["profile"] if row["step"] == "full" else full
        ideal = {k: f" ({v / row['bound']:.2f})" if "bound" in row else "" for k, v in full.items()}
        groups.add_row(row["options"], row["step"], *(f"{ms:.2f}{ideal[k]}" for k, ms in row["profile"].items()))
    console.print(groups)


def run_one(freeze: bool, rounds: int, threads: int, console: Console) -> list[dict[str, Any]]:
    """One set of options in this process."""
    torch.set_num_threads(threads)
    label, options = ("freezing", {"freezing": True}) if freeze else ("default", {})
    console.print(f"compiling and measuring with {label} options ...")
    with torch._inductor.config.patch(options):  # Dynamo must know of freezing too
        return measure(label, options, rounds)


def main() -> None:
    """Measure, print, write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=21, help="samples per step")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--freeze", action="store_true", help="also measure with Inductor's freezing")
    parser.add_argument("--json", type=Path, help="write the rows and the machine here")
    args = parser.parse_args()
    console = Console(width=130)
    rows = run_one(False, args.rounds, args.threads, console)
    rows += run_one(True, args.rounds, args.threads, console) if args.freeze else []
    show(rows, console)
    if args.json:
        args.json.write_text(json.dumps({**provenance(), "rows": rows}, indent=1) + "\n")


if __name__ == "__main__":
    main()
