"""The contexts of one image: which step a call is at when guidance is on at some steps only, and in threads."""

from __future__ import annotations

import functools
import threading
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from torch import Tensor, nn

import tcc
from tcc.errors import CallError
from tcc.plan.start import start_at
from tests.running import CLOSE
from tests.tiny_models import case, noise, relative_error

STEPS = 7
LEVELS = (9, 8, 7, 5, 3, 2, 1)
ORDERS = {"cond first": ("cond", "uncond"), "uncond first": ("uncond", "cond")}


@pytest.fixture(params=["host", "device"])
def where(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Where noise levels are: on a device they are read only where they must be."""
    if request.param == "device":
        monkeypatch.setattr("tcc.runtime.watch.is_readable", lambda tensor: False)
        monkeypatch.setattr("tcc.runtime.image.is_readable", lambda tensor: False)
    name: str = request.param
    return name


@functools.cache
def planned() -> tcc.CompiledModel:
    """The tiny DiT under a plan that computes at steps 0, 3 and 6 and reuses between."""
    which = case("dit")
    plan = tcc.plans.fora(which.info, num_steps=STEPS, interval=3)
    return tcc.compile(which.model, plan, backend="eager", example_inputs=(which.args, which.kwargs))


@pytest.fixture
def model() -> tcc.CompiledModel:
    """The compiled model without sessions."""
    return planned().with_plan(planned().plan)


def inputs(context: str, step: int, seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    """A sample that the contexts share, the noise level, and the context's labels."""
    labels = torch.tensor([1, 2] if context == "cond" else [9, 9])
    return noise(2, 4, 8, 8, seed=100 * seed + step), torch.full((2,), LEVELS[step]), labels


def one(model: tcc.CompiledModel, context: str, step: int, seed: int = 0) -> Tensor:
    """The call of a context at a step."""
    with model.cache_context(context):
        out: Tensor = model(*inputs(context, step, seed))
    return out


def loop(
    model: tcc.CompiledModel, guided: Iterable[int], order: tuple[str, ...] = ("cond", "uncond"), seed: int = 0
) -> dict[int, Tensor]:
    """An image with guidance at the steps `guided`; what the unconditional branch gave at each."""
    found = {}
    for step in range(STEPS):
        for context in order:
            if context == "cond" or step in guided:
                out = one(model, context, step, seed)
                found |= {step: out} if context == "uncond" else {}
    return found


def expected(guided: Iterable[int], seed: int = 0) -> dict[int, Tensor]:
    """By definition: a run of steps in a row is one of the plan that starts where it does."""
    which, found, last = case("dit"), {}, -2
    run = tcc.Reference(which.model, planned().plan, which.info)
    for step in guided:
        if step != last + 1:
            run = tcc.Reference(which.model, start_at(planned().plan, step), which.info)
        found[step], last = run(*inputs("uncond", step, seed)), step
    return found


INTERVALS = {
    "whole": range(STEPS),
    "on late": range(2, STEPS),
    "on at the second step": range(1, STEPS),
    "on at the last step": [6],
    "off early": range(4),
    "in the middle": range(1, 5),
    "off between": [0, 1, 4, 5, 6],
    "off for a step": [0, 1, 3, 4],
    "every second step": range(0, STEPS, 2),
}


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("interval", INTERVALS)
def test_guidance_in_an_interval_runs_the_loops_steps(
    model: tcc.CompiledModel, interval: str, order: str, where: str
) -> None:
    """A context that starts late, or goes on after it was left out, computes all sites at the loop's step."""
    guided = list(INTERVALS[interval])
    for seed in (0, 1):  # nothing is left of the first image in the second
        found, wanted = loop(model, guided, ORDERS[order], seed), expected(guided, seed)
        assert found.keys() == wanted.keys()
        assert all(relative_error(found[step], wanted[step]) <= CLOSE for step in guided)


@pytest.mark.parametrize("order", ORDERS)
def test_a_loop_may_say_its_steps(model: tcc.CompiledModel, order: str) -> None:
    """Then noise levels are not looked at."""
    guided = [1, 2, 4, 6]
    wanted = expected(guided)
    for _ in range(2):
        for step in range(STEPS):
            for context in ORDERS[order]:
                if context == "cond" or step in guided:
                    with model.cache_context(context, step_index=step, num_inference_steps=STEPS):
                        out = model(*inputs(context, step))
                    assert context == "cond" or relative_error(out, wanted[step]) <= CLOSE


@pytest.mark.parametrize("interval", INTERVALS)
def test_calls_without_contexts_are_told_apart_by_their_order(interval: str, where: str) -> None:
    """For pipelines that make two calls at a step, or one, and do not say which is which."""
    guided = list(INTERVALS[interval])
    model = tcc.compile(case("dit").model, planned().plan, backend="eager", calls_per_step=2)
    model._prepared.shapes = planned()._prepared.shapes
    for seed in (0, 1):
        wanted = expected(guided, seed)
        for step in range(STEPS):
            model(*inputs("cond", step, seed))
            if step in guided:
                assert relative_error(model(*inputs("uncond", step, seed)), wanted[step]) <= CLOSE
    assert set(model._images.mine().sessions) == {"call 0", "call 1"}


def test_guidance_that_ends_early_is_no_image_that_ends_early(model: tcc.CompiledModel) -> None:
    """At the end of a pipeline's image: the loop is done, one context is not, and there is no warning."""
    loop(model, range(3))
    model._reset_stateful_cache()
    loop(model, [])
    one(model, "cond", 0)
    with pytest.warns(UserWarning, match=r"the run ended after step 0, but the model's plan has 7 steps: unless"):
        model._reset_stateful_cache()


def test_an_image_that_broke_off_does_not_reach_the_next(model: tcc.CompiledModel) -> None:
    """A context that is behind is called at the noise level of a new image."""
    for step in range(4):
        one(model, "cond", step)
    with pytest.raises(CallError, match=r"step 3 of 7: context 'uncond' is called at the noise level 9, .*reset\(\)"):
        one(model, "uncond", 0)
    model.reset()
    wanted = expected(range(STEPS))
    assert all(relative_error(out, wanted[step]) <= CLOSE for step, out in loop(model, range(STEPS)).items())


class Unnamed(nn.Module):
    """The tiny DiT, at a noise level that comes in a vector with something else."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = case("dit").model

    def forward(self, labels: Tensor, both: Tensor, x: Tensor) -> Tensor:
        """Take the vector apart."""
        out: Tensor = self.inner(x, both[:, 0].round().long(), labels)
        return out


@functools.cache
def unnamed() -> tcc.CompiledModel:
    """Its noise level is not found."""
    policy = functools.partial(tcc.plans.fora, num_steps=STEPS, interval=3)
    x, t, y = inputs("cond", 0)
    given = ((y, torch.stack([t, t], dim=1).float(), x), {})
    return tcc.compile(Unnamed().eval(), policy, backend="eager", example_inputs=given)


def test_a_late_context_without_a_noise_level_is_refused() -> None:
    """It cannot be known where the loop is; until then calls are counted."""
    model = unnamed().with_plan(unnamed().plan)
    assert model.info.captured.noise_level is None
    x, t, y = inputs("cond", 0)
    with model.cache_context("cond"):
        for _ in range(3):
            model(y, torch.stack([t, t], dim=1).float(), x)
    with (
        model.cache_context("uncond"),
        pytest.raises(CallError, match=r"step 2 of 7: context 'uncond' was not called .*noise_level=.*start_step="),
    ):
        model(y, torch.stack([t, t], dim=1).float(), x)


def test_a_context_that_is_late_where_it_was_first_is_refused_without_a_noise_level() -> None:
    """Left out at the last step, it may begin the next image, or be late: nothing tells."""
    model = unnamed().with_plan(unnamed().plan)

    def call(context: str, step: int) -> None:
        x, t, y = inputs(context, step)
        with model.cache_context(context):
            model(y, torch.stack([t, t], dim=1).float(), x)

    for step in range(STEPS):
        for context in ("uncond", "cond") if step < STEPS - 1 else ("cond",):
            call(context, step)
    with pytest.raises(CallError, match=r"step 6 of 7: context 'uncond' was not called .* call reset\(\) before it"):
        call("uncond", 0)
    model.reset()
    call("uncond", 0)


def test_conditions_that_stay_are_no_sample() -> None:
    """Where no noise level is known and the sample comes last: the first input alone does not make a branch."""
    model = unnamed().with_plan(unnamed().plan)
    for step in range(3):
        x, t, y = inputs("cond", step)
        model(y, torch.stack([t, t], dim=1).float(), x)
    with pytest.raises(CallError, match="Two guidance branches share one session"):
        model(y + 1, torch.stack([t, t], dim=1).float(), x)


# --- threads


def expected_at(step: int) -> Tensor:
    """What the first step of a run gives for the inputs of `step`."""
    return one(planned().with_plan(planned().plan), "cond", step)


def test_threads_make_images_of_their_own(model: tcc.CompiledModel) -> None:
    """Two loops with the same names of contexts, in step with each other, and each as if it were alone."""
    turn = threading.Barrier(2)
    wanted = {seed: loop(model, range(2, STEPS), seed=seed) for seed in (0, 1)}

    def image(seed: int) -> dict[int, Tensor]:
        found = {}
        for step in range(STEPS):
            turn.wait(timeout=60)
            one(model, "cond", step, seed)
            found |= {step: one(model, "uncond", step, seed)} if step >= 2 else {}
        return found

    with ThreadPoolExecutor(2) as pool:
        found = dict(enumerate(pool.map(image, (0, 1))))
    assert all(torch.equal(out, wanted[seed][step]) for seed in (0, 1) for step, out in found[seed].items())


def test_threads_take_over_what_others_have_done_with(model: tcc.CompiledModel) -> None:
    """Images one after the other, each in a thread of its own, have one set of slots; an image that failed as well."""

    def fail() -> None:
        one(model, "cond", 0)
        one(model, "cond", 1)

    wanted = loop(model, range(STEPS))
    for work in (lambda: loop(model, range(STEPS)), fail, lambda: loop(model, range(STEPS))):
        with ThreadPoolExecutor(1) as pool:
            found = pool.submit(work).result(timeout=60)
        assert found is None or all(torch.equal(found[step], wanted[step]) for step in wanted)
    assert len(model._images._made) == 1


def test_an_image_that_moves_to_another_thread_is_refused(model: tcc.CompiledModel) -> None:
    """Its slots are not there; a session may move."""
    one(model, "cond", 0)
    one(model, "cond", 1)
    with ThreadPoolExecutor(1) as pool:
        with pytest.raises(CallError, match=r"this thread begins at the noise level 7, .* began at 9\. .*new_session"):
            pool.submit(one, model, "cond", 2).result(timeout=60)
        pool.submit(model.reset).result(timeout=60)
        assert torch.equal(pool.submit(one, model, "cond", 2).result(timeout=60), expected_at(2))
        assert model.session.step == 0  # of no context; those in this thread are where they were
        assert one(model, "cond", 2).shape == (2, 8, 8, 8)
        session = model.new_session()
        session(*inputs("cond", 0))
        pool.submit(session, *inputs("cond", 1)).result(timeout=60)
    assert session.step == 2
