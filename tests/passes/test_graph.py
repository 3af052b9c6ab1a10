"""Reading and extending graphs."""

from __future__ import annotations

import torch
from torch import fx
from torch._subclasses.fake_tensor import FakeTensorMode

from tcc.passes.graph import emit, fake_mode_of, graph_hash, graph_text, module_path, output_values, shape, source_line
from tests.graphs import Sketch
from tests.tiny_models import case

aten = torch.ops.aten


def copy_of(name: str) -> fx.Graph:
    """A copy of a captured graph."""
    graph = fx.Graph()
    graph.output(graph.graph_copy(case(name).info.captured.gm.graph, {}))
    return graph


def test_the_text_is_one_line_a_node() -> None:
    """Values are numbered; dtypes and shapes stand behind the arrow."""
    sketch = Sketch()
    x, w = sketch.input("x", 2, 3), sketch.weight("w", 4, 3)
    y = sketch.call(aten.linear.default, x, w)
    parts = sketch.call(aten.split.Tensor, y, 2, dim=-1)
    graph = sketch.done(y, parts).graph
    assert graph_text(graph).splitlines() == [
        "%0 = placeholder x() -> float32[2, 3]",
        "%1 = get_attr w() -> float32[4, 3]",
        "%2 = call_function aten.linear.default(%0, %1) -> float32[2, 4]",
        "%3 = call_function aten.split.Tensor(%2, 2, dim=-1) -> (float32[2, 2], float32[2, 2])",
        "%4 = output output((%2, %3)) -> NoneType",
    ]


def test_text_and_hash_do_not_depend_on_names() -> None:
    """Two graphs that differ in node names alone print alike, and hash alike."""
    graph = copy_of("dit")
    for number, node in enumerate(graph.nodes):
        if node.op == "call_function":
            node.name = f"renamed_{number}"
    assert graph_text(graph) == graph_text(case("dit").info.captured.gm.graph)
    assert graph_hash(graph) == case("dit").info.captured.hash


def test_the_hash_does_not_see_layouts() -> None:
    """A copy before a view, where a device needs one, and the kind of view do not matter; the shape does."""

    def graph(copy: bool, target: object, sizes: list[int]) -> fx.Graph:
        sketch = Sketch()
        x = sketch.call(aten.t.default, sketch.input("x", 2, 6))
        if copy:
            x = sketch.call(aten.clone.default, x, memory_format=torch.contiguous_format)
        return sketch.done(sketch.call(aten.exp.default, sketch.call(target, x, sizes))).graph

    one = graph_hash(graph(True, aten.view.default, [12]))
    assert one == graph_hash(graph(False, aten.reshape.default, [12]))
    assert one == graph_hash(graph(True, aten._unsafe_view.default, [12]))
    assert one != graph_hash(graph(True, aten.view.default, [3, 4]))


def test_the_hash_sees_every_argument() -> None:
    """Another constant is another graph, and so is something extra."""
    graph = copy_of("dit")
    before = graph_hash(graph)
    assert graph_hash(graph, ["more"]) != before
    norm = next(n for n in graph.nodes if n.target is aten.layer_norm.default)
    norm.update_arg(4, 1e-3)
    assert graph_hash(graph) != before


def test_a_new_node_has_a_value_and_its_model_s_line() -> None:
    """Nodes that a pass makes are as well described as captured ones."""
    graph = copy_of("conv")
    conv = next(n for n in graph.nodes if n.target is aten.conv1d.default)
    with graph.inserting_after(conv):
        node = emit(graph, aten.unsqueeze.default, (conv, 0), like=conv)
    assert shape(node) == (1, *shape(conv))
    assert node.meta["val"].fake_mode is fake_mode_of(graph)
    assert source_line(node) == source_line(conv)
    assert "tiny_models.py" in source_line(conv)
    assert module_path(node) == module_path(conv) == "blocks.0.mlp.conv"


def test_without_a_line_the_module_is_named() -> None:
    """A node made from nothing stands at the top."""
    graph = copy_of("conv")
    conv = next(n for n in graph.nodes if n.target is aten.conv1d.default)
    del conv.meta["stack_trace"]
    assert source_line(conv) == "module blocks.0.mlp.conv"
    sketch = Sketch()
    assert source_line(sketch.call(aten.exp.default, sketch.input("x", 2))) == "module (top)"


def test_the_line_is_the_user_s_even_where_torch_made_the_call() -> None:
    """Frames inside torch are passed over, unless there are no others."""
    sketch = Sketch()
    node = sketch.call(aten.exp.default, sketch.input("x", 2))
    ours = 'File "/home/me/model.py", line 3, in forward'
    theirs = 'File "/site-packages/torch/nn/modules/conv.py", line 9, in forward'
    node.meta["stack_trace"] = f"  {ours}\n    self.conv(x)\n  {theirs}\n    return F.conv1d(x)\n"
    assert source_line(node) == ours
    node.meta["stack_trace"] = f"  {theirs}\n"
    assert source_line(node) == theirs


def test_outputs_are_a_flat_tuple() -> None:
    """In the order of the model's output."""
    sketch = Sketch()
    x = sketch.input("x", 2)
    y, z = sketch.call(aten.exp.default, x), sketch.call(aten.neg.default, x)
    assert output_values(sketch.done(z, y).graph) == (z, y)


def test_fake_values_are_made_in_one_mode() -> None:
    """A sketch's nodes share a fake mode, as a captured graph's do."""
    sketch = Sketch()
    node = sketch.call(aten.relu.default, sketch.input("x", 2))
    assert isinstance(node.meta["val"].fake_mode, FakeTensorMode)
    assert node.meta["val"].fake_mode is sketch.mode
