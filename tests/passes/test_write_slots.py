"""WriteSlots turns stored outputs into writes in place."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, fx

from tcc.passes.write_slots import WriteSlots
from tests.graphs import Sketch, calls, edits, text, values

aten = torch.ops.aten


def written(gm: fx.GraphModule) -> dict[str, Tensor]:
    """Run `gm` on real slots; what they hold afterwards, and the outputs under `""`."""
    inputs = values(gm)
    outputs = gm(*inputs)
    names = [n.meta.get("slot") for n in gm.graph.nodes if n.op == "placeholder"]
    slots = {name: tensor for name, tensor in zip(names, inputs, strict=True) if name}
    return slots | {"": outputs[0]}


def test_a_stored_output_becomes_a_write() -> None:
    """The slot is an input, written before the end; the outputs left are the model's."""
    sketch = Sketch()
    x, slot = sketch.input("x", 2, 3), sketch.input("slot:a", 2, 3)
    new = sketch.call(aten.mul.Tensor, slot, 0.5)
    gm = sketch.done(sketch.call(aten.add.Tensor, x, slot), new, stores=("a",))
    inputs = values(gm)
    y, a = gm(*inputs)
    assert edits(gm, WriteSlots()) == 1
    assert gm.meta["stores"] == ()
    assert calls(gm)[-1] == "aten.copy_.default"
    kept = [t.clone() for t in inputs]
    assert torch.equal(gm(*kept)[0], y)
    assert torch.equal(kept[1], a)


def test_a_slot_that_is_only_written_becomes_an_input() -> None:
    """A new input stands after the others, under the slot's name for the runtime."""
    sketch = Sketch()
    y = sketch.call(aten.relu.default, sketch.input("x", 2, 3))
    gm = sketch.done(y, y, stores=("blocks.0.delta",))
    assert edits(gm, WriteSlots()) == 1
    last = [n for n in gm.graph.nodes if n.op == "placeholder"][-1]
    assert last.meta["input"] == "slot:blocks.0.delta"
    result = written(gm)
    assert torch.equal(result["blocks.0.delta"], result[""])


@pytest.mark.parametrize(("depth", "shared"), [(3, {}), (12, {}), (4, {"a~2": "b"}), (4, {"a~1": "z", "a~3": "b"})])
def test_a_history_moves_up_before_it_is_overwritten(depth: int, shared: dict[str, str]) -> None:
    """Every older value is read before the newer one takes its place, however many there are and whatever their names.

    An older value may have the buffer of another slot, and then it goes by that one's name.
    """
    sketch = Sketch()
    x = sketch.input("x", 2, 3)
    names = [shared.get(name, name) for name in ("a", *(f"a~{age}" for age in range(1, depth)))]
    slots = [sketch.input(f"slot:{name}", 2, 3) for name in names[:-1]]
    stored = dict(zip(names, [x, *slots], strict=True))
    order = sorted(names)
    gm = sketch.done(sketch.call(aten.relu.default, x), *(stored[name] for name in order), stores=order)
    assert edits(gm, WriteSlots()) == depth
    data = {name: torch.full((2, 3), float(age)) for age, name in enumerate(names)}
    inputs = [n.meta.get("slot") for n in gm.graph.nodes if n.op == "placeholder"]
    gm(*(data[name] if name else torch.full((2, 3), -1.0) for name in inputs))
    assert [float(data[name][0, 0]) for name in names] == [-1.0, *map(float, range(depth - 1))]
    # AOTAutograd writes the inputs back in their own order, so the oldest must come first there too
    assert inputs == [None, *reversed(names)]


def summed(extra: str = "") -> fx.GraphModule:
    """Three branches on a stream; their sum is stored, and the stream returned."""
    sketch = Sketch()
    x, slot = sketch.input("x", 2, 3), sketch.input("slot:a", 2, 3)
    first, second, third = (
        sketch.call(target, x) for target in (aten.relu.default, aten.exp.default, aten.tanh.default)
    )
    part = sketch.call(aten.add.Tensor, first, second)
    total = sketch.call(aten.add.Tensor, part, third)
    y = sketch.call(aten.mul.Tensor, x, {"": third, "part": part, "total": total}.get(extra, third))
    outputs = [sketch.call(aten.add.Tensor, y, slot)] if extra == "slot" else [y]
    return sketch.done(*outputs, total, stores=("a",))


