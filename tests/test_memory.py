"""The slots of a plan: known before it runs, equal to what sessions and bundles hold, shared where lifetimes allow."""

from __future__ import annotations

import functools
import itertools
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import given, settings

import tcc
from tcc.errors import PlanError
from tcc.passes.pipeline import Rewrites
from tcc.plan import Action, CachePlan, Compute, Reuse, Update
from tcc.program import SlotSpec, build_program
from tcc.program.memory import share_buffers, steps_in_use
from tcc.timing import allocations
from tests import running
from tests.running import hold_plan
from tests.tiny_models import Case, case, dit, relative_error, tensor_of

R, C = Reuse(), Compute()
DELTA = 2 * 16 * 32 * 4  # bytes of `[2, 16, 32]` in float32


def plan_of(letters: Mapping[str, str], num_steps: int) -> CachePlan:
    """A plan from `{site: letters}`: C computes, R reuses, F forecasts, U updates the even tokens."""
    looks: dict[str, Action] = {"C": C, "R": R, "F": Reuse(1, (2.0, -1.0)), "U": Update("even")}
    actions = {(step, site): looks[letter] for site, column in letters.items() for step, letter in enumerate(column)}
    return CachePlan(num_steps, actions, {"even": torch.arange(0, 16, 2)})


PHASES = {"blocks.0.attn.delta": "CRRCCC", "blocks.1.mlp.delta": "CCCCRR"}
PLANS: dict[str, tuple[dict[str, str], int]] = {
    "two sites at other steps": (PHASES, DELTA),
    "two sites at the same steps": ({"blocks.0.attn.delta": "CRR", "blocks.1.mlp.delta": "CRR"}, 2 * DELTA),
    "a read where the other is written": ({"blocks.0.attn.delta": "CRRCC", "blocks.1.mlp.delta": "CCCRR"}, 2 * DELTA),
    "in turns": ({"blocks.0.attn.delta": "CRCCCRCC", "blocks.1.mlp.delta": "CCCRCCCR"}, 2 * DELTA),
    "a history": ({"blocks.0.attn.delta": "CCFCCC", "blocks.1.mlp.delta": "CCCCRR"}, 2 * DELTA),
    "an update": ({"blocks.0.attn.delta": "CUUCCC", "blocks.1.mlp.delta": "CCCCUU"}, DELTA),
}


@pytest.mark.parametrize("kind", PLANS)
def test_what_is_known_before_is_what_a_session_allocates(kind: str) -> None:
    """The bytes of the plan are those of the session's distinct buffers; the outputs are the reference's."""
    letters, expected = PLANS[kind]
    which, plan = case("dit"), plan_of(letters, len(next(iter(letters.values()))))
    found, inputs = plan.memory(which.info, expected), (which.args, which.kwargs)
    compiled = tcc.compile(which.model, plan, example_inputs=inputs, backend="eager", max_slot_bytes=expected)
    session = compiled.new_session()
    assert found.total == session.slot_bytes == expected
    assert found.peak <= found.total <= sum(slot.bytes for slot in found.slots)
    reference = tcc.Reference(which.model, plan, which.info)
    for step in [*range(plan.num_steps)] * 2:  # twice: buffers hold what the run before left there
        args, kwargs = which.inputs(step)
        assert relative_error(tensor_of(session(*args, **kwargs)), tensor_of(reference(*args, **kwargs))) < 1e-5


def test_the_table_names_every_slot_once() -> None:
    """Names, live steps and shared buffers."""
    found = plan_of(PHASES, 6).memory(case("dit").info, DELTA)
    assert [(s.name, s.steps, s.buffer) for s in found.slots] == [
        ("blocks.0.attn.delta", (0, 1, 2), "blocks.0.attn.delta"),
        ("blocks.1.mlp.delta", (3, 4, 5), "blocks.0.attn.delta"),
    ]
    cells = [list(column.cells) for column in found.table().columns]
    assert cells[0] == ["blocks.0.attn.delta", "blocks.1.mlp.delta"]
    assert cells[4:] == [["0-2", "3-5"], ["own", "blocks.0.attn.delta"]]


def test_tables_are_printed_as_text(capsys: pytest.CaptureFixture[str]) -> None:
    """As the README prints them."""
    info = case("dit").info
    print(info.table())  # noqa: T201 - what users do
    print(plan_of(PHASES, 6).memory(info).table())  # noqa: T201 - likewise
    lines = [line.split() for line in capsys.readouterr().out.splitlines()]
    assert any(line[:1] == ["2"] and line[1:2] == ["blocks,"] for line in lines)
    assert any("blocks.1.mlp.delta" in line and "3-5" in line for line in lines)
    assert all("Table" not in word for line in lines for word in line)


