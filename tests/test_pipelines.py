"""Compiled models in diffusers' pipelines: the same images as by hand, as by the model, as by definition."""

from __future__ import annotations

import copy
import functools
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import tcc
from tcc.errors import CallError
from tests.tiny_models import noise, relative_error
from tests.tiny_pipelines import (
    BUILDERS,
    NAMES,
    POLICIES,
    STEPS,
    Oracle,
    arguments,
    by_hand,
    captured,
    pipeline,
    planned,
    run,
    using,
)

pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")  # DPM-Solver's own
#: Of the images' largest value: a few float32 roundings, where pruning has changed the order of sums.
CLOSE = 5e-6


@pytest.mark.parametrize("name", NAMES)
def test_an_uncached_plan_makes_the_models_images(name: str) -> None:
    """To the bit, for two seeds in a row."""
    expected = [run(pipeline(name), name, steps=STEPS, seed=seed) for seed in (0, 1)]
    with using(name, captured(name)) as pipe:
        made = [run(pipe, name, steps=STEPS, seed=seed) for seed in (0, 1)]
    assert all(torch.equal(a, b) for a, b in zip(made, expected, strict=True))
    assert not torch.equal(made[0], made[1])


@pytest.mark.parametrize("policy", ["fora", "taylorseer", "tokens"])
@pytest.mark.parametrize("name", NAMES)
def test_a_caching_plan_makes_the_references_images(name: str, policy: str) -> None:
    """And other images than the uncached model, or the plan would not have been run."""
    uncached = run(pipeline(name), name, steps=STEPS)
    with using(name, planned(name, policy)) as pipe:
        made = run(pipe, name, steps=STEPS)
        model = pipe.transformer
    with using(name, Oracle(pipeline(name).transformer, model.plan, model.info)) as pipe:
        expected = run(pipe, name, steps=STEPS)
    assert relative_error(made, expected) <= CLOSE
    assert relative_error(made, uncached) > 10 * CLOSE


@pytest.mark.parametrize("name", NAMES)
def test_a_pipeline_makes_what_a_loop_by_hand_makes(name: str) -> None:
    """The same scheduler, noise and guidance around the same compiled model: equal to the bit."""
    model = planned(name, "taylorseer")
    with using(name, model) as pipe:
        made = run(pipe, name, steps=STEPS, seed=3)
        model.reset()
        assert torch.equal(by_hand(pipe, name, steps=STEPS, seed=3), made)


@pytest.mark.parametrize("name", ["dit", "wan"])
def test_images_in_a_row_know_nothing_of_each_other(name: str) -> None:
    """Every image starts at step 0: the third, with the first one's seed, is the first one."""
    with using(name, planned(name, "fora")) as pipe:
        first, second, third = (run(pipe, name, steps=STEPS, seed=seed) for seed in (0, 1, 0))
    assert torch.equal(first, third)
    assert not torch.equal(first, second)


def stop_after(step: int) -> dict[str, Any]:
    """The arguments by which a user interrupts a pipeline."""

    def callback(pipe: Any, index: int, timestep: Tensor, given: dict[str, Any]) -> dict[str, Any]:
        pipe._interrupt = index == step
        return given

    return {"callback_on_step_end": callback}


def test_an_interrupted_image_does_not_reach_the_next() -> None:
    """The pipeline ends in mid-run: it warns, for the scheduler may have too few steps, and the next image is right."""
    with using("sd3", planned("sd3", "fora")) as pipe:
        expected = run(pipe, "sd3", steps=STEPS)
        with pytest.warns(UserWarning, match="the run ended after step 2, but the model's plan has 5 steps"):
            run(pipe, "sd3", steps=STEPS, seed=1, **stop_after(2))
        assert torch.equal(run(pipe, "sd3", steps=STEPS), expected)


def test_a_pipeline_that_says_its_step_can_be_interrupted_without_a_warning() -> None:
    """It says how many steps it runs, so there is nothing to warn of."""
    with using("wan", planned("wan", "fora")) as pipe:
        expected = run(pipe, "wan", steps=STEPS)
        run(pipe, "wan", steps=STEPS, seed=1, **stop_after(2))
        assert torch.equal(run(pipe, "wan", steps=STEPS), expected)


def fail(pipe: Any, index: int, timestep: Tensor, given: dict[str, Any]) -> dict[str, Any]:
    """A callback of a user's that breaks in the middle."""
    if index == 2:
        raise KeyboardInterrupt
    return given


