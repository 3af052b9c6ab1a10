"""Calling a compiled model: what stands in for a plan or a model, and what a call may look like."""

from __future__ import annotations

import dataclasses
import functools
import threading
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch

import tcc
from tcc.errors import CallError, PlanError
from tcc.plan import CachePlan
from tcc.samplers import sample
from tests.running import CLOSE, STEPS, call, compiled, hold_plan
from tests.tiny_models import Case, case, relative_error


def test_a_policy_is_resolved_at_the_first_call() -> None:
    """A policy stands in for a plan, and `plan` says what it made."""
    which = case("dit")
    model = tcc.compile(which.model, functools.partial(tcc.plans.fora, num_steps=4, interval=2), backend="eager")
    with pytest.raises(PlanError, match="the policy makes its plan at the first call"):
        _ = model.plan
    with pytest.raises(PlanError, match="nothing is compiled yet"):
        model.new_session()
    assert model.info is None
    assert model.program is None
    assert model.compile_seconds == ()
    call(model, which, 0)
    assert (str(model.plan.schedule), model.plan.policy["name"]) == ("IIPI", "fora")
    assert len(model.compile_seconds) == len(model.program.variants) == 2


def test_an_exported_program_compiles_like_its_model(model: tcc.CompiledModel) -> None:
    """A model may come as `torch.export` left it."""
    which = case("dit")
    with torch.no_grad():
        program = torch.export.export(which.model, which.args, which.kwargs, strict=False)
    from_program = tcc.compile(program, model.plan, backend="eager", example_inputs=(which.args, which.kwargs))
    for step in range(STEPS):
        assert torch.equal(call(from_program, which, step), call(model, which, step))


def test_attributes_are_the_models() -> None:
    """Pipelines read `config` and the like from the model they call."""
    which = case("hf_dit")
    model = tcc.compile(which.model, hold_plan(), backend="eager")
    assert model.config is which.model.config
    assert model.dtype == torch.float32
    assert model.device == torch.device("cpu")
    with pytest.raises(AttributeError, match="no_such_attribute"):
        _ = model.no_such_attribute


def test_return_dict_works_both_ways() -> None:
    """A diffusers model returns its output class or a tuple, as it was captured."""
    which = case("hf_dit")
    plan = tcc.plans.full(which.info, num_steps=1)
    as_class = call_with(which, plan)
    as_tuple = call_with(Case(which.model, which.args, which.kwargs | {"return_dict": False}), hold_plan(1))
    assert type(as_class).__name__ == "Transformer2DModelOutput"
    assert isinstance(as_tuple, tuple)
    assert torch.equal(as_class.sample, as_tuple[0])


def call_with(which: Case, plan: CachePlan) -> Any:
    """The whole output of the first call."""
    return compiled(which, plan)(*which.args, **which.kwargs)


def test_arguments_may_be_written_as_the_forward_allows() -> None:
    """Positional and keyword spellings of one call are the same call."""
    which = case("dit")
    x, t, y = which.args
    model = compiled(which, tcc.plans.full(which.info, num_steps=1))
    assert torch.equal(model(x, t, y), model(x, y=y, t=t))


BAD_CALLS = {
    "shape": (lambda x, t, y: (x[:, :, :4], t, y), r"input 'x' has shape \[2, 4, 4, 8\], expected \[2, 4, 8, 8\]"),
    "batch": (lambda x, t, y: (x[:1], t[:1], y[:1]), r"input 'x' has shape \[1, 4, 8, 8\], expected \[2, 4, 8, 8\]"),
    "dtype": (lambda x, t, y: (x.double(), t, y), "input 'x' has dtype torch.float64, expected torch.float32"),
    "label dtype": (lambda x, t, y: (x, t, y.int()), "input 'y' has dtype torch.int32, expected torch.int64"),
    "device": (lambda x, t, y: (x.to("meta"), t, y), "input 'x' is on meta, expected cpu"),
    "no tensor": (lambda x, t, y: (x, 5, y), "input 't' is 5, expected a tensor"),
    "structure": (lambda x, t, y: (x, (t, t), y), "structured differently from the capture"),
    "arguments": (
        lambda x, t, y: (x, t),
        "does not fit the model's forward: missing a required argument: 'y'",
    ),
}


@pytest.mark.parametrize("kind", BAD_CALLS)
def test_a_call_unlike_the_capture_is_refused_and_changes_nothing(model: tcc.CompiledModel, kind: str) -> None:
    """The error names the input and what was expected; the run goes on as if the call had not been made."""
    which = case("dit")
    change, message = BAD_CALLS[kind]
    first = call(model, which, 0)
    with pytest.raises(CallError, match=message):
        model(*change(*which.args))
    assert model.session.step == 1
    reference = tcc.Reference(which.model, model.plan, which.info)
    assert relative_error(first, call(reference, which, 0)) <= CLOSE
    assert relative_error(call(model, which, 1), call(reference, which, 1)) <= CLOSE


