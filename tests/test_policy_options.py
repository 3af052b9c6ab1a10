"""The numeric options of every policy: whatever is given, there is a plan or one of our errors."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterator, Sequence
from typing import Any, get_args, get_origin

import numpy as np
import pytest
import torch

from tcc.calibrate import Calibration
from tcc.cli.policies import options_of
from tcc.errors import PlanError
from tcc.learned import Importance, Router
from tcc.plan import CachePlan
from tcc.plans import POLICIES, choose_tokens, deepcache, tprr_steps
from tcc.plans.forecast import even_steps
from tcc.plans.tokens import choose_blocks
from tests.tiny_models import case

STEPS, BLOCKS, TOKENS = 4, 2, 16
SITES = tuple(
    f"blocks.{block}.{branch}.{kind}" for block in range(2) for branch in ("attn", "mlp") for kind in ("out", "delta")
)


def errors() -> Calibration:
    """Changes of the same size everywhere, up to three steps back."""
    flat, changes = torch.ones(STEPS, len(SITES)), torch.ones(3, STEPS, len(SITES))
    return Calibration(SITES, flat, flat, changes, changes)


def router(kind: str) -> Router:
    """Reuses everything at every second step."""
    sites = tuple(site for site in SITES if site.endswith(kind))
    scores = torch.full((STEPS, len(sites)), math.nan)
    scores[1::2] = 0.0
    return Router(scores, sites)


def importance() -> Importance:
    """Without ties."""
    return Importance(torch.rand(STEPS, BLOCKS, TOKENS, generator=torch.Generator().manual_seed(0)))


#: What policies need beside the option that is tried; several where an option matters in one mode only.
MODES: dict[str, list[dict[str, Any]]] = {
    "forecast": [{"i_steps": 2}],
    "deepcache": [{}, {"center": 1}],
    "toca": [{}, {"score": "random"}],
    "duca": [{}, {"score": "random"}],
    "l2c": [{"router": router("out")}],
    "learning_to_drop": [{"router": router("delta")}],
    "smoothcache": [{"errors": errors()}],
    "metric": [{"errors": errors()}],
    "tprr": [{}, {"tokens": "random"}],
    "tokencache": [{"importance": importance()}, {"scores": "random", "schedule": "even", "select": "grid"}],
}


#: The options that are flags.
FLAGS = {
    (policy, option.name)
    for policy in POLICIES
    for option in options_of(POLICIES[policy]).values()
    if isinstance(option.default, bool)
}


def numeric(policy: str) -> Iterator[tuple[str, set[type]]]:
    """The options that take numbers, and of which types; `num_steps` first."""
    yield "num_steps", {int}
    for option in options_of(POLICIES[policy]).values():
        kinds = {get_args(kind)[0] if get_origin(kind) is Sequence else kind for kind in option.types}
        if kinds & {int, float}:
            yield option.name, kinds & {int, float}


@pytest.mark.parametrize("policy", POLICIES)
def test_numbers_that_are_none_are_refused(policy: str) -> None:
    """A bool, a fraction of what is whole, NaN and infinity, alone and in a list, with the option's name."""
    for name, kinds in numeric(policy):
        values = [True, math.nan, math.inf, -math.inf, *([1.5] if float not in kinds else [])]
        for value in [*values, *([value] for value in values)]:
            for mode in MODES.get(policy, [{}]):
                with pytest.raises(PlanError, match=name):
                    POLICIES[policy](case("dit").info, **{"num_steps": STEPS, **mode, name: value})


@pytest.mark.parametrize("policy", POLICIES)
def test_any_other_number_gives_a_plan_or_our_error(policy: str) -> None:
    """Negative, zero, a float that is whole, steps and blocks that there are not."""
    for name, kinds in numeric(policy):
        for value in (-1, 0, 3, 2.0, -0.5, [-1], [0, 9], []):
            for mode in MODES.get(policy, [{}]):
                try:
                    plan = POLICIES[policy](case("dit").info, **{"num_steps": STEPS, **mode, name: value})
                except PlanError:
                    continue
                assert isinstance(plan, CachePlan)
                assert float in kinds or not isinstance(value, float), f"{policy}({name}={value}) is no whole number"