def test_plans_share_variants_under_other_names() -> None:
    """A variant whose slot has another name in the next plan is not taken for that one."""
    which = case("dit")
    first = tcc.compile(which.model, plan_of(PHASES, 6), example_inputs=(which.args, which.kwargs), backend="eager")
    apart = plan_of({"blocks.0.attn.delta": "CRRCRR", "blocks.1.mlp.delta": "CCCCRR"}, 6)
    both = plan_of({"blocks.0.attn.delta": "CRRCCR", "blocks.1.mlp.delta": "CCCCRR"}, 6)
    for plan in (both, apart, plan_of(PHASES, 6)):
        session = first.with_plan(plan).prepare(*which.args, **which.kwargs).new_session()
        reference = tcc.Reference(which.model, plan, which.info)
        for step in range(plan.num_steps):
            args, kwargs = which.inputs(step)
            assert relative_error(tensor_of(session(*args, **kwargs)), tensor_of(reference(*args, **kwargs))) < 1e-5


@settings(deadline=None, max_examples=200)
@given(st.dictionaries(st.sampled_from("abcdefgh"), st.integers(1, 2**12 - 1)), st.data())
def test_no_two_slots_of_a_buffer_are_needed_at_one_step(used: dict[str, int], data: st.DataObject) -> None:
    """And they are alike in shape and dtype; the slot that names a buffer lives in it."""
    shapes, dtypes = st.sampled_from([(2,), (3,)]), st.sampled_from([torch.float32, torch.float16])
    slots = [SlotSpec(name, data.draw(shapes), data.draw(dtypes), torch.device("cpu")) for name in used]
    named = {slot.name: slot for slot in slots}
    chosen = share_buffers(slots, used)
    assert chosen.keys() == used.keys()
    for a, b in itertools.combinations(used, 2):
        if chosen[a] == chosen[b]:
            assert not used[a] & used[b]
            assert (named[a].shape, named[a].dtype) == (named[b].shape, named[b].dtype)
    assert all(chosen[owner] == owner for owner in chosen.values())


def test_a_store_that_nobody_reads_keeps_its_buffer() -> None:
    """Steps that share a variant store the same, whether or not it is read: nothing else may be there then."""
    info = case("dit").info
    program = build_program(info.captured, info.analysis, plan_of({"blocks.0.attn.delta": "CRCRCC"}, 6), check=False)
    (used,) = steps_in_use(program.variants, program.bindings).values()
    assert used == 0b111111  # the last two steps run the variant of steps 0 and 2


@pytest.mark.parametrize("kind", PLANS)
def test_without_sharing_variants_are_the_same_but_for_names(kind: str) -> None:
    """Every slot keeps its own buffer and its name; nothing else about the graphs changes."""
    info, (letters, _) = case("dit").info, PLANS[kind]
    plan = plan_of(letters, len(next(iter(letters.values()))))
    shared, apart = (
        build_program(
            info.captured,
            info.analysis,
            plan,
            check=False,
            rewrites=Rewrites(share_buffers=share, share_variants=False),  # else nothing is shared here
        )
        for share in (True, False)
    )
    assert all(slot.buffer == slot.name for slot in apart.memory.slots)
    at_one_step = ("two sites at the same steps", "a read where the other is written")
    assert (shared.slot_bytes < apart.slot_bytes) == (kind not in at_one_step)
    assert apart.slot_bytes == apart.memory.total == sum(slot.bytes for slot in shared.memory.slots)
    assert [binding.variant for binding in shared.bindings] == [binding.variant for binding in apart.bindings]
    buffers = {slot.name: slot.buffer for slot in shared.memory.slots}
    for one, other in zip(shared.variants, apart.variants, strict=True):
        assert one.gm.code == other.gm.code
        assert one.stores == tuple(buffers[slot] for slot in other.stores)
        assert one.macs == other.macs
        assert one.kind == replace(other.kind, rewrites=one.kind.rewrites)


def test_a_budget_is_kept_or_the_plan_refused() -> None:
    """The error names the largest slots and what would save; a plan within the budget compiles."""
    which = case("dit")
    sites = [f"blocks.{b}.{name}" for b in range(2) for name in ("attn.kv", "attn.delta", "mlp.delta")]
    update = Update("even", "cached")
    actions = {(step, site): update if step else C for site in sites for step in range(3)}
    plan = CachePlan(3, actions, {"even": torch.arange(0, 16, 2)})
    inputs, needed = (which.args, which.kwargs), plan.memory(which.info).total
    tcc.compile(which.model, plan, example_inputs=inputs, backend="eager", max_slot_bytes=needed)
    message = r"the plan's slots take .*max_slot_bytes allows .*The largest: '.*without stored keys saves 16 KiB"
    with pytest.raises(PlanError, match=message):
        tcc.compile(which.model, plan, example_inputs=inputs, backend="eager", max_slot_bytes=needed - 1)


