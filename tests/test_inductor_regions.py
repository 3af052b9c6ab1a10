"""What graphs repeat is compiled once, for all of them, and is given up with the last of them."""

from __future__ import annotations

import functools
import gc
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any
from weakref import WeakValueDictionary

import pytest
import torch
import torch._inductor
from torch import Tensor, fx
from torch._inductor.exc import InductorError

import tcc
from tcc.lowering import inductor_regions
from tcc.lowering.inductor import start_compiling
from tcc.models import DiT
from tcc.passes import repeats
from tcc.passes.base import run_passes
from tcc.passes.outline_repeats import OutlineRepeats
from tcc.passes.repeats import find_repeats
from tests.graphs import Sketch, values

pytestmark = [
    pytest.mark.compiles,
    pytest.mark.filterwarnings("ignore:.*torch.jit.script:DeprecationWarning"),  # Inductor's own imports
]
aten = torch.ops.aten


def turned(sketch: Sketch, x: fx.Node, name: str, rounds: int = 4) -> tuple[fx.Node, fx.Node, fx.Node]:
    """Sixteen calls with a weight: what comes out, the same turned in memory, and a copy of it."""
    weight = sketch.weight(name, 16, 16)
    for _ in range(rounds):
        x = sketch.call(aten.linear.default, x, weight)
        x = sketch.call(aten.mul.Tensor, sketch.call(aten.tanh.default, x), 1.5)
    across = sketch.call(aten.clone.default, sketch.call(aten.permute.default, x, [1, 0]))
    return x, sketch.call(aten.sin.default, across), sketch.call(aten.clone.default, x)


def graph(names: str, factor: float) -> fx.GraphModule:
    """Such calls in a row, with something of its own before and after each, and a value that outlives its change."""
    sketch = Sketch()
    x, outputs = sketch.input("x", 16, 16), list[fx.Node]()
    for name in names:
        straight, across, copied = turned(sketch, sketch.call(aten.mul.Tensor, x, factor), name)
        x = sketch.call(aten.add.Tensor, sketch.call(aten.neg.default, straight), across)
        outputs += [copied, sketch.call(aten.exp.default, copied), straight]
    return sketch.done(x, *outputs)


def outlined(*graphs: fx.GraphModule) -> None:
    """Let the graphs call what they repeat."""
    for gm in graphs:
        run_passes(gm, [])  # drops what is dead
    for gm, stretches in zip(graphs, find_repeats([gm.graph for gm in graphs]), strict=True):
        run_passes(gm, [OutlineRepeats(tuple(stretches))])