def test_an_image_that_failed_is_noticed() -> None:
    """The pipeline had no chance to say that the image ended; the noise level tells, and `reset` helps."""
    with using("sd3", planned("sd3", "fora")) as pipe:
        expected = run(pipe, "sd3", steps=STEPS)
        with pytest.raises(KeyboardInterrupt):
            run(pipe, "sd3", steps=STEPS, seed=1, callback_on_step_end=fail)
        with pytest.raises(CallError, match=r"step 3 of 5: the noise level went back, from 751.121 to 1000.*reset\(\)"):
            run(pipe, "sd3", steps=STEPS)
        pipe.transformer.reset()
        assert torch.equal(run(pipe, "sd3", steps=STEPS), expected)


def test_after_a_failed_image_a_pipeline_that_says_its_step_starts_anew() -> None:
    """Step 0 is a new image."""
    with using("wan", planned("wan", "fora")) as pipe:
        expected = run(pipe, "wan", steps=STEPS)
        with pytest.raises(KeyboardInterrupt):
            run(pipe, "wan", steps=STEPS, seed=1, callback_on_step_end=fail)
        assert torch.equal(run(pipe, "wan", steps=STEPS), expected)


def test_guidance_branches_have_sessions_of_their_own() -> None:
    """One per context of the pipeline, and none without a name."""
    with using("flux", captured("flux").with_plan(POLICIES["fora"])) as pipe:
        run(pipe, "flux", steps=STEPS)
        assert set(pipe.transformer._images.mine().sessions) == {"cond", "uncond"}


def test_a_pipeline_without_contexts_calls_twice_at_a_step() -> None:
    """Image-to-image of Flux does not say which guidance branch it is at: refused, unless that is known."""
    from diffusers import FluxImg2ImgPipeline

    given = arguments("flux") | {"image": noise(1, 3, 16, 16).sigmoid(), "strength": 1.0}
    policy = POLICIES["fora"]
    with using("flux", captured("flux").with_plan(policy)) as pipe:
        edit = FluxImg2ImgPipeline(**pipe.components)
    edit.set_progress_bar_config(disable=True)
    with pytest.raises(CallError, match=r"guidance branches share one session, .*compile with calls_per_step=2"):
        run(edit, "", steps=STEPS, given=given)
    original = pipeline("flux").transformer
    model = edit.transformer = tcc.compile(original, policy, backend="eager", calls_per_step=2)
    made = [run(edit, "", steps=STEPS, given=given) for _ in range(2)]
    edit.transformer = Turns(original, model.plan, model.info)
    assert torch.equal(run(edit, "", steps=STEPS, given=given), made[0])
    assert torch.equal(*made)


class Turns(Oracle):
    """The reference where a call says no context: two runs, in turns."""

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """The next step of the run whose turn it is."""
        with self.cache_context("first" if self.context == "" and not self.turn else "second"):
            self.turn = not self.turn
            return super().forward(*args, **kwargs)

    turn = False


def test_pipelines_in_threads_share_a_compiled_model() -> None:
    """Each makes the images that it makes alone, though both are at it at the same time."""
    model = planned("sd3", "fora")
    with using("sd3", model) as pipe:
        expected = [run(pipe, "sd3", steps=STEPS, seed=seed) for seed in (0, 1)]
        both = [type(pipe)(**pipe.components | {"scheduler": copy.deepcopy(pipe.scheduler)}) for _ in expected]
    turn = threading.Barrier(2)

    def step(pipe: Any, index: int, timestep: Tensor, given: dict[str, Any]) -> dict[str, Any]:
        turn.wait(timeout=60)
        return given

    def work(seed: int) -> list[Tensor]:
        both[seed].set_progress_bar_config(disable=True)
        return [run(both[seed], "sd3", steps=STEPS, seed=seed, callback_on_step_end=step) for _ in range(2)]

    with ThreadPoolExecutor(2) as pool:
        for wanted, made in zip(expected, pool.map(work, (0, 1)), strict=True):
            assert all(torch.equal(image, wanted) for image in made)


@pytest.mark.compiles
@pytest.mark.filterwarnings("ignore:.*torch.jit.script:DeprecationWarning")  # Inductor's own imports
def test_under_inductor_an_uncached_plan_makes_the_compiled_models_images() -> None:
    """To the bit, against `torch.compile(fullgraph=True)` in the same pipeline."""
    model = pipeline("dit").transformer
    with using("dit", torch.compile(model, fullgraph=True)) as pipe:
        expected = run(pipe, "dit", steps=2)
    with using("dit", tcc.compile(model, functools.partial(tcc.plans.full, num_steps=2))) as pipe:
        assert torch.equal(run(pipe, "dit", steps=2), expected)