@pytest.mark.parametrize(
    ("extra", "expected"),
    [
        ("", ["copy_", "add_", "add_"]),
        ("part", ["add", "copy_", "add_"]),  # somebody else reads what is in between
        ("total", ["add", "add", "copy_"]),
        ("slot", ["add", "add", "add", "copy_"]),  # the old value is read after the sum is there
    ],
)
def test_a_sum_is_added_up_in_the_slot(extra: str, expected: list[str]) -> None:
    """No value of its own is kept for it, unless somebody else reads one; the bits are the same."""
    gm = summed(extra)
    inputs = values(gm)
    y, a = gm(*inputs)
    assert edits(gm, WriteSlots()) == 1
    found = [name.split(".")[1] for name in calls(gm)]
    assert [name for name in found if name in ("add", "add_", "copy_")] == expected
    kept = [t.clone() for t in inputs]
    assert torch.equal(gm(*kept)[0], y)
    assert torch.equal(kept[1], a)


@pytest.mark.parametrize("view", ["itself", "transpose", "view", "chunk", "alias of a slice"])
def test_an_output_that_views_a_slot_is_copied(view: str) -> None:
    """The next step overwrites the slot, and must not overwrite what was returned."""
    sketch = Sketch()
    slot = sketch.input("slot:a", 2, 4)
    output = {
        "itself": lambda: slot,
        "transpose": lambda: sketch.call(aten.t.default, slot),
        "view": lambda: sketch.call(aten.view.default, slot, [8]),
        "chunk": lambda: sketch.call(aten.chunk.default, slot, 2, 1),
        "alias of a slice": lambda: sketch.call(aten.alias.default, sketch.call(aten.slice.Tensor, slot, 0, 0, 1)),
    }[view]()
    if view == "chunk":
        import operator

        output = sketch.call(operator.getitem, output, 1)
    gm = sketch.done(output)
    inputs = values(gm)
    expected = gm(*inputs)[0].clone()
    assert edits(gm, WriteSlots()) == 1
    result = gm(*inputs)[0]
    inputs[0].zero_()
    assert torch.equal(result, expected)


def test_an_output_that_views_what_is_computed_once_is_copied() -> None:
    """The next run overwrites it."""
    sketch = Sketch()
    once = sketch.input("once", 2, 4)
    once.meta["input"] = "folded:once"
    gm = sketch.done(sketch.call(aten.view.default, once, [8]))
    inputs = values(gm)
    assert edits(gm, WriteSlots()) == 1
    expected = inputs[0].flatten().clone()
    result = gm(*inputs)[0]
    inputs[0].zero_()
    assert torch.equal(result, expected)
    assert edits(gm, WriteSlots()) == 0


def test_an_output_that_is_computed_is_not_copied() -> None:
    """A copy of a view, or a value made from a slot, is safe as it is."""
    sketch = Sketch()
    slot = sketch.input("slot:a", 2, 4)
    turned = sketch.call(aten.clone.default, sketch.call(aten.t.default, slot))
    gm = sketch.done(sketch.call(aten.neg.default, slot), turned)
    before = text(gm)
    assert edits(gm, WriteSlots()) == 0
    assert text(gm) == before


def test_a_second_run_changes_nothing() -> None:
    """Nothing is stored by an output any more, and copies are no views."""
    sketch = Sketch()
    slot = sketch.input("slot:a", 2, 3)
    gm = sketch.done(slot, sketch.call(aten.neg.default, slot), stores=("a",))
    assert edits(gm, WriteSlots()) == 2
    assert edits(gm, WriteSlots()) == 0


def test_a_view_whose_operator_does_not_say_so_is_cloned() -> None:
    """An einsum that only permutes returns a view, and one that sums does not."""
    for equation, copied in (("ij->ji", True), ("ij->j", False)):
        sketch = Sketch()
        out = sketch.call(aten.einsum.default, equation, [sketch.input("slot:a", 2, 3)])
        gm = sketch.done(out)
        assert edits(gm, WriteSlots()) == copied
        assert (calls(gm)[-1] == "aten.clone.default") == copied
