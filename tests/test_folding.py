"""Runs whose timesteps are known: what depends on them and on conditions alone is computed once per run."""

from __future__ import annotations

import functools
from typing import Any

import pytest
import torch

import tcc
from tcc.errors import CallError, PlanError
from tcc.passes.macs import count
from tcc.plan import CachePlan, Compute, Reuse
from tcc.runtime import folding
from tcc.runtime.folding import find_folding
from tcc.timing import allocations
from tests.running import CLOSE
from tests.tiny_models import Case, case, relative_error, tensor_of

TIMESTEPS = [900, 600, 300, 100]


def inputs(which: Case, step: int) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """A call at that step: another sample and timestep, the same conditions."""
    args, kwargs = which.inputs(step)
    tensors = which.info.captured.flatten(args, kwargs)
    names = [spec.name for spec in which.info.captured.inputs]
    level = which.info.captured.noise_level
    assert level is not None
    now = torch.full_like(tensors[level], TIMESTEPS[step])
    if names[level] in kwargs:
        return args, {**which.kwargs, names[level]: now}
    return (args[0], now, *which.args[2:]), dict(which.kwargs)


def plans(which: Case) -> dict[str, CachePlan]:
    """One plan of each sort."""
    info, steps = which.info, len(TIMESTEPS)
    return {
        "full": tcc.plans.full(info, num_steps=steps),
        "branches": tcc.plans.fora(info, num_steps=steps, interval=2),
        "tokens": tcc.plans.tprr(info, num_steps=steps, k1=1, k2=1, keep=0.5, tokens="uniform"),
    }


def compiled(which: Case, plan: CachePlan, **options: Any) -> tcc.CompiledModel:
    """Under `plan`, with the timesteps unless others are given."""
    given = {"timesteps": TIMESTEPS, "backend": "eager"} | options
    return tcc.compile(which.model, plan, example_inputs=(which.args, which.kwargs), **given)


@pytest.mark.parametrize(
    ("name", "kind"),
    [("dit", "full"), ("dit", "branches"), ("hf_dit", "tokens"), ("hf_pixart", "branches"), ("hf_pixart", "tokens"),
     ("hf_wan", "full"), ("hf_wan", "branches")],
)  # fmt: skip
def test_it_computes_what_the_reference_does(name: str, kind: str) -> None:
    """Over two runs."""
    which = case(name)
    plan = plans(which)[kind]
    model, reference = compiled(which, plan), tcc.Reference(which.model, plan, which.info)
    for _ in range(2):
        for step in range(plan.num_steps):
            args, kwargs = inputs(which, step)
            got, wanted = tensor_of(model(*args, **kwargs)), tensor_of(reference(*args, **kwargs))
            assert relative_error(got, wanted) <= CLOSE
    assert model.session.folded_bytes > 0


@pytest.mark.parametrize(("name", "folded"), [("dit", 5), ("hf_dit", 9), ("hf_pixart", 9), ("hf_wan", 9)])
def test_modulations_and_keys_of_prompts_are_computed_once(name: str, folded: int) -> None:
    """The products that are no longer in the steps are as many as those that are computed apart."""
    which = case(name)
    info, plan = which.info, tcc.plans.full(which.info, num_steps=len(TIMESTEPS))
    found = find_folding(info.captured, info.analysis, plan, TIMESTEPS)
    assert found is not None
    graphs: list[torch.fx.GraphModule] = []

    def keep(gm: torch.fx.GraphModule, _: list[torch.Tensor]) -> Any:
        graphs.append(gm)
        return gm.forward

    compiled(which, plan, backend=keep)
    assert info.macs * info.batch - count(graphs[0].graph.nodes) == count(found.gm.graph.nodes) > 0
    products = [node for node in found.gm.graph.nodes if node.target is torch.ops.aten.linear.default]
    assert len(products) == folded


def test_what_is_computed_once_counts_in_the_budget() -> None:
    """It is known before a run, and what a session keeps; one byte less is refused with both amounts."""
    which = case("dit")
    plan = plans(which)["branches"]
    slots = plan.memory(which.info).total
    session = compiled(which, plan).new_session()
    needed = slots + session.folded_bytes
    found = find_folding(which.info.captured, which.info.analysis, plan, TIMESTEPS)
    assert found is not None
    assert (session.slot_bytes, session.folded_bytes) == (slots, found.bytes)

    compiled(which, plan, max_slot_bytes=needed)
    with pytest.raises(PlanError, match=r"slots take .* and what timesteps= computes once per run .* allows"):
        compiled(which, plan, max_slot_bytes=needed - 1)
    compiled(which, plan, max_slot_bytes=needed - 1, timesteps=None)


