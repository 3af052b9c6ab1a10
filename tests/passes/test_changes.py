"""What a pass has changed: found where it is, and nowhere else."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import fx

from tcc.errors import PassError, VerificationError
from tcc.passes import base
from tcc.passes.base import run_passes
from tcc.passes.changes import calls_of, changed, differs
from tcc.passes.graph import copy_of, graph_text
from tests.passes.test_base import Edit, _foreign_node, _stale_shape, chain, drop_neg, node_of

aten = torch.ops.aten


def _like_itself(gm: fx.GraphModule) -> None:
    node = node_of(gm, aten.neg.default)
    with gm.graph.inserting_before(node):
        new = gm.graph.node_copy(node, lambda n: n)
    node.replace_all_uses_with(new)
    gm.graph.erase_node(node)


def _other_literal(gm: fx.GraphModule) -> None:
    node_of(gm, aten.chunk.default).update_arg(1, 2.0)


def _same_literal(gm: fx.GraphModule) -> None:
    node_of(gm, aten.chunk.default).update_arg(1, 2)


def _moved(gm: fx.GraphModule) -> None:
    node_of(gm, aten.relu.default).append(node_of(gm, aten.exp.default))


def _other_operator(gm: fx.GraphModule) -> None:
    node_of(gm, aten.neg.default).target = aten.sin.default


def _named(gm: fx.GraphModule) -> None:
    node = node_of(gm, aten.chunk.default)
    node.args, node.kwargs = node.args[:2], {"dim": 1}


EDITS: dict[Callable[[fx.GraphModule], None], list[str]] = {
    lambda _: None: [],
    drop_neg: ["exp"],
    _like_itself: ["neg", "exp"],
    _other_literal: ["chunk"],
    _same_literal: ["chunk"],
    _moved: [],
    _other_operator: ["sin"],
    _named: ["chunk"],
    _stale_shape: ["neg", "exp"],
}


@pytest.mark.parametrize("edit", EDITS)
def test_changes_are_found(edit: Callable[[fx.GraphModule], None]) -> None:
    """The changed calls and those whose inputs have another value; the text differs exactly where it does in full."""
    gm = chain()
    calls, text = calls_of(gm.graph), graph_text(gm.graph)
    edit(gm)
    assert [str(n.target).split(".")[1] for n in changed(calls, gm.graph)] == EDITS[edit]
    assert differs(gm.graph, calls) == (graph_text(gm.graph) != text)


def test_two_alike_that_change_places_are_told_apart_by_who_reads_them() -> None:
    """From the first other node on, the text decides, with the numbers of both graphs."""
    gm = chain()
    neg = node_of(gm, aten.neg.default)
    with gm.graph.inserting_before(neg):
        twin = gm.graph.node_copy(neg, lambda n: n)
    calls = calls_of(gm.graph)
    neg.append(twin)
    assert differs(gm.graph, calls)
    neg.prepend(twin)
    assert not differs(gm.graph, calls)


@pytest.mark.parametrize(("verified", "expected"), [(True, ["exp"]), (False, ["relu", "exp", "chunk"])])
def test_a_copy_of_what_is_verified_is_computed_anew_where_it_changes(
    verified: bool, expected: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """One value of a copy; all values of a graph that is new to the runner."""
    found: list[str] = []
    monkeypatch.setattr(base, "_check_value", lambda node, *_: found.append(str(node.target)))
    run_passes(copy_of(chain()), [Edit(drop_neg), Edit(lambda _: None, 0)], verified=verified)
    assert [name.split(".")[1] for name in found if name.startswith("aten")] == expected


@pytest.mark.parametrize(("action", "message"), [(_stale_shape, "values agree"), (_foreign_node, "not belong")])
def test_a_copy_of_what_is_verified_may_not_break(action: Callable[[fx.GraphModule], None], message: str) -> None:
    """What a pass breaks is found in a copy as in any other graph."""
    with pytest.raises(VerificationError, match=message):
        run_passes(copy_of(chain()), [Edit(action)], verified=True)


def test_a_pass_that_puts_the_same_in_place_has_changed_nothing() -> None:
    """Other nodes, but the same text."""
    with pytest.raises(PassError, match="reported 1 edits but did not change"):
        run_passes(chain(), [Edit(_like_itself)])
