"""Random plans on random tiny models agree with the reference; and the fuzzer finds what is wrong."""

from __future__ import annotations

import re

import pytest
import torch

from tcc.plan import Action, CachePlan, Compute, Hold, Reuse, TopK, Update
from tcc.plan.scores import Norm, Probe
from tcc.program import step_kinds
from tcc.program.liveness import find_spans
from tests import fuzz_plans
from tests.fuzz_plans import JOINT, MODELS, ODD, Example

#: What random plans must have exercised for their agreement to mean anything.
EXPECTED = {
    *(f"{kind} {action}" for kind in ("block", "delta", "out") for action in ("compute", "reuse", "skip")),
    *(f"{kind} update {mode}" for kind in ("block", "delta", "out") for mode in ("kept", "current", "cached")),
    *(f"{kind} forecast" for kind in ("block", "delta", "out", "kv")),
    *("kv compute", "kv reuse", "kv update", "stream compute", "stream hold", "out.stream hold"),
    *("skip compute", "skip hold"),
    *("order 1", "order 2", "order 3", "one step", "eight steps", "verified", "not verified"),
    *("several token sets in a step", "merged span", "update without store"),
    *("chosen by fixed", "chosen by norm", "chosen by attended", "chosen by stale", "chosen by probe"),
    *("chosen once for the batch", "chosen with a bonus", "chosen in cells", "chosen by a held or stored value"),
    *(f"dynamic {mode}" for mode in ("kept", "current", "cached")),
    *("several dynamic sets in a step", "folded"),
}


def features(example: Example) -> set[str]:
    """What an example exercises, in the words of `EXPECTED`, and its model."""
    plan, info = example.plan, fuzz_plans.model(example.model).info
    found = {example.model, "verified" if example.check else "not verified"}
    for step in range(plan.num_steps):
        updates = {a.tokens for a in plan.at(step).values() if isinstance(a, Update)}
        found |= {"update without store" for a in plan.at(step).values() if isinstance(a, Update) and not a.store}
        found |= {"several token sets in a step"} if len(updates) > 1 else set()
        found |= {f"{info.sites[name].kind} {word(info.sites[name].kind, a)}" for name, a in plan.at(step).items()}
        found |= {f"out.stream {word('stream', a)}" for name, a in plan.at(step).items() if name == "out.stream"}
    found |= {f"order {a.order}" for a in plan.actions.values() if isinstance(a, Reuse)}
    found |= {"folded"} if example.folded else set()
    found |= {{1: "one step", 8: "eight steps"}.get(plan.num_steps, "other")}
    found |= {feature for step in range(plan.num_steps) for feature in choices(plan, step)}
    spans = find_spans(plan, info.analysis)
    return found | ({"merged span"} if any(len(span) > 1 for span in spans) else set())


def choices(plan: CachePlan, step: int) -> set[str]:
    """What the dynamic sets of a step are chosen by."""
    updates = [a for a in plan.at(step).values() if isinstance(a, Update) and isinstance(a.tokens, TopK)]
    found = {f"dynamic {a.attention}" for a in updates}
    sets = {a.tokens for a in updates if isinstance(a.tokens, TopK)}
    found |= {"several dynamic sets in a step"} if len(sets) > 1 else set()
    for score in (plan.score_of(tokens) for tokens in sets):
        found |= {f"chosen by {type(term).__name__.lower()}" for _, term in score.terms}
        read = {term.site for _, term in score.terms if isinstance(term, (Norm, Probe))}
        stored = any(isinstance(plan.action(step, site), (Update, Reuse, Hold)) for site in read)
        found |= {"chosen by a held or stored value"} if stored else set()
        found |= {"chosen once for the batch"} if score.shared else set()
        found |= {"chosen with a bonus"} if score.bonus else set()
        found |= {"chosen in cells"} if score.per_cell else set()
    return found


def word(kind: str, action: Action) -> str:
    """One action in a few words."""
    if isinstance(action, Update):
        return "update" if kind == "kv" else f"update {action.attention}"
    if isinstance(action, Reuse) and action.order:
        return "forecast"
    return type(action).__name__.lower()


def test_random_plans_agree_with_the_reference() -> None:
    """Compiled plans give what the definitions give, on every model, and use every action, mode and level."""
    seen: list[set[str]] = []
    for name in MODELS:
        count = 8 if name in JOINT else 12 if name.startswith("hf_") or name in ODD else 18
        fuzz_plans.run(count, seed=1, names=(name,), done=lambda example: seen.append(features(example)))
    assert len(seen) >= 300
    assert not (EXPECTED | set(MODELS)) - set().union(*seen)


@pytest.mark.parametrize("text", [Compute(), Reuse()], ids=["compute", "reuse"])
@pytest.mark.parametrize("image", [Update("kept"), Reuse()], ids=["update", "reuse"])
def test_streams_of_a_joint_block_do_different_things(image: Action, text: Action) -> None:
    """Image and text share one attention, and each its own action; chance alone rarely draws all of them."""
    here, beside = "pairs.0.attn.out", "pairs.0.attn.out@text"
    actions = {(0, here): Compute(), (0, beside): Compute(), (1, here): image, (1, beside): text}
    first, _ = fuzz_plans.model("joint").info.image_tokens
    tokens = {"kept": torch.tensor([first + 1, first + 4])} if isinstance(image, Update) else {}
    fuzz_plans.check_example(
        Example("joint", CachePlan(num_steps=2, actions=actions, tokens=tokens), check=True), runs=2
    )


@pytest.fixture
def _lost_store(monkeypatch: pytest.MonkeyPatch) -> None:
    """A compiler with a defect: the newest value is never stored."""
    live_stores = step_kinds.live_stores
    monkeypatch.setattr(step_kinds, "live_stores", lambda *args: [ages - {0} for ages in live_stores(*args)])


@pytest.mark.usefixtures("_lost_store")
def test_a_defect_of_the_compiler_is_a_mismatch() -> None:
    """A store that is lost shows in the outputs."""
    plan = CachePlan(num_steps=2, actions={(0, "blocks.0.delta"): Compute(), (1, "blocks.0.delta"): Reuse()})
    with pytest.raises(
        AssertionError, match=r"relative error .* at call 1 \(allowed 2e-05\):\nmodel separate, 2 steps"
    ):
        fuzz_plans.check_example(Example("separate", plan, check=True), runs=1)


def test_the_command_shows_a_plan_that_fails(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """On a mismatch the command prints the seed and a plan that Hypothesis has shrunk."""

    def holds(example: Example, *_: object) -> tuple[float, int]:
        held = any(isinstance(action, Hold) for action in example.plan.actions.values())
        return (float("inf"), 1) if held else (0.0, 0)

    monkeypatch.setattr(fuzz_plans, "worst_error", holds)
    assert fuzz_plans.main(["--examples", "60", "--seed", "5", "--models", "separate"]) == 1
    text = capsys.readouterr().err
    assert "mismatch with --seed 5" in text
    found = re.search(r"model separate, \d steps(.*?)Failing test case", text, re.DOTALL)
    assert found is not None
    assert "| hold" in found[1]  # how far shrinking gets differs: Hypothesis draws constants from loaded modules


def test_the_command_counts_what_agreed(capsys: pytest.CaptureFixture[str]) -> None:
    """Without a mismatch the command returns 0 and says how many plans it tried."""
    assert fuzz_plans.main(["--examples", "5", "--round", "3", "--models", "headless"]) == 0
    assert "5 plans agree with the reference (seeds 0..1)" in capsys.readouterr().out