def test_a_budget_has_finer_variants_made_beside_what_is_computed_once() -> None:
    """Delta-DiT needs half of the slots with one variant more; the budget for slots is what folding leaves."""
    which = case("dit")
    plan = tcc.plans.delta_dit(which.info, num_steps=4)
    coarse = compiled(which, plan).new_session()
    allowed = coarse.slot_bytes + coarse.folded_bytes - 1
    fine = compiled(which, plan, max_slot_bytes=allowed).new_session()
    assert fine.slot_bytes < coarse.slot_bytes
    assert fine.slot_bytes + fine.folded_bytes <= allowed
    with pytest.raises(PlanError, match=r"slots take .* and max_slot_bytes allows .*\. The largest: "):
        compiled(which, plan, max_slot_bytes=fine.slot_bytes - 1)


def test_computing_once_takes_no_more_memory_than_a_step() -> None:
    """The values of 50 steps are more than twice what a step takes: they are computed a few steps at a time."""
    which, steps = case("dit"), 50
    args, kwargs = inputs(which, 0)
    plan = tcc.plans.fora(which.info, num_steps=steps, interval=2)
    session = compiled(which, plan, timesteps=[TIMESTEPS[0]] * steps).new_session()
    for _ in range(steps):
        session(*args, **kwargs)
    first, *others = (allocations(lambda: session(*args, **kwargs)).peak for _ in range(steps))
    kept = session.slot_bytes + session.folded_bytes
    assert session.folded_bytes > 2 * max(others)
    assert first + kept <= 1.05 * (max(others) + kept)


def test_what_a_plan_keeps_is_left_to_it() -> None:
    """A site among the conditions is stored and reused, as the plan says."""
    which = case("hf_pixart")
    plan = CachePlan(4, {(s, "transformer_blocks.0.cross.out"): Reuse() if s else Compute() for s in range(4)})
    model, reference = compiled(which, plan), tcc.Reference(which.model, plan, which.info)
    for step in range(4):
        args, kwargs = inputs(which, step)
        assert relative_error(tensor_of(model(*args, **kwargs)), tensor_of(reference(*args, **kwargs))) <= CLOSE


def test_other_timesteps_are_refused() -> None:
    """Nothing is computed at a step that it was not compiled for, and the run can go on."""
    which = case("dit")
    model = compiled(which, plans(which)["branches"])
    (x, t, y), _ = inputs(which, 0)
    with pytest.raises(CallError, match=r"noise level 't' is 901 at step 0, where timesteps=900"):
        model(x, t + 1, y)
    first = model(x, t, y)
    (x, t, y), _ = inputs(which, 1)
    with pytest.raises(CallError, match=r"is 599 at step 1, where timesteps=600 was compiled in: give tcc\.compile"):
        model(x, t - 1, y)
    assert model(x, t, y).shape == first.shape


def test_conditions_that_change_within_a_run_are_refused() -> None:
    """In another tensor or written in place; a new run may have others."""
    which = case("dit")
    model = compiled(which, plans(which)["branches"])
    calls = [inputs(which, step)[0] for step in range(2)]
    labels = torch.tensor([1, 2])
    model(*calls[0][:2], labels)
    with pytest.raises(CallError, match=r"input 'y' changed within the run.*or compile without timesteps"):
        model(*calls[1][:2], labels + 1)
    labels[0] = 5
    with pytest.raises(CallError, match="input 'y' changed within the run"):
        model(*calls[1][:2], labels)
    model(*calls[1][:2], torch.tensor([1, 2]))
    model.reset()
    model(*calls[0][:2], labels)


def test_a_refused_first_call_leaves_the_run_in_progress() -> None:
    """With the conditions that it began with, and what was computed of them."""
    which = case("dit")
    plan = plans(which)["branches"]
    session = compiled(which, plan).new_session()
    first, *later = [inputs(which, step)[0] for step in range(plan.num_steps)]
    expected = [session(*args) for args in (first, *later)]
    assert torch.equal(session(*first), expected[0])
    with pytest.raises(CallError, match="noise level 't' is 901 at step 0"):
        session.run_step(0, first[0], torch.full_like(first[1], 901), first[2] + 1)
    with pytest.raises(CallError, match="input 'y' changed within the run"):
        session(*later[0][:2], later[0][2] + 1)
    for args, wanted in zip(later, expected[1:], strict=True):
        assert torch.equal(session(*args), wanted)