def test_calls_that_look_plain_are_read_like_all_others() -> None:
    """The short way through positions and names, and binding and flattening in general: one answer, one error."""
    captured = case("dit").info.captured
    general = dataclasses.replace(captured)
    vars(general)["_defaults"] = None
    x, t, y = case("dit").args
    for args, kwargs in (((x, t, y), {}), ((x,), {"y": y, "t": t}), ((), {"y": y, "x": x, "t": t})):
        assert captured._plain_leaves(args, kwargs) is not None
        assert list(map(id, captured.flatten(args, kwargs))) == list(map(id, general.flatten(args, kwargs)))
    wrong = [((x, t), {}), ((x, t, y, y), {}), ((x, t, y), {"y": y}), ((x, t), {"z": y}), ((x, t, [y]), {}), ((), {})]
    for args, kwargs in [*wrong, ((x, t, 3), {}), ((x, None, y), {})]:
        messages = []
        for way in (captured, general):
            with pytest.raises(CallError) as caught:
                way.flatten(args, kwargs)
            messages.append(str(caught.value))
        assert messages[0] == messages[1]


def test_a_constant_may_not_change_in_mid_run() -> None:
    """An argument that is no tensor is compiled in."""
    which = case("hf_dit")
    model = compiled(which, tcc.plans.full(which.info, num_steps=2))
    with pytest.raises(CallError, match="is False but was True at capture"):
        model(*which.args, **which.kwargs, return_dict=False)


def test_threads_in_contexts_of_their_own_do_not_disturb_each_other(model: tcc.CompiledModel) -> None:
    """A context is its thread's: each thread's calls go to its own session, whatever others do meanwhile."""
    which, turn = case("dit"), threading.Barrier(3)
    alone = {seed: [call(model.new_session(), which, seed)] for seed in range(3)}

    def run(seed: int) -> tuple[list[torch.Tensor], int]:
        with model.cache_context(f"thread {seed}"):
            turn.wait(timeout=60)
            return [call(model, which, seed)], model.session.step

    with ThreadPoolExecutor(3) as pool:
        found = dict(zip(range(3), pool.map(run, range(3)), strict=True))
    assert all(torch.equal(found[seed][0][0], alone[seed][0]) for seed in range(3))
    assert [found[seed][1] for seed in range(3)] == [1] * 3


def test_steps_run_in_order(model: tcc.CompiledModel) -> None:
    """`run_step` takes the next step, or step 0 for a new run."""
    which = case("dit")
    run = model.new_session()
    run.run_step(0, *which.args)
    run.run_step(1, *which.args)
    with pytest.raises(CallError, match=r"step 3 was called but the next step is 2 of 6: .*Call reset\(\)"):
        run.run_step(3, *which.args)
    run.run_step(0, *which.args)
    assert run.step == 1


def test_a_refused_step_changes_nothing(model: tcc.CompiledModel) -> None:
    """A first step with wrong arguments does not end the run in progress."""
    which, run = case("dit"), model.new_session()
    run.run_step(0, *which.args)
    with pytest.raises(CallError):
        run.run_step(0, which.args[0][:1], *which.args[1:])
    assert run.step == 1
    run.run_step(1, *which.args)


def test_an_unknown_backend_is_refused() -> None:
    """With the names that there are."""
    which = case("dit")
    with pytest.raises(CallError, match=r"backend='nope' is not known: use one of .*eager, inductor, .*or a function"):
        tcc.compile(
            which.model, tcc.plans.full(which.info, num_steps=1), backend="nope", example_inputs=(which.args, {})
        )


def test_a_step_after_the_last_is_refused(model: tcc.CompiledModel) -> None:
    """A run with more steps than the plan has is told so, and not to reset."""
    run = model.new_session()
    with pytest.raises(CallError, match=r"step 6 was called but the plan has 6 steps, 0..5: make the plan with the"):
        run.run_step(6, *case("dit").args)


@pytest.mark.parametrize("count", [2, 4])
def test_a_plan_for_another_step_count_is_refused(count: int) -> None:
    """The sampler knows how many steps it runs: more or fewer than the plan has are refused before the first."""
    which = case("dit")
    plan = tcc.plans.full(which.info, num_steps=3)
    noise, labels = which.args[0], which.args[2]
    model = compiled(which, plan)
    message = rf"the sampler runs {count} steps, but the model's plan has 3: sample with num_steps=3, or make the plan"
    for runner in (model, model.new_session()):
        with pytest.raises(CallError, match=message):
            sample(runner, noise, labels, num_steps=count)
    assert model.session.step == 0
    assert sample(model, noise, labels, num_steps=3).shape == noise.shape


