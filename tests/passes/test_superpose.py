"""Superpose mixes computed values with stored ones, by weights that are inputs."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor, fx

from tcc.errors import PlanError
from tcc.passes.sites import Site
from tcc.passes.superpose import Superpose
from tcc.passes.tokens import Axis
from tests.graphs import Sketch, calls, edits, text, values
from tests.tiny_models import case

aten = torch.ops.aten
B, S, D = 2, 6, 4
SHAPES = [(1, 1), (1, S), (B, 1), (B, S)]
#: A mixture is three roundings of float32, whichever way round it is written.
CLOSE = {"rtol": 1e-6, "atol": 1e-6}


def block(*sizes: int, dim: int = 1) -> tuple[fx.GraphModule, dict[str, Site]]:
    """`x1 = x + 3 exp(x)`, `x2 = x1 + sin(x1)`, and the sites; `x1` is read by the second branch alone."""
    sketch = Sketch()
    x = sketch.input("x", *sizes)
    out = sketch.call(aten.exp.default, x)
    delta = sketch.call(aten.mul.Tensor, out, 3)
    middle = sketch.call(aten.add.Tensor, x, delta)
    second = sketch.call(aten.sin.default, middle)
    after = sketch.call(aten.add.Tensor, middle, second)

    def site(name: str, kind: str, *nodes: fx.Node, added: tuple[str, str] = ("", "")) -> Site:
        names = tuple(node.name for node in nodes)
        return Site(name, kind, 0, names, *added, (), sizes, torch.float32, Axis(dim), 0, "")

    sites = (
        site("b.attn.out", "out", out),
        site("b.attn.delta", "delta", delta, added=(x.name, middle.name)),
        site("b.mlp.delta", "delta", second, added=(middle.name, after.name)),
        site("b.delta", "block", delta, second, added=(x.name, after.name)),
        site("out.stream", "stream", after),
    )
    return sketch.done(sketch.call(aten.neg.default, after)), {site.name: site for site in sites}


def run(gm: fx.GraphModule, weight: float | None = None) -> tuple[dict[str, Tensor], list[Tensor]]:
    """Run the graph on noise, with every weight as given: its inputs by name, and its outputs."""
    inputs = values(gm)
    names = [node.meta.get("input", node.target) for node in gm.graph.nodes if node.op == "placeholder"]
    for place, name in enumerate(names):
        if name.startswith("weight:"):
            inputs[place] = torch.rand_like(inputs[place]) if weight is None else torch.full_like(inputs[place], weight)
    return dict(zip(names, inputs, strict=True)), list(gm(*inputs))


def wide(weight: Tensor) -> Tensor:
    """`[1 or B, 1 or S]` over the channels."""
    return weight[:, :, None]


@pytest.mark.parametrize("shape", SHAPES)
def test_an_output_is_mixed_before_its_gate(shape: tuple[int, int]) -> None:
    """The graph is the one expected, and so are the numbers: one weight, one per token, per sample, or both."""
    gm, sites = block(B, S, D)
    assert edits(gm, Superpose((sites["b.attn.out"],), (sites["out.stream"],), shape)) == 2
    assert calls(gm).count("aten.lerp.Tensor") == 1
    inputs, (negative, mixed, stream) = run(gm)
    weight = wide(inputs["weight:b.attn.out"])
    assert weight.shape[:2] == shape
    expected = weight * inputs["x"].exp() + (1 - weight) * inputs["slot:b.attn.out"]
    torch.testing.assert_close(mixed, expected, **CLOSE)
    middle = inputs["x"] + 3 * expected
    torch.testing.assert_close(stream, middle + middle.sin(), **CLOSE)
    assert torch.equal(negative, -stream)


def test_the_rewritten_graph() -> None:
    """A change of the stream is mixed behind the branch, and the stream is added up anew."""
    gm, sites = block(B, S, D)
    assert edits(gm, Superpose((sites["b.attn.delta"],))) == 1
    sketch = Sketch()
    x = sketch.input("x", B, S, D)
    slot, weight = sketch.input("slot:b.attn.delta", B, S, D), sketch.input("weight:b.attn.delta", 1, 1)
    delta = sketch.call(aten.mul.Tensor, sketch.call(aten.exp.default, x), 3)
    mixed = sketch.call(aten.lerp.Tensor, slot, delta, sketch.call(aten.unsqueeze.default, weight, -1))
    middle = sketch.call(aten.add.Tensor, x, mixed)
    after = sketch.call(aten.add.Tensor, middle, sketch.call(aten.sin.default, middle))
    assert text(gm) == text(sketch.done(sketch.call(aten.neg.default, after), mixed))
    assert gm.meta["stores"] == ("b.attn.delta",)


def test_a_change_that_follows_another() -> None:
    """The second branch reads and is added to the stream that the first mixture made."""
    gm, sites = block(B, S, D)
    assert edits(gm, Superpose((sites["b.attn.delta"], sites["b.mlp.delta"]))) == 2
    inputs, (negative, first, second) = run(gm)
    middle = inputs["x"] + first
    weight = inputs["weight:b.mlp.delta"]
    torch.testing.assert_close(second, weight * middle.sin() + (1 - weight) * inputs["slot:b.mlp.delta"], **CLOSE)
    assert torch.equal(negative, -(middle + second))


def test_a_blocks_change_is_mixed_as_a_whole() -> None:
    """Inside the block the stream is the computed one; behind it stands the mixture of the summed change."""
    gm, sites = block(B, S, D)
    assert edits(gm, Superpose((sites["b.delta"],), weight=(1, S))) == 1
    inputs, (negative, mixed) = run(gm)
    delta = 3 * inputs["x"].exp()
    delta = delta + (inputs["x"] + delta).sin()
    weight = wide(inputs["weight:b.delta"])
    torch.testing.assert_close(mixed, weight * delta + (1 - weight) * inputs["slot:b.delta"], **CLOSE)
    assert torch.equal(negative, -(inputs["x"] + mixed))


@pytest.mark.parametrize("shape", [(1, S), (B, S)])
def test_tokens_may_stand_first(shape: tuple[int, int]) -> None:
    """Where the tokens come before the samples, the weight is turned."""
    gm, sites = block(S, B, D, dim=0)
    assert edits(gm, Superpose((sites["b.attn.delta"],), weight=shape)) == 1
    inputs, (_, mixed) = run(gm)
    weight = wide(inputs["weight:b.attn.delta"]).transpose(0, 1)
    expected = weight * 3 * inputs["x"].exp() + (1 - weight) * inputs["slot:b.attn.delta"]
    torch.testing.assert_close(mixed, expected, **CLOSE)


def test_gradients_reach_the_weights() -> None:
    """The derivative in a weight is the channel sum of computed minus stored, times what the output passes on."""
    gm, sites = block(B, S, D)
    edits(gm, Superpose((sites["b.mlp.delta"],), weight=(1, S)))
    inputs, _ = run(gm)
    weight = inputs["weight:b.mlp.delta"].requires_grad_()
    gm(*inputs.values())[0].sum().backward()
    middle = inputs["x"] + 3 * inputs["x"].exp()
    expected = -(middle.sin() - inputs["slot:b.mlp.delta"]).sum(dim=(0, 2))
    torch.testing.assert_close(weight.grad, expected[None], rtol=1e-5, atol=1e-5)


def test_without_sites_nothing_changes() -> None:
    """No sites, no edits; sites to read alone leave the model's outputs bit for bit."""
    gm, sites = block(B, S, D)
    before = text(gm)
    assert edits(gm, Superpose()) == 0
    assert text(gm) == before
    expected = gm(*values(gm))[0]
    assert edits(gm, Superpose(read=(sites["b.delta"], sites["out.stream"]))) == 2
    negative, delta, stream = gm(*values(gm))
    assert torch.equal(negative, expected)
    assert torch.equal(stream, -expected)
    torch.testing.assert_close(values(gm)[0] + delta, stream, **CLOSE)