@pytest.fixture
def compiled(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """How many calls every graph had that Inductor was given; small stretches are outlined too, and none is known."""
    found, compile_once = list[int](), torch._inductor.compile

    def compile_noted(gm: fx.GraphModule, *given: Any, **options: Any) -> Any:
        found.append(sum(node.op == "call_function" for node in gm.graph.nodes))
        return compile_once(gm, *given, **options)

    monkeypatch.setattr(torch._inductor, "compile", compile_noted)
    monkeypatch.setattr(repeats, "SPARSEST", 0)
    monkeypatch.setattr(inductor_regions, "_alive", WeakValueDictionary())
    return found


def start(gm: fx.GraphModule, **options: Any) -> Callable[[], Callable[..., Sequence[Tensor]]]:
    """Begin to compile a graph of one input, 16 by 16."""
    return start_compiling(gm, [torch.zeros(16, 16)], options)


def test_two_graphs_share_what_both_have_once(compiled: list[int]) -> None:
    """Neither repeats it alone, and what is before it differs: three graphs are compiled. Results stay as they were."""
    graphs = [graph("a", 0.5), graph("b", 0.25)]
    inputs = [values(gm) for gm in graphs]
    wanted = [gm(*given) for gm, given in zip(graphs, inputs, strict=True)]
    outlined(*graphs)
    runs = [begun() for begun in [start(gm) for gm in graphs]]
    assert len(compiled) == 3
    assert max(compiled) >= repeats.SHORTEST
    for run, given, expected in zip(runs, inputs, wanted, strict=True):
        for _ in range(2):  # nothing is written over that is still read
            for got, value in zip(run(*given), expected, strict=True):
                torch.testing.assert_close(got, value)
                assert got.stride() == value.stride()


def test_what_no_graph_calls_any_more_is_given_up(compiled: list[int]) -> None:
    """Later it is made again, and works."""
    gm = graph("aa", 0.75)
    (given,), wanted = values(gm), gm(*values(gm))
    outlined(gm)
    copied = fx.Graph()
    copied.output(copied.graph_copy(gm.graph, {}))
    again = fx.GraphModule(gm, copied)
    run = start(gm)()
    made = len(compiled)
    assert len(inductor_regions._alive) == made
    del run, gm
    gc.collect()
    assert not inductor_regions._alive
    for got, value in zip(start(again)()(given), wanted, strict=True):
        torch.testing.assert_close(got, value)
    assert len(compiled) == 2 * made


def test_options_are_part_of_what_is_shared(compiled: list[int]) -> None:
    """Other options make other code; with the same ones, nothing is compiled again."""
    graphs = [graph("aa", 0.5) for _ in range(3)]
    outlined(*graphs)
    runs = [start(graphs[0])()]
    once = len(compiled)
    runs.append(start(graphs[1], max_fusion_size=2)())
    assert len(compiled) == 2 * once
    runs.append(start(graphs[2])())
    assert len(compiled) == 2 * once


def test_a_sub_graph_that_fails_is_tried_again(
    compiled: list[int], monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """With small loops, as any other graph."""
    gm = graph("aa", 0.5)
    given, wanted = values(gm), gm(*values(gm))
    outlined(gm)
    compile_once, tried = torch._inductor.compile, list[bool]()

    def refuse_first(gm: fx.GraphModule, examples: list[Tensor], options: dict[str, Any]) -> Any:
        tried.append("max_fusion_size" in options)
        if len(tried) == 1:
            raise InductorError(KeyError("buf7"), None)
        return compile_once(gm, examples, options=options)

    monkeypatch.setattr(torch._inductor, "compile", refuse_first)
    for got, value in zip(start(gm)()(*given), wanted, strict=True):
        torch.testing.assert_close(got, value)
    assert tried == [False, True, *(len(tried) - 2) * [False]]
    assert "small loops" in caplog.text


def test_what_inductor_gives_back_is_copied(compiled: list[int]) -> None:
    """A product with ones is its factor: after the slot is written, it would be what was written."""
    sketch = Sketch()
    x, slot, outputs = sketch.input("x", 16, 16), sketch.input("slot:a", 16, 16), list[fx.Node]()
    for number, name in enumerate("ab"):
        x = sketch.call(aten.mul.Tensor, x, 0.5 + number)
        ones = sketch.call(aten.ones.default, [16, 16], dtype=torch.float32)
        inner, _, _ = turned(sketch, x, name)
        kept = sketch.call(aten.mul.Tensor, slot, ones)
        x = sketch.call(aten.sub.Tensor, x, inner)
        outputs.append(kept)
    sketch.call(aten.copy_.default, slot, x)
    outputs = [sketch.call(aten.exp.default, kept) for kept in outputs]
    gm = sketch.done(x, *outputs)
    given = values(gm)
    wanted, written = gm(*(each.clone() for each in given)), [given[0], given[1].clone()]
    outlined(gm)
    run = start_compiling(gm, given, {})()
    for _ in range(2):
        written[1].copy_(given[1])
        for got, value in zip(run(*written), wanted, strict=True):
            torch.testing.assert_close(got, value)
        assert torch.equal(written[1], run(*written)[0])


def test_a_failure_is_over_with_the_call(compiled: list[int], monkeypatch: pytest.MonkeyPatch) -> None:
    """Interrupted, it is not in the way of the next attempt, also while the error is looked at."""
    interrupted, again = graph("aa", 0.5), graph("aa", 0.5)
    outlined(interrupted)
    outlined(again)

    def interrupt(*_: Any, **__: Any) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(torch._inductor, "compile", interrupt)
        with pytest.raises(KeyboardInterrupt) as kept:
            start(interrupted)
    torch.testing.assert_close(start(again)()(torch.ones(16, 16))[0].shape, torch.Size((16, 16)))
    assert kept.value is not None


def test_two_threads_make_one_region(compiled: list[int]) -> None:
    """Neither finds it half made. All is one stretch, since both graphs are equal."""
    graphs = [graph("aa", 0.5), graph("aa", 0.5)]
    outlined(*graphs)
    begin = threading.Barrier(2)

    def compile_one(gm: fx.GraphModule) -> Callable[..., Sequence[Tensor]]:
        begin.wait(60)
        return start(gm)()

    with ThreadPoolExecutor(2) as pool:
        runners = list(pool.map(compile_one, graphs))  # kept: what nobody calls any more would be given up
    for one, other in zip(*(run(torch.ones(16, 16)) for run in runners), strict=True):
        torch.testing.assert_close(one, other)
    assert len(compiled) == 1


def test_examples_are_not_kept(compiled: list[int]) -> None:
    """They are as large as a block's weights and activations."""
    gm = graph("aa", 0.5)
    outlined(gm)
    run = start(gm)()
    assert [region._finish for region in inductor_regions._alive.values()] == len(compiled) * [None]
    assert run is not None


@pytest.mark.parametrize(
    "change",
    [
        lambda: torch.set_num_threads(torch.get_num_threads() + 1),
        lambda: torch.set_default_dtype(torch.float64),
        lambda: setattr(torch.backends.mkldnn.matmul, "fp32_precision", "bf16"),  # type: ignore[attr-defined]
    ],
)
def test_settings_are_part_of_what_is_shared(change: Callable[[], None]) -> None:
    """Code is made for them."""
    threads, dtype = torch.get_num_threads(), torch.get_default_dtype()
    precision = torch.backends.mkldnn.matmul.fp32_precision  # type: ignore[attr-defined]
    before = inductor_regions._around({})
    try:
        change()
        assert inductor_regions._around({}) != before
    finally:
        torch.set_num_threads(threads)
        torch.set_default_dtype(dtype)
        torch.backends.mkldnn.matmul.fp32_precision = precision  # type: ignore[attr-defined]
    assert inductor_regions._around({}) == before


def test_variants_that_reuse_other_branches_share_their_blocks(compiled: list[int]) -> None:
    """A router's: what variants compute is compiled once for all of them; results are those of the reference."""
    torch.manual_seed(0)
    model = DiT(input_size=8, patch_size=2, hidden_size=32, depth=4, num_heads=2, num_classes=10).eval()
    for parameter in model.parameters():
        parameter.data.normal_(0, 0.1)
    policy = functools.partial(tcc.plans.random_units, num_steps=5, interval=5, share=0.5, sites="delta")
    runs = tcc.compile(model, policy, regional=True)
    calls = [(torch.randn(2, 4, 8, 8), torch.tensor([step, step]), torch.tensor([1, 2])) for step in range(5)]
    reference: Any = None
    for call in calls:
        got = runs(*call)
        reference = reference or tcc.Reference(model, runs.plan)
        wanted = reference(*call)
        assert float((wanted - got).abs().max() / wanted.abs().max()) < 5e-6
    assert len(runs.compile_seconds) >= 4
    assert sum(each >= repeats.SHORTEST for each in compiled) <= 6  # no matter how many variants there are
