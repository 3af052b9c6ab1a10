"""Programs at work: compiled plans against the reference, sessions, slots and variants."""

from __future__ import annotations

import functools
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch
import torch._inductor
from torch import fx

import tcc
from tcc.errors import CallError, CompileError
from tcc.lowering import lower
from tcc.plan import CachePlan, Compute, Hold, Reuse, Skip, Update
from tcc.program import build_program
from tests.running import CLOSE, STEPS, call, hold_plan, session, token_plan
from tests.tiny_models import Block, Case, Tokens, case, fill, relative_error, tensor_of

MODES: list[dict[str, Any]] = [
    {"attention": "kept"},
    {"attention": "current"},
    {"attention": "cached"},
    {"attention": "kept", "level": "branch"},
    {"attention": "current", "level": "branch"},
    {"attention": "cached", "level": "branch", "rotate": True},
    {"attention": "kept", "blocks": (1,), "rotate": True},
    {"attention": "kept", "tokens": "random", "seed": 3},
]
NAMES = ["hf_dit", "hf_pixart", "separate", "parallel", "flat", "headless", "long_skip"]


@pytest.mark.parametrize(("name", "options"), [("dit", m) for m in MODES] + [(n, m) for n in NAMES for m in MODES[:3]])
def test_a_compiled_token_plan_equals_the_reference(name: str, options: dict[str, Any]) -> None:
    """Every attention mode and level gives what its definition gives, at every step, on every model class."""
    which, plan = case(name), token_plan(name, **options)
    result, reference = session(which, plan, check=name == "dit"), tcc.Reference(which.model, plan, which.info)
    for step in range(STEPS):
        assert relative_error(call(result, which, step), call(reference, which, step)) <= CLOSE


@pytest.mark.parametrize("name", ["dit", "hf_dit", "hf_pixart"])
def test_a_compiled_branch_plan_is_bit_identical_to_the_reference(name: str) -> None:
    """Reusing whole branches re-orders no sum, so there is no rounding to allow for."""
    which = case(name)
    plan = tcc.plans.fora(which.info, num_steps=STEPS, interval=3)
    result, reference = session(which, plan), tcc.Reference(which.model, plan, which.info)
    for step in range(STEPS):
        assert torch.equal(call(result, which, step), call(reference, which, step))


@pytest.mark.parametrize(
    "name", ["dit", "hf_dit", "hf_pixart", "separate", "parallel", "long_skip", "rescaled", "conv"]
)
def test_a_plan_that_only_computes_is_bit_identical_to_the_model(name: str) -> None:
    """Nothing is cached, so nothing may change, and the model's own output structure comes back."""
    which = case(name)
    result = session(which, tcc.plans.full(which.info, num_steps=2))
    args, kwargs = which.inputs(0)
    with torch.no_grad():
        expected = which.model(*args, **kwargs)
    output = result(*args, **kwargs)
    assert type(output) is type(expected)
    assert torch.equal(tensor_of(output), tensor_of(expected))


@pytest.mark.parametrize(("dtype", "close"), [(torch.float64, 1e-13), (torch.bfloat16, 2**-7)])
@pytest.mark.parametrize("attention", ["kept", "current", "cached"])
def test_other_dtypes_equal_the_reference(dtype: torch.dtype, close: float, attention: str) -> None:
    """To the resolution of the dtype; slots are of it too."""
    which = cast(dtype)
    plan = tcc.plans.tprr(which.info, num_steps=STEPS, keep=0.5, tokens="uniform", attention=attention)
    result, reference = session(which, plan), tcc.Reference(which.model, plan, which.info)
    for step in range(STEPS):
        x = which.inputs(step)[0][0].to(dtype)
        assert relative_error(result(x), reference(x)) <= close
    assert {slot.dtype for slot in result._slots.values()} == {dtype}


@functools.cache
def cast(dtype: torch.dtype) -> Case:
    """A two-block model in another dtype."""
    x = case("separate").args[0]
    return Case(fill(Tokens([Block(16), Block(16)]), std=0.2).to(dtype), (x.to(dtype),), {})


def test_storing_every_site_changes_no_output() -> None:
    """A plan that stores and never reads computes what the model computes."""
    which = case("dit")
    sites = [name for name, site in which.info.sites.items() if site.kind in ("out", "kv", "stream")]
    plan = CachePlan(num_steps=2, actions={(step, name): Compute() for step in range(2) for name in sites})
    assert torch.equal(call(session(which, plan), which, 0), call(which.model, which, 0))


