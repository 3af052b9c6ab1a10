"""The search for I-steps: what it finds where the best is known, and that it measures what the compiled model draws."""

from __future__ import annotations

import functools
import math
import re

import pytest
import torch

import tcc
from tcc.errors import PlanError
from tcc.samplers import sample
from tcc.train.placement import image_quality, search_steps
from tests.tiny_models import dit

GOAL = (0, 3, 4, 9)


def nearness(steps: tuple[int, ...]) -> float:
    """0 at the goal, lower the further away."""
    return -float(sum(abs(a - b) for a, b in zip(steps, GOAL, strict=True)))


def test_the_best_placement_is_found() -> None:
    """A measure with one peak, reached from afar; each placement is measured once."""
    measured: list[tuple[int, ...]] = []

    def quality(steps: tuple[int, ...]) -> float:
        measured.append(steps)
        return nearness(steps)

    found = search_steps(quality, (0, 1, 2, 3), num_steps=12, evaluations=120)
    assert (found.i_steps, found.quality, found.start) == (GOAL, 0.0, nearness((0, 1, 2, 3)))
    assert len(measured) == len(set(measured)) == found.evaluations


def test_a_seed_decides_the_search() -> None:
    """Same seed, same moves; few measurements leave different seeds at different places."""
    runs = [search_steps(nearness, (0, 9, 10, 11), num_steps=12, evaluations=6, seed=seed) for seed in (0, 0, 1, 2, 3)]
    assert runs[0] == runs[1]
    assert len({run.i_steps for run in runs}) > 1


def test_a_search_without_choice_ends() -> None:
    """All steps, or only the first: there is nothing to move; a small space is exhausted."""
    assert search_steps(len, (0,), num_steps=4).evaluations == 1
    assert search_steps(len, (0, 1, 2), num_steps=3).evaluations == 1
    assert search_steps(len, (0, 1), num_steps=4, evaluations=50).evaluations == 3


@pytest.mark.parametrize("start", [(), (1, 2), (0, 12)])
def test_a_start_that_is_no_placement_is_refused(start: tuple[int, ...]) -> None:
    """With the steps there are."""
    with pytest.raises(PlanError, match=re.escape("steps are 0..11, and the first computes everything")):
        search_steps(nearness, start, num_steps=12)


def test_a_quality_that_is_no_number_is_refused() -> None:
    """At once, not after the search."""
    with pytest.raises(PlanError, match="not a number"):
        search_steps(lambda _: math.nan, (0, 1), num_steps=4)


def test_image_quality_is_that_of_the_compiled_plan() -> None:
    """Computing every step gives the uncached images; fewer I-steps are further away; progress is reported."""
    which = dit()
    batch = which.args[0].shape[0]
    noise = torch.randn(which.args[0].shape, generator=torch.Generator().manual_seed(3))
    labels = torch.zeros(batch, dtype=torch.int64)
    options = {"clip": False}
    expected = sample(which.model, noise, labels, num_steps=6, clip=False)
    policy = functools.partial(_forecast, which.info)
    model = tcc.compile(which.model, policy((0,)), backend="eager", example_inputs=(which.args, which.kwargs))
    quality = image_quality(model, policy, noise, labels, expected, **options)
    assert quality((0, 1, 2, 3, 4, 5)) > 100 > quality((0, 1, 3)) > quality((0,))
    calls: list[tuple[int, float]] = []
    found = search_steps(quality, (0, 1, 2), num_steps=6, evaluations=5, progress=lambda n, q: calls.append((n, q)))
    assert found.quality >= found.start
    assert calls[-1] == (5, found.quality)


def _forecast(info: tcc.ModelInfo, i_steps: tuple[int, ...]) -> tcc.CachePlan:
    return tcc.plans.forecast(info, num_steps=6, i_steps=i_steps, order=1)
