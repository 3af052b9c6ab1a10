"""Compiling the variants of a program."""

from __future__ import annotations

import contextlib
import functools
import logging
import time
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import fx

from tcc.errors import CallError, CompileError
from tcc.lowering.graphs import extra_inputs, graphs_of
from tcc.passes.fold_timesteps import Fold
from tcc.passes.graph import value
from tcc.passes.pipeline import StepKind
from tcc.program import Program
from tcc.runtime import Executable, Runner
from tcc.runtime.cuda_graphs import Graphs, Record
from tcc.runtime.folding import Folding

__all__ = ["MODES", "Backend", "Compiled", "Known", "find_backend", "lower"]

logger = logging.getLogger(__name__)
MODES = ("default", "reduce-overhead")
#: A compiled variant, and the names of its inputs after the model's own.
Compiled = tuple[Runner, tuple[str, ...]]
#: What makes two variants of one model the same: their kind, the names of their slots, what is folded, and the steps.
Known = tuple[StepKind, tuple[str, ...], tuple[str, ...], tuple[Fold, ...], int]

#: `backend(gm, example_inputs)` returns a function of the same inputs: the protocol of `torch.compile` backends.
Backend = Callable[[fx.GraphModule, list[torch.Tensor]], Runner]
#: The same, with work that goes on meanwhile: what it returns waits for that, and returns the function.
Start = Callable[[fx.GraphModule, list[torch.Tensor]], Callable[[], Runner]]


def lower(
    program: Program,
    backend: str | Backend = "inductor",
    options: dict[str, Any] | None = None,
    progress: Callable[[str], None] | None = None,
    *,
    check: bool = True,
    mode: str = "default",
    regional: bool = False,
    folding: Folding | None = None,
    known: dict[Known, Compiled] | None = None,
) -> Executable:
    """Compile every variant of `program`.

    Args:
        program: the program.
        backend: `inductor`, `eager`, another name that `torch.compile` knows, or a function with its protocol.
        options: Inductor options.
        progress: called with a line before each variant is compiled.
        check: verify the graph after slots have become buffers.
        mode: `default`, or `reduce-overhead`: replay every variant as a CUDA graph (no difference on other devices).
        regional: make one sub-graph of what variants repeat, also of each other (`OutlineRepeats`), and compile it
            once.
        folding: what sessions compute once per run, in place of once per step.
        known: what the same backend made of variants of the same model before; new ones are added to it.

    Raises:
        CallError: the backend is not known, or CUDA graphs are asked for and inputs are on several devices.
        CompileError: the backend failed.
    """
    recorder = _recorder(program, mode)
    start = _start(backend, options or {})
    folds, num_steps = (folding.folds, len(folding.levels)) if folding else ((), 0)
    known = {} if known is None else known
    keys = [(variant.kind, variant.extras, variant.stores, folds, num_steps) for variant in program.variants]
    seconds = [0.0] * len(keys)
    new = [number for number, key in enumerate(keys) if key not in known]
    graphs = graphs_of({n: program.variants[n] for n in new}, folding=folding, regional=regional, check=check)
    started: dict[int, tuple[Callable[[], Runner], tuple[str, ...]]] = {}
    for number in new:
        if progress:
            progress(f"compiling variant {number + 1}/{len(program.variants)}")
        with _timed(seconds, number):
            gm = next(graphs)
            with _named(program, number, backend):
                started[number] = _start_one(gm, start), extra_inputs(gm)
    for number, (finish, names) in started.items():  # all are started: compilers in other processes work meanwhile
        with _timed(seconds, number), _named(program, number, backend):
            known[keys[number]] = finish(), names
        logger.info("variant %d compiled in %.1f s", number, seconds[number])
    runners, extras = zip(*(known[key] for key in keys), strict=True)
    return Executable(program, runners, extras, tuple(seconds), recorder, folding)


def _recorder(program: Program, mode: str) -> Callable[[], Record] | None:
    inputs = program.captured.inputs
    on_cuda = next((spec for spec in inputs if spec.device.type == "cuda"), None)
    if mode == "default" or on_cuda is None:
        return None
    for spec in inputs:
        if spec.device != on_cuda.device:  # the graph would keep the value that it was captured with
            raise CallError(
                f"mode='reduce-overhead': input '{spec.name}' is on {spec.device}, and '{on_cuda.name}' on "
                f"{on_cuda.device}: a CUDA graph reads inputs on one device only. Move it there, or use mode='default'"
            )
    return functools.partial(Graphs, on_cuda.device)


def _start_one(gm: fx.GraphModule, start: Start) -> Callable[[], Runner]:
    with torch.no_grad():
        return start(gm, [_example(value(n)) for n in gm.graph.find_nodes(op="placeholder")])


@contextlib.contextmanager
def _timed(seconds: list[float], number: int) -> Iterator[None]:
    begin = time.perf_counter()
    yield
    seconds[number] += time.perf_counter() - begin


@contextlib.contextmanager
def _named(program: Program, number: int, backend: str | Backend) -> Iterator[None]:
    """Whatever a backend raises names the variant."""
    try:
        yield
    except Exception as error:
        raise CompileError(_what_failed(program, number, backend, error)) from error


def _what_failed(program: Program, number: int, backend: str | Backend, error: Exception) -> str:
    steps = ", ".join(str(step) for step, binding in enumerate(program.bindings) if binding.variant == number)
    name = backend if isinstance(backend, str) else getattr(backend, "__name__", "the backend")
    first = (str(error).strip().splitlines() or [""])[0]
    return (
        f"{name} could not compile variant {number + 1} of {len(program.variants)} (steps {steps}): "
        f"{type(error).__name__}: {first}. backend='aot_eager' runs the same graphs uncompiled, and tells whether the "
        "backend is at fault"
    )


def _example(val: torch.Tensor) -> torch.Tensor:
    return torch.zeros(tuple(val.shape), dtype=val.dtype, device=val.device)


def _start(backend: str | Backend, options: dict[str, Any]) -> Start:
    if backend == "inductor":
        from tcc.lowering.inductor import (
            start_compiling,  # here: it is slow to import, and other backends do not need it
        )

        return lambda gm, examples: start_compiling(gm, examples, options)
    compile_one = find_backend(backend)

    def compile_now(gm: fx.GraphModule, examples: list[torch.Tensor]) -> Callable[[], Runner]:
        runner = compile_one(gm, examples)
        return lambda: runner

    return compile_now


def find_backend(backend: str | Backend) -> Backend:
    """The backend of that name, or the function itself; but Inductor, which has a module of its own.

    Raises:
        CallError: there is none.
    """
    if callable(backend):
        return backend
    if backend == "eager":
        return lambda gm, _: gm.forward
    # no public way to fetch a backend by name (torch 2.11-2.13)
    from torch._dynamo import list_backends, lookup_backend
    from torch._dynamo.exc import InvalidBackend

    try:
        found: Backend = lookup_backend(backend)
    except InvalidBackend as error:
        known = ", ".join(sorted({"eager", "inductor", *list_backends()}))
        raise CallError(f"backend={backend!r} is not known: use one of {known}, or a function") from error
    return found
