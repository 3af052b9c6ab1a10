"""Callers that are at another step than the compiled model, and calls that change: what is noticed and what is said."""

from __future__ import annotations

import contextlib
import functools
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import tcc
from tcc.driver.stand_in import StandIn
from tcc.errors import CallError, PlanError, ShapeError
from tcc.plan.start import start_at
from tests.running import CLOSE, call, compiled
from tests.tiny_models import Case, Tokens, _blocks, case, fill, noise, relative_error, tensor_of
from tests.tiny_pipelines import NAMES, STEPS, Oracle, arguments, by_hand, captured, pipeline, planned, run, using

pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")  # DPM-Solver's own


@pytest.mark.parametrize("name", NAMES)
def test_the_noise_level_is_found(name: str) -> None:
    """Neither guidance nor token positions are taken for it."""
    model = planned(name, "fora")
    with using(name, model) as pipe:
        run(pipe, name, steps=STEPS)
    seen = model.info.captured
    assert seen.inputs[seen.noise_level].name == "timestep"


# --- guidance


class WithoutContexts(StandIn):
    """A model that a loop calls without saying which branch it is at."""

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Call the model."""
        return self._model[0](*args, **kwargs)

    def cache_context(self, name: str) -> contextlib.AbstractContextManager[None]:
        """Nothing."""
        return contextlib.nullcontext()


@pytest.mark.parametrize("name", ["flux", "wan"])
def test_guidance_branches_without_contexts_are_refused(name: str) -> None:
    """At the second call of the first step, before it could reuse what belongs to the other branch."""
    model = planned(name, "fora")
    model.reset()
    message = r"step 1 of 5: this call has the sample and the noise level of the call before it, and other conditions"
    with using(name, WithoutContexts(model)) as pipe, pytest.raises(CallError, match=message + ".*cache_context"):
        by_hand(pipe, name, steps=STEPS, seed=0)
    assert model.session.step == 1


def test_branches_of_copied_inputs_are_refused_too() -> None:
    """On a CPU, values are compared."""
    which = case("dit")
    model = compiled(which, tcc.plans.fora(which.info, num_steps=4, interval=2))
    x, t, y = which.args
    model(x, t, y)
    with pytest.raises(CallError, match="guidance branches share one session"):
        model(x.clone(), t.clone(), y + 1)
    model(x.clone(), t.clone(), y.clone())  # the same call again is no branch: a benchmark, say


def test_a_solver_that_calls_twice_at_a_noise_level_is_no_guidance() -> None:
    """Heun evaluates again, on another sample, at the noise level of the next step; the plan counts evaluations."""
    from diffusers import FlowMatchHeunDiscreteScheduler

    pipe = pipeline("sd3")
    before, pipe.scheduler = pipe.scheduler, FlowMatchHeunDiscreteScheduler(shift=3.0)
    try:
        model = planned("sd3", "fora")
        with using("sd3", model):
            made = run(pipe, "sd3", steps=(STEPS + 1) // 2)
        with using("sd3", Oracle(pipe.transformer, model.plan, model.info)):
            assert torch.equal(run(pipe, "sd3", steps=(STEPS + 1) // 2), made)
    finally:
        pipe.scheduler = before


# --- step counts


def test_more_steps_than_the_plan_are_refused() -> None:
    """The noise level goes on after the last step."""
    with using("sd3", planned("sd3", "fora")) as pipe:
        message = (
            r"the plan's 5 steps are over, and the noise level goes on .* the scheduler has more steps than the plan"
        )
        with pytest.raises(CallError, match=message):
            run(pipe, "sd3", steps=6)


def test_fewer_steps_than_the_plan_are_warned_of() -> None:
    """When the image is done, for it may have been interrupted; the next image is right."""
    with using("sd3", planned("sd3", "fora")) as pipe:
        expected = run(pipe, "sd3", steps=STEPS)
        with pytest.warns(UserWarning, match=r"after step 3, .* has 5 steps: .*as many steps as the pipeline runs"):
            run(pipe, "sd3", steps=4)
        assert torch.equal(run(pipe, "sd3", steps=STEPS), expected)


def test_fewer_steps_by_hand_are_refused_at_the_next_image() -> None:
    """Nobody says that the first image is over, but the noise level goes back."""
    with using("sd3", planned("sd3", "fora")) as pipe:
        by_hand(pipe, "sd3", steps=3, seed=0)
        with pytest.raises(CallError, match=r"step 3 of 5: the noise level went back, .* a new image began before"):
            by_hand(pipe, "sd3", steps=3, seed=0)


@pytest.mark.parametrize("steps", [4, 6])
def test_a_pipeline_that_says_its_steps_is_refused_at_its_first(steps: int) -> None:
    """More and fewer than the plan's alike."""
    model = planned("wan", "fora")
    message = rf"the pipeline runs {steps} steps, but the model's plan has 5: call it with num_inference_steps=5, or"
    with using("wan", model) as pipe, pytest.raises(CallError, match=message):
        run(pipe, "wan", steps=steps)


