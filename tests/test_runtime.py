"""Programs at work: compiled plans against the reference, sessions, step order, and what a call may look like."""

from __future__ import annotations

import functools
from typing import Any

import pytest
import torch

import tcc
from tcc.errors import CallError, CaptureError, PlanError
from tcc.plan import CachePlan, Compute, Hold, Reuse, Skip, Update
from tcc.program import build_program
from tcc.runtime import Executable, Session, lower
from tests.tiny_models import Case, case, dit, relative_error, tensor_of

#: float32 sums in another order: a step has a few hundred roundings of 6e-8.
CLOSE = 2e-5
STEPS = 6


@functools.cache
def _executable(which: Case, key: int, check: bool) -> Executable:
    program = build_program(which.info.captured, which.info.analysis, PLANS[key], check=check)
    return lower(program, "eager", check=check)


PLANS: dict[int, CachePlan] = {}


def session(which: Case, plan: CachePlan, check: bool = False) -> Session:
    """A new session of the case's model under `plan`, without a backend; captured and compiled once per plan."""
    PLANS[id(plan)] = plan
    return Session(_executable(which, id(plan), check))


def compiled(which: Case, plan: CachePlan) -> tcc.CompiledModel:
    """The case's model by `tcc.compile`, without a backend."""
    return tcc.compile(which.model, plan, backend="eager", example_inputs=(which.args, which.kwargs))


@pytest.fixture(scope="module")
def _shared() -> tcc.CompiledModel:
    return compiled(case("dit"), token_plan("dit"))


@pytest.fixture
def model(_shared: tcc.CompiledModel) -> tcc.CompiledModel:
    """The tiny DiT, compiled once for a token plan; at step 0, without sessions."""
    _shared._sessions.clear()
    return _shared


def call(model: Any, which: Case, step: int) -> torch.Tensor:
    """The output of a call with the inputs of `step`."""
    args, kwargs = which.inputs(step)
    return tensor_of(model(*args, **kwargs))


def token_plan(name: str, **options: Any) -> CachePlan:
    """A token plan of six steps for the case of that name, at keep ratio one half; the same object every time."""
    return _token_plan(name, tuple(sorted(options.items())))


@functools.cache
def _token_plan(name: str, options: tuple[tuple[str, Any], ...]) -> CachePlan:
    given = {"keep": 0.5, "tokens": "uniform"} | dict(options)
    return tcc.plans.tprr(case(name).info, num_steps=STEPS, **given)


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


def hold_plan(num_steps: int = 3) -> CachePlan:
    """Compute the last stream at step 0, hold it afterwards."""
    actions = {(s, "out.stream"): Hold() if s else Compute() for s in range(num_steps)}
    return CachePlan(num_steps=num_steps, actions=actions)


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


def test_a_policy_is_resolved_at_the_first_call() -> None:
    """A policy stands in for a plan, and `plan` says what it made."""
    which = case("dit")
    model = tcc.compile(which.model, functools.partial(tcc.plans.fora, num_steps=4, interval=2), backend="eager")
    with pytest.raises(PlanError, match="the policy makes its plan at the first call"):
        _ = model.plan
    with pytest.raises(PlanError, match="nothing is compiled yet"):
        model.new_session()
    assert model.info is None
    assert model.program is None
    assert model.compile_seconds == ()
    call(model, which, 0)
    assert (str(model.plan.schedule), model.plan.policy["name"]) == ("IIPI", "fora")
    assert len(model.compile_seconds) == len(model.program.variants) == 2


def test_an_exported_program_compiles_like_its_model(model: tcc.CompiledModel) -> None:
    """A model may come as `torch.export` left it."""
    which = case("dit")
    with torch.no_grad():
        program = torch.export.export(which.model, which.args, which.kwargs, strict=False)
    from_program = tcc.compile(program, model.plan, backend="eager", example_inputs=(which.args, which.kwargs))
    for step in range(STEPS):
        assert torch.equal(call(from_program, which, step), call(model, which, step))


def test_attributes_are_the_models() -> None:
    """Pipelines read `config` and the like from the model they call."""
    which = case("hf_dit")
    model = tcc.compile(which.model, hold_plan(), backend="eager")
    assert model.config is which.model.config
    assert model.dtype == torch.float32
    assert model.device == torch.device("cpu")
    with pytest.raises(AttributeError, match="no_such_attribute"):
        _ = model.no_such_attribute


