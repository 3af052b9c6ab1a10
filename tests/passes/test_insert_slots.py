"""InsertSlots puts actions into the graph, by their definitions."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, fx

from tcc.passes.choose_tokens import Choice
from tcc.passes.entries import Entry, Records, history
from tcc.passes.insert_slots import InsertSlots
from tcc.passes.sites import Site
from tcc.passes.tokens import Axis
from tcc.plan import Action, Compute, Hold, Reuse, Skip, Update
from tcc.plan.scores import Norm, Score, Stale
from tests.graphs import Sketch, calls, edits, text, values
from tests.tiny_models import case

aten = torch.ops.aten
B, S, D = 2, 6, 4
KEPT = [0, 2, 5]
MASK = torch.zeros(1, S, 1, dtype=torch.bool)
MASK[:, KEPT] = True


def block() -> tuple[fx.GraphModule, dict[str, Site]]:
    """`x1 = x + gate * exp(x)`, read twice, and the sites of its branch; the gate is 3."""
    sketch = Sketch()
    x = sketch.input("x", B, S, D)
    out = sketch.call(aten.exp.default, x)
    delta = sketch.call(aten.mul.Tensor, out, 3)
    after = sketch.call(aten.add.Tensor, x, delta)

    def site(name: str, kind: str, node: fx.Node) -> Site:
        added = (x.name, after.name) if kind in ("delta", "block") else ("", "")
        return Site(name, kind, 0, (node.name,), *added, (), (B, S, D), torch.float32, Axis(1), 0, "")

    sites = {"out": site("b.mlp.out", "out", out), "delta": site("b.mlp.delta", "delta", delta)}
    negative = sketch.call(aten.neg.default, after)
    sites |= {"stream": site("out.stream", "stream", after)}
    sites |= {"skip": replace(site("b.skip", "skip", after), readers=(negative.name,))}
    return sketch.done(negative, sketch.call(aten.relu.default, after)), sites


def inserted(site: str, action: Action, depth: int = 1) -> fx.GraphModule:
    """The block's graph with one action, and one token set of three tokens."""
    gm, sites = block()
    count = (3,) if isinstance(action, Update) else ()
    assert edits(gm, InsertSlots((Entry((sites[site],), action, depth),), count, S)) > 0
    return gm


def run(gm: fx.GraphModule) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Run the graph on noise: its inputs by name, and its outputs: `neg`, `relu`, and the stores by slot."""
    inputs = values(gm, kept=[KEPT])
    names = [n.meta.get("input", n.target) for n in gm.graph.nodes if n.op == "placeholder"]
    outputs = gm(*inputs)
    stores = gm.meta.get("stores", ())
    return dict(zip(names, inputs, strict=True)), dict(zip(("neg", "relu", *stores), outputs, strict=True))


def stream(outputs: dict[str, Tensor]) -> Tensor:
    """The stream that both readers saw: the outputs are its negative and its positive part."""
    after = -outputs["neg"]
    assert torch.equal(outputs["relu"], after.relu())
    return after


def test_compute_makes_the_value_an_output() -> None:
    """The slot stores it, and the model's outputs do not change."""
    inputs, outputs = run(inserted("delta", Compute()))
    assert torch.equal(outputs["b.mlp.delta"], inputs["x"].exp() * 3)
    assert torch.equal(stream(outputs), inputs["x"] + inputs["x"].exp() * 3)


def test_a_held_skip_enters_its_reader_alone() -> None:
    """The slot stands in for the value at one of its two readers; the other sees what is computed."""
    inputs, outputs = run(inserted("skip", Hold()))
    assert torch.equal(outputs["neg"], -inputs["slot:b.skip"])
    assert torch.equal(outputs["relu"], (inputs["x"] + inputs["x"].exp() * 3).relu())


def test_a_computed_skip_is_stored() -> None:
    """Both readers see it."""
    _, outputs = run(inserted("skip", Compute()))
    assert torch.equal(stream(outputs), outputs["b.skip"])


def test_reuse_of_a_delta_adds_the_slot_to_the_stream() -> None:
    """Nothing of the branch is left, and nothing is stored."""
    gm = inserted("delta", Reuse())
    inputs, outputs = run(gm)
    assert torch.equal(stream(outputs), inputs["x"] + inputs["slot:b.mlp.delta"])
    assert calls(gm) == ["aten.add.Tensor", "aten.neg.default", "aten.relu.default"]