@pytest.mark.parametrize("name", ["sd3", "wan"])
def test_an_uncached_plan_runs_any_number_of_steps(name: str) -> None:
    """All its steps are alike, so that none can be wrong; whether the pipeline says its step or not."""
    for steps in (3, 7):
        expected = run(pipeline(name), name, steps=steps)
        with using(name, captured(name)) as pipe:
            assert torch.equal(run(pipe, name, steps=steps), expected)


def test_steps_that_a_pipeline_says_twice_are_refused() -> None:
    """In one context; a step that it leaves out is another matter."""
    which = case("dit")
    model = compiled(which, tcc.plans.fora(which.info, num_steps=4, interval=2))
    for step in (0, 1):
        with model.cache_context("cond", step_index=step, num_inference_steps=4, sigma=1.0):
            call(model, which, step)
    with (
        model.cache_context("cond", step_index=1, num_inference_steps=4),
        pytest.raises(CallError, match=r"the pipeline is at step 1, but the model's next step is 2 of 4"),
    ):
        call(model, which, 2)


# --- starting in the middle


def test_a_pipeline_that_starts_at_a_later_step_runs_the_plan_from_there() -> None:
    """Two models that share a schedule, as Wan 2.2's: the second one's first step is not step 0."""
    which = case("dit")
    plan = tcc.plans.fora(which.info, num_steps=5, interval=2)
    model, reference = compiled(which, plan), tcc.Reference(which.model, start_at(plan, 3), which.info)
    for _ in range(2):
        for step in (3, 4):
            with model.cache_context("cond", step_index=step, num_inference_steps=5):
                assert torch.equal(call(model, which, step), call(reference, which, step))


def test_image_to_image_starts_at_the_step_that_is_said() -> None:
    """With strength 0.6 the first two of five steps are left out; the pipeline's images are the reference's."""
    from diffusers import StableDiffusion3Img2ImgPipeline

    model = planned("sd3", "fora")
    given = arguments("sd3") | {"image": noise(1, 3, 16, 16).sigmoid(), "strength": 0.6}
    with using("sd3", model) as pipe:
        edit = StableDiffusion3Img2ImgPipeline(**pipe.components)
        edit.set_progress_bar_config(disable=True)
        model.reset(start_step=2)
        made = [run(edit, "", steps=STEPS, given=given) for _ in range(2)]
        model.reset()
        edit.transformer = Oracle(pipeline("sd3").transformer._model[0], start_at(model.plan, 2), model.info)
        assert torch.equal(run(edit, "", steps=STEPS, given=given), made[0])
    assert torch.equal(*made)


def test_image_to_image_that_says_nothing_is_warned_of() -> None:
    """The first steps of the plan are run in place of the last ones."""
    from diffusers import StableDiffusion3Img2ImgPipeline

    given = arguments("sd3") | {"image": noise(1, 3, 16, 16).sigmoid(), "strength": 0.6}
    with using("sd3", planned("sd3", "fora")) as pipe:
        edit = StableDiffusion3Img2ImgPipeline(**pipe.components)
        edit.set_progress_bar_config(disable=True)
        with pytest.warns(UserWarning, match=r"the run ended after step 2, .*reset\(start_step=2\)"):
            run(edit, "", steps=STEPS, given=given)


# --- other shapes


@pytest.mark.parametrize(
    ("name", "changes", "message"),
    [
        (
            "pixart",
            arguments("pixart", tokens=5),
            r"'encoder_hidden_states' has shape \[2, 5, 24\], expected \[2, 7, 24\]",
        ),
        ("sd3", {"height": 24}, r"'hidden_states' has shape \[2, 4, 12, 8\], expected \[2, 4, 8, 8\]"),
        ("wan", {"num_frames": 9}, r"'hidden_states' has shape \[1, 4, 3, 4, 4\], expected \[1, 4, 2, 4, 4\]"),
        ("dit", {"guidance_scale": 1.0}, r"'hidden_states' has shape \[1, 4, 8, 8\], expected \[2, 4, 8, 8\]"),
    ],
)
def test_another_shape_is_an_error(name: str, changes: dict[str, Any], message: str) -> None:
    """Prompt length, resolution, frames, batch; with the option that would allow it."""
    with using(name, planned(name, "fora")) as pipe:
        run(pipe, name, steps=STEPS)
        with pytest.raises(ShapeError, match=message + ".*on_shape_change='recapture'"):
            run(pipe, name, steps=STEPS, **changes)


