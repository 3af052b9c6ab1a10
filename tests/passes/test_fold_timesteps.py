"""FoldTimesteps reads from a table what depends on the noise level and else on nothing that changes within a run."""

from __future__ import annotations

import operator

import torch
from torch import fx

from tcc.passes.fold_timesteps import Fold, FoldTimesteps, find_folds, fold_graph
from tests.graphs import Sketch, calls, edits, text, values

aten = torch.ops.aten
STEPS = 3
FOLDS = (Fold("linear_default", True), Fold("linear_default_1", False))


def model(*, drawn: bool = False) -> fx.GraphModule:
    """`x W3 * exp(silu(t + y) W1) + y W2`, with noise on `y` if `drawn`."""
    sketch = Sketch()
    x, t, y = (sketch.input(name, *sizes) for name, sizes in (("x", (2, 4)), ("t", (2, 1)), ("y", (2, 4))))
    weights = [sketch.weight(name, 4, 4) for name in ("a", "bb", "ccc")]
    y = sketch.call(aten.rand_like.default, y) if drawn else y
    mixed = sketch.call(aten.silu.default, sketch.call(aten.add.Tensor, y, t))
    gate = sketch.call(aten.exp.default, sketch.call(aten.linear.default, mixed, weights[0]))
    shift = sketch.call(aten.linear.default, y, weights[1])
    out = sketch.call(aten.mul.Tensor, sketch.call(aten.linear.default, x, weights[2]), gate)
    return sketch.done(sketch.call(aten.add.Tensor, out, shift))


def folds(gm: fx.GraphModule, level: int = 1, changing: int = 0) -> tuple[Fold, ...]:
    """What is folded where inputs `level` and `changing` are the noise level and the sample."""
    inputs = [node for node in gm.graph.nodes if node.op == "placeholder"]
    return find_folds(gm.graph, level, [inputs[changing]])


def test_the_last_products_before_the_sample_are_found() -> None:
    """With the noise level there is one for every step; what comes after the products is not kept."""
    assert folds(model()) == FOLDS
    assert folds(model(), level=0, changing=1) == (Fold("linear_default_1", False), Fold("linear_default_2", True))


def test_what_depends_on_the_sample_is_not_found() -> None:
    """Nothing but the product of another input."""
    assert folds(model(), level=1, changing=2) == (Fold("linear_default_2", False),)


def test_what_is_drawn_anew_is_not_found() -> None:
    """A random number is another one at every step; without it, two values would be folded."""
    assert folds(model(drawn=True)) == ()
    assert len(folds(model())) == 2


def test_it_rewrites() -> None:
    """The graph is the one expected."""
    gm = model()
    assert edits(gm, FoldTimesteps(FOLDS, STEPS)) == 2
    expected = Sketch()
    x, _, _ = (expected.input(name, *sizes) for name, sizes in (("x", (2, 4)), ("t", (2, 1)), ("y", (2, 4))))
    step = expected.input("step", 1, dtype=torch.int64)
    table, shift = (
        expected.input(fold.input, *sizes) for fold, sizes in zip(FOLDS, ((STEPS, 2, 4), (2, 4)), strict=True)
    )
    weight = expected.weight("ccc", 4, 4)
    row = expected.call(aten.view.default, expected.call(aten.index_select.default, table, 0, step), [2, 4])
    gate = expected.call(aten.exp.default, row)
    out = expected.call(aten.mul.Tensor, expected.call(aten.linear.default, x, weight), gate)
    expected_gm = expected.done(expected.call(aten.add.Tensor, out, shift))
    assert text(gm) == text(expected_gm)
    assert [node.meta["input"] for node in gm.graph.nodes if "input" in node.meta] == [
        "step",
        *(fold.input for fold in FOLDS),
    ]


def test_values_that_are_gone_are_left_alone() -> None:
    """A variant that does not compute a value does not read it; a second run changes nothing."""
    gm = model()
    assert edits(gm, FoldTimesteps((Fold("linear_default_7", True),), STEPS)) == 0
    assert edits(gm, FoldTimesteps(FOLDS, STEPS)) == 2
    assert edits(gm, FoldTimesteps(FOLDS, STEPS)) == 0
    assert calls(gm).count("aten.linear.default") == 1


def test_the_outputs_are_equal() -> None:
    """The values computed apart, and read at their step."""
    gm = model()
    x, t, y = values(gm)
    wanted, computed = gm(x, t, y)[0], fold_graph(gm, FOLDS)(x, t, y)
    table = torch.stack([torch.zeros(2, 4), computed[0], torch.ones(2, 4)])
    edits(gm, FoldTimesteps(FOLDS, STEPS))
    assert torch.equal(gm(x, t, y, torch.tensor([1]), table, computed[1])[0], wanted)


def test_of_a_value_in_parts_the_parts_are_kept() -> None:
    """One part is read by a product that is folded itself, the other one by the sample: no list becomes an input."""
    sketch = Sketch()
    x, t = sketch.input("x", 2, 4), sketch.input("t", 2, 1)
    both = sketch.call(aten.linear.default, sketch.call(aten.sin.default, t), sketch.weight("a", 8, 1))
    scale, shift = (
        sketch.call(operator.getitem, parts, i)
        for parts in [sketch.call(aten.chunk.default, both, 2, 1)]
        for i in (0, 1)
    )
    inner = sketch.call(aten.linear.default, scale, sketch.weight("bb", 4, 4))
    out = sketch.call(aten.add.Tensor, sketch.call(aten.mul.Tensor, x, inner), shift)
    gm = sketch.done(out)
    found = folds(gm)
    assert [fold.name for fold in found] == [shift.name, inner.name]
    given = values(gm)
    wanted, computed = gm(*given)[0], fold_graph(gm, found)(*given)
    assert edits(gm, FoldTimesteps(found, 1)) == 2
    assert torch.equal(gm(*given, torch.tensor([0]), *(each[None] for each in computed))[0], wanted)
