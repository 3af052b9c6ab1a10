"""Every transformer class of diffusers, from capture to a plan that runs: what works, and why not where it does not.

    python benchmarks/model_coverage.py --results benchmarks/results      all classes: coverage.json, .md, the README
    python benchmarks/model_coverage.py --only WanTransformer3DModel FluxTransformer2DModel
    python benchmarks/model_coverage.py --backend inductor --results benchmarks/results --resume      hours on a CPU
    python benchmarks/model_coverage.py --backend onnx --results benchmarks/results --resume          an hour

Each class is built small, with random weights (`coverage_models*.py`), and goes through four columns:

- captured: one graph by `torch.export`, and the uncached plan gives the very bits of the model;
- sites: blocks found in the graph / blocks that the model ran (modules of its lists with at least two layers), at least
  half of them;
- plan: `coverage_plan.py` mixes reuse, hold and pruned tokens; compiled; in brackets the MACs of the step that prunes
  all that can be pruned and computes the rest, over those of the full step;
- matches: every output of every step against the reference interpreter, relative to its largest magnitude, at most
  1e-4, and further away than that from the uncached model, so that the comparison means something.

With another backend than `eager`, what is compared is what that backend compiled: the uncached plan with the compiled
original, and the plan with the reference. With `--backend onnx` it is the exported bundle, run by ONNX Runtime; its
uncached plan may be as far from the model as the plan from the reference. Rows go to `coverage-<backend>.json`. They
are written as they are made, each with the commit that it was made at; `--resume` keeps those that are there, and
`--only` makes some of them anew.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import sys
import time
import traceback
import warnings
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import coverage_models
import coverage_models_image  # noqa: F401 - registers its entries, as do those below
import coverage_models_joint  # noqa: F401
import coverage_models_sequence  # noqa: F401
import coverage_models_video  # noqa: F401
import torch
from coverage_models import ENTRIES, Built, build
from coverage_plan import actions_of, mixed_plan
from coverage_run import ONNX, TOLERANCE, compare, exact, one_line, outputs, under, without_folders
from coverage_table import OTHERS, markdown, read, results_name, summary, table, write_readme
from provenance import commit, results_folder
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from torch import nn

import tcc
from tcc.passes.graph import module_path

TIMEOUT = 600.0
README = Path(__file__).parents[1] / "README.md"


@dataclass
class Row:
    """What became of one class.

    Attributes:
        name: the class.
        captured, sites, plan, matches: whether the column holds.
        why: the first reason why not, in one line; empty where all four hold.
        note: what the entry leaves out.
        seconds: how long it took.
        stage: the part of the work that it got to.
        commit: what it was made at.
        details: the numbers behind the columns.
    """

    name: str
    captured: bool = False
    sites: bool = False
    plan: bool = False
    matches: bool = False
    why: str = ""
    note: str = ""
    seconds: float = 0.0
    stage: str = "built"
    commit: str = ""
    details: dict[str, Any] = field(default_factory=dict)

    @property
    def whole(self) -> bool:
        """Whether all four columns hold."""
        return self.captured and self.sites and self.plan and self.matches


def examine(name: str, backend: str) -> Row:
    """Take one class through the columns, up to the first that fails."""
    row = Row(name, note=ENTRIES[name].note)
    started = time.perf_counter()
    try:
        _examine(row, backend)
    except Exception as error:
        row.why = f"{row.stage}: {type(error).__name__}: {one_line(error)}"
        row.details["traceback"] = traceback.format_exc()
    row.seconds = round(time.perf_counter() - started, 1)
    return row


def _examine(row: Row, backend: str) -> None:
    """The work, with the name of each part before it."""
    built = build(row.name)
    row.stage = "called"
    paths = ran(built)
    row.stage = "captured"
    info = tcc.inspect(built.model, **built.call(0))
    row.details |= {"hash": info.captured.hash, "nodes": len(info.captured.gm.graph.nodes)}
    row.captured, row.details["backend_error"] = exact(built, info, backend)
    off = f"is off by {row.details['backend_error']:.1e}"
    row.why = "" if row.captured else f"captured: the uncached plan {off if backend == ONNX else 'changes bits'}"
    row.stage = "sites"
    _count_sites(row, info, paths)
    row.stage = "plan"
    plan = mixed_plan(info)
    program, found = info.program(plan), under(built, info, plan, backend)
    ratio = program.variants[program.bindings[1].variant].macs / info.analysis.macs
    row.details |= {"actions": actions_of(plan), "pruned_macs": ratio, "variants": len(program.variants)}
    row.plan = len(row.details["actions"]) == 3 and ratio < 1
    if not row.plan:
        row.why = row.why or f"plan: nothing could be pruned: {_reason(info)}"
    row.stage = "matches"
    errors, effect = compare(built, found, tcc.Reference(built.model, plan, info))
    row.details |= {"error": max(errors), "errors": errors, "effect": effect}
    row.matches = max(errors) <= TOLERANCE < effect
    if not row.matches:
        row.why = row.why or (
            f"matches: error {max(errors):.1e}, effect of the plan {effect:.1e}; "
            f"{'the uncached plan' if backend == ONNX else f'{backend} alone, without tcc,'} {off}"
        )


def _count_sites(row: Row, info: tcc.ModelInfo, paths: Sequence[str]) -> None:
    nodes = {node.name: node for node in info.captured.gm.graph.nodes}
    parts = [site for site in info.sites.values() if site.attention or site.kind in ("out", "delta")]
    found = {module_path(nodes[name]) for site in parts for name in site.values}
    found |= {*info.blocks, *info.analysis.side_blocks}  # whose adds may stand outside of the module, or inside
    missing = [path for path in paths if not any(_same(path, other) for other in found)]
    branches = [s for s in info.sites.values() if s.kind == "delta"]
    row.details |= {"blocks": len(paths), "found": len(paths) - len(missing), "missing": missing}
    row.details |= {"branches": len(branches), "prunable": sum(s.prunable for s in branches)}
    row.details["reasons"] = sorted({s.reason for s in branches if s.reason})
    row.sites = len(missing) * 2 <= len(paths)
    if not row.sites:
        row.why = row.why or f"sites: not found: {', '.join(missing)}"


def _same(path: str, found: str) -> bool:
    """Whether a path lies in the module `path`, or is a block that the module is a part of."""
    numbered = found.rsplit(".", 1)[-1].isdigit()
    return found == path or found.startswith(f"{path}.") or (numbered and path.startswith(f"{found}."))


def _reason(info: tcc.ModelInfo) -> str:
    reasons = [s.reason for s in info.sites.values() if s.kind in ("delta", "block") and s.reason]
    return without_folders(max(reasons, key=reasons.count, default="no MACs are saved").splitlines()[0])


def ran(built: Built) -> list[str]:
    """The blocks that a call runs: modules in lists, with at least two layers, not inside another one."""
    found: list[str] = []
    hooks = []
    for path, module in built.model.named_modules():
        if isinstance(module, nn.ModuleList):
            for number, child in enumerate(module):
                here = f"{path}.{number}"
                if sum(isinstance(m, (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d)) for m in child.modules()) > 1:
                    hooks.append(child.register_forward_hook(lambda *_, here=here: found.append(here)))
    try:
        outputs(built.model, built, 0)
    finally:
        for hook in hooks:
            hook.remove()
    unique = list(dict.fromkeys(found))
    return [path for path in unique if not any(path.startswith(f"{other}.") for other in unique)]


def _worker(connection: Connection, backend: str, threads: int) -> None:
    """Examine the classes that come in, one after the other, in a process of its own."""
    torch.set_num_threads(threads)
    warnings.simplefilter("ignore")  # deprecations inside diffusers
    import diffusers

    diffusers.utils.logging.set_verbosity_error()
    while name := connection.recv():
        connection.send(examine(name, backend))
        torch.compiler.reset()  # one class's compiled code must not use up the limits of the next one's


class Examiner:
    """A worker process that is replaced when it dies or takes too long."""

    def __init__(self, backend: str, threads: int) -> None:
        self.options = (backend, threads)
        self.start()

    def start(self) -> None:
        """Start the worker."""
        self.connection, theirs = multiprocessing.Pipe()
        context = multiprocessing.get_context("spawn")
        self.process = context.Process(target=_worker, args=(theirs, *self.options), daemon=True)
        self.process.start()
        theirs.close()

    def row(self, name: str) -> Row:
        """The row of one class, whatever it does to the process."""
        self.connection.send(name)
        try:
            if self.connection.poll(TIMEOUT):
                found: Row = self.connection.recv()
                return found
            why = f"took longer than {TIMEOUT:.0f} s"
        except EOFError:
            why = f"the process died (exit code {self.process.exitcode})"
        self.stop()
        self.start()
        return Row(name, why=why, note=ENTRIES[name].note)

    def stop(self) -> None:
        """End the worker."""
        self.process.kill()
        self.process.join()
        self.connection.close()


def examine_all(names: Sequence[str], options: argparse.Namespace, done: dict[str, Any]) -> list[dict[str, Any]]:
    """A row for every class, with a progress bar; the rows so far are written after each of them."""
    columns = (TextColumn("{task.description:36}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    rows, now = [], commit()
    examiner = Examiner(options.backend, options.threads)
    with Progress(*columns, TimeRemainingColumn(), console=Console(stderr=True)) as progress:
        task = progress.add_task("", total=len(names))
        for name in names:
            progress.update(task, description=name)
            if name not in done:
                row = examiner.row(name) if name in ENTRIES else Row(name, why="no entry in coverage_models*.py")
                row.commit = now
                done[name] = asdict(row)
                if not row.whole:
                    progress.print(f"{name}: {row.why}", markup=False)
                if options.results:
                    write(Path(options.results), options.backend, list(done.values()))
            rows.append(done[name])
            progress.advance(task)
    examiner.stop()
    return rows


def as_json(rows: Sequence[dict[str, Any]], backend: str) -> str:
    """The rows with all details, for programs."""
    import diffusers

    versions = {"diffusers": diffusers.__version__, "torch": torch.__version__, "backend": backend}
    commits = ", ".join(dict.fromkeys(row["commit"] for row in rows))
    found = {**versions, "commit": commits, "summary": summary(rows), "rows": rows}
    return without_folders(json.dumps(found, indent=1)) + "\n"


def write(folder: Path, backend: str, rows: Sequence[dict[str, Any]]) -> None:
    """The rows of one backend, in one step, so that a run that is cut off leaves a whole file."""
    order = list(coverage_models.classes())
    rows = sorted(rows, key=lambda row: order.index(row["name"]) if row["name"] in order else len(order))
    path = folder / results_name(backend)
    path.with_suffix(".tmp").write_text(as_json(rows, backend))
    path.with_suffix(".tmp").replace(path)


def parser() -> argparse.ArgumentParser:
    """The command line."""
    found = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    found.add_argument("--only", nargs="+", metavar="NAME", help="these classes alone")
    found.add_argument(
        "--backend", default="eager", help="of tcc.compile, or onnx (default: eager; inductor takes hours)"
    )
    found.add_argument("--threads", type=int, default=1)
    found.add_argument("--json", metavar="FILE", help="write the rows with all details")
    found.add_argument(
        "--results",
        type=results_folder,
        metavar="FOLDER",
        help="write the backend's JSON; where coverage.json is whole, coverage.md and the README's table",
    )
    found.add_argument("--resume", action="store_true", help="make the rows alone that the folder lacks")
    return found


def main(argv: Sequence[str] | None = None) -> int:
    """Run the script."""
    options = parser().parse_args(argv)
    known = coverage_models.classes()
    unknown = sorted(set(options.only or ()) - set(known))
    if unknown:
        sys.exit(f"diffusers has no transformer class {', '.join(unknown)}")
    done: dict[str, Any] = {}
    if options.resume and not options.results:
        sys.exit("--resume goes on with the rows in a folder: name it with --results")
    if options.results and (options.resume or options.only):
        rows = read(Path(options.results), options.backend).get("rows", ())
        done = {row["name"]: row for row in rows if row["name"] not in (options.only or ())}
    rows = examine_all(options.only or list(known), options, done)
    Console(width=None if sys.stdout.isatty() else 240).print(table(rows))
    if options.json:
        Path(options.json).write_text(as_json(rows, options.backend))
    folder = Path(options.results or "")
    if options.results and set(known) <= {row["name"] for row in read(folder).get("rows", ())}:
        others = {backend: read(folder, backend) for backend in OTHERS}
        (folder / "coverage.md").write_text(markdown(read(folder), others))
        write_readme(README, read(folder), others)
    return 0


if __name__ == "__main__":
    sys.exit(main())
