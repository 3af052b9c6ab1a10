"""Inductor as a backend for one whole graph."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
import torch._inductor
from torch import fx
from torch._guards import TracingContext, tracing
from torch._inductor.exc import InductorError, OperatorIssue
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.symbolic_shapes import ShapeEnv

from tcc import inductor_reuse
from tcc.inductor_stores import StoreEarly

__all__ = ["compile_graph"]

logger = logging.getLogger(__name__)
Runner = Callable[..., Sequence[torch.Tensor]]


def compile_graph(gm: fx.GraphModule, examples: list[torch.Tensor], options: dict[str, Any]) -> Runner:
    """Inductor without Dynamo in front: the graph is whole already, so nothing can break, guard or recompile."""
    inductor_reuse.install()
    # without the shape environment, which Dynamo brings along elsewhere, Inductor does not look into its cache
    mode = FakeTensorMode(shape_env=ShapeEnv(), static_shapes=True, allow_non_fake_inputs=True)
    inputs = [mode.from_tensor(x, static_shapes=True) for x in examples]
    for node in gm.graph.nodes:
        node.meta.pop("unbacked_bindings", None)  # of the environment that the capture had: made anew in this one

    def attempt(options: dict[str, Any]) -> Runner:
        with tracing(TracingContext(mode)), _arguments_left_out():
            chosen = {"post_grad_custom_post_pass": StoreEarly(), **options}
            compiled: Runner = torch._inductor.compile(gm, [*inputs], options=chosen)
        return compiled

    try:
        return attempt(options)
    except InductorError as error:  # torch 2.13's fused C++ loops miss values that are written in place
        logger.warning("Inductor failed (%s): compiling this variant with small loops, which are slower", error)
        return attempt({"max_fusion_size": 4, **options})


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
