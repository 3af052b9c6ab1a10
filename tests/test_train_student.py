"""The student: a frozen model whose sites are mixed with stored values."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

import tcc
from tcc.errors import CallError, PlanError
from tcc.plan import CachePlan, Compute, Reuse
from tcc.train.student import Student
from tests.joint_models import joint
from tests.running import CLOSE
from tests.tiny_models import Case, case, dit, relative_error, tensor_of

#: Bit for bit, but for a block's change: that is a sum in another order, a few roundings of float32.
ROUNDING = {"out": 0.0, "delta": 0.0, "block": 1e-5}


def names(which: Case, kind: str) -> list[str]:
    """The sites of one kind."""
    return [name for name, site in which.info.sites.items() if site.kind == kind]


def weights(sites: Any, value: float) -> dict[str, Tensor]:
    """The same weight for all sites."""
    return {name: torch.full((1, 1), value) for name in sites}


@pytest.mark.parametrize("kind", ["out", "delta", "block"])
@pytest.mark.parametrize("name", ["dit", "hf_dit", "hf_pixart", "separate"])
def test_computing_is_the_model_and_so_is_weight_one(name: str, kind: str) -> None:
    """Whatever is stored, at weight 1 output and stored values are those that are computed."""
    which = case(name)
    student = Student(which.info, names(which, kind), streams=["out.stream"])
    args, kwargs = which.inputs(0)
    with torch.no_grad():
        expected = tensor_of(which.model(*args, **kwargs))
    computed = student.compute(*args, **kwargs)
    assert torch.equal(tensor_of(computed.output), expected)
    stored = {name: torch.randn_like(value) for name, value in computed.stored.items()}
    mixed = student.mix(stored, weights(student.sites, 1.0), *args, **kwargs)
    assert relative_error(tensor_of(mixed.output), expected) <= ROUNDING[kind]
    for site in student.sites:
        assert relative_error(mixed.stored[site], computed.stored[site]) <= ROUNDING[kind]


@pytest.mark.parametrize("kind", ["out", "delta", "block"])
@pytest.mark.parametrize("name", ["dit", "hf_pixart", "long_skip"])
def test_weight_zero_is_a_reuse_step(name: str, kind: str) -> None:
    """A FORA step by the reference interpreter: every site from the step before; nothing new is stored."""
    which = case(name)
    sites = names(which, kind)
    actions = {(step, site): Reuse() if step else Compute() for step in range(2) for site in sites}
    reference = tcc.Reference(which.model, CachePlan(num_steps=2, actions=actions), which.info)
    student = Student(which.info, sites)
    args, kwargs = which.inputs(0)
    reference(*args, **kwargs)
    stored = student.compute(*args, **kwargs).stored
    args, kwargs = which.inputs(1)
    mixed = student.mix(stored, weights(sites, 0.0), *args, **kwargs)
    assert relative_error(tensor_of(mixed.output), tensor_of(reference(*args, **kwargs))) < CLOSE
    assert all(torch.equal(mixed.stored[site], stored[site]) for site in sites)


def test_old_changes_add_up_on_the_new_stream() -> None:
    """At weight 0 the final stream is the stream that enters block 0 plus the stored change of every block."""
    which = case("dit")
    sites = names(which, "block")
    student = Student(which.info, sites, streams=["blocks.0.stream", "out.stream"])
    stored = student.compute(*which.inputs(0)[0]).stored
    streams = student.mix(stored, weights(sites, 0.0), *which.inputs(1)[0]).streams
    total = streams["blocks.0.stream"]
    for site in sites:
        total = total + stored[site]
    assert torch.equal(streams["out.stream"], total)
    assert torch.equal(student.compute(*which.inputs(1)[0]).streams["blocks.0.stream"], streams["blocks.0.stream"])


def test_a_weight_per_token_computes_single_tokens() -> None:
    """Weights of 0 and 1 per sample and token choose rows; a site without a weight is computed."""
    which = case("dit")
    site = "blocks.1.mlp.delta"
    student = Student(which.info, [site, "blocks.0.attn.delta"], streams=["out.stream"])
    (x, t, y), _ = which.inputs(1)
    full, stored = student.compute(x, t, y), student.compute(*which.inputs(0)[0]).stored
    chosen = torch.arange(16)[None] % 2 == torch.tensor([[0], [1]])
    mixed = student.mix(stored, {site: chosen.float()}, x, t, y)
    assert torch.equal(mixed.stored[site], torch.where(chosen[..., None], full.stored[site], stored[site]))
    same = (mixed.streams["out.stream"] == full.streams["out.stream"]).all(dim=-1)
    assert torch.equal(same, chosen)


def test_gradients_go_to_the_weights_alone() -> None:
    """The model's parameters get none and keep their values; what is stored is cut off."""
    which = dit()
    assert any(parameter.requires_grad for parameter in which.model.parameters())
    before = {name: value.clone() for name, value in which.model.state_dict().items()}
    student = Student(which.info, names(which, "out"))
    stored = {site: value.requires_grad_() for site, value in student.compute(*which.inputs(0)[0]).stored.items()}
    given = {site: torch.full((1, 16), 0.5, requires_grad=True) for site in student.sites}
    mixed = student.mix(stored, given, *which.inputs(1)[0])
    mixed.output.square().mean().backward()
    assert all(weight.grad is not None and bool(weight.grad.abs().sum() > 0) for weight in given.values())
    assert all(parameter.grad is None for parameter in which.model.parameters())
    assert all(value.grad is None for value in stored.values())
    assert not any(value.requires_grad for value in mixed.stored.values())
    assert all(torch.equal(value, before[name]) for name, value in which.model.state_dict().items())