def test_recapture_makes_a_plan_for_every_shape_once() -> None:
    """Two prompt lengths in turns: each is captured once, gets a plan of its own, and its images are right."""
    original = pipeline("pixart").transformer
    policy = functools.partial(tcc.plans.tprr, num_steps=3, k1=1, k2=1, keep=0.5)
    asked: list[int] = []

    def counted(info: tcc.ModelInfo) -> tcc.CachePlan:
        asked.append(info.captured.inputs[1].shape[1])
        return policy(info)

    model = tcc.compile(original, counted, backend="eager", on_shape_change="recapture")
    for tokens in (7, 5, 7, 5):
        given = arguments("pixart", tokens)
        with using("pixart", model) as pipe:
            made = run(pipe, "pixart", steps=3, **given)
        with using("pixart", Oracle(original, model.plan, model.info)) as pipe:
            assert relative_error(made, run(pipe, "pixart", steps=3, **given)) <= CLOSE
    assert asked == [7, 5]


def test_recapture_lets_guidance_branches_have_prompts_of_different_lengths() -> None:
    """Each context has the shapes of its own branch."""
    given = {"negative_prompt_embeds": noise(1, 4, 24, seed=9)}
    expected = run(pipeline("wan"), "wan", steps=2, **given)
    policy = functools.partial(tcc.plans.full, num_steps=2)
    model = tcc.compile(pipeline("wan").transformer, policy, backend="eager", on_shape_change="recapture")
    with using("wan", model) as pipe:
        assert torch.equal(run(pipe, "wan", steps=2, **given), expected)


def smaller(which: Case) -> tuple[Tensor, ...]:
    """The arguments of a call with a batch of one."""
    return tuple(x[:1] for x in which.args)


def test_shapes_may_not_change_within_an_image() -> None:
    """Even where they may between images: what is stored has the old shape."""
    which = case("dit")
    policy = functools.partial(tcc.plans.fora, num_steps=3, interval=2)
    model = tcc.compile(which.model, policy, backend="eager", on_shape_change="recapture")
    call(model, which, 0)
    message = (
        r"step 1 of 3: input 'x' has shape \[1, 4, 8, 8\], expected \[2, 4, 8, 8\]: shapes may change when an image"
    )
    with pytest.raises(ShapeError, match=message):
        model(*smaller(which))
    model.reset()
    with torch.no_grad():
        assert torch.equal(model(*smaller(which)), which.model(*smaller(which)))


def test_recapture_needs_a_policy_or_a_plan_of_any_shape() -> None:
    """A plan that was made for one shape is not run at another."""
    which = case("dit")
    plan = tcc.plans.fora(which.info, num_steps=1, interval=2)
    model = tcc.compile(which.model, plan, backend="eager", on_shape_change="recapture")
    call(model, which, 0)
    with pytest.raises(
        PlanError, match=r"for another batch size: .*; or give tcc.compile a policy, which makes a plan"
    ):
        model(*smaller(which))


def test_another_word_for_what_to_do_is_refused() -> None:
    """There are two."""
    with pytest.raises(CallError, match=r"on_shape_change='ignore': use 'error' or 'recapture'"):
        tcc.compile(case("dit").model, tcc.CachePlan(1, {}), on_shape_change="ignore")  # type: ignore[arg-type]


# --- inputs that are no tensors, or not always


