"""What `run_gpu.sh` runs: each part in a process of its own, within one time limit; a table of all that was measured.

Not to be called alone: the script puts tcc where Python finds it. Every part writes to a folder of its own, and what an
earlier run left there is removed before anything runs. `gpu.json` says what ran, for how long, and what was left out
and why, `gpu.md` has the tables, and `gpu.tar.gz` has all files; they are written after every part. A part is stopped
when its seconds and those that earlier parts left over are spent.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib.util
import json
import os
import shlex
import shutil
import signal
import subprocess
import sys
import tarfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from provenance import provenance

from tcc.cli.lines import Line, markdown

LIMIT = 460  # seconds: what the parts may take together
HERE = Path(__file__).parent
NEEDS = {"diffusers": "FirstBlockCache, TaylorSeer, MagCache, PyramidAttentionBroadcast, FasterCache, PixArt, Flux",
         "cache_dit": "DBCache"}  # fmt: skip
BENCH = [sys.executable, "-P", "-m", "tcc", "bench"]  # -P: else the checkout's tcc/, which has no passes/, comes first
TOKENS = "tprr k1=1 k2=1 attention=cached level=out keep"
PEERS = "FORA N=2,FirstBlockCache 0.1,TaylorSeer N=3,DBCache F1B0 0.08"
#: The files with tests for a GPU, the quickest first: what is slow may be stopped.
TESTS = ("test_cuda_graphs.py", "test_whole_run.py", "test_timing.py", "test_train_learning.py",
         "export/test_tensorrt.py", "test_memory.py")  # fmt: skip
SCALING = shlex.split("--tokens 256 1024 4096 --batch 1 16 --blocks 4 --steps 10 250 --variants 2 --width 1152")
SMALL_SCALING = shlex.split("--tokens 16 --batch 1 --blocks 2 --steps 2 --variants 2 --width 32 --rounds 1")


@dataclass(frozen=True)
class Part:
    """One measurement.

    Attributes:
        name: the folder of its files.
        title: what it measures.
        command: what is run; `{out}` stands for its folder.
        seconds: its share of the time.
        needs: packages without which it is left out.
    """

    name: str
    title: str
    command: tuple[str, ...]
    seconds: int
    needs: tuple[str, ...] = ()


def parts(device: str) -> list[Part]:
    """What is measured, the most important first; on a CPU the same commands with tiny settings."""
    small = device == "cpu"
    common = ["--device", device, *(("--backend", "eager", "--threads", "1") if small else ())]
    fast = ["--rounds", "1"] if small else ["--seconds", "20"]
    size, images, steps, dtype = ("DiT-S/8", 2, 3, "float32") if small else ("DiT-XL/2", 16, 20, "bfloat16")
    plans = ["fora interval=2", f"{TOKENS}=0.5"]
    sizes = ["--model", size, "--steps", str(steps), "--dtype", dtype, *common, *fast]
    many = [*sizes, "--batch", str(2 * images), "--regional", "--json", "{out}/xl.json"]
    one = [*BENCH, *plans, *sizes, "--batch", "2", "--mode", "reduce-overhead", "--json", "{out}/xl-one.json"]
    peers = [sys.executable, str(HERE / "peers.py"), *common, *fast, "--results", "{out}", "--steps", str(steps)]
    peers += ["--dtype", dtype, "--batch", str(images), "--regional", "--deadline", "40"]  # xl has compiled as much
    peers += ["--model", "reference" if small else "dit-xl", "--only", "nothing" if small else PEERS]
    whole = [sys.executable, str(HERE / "whole_run.py"), *common, "--model", "DiT-S/8" if small else "DiT-S/2"]
    whole += ["--steps", str(steps), "--dtype", dtype, "--regional", "--json", "{out}/whole.json"]
    whole += ["--rounds", "1"] if small else []
    tests = [sys.executable, "-P", "-m", "pytest", "-v", "-m", "gpu", "-W", "default", "-p", "no:cacheprovider"]
    tests += ["-p", "no:randomly", "--junitxml", "{out}/tests.xml", *(str(HERE.parent / "tests" / t) for t in TESTS)]
    scaling = [sys.executable, str(HERE / "scaling.py"), "running", *common, "--results", "{out}", "--models", "dit"]
    scaling += ["--dtype", dtype, *(SMALL_SCALING if small else SCALING)]
    regional = "tcc's blocks compiled once (compare with uncached tcc)"
    return [
        Part("tests", "the tests marked gpu", tuple(tests), 90, ("pytest", "hypothesis")),
        # two parts: a command writes its rows when all are measured, and compiling XL/2 is most of the time
        Part("xl", f"{size}, {images} images, {dtype}, layers, {regional}", (*BENCH, plans[0], *many), 120),
        Part("xl-tokens", f"{size}, {images} images, {dtype}, tokens, {regional}", (*BENCH, plans[1], *many), 60),
        Part("xl-one", f"{size}, one image, {dtype}, CUDA graphs, {regional}", (*one, "--regional"), 50),
        Part("whole", "a run step by step, with CUDA graphs, and as one graph", tuple(whole), 40),
        Part("peers", f"other caches, {images} images, {dtype}", tuple(peers), 60),
        Part("scaling", f"time and memory against tokens, batch and steps, {dtype}", tuple(scaling), 40),
    ]


def run(part: Part, out: Path, seconds: float) -> dict[str, Any]:
    """Run a part for so many seconds at most, its output to `log.txt` in its folder: its entry in `gpu.json`."""
    folder = out / part.name
    command = [word.replace("{out}", str(folder)) for word in part.command]
    entry: dict[str, Any] = {"name": part.name, "title": part.title, "seconds": 0.0, "left out": None, "said": ""}
    missing = [package for package in part.needs if importlib.util.find_spec(package) is None]
    if missing:
        return entry | {"left out": f"{', '.join(missing)} is not installed"}
    folder.mkdir()
    began, said = time.monotonic(), folder / "log.txt"
    with said.open("w") as log:
        code = finish(subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT, start_new_session=True), seconds)
    took, last = time.monotonic() - began, last_line(said)
    reason = f"stopped after {took:.0f} s: {last}" if code is None else f"exit code {code}: {last}" if code else None
    return entry | {"seconds": round(took, 1), "left out": reason, "said": last}


def finish(process: subprocess.Popen[bytes], seconds: float) -> int | None:
    """The exit code; None if it was stopped, with the processes that it started."""
    try:
        return process.wait(seconds)
    except subprocess.TimeoutExpired:
        return None
    finally:
        with contextlib.suppress(ProcessLookupError):  # all of them have ended
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def last_line(log: Path) -> str:
    """The last line that says something."""
    lines = [line.strip() for line in log.read_text(errors="replace").splitlines() if line.strip()]
    return lines[-1][:300] if lines else "it printed nothing"


def summary(out: Path, record: dict[str, Any]) -> str:
    """`gpu.md`: where it ran, what was left out, and the tables."""
    where = f"{record['accelerator'] or record['processor']}, torch {record['torch']}, commit {record['commit']}"
    text = [f"# Measured on {where}", ""]
    text += [f"- left out: {what}" for what in record["left out"]]
    for entry in record["parts"]:
        text += [
            "",
            f"## {entry['title']}",
            "",
            f"{entry['seconds']:.0f} s" + (f"; {entry['left out']}" if entry["left out"] else ""),
        ]
        paths = sorted((out / entry["name"]).glob("*.json"))
        text += [] if paths or not entry["said"] else ["", f"`{entry['said']}`"]
        for path in paths:
            rows = json.loads(path.read_text())["rows"]
            lines = [Line.of_dict({k: v for k, v in row.items() if k != "part"}) for row in rows if "method" in row]
            text += ["", markdown(lines) if lines else plain_table(rows)]
    return "\n".join(text) + "\n"


def plain_table(rows: Sequence[dict[str, Any]]) -> str:
    """Rows of other scripts: a table for each set of columns."""
    tables: dict[tuple[str, ...], list[str]] = {}
    for row in rows:
        cells = (f"{cell:.4g}" if isinstance(cell, float) else str(cell) for cell in row.values())
        tables.setdefault(tuple(row), []).append(f"| {' | '.join(cells)} |")
    heads = {columns: f"| {' | '.join(columns)} |\n|{' --- |' * len(columns)}" for columns in tables}
    return "\n\n".join("\n".join([heads[columns], *lines]) for columns, lines in tables.items())


def pack(out: Path, names: Sequence[str]) -> None:
    """All results in one file."""
    with tarfile.open(out / "gpu.tar.gz", "w:gz") as archive:
        for name in ("gpu.json", "gpu.md", *names):
            if (out / name).exists():
                archive.add(out / name, f"gpu/{name}")


def clear(out: Path, names: Sequence[str]) -> None:
    """Remove what an earlier run left, so that nothing old is taken for new.

    Raises:
        SystemExit: the folder holds something else.
    """
    if any(out.iterdir()) and not (out / "gpu.json").is_file():
        raise SystemExit(f"{out} holds something else than results of this script: name another folder")
    for name in names:
        shutil.rmtree(out / name, ignore_errors=True)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run all parts; 1 if one of them failed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--results", type=Path, required=True)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--only", nargs="+", metavar="PART", help="run these parts alone")
    args = parser.parse_args(arguments)
    import torch  # late: --help needs none

    if args.device != "cpu" and not torch.cuda.is_available():
        print("torch sees no GPU: DEVICE=cpu tries the script without one", file=sys.stderr)
        return 2
    out = args.results.resolve()
    left_out = [
        f"{what}: {name} is not installed" for name, what in NEEDS.items() if importlib.util.find_spec(name) is None
    ]
    record: dict[str, Any] = {**provenance(), "left out": left_out, "parts": []}
    every = parts(args.device)
    names = [part.name for part in every]
    clear(out, names)
    spare = 0.0
    for part in every:
        if args.only and part.name not in args.only:
            continue
        print(f"{part.name}: {part.title} ...", flush=True)
        entry = run(part, out, part.seconds + spare)
        spare = max(0.0, spare + part.seconds - entry["seconds"])
        record["parts"].append(entry)
        print(f"  {entry['seconds']:.0f} s{'; ' + entry['left out'] if entry['left out'] else ''}", flush=True)
        (out / "gpu.json").write_text(json.dumps(record, indent=1) + "\n")
        (out / "gpu.md").write_text(summary(out, record))
        pack(out, names)
    print((out / "gpu.md").read_text())
    return int(any(entry["left out"] for entry in record["parts"]))


if __name__ == "__main__":
    sys.exit(main())