def test_what_cannot_be_mixed_is_refused() -> None:
    """Before anything is edited, with the site."""
    _, sites = block(B, S, D)
    with pytest.raises(PlanError, match=r"'out\.stream' cannot be mixed: choose sites of kind out, delta, block"):
        Superpose((sites["out.stream"],))
    with pytest.raises(PlanError, match=r"'b\.attn\.out' and 'b\.delta' keep parts of the same branch"):
        Superpose((sites["b.attn.out"], sites["b.delta"]))
    merged = replace(sites["b.attn.out"], axis=Axis(0, outer=B))
    Superpose((merged,))
    with pytest.raises(PlanError, match=r"'b\.attn\.out'.*has no weight per token"):
        Superpose((merged,), weight=(1, S))
    with pytest.raises(PlanError, match=r"'b\.attn\.kv' has two values"):
        Superpose(read=(replace(sites["b.attn.out"], name="b.attn.kv", kind="kv"),))


@pytest.mark.parametrize("kind", ["out", "delta", "block"])
@pytest.mark.parametrize("name", ["dit", "hf_dit", "hf_pixart", "parallel", "flat", "long_skip"])
def test_weight_one_is_the_captured_model(name: str, kind: str) -> None:
    """Bit for bit where values are replaced as they are; a block's change is a sum in another order."""
    info = case(name).info
    sites = tuple(site for site in info.sites.values() if site.kind == kind)
    graph = fx.Graph()
    graph.output(graph.graph_copy(info.captured.gm.graph, {}))
    gm = fx.GraphModule(info.captured.gm, graph)
    assert edits(gm, Superpose(sites)) == len(sites) > 0
    _, outputs = run_model(name, gm)
    (expected,) = info.captured.gm(*info.captured.flatten(*case(name).inputs(0)))
    if kind == "block":
        torch.testing.assert_close(outputs[0], expected, rtol=1e-5, atol=1e-5)
    else:
        assert torch.equal(outputs[0], expected)


def run_model(name: str, gm: fx.GraphModule) -> tuple[dict[str, Tensor], list[Tensor]]:
    """Run a model's mixed graph with weight 1 and noise in the slots."""
    extras = [n for n in gm.graph.nodes if n.op == "placeholder" and "input" in n.meta]
    generator = torch.Generator().manual_seed(3)
    given = {
        n.meta["input"]: torch.ones(n.meta["val"].shape)
        if n.meta["input"].startswith("weight:")
        else torch.randn(n.meta["val"].shape, generator=generator)
        for n in extras
    }
    inputs = case(name).info.captured.flatten(*case(name).inputs(0))
    with torch.no_grad():
        return given, list(gm(*inputs, *given.values()))