def test_keeping_every_token_is_the_uncached_model() -> None:
    """Keep ratio 1 recomputes everything at every step."""
    which = case("dit")
    result = session(which, token_plan("dit", keep=1.0))
    for step in range(STEPS):
        with torch.no_grad():
            assert relative_error(call(result, which, step), call(which.model, which, step)) <= CLOSE


def test_holding_the_last_stream_repeats_the_output() -> None:
    """Only the head is computed on a step that holds the stream: with the same conditioning, the same output."""
    which = case("dit")
    result = session(which, hold_plan())
    assert torch.equal(call(result, which, 0), call(result, which, 1))


def test_skipping_every_branch_leaves_the_embedding() -> None:
    """A skipped block adds nothing to the stream."""
    which = case("dit")
    sites = [name for name, site in which.info.sites.items() if site.kind == "block"]
    result = session(which, CachePlan(num_steps=1, actions={(0, name): Skip() for name in sites}))
    inner = which.model
    x, t, y = which.inputs(0)[0]
    with torch.no_grad():
        stream = inner.x_embedder(x) + inner.pos_embed
        expected = inner.unpatchify(inner.final_layer(stream, inner.t_embedder(t) + inner.y_embedder(y)))
    assert torch.equal(call(result, which, 0), expected)


def test_a_run_starts_again_after_the_last_step(model: tcc.CompiledModel) -> None:
    """The second run of the same inputs gives the first run's outputs, though slots still hold its values."""
    which = case("dit")
    first = [call(model, which, step) for step in range(STEPS)]
    second = [call(model, which, step) for step in range(STEPS)]
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


def test_reset_starts_a_new_run(model: tcc.CompiledModel) -> None:
    """After a reset in mid-run the next call is step 0."""
    which = case("dit")
    first = [call(model, which, step) for step in range(3)]
    assert model.session.step == 3
    model.reset()
    assert model.session.step == 0
    assert all(torch.equal(call(model, which, step), first[step]) for step in range(3))


def test_interleaved_sessions_do_not_meet(model: tcc.CompiledModel) -> None:
    """Two sessions that take turns give what each gives alone."""
    which = case("dit")
    alone = [[call(s, which, 10 * i + step) for step in range(STEPS)] for i, s in enumerate(fresh(model, 2))]
    turns = fresh(model, 2)
    mixed: list[list[torch.Tensor]] = [[], []]
    for step in range(STEPS):
        for i, one in enumerate(turns):
            mixed[i].append(call(one, which, 10 * i + step))
    for i in (0, 1):
        assert all(torch.equal(a, b) for a, b in zip(alone[i], mixed[i], strict=True))


def fresh(model: tcc.CompiledModel, count: int) -> list[Any]:
    """New sessions of `model`."""
    return [model.new_session() for _ in range(count)]


def test_sessions_run_in_threads(model: tcc.CompiledModel) -> None:
    """One session per thread shares the code and nothing else."""
    which = case("dit")
    alone = [[call(s, which, 10 * i + step) for step in range(STEPS)] for i, s in enumerate(fresh(model, 4))]

    def run(number: int) -> list[torch.Tensor]:
        mine = model.new_session()
        return [call(mine, which, 10 * number + step) for step in range(STEPS)]

    with ThreadPoolExecutor(4) as pool:
        together = list(pool.map(run, range(4)))
    for one, other in zip(alone, together, strict=True):
        assert all(torch.equal(a, b) for a, b in zip(one, other, strict=True))


def test_a_new_session_is_at_step_0_and_leaves_the_model_alone(model: tcc.CompiledModel) -> None:
    """A session has its own counter."""
    which = case("dit")
    call(model, which, 0)
    other = model.new_session()
    assert (other.step, model.session.step, other.num_steps) == (0, 1, STEPS)
    call(other, which, 0)
    call(other, which, 1)
    assert (other.step, model.session.step) == (2, 1)


