"""Attention over image and text: image tokens are pruned to the last MAC while the text is computed whole."""

from __future__ import annotations

import functools

import pytest

from tcc.plan import Attention, TopK
from tests.joint_styles import IMAGE, JOINT, costs
from tests.test_block_styles import ATTENTION, KEPT, mixed_plan, run
from tests.tiny_models import Case


@functools.cache
def joined(name: str) -> Case:
    """The case of that name, captured once."""
    return JOINT[name]()


@pytest.mark.parametrize("attention", ATTENTION)
@pytest.mark.parametrize("name", JOINT)
def test_image_tokens_are_pruned_while_the_text_is_whole(name: str, attention: Attention) -> None:
    """Queries, keys and values of dropped image tokens are not computed; those of the text are."""
    which = joined(name)
    assert which.info.macs * 2 == costs("current", IMAGE)
    assert run(which, mixed_plan(which.info, attention), 7)[1] == costs(attention, len(KEPT))


@pytest.mark.parametrize("attention", ATTENTION)
@pytest.mark.parametrize("name", [name for name in JOINT if name != "one sequence"])
def test_samples_choose_image_tokens_of_their_own(name: str, attention: Attention) -> None:
    """A dynamic set costs what a static one of its size does."""
    which = joined(name)
    plan = mixed_plan(which.info, attention, TopK("s", len(KEPT)))
    assert run(which, plan, 4)[1] == costs(attention, len(KEPT))
