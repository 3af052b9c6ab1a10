"""Attention over image and text: image tokens are pruned to the last MAC while the text is computed whole."""

from __future__ import annotations

import functools

import pytest

from tests.joint_styles import IMAGE, JOINT, costs
from tests.test_block_styles import CHOSEN, KEPT, UPDATES, every_update, run
from tests.tiny_models import Case


@functools.cache
def joined(name: str) -> Case:
    """The case of that name, captured once."""
    return JOINT[name]()


@pytest.mark.parametrize("name", JOINT)
def test_image_tokens_are_pruned_while_the_text_is_whole(name: str) -> None:
    """Queries, keys and values of dropped image tokens are not computed; those of the text are.

    So too where every sample chooses tokens of its own, but for one sequence, whose tokens are the text's too.
    """
    which = joined(name)
    assert which.info.macs * 2 == costs("current", IMAGE)
    sets = ("some",) if name == "one sequence" else ("some", CHOSEN)
    macs = run(which, every_update(which.info, sets))
    assert macs[1 : 3 * len(sets) + 1] == [costs(mode, len(KEPT)) for mode, tokens in UPDATES if tokens in sets]