def test_return_dict_works_both_ways() -> None:
    """A diffusers model returns its output class or a tuple, as it was captured."""
    which = case("hf_dit")
    plan = tcc.plans.full(which.info, num_steps=1)
    as_class = call_with(which, plan)
    as_tuple = call_with(Case(which.model, which.args, which.kwargs | {"return_dict": False}), hold_plan(1))
    assert type(as_class).__name__ == "Transformer2DModelOutput"
    assert isinstance(as_tuple, tuple)
    assert torch.equal(as_class.sample, as_tuple[0])


def call_with(which: Case, plan: CachePlan) -> Any:
    """The whole output of the first call."""
    return compiled(which, plan)(*which.args, **which.kwargs)


def test_arguments_may_be_written_as_the_forward_allows() -> None:
    """Positional and keyword spellings of one call are the same call."""
    which = case("dit")
    x, t, y = which.args
    model = compiled(which, tcc.plans.full(which.info, num_steps=1))
    assert torch.equal(model(x, t, y), model(x, y=y, t=t))


BAD_CALLS = {
    "shape": (lambda x, t, y: (x[:, :, :4], t, y), r"input 'x' has shape \[2, 4, 4, 8\], expected \[2, 4, 8, 8\]"),
    "batch": (lambda x, t, y: (x[:1], t[:1], y[:1]), r"input 'x' has shape \[1, 4, 8, 8\], expected \[2, 4, 8, 8\]"),
    "dtype": (lambda x, t, y: (x.double(), t, y), "input 'x' has dtype torch.float64, expected torch.float32"),
    "label dtype": (lambda x, t, y: (x, t, y.int()), "input 'y' has dtype torch.int32, expected torch.int64"),
    "device": (lambda x, t, y: (x.to("meta"), t, y), "input 'x' is on meta, expected cpu"),
    "no tensor": (lambda x, t, y: (x, 5, y), "input 't' is 5, expected a tensor"),
    "structure": (lambda x, t, y: (x, (t, t), y), "structured differently from the capture"),
    "arguments": (
        lambda x, t, y: (x, t),
        "does not fit the model's forward: missing a required argument: 'y'",
    ),
}


@pytest.mark.parametrize("kind", BAD_CALLS)
def test_a_call_unlike_the_capture_is_refused_and_changes_nothing(model: tcc.CompiledModel, kind: str) -> None:
    """The error names the input and what was expected; the run goes on as if the call had not been made."""
    which = case("dit")
    change, message = BAD_CALLS[kind]
    first = call(model, which, 0)
    with pytest.raises(CallError, match=message):
        model(*change(*which.args))
    assert model.session.step == 1
    reference = tcc.Reference(which.model, model.plan, which.info)
    assert relative_error(first, call(reference, which, 0)) <= CLOSE
    assert relative_error(call(model, which, 1), call(reference, which, 1)) <= CLOSE


def test_a_constant_may_not_change_in_mid_run() -> None:
    """An argument that is no tensor is compiled in."""
    which = case("hf_dit")
    model = compiled(which, tcc.plans.full(which.info, num_steps=2))
    with pytest.raises(CallError, match="is False but was True at capture"):
        model(*which.args, **which.kwargs, return_dict=False)


def test_steps_run_in_order(model: tcc.CompiledModel) -> None:
    """`run_step` takes the next step, or step 0 for a new run."""
    which = case("dit")
    run = model.new_session()
    run.run_step(0, *which.args)
    run.run_step(1, *which.args)
    with pytest.raises(CallError, match=r"step 3 was called but the next step is 2 of 6: .*Call reset\(\)"):
        run.run_step(3, *which.args)
    run.run_step(0, *which.args)
    assert run.step == 1


def test_a_model_in_training_mode_is_refused() -> None:
    """Dropout would be captured."""
    model = dit().model.train()
    with pytest.raises(CaptureError, match="the model is in training mode"):
        tcc.compile(model, hold_plan(), backend="eager", example_inputs=(case("dit").args, {}))
