"""CUDA graphs: captured variants give what plain calls give."""

import pytest
import torch

import tcc
from tcc.cuda_graphs import Replay
from tcc.models import DiT


def test_unknown_mode_is_refused_by_name() -> None:
    """A mode that does not exist is an error that names the ones that do."""
    model = DiT(input_size=8, patch_size=2, hidden_size=32, depth=2, num_heads=2, num_classes=10).eval()
    inputs = (torch.zeros(1, 4, 8, 8), torch.zeros(1, dtype=torch.int64), torch.zeros(1, dtype=torch.int64))
    plan = tcc.CachePlan(num_steps=1, actions={})
    with pytest.raises(tcc.errors.CallError, match="mode='fast': use 'default', or 'reduce-overhead'"):
        tcc.compile(model, plan, example_inputs=(inputs, {}), backend="eager", mode="fast")


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="CUDA graphs need a CUDA device, and there is none")
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
@pytest.mark.skipif(not torch.cuda.is_available(), reason="CUDA graphs need a CUDA device, and there is none")
def test_capturing_leaves_the_slots_as_they_were() -> None:
    """The warm-up calls before a capture do not count: a slot that adds one per call has added one after one call."""
    slot = torch.zeros(4, device="cuda")

    def add(x: torch.Tensor, slot: torch.Tensor) -> list[torch.Tensor]:
        slot.add_(1)
        return [x + slot]

    replay = Replay(add, [False, True])
    assert replay(torch.zeros(4, device="cuda"), slot)[0].tolist() == [1.0] * 4
    assert slot.tolist() == [1.0] * 4
