"""Inductor as a backend: its second attempt, and what it says."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch._inductor
from torch import fx
from torch._inductor.exc import InductorError, OperatorIssue
from torch._inductor.lowering import lowerings

import tcc
from tcc.inductor import compile_graph
from tcc.program import build_program
from tcc.runtime import lower
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
        compile_graph(gm, [torch.zeros(4, 8)], {})
    assert len(str(caught.value)) < 500
    assert "args[0]" in OperatorIssue.operator_str("a target", [1], {})  # elsewhere it is Inductor's own
