"""Programs under Inductor: equal to the reference, bit-identical where nothing is cached, compiled once."""

from __future__ import annotations

import functools

import pytest
import torch
from torch import nn
from torch._dynamo.utils import counters
from torch._inductor import metrics
from torch.fx.experimental.proxy_tensor import make_fx

import tcc
from tcc.lowering import lower
from tcc.lowering.inductor import start_compiling
from tcc.models import DiT
from tcc.passes.graph import write_code
from tcc.plan import CachePlan, Compute, Hold, Reuse, Update
from tcc.program import build_program
from tcc.runtime import Session
from tcc.timing import allocations
from tests.tiny_models import case

pytestmark = [
    pytest.mark.compiles,
    pytest.mark.filterwarnings("ignore:.*torch.jit.script:DeprecationWarning"),  # Inductor's own imports
]
NUM_STEPS = 6


@functools.cache
def _model() -> DiT:
    torch.manual_seed(0)
    model = DiT(input_size=16, patch_size=2, hidden_size=64, depth=2, num_heads=2, num_classes=10).eval()
    for parameter in model.parameters():
        parameter.data.normal_(0, 0.1)  # adaLN-Zero starts with zero gates, which would hide every error
    return model


def _calls() -> list[tuple[torch.Tensor, ...]]:
    generator = torch.Generator().manual_seed(1)
    labels = torch.tensor([1, 2])
    return [(torch.randn(2, 4, 16, 16, generator=generator), labels + 100 * s, labels) for s in range(NUM_STEPS)]


@functools.cache
def _compiled() -> tcc.CompiledModel:
    policy = functools.partial(
        tcc.plans.tprr, num_steps=NUM_STEPS, k1=1, k2=1, keep=0.5, attention="cached", level="block", rotate=True
    )
    return tcc.compile(_model(), policy, example_inputs=(_calls()[0], {}))


@functools.cache
def _uncached() -> tcc.CompiledModel:
    policy = functools.partial(tcc.plans.full, num_steps=NUM_STEPS)
    return tcc.compile(_model(), policy, example_inputs=(_calls()[0], {}))


def test_a_plan_that_only_computes_is_bit_identical_to_torch_compile() -> None:
    """The `full` plan gives the bits of `torch.compile(model, fullgraph=True)`."""
    plain = torch.compile(_model(), fullgraph=True)
    with torch.no_grad():
        for call in _calls():
            assert torch.equal(_uncached()(*call), plain(*call))


def test_a_token_plan_equals_the_reference() -> None:
    """Every step of a token plan is within float32 rounding of the reference interpreter."""
    compiled = _compiled()
    compiled.reset()
    reference = tcc.Reference(_model(), compiled.plan)
    for call in _calls():
        wanted, got = reference(*call), compiled(*call)
        assert float((wanted - got).abs().max() / wanted.abs().max()) < 5e-6


def test_no_step_takes_more_than_the_model_and_the_slots() -> None:
    """Peak memory within 5 %, though blocks keep one sum; slots stay where they are; nothing is left but outputs."""
    session, plain = Session(_compiled()._executable(0)), Session(_uncached()._executable(0))
    slots = {name: slot.data_ptr() for name, slot in session._slots.items()}
    outputs: list[torch.Tensor] = []
    calls = _calls()
    for call in calls:
        session(*call)
        plain(*call)
    steps = [allocations(functools.partial(session, *call)).peak for call in calls]
    uncached = allocations(lambda: plain(*calls[0])).peak
    assert max(steps) + session.slot_bytes <= 1.05 * (uncached + session.slot_bytes)
    kept = allocations(lambda: outputs.extend(session(*call) for call in calls)).kept
    assert kept == sum(output.nbytes for output in outputs)
    assert {name: slot.data_ptr() for name, slot in session._slots.items()} == slots


def test_sums_are_added_up_in_their_slots_under_inductor() -> None:
    """Terms do not wait for each other, and a history moves up before the sum takes its place."""
    weights = [torch.randn(32, 32, generator=torch.Generator().manual_seed(seed)) / 6 for seed in range(12)]

    def step(x: torch.Tensor, oldest: torch.Tensor, older: torch.Tensor, slot: torch.Tensor) -> list[torch.Tensor]:
        deltas = []
        for weight in weights:
            deltas.append(torch.tanh(x) @ weight * 0.5)
            x = x + deltas[-1]
        oldest.copy_(older)
        older.copy_(slot)
        slot.copy_(functools.reduce(torch.add, deltas))
        return [x]

    x = torch.randn(64, 32, generator=torch.Generator().manual_seed(9))
    mine, wanted = ([torch.full((64, 32), float(number)) for number in range(3)] for _ in range(2))
    run = start_compiling(make_fx(lambda *inputs: step(*inputs))(x, *mine), [x, *mine], {})()
    for slots, call in ((mine, run), (wanted, step)):
        for number, slot in enumerate(slots):  # compiling may have written to them
            slot.fill_(float(number))
        call(x, *slots)
        call(x / 2, *slots)
    for slot, other in zip(mine, wanted, strict=True):
        torch.testing.assert_close(slot, other)
    assert allocations(lambda: run(x, *mine)).peak <= 6 * x.nbytes  # not 12: the stream alone waits for four


def test_nothing_compiles_after_warm_up() -> None:
    """Three more runs, one of them in a new session and in inference mode, compile and break nothing."""
    compiled = _compiled()
    for call in _calls():
        compiled(*call)
    watched = ("inductor", "stats", "graph_break")
    before = (metrics.generated_kernel_count, *(dict(counters[name]) for name in watched))
    session = compiled.new_session()
    for call in [*_calls(), *_calls()]:
        compiled(*call)
    with torch.inference_mode():
        for call in _calls():
            session(*call)
    assert (metrics.generated_kernel_count, *(dict(counters[name]) for name in watched)) == before


