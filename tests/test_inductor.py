"""Inductor as a backend: its second attempt, what it says, and compilers at work at the same time."""

from __future__ import annotations

import threading
from typing import Any

import pytest
import torch
import torch._inductor
from torch import fx
from torch._inductor import codecache, config
from torch._inductor.exc import CppCompileError, InductorError, OperatorIssue
from torch._inductor.lowering import lowerings

import tcc
from tcc.lowering import lower
from tcc.lowering.inductor import start_compiling
from tcc.program import build_program
from tests.graphs import Sketch
from tests.tiny_models import case


def test_inductor_has_a_second_attempt(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    """Where fused loops fail, a variant is compiled with small ones, and a warning says so; other options are kept."""
    tried: list[dict[str, Any]] = []

    def compile_once(gm: fx.GraphModule, examples: list[torch.Tensor], options: dict[str, Any] | None) -> Any:
        tried.append({name: given for name, given in (options or {}).items() if "custom" not in name})
        if "max_fusion_size" not in tried[-1]:
            raise InductorError(KeyError("buf7"), None)
        return gm.forward

    monkeypatch.setattr(torch._inductor, "compile", compile_once)
    which = case("dit")
    program = build_program(which.info.captured, which.info.analysis, tcc.plans.full(which.info, num_steps=1))
    lower(program, "inductor", options={"freezing": False})
    assert tried == [{"freezing": False}, {"freezing": False, "max_fusion_size": 4}]
    assert "Inductor failed (KeyError: 'buf7')" in caplog.text


def softmaxes(factor: float) -> tuple[fx.GraphModule, torch.Tensor]:
    """A graph that Inductor makes one function of, or several if it may fuse little."""
    sketch = Sketch()
    last = sketch.input("x", 4, 8)
    for _ in range(3):
        scaled = sketch.call(torch.ops.aten.mul.Tensor, last, factor)
        last = sketch.call(torch.ops.aten._softmax.default, scaled, 1, False)
    return sketch.done(last), torch.randn(4, 8, generator=torch.Generator().manual_seed(0))


def is_header(lock: str) -> bool:
    """Whether a C++ compiler's work is a header, which all loops need: it is done at once."""
    return "precompiled_headers" in lock


@pytest.mark.compiles
@pytest.mark.filterwarnings("ignore:.*torch.jit.script:DeprecationWarning")  # Inductor's own imports
def test_all_graphs_are_started_before_one_is_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    """No C++ compiler is done before the second graph is started; other compilations wait for theirs, as ever."""
    all_started, compile_loops = threading.Event(), codecache._worker_compile_cpp

    def compile_later(lock: str, *given: Any) -> None:
        assert is_header(lock) or all_started.wait(60), "the first graph was waited for"
        compile_loops(lock, *given)

    monkeypatch.setattr(codecache, "_worker_compile_cpp", compile_later)
    graphs = [softmaxes(1.25), softmaxes(1.375)]
    with config.patch(compile_threads=1):
        started = [start_compiling(gm, [x], {"compile_threads": 2}) for gm, x in graphs]
        all_started.set()
        for (gm, x), finish in zip(graphs, started, strict=True):
            torch.testing.assert_close(finish()(x)[0], gm(x)[0])
    torch.testing.assert_close(torch.compile(torch.erf)(x), torch.erf(x))


@pytest.mark.compiles
@pytest.mark.filterwarnings("ignore:.*torch.jit.script:DeprecationWarning")
def test_loops_that_no_compiler_takes_are_made_smaller(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """A C++ compiler fails after the graph was started: it is compiled with small loops, and a warning says so."""
    refused, compile_loops = list[str](), codecache._worker_compile_cpp

    def refuse_first(lock: str, *given: Any) -> None:
        if not is_header(lock) and refused in ([], [lock]):
            refused[:] = [lock]
            raise CppCompileError(["c++"], "no such thing")
        compile_loops(lock, *given)

    grad_modes, compile_once = list[bool](), torch._inductor.compile

    def compile_watched(*given: Any, **options: Any) -> Any:
        grad_modes.append(torch.is_grad_enabled())
        return compile_once(*given, **options)

    monkeypatch.setattr(torch._inductor, "compile", compile_watched)
    monkeypatch.setattr(codecache, "_worker_compile_cpp", refuse_first)
    gm, x = softmaxes(1.5)
    finish = start_compiling(gm, [x], {"compile_threads": 2})
    assert "small loops" not in caplog.text
    torch.testing.assert_close(finish()(x)[0], gm(x)[0])
    assert grad_modes == [False, False]  # else weights would ask for gradients
    assert "no such thing" in caplog.text
    assert "small loops" in caplog.text


@pytest.mark.compiles
@pytest.mark.filterwarnings("ignore:.*torch.jit.script:DeprecationWarning")  # Inductor's own imports
def test_what_inductor_says_stays_short(monkeypatch: pytest.MonkeyPatch) -> None:
    """All that an operator's arguments are made of, which Inductor would add, takes gigabytes deep in a graph."""

    def refuse(*_: Any, **__: Any) -> None:
        raise KeyError("buf7")

    monkeypatch.setitem(lowerings, torch.ops.aten.sin.default, refuse)
    sketch = Sketch()
    deep = sketch.input("x", 4, 8)
    for _ in range(8):
        deep = sketch.call(torch.ops.aten.mul.Tensor, deep, deep)
    gm = sketch.done(sketch.call(torch.ops.aten.sin.default, deep))
    with pytest.raises(InductorError, match=r"'buf7'\s+target: aten.sin.default, of 1 arguments") as caught:
        start_compiling(gm, [torch.zeros(4, 8)], {})
    assert len(str(caught.value)) < 500
    assert "args[0]" in OperatorIssue.operator_str("a target", [1], {})  # elsewhere it is Inductor's own