def test_cache_contexts_keep_guidance_branches_apart(model: tcc.CompiledModel) -> None:
    """A pipeline that calls once per branch gets per branch what a model of its own would give."""
    which = case("dit")
    expected = {}
    for branch in (0, 1):
        alone = model.new_session()
        expected[branch] = [call(alone, which, 10 * branch + step) for step in range(STEPS)]
    for step in range(STEPS):
        for branch, name in enumerate(("cond", "uncond")):
            with model.cache_context(name):
                assert torch.equal(call(model, which, 10 * branch + step), expected[branch][step])
    assert model.session.step == 0  # the context without a name was not called


def test_reset_reaches_every_cache_context(model: tcc.CompiledModel) -> None:
    """A new image starts for all branches at once."""
    which = case("dit")
    with model.cache_context("cond"):
        call(model, which, 0)
        inner = model.session
    assert inner.step == 1
    model.reset()
    assert inner.step == 0


def test_slots_stay_where_they_are(model: tcc.CompiledModel) -> None:
    """Slots are allocated once: their addresses do not change over two runs."""
    which = case("dit")
    run = model.new_session()
    before = {name: slot.data_ptr() for name, slot in run._slots.items()}
    for step in range(2 * STEPS):
        call(run, which, step)
    assert before
    assert {name: slot.data_ptr() for name, slot in run._slots.items()} == before


def test_slot_bytes_are_those_of_the_slots(model: tcc.CompiledModel) -> None:
    """One merged slot of [2, 16, 32] float32 serves two blocks that are always treated alike."""
    assert model.new_session().slot_bytes == model.program.slot_bytes == model.plan.slot_bytes == 2 * 16 * 32 * 4


@pytest.mark.parametrize("name", ["headless", "dit"])
def test_an_output_outlives_the_steps_after_it(name: str) -> None:
    """What a step returned is not overwritten when a later step writes the slot it came from."""
    which = case(name)
    actions = {(s, "out.stream"): Compute() if s % 2 == 0 else Hold() for s in range(4)}
    run = session(which, CachePlan(num_steps=4, actions=actions))
    outputs, copies = [], []
    for step in range(4):
        outputs.append(call(run, which, step))
        copies.append(outputs[-1].clone())
    assert all(torch.equal(a, b) for a, b in zip(outputs, copies, strict=True))
    assert not torch.equal(copies[1], copies[3])


class Parts(torch.nn.Module):
    """Returns the stream of a headless model in parts, which are views of it."""

    def __init__(self, how: str) -> None:
        super().__init__()
        self.inner, self.how = case("headless").model, how

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """Cut the stream along its channels, or turn it round."""
        y = self.inner(x)
        return {"chunk": lambda: tuple(y.chunk(2, dim=-1)), "transpose": lambda: (y.transpose(1, 2),)}[self.how]()


@pytest.mark.parametrize("how", ["chunk", "transpose"])
def test_an_output_that_views_a_held_slot_is_a_copy(how: str) -> None:
    """A view of a slot, returned by the model, is not overwritten by the next step."""
    which = Case(Parts(how).eval(), case("headless").args, {})
    actions = {(s, "out.stream"): Compute() if s % 2 == 0 else Hold() for s in range(4)}
    run = session(which, CachePlan(num_steps=4, actions=actions))
    call(run, which, 0)
    held = run(*which.inputs(1)[0])
    copies = [part.clone() for part in held]
    call(run, which, 2)
    assert all(torch.equal(a, b) for a, b in zip(held, copies, strict=True))


def test_steps_of_one_kind_share_a_variant() -> None:
    """Token sets and coefficients are inputs: three sets and three pairs of weights need two variants, not seven."""
    which = case("dit")
    site = "blocks.0.delta"
    sets = {f"T{i}": torch.tensor([i, i + 4]) for i in range(3)}
    update = {(1 + i, site): Update(f"T{i}") for i in range(3)}
    plan = CachePlan(num_steps=4, actions={(0, site): Compute(), **update}, tokens=sets)
    assert variants_of(which, plan) == [0, 1, 1, 1]
    reuse = {(2 + i, site): Reuse(1, (2.0 + i, -1.0 - i)) for i in range(3)}
    assert variants_of(which, CachePlan(num_steps=5, actions={(0, site): Compute(), **reuse})) == [0, 0, 1, 1, 1]


def variants_of(which: Case, plan: CachePlan) -> list[int]:
    """The variant of every step."""
    program = build_program(which.info.captured, which.info.analysis, plan, check=False)
    return [binding.variant for binding in program.bindings]


