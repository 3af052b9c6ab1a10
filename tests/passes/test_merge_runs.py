"""MergeRuns cancels gathers against scatters of the same token set."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import fx

import tcc
from tcc.lowering import lower
from tcc.passes.merge_runs import MergeRuns
from tcc.passes.tokens import gather_tokens
from tcc.plan import Action, CachePlan, Update
from tcc.program import build_program
from tcc.runtime import Session
from tests.graphs import Sketch, calls, edits, text, values
from tests.running import CLOSE, call
from tests.tiny_models import case, relative_error

aten = torch.ops.aten
KEPT, OTHER = [0, 2, 5], [1, 2, 4]


def start() -> tuple[Sketch, list[fx.Node], tuple[fx.Node, fx.Node], tuple[fx.Node, fx.Node]]:
    """Inputs base, rows, s and more; two token sets of three tokens out of six."""
    sketch = Sketch()
    inputs = [sketch.input(name, 2, size, 4) for name, size in (("base", 6), ("rows", 3), ("s", 6), ("more", 3))]
    return sketch, inputs, sketch.tokens(3, 6, 0), sketch.tokens(3, 6, 1)


def run(gm: fx.GraphModule) -> tuple[int, bool]:
    """The edits, and whether the outputs are bit-identical."""
    inputs = values(gm, kept=[KEPT, OTHER])
    before = gm(*inputs)
    count = edits(gm, MergeRuns())
    return count, all(torch.equal(a, b) for a, b in zip(gm(*inputs), before, strict=True))


def test_gathering_what_was_scattered_gives_the_rows() -> None:
    """Between two blocks of one token set nothing is gathered or scattered."""
    sketch, (base, rows, *_), one, _ = start()
    gm = sketch.done(sketch.call(aten.neg.default, sketch.gather(sketch.scatter(base, rows, *one), one[0])))
    assert run(gm) == (1, True)
    assert calls(gm) == ["aten.neg.default"]


def test_rows_that_are_written_twice_are_written_once() -> None:
    """The outer scatter overwrites what the inner one wrote, through the sum with the next slot too."""
    sketch, (base, rows, s, more), one, _ = start()
    inner = sketch.scatter(base, rows, *one)
    gm = sketch.done(sketch.scatter(sketch.call(aten.add.Tensor, inner, s), more, *one))
    assert run(gm) == (1, True)
    expected, (base, rows, s, more), one, _ = start()
    total = expected.call(aten.add.Tensor, base, s)
    assert text(gm) == text(expected.done(expected.scatter(total, more, *one)))


def test_a_scatter_straight_into_a_scatter() -> None:
    """Without a sum between them as well."""
    sketch, (base, rows, _, more), one, _ = start()
    gm = sketch.done(sketch.scatter(sketch.scatter(base, rows, *one), more, *one))
    assert run(gm) == (1, True)
    assert calls(gm) == ["scatter_tokens"]


def test_another_token_set_is_left_alone() -> None:
    """Sets that overlap do not cancel."""
    sketch, (base, rows, s, more), one, two = start()
    inner = sketch.scatter(base, rows, *one)
    gathered = sketch.gather(inner, two[0])
    gm = sketch.done(gathered, sketch.scatter(sketch.call(aten.add.Tensor, inner, s), more, *two))
    assert run(gm) == (0, True)


def test_another_dimension_is_left_alone() -> None:
    """The same set along another dimension keeps other values."""
    sketch = Sketch()
    base, rows, (kept, place) = sketch.input("base", 6, 6), sketch.input("rows", 6, 3), sketch.tokens(3, 6)
    gm = sketch.done(sketch.gather(sketch.scatter(base, rows, kept, place, 1), kept, 0))
    assert run(gm) == (0, True)


def test_other_users_of_the_scatter_still_read_it() -> None:
    """The stream after a run of blocks is whole, whoever else reads its rows."""
    sketch, (base, rows, s, more), one, _ = start()
    inner = sketch.scatter(base, rows, *one)
    outer = sketch.scatter(sketch.call(aten.add.Tensor, inner, s), more, *one)
    gm = sketch.done(inner, outer, sketch.gather(inner, one[0]), sketch.gather(inner, one[0]))
    assert run(gm) == (3, True)
    assert calls(gm).count("scatter_tokens") == 2


def test_a_chain_of_blocks_scatters_once() -> None:
    """A long run ends with one scatter; a second run of the pass changes nothing."""
    sketch, (base, rows, s, _), one, _ = start()
    stream = sketch.scatter(base, rows, *one)
    for _ in range(4):
        new = sketch.call(aten.exp.default, sketch.gather(stream, one[0]))
        stream = sketch.scatter(sketch.call(aten.add.Tensor, stream, s), new, *one)
    gm = sketch.done(stream)
    count, same = run(gm)
    assert same
    assert count == 8
    assert calls(gm).count("scatter_tokens") == 1
    assert calls(gm).count("gather_tokens") == 0
    assert edits(gm, MergeRuns()) == 0


def test_sets_of_every_sample_cancel_too() -> None:
    """The same set along the same dimensions; along other dimensions it stays."""
    for dims, expected in (((1, 0), 1), ((0, 1), 0)):
        sketch = Sketch()
        base, rows, (kept, place) = (
            sketch.input("base", 4, 4, 2),
            sketch.input("rows", 4, 2, 2),
            sketch.tokens(2, 4, batch=4),
        )
        gm = sketch.done(sketch.gather(sketch.scatter(base, rows, kept, place, 1, 0), kept, *dims))
        inputs = values(gm, kept=[[[0, 1], [1, 2], [2, 3], [0, 3]]])
        before = gm(*inputs)[0]
        assert edits(gm, MergeRuns()) == expected
        assert edits(gm, MergeRuns()) == 0
        assert torch.equal(gm(*inputs)[0], before)


def nested_run(nested: bool = True, batch: int = 0) -> tuple[fx.GraphModule, MergeRuns]:
    """A block on tokens 0, 2, 4 and 5, and one on 2 and 5 of them; the pass, told of it if `nested`."""
    sketch = Sketch()
    stream, *slots = (sketch.input(name, 2, 6, 4) for name in ("stream", "s", "u"))
    outer, inner = sketch.tokens(4, 6, 0, batch), sketch.tokens(2, 6, 1, batch)
    dims = (1, 0) if batch else (1,)
    for tokens, slot in zip((outer, inner), slots, strict=True):
        rows = sketch.call(aten.exp.default, sketch.gather(stream, tokens[0], *dims))
        stream = sketch.scatter(sketch.call(aten.add.Tensor, stream, slot), rows, *tokens, *dims)
    return sketch.done(stream), MergeRuns(frozenset({(1, 0)}) if nested else frozenset())


def test_a_set_within_the_one_before_is_gathered_from_its_rows() -> None:
    """The whole stream is gathered from once; bit for bit the same; a second run changes nothing."""
    gm, merge = nested_run()
    inputs = values(gm, kept=[[0, 2, 4, 5], [2, 5]])
    before = gm(*inputs)[0]
    # the gather becomes one of rows; the sum with what is dropped at the second block still needs the scattered stream
    assert edits(gm, merge) == 1
    assert torch.equal(gm(*inputs)[0], before)
    gathers = [node for node in gm.graph.nodes if node.target is gather_tokens]
    assert [node.args[0].meta["val"].shape[1] for node in gathers] == [6, 4]
    assert edits(gm, merge) == 0


def test_sets_not_known_to_be_nested_are_left_alone() -> None:
    """Neither where nobody said so, nor where every sample has its own."""
    for gm, merge in (nested_run(nested=False), nested_run(batch=2)):
        before = text(gm)
        assert edits(gm, merge) == 0
        assert text(gm) == before


@pytest.mark.parametrize("attention", ["kept", "current"])
def test_blocks_that_keep_fewer_and_fewer_tokens(attention: Any) -> None:
    """Against the reference, with one gather of the whole stream where keys are of the kept tokens too.

    At the other step the sets are nested the other way round: another variant, with a gather for each block.
    """
    which = case("dit")
    sets = {"most": [0, 1, 3, 5, 6, 8, 9, 12], "some": [1, 3, 8, 12]}
    sites = ["blocks.0.delta", "blocks.1.delta"]
    actions: dict[tuple[int, str], Action] = {}
    for step, names in ((1, ("most", "some")), (2, ("some", "most"))):
        actions |= {(step, site): Update(name, attention) for site, name in zip(sites, names, strict=True)}
    plan = CachePlan(3, actions, {name: torch.tensor(kept) for name, kept in sets.items()})
    program = build_program(which.info.captured, which.info.analysis, plan)
    assert [sorted(program.variants[binding.variant].kind.nested) for binding in program.bindings] == [[], [(1, 0)], []]
    running, reference = Session(lower(program, "eager")), tcc.Reference(which.model, plan, which.info)
    for step in range(3):
        assert relative_error(call(running, which, step), call(reference, which, step)) <= CLOSE
    if attention == "kept":
        assert [whole_gathers(program.variants[n].gm) for n in (1, 2)] == [1, 2]


def whole_gathers(gm: fx.GraphModule) -> int:
    """How many values of all 16 tokens of the stream are gathered from, but those that are inputs."""
    sources = [node.args[0] for node in gm.graph.nodes if node.target is aten.index_select.default]
    found = {s for s in sources if s.op == "call_function" and tuple(s.meta["val"].shape) == (2, 16, 32)}
    return len(found)


def test_sets_that_are_nested_by_chance_share_a_variant() -> None:
    """At one step of two the second set is within the first."""
    which = case("dit")
    sets = {"a": [0, 1, 2, 3], "b": [1, 2], "c": [8, 9]}
    actions: dict[tuple[int, str], Action] = {}
    for step, name in ((1, "b"), (2, "c")):
        actions |= {(step, "blocks.0.delta"): Update("a"), (step, "blocks.1.delta"): Update(name)}
    plan = CachePlan(3, actions, {name: torch.tensor(kept) for name, kept in sets.items()})
    program = build_program(which.info.captured, which.info.analysis, plan, check=False)
    assert [binding.variant for binding in program.bindings] == [0, 1, 1]
    assert not program.variants[1].kind.nested