class Conditioned(nn.Module):
    """A transformer with arguments of every sort."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = Tokens(_blocks())

    def forward(
        self,
        x: Tensor,
        timestep: float | Tensor,
        guidance: float | Tensor = 1.0,
        mask: Tensor | None = None,
        conditions: dict[str, Any] | None = None,
        ids: Tensor | None = None,
    ) -> Tensor:
        """Scale, mask, shift by what is given."""
        x = x * guidance + timestep
        x = x if mask is None else x * mask[:, :, None]
        x = x if conditions is None or conditions["size"] is None else x + conditions["size"]
        x = x if ids is None else x + ids.to(x.dtype).cos()[None, :, None]
        out: Tensor = self.inner(x)
        return out


@functools.cache
def conditioned() -> nn.Module:
    """The model, with random weights."""
    return fill(Conditioned(), std=0.2)


X, MASK, IDS = noise(2, 12, 16), torch.ones(2, 12), torch.arange(12)
CHANGES: dict[str, tuple[dict[str, Any], dict[str, Any], str]] = {
    "timestep": ({"timestep": 5}, {"timestep": 4}, "argument 'timestep' is 4 but was 5 at capture: .*pass a tensor"),
    "its type": ({"timestep": 5}, {"timestep": 5.0}, r"argument 'timestep' is 5.0 but was 5 at capture"),
    "to a tensor": ({}, {"timestep": torch.tensor(5)}, r"argument 'timestep' is a tensor \[\] but was 5 at capture"),
    "from a tensor": ({"timestep": torch.tensor(5)}, {"timestep": 5}, "input 'timestep' is 5, expected a tensor"),
    "guidance": ({"guidance": 2.0}, {"guidance": 3.0}, r"argument 'guidance' is 3.0 but was 2.0 at capture"),
    "mask": ({"mask": None}, {"mask": MASK}, r"argument 'mask' is a tensor \[2, 12\] but was None at capture"),
    "no mask": ({"mask": MASK}, {"mask": None}, "input 'mask' is None, expected a tensor: what was a tensor"),
    "dict": (
        {"conditions": {"size": 2.0}},
        {"conditions": {"size": 3.0}},
        r"'conditions\['size'\]' is 3.0 but was 2.0",
    ),
    "no dict": (
        {"conditions": {"size": None}},
        {"conditions": None},
        r"differently .*\(argument 'conditions': now \*, captured",
    ),
    "ids' type": ({"ids": IDS}, {"ids": IDS.float()}, "input 'ids' has dtype torch.float32, expected torch.int64"),
}


@pytest.mark.parametrize("kind", CHANGES)
def test_what_is_no_tensor_is_captured_once_and_checked_after(kind: str) -> None:
    """A change is refused with the argument's name, and the run goes on as if the call had not been made."""
    first, second, message = CHANGES[kind]
    first, second = {"timestep": 5} | first, {"timestep": 5} | first | second
    model = tcc.compile(conditioned(), functools.partial(tcc.plans.fora, num_steps=3, interval=2), backend="eager")
    with torch.no_grad():
        assert torch.equal(model(X, **first), conditioned()(X, **first))
    with pytest.raises(CallError, match=message):
        model(X, **second)
    assert model.session.step == 1
    model(X, **first)


def test_tensors_may_change_at_every_step() -> None:
    """Ids and a timestep given as tensors are inputs like any other."""
    model = tcc.compile(conditioned(), functools.partial(tcc.plans.full, num_steps=3), backend="eager")
    for step in range(3):
        given = {"timestep": torch.tensor(float(step)), "ids": IDS + step, "guidance": torch.tensor(1.0 - step)}
        with torch.no_grad():
            assert torch.equal(model(X, **given), conditioned()(X, **given))


def test_positions_may_change_from_call_to_call() -> None:
    """Flux computes its rotary embeddings from ids, in the graph."""
    original = pipeline("flux").transformer
    ids = torch.arange(48.0).view(16, 3)
    given = {
        "encoder_hidden_states": noise(1, 7, 24),
        "pooled_projections": noise(1, 16),
        "timestep": torch.tensor([0.5]),
        "guidance": torch.tensor([3.5]),
        "txt_ids": torch.zeros(7, 3),
        "joint_attention_kwargs": {},
    }
    model = captured("flux").with_plan(functools.partial(tcc.plans.full, num_steps=2))
    for places in (ids, ids.flip(0)):
        with torch.no_grad():
            wanted = original(noise(1, 16, 16), img_ids=places, **given, return_dict=False)
            assert torch.equal(
                tensor_of(model(noise(1, 16, 16), img_ids=places, **given, return_dict=False)), wanted[0]
            )


def test_attention_arguments_that_come_later_are_refused() -> None:
    """`joint_attention_kwargs` is None at capture, and has a scale afterwards."""
    with using("sd3", planned("sd3", "fora")) as pipe:
        run(pipe, "sd3", steps=STEPS)
        with pytest.raises(CallError, match=r"argument 'joint_attention_kwargs': now .*dict.*, captured \*"):
            run(pipe, "sd3", steps=STEPS, joint_attention_kwargs={"other": 1.0})