@pytest.mark.parametrize("policy", POLICIES)
def test_numbers_of_numpy_are_numbers(policy: str) -> None:
    """The plan is the same, and its file records the options."""
    for mode in MODES.get(policy, [{}]):
        given = {
            "num_steps": STEPS,
            "seed": 1,
            "blocks": [0, 1],
            "i_steps": [0, 2],
            "share": 0.5,
            "k1": 2,
            "keep": 0.25,
        }
        known = {"num_steps", *options_of(POLICIES[policy])}
        options = {name: value for name, value in given.items() if name in known and (policy, name) not in FLAGS}
        plain = POLICIES[policy](case("dit").info, **(mode | options))
        numbers = {name: np.asarray(value)[()] for name, value in options.items()}
        found = POLICIES[policy](case("dit").info, **(mode | numbers))
        assert found.actions == plain.actions
        assert json.dumps(dict(found.policy)) == json.dumps(dict(plain.policy))
        assert type(found.num_steps) is int


def test_schedules_of_numpy_numbers_are_of_pythons() -> None:
    """They go into JSON."""
    two = np.int64(2)
    for steps in (tprr_steps(6, two, two, 0.5), even_steps(6, two), choose_blocks(case("dit").info, np.arange(2))):
        assert {type(step) for step in steps} == {int}


@pytest.mark.parametrize(("policy", "flag"), sorted(FLAGS))
@pytest.mark.parametrize("value", ["false", "no", 0, None])
def test_flags_are_true_or_false(policy: str, flag: str, value: Any) -> None:
    """Words are not: every one but the empty one would count as true."""
    for mode in MODES.get(policy, [{}]):
        with pytest.raises(PlanError, match=re.escape(f"{flag}={value!r}: expected True or False")):
            POLICIES[policy](case("dit").info, **{"num_steps": STEPS, **mode, flag: value})


@pytest.mark.parametrize(
    ("policy", "options", "message"),
    [
        ("tprr", {"cycle": "foo"}, "cycle='foo': use one of p_steps, length"),
        ("tokencache", {"scores": "random", "cycle": "foo"}, "cycle='foo': use one of p_steps, length"),
        ("l2c", {"router": None}, "router=None: give a Router, or its file"),
        ("learning_to_drop", {"router": importance()}, "give a Router, or its file"),
        ("metric", {"errors": None}, "errors=None: give a Calibration, or its file"),
        ("smoothcache", {"errors": 5}, "errors=5: give a Calibration, or its file"),
        ("smoothcache", {"schedule": 5}, "schedule=5: give a JSON file"),
        ("random_drop", {"seed": -1}, "seed=-1: expected a whole number, 0 or more"),
        ("random_units", {"seed": -1}, "seed=-1: expected a whole number, 0 or more"),
        ("toca", {"score": "random", "seed": -1}, "seed=-1: expected a whole number, 0 or more"),
        ("tokencache", {"scores": "random", "seed": -1}, "seed=-1: expected a whole number, 0 or more"),
        ("toca", {"step_slope": math.nan}, "step_slope=nan: expected a number, finite"),
        ("toca", {"mlp": math.inf}, "mlp=inf: expected a number, 0 or more"),
        ("faster_diffusion", {"key_steps": -2}, "key_steps=-2: expected a whole number, 1 or more"),
        ("delta_dit", {"interval": 2.5}, "interval=2.5: expected a whole number, 1 or more"),
        ("forecast", {"i_steps": True}, "i_steps=True: expected a whole number, 1..4"),
        ("deepcache", {"interval": 1.5}, "interval=1.5: expected a whole number, 1 or more"),
        (
            "tokencache",
            {"scores": "random", "schedule": "even", "i_steps": 2.0},
            "i_steps=2.0: expected a whole number",
        ),
        ("tokencache", {"scores": "random", "pruned": 1.0}, "pruned=1.0: expected a whole number, 1..2"),
        ("tokencache", {"scores": "random", "num_steps": -1}, "num_steps=-1: expected a whole number, 1 or more"),
    ],
)
def test_what_is_said(policy: str, options: dict[str, Any], message: str) -> None:
    """The option, its value, and what it may be."""
    with pytest.raises(PlanError, match=re.escape(message)):
        POLICIES[policy](case("dit").info, **{"num_steps": STEPS, **options})


def test_an_exponent_that_would_be_lowered_for_ever_is_refused() -> None:
    """The search lowers it by 0.02."""
    with pytest.raises(PlanError, match=re.escape("power=1e+300: expected a number, 1..10")):
        deepcache(case("dit").info, num_steps=STEPS, center=1, power=1e300)


@pytest.mark.parametrize("option", [{"seed": -1}, {"turn": -1}, {"cell": 1.5}, {"keep": True}], ids=str)
def test_token_choices_check_their_options(option: dict[str, Any]) -> None:
    """Also where the choice does not use them."""
    with pytest.raises(PlanError, match=next(iter(option))):
        choose_tokens(case("dit").info, **{"keep": 0.5, "tokens": "uniform", **option})