@pytest.mark.parametrize(("level", "last"), [("block", "delta+2"), ("branch", "attn.delta+5")])
def test_blocks_with_stored_keys_keep_one_sum(level: Any, last: str) -> None:
    """Attention `cached`: the blocks' changes share a slot, and the outputs are the reference's."""
    which = dit(depth=3, hidden_size=16)
    options: dict[str, Any] = {"keep": 0.5, "attention": "cached", "level": level, "rotate": True}
    plan = tcc.plans.tprr(which.info, num_steps=6, k1=3, k2=1, **options)
    names = {slot.name for slot in plan.memory(which.info).slots}
    assert names == {f"blocks.{b}.attn.kv.{part}" for b in range(3) for part in "kv"} | {f"blocks.0.{last}"}
    compiled = tcc.compile(which.model, plan, example_inputs=(which.args, which.kwargs), backend="eager")
    reference = tcc.Reference(which.model, plan, which.info)
    for step in range(plan.num_steps):
        args, kwargs = which.inputs(step)
        assert relative_error(tensor_of(compiled(*args, **kwargs)), tensor_of(reference(*args, **kwargs))) < 1e-5


def _tokens(**options: Any) -> Any:
    return lambda info: tcc.plans.tprr(info, num_steps=4, k1=1, k2=1, keep=0.5, **options)


PEAKS: dict[str, Any] = {
    "reuse": lambda info: tcc.plans.fora(info, num_steps=4, interval=2),
    "histories": lambda info: tcc.plans.taylorseer(info, num_steps=5, interval=2, order=1),
    "history of a sum": lambda info: tcc.plans.forecast(info, num_steps=4, i_steps=[0, 1]),
    "hold": lambda info: hold_plan(4),
    "tokens, keys kept": _tokens(attention="kept", level="block"),
    "tokens, keys current": _tokens(attention="current", level="block"),
    "tokens, keys stored": _tokens(attention="cached", level="block", rotate=True),
    "tokens, before the gate": _tokens(attention="cached", level="out"),
}


@functools.cache
def _deep() -> Case:
    return dit(depth=4, hidden_size=32)


@functools.cache
def _uncached_peak() -> int:
    """The most bytes that the uncached model allocates in a call."""
    session = running.session(_deep(), tcc.plans.full(_deep().info, num_steps=1))
    return allocations(lambda: session(*_deep().args)).peak


@pytest.mark.parametrize("policy", PEAKS)
def test_no_step_takes_more_than_the_model_and_the_slots(policy: str) -> None:
    """Peak memory of a run: that of the uncached model and the declared slots, within 5 %; nothing is left but outputs.

    Slots are allocated once: at the same addresses in a second run.
    """
    which = _deep()
    plan = PEAKS[policy](which.info)
    session = running.session(which, plan)
    slots = {name: slot.data_ptr() for name, slot in session._slots.items()}

    def run(outputs: list[torch.Tensor]) -> None:
        outputs += [session(*which.args) for _ in range(plan.num_steps)]

    outputs: list[torch.Tensor] = []
    run([])
    assert allocations(lambda: run(outputs)).kept == sum(output.nbytes for output in outputs)
    declared = plan.memory(which.info).total
    steps = [allocations(lambda: session(*which.args)) for _ in range(plan.num_steps)]
    assert max(step.peak for step in steps) + declared <= 1.05 * (_uncached_peak() + declared)
    assert {name: slot.data_ptr() for name, slot in session._slots.items()} == slots


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="measures the memory of a CUDA device, and there is none")
@pytest.mark.parametrize("policy", PEAKS)
def test_no_step_takes_more_on_a_gpu(policy: str) -> None:
    """The same under Inductor, by the allocator's own count, without weights and slots, which are there before."""
    which = dit(batch=8, depth=2, hidden_size=256)  # large beside the allocator's blocks of 512 bytes
    model, args = which.model.cuda(), tuple(x.cuda() for x in which.args)
    info = tcc.inspect(model, *args)
    plan, none = PEAKS[policy](info), CachePlan(1, {})
    declared = plan.memory(info).total

    def peak(chosen: CachePlan) -> int:
        session = tcc.compile(model, chosen, example_inputs=(args, {})).new_session()
        for _ in range(chosen.num_steps):  # the first run loads kernels, and libraries take their workspaces
            session(*args)
        return max(allocations(lambda: session(*args), "cuda").peak for _ in range(chosen.num_steps))

    assert peak(plan) + declared <= 1.05 * (peak(none) + declared)