def test_the_gradient_is_the_derivative() -> None:
    """Against central differences, in float64."""
    made = dit()
    which = Case(made.model.double(), (made.args[0].double(), *made.args[1:]), {})
    student = Student(which.info, names(which, "block"))
    first, second = torch.randn(
        2, *which.args[0].shape, dtype=torch.float64, generator=torch.Generator().manual_seed(1)
    )
    stored = student.compute(first, *which.args[1:]).stored

    def loss(weight: Tensor) -> Tensor:
        given = {site: weight[i] for i, site in enumerate(student.sites)}
        output: Tensor = student.mix(stored, given, second, *which.args[1:]).output
        return output.square().mean()

    start = torch.rand(2, 1, 16, dtype=torch.float64, generator=torch.Generator().manual_seed(2))
    assert torch.autograd.gradcheck(loss, start.requires_grad_())


def test_no_graph_is_kept_where_none_is_needed() -> None:
    """Teachers, and students whose weights want no gradients."""
    which = case("dit")
    student = Student(which.info, names(which, "out"), streams=["out.stream"])
    computed = student.compute(*which.inputs(0)[0])
    mixed = student.mix(computed.stored, weights(student.sites, 0.5), *which.inputs(1)[0])
    for values in (computed, mixed):
        assert not values.output.requires_grad
        assert not values.streams["out.stream"].requires_grad


def test_what_does_not_fit_is_refused() -> None:
    """With the site and the shapes that are possible."""
    which = case("dit")
    with pytest.raises(PlanError, match="nothing to learn without sites"):
        Student(which.info, [])
    with pytest.raises(PlanError, match=r"no such site; near ones: .*blocks\.0\.attn\.out"):
        Student(which.info, ["blocks.0.cross.out"])
    with pytest.raises(PlanError, match=r"'blocks\.0\.attn\.kv' cannot be mixed"):
        Student(which.info, ["blocks.0.attn.kv"])
    student = Student(which.info, ["blocks.0.attn.out"])
    stored = student.compute(*which.args).stored
    with pytest.raises(CallError, match=r"shape \[3, 16\], expected \[1 or 2, 1 or 16\]"):
        student.mix(stored, {"blocks.0.attn.out": torch.ones(3, 16)}, *which.args)
    with pytest.raises(CallError, match=r"'blocks\.0\.mlp\.out', which is not mixed"):
        student.mix(stored, {"blocks.0.mlp.out": torch.ones(1, 1)}, *which.args)


@pytest.mark.compiles
@pytest.mark.filterwarnings("ignore:.*torch.jit.script:DeprecationWarning")  # Inductor's own imports
def test_compiled_students_agree() -> None:
    """Inductor changes the rounding, forward and backward, and nothing else."""
    which = case("dit")
    plain, fast = (Student(which.info, names(which, "delta"), fast=fast) for fast in (False, True))
    results = []
    for student in (plain, fast):
        weight = torch.full((1, 16), 0.5, requires_grad=True)
        stored = student.compute(*which.inputs(0)[0]).stored
        mixed = student.mix(stored, dict.fromkeys(student.sites, weight), *which.inputs(1)[0])
        mixed.output.square().mean().backward()
        results.append((mixed.output.detach(), weight.grad))
    assert relative_error(results[1][0], results[0][0]) < CLOSE
    assert relative_error(results[1][1], results[0][1]) < 10 * CLOSE  # sums over all tokens and channels


def test_token_weights_are_of_the_main_stream() -> None:
    """Another stream has tokens of its own; one weight per site mixes both."""
    which = joint("joint")
    student = Student(which.info, names(which, "out"))
    args, kwargs = which.inputs(0)
    stored = student.compute(*args, **kwargs).stored
    assert any("@" in name for name in student.sites)
    mixed = student.mix(stored, weights(student.sites, 0.5), *args, **kwargs)
    with torch.no_grad():
        assert relative_error(mixed.output, tensor_of(which.model(*args, **kwargs))) <= CLOSE
    rows = {student.sites[0]: torch.ones(1, which.info.num_tokens)}
    with pytest.raises(CallError, match="is on another stream, with tokens of its own: leave it out"):
        student.mix(stored, rows, *args, **kwargs)