def test_variants_share_the_models_weights(model: tcc.CompiledModel) -> None:
    """No variant holds a copy: every parameter of a variant is the model's own storage."""
    which = case("dit")
    own = {p.data_ptr() for p in which.model.state_dict().values()}
    for variant in model.program.variants:
        weights = [*variant.gm.parameters(), *(b for n, b in variant.gm.named_buffers() if "lifted" not in n)]
        assert weights
        assert {w.data_ptr() for w in weights if w.numel() > 128} <= own


# --- one model, several plans


def test_two_plans_of_one_model_share_what_they_have_in_common() -> None:
    """Capture, analysis and equal variants are made once; sessions are apart, and results are those of each plan."""
    which = case("dit")
    made: list[int] = []

    def backend(gm: torch.fx.GraphModule, _: list[torch.Tensor]) -> Any:
        made.append(len(gm.graph.nodes))
        return gm.forward

    first = tcc.compile(which.model, tcc.plans.fora(which.info, num_steps=4, interval=2), backend=backend)
    call(first, which, 0)
    second = first.with_plan(tcc.plans.fora(which.info, num_steps=6, interval=3))
    oracle = tcc.reference.Reference(which.model, second.plan, which.info)
    for step in range(6):
        assert relative_error(call(second, which, step), call(oracle, which, step)) <= CLOSE
    assert len(made) == 2
    assert second.info is first.info
    assert (first.session.step, second.session.step) == (1, 0)
    third = first.with_plan(tcc.plans.taylorseer(which.info, num_steps=4, interval=2, order=1))
    call(third, which, 0)
    assert len(made) > 2


def test_a_backend_that_fails() -> None:
    """The error names the variant and its steps, and keeps the cause."""

    def failing(gm: fx.GraphModule, examples: list[torch.Tensor]) -> Any:
        if any(node.op == "placeholder" and "slot" in node.name for node in gm.graph.nodes):
            raise KeyError("buf7")
        return gm.forward

    which = case("dit")
    plan = tcc.plans.fora(which.info, num_steps=4, interval=2)
    program = build_program(which.info.captured, which.info.analysis, plan)
    with pytest.raises(
        CompileError, match=r"failing could not compile variant 1 of 2 \(steps 0, 1, 3\): KeyError: 'buf7'"
    ):
        lower(program, failing)


def test_a_step_that_fails_ends_its_run() -> None:
    """What it had stored by then is of another step than the rest: an order-1 forecast would see its history twice."""
    which, failing = case("dit"), []

    def backend(gm: fx.GraphModule, _: list[torch.Tensor]) -> Any:
        def run(*inputs: torch.Tensor) -> Any:
            outputs = gm(*inputs)
            if failing:
                raise MemoryError(failing.pop())
            return outputs

        return run

    plan = tcc.plans.taylorseer(which.info, num_steps=6, interval=2, order=1)
    session = tcc.compile(which.model, plan, example_inputs=(which.args, {}), backend=backend).new_session()
    calls = [(which.args[0], torch.full((2,), 900 - 100 * step), which.args[2]) for step in range(6)]
    expected = [session(*args) for args in calls]
    for args in calls[:2]:
        session(*args)
    failing.append("no memory")
    with pytest.raises(MemoryError):
        session(*calls[2])
    for again in (lambda: session(*calls[2]), lambda: session.run_step(2, *calls[2])):
        with pytest.raises(
            CallError, match=r"step 2 of 6 failed while it ran, .*: call reset\(\) and begin the run anew"
        ):
            again()
    session.reset()
    assert all(torch.equal(session(*args), wanted) for args, wanted in zip(calls, expected, strict=True))


@pytest.mark.parametrize("timesteps", [None, [900, 700]])
def test_inference_mode_may_end_within_a_run(timesteps: list[int] | None) -> None:
    """What a session allocates in it can be written to outside."""
    which, levels = case("dit"), [900, 700]
    model = tcc.compile(
        which.model, functools.partial(tcc.plans.fora, num_steps=2, interval=2), backend="eager", timesteps=timesteps
    )
    calls = [(which.args[0], torch.full((2,), level), which.args[2]) for level in levels]
    with torch.inference_mode():
        expected = [model(*args) for args in calls]
        model(*calls[0])
    assert torch.equal(model(*calls[1]), expected[1])
    assert all(torch.equal(model(*args), wanted) for args, wanted in zip(calls, expected, strict=True))