def test_reuse_of_an_output_meets_the_present_gate() -> None:
    """Only what came before the gate is replaced."""
    inputs, outputs = run(inserted("out", Reuse()))
    assert torch.equal(stream(outputs), inputs["x"] + inputs["slot:b.mlp.out"] * 3)


def test_hold_replaces_the_stream() -> None:
    """Everything that only fed it is dead."""
    gm = inserted("stream", Hold())
    inputs, outputs = run(gm)
    assert torch.equal(stream(outputs), inputs["slot:out.stream"])
    assert calls(gm) == ["aten.neg.default", "aten.relu.default"]


@pytest.mark.parametrize("site", ["out", "delta"])
def test_skip_leaves_the_stream_as_it_is(site: str) -> None:
    """The branch is zero."""
    gm = inserted(site, Skip())
    inputs, outputs = run(gm)
    assert torch.equal(stream(outputs), inputs["x"])
    assert gm.meta["stores"] == ()
    assert "aten.exp.default" not in calls(gm)
    assert "aten.alias.default" not in calls(gm)


def test_update_of_a_delta() -> None:
    """Kept tokens get the new change, the others the slot's, and the slot is updated."""
    inputs, outputs = run(inserted("delta", Update("0")))
    mixed = torch.where(MASK, inputs["x"].exp() * 3, inputs["slot:b.mlp.delta"])
    assert torch.equal(outputs["b.mlp.delta"], mixed)
    assert torch.equal(stream(outputs), inputs["x"] + mixed)


def test_update_of_an_output() -> None:
    """As for a delta, before the gate."""
    inputs, outputs = run(inserted("out", Update("0")))
    mixed = torch.where(MASK, inputs["x"].exp(), inputs["slot:b.mlp.out"])
    assert torch.equal(outputs["b.mlp.out"], mixed)
    assert torch.equal(stream(outputs), inputs["x"] + mixed * 3)


@pytest.mark.parametrize("site", ["out", "delta"])
def test_an_update_that_does_not_store(site: str) -> None:
    """The stream is the same, and the slot stays what it was."""
    gm, storing = inserted(site, Update("0", store=False)), inserted(site, Update("0"))
    (inputs, outputs), (others, expected) = run(gm), run(storing)
    assert all(torch.equal(value, others[name]) for name, value in inputs.items())
    assert torch.equal(stream(outputs), stream(expected))
    assert (gm.meta["stores"], storing.meta["stores"]) == ((), (f"b.mlp.{site}",))


@pytest.mark.parametrize("site", ["out", "delta"])
def test_a_forecast_combines_the_history(site: str) -> None:
    """Newest first, with the weights of its input."""
    gm = inserted(site, Reuse(2, (0.0,) * 3), depth=3)
    inputs, outputs = run(gm)
    slot, weights = f"slot:b.mlp.{site}", inputs["coefficients_0"]
    guess = sum(inputs[f"{slot}~{age}" if age else slot] * weights[age] for age in range(3))
    wanted = inputs["x"] + (guess if site == "delta" else guess * 3)
    torch.testing.assert_close(stream(outputs), wanted, rtol=1e-6, atol=1e-6)


def test_computing_moves_the_history_up() -> None:
    """Every older slot takes the value of the one before it."""
    inputs, outputs = run(inserted("delta", Compute(), depth=3))
    assert torch.equal(outputs["b.mlp.delta"], inputs["x"].exp() * 3)
    assert torch.equal(outputs["b.mlp.delta~1"], inputs["slot:b.mlp.delta"])
    assert torch.equal(outputs["b.mlp.delta~2"], inputs["slot:b.mlp.delta~1"])


def test_histories_are_named_by_age() -> None:
    """The newest value has the site's own name."""
    assert [history("a", age) for age in (0, 1, 12)] == ["a", "a~1", "a~12"]


def two_blocks() -> tuple[fx.GraphModule, dict[str, Site]]:
    """The graph and the sites of a captured model with two blocks."""
    info = case("separate").info
    graph = fx.Graph()
    graph.output(graph.graph_copy(info.captured.gm.graph, {}))
    return fx.GraphModule(info.captured.gm, graph), info.sites