def test_an_output_that_is_computed_once_is_the_callers() -> None:
    """Another run computes it anew, and whoever writes to it writes to nothing else."""

    class Embedded(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.dit, self.embed = case("dit").model, torch.nn.Linear(3, 5)

        def forward(
            self, x: torch.Tensor, t: torch.Tensor, y: torch.Tensor, prompt: torch.Tensor
        ) -> tuple[torch.Tensor, torch.Tensor]:
            return self.dit(x, t, y), self.embed(prompt)

    (x, _, y), model, levels = case("dit").args, Embedded().eval(), [torch.full((2,), t) for t in TIMESTEPS]
    prompts = [torch.randn(2, 3, generator=torch.Generator().manual_seed(seed)) for seed in range(2)]
    policy = functools.partial(tcc.plans.fora, num_steps=4, interval=2)
    made = tcc.compile(
        model, policy, example_inputs=((x, levels[0], y, prompts[0]), {}), timesteps=TIMESTEPS, backend="eager"
    )
    for prompt in prompts:
        found = [made(x, level, y, prompt)[1] for level in levels]
        for output in found:
            torch.testing.assert_close(output, model.embed(prompt))
            output.zero_()


@pytest.mark.parametrize("past_torch", [False, True])
def test_conditions_that_change_in_mid_run_are_seen_however_they_are_written(past_torch: bool) -> None:
    """Through `.data`, or another library's view of the memory, which count as no change to PyTorch."""
    which = case("dit")
    session = compiled(which, plans(which)["branches"]).new_session()
    x, t, y = inputs(which, 0)[0]
    y = y.clone()
    session(x, t, y)
    if past_torch:
        y.numpy()[:] = 1 - y.numpy()
    else:
        y.data.copy_(1 - y)
    x, t, _ = inputs(which, 1)[0]
    with pytest.raises(CallError, match="input 'y' changed within the run"):
        session(x, t, y)


def test_where_reading_would_wait_the_last_step_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    """On a device the differences of a run are collected, and read once."""
    monkeypatch.setattr(folding, "is_readable", lambda tensor: False)
    which = case("dit")
    session = compiled(which, plans(which)["branches"]).new_session()
    calls = [inputs(which, step)[0] for step in range(4)]
    for change, message in (("t", "noise level 't' is another at step 3 or before"), ("y", "input 'y' changed")):
        session.reset()
        for step, (x, t, y) in enumerate(calls[:3]):
            session(x, t - 7 * (change == "t" and step == 1), y + (change == "y" and step == 2))
        with pytest.raises(CallError, match=message):
            session(*calls[3])
    session.reset()
    for call_ in calls:
        session(*call_)
    assert session.step == 0


def test_a_run_that_begins_later_reads_the_rows_of_its_steps() -> None:
    """Image to image: the first steps are left out, and the timesteps stay those of the plan."""
    which = case("dit")
    model, plain = compiled(which, plans(which)["full"]), which.model
    model.reset(start_step=2)
    for step in (2, 3):
        args, _ = inputs(which, step)
        with torch.no_grad():
            assert relative_error(model(*args), plain(*args)) <= CLOSE


@pytest.mark.parametrize(
    ("timesteps", "message"),
    [
        ([900, 600], r"timesteps: \[2\] numbers were given, but the plan has 4 steps"),
        ([900.5, 600.0, 300.0, 100.0], r"timesteps: not all are torch.int64, which the model's 't'"),
    ],
)
def test_timesteps_that_do_not_fit_are_refused(timesteps: list[float], message: str) -> None:
    """When the model is compiled."""
    which = case("dit")
    with pytest.raises(PlanError, match=message):
        compiled(which, plans(which)["full"], timesteps=timesteps)


def test_a_model_without_a_noise_level_is_refused() -> None:
    """Nothing says which values depend on it."""
    which = case("separate")
    with pytest.raises(PlanError, match="no noise level was found among the inputs; name it"):
        compiled(which, tcc.plans.full(which.info, num_steps=4))