# --- what pipelines do with a component besides calling it


@pytest.mark.parametrize("name", NAMES)
def test_pipelines_take_it_for_their_model(name: str) -> None:
    """It has the model's class and attributes, and is the component that was set."""
    model = pipeline(name).transformer
    with using(name, planned(name, "fora")) as pipe:
        assert isinstance(pipe.transformer, type(model))
        assert isinstance(pipe.transformer, tcc.CompiledModel)
        assert pipe.transformer.config is model.config
        assert (pipe.dtype, pipe.device) == (torch.float32, torch.device("cpu"))
        assert pipe.components["transformer"] is pipe.transformer
        assert pipe.config["transformer"] == ("diffusers", type(model).__name__)
        assert repr(pipe.transformer).startswith("CompiledModel(")


def test_a_pipeline_for_another_task_takes_it_over() -> None:
    """It checks the classes of what it is given."""
    from diffusers import AutoPipelineForImage2Image

    with using("sd3", planned("sd3", "fora")) as pipe:
        assert AutoPipelineForImage2Image.from_pipe(pipe).transformer is pipe.transformer


def test_weights_may_change_in_place_and_not_be_replaced() -> None:
    """A fused adapter changes values, which the compiled steps read; one that adds layers would not be seen."""
    pipe = BUILDERS["dit"]()
    pipe.set_progress_bar_config(disable=True)
    model, pipe.transformer = pipe.transformer, tcc.compile(pipe.transformer, POLICIES["full"], backend="eager")
    run(pipe, "dit", steps=2)
    layer = model.transformer_blocks[0].attn1.to_q
    layer.weight.data += 0.1
    made, compiled = run(pipe, "dit", steps=2), pipe.transformer
    pipe.transformer = model
    assert torch.equal(run(pipe, "dit", steps=2), made)
    pipe.transformer = compiled
    model.transformer_blocks[0].attn1.to_q = nn.Sequential(layer, nn.Linear(32, 32))
    changed = r"were replaced after it was compiled, by an adapter .*, or cast, or moved, .* call tcc.compile anew"
    with pytest.raises(CallError, match=changed):
        run(pipe, "dit", steps=2)
    model.transformer_blocks[0].attn1.to_q = layer
    run(pipe, "dit", steps=2)
    layer.half()
    with pytest.raises(CallError, match=changed):
        run(pipe, "dit", steps=2)


def test_a_pipeline_saves_the_model_itself(tmp_path: Path) -> None:
    """What is loaded again is the uncompiled pipeline, and makes its images; the saved one goes on."""
    from diffusers import DiTPipeline

    pipe = BUILDERS["dit"]()  # of its own, since saving writes into the model's config
    pipe.set_progress_bar_config(disable=True)
    expected = run(pipe, "dit", steps=2)
    pipe.transformer = tcc.compile(pipe.transformer, POLICIES["full"], backend="eager")
    run(pipe, "dit", steps=2)
    pipe.save_pretrained(tmp_path)
    with pytest.warns(UserWarning, match=r"'_internal_dict' of the model changed .* it still computes the same"):
        assert torch.equal(run(pipe, "dit", steps=2), expected)
    assert torch.equal(run(pipe, "dit", steps=2), expected)
    loaded = DiTPipeline.from_pretrained(tmp_path)
    loaded.set_progress_bar_config(disable=True)
    assert torch.equal(run(loaded, "dit", steps=2), expected)


def test_a_pipeline_moves_and_casts_before_the_first_call_alone() -> None:
    """Before it, the model itself is cast; after it, only what changes nothing is allowed."""
    pipe = BUILDERS["dit"]()
    model, pipe.transformer = pipe.transformer, tcc.compile(pipe.transformer, POLICIES["fora"], backend="eager")
    pipe.to(torch.float64)
    assert model.dtype == pipe.transformer.dtype == torch.float64
    pipe.set_progress_bar_config(disable=True)
    run(pipe, "dit", steps=STEPS)
    pipe.to("cpu", torch.float64)
    with pytest.raises(CallError, match=r"compiled for torch.float64 on cpu and cannot become torch.float32 on cpu"):
        pipe.to(torch.float32)
    assert model.dtype == torch.float64
    with pytest.raises(CallError, match=r"cannot become torch.float64 on meta"):
        pipe.transformer.to("meta")
