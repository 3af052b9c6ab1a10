"""Inductor as a backend for one whole graph."""

from __future__ import annotations

import contextlib
import functools
import logging
from collections.abc import Callable, Iterator
from contextvars import ContextVar
from typing import Any, NamedTuple

import torch
import torch._inductor
from torch import fx
from torch._dynamo.convert_frame import compile_lock
from torch._guards import TracingContext, tracing
from torch._inductor import config
from torch._inductor.async_compile import AsyncCompile
from torch._inductor.exc import CppCompileError, InductorError, OperatorIssue
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.symbolic_shapes import ShapeEnv

from tcc.lowering import inductor_reuse
from tcc.lowering.inductor_regions import call_regions, with_weights
from tcc.lowering.inductor_stores import StoreEarly
from tcc.runtime import Runner

__all__ = ["start_compiling"]

logger = logging.getLogger(__name__)
Wait = Callable[[], None]
#: Where waits for loops are put off to, while a graph is compiled that may put them off.
_put_off: ContextVar[list[Wait] | None] = ContextVar("_put_off", default=None)


class _Code(NamedTuple):
    """A compiled graph, what must be waited for before it is called, and the options that both depend on."""

    runner: Runner
    waits: list[Wait]
    options: dict[str, Any]

    def finished(self) -> Runner:
        with config.patch(self.options):
            for wait in self.waits:
                wait()
        return self.runner


def start_compiling(gm: fx.GraphModule, examples: list[torch.Tensor], options: dict[str, Any]) -> Callable[[], Runner]:
    """Inductor without Dynamo in front: the graph is whole already, so nothing can break, guard or recompile.

    A graph that calls sub-graphs becomes calls of what is made of each of them.

    Returns:
        What waits for the rest and returns the compiled graph. Of a graph on CPUs, C++ compilers are at work meanwhile,
        in processes of their own: who has several graphs to compile starts them all first.
    """
    inductor_reuse.install()
    _let_waits_be_put_off()
    regions = call_regions(gm, options, functools.partial(_start_whole, options=options))
    if not regions:
        return _start_whole(gm, examples, options)
    runner = with_weights(gm)

    def finish() -> Runner:
        for region in regions:
            region.finish()
        return runner

    return finish


def _start_whole(gm: fx.GraphModule, examples: list[torch.Tensor], options: dict[str, Any]) -> Callable[[], Runner]:
    # without the shape environment, which Dynamo brings along elsewhere, Inductor does not look into its cache
    mode = FakeTensorMode(shape_env=ShapeEnv(), static_shapes=True, allow_non_fake_inputs=True)
    inputs = [mode.from_tensor(x, static_shapes=True) for x in examples]
    for node in gm.graph.nodes:
        node.meta.pop("unbacked_bindings", None)  # of the environment that the capture had: made anew in this one
    on_cpu = all(x.device.type == "cpu" for x in examples)

    def attempt(options: dict[str, Any]) -> _Code:
        waits: list[Wait] = []
        token = _put_off.set(waits if on_cpu else None)
        try:
            # Inductor compiles one graph at a time, and who calls it keeps to that
            with compile_lock, torch.no_grad(), tracing(TracingContext(mode)), _arguments_left_out():
                chosen = {"post_grad_custom_post_pass": StoreEarly(), **options}
                return _Code(torch._inductor.compile(gm, [*inputs], options=chosen), waits, options)
        finally:
            _put_off.reset(token)

    def with_small_loops(error: Exception) -> _Code:  # torch 2.13's fused C++ loops miss values written in place
        logger.warning("Inductor failed (%s): compiling this variant with small loops, which are slower", error)
        return attempt({"max_fusion_size": 4, **options})

    try:
        code = attempt(options)
    except InductorError as error:
        code = with_small_loops(error)

    def finish() -> Runner:
        try:
            return code.finished()
        except CppCompileError as error:
            return with_small_loops(error).finished()

    return finish


def _let_waits_be_put_off() -> None:
    """Inductor waits for a graph's loops at the end of its code's import; they are not needed before it is called."""
    wait = AsyncCompile.wait
    if hasattr(wait, "waits_now"):
        return

    def wait_or_put_off(self: AsyncCompile, scope: dict[str, Any]) -> None:
        later = _put_off.get()
        if later is None:
            wait(self, scope)
        else:
            later.append(functools.partial(wait, self, scope))

    wait_or_put_off.waits_now = wait  # type: ignore[attr-defined]
    setattr(AsyncCompile, "wait", wait_or_put_off)  # noqa: B010 - to mypy a method is no variable


@contextlib.contextmanager
def _arguments_left_out() -> Iterator[None]:
    """Inductor's text of an operator that fails has all that its arguments are made of: deep in a graph, gigabytes."""

    def alone(target: Any, args: list[Any], kwargs: dict[str, Any]) -> str:
        return f"  target: {target}, of {len(args) + len(kwargs)} arguments"

    before = vars(OperatorIssue)["operator_str"]
    setattr(OperatorIssue, "operator_str", staticmethod(alone))  # noqa: B010 - to mypy a method is no variable
    try:
        yield
    finally:
        setattr(OperatorIssue, "operator_str", before)  # noqa: B010
