"""CUDA graphs: captured variants give what plain calls give. Without a GPU, tapes stand in for graphs."""

from __future__ import annotations

import functools
import gc
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import tcc
from tcc.cli import compare
from tcc.errors import CallError
from tcc.lowering.lowering import _recorder
from tcc.models import DiT
from tcc.runtime import Executable, Session
from tcc.runtime.cuda_graphs import Graphs, Replay
from tests import fuzz_plans, running
from tests.tapes import Tapes
from tests.tiny_models import Block, Tokens, case, dit, fill, noise

needs_cuda = pytest.mark.skipif(not torch.cuda.is_available(), reason="CUDA graphs need a CUDA device: there is none")


def test_unknown_mode_is_refused_by_name() -> None:
    """A mode that does not exist is an error that names the ones that do."""
    model = DiT(input_size=8, patch_size=2, hidden_size=32, depth=2, num_heads=2, num_classes=10).eval()
    inputs = (torch.zeros(1, 4, 8, 8), torch.zeros(1, dtype=torch.int64), torch.zeros(1, dtype=torch.int64))
    plan = tcc.CachePlan(num_steps=1, actions={})
    with pytest.raises(tcc.errors.CallError, match="mode='fast': use 'default', or 'reduce-overhead'"):
        tcc.compile(model, plan, example_inputs=(inputs, {}), backend="eager", mode="fast")


@pytest.mark.gpu
@needs_cuda
def test_a_replayed_plan_equals_a_plain_one() -> None:
    """With `reduce-overhead`, two runs of a token plan give what the default mode gives, also after new inputs."""
    torch.manual_seed(0)
    model = DiT(input_size=8, patch_size=2, hidden_size=64, depth=2, num_heads=2, num_classes=10).eval().cuda()
    for parameter in model.parameters():
        parameter.data.normal_(0, 0.1)
    labels = torch.zeros(2, dtype=torch.int64, device="cuda")
    calls = [(torch.randn(2, 4, 8, 8, device="cuda"), labels + step, labels) for step in range(8)]
    info = tcc.inspect(model, *calls[0])
    plan = tcc.plans.tprr(info, num_steps=4, k1=1, k2=1, keep=0.5, rotate=True)
    plain, replayed = (tcc.compile(model, plan, mode=mode) for mode in ("default", "reduce-overhead"))
    for call in calls:
        assert torch.equal(plain(*call), replayed(*call))


@pytest.mark.gpu
@needs_cuda
def test_capturing_leaves_the_slots_as_they_were() -> None:
    """The warm-up calls before a capture do not count: a slot that adds one per call has added one after one call."""
    slot = torch.zeros(4, device="cuda")

    def add(x: torch.Tensor, slot: torch.Tensor) -> list[torch.Tensor]:
        slot.add_(1)
        return [x + slot]

    replay = Replay(add, [False, True], Graphs(slot.device))
    assert replay(torch.zeros(4, device="cuda"), slot)[0].tolist() == [1.0] * 4
    assert slot.tolist() == [1.0] * 4


@pytest.mark.gpu
@needs_cuda
def test_variants_share_the_memory_of_their_graphs() -> None:
    """A second function of the same size takes no more than its inputs and outputs: temporaries are shared."""

    def grow(x: Tensor) -> list[Tensor]:
        return [(x.expand(2**20, -1) * 2).sum(0)]

    record, x, taken = Graphs(torch.device("cuda")), torch.ones(64, device="cuda"), []
    replays = [Replay(grow, [False], record) for _ in range(3)]
    for call in replays:
        assert torch.equal(call(x)[0], torch.full_like(x, 2.0**21))
        torch.cuda.synchronize()
        torch.cuda.empty_cache()
        taken.append(torch.cuda.memory_reserved())
    assert taken[2] - taken[0] < 2**26 < 64 * 4 * 2**20


@pytest.mark.gpu
@needs_cuda
def test_threads_capture_while_others_run() -> None:
    """Two sessions on a stream each, at the same time and one after another, give what one alone gives."""
    model = dit().model.cuda()
    calls = [[x.cuda() for x in case("dit").inputs(step)[0]] for step in range(4)]
    policy = functools.partial(tcc.plans.fora, num_steps=4, interval=2)
    given: dict[str, Any] = {"example_inputs": (tuple(calls[0]), {}), "backend": "eager"}
    plain, replayed = (tcc.compile(model, policy, mode=mode, **given) for mode in ("default", "reduce-overhead"))
    alone = plain.new_session()
    expected = [alone(*call) for call in calls]

    def run(_: int) -> bool:
        with torch.cuda.stream(torch.cuda.Stream()):
            torch.cuda.current_stream().wait_stream(torch.cuda.default_stream())
            session = replayed.new_session()
            found = [session(*call) for call in calls]
            torch.cuda.current_stream().synchronize()
        return all(map(torch.equal, found, expected))

    torch.cuda.synchronize()
    with ThreadPoolExecutor(2) as pool:
        assert all(pool.map(run, range(8)))


