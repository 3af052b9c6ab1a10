"""WriteRows writes the kept tokens of a slot alone."""

from __future__ import annotations

import pytest
import torch
from torch import fx

import tcc
from tcc.lowering import lower
from tcc.passes.lower_tokens import LowerTokens
from tcc.passes.write_rows import WriteRows
from tcc.passes.write_slots import WriteSlots
from tcc.program import build_program
from tcc.runtime import Session
from tests.graphs import Sketch, calls, edits, text, values
from tests.running import CLOSE, STEPS, call, token_plan
from tests.tiny_models import case, relative_error

aten = torch.ops.aten
KEPT = [0, 2, 5]


def update(dim: int = 1, *, stored: str = "a", reads: bool = False, batch: int = 0) -> fx.GraphModule:
    """`exp` of slot `a` with three of six rows replaced, stored in `stored`; the old value too is read if `reads`."""
    sketch = Sketch()
    sizes = (2, 6, 4) if dim == 1 else (2, 4, 6)
    few = [3 if i == dim else size for i, size in enumerate(sizes)]
    slot, rows, (kept, place) = (
        sketch.input("slot:a", *sizes),
        sketch.input("rows", *few),
        sketch.tokens(3, 6, batch=batch),
    )
    new = sketch.scatter(slot, rows, kept, place, dim, *([0] if batch else []))
    out = sketch.call(aten.add.Tensor, sketch.call(aten.exp.default, new), slot if reads else 0.0)
    gm = sketch.done(out, new, stores=(stored,))
    edits(gm, LowerTokens())
    return gm


@pytest.mark.parametrize("dim", [1, 2])
def test_rows_are_written(dim: int) -> None:
    """The same bits, in the slot too, and nothing chooses between old and new."""
    gm = update(dim)
    inputs = values(gm, kept=[KEPT])
    before = gm(*inputs)
    assert edits(gm, WriteRows()) == 1
    assert calls(gm) == ["aten.index_copy.default", "aten.exp.default", "aten.add.Tensor"]
    assert all(torch.equal(a, b) for a, b in zip(gm(*inputs), before, strict=True))
    edits(gm, WriteSlots())
    assert torch.equal(gm(*inputs)[0], before[0])
    assert torch.equal(inputs[0], before[1])


def test_it_rewrites() -> None:
    """The graph is the one expected; a second run changes nothing."""
    gm = update()
    edits(gm, WriteRows())
    expected = Sketch()
    slot, rows, (kept, _) = expected.input("slot:a", 2, 6, 4), expected.input("rows", 2, 3, 4), expected.tokens(3, 6)
    new = expected.call(aten.index_copy.default, slot, 1, kept, rows)
    out = expected.call(aten.add.Tensor, expected.call(aten.exp.default, new), 0.0)
    assert text(gm) == text(expected.done(out, new))
    assert edits(gm, WriteRows()) == 0


def test_the_positions_become_an_input_where_they_are_none() -> None:
    """Variants have no inputs that nobody read."""
    gm = update()
    inputs = values(gm, kept=[KEPT])
    before = gm(*inputs)[0]
    kept = next(node for node in gm.graph.nodes if node.meta.get("input") == "kept_0")
    gm.graph.erase_node(kept)
    gm.recompile()
    assert edits(gm, WriteRows()) == 1
    assert [n.meta["input"] for n in gm.graph.nodes if "input" in n.meta] == ["slot:a", "place_0", "kept_0"]
    slot, rows, kept_now, place = inputs
    assert torch.equal(gm(slot, rows, place, kept_now)[0], before)


def narrowing(*, between: bool = False, reads: bool = False) -> fx.GraphModule:
    """Rows of three tokens of six, of two of them, of one; something is added, or the rows are read, in between."""
    sketch = Sketch()
    stream = sketch.input("stream", 2, 6, 4)
    first = None
    for number, count in enumerate((3, 2, 1)):
        stream = sketch.scatter(stream, sketch.input(f"rows {number}", 2, count, 4), *sketch.tokens(count, 6, number))
        first = first or stream
        stream = sketch.call(aten.add.Tensor, stream, stream) if between else stream
    gm = sketch.done(stream, *([first] if reads else []))
    edits(gm, LowerTokens())
    return gm


def test_rows_over_rows_are_written_where_they_are() -> None:
    """The same bits; who chooses between old and new is the last alone. A second run changes nothing."""
    gm = narrowing()
    inputs = values(gm, kept=[KEPT, [0, 5], [5]])
    before = gm(*inputs)[0]
    assert edits(gm, WriteRows()) == 2
    assert [name for name in calls(gm) if "index_copy" in name or "where" in name] == [
        "aten.index_copy.default", "aten.index_copy.default", "aten.where.self",
    ]  # fmt: skip
    assert torch.equal(gm(*inputs)[0], before)
    assert edits(gm, WriteRows()) == 0


def test_rows_that_are_read_before_others_are_written_stay() -> None:
    """Something is added to all tokens in between; or somebody reads the value with the first rows alone."""
    assert edits(narrowing(between=True), WriteRows()) == 0
    assert edits(narrowing(reads=True), WriteRows()) == 1


@pytest.mark.parametrize("other", [{"stored": "b"}, {"reads": True}, {"batch": 2}], ids=str)
def test_others_are_left_alone(other: dict[str, object]) -> None:
    """Another slot's old value stays; who reads the old value needs it; samples with their own sets have no one row."""
    gm = update(**other)  # type: ignore[arg-type]
    before = text(gm)
    assert edits(gm, WriteRows()) == 0
    assert text(gm) == before


def test_cached_keys_and_values_are_written_by_rows() -> None:
    """Against the reference, in a plan whose token sets change from step to step."""
    which, plan = case("dit"), token_plan("dit", attention="cached", level="out", rotate=True)
    targets: list[list[str]] = []

    def keep(gm: fx.GraphModule, _: list[torch.Tensor]) -> object:
        targets.append(calls(gm))
        return gm.forward

    program = build_program(which.info.captured, which.info.analysis, plan)
    session = Session(lower(program, keep))  # type: ignore[arg-type]
    assert max(found.count("aten.index_copy.default") for found in targets) == 8  # K, V and both outputs of two blocks
    reference = tcc.Reference(which.model, plan, which.info)
    for step in range(STEPS):
        assert relative_error(call(session, which, step), call(reference, which, step)) <= CLOSE
