"""Models written unlike most: a delta that is read twice, two dtypes, outputs in memory that others own."""

from __future__ import annotations

import functools
from typing import Literal

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import tcc
from tcc.errors import PlanError
from tcc.lowering import lower
from tcc.plan import Action, CachePlan, Hold, Reuse, Skip, Update
from tcc.program import build_program
from tcc.runtime import Session
from tests.running import CLOSE
from tests.tiny_models import Attention, Block, Case, Mlp, Tokens, fill, relative_error, tensor_of, tokens_case

WIDTH, TOKENS = 16, 12
SETS = {"some": torch.arange(0, TOKENS, 2)}


def run(which: Case, plan: CachePlan) -> list[Tensor]:
    """What every step returns; it must agree with the reference, in its dtype too."""
    program = build_program(which.info.captured, which.info.analysis, plan)
    session, reference = Session(lower(program, "eager")), tcc.Reference(which.model, plan, which.info)
    outputs = []
    for step in range(2 * plan.num_steps):
        args, kwargs = which.inputs(step)
        result, expected = tensor_of(session(*args, **kwargs)), tensor_of(reference(*args, **kwargs))
        assert result.dtype == expected.dtype, step
        assert relative_error(result, expected) < CLOSE, step
        outputs.append(result)
    return outputs