def test_regional_compilation_equals_the_reference() -> None:
    """Blocks that are calls of one compiled sub-graph, with slots that they read and write."""
    torch.manual_seed(0)
    model = DiT(input_size=8, patch_size=2, hidden_size=32, depth=3, num_heads=2, num_classes=10).eval()
    for parameter in model.parameters():
        parameter.data.normal_(0, 0.1)
    calls = [(x[:, :, :8, :8], t, y) for x, t, y in _calls()[:2]]
    policy = functools.partial(tcc.plans.tprr, num_steps=2, k1=1, k2=1, keep=0.5, attention="current", level="block")
    compiled = tcc.compile(model, policy, example_inputs=(calls[0], {}), regional=True)
    reference = tcc.Reference(model, compiled.plan)
    for call in calls:
        wanted, got = reference(*call), compiled(*call)
        assert float((wanted - got).abs().max() / wanted.abs().max()) < 5e-6


def test_known_timesteps_equal_the_reference() -> None:
    """What is read from a table, parts of products that are left out, and rows that are written."""
    which, timesteps = case("dit"), [900, 600, 300]
    sites = ("blocks.0.attn.kv", "blocks.0.attn.out", "blocks.0.mlp.out", "blocks.1.attn.out")
    even = Update("even", "cached")
    actions = {(s, site): Reuse() if "1" in site else even for s in (1, 2) for site in sites}
    plan = CachePlan(3, actions, {"even": torch.arange(0, 16, 2)})
    compiled = tcc.compile(which.model, plan, example_inputs=(which.args, {}), timesteps=timesteps)
    reference = tcc.Reference(which.model, plan, which.info)
    for step, timestep in enumerate(timesteps):
        x, labels = which.inputs(step)[0][0], which.args[2]
        t = torch.full((2,), timestep)
        torch.testing.assert_close(compiled(x, t, labels), reference(x, t, labels), rtol=2e-5, atol=2e-5)


def test_every_variant_is_one_whole_graph() -> None:
    """`torch.compile(fullgraph=True)` takes each variant, and so would any other compiler of graphs."""
    program = _compiled().program
    assert program is not None
    assert len(program.variants) == 2
    for variant in program.variants:
        inputs = [
            torch.zeros(n.meta["val"].shape, dtype=n.meta["val"].dtype)
            for n in variant.gm.graph.nodes
            if n.op == "placeholder"
        ]
        write_code(variant.gm)
        whole = torch.compile(variant.gm, fullgraph=True, backend="aot_eager")
        with torch.no_grad():
            assert len(whole(*inputs)) == 1 + len(variant.stores)


def test_histories_and_held_outputs_under_inductor() -> None:
    """A forecast reads the values it should, though Inductor decides when slots are written; outputs are no slots."""
    which, site = case("headless"), "blocks.0.mlp.out"
    rows = {(s, site): Compute() for s in (0, 1, 2, 4)} | {(s, site): Reuse(2, (0.5, -1.0, 2.0)) for s in (3, 5)}
    held = {(s, "out.stream"): Compute() for s in range(5)} | {(5, "out.stream"): Hold()}
    plan = CachePlan(num_steps=6, actions={**rows, **held})
    program = build_program(which.info.captured, which.info.analysis, plan)
    session, reference = Session(lower(program)), tcc.Reference(which.model, plan, which.info)
    outputs = [session(*which.inputs(step)[0]) for step in range(12)]
    for step, output in enumerate(outputs):  # compared at the end: a later step must not have overwritten one
        wanted = reference(*which.inputs(step)[0])
        assert float((wanted - output).abs().max() / wanted.abs().max()) < 5e-6


class Dropping(nn.Module):
    """A model that sets the label embeddings to zero where a mask says so: how many they are is not known."""

    def __init__(self, width: int = 16) -> None:
        super().__init__()
        self.embed, self.out, self.labels = nn.Linear(4, width), nn.Linear(width, 4), nn.Embedding(5, width)
        self.blocks = nn.ModuleList(nn.Sequential(nn.LayerNorm(width), nn.Linear(width, width)) for _ in range(2))

    def forward(self, x: torch.Tensor, t: torch.Tensor, y: torch.Tensor, drop: torch.Tensor) -> torch.Tensor:
        """`x` `[B, S, 4]`, `t` `[B]`, `y` `[B]`, `drop` `[B]`, of bools."""
        label = self.labels(y)
        label[drop] *= 0.0
        x = self.embed(x) + (label + t[:, None])[:, None]
        for block in self.blocks:
            x = x + block(x)
        out: torch.Tensor = self.out(x)
        return out


def test_a_mask_with_an_unknown_number_of_rows() -> None:
    """The size that depends on data is named anew where Inductor traces, and another mask needs no compilation."""
    torch.manual_seed(0)
    model = Dropping().eval()
    x, t, y = torch.randn(2, 8, 4), torch.rand(2), torch.tensor([1, 2])
    first, second = ((x, t, y, torch.tensor(drop)) for drop in ([True, False], [False, False]))
    policy = functools.partial(tcc.plans.fora, num_steps=2, interval=2)
    compiled = tcc.compile(model, policy, example_inputs=(first, {}))
    with torch.no_grad():
        for call in (first, first, second):
            torch.testing.assert_close(compiled(*call), model(*call), rtol=0, atol=2e-6)
