"""The pass runner and the verifier: every way of breaking a graph is caught."""

from __future__ import annotations

import operator
import pathlib
from collections.abc import Callable
from dataclasses import dataclass

import pytest
import torch
from torch import fx

from tcc.errors import PassError, PlanError, VerificationError
from tcc.passes.base import Pass, run_passes, verify
from tcc.passes.graph import emit
from tests.graphs import Sketch, calls, text
from tests.tiny_models import case

aten = torch.ops.aten


def chain() -> fx.GraphModule:
    """`exp(neg(relu(x)))` and a split of it."""
    sketch = Sketch()
    y = sketch.call(aten.neg.default, sketch.call(aten.relu.default, sketch.input("x", 2, 4)))
    parts = sketch.call(aten.chunk.default, sketch.call(aten.exp.default, y), 2, 1)
    return sketch.done(sketch.call(operator.getitem, parts, 0), sketch.call(operator.getitem, parts, 1))


def node_of(gm: fx.GraphModule, target: object) -> fx.Node:
    """The first call of `target`."""
    return next(n for n in gm.graph.nodes if n.target is target)


@dataclass(frozen=True)
class Edit(Pass):
    """Does what it is given, and reports as many edits as it is told."""

    action: Callable[[fx.GraphModule], object]
    reported: int = 1

    def run(self, gm: fx.GraphModule) -> int:
        """Edit `gm`."""
        self.action(gm)
        return self.reported


def drop_neg(gm: fx.GraphModule) -> None:
    """A valid edit."""
    node = node_of(gm, aten.neg.default)
    node.replace_all_uses_with(node.args[0])
    gm.graph.erase_node(node)


def drop_exp(gm: fx.GraphModule) -> None:
    """Another valid edit."""
    node = node_of(gm, aten.exp.default)
    node.replace_all_uses_with(node.args[0])
    gm.graph.erase_node(node)


def nothing(gm: fx.GraphModule) -> None:
    """No edit."""


def test_the_runner_records_and_recompiles() -> None:
    """One record per pass, and the module runs the new graph."""
    gm = chain()
    x = torch.randn(2, 4)
    first, second = run_passes(gm, [Edit(drop_neg), Edit(nothing, 0)])
    assert (first.name, first.edits, first.nodes_before, first.nodes_after) == ("Edit", 1, 8, 7)
    assert (second.edits, second.nodes_before, second.nodes_after) == (0, 7, 7)
    assert torch.equal(gm(x)[0], x.relu().exp()[:, :2])


def test_the_runner_removes_dead_code() -> None:
    """A pass only edits; what lost its users goes, but no input does."""
    gm = chain()
    run_passes(gm, [Edit(lambda gm: node_of(gm, aten.exp.default).update_arg(0, next(iter(gm.graph.nodes))))])
    assert calls(gm) == ["aten.exp.default", "aten.chunk.default", "getitem", "getitem"]
    assert [n.target for n in gm.graph.nodes if n.op == "placeholder"] == ["x"]


def test_dead_code_that_came_with_the_graph_is_no_pass_s_edit() -> None:
    """A graph with an unused weight goes through a pass that does nothing."""
    sketch = Sketch()
    sketch.weight("unused", 3)
    gm = sketch.done(sketch.call(aten.relu.default, sketch.input("x", 2)))
    assert run_passes(gm, [Edit(nothing, 0)])[0].edits == 0


@pytest.mark.parametrize(
    ("action", "reported", "message"),
    [(drop_neg, 0, "Edit reported 0 edits but changed"), (nothing, 2, "Edit reported 2 edits but did not change")],
)
def test_a_pass_that_lies_about_its_edits_is_caught(
    action: Callable[[fx.GraphModule], None], reported: int, message: str
) -> None:
    """The count is compared with the graph before and after."""
    with pytest.raises(PassError, match=message):
        run_passes(chain(), [Edit(action, reported)])