class ReadTwice(nn.Module):
    """The MLP reads what attention has added beside the stream."""

    def __init__(self) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(WIDTH), nn.LayerNorm(WIDTH)
        self.attn, self.mlp = Attention(WIDTH), Mlp(WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        """`[B, S, D]` to the same."""
        added = self.attn(self.norm1(x))
        x = x + added
        out: Tensor = x + self.mlp(self.norm2(x) + added)
        return out


@functools.cache
def read_twice() -> Case:
    """Two such blocks, captured once."""
    return tokens_case(Tokens([ReadTwice(), ReadTwice()]))


@pytest.mark.parametrize("action", [Reuse(), Skip(), Update("some"), Update("some", "current")], ids=repr)
def test_a_delta_that_is_read_twice_is_the_stored_one_for_both(action: Action) -> None:
    """And a branch that is reused costs nothing."""
    which = read_twice()
    plan = CachePlan(2, {(1, f"blocks.{block}.attn.delta"): action for block in (0, 1)}, SETS)
    run(which, plan)
    cost = which.info.count(plan).cost
    assert cost is not None
    assert cost.step_macs[1] < cost.step_macs[0]


class Shared(ReadTwice):
    """The MLP reads what attention gives, and the stream not at all: both branches have one attention."""

    def forward(self, x: Tensor) -> Tensor:
        """`[B, S, D]` to the same."""
        added = self.attn(self.norm1(x))
        out: Tensor = x + added + self.mlp(self.norm2(added))
        return out


def test_branches_that_share_an_attention_keep_the_same_tokens() -> None:
    """It sees one set of keys; other sets are refused, by name, even those of the same tokens."""
    which = tokens_case(Tokens([Shared(), Shared()]))
    first, second = "blocks.0.attn.delta", "blocks.0.attn2.delta"
    run(which, CachePlan(2, {(1, first): Update("some"), (1, second): Update("some")}, SETS))
    other = CachePlan(2, {(1, first): Update("some"), (1, second): Update("same")}, SETS | {"same": SETS["some"]})
    with pytest.raises(
        PlanError, match=rf"step 1: sites '{first}' and '{second}' share an attention.*the same token set"
    ):
        which.info.program(other)


class StreamAsKeys(nn.Module):
    """Queries are mapped; the stream itself is keys and values."""

    def __init__(self) -> None:
        super().__init__()
        self.query, self.mlp = nn.Linear(WIDTH, WIDTH), Mlp(WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        """`[B, S, D]` to the same."""
        x = x + F.scaled_dot_product_attention(self.query(x), x, x)
        out: Tensor = x + self.mlp(x)
        return out


@pytest.mark.parametrize("attention", ["kept", "current"])
def test_a_stream_that_is_keys_itself_is_attended_to_as_any_other(attention: Literal["kept", "current"]) -> None:
    """Attention `kept` sees the kept tokens alone, and what others hold makes no difference to them."""
    which = tokens_case(Tokens([StreamAsKeys(), StreamAsKeys()]))
    sites = [site for site in which.info.sites.values() if site.kind == "delta"]
    assert [site.name for site in sites] == [f"blocks.{b}.{branch}.delta" for b in (0, 1) for branch in ("attn", "mlp")]
    assert [len(site.attention) for site in sites] == [1, 0, 1, 0]
    run(which, CachePlan(2, {(1, site.name): Update("some", attention) for site in sites}, SETS))


class Widened(nn.Module):
    """A stream in bfloat16 that a branch in float32 makes wide."""

    def __init__(self) -> None:
        super().__init__()
        self.inner, self.last = Mlp(WIDTH), Mlp(WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        """`[B, S, D]` to the same."""
        x = x.bfloat16()
        x = x + self.inner(x.float())
        out: Tensor = x + self.last(x)
        return out


def test_skipping_what_widens_a_stream_leaves_it_wide() -> None:
    """The dtype after it is that of the sum."""
    which = tokens_case(Tokens([Widened()]))
    first = next(site for site in which.info.sites.values() if site.kind == "delta")
    run(which, CachePlan(2, {(1, first.name): Skip()}))


@pytest.mark.parametrize("dtype", [None, torch.bfloat16])
def test_a_held_stream_that_is_the_output(dtype: torch.dtype | None) -> None:
    """It comes in its own dtype, whatever the slot's, and the next step does not write to it."""

    class Turned(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = Tokens([Block(WIDTH)], head=False)

        def forward(self, x: Tensor) -> Tensor:
            return torch.einsum("bsd->bds", self.inner(x))  # a view, which its schema does not tell

    plan = CachePlan(2, {(1, "out.stream"): Hold()}, slot_dtype=dtype)
    for model in (Turned(), Tokens([Block(WIDTH)], head=False)):
        outputs = run(tokens_case(model), plan)
        assert len({output.data_ptr() for output in outputs}) == len(outputs)


def test_products_with_a_vector_are_whole() -> None:
    """`linear` by a vector has no channels to leave out: its last dimension is the tokens."""

    class Weighed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner, self.weight = nn.Linear(WIDTH, WIDTH), nn.Parameter(torch.randn(WIDTH))

        def forward(self, x: Tensor) -> Tensor:
            return self.inner(x) * F.linear(x, self.weight)[:, :3].mean(-1)[:, None, None]

    which = tokens_case(Tokens([Block(WIDTH, Weighed()), Block(WIDTH, Weighed())]))
    run(which, CachePlan(2, {(1, "blocks.0.attn.delta"): Reuse()}))


def test_several_outputs_of_one_operator_are_no_token_axis() -> None:
    """It has no rule, so its branch is reused and not pruned, and the reason says why."""

    class Mantissa(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = nn.Linear(WIDTH, WIDTH)

        def forward(self, x: Tensor) -> Tensor:
            return torch.frexp(self.inner(x)).mantissa

    which = tokens_case(Tokens([Block(WIDTH, Mantissa())]))
    assert "aten.frexp.Tensor has several outputs" in which.info.sites["blocks.0.mlp.delta"].reason
    run(which, CachePlan(2, {(1, "blocks.0.mlp.delta"): Reuse()}))


def test_a_plan_is_what_it_was_when_it_was_compiled() -> None:
    """Changing a tensor that it was made of changes nothing."""
    which, kept = tokens_case(Tokens([Block(WIDTH)])), SETS["some"].clone()
    plan = CachePlan(2, {(1, "blocks.0.mlp.delta"): Update("kept")}, {"kept": kept})
    session = tcc.compile(which.model, plan, example_inputs=(which.args, {}), backend="eager").new_session()
    before = [session(*which.inputs(step)[0]) for step in range(2)]
    kept += 1
    assert all(torch.equal(session(*which.inputs(step)[0]), before[step]) for step in range(2))


def test_copies_that_a_model_returns_are_the_callers() -> None:
    """Writing to them changes neither the input nor the model."""

    class Copies(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = Tokens([Block(WIDTH)])
            self.register_buffer("table", torch.ones(WIDTH))

        def forward(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
            return self.inner(x), x.clone(), self.get_buffer("table").clone()

    model, x = fill(Copies()), torch.randn(2, TOKENS, WIDTH)
    model.get_buffer("table").fill_(1.0)
    plan = CachePlan(2, {(1, "inner.blocks.0.delta"): Reuse()})
    compiled, given = tcc.compile(model, plan, example_inputs=((x,), {}), backend="eager"), x.clone()
    _, *copies = compiled(x)
    for copy in copies:
        copy.zero_()
    assert torch.equal(x, given)
    assert bool((model.get_buffer("table") == 1).all())
