"""Rules that users register: for custom operators, and what is said where they are wrong."""

from __future__ import annotations

import functools
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, fx

from tcc.errors import PassError
from tcc.passes.token_axis import _RULES, Narrowing, NotTokenLocal, narrowing, rule
from tcc.passes.tokens import Axis
from tests.graphs import Sketch

S = 5  # tokens
T1 = Axis(1)


@pytest.fixture
def halve() -> Iterator[fx.Node]:
    """A call of a custom operator on `[2, S, 3]` and `[3]`, whose rule is forgotten afterwards."""
    one = _halve()
    sketch = Sketch()
    yield sketch.call(one, sketch.input("x", 2, S, 3), sketch.input("y", 3))
    _RULES.pop(one, None)


@functools.cache
def _halve() -> Any:
    @torch.library.custom_op("tcc_tests::halve_by", mutates_args=())
    def halve_by(x: Tensor, y: Tensor) -> Tensor:
        return x / 2 + y

    halve_by.register_fake(lambda x, y: torch.empty_like(x))
    return torch.ops.tcc_tests.halve_by.default


@pytest.mark.parametrize(
    ("answer", "message"),
    [
        (lambda node, axis, size: {(0,): axis}, r"returned \{.*\}: return Narrowing\(\{\(0,\): axis\}\)"),
        (lambda node, axis, size: Narrowing([(0,)]), r"returned Narrowing\(operands=\[\(0,\)\]"),
        (
            lambda node, axis, size: Narrowing({0: axis}),
            r"names an operand at 0: its operands stand at \[\(0,\), ",
        ),
        (lambda node, axis, size: Narrowing({(2,): axis}), r"names an operand at \(2,\)"),
        (
            lambda node, axis, size: Narrowing({(0,): 1}),
            r"answers 1 for the operand at \(0,\) of shape \[2, 5, 3\]: give",
        ),
        (
            lambda node, axis, size: Narrowing({(1,): axis}),
            r"answers Axis\(dim=1.* for the operand at \(1,\) of",
        ),
        (lambda node, axis, size: Narrowing({(0,): Axis(2)}), r"finds 3 tokens, not 5, in \(0,\)"),
        (lambda node, axis, size: node.args[7], r"raised IndexError"),
        (lambda node: None, r"raised TypeError"),
    ],
)
def test_a_wrong_answer_of_a_rule_names_the_operator(halve: fx.Node, answer: Any, message: str) -> None:
    """What a user's rule gets wrong is told with the operator, the node and its line."""
    rule(halve.target)(answer)
    with pytest.raises(PassError, match=r"the token rule of tcc_tests.halve_by.default " + message) as raised:
        narrowing(halve, T1, 3)
    assert f"(node '{halve.name}', " in str(raised.value)


def test_what_is_no_rule_is_not_registered(halve: fx.Node) -> None:
    """A dict in place of a function, and a decorator without its operators."""
    with pytest.raises(PassError, match=r"the token rule of tcc_tests.halve_by.default is \{.*\}: give a function"):
        rule(halve.target)({(0,): T1})
    for wrong in ((), (lambda node, axis, size: Narrowing({(0,): axis}),)):
        with pytest.raises(PassError, match=r"a rule needs its operators: write @rule\(torch.ops.mylib.scale\)"):
            rule(*wrong)
    with pytest.raises(PassError, match=r"\{\} is no operator"):
        rule({})


def test_a_rule_can_be_registered_for_a_custom_operator() -> None:
    """What tcc does not know, the user can teach it."""

    @torch.library.custom_op("tcc_tests::halve", mutates_args=())
    def halve(x: Tensor) -> Tensor:
        return x / 2

    halve.register_fake(torch.empty_like)
    sketch, one = Sketch(), torch.ops.tcc_tests.halve.default
    node = sketch.call(one, sketch.input("x", 2, S, 3))
    for target in (one, torch.ops.tcc_tests.halve, halve):
        _RULES.pop(one, None)
        with pytest.raises(NotTokenLocal, match=r"no token rule for tcc_tests.halve.default"):
            narrowing(node, T1, 3)
        rule(target)(lambda node, axis, size: Narrowing({(0,): axis}))
        assert narrowing(node, T1, 3).operands == {(0,): T1}
    with pytest.raises(PassError, match=r"'halve' is no operator: name one, such as torch.ops.aten"):
        rule("halve")


def test_an_operator_with_several_outputs() -> None:
    """Its rule is checked against the tokens of its first output."""

    @torch.library.custom_op("tcc_tests::add_norm", mutates_args=())
    def add_norm(x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
        return torch.nn.functional.layer_norm(x + y, x.shape[-1:]), x + y

    add_norm.register_fake(lambda x, y: (torch.empty_like(x), torch.empty_like(x)))
    sketch, one = Sketch(), torch.ops.tcc_tests.add_norm.default
    node = sketch.call(one, sketch.input("x", 2, S, 3), sketch.input("y", 2, S, 3))
    rule(one)(lambda node, axis, size: Narrowing({(0,): axis, (1,): axis}))
    assert narrowing(node, T1, 3).operands == {(0,): T1, (1,): T1}
    rule(one)(lambda node, axis, size: Narrowing({(0,): Axis(2)}))
    with pytest.raises(PassError, match=rf"finds 3 tokens, not {S}, in \(0,\)"):
        narrowing(node, T1, 3)