def test_a_crash_names_the_pass_and_those_before_it() -> None:
    """The message says which pass failed, after which others, why, and how to get the graphs."""

    @dataclass(frozen=True)
    class Crash(Edit):
        pass

    def crash(gm: fx.GraphModule) -> None:
        raise KeyError("lost")

    message = r"Crash failed \(passes before it: Edit, Edit\): KeyError: 'lost'\. .*set TCC_DUMP"
    with pytest.raises(PassError, match=message) as caught:
        run_passes(chain(), [Edit(drop_neg), Edit(nothing, 0), Crash(crash)])
    assert isinstance(caught.value.__cause__, KeyError)


def test_a_call_that_a_pass_gets_wrong_names_the_node_and_its_source_line() -> None:
    """A pass that builds an invalid call fails with the node it was made for and the user's line."""
    graph = fx.Graph()
    x = graph.placeholder("x")
    x.meta["val"] = torch.empty(2, 3, device="meta")
    x.meta["stack_trace"] = '  File "model.py", line 7, in forward\n    return x\n'
    with pytest.raises(RuntimeError, match=r"aten.mm.default made for node 'x', File \"model.py\", line 7"):
        emit(graph, torch.ops.aten.mm.default, (x, x), like=x)


def test_errors_meant_for_the_user_pass_through() -> None:
    """A pass may refuse a plan in its own words."""

    def refuse(gm: fx.GraphModule) -> None:
        raise PlanError("not on a Sunday")

    with pytest.raises(PlanError, match=r"^not on a Sunday$"):
        run_passes(chain(), [Edit(refuse)])


def _stale_shape(gm: fx.GraphModule) -> None:
    node = node_of(gm, aten.neg.default)
    with node.meta["val"].fake_mode:
        node.meta["val"] = torch.empty(3, 3)


def _stale_dtype(gm: fx.GraphModule) -> None:
    node = node_of(gm, aten.neg.default)
    with node.meta["val"].fake_mode:
        node.meta["val"] = torch.empty(2, 4, dtype=torch.float16)


def _stale_device(gm: fx.GraphModule) -> None:
    node = node_of(gm, aten.neg.default)
    with node.meta["val"].fake_mode:
        node.meta["val"] = torch.empty(2, 4, device="meta")


def _stale_part(gm: fx.GraphModule) -> None:
    split = node_of(gm, aten.chunk.default)
    with split.meta["val"][0].fake_mode:
        split.meta["val"] = [torch.empty(2, 3), torch.empty(2, 1)]


def _no_value(gm: fx.GraphModule) -> None:
    del node_of(gm, aten.neg.default).meta["val"]


def _other_operator(gm: fx.GraphModule) -> None:
    node_of(gm, aten.neg.default).target = aten.t.default


def _invalid_arguments(gm: fx.GraphModule) -> None:
    split = node_of(gm, aten.chunk.default)
    split.args = (split.args[0], 2, 5)


def _wrong_order(gm: fx.GraphModule) -> None:
    node_of(gm, aten.exp.default).append(node_of(gm, aten.neg.default))


def _foreign_node(gm: fx.GraphModule) -> None:
    node_of(gm, aten.neg.default).update_arg(0, next(iter(chain().graph.nodes)))


def _missing_weight(gm: fx.GraphModule) -> None:
    first = node_of(gm, aten.relu.default)
    gm.register_buffer("lost", torch.zeros(2, 4))
    with gm.graph.inserting_before(first):
        node = gm.graph.get_attr("lost")
    node.meta["val"] = first.meta["val"]
    first.update_arg(0, node)
    del gm.lost


BREAKS: dict[Callable[[fx.GraphModule], None], str] = {
    _stale_shape: r"rule 'recorded values agree with the inputs' is broken at node 'neg_default': .*\(3, 3\)",
    _stale_dtype: "recorded values agree with the inputs.*float16",
    _stale_device: "recorded values agree with the inputs.*meta",
    _stale_part: "recorded values agree with the inputs.*chunk",
    _no_value: "rule 'every node carries a value' is broken at node 'neg_default': this one has none",
    _other_operator: r"recorded values agree with the inputs.*computed \(\(4, 2\)",
    _invalid_arguments: "rule 'every call is valid for its inputs' is broken at node 'chunk_default'",
    _wrong_order: "the graph is not well formed: .*used before it has been defined",
    _foreign_node: "the graph is not well formed: .*does not belong to this Graph",
    _missing_weight: "the graph is not well formed: .*lost",
}


