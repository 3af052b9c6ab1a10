"""Random plans on random tiny models agree with the reference; and the fuzzer finds what is wrong."""

from __future__ import annotations

import pytest

import tcc.program
from tcc.plan import Action, CachePlan, Compute, Hold, Reuse, Update
from tests import fuzz_plans
from tests.fuzz_plans import MODELS, Example

#: What random plans must have exercised for their agreement to mean anything.
EXPECTED = {
    *(f"{kind} {action}" for kind in ("block", "delta", "out") for action in ("compute", "reuse", "skip")),
    *(f"{kind} update {mode}" for kind in ("block", "delta", "out") for mode in ("kept", "current", "cached")),
    *(f"{kind} forecast" for kind in ("block", "delta", "out", "kv")),
    *("kv compute", "kv reuse", "kv update", "stream compute", "stream hold", "out.stream hold"),
    *("skip compute", "skip hold"),
    *("order 1", "order 2", "order 3", "one step", "eight steps", "verified", "not verified"),
    *("several token sets in a step", "merged span", "update without store"),
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
    found |= {{1: "one step", 8: "eight steps"}.get(plan.num_steps, "other")}
    spans = tcc.program.find_spans(plan, info.analysis)
    return found | ({"merged span"} if any(len(span) > 1 for span in spans) else set())


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
        count = 12 if name.startswith("hf_") else 18
        fuzz_plans.run(count, seed=1, names=(name,), done=lambda example: seen.append(features(example)))
    assert len(seen) >= 300
    assert set().union(*seen) >= EXPECTED | set(MODELS)


@pytest.fixture
def _lost_store(monkeypatch: pytest.MonkeyPatch) -> None:
    """A compiler with a defect: the newest value is never stored."""
    live_stores = tcc.program.live_stores
    monkeypatch.setattr(tcc.program, "live_stores", lambda *args: [ages - {0} for ages in live_stores(*args)])


@pytest.mark.usefixtures("_lost_store")
def test_a_defect_of_the_compiler_is_a_mismatch() -> None:
    """A store that is lost shows in the outputs."""
    plan = CachePlan(num_steps=2, actions={(0, "blocks.0.delta"): Compute(), (1, "blocks.0.delta"): Reuse()})
    with pytest.raises(
        AssertionError, match=r"relative error .* at call 1 \(allowed 2e-05\):\nmodel separate, 2 steps"
    ):
        fuzz_plans.check_example(Example("separate", plan, check=True), runs=1)


def test_the_command_shows_the_smallest_plan_that_fails(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """On a mismatch the command prints the seed and a plan without anything that the failure does not need."""

    def holds(example: Example, runs: int = 2, backend: str = "eager") -> tuple[float, int]:
        held = any(isinstance(action, Hold) for action in example.plan.actions.values())
        return (float("inf"), 1) if held else (0.0, 0)

    monkeypatch.setattr(fuzz_plans, "worst_error", holds)
    assert fuzz_plans.main(["--examples", "60", "--seed", "6", "--models", "separate"]) == 1
    text = capsys.readouterr().err
    assert "mismatch with --seed 6" in text
    table = text.split("model separate, 2 steps")[1].split("Failing test case")[0]
    assert table.count(".stream") == table.count("compute | hold") == 1


def test_the_command_counts_what_agreed(capsys: pytest.CaptureFixture[str]) -> None:
    """Without a mismatch the command returns 0 and says how many plans it tried."""
    assert fuzz_plans.main(["--examples", "5", "--round", "3", "--models", "headless"]) == 0
    assert "5 plans agree with the reference (seeds 0..1)" in capsys.readouterr().out