def test_a_policy_for_another_step_count_is_refused() -> None:
    """As soon as the policy has made its plan."""
    which = case("dit")
    model = tcc.compile(which.model, functools.partial(tcc.plans.full, num_steps=3), backend="eager")
    assert model.num_steps is None
    with pytest.raises(CallError, match="the sampler runs 4 steps, but the model's plan has 3"):
        sample(model, which.args[0], which.args[2], num_steps=4)
    assert model.num_steps == 3


def test_what_is_no_plan_or_no_pair_of_inputs_is_refused_at_once() -> None:
    """A path in place of a plan, and bare inputs in place of (args, kwargs), are refused with the right form."""
    which = case("dit")
    with pytest.raises(PlanError, match=r"'plan.safetensors' is neither a plan nor a policy: .*CachePlan.load"):
        tcc.compile(which.model, "plan.safetensors")
    with pytest.raises(CallError, match=r"a pair \(args, kwargs\)"):
        tcc.compile(which.model, CachePlan(num_steps=1, actions={}), example_inputs=which.args)


WRONG: dict[str, tuple[dict[str, Any], str]] = {
    "no model": ({"model": "DiT-S/2"}, "model='DiT-S/2' is no model: give an nn.Module"),
    "no options": ({"plan": tcc.plans.fora}, r"'fora' cannot be called.*num_steps.*partial\(fora, num_steps=50\)"),
    "a misspelt option": (
        {"plan": functools.partial(tcc.plans.fora, num_steps=6, intervall=2)}, "the policy 'fora' cannot be called with"
    ),
    "mode": ({"mode": "max-autotune"}, "mode='max-autotune': use 'default', or 'reduce-overhead'"),
    "backend": ({"backend": "nope"}, "backend='nope' is not known: use one of "),
    "dtype by name": ({"slot_dtype": "bfloat16"}, "slot_dtype='bfloat16': use a floating-point type, such as torch.bf"),
    "negative": ({"max_slot_bytes": -1}, "max_slot_bytes=-1: give a whole number of bytes"),
    "options": ({"options": {"nope": 1}}, "options={'nope': 1} are Inductor's, and backend='eager' takes none"),
    "regional": ({"regional": "no"}, "regional='no': use True or False"),
    "packed weights": (
        {"regional": True, "backend": "inductor", "options": {"freezing": True}}, "leave out one of the two"
    ),
    "shapes": ({"on_shape_change": "retry"}, "on_shape_change='retry': use 'error' or 'recapture'"),
}  # fmt: skip


@pytest.mark.parametrize("kind", WRONG)
def test_wrong_arguments_are_refused_at_once(kind: str) -> None:
    """Before anything is captured, with what to write instead."""
    given, message = WRONG[kind]
    right = {"model": case("dit").model, "plan": CachePlan(num_steps=1, actions={}), "backend": "eager"}
    with pytest.raises((CallError, PlanError), match=message):
        tcc.compile(**right | given)


def test_a_policy_that_makes_no_plan_is_refused(model: tcc.CompiledModel) -> None:
    """When it is called; and what is compiled already takes another plan."""
    which = case("dit")
    with pytest.raises(PlanError, match=r"the policy gave None: it must return a tcc\.CachePlan"):
        compiled(which, lambda _: None)  # type: ignore[arg-type, return-value]
    with pytest.raises(CallError, match=r"compiled already: model.with_plan\(plan\)"):
        tcc.compile(model, model.plan)


LAYOUTS = {
    "channels last": lambda x: x.contiguous(memory_format=torch.channels_last),
    "transposed": lambda x: x.transpose(2, 3).contiguous().transpose(2, 3),
    "a slice": lambda x: torch.cat([x, x], dim=1)[:, :4],
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_an_input_may_lie_in_memory_as_it_likes(layout: str) -> None:
    """The graph gets contiguous inputs, at capture and at every call: backends compile one layout."""
    which = case("dit")
    x, t, y = which.args
    seen: list[tuple[int, ...]] = []

    def backend(gm: torch.fx.GraphModule, examples: list[torch.Tensor]) -> Any:
        def run(*args: torch.Tensor) -> Any:
            seen.append(args[0].stride())
            return gm(*args)

        return run

    model = tcc.compile(which.model, tcc.plans.full(which.info, num_steps=2), backend=backend)
    for given in (LAYOUTS[layout](x), x, LAYOUTS[layout](x)):
        with torch.no_grad():
            assert relative_error(model(given, t, y), which.model(x, t, y)) <= CLOSE
    assert seen == [(256, 64, 8, 1)] * 3