def attention_shapes(gm: fx.GraphModule) -> list[tuple[int, int]]:
    """Queries and keys of every attention."""
    nodes: list[Any] = [n for n in gm.graph.nodes if n.target is aten.scaled_dot_product_attention.default]
    return [tuple(n.args[i].meta["val"].shape[-2] for i in (0, 1)) for n in nodes]


@pytest.mark.parametrize(("attention", "keys"), [("kept", 3), ("current", 12), ("cached", 12)])
def test_attention_kept_restricts_the_keys(attention: Any, keys: int) -> None:
    """Queries are pruned later; only `kept` says which keys there are."""
    gm, sites = two_blocks()
    entries = tuple(Entry((sites[f"blocks.{i}.delta"],), Update("0", attention)) for i in range(2))
    assert edits(gm, InsertSlots(entries, (3,), 12)) > 0
    assert attention_shapes(gm) == [(12, keys)] * 2


def test_updated_keys_are_seen_whole() -> None:
    """The attention field of a `kv` update restricts nothing: its keys are old ones and new ones."""
    gm, sites = two_blocks()
    entry = Entry((sites["blocks.0.attn.kv"],), Update("0", "kept"))
    assert edits(gm, InsertSlots((entry,), (3,), 12)) > 0
    assert attention_shapes(gm) == [(12, 12)] * 2
    assert gm.meta["stores"] == ("blocks.0.attn.kv.k", "blocks.0.attn.kv.v")


def test_a_merged_span_keeps_the_sum() -> None:
    """Two blocks that are reused together are one slot, named after the first."""
    gm, sites = two_blocks()
    entry = Entry((sites["blocks.0.delta"], sites["blocks.1.delta"]), Reuse())
    assert edits(gm, InsertSlots((entry,))) == 1
    names = [n.meta["input"] for n in gm.graph.nodes if n.op == "placeholder" and "input" in n.meta]
    assert names == ["slot:blocks.0.delta+1"]
    assert calls(gm) == ["aten.linear.default", "aten.add.Tensor", "aten.linear.default"]


def test_a_skipped_block_and_a_held_stream_do_not_meet() -> None:
    """Block 0 adds nothing and the stream behind it is held: the stream in front of it is stored as it is."""
    gm, sites = two_blocks()
    entries = (
        Entry((sites["blocks.0.stream"],), Compute()),
        Entry((sites["blocks.0.delta"],), Skip()),
        Entry((sites["blocks.1.stream"],), Hold()),
    )
    assert edits(gm, InsertSlots(entries)) > 0
    stored = gm.graph.output_node().args[0][-1]
    assert stored.target is aten.linear.default  # the embedding, not the held slot


def test_no_entries_no_edits() -> None:
    """A step without actions is the captured graph."""
    gm, _ = two_blocks()
    before = text(gm)
    assert edits(gm, InsertSlots(())) == 0
    assert text(gm) == before


def test_a_dynamic_set_is_chosen_and_stored_by_sample() -> None:
    """The tokens of each sample with the highest norm of the stream that enters, by hand; ages start anew for them."""
    gm, sites = block()
    read = replace(sites["stream"], name="b.stream", values=(next(iter(gm.graph.nodes)).name,), batch=Axis(0))
    score = Score(((1.0, Norm("b.stream")), (0.0, Stale("b.mlp.out"))))
    choice = Choice(score, 3, (), (read,), frozenset(), B, S)
    out = replace(sites["out"], batch=Axis(0))
    made = InsertSlots((Entry((out,), Update("0")),), (choice,), S, Records((), (("b.mlp.out", "0"),), (B, S)))
    assert edits(gm, made) > 0
    inputs, outputs = run(gm)
    x, slot = inputs["x"], inputs["slot:b.mlp.out"]
    kept = torch.zeros(B, S, dtype=torch.bool).scatter(1, x.norm(dim=2).topk(3, dim=1).indices, True)
    expected = torch.where(kept[..., None], x.exp(), slot)
    torch.testing.assert_close(outputs["b.mlp.out"], expected)
    torch.testing.assert_close(outputs["neg"], -(x + 3 * expected))
    ages = inputs["slot:b.mlp.out.age"]
    torch.testing.assert_close(outputs["b.mlp.out.age"], torch.where(kept, 0.0, ages + 1))
