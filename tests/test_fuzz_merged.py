"""Random plans whose neighbours are treated alike, so that they share slots: chance alone rarely draws them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import hypothesis.strategies as st
import torch

from tcc.passes.sites import Site
from tcc.plan import Action, CachePlan, Compute, Reuse, Skip, Update
from tcc.program.liveness import find_spans
from tests import fuzz_plans
from tests.fuzz_plans import DITS, Example
from tests.odd_styles import ODD

MODELS = (
    *(f"dit{number}" for number in range(1, len(DITS))),
    *("separate", "parallel", "long_skip", "conv", "uvit", "hf_pixart", "joint", "rotary"),
    *(name for name, odd in ODD.items() if not odd.reason),
)


@st.composite
def merged(draw: Callable[[Any], Any], name: str) -> Example:
    """A plan for the model: all branches, or blocks, do the same, or each updates some of the last one's tokens."""
    info = fuzz_plans.model(name).info
    kinds = sorted({site.kind for site in info.sites.values() if site.prunable} & {"delta", "block"})
    kind = draw(st.sampled_from(kinds or ["delta"]))
    sites = [site for site in info.sites.values() if site.kind == kind]
    order = draw(st.permutations(range(info.num_tokens)))
    sizes = sorted(draw(st.lists(st.integers(1, len(order)), min_size=3, max_size=3)), reverse=True)
    tokens = {f"T{i}": torch.tensor(sorted(order[:size])) for i, size in enumerate(sizes)}
    narrows = draw(st.booleans())
    numbers = [draw(st.integers(0, 2)) for _ in sites]
    numbers = sorted(numbers) if narrows else numbers[:1] * len(sites)
    words = st.sampled_from(["update"] if narrows else ["update", "update", "reuse", "skip"])
    store = draw(st.booleans())
    actions: dict[tuple[int, str], Action] = {}
    for step in range(draw(st.integers(2, 6))):
        word = "compute" if step == 0 or draw(st.integers(0, 3)) == 0 else draw(words)
        actions |= {
            (step, site.name): _action(site, word, number, store) for site, number in zip(sites, numbers, strict=True)
        }
    return Example(
        name, CachePlan(step + 1, actions, tokens), check=draw(st.integers(0, 3)) == 3, folded=draw(st.booleans())
    )


def _action(site: Site, word: str, number: int, store: bool) -> Action:
    """What the word says, where the site can do it."""
    if word == "update" and site.prunable:
        return Update(f"T{number}", store=store)
    return {"compute": Compute(), "skip": Skip()}.get(word, Reuse())


def test_plans_whose_neighbours_share_slots_agree_with_the_reference() -> None:
    """Sums of what neighbours add, kept for the tokens that none of them updates."""
    seen: dict[str, set[str]] = {}

    def check(example: Example) -> None:
        fuzz_plans.check_example(example)
        analysis = fuzz_plans.model(example.model).info.analysis
        for span in find_spans(example.plan, analysis):
            columns = {tuple(a for _, a in example.plan.column(site.name)) for site in span}
            updates = any(isinstance(action, Update) for column in columns for action in column)
            word = "narrows" if len(columns) > 1 else "updates" if updates else "reuses"
            seen.setdefault(example.model, set()).update({word} if len(span) > 1 else ())

    for name in MODELS:
        fuzz_plans.draw(4, 3, merged(name), check)
    assert sum("updates" in words for words in seen.values()) > 20
    assert sum("narrows" in words for words in seen.values()) > 10