@pytest.mark.parametrize("name", ["dit1", "dit3", "separate", "uvit", "mdtv2", "joint", "rotary", "masked"])
def test_random_plans_replayed_agree_with_the_reference(name: str) -> None:
    """Recorded variants, whose outputs and temporaries the next replay overwrites; folded timesteps among them."""

    def check(example: fuzz_plans.Example) -> None:
        error, call = fuzz_plans.worst_error(example, recorder=Tapes)
        assert error <= fuzz_plans.TOLERANCE, f"relative error {error:.3g} at call {call}:\n{example!r}"

    fuzz_plans.draw(3, 2, fuzz_plans.examples((name,)), check)


def recorded() -> tuple[Executable, list[Tapes]]:
    """A token plan whose sessions replay, and the recorders that they make."""
    which, made = case("dit"), []

    def recorder() -> Tapes:
        made.append(Tapes())
        return made[-1]

    executable = running.session(which, running.token_plan("dit", attention="cached", level="block")).executable
    return replace(executable, recorder=recorder), made


def images(session: Session) -> list[Tensor]:
    """The outputs of a run."""
    return [running.call(session, case("dit"), step) for step in range(running.STEPS)]


def test_what_a_session_recorded_is_taken_up_by_the_next() -> None:
    """One recording for each variant, however many sessions come after another; two at once have each their own."""
    executable, made = recorded()
    expected = images(Session(replace(executable, recorder=None)))
    for _ in range(3):
        session = Session(executable)
        assert all(map(torch.equal, images(session), expected))
        running.call(session, case("dit"), 0)  # a run that is not finished
        del session
        gc.collect()
    assert [len(tapes.made) for tapes in made] == [len(executable.runners)]
    first, second = Session(executable), Session(executable)
    for step, wanted in enumerate(expected):
        assert torch.equal(running.call(first, case("dit"), step), wanted)
        assert torch.equal(running.call(second, case("dit"), step), wanted)
    assert [len(tapes.made) for tapes in made] == [len(executable.runners)] * 2


def test_nothing_is_recorded_while_methods_are_timed() -> None:
    """The session that `warm_up` leaves is the one that a method's runs are of."""
    executable, made = recorded()
    captured = executable.program.captured
    task = compare.Task(torch.zeros(1, 4, 8, 8), torch.zeros(1, dtype=torch.int64), null_class=10, cfg=1.5)
    assert [tuple(x.shape) for x in task.first_call()[0]] == [spec.shape for spec in captured.inputs]
    compare.warm_up(task, [executable])
    method, count = compare.of_executable("plan", executable, 1.0), len(executable.runners)
    assert [len(tapes.made) for tapes in made] == [count]
    compare.compare(task, [method], baseline="plan", rounds=2, at_most=60)
    assert [len(tapes.made) for tapes in made] == [count]


class Several(nn.Module):
    """Returns more than a tensor."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = fill(Tokens([Block(16), Block(16)]))

    def forward(self, x: Tensor) -> tuple[Tensor, None, dict[str, int]]:
        """The sample, and what says something about it."""
        return self.inner(x), None, {"channels": 3}


def test_outputs_that_are_no_tensors_are_replayed() -> None:
    """None and a number stay what they are."""
    model, x = Several().eval(), noise(1, 16, 16)
    compiled = tcc.compile(model, tcc.plans.full(tcc.inspect(model, x), num_steps=2), backend="eager")
    executable = compiled.prepare(x)._executable(0)
    session = Session(replace(executable, recorder=Tapes))
    for seed in range(3):
        (found, *rest), expected = session(noise(1, 16, 16, seed=seed)), model(noise(1, 16, 16, seed=seed))[0]
        assert torch.equal(found, expected)
        assert rest == [None, {"channels": 3}]


def test_a_call_that_cannot_be_recorded_leaves_the_slots_as_they_were() -> None:
    """The error is ours, and names what went wrong first."""
    slot = torch.zeros(4)

    def fail(call: Callable[[], Sequence[Any]], warm_ups: int) -> Any:
        for _ in range(warm_ups):
            call()
        try:
            raise RuntimeError("operation not permitted when stream is capturing\nand more")
        finally:
            raise RuntimeError("capture was invalidated")

    def add(slot: Tensor) -> list[Tensor]:
        return [slot.add_(1)]

    with pytest.raises(
        CallError, match=r"captured as a CUDA graph: operation not permitted when stream is capturing\."
    ):
        Replay(add, [True], fail)(slot)
    assert slot.tolist() == [0.0] * 4


def test_inputs_on_several_devices_are_not_captured() -> None:
    """A graph would keep the timestep of its first call."""
    program = running.session(case("dit"), running.token_plan("dit")).executable.program

    def on(*devices: str) -> Any:
        inputs = [replace(s, device=torch.device(d)) for s, d in zip(program.captured.inputs, devices, strict=True)]
        return replace(program, captured=replace(program.captured, inputs=tuple(inputs)))

    message = r"input 't' is on cpu, and 'x' on cuda:1: a CUDA graph reads inputs on one device only\. Move it there"
    with pytest.raises(CallError, match=message):
        _recorder(on("cuda:1", "cpu", "cuda:1"), "reduce-overhead")
    assert _recorder(on("cuda:1", "cpu", "cuda:1"), "default") is None
    assert _recorder(program, "reduce-overhead") is None
    assert _recorder(on("cuda:1", "cuda:1", "cuda:1"), "reduce-overhead") is not None