@pytest.mark.parametrize("break_it", BREAKS, ids=lambda f: f.__name__.lstrip("_"))
def test_a_broken_graph_does_not_pass(break_it: Callable[[fx.GraphModule], None]) -> None:
    """Each way of breaking a good graph is found, and the message names rule and node."""
    gm = chain()
    verify(gm, "nothing yet")
    break_it(gm)
    with pytest.raises(VerificationError, match=f"(?s){BREAKS[break_it]}"):
        verify(gm, "test")


def test_the_runner_verifies_after_every_edit() -> None:
    """The message names graph and pass."""
    with pytest.raises(VerificationError, match="after variant0: Edit, rule 'recorded values agree"):
        run_passes(chain(), [Edit(drop_exp), Edit(_stale_shape, 1)], label="variant0")


def test_without_checks_the_runner_trusts_its_passes() -> None:
    """Plans are counted without verification; what is compiled is verified."""
    gm = chain()
    run_passes(gm, [Edit(_stale_shape, 0)], check=False)
    with pytest.raises(VerificationError):
        verify(gm, "test")


def test_a_report_shows_the_user_s_line_and_the_neighbourhood() -> None:
    """Five lines either side of the node, which is marked."""
    info = case("conv").info
    graph = fx.Graph()
    graph.output(graph.graph_copy(info.captured.gm.graph, {}))
    gm = fx.GraphModule(info.captured.gm, graph)
    node = node_of(gm, aten.conv1d.default)
    with node.meta["val"].fake_mode:
        node.meta["val"] = torch.empty(1)
    with pytest.raises(VerificationError) as caught:
        verify(gm, "test")
    lines = str(caught.value).splitlines()
    assert "tiny_models.py" in lines[1]
    assert "in forward" in lines[1]
    marked = [line for line in lines[2:] if line.startswith("> ")]
    assert len(marked) == 1
    assert "aten.conv1d.default" in marked[0]
    assert len(lines) == 2 + 11


def test_dumps_show_the_graph_before_and_after_every_pass(
    tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """`TCC_DUMP` names a folder; one text file per stage, in order."""
    monkeypatch.setenv("TCC_DUMP", str(tmp_path))
    gm = chain()
    before = text(gm)
    run_passes(gm, [Edit(drop_neg), Edit(nothing, 0)], label="variant 0")
    folder = tmp_path / "variant_0"
    assert sorted(path.name for path in folder.iterdir()) == ["000_captured.txt", "001_Edit.txt", "002_Edit.txt"]
    assert (folder / "000_captured.txt").read_text() == before + "\n"
    assert (folder / "001_Edit.txt").read_text() == (folder / "002_Edit.txt").read_text() == text(gm) + "\n"


def test_a_crash_leaves_the_dumps_of_what_came_before(tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The last file is the graph that the failing pass was given."""

    def crash(gm: fx.GraphModule) -> None:
        raise ValueError

    monkeypatch.setenv("TCC_DUMP", str(tmp_path))
    with pytest.raises(PassError):
        run_passes(chain(), [Edit(drop_neg), Edit(crash)], label="v")
    assert sorted(path.name for path in (tmp_path / "v").iterdir()) == ["000_captured.txt", "001_Edit.txt"]


def test_without_the_variable_nothing_is_written(tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Dumps are for debugging."""
    monkeypatch.delenv("TCC_DUMP", raising=False)
    monkeypatch.chdir(tmp_path)
    run_passes(chain(), [Edit(drop_neg)])
    assert list(tmp_path.iterdir()) == []
