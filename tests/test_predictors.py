"""Predictors: what the three forms return, how they start, what trains, and what the files hold."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import safetensors
import safetensors.torch
import torch

from tcc.errors import PlanError
from tcc.learned import Importance, Probes, Router, load_learned, save_learned
from tcc.train.predictors import (
    FORMS,
    NetworkPredictor,
    Predictor,
    Sizes,
    StreamPredictor,
    TablePredictor,
    _shift,
    load_predictor,
)
from tests.tiny_models import case, noise

SIZES = Sizes(steps=5, blocks=2, tokens=16, width=32, grid=(4, 4))
STREAM = noise(3, 16, 32)
#: what every step has for itself
PER_STEP = {"table": ["table"], "network": [], "stream": ["weight", "bias"]}


def scrambled(form: str, sizes: Sizes = SIZES) -> Predictor:
    """A predictor with random weights everywhere."""
    predictor, draw = FORMS[form](sizes, seed=3), torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in predictor.parameters():
            parameter.copy_(0.3 * torch.randn(parameter.shape, generator=draw))
    return predictor


def count(predictor: Predictor) -> int:
    """The trained numbers."""
    return sum(parameter.numel() for parameter in predictor.parameters())


@pytest.mark.parametrize("form", FORMS)
def test_it_starts_halfway(form: str) -> None:
    """Importance 0.5 for every token, block and step, `[1 or B, blocks, S]`; the seed decides the weights."""
    predictor = FORMS[form](SIZES, seed=4)
    for step in range(SIZES.steps):
        w = predictor(step, STREAM)
        assert torch.equal(w, torch.full((3 if form == "stream" else 1, 2, 16), 0.5))
    same, other = FORMS[form](SIZES, seed=4).state_dict(), FORMS[form](SIZES, seed=5).state_dict()
    assert all(torch.equal(value, same[name]) for name, value in predictor.state_dict().items())
    differ = any(not torch.equal(value, other[name]) for name, value in predictor.state_dict().items())
    assert differ == (form != "table")


@pytest.mark.parametrize("form", FORMS)
def test_a_mean_that_is_held(form: str) -> None:
    """Per step and sample, however uneven the weights are; these only distribute it."""
    free, held = scrambled(form), FORMS[form](SIZES, mean=0.3)
    assert torch.allclose(held(2, STREAM), torch.tensor(0.3))
    held.load_state_dict(free.state_dict())
    found = held(2, STREAM)
    torch.testing.assert_close(found.mean(dim=(1, 2)), torch.full((len(found),), 0.3), rtol=0, atol=1e-5)
    logits = found.logit()
    torch.testing.assert_close(logits - logits[:, :1, :1], (x := free.logits(2, STREAM)) - x[:, :1, :1])


def test_a_held_mean_is_not_evaded() -> None:
    """A few tokens of very low logits do not let all others be computed, as holding the mean logit would."""
    held = TablePredictor(SIZES, mean=0.3)
    with torch.no_grad():
        held.table[2][0] = -1e4
        held.table[2][1:] = 5.0
    assert held(2).mean().item() == pytest.approx(0.3, abs=1e-5)


def test_the_gradient_of_a_held_mean() -> None:
    """As by finite differences, and zero in the direction of all logits at once."""
    table = torch.randn(1, SIZES.blocks, SIZES.tokens, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda logits: torch.sigmoid(logits + _shift(logits, 0.3)), table)
    (gradient,) = torch.autograd.grad((torch.sigmoid(table + _shift(table, 0.3)) ** 2).sum(), table)
    assert float(gradient.sum()) == pytest.approx(0.0, abs=1e-9)


@pytest.mark.parametrize("mean", [0.0, 1.0, float("nan")])
def test_a_mean_that_cannot_be_held(mean: float) -> None:
    """At 0 and 1 there is nothing to distribute."""
    with pytest.raises(PlanError, match="a mean importance that is held lies between 0 and 1"):
        FORMS["table"](SIZES, mean=mean)


@pytest.mark.parametrize("form", FORMS)
def test_any_importances_can_be_learned_on_one_step(form: str) -> None:
    """A gradient reaches all parameters but those of other steps; 400 steps of Adam come close to one target."""
    predictor = FORMS[form](SIZES)
    target = torch.rand(2, 16, generator=torch.Generator().manual_seed(0)) * 0.8 + 0.1
    optimizer = torch.optim.Adam(predictor.parameters(), lr=0.05)
    for _ in range(400):
        loss = (predictor(2, STREAM[:1]) - target).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    left = {name for name, p in predictor.named_parameters() if p.grad is None}
    assert all(bool(p.grad.abs().any()) for p in predictor.parameters() if p.grad is not None)
    assert left == {f"{n}.{i}" for n in PER_STEP[form] for i in (0, 1, 3, 4)}
    assert float(loss.detach()) < 1e-3 < float((target - 0.5).square().mean())


def test_the_table_is_its_logits() -> None:
    """One number per step, block and token."""
    predictor = scrambled("table")
    assert count(predictor) == 5 * 2 * 16
    assert torch.equal(predictor(3)[0], torch.sigmoid(predictor.get_parameter("table.3")))


def test_the_network_grows_with_the_blocks_alone() -> None:
    """`(blocks + 10 (1 + axes) + 1 + hidden + 2) hidden + 1` parameters, for any number of steps and tokens."""
    for sizes in (SIZES, replace(SIZES, steps=1000, tokens=4096, grid=(64, 64)), replace(SIZES, blocks=28)):
        assert count(NetworkPredictor(sizes, hidden=8)) == (sizes.blocks + 30 + 1 + 8 + 2) * 8 + 1
    no_grid = NetworkPredictor(replace(SIZES, grid=()), hidden=8)
    assert count(no_grid) == (2 + 20 + 1 + 8 + 2) * 8 + 1
    assert no_grid(0).shape == (1, 2, 16)


def test_the_network_knows_block_step_and_place() -> None:
    """Changing one of them changes the importance; rows and columns are told apart."""
    w = scrambled("network").importance().scores
    assert not torch.equal(w[0], w[1])
    assert not torch.equal(w[:, 0], w[:, 1])
    places = w[0, 0].view(4, 4)
    assert not torch.equal(places, places.T)
    assert len(set(places.flatten().tolist())) == 16


def test_the_stream_form_is_the_network_that_it_exports() -> None:
    """`sigmoid(gelu(layer_norm(x) @ hidden + offset) @ weight + bias)`, per sample."""
    predictor = scrambled("stream")
    learned = predictor.learned()
    assert isinstance(learned, Probes)
    x = (STREAM - STREAM.mean(-1, keepdim=True)) / (STREAM.var(-1, unbiased=False, keepdim=True) + 1e-5).sqrt()
    x = x @ learned.hidden + learned.offset
    x = x * 0.5 * (1 + torch.erf(x / math.sqrt(2)))
    for block in range(2):
        expected = x @ learned.weight[4, block] + learned.bias[4, block]
        torch.testing.assert_close(predictor(4, STREAM)[:, block], torch.sigmoid(expected))
    assert not torch.equal(predictor(4, STREAM)[0], predictor(4, STREAM)[1])


def test_a_stream_in_half_precision_gives_float32() -> None:
    """The predictor computes in its own dtype."""
    predictor = scrambled("stream")
    half = predictor(0, STREAM.bfloat16())
    assert half.dtype == torch.float32
    torch.testing.assert_close(half, predictor(0, STREAM.bfloat16().float()), rtol=0, atol=0)


def test_calibration_averages_over_samples() -> None:
    """The mean importance of every step is that of the streams given for it."""
    predictor = StreamPredictor(SIZES)
    predictor.load_state_dict(scrambled("stream").state_dict())
    streams = [noise(3, 16, 32, seed=step) for step in range(5)]
    predictor.calibrate(streams)
    assert torch.equal(predictor.importance().scores[3], predictor(3, streams[3]).mean(0))
    assert torch.equal(predictor.learned().mean, predictor.importance().scores)


def test_the_stream_form_needs_the_stream() -> None:
    """And says so."""
    with pytest.raises(PlanError, match="call it with the stream that enters block 0"):
        StreamPredictor(SIZES)(0)


def test_sizes_of_a_model() -> None:
    """Steps are given; blocks, tokens, width and grid are the model's, and no grid where there is none."""
    assert Sizes.of(case("dit").info, 5) == SIZES
    assert Sizes.of(case("separate").info, 7) == Sizes(7, 2, 12, 16, ())


@pytest.mark.parametrize("form", FORMS)
def test_a_saved_predictor_is_the_same(form: str, tmp_path: Path) -> None:
    """The form, the sizes and every bit of the weights, also of other widths than the default."""
    predictor: Predictor = scrambled(form)
    if form != "table":
        predictor = FORMS[form](SIZES, mean=0.25, hidden=24)  # type: ignore[call-arg]
    predictor.save(tmp_path / "g.safetensors")
    loaded = load_predictor(tmp_path / "g.safetensors")
    assert type(loaded) is type(predictor)
    assert loaded.sizes == SIZES
    for step in range(SIZES.steps):
        assert torch.equal(loaded(step, STREAM), predictor(step, STREAM))
    assert [file.name for file in tmp_path.iterdir()] == ["g.safetensors"]


def bad_predictors(folder: Path) -> dict[str, Path]:
    """Files that are no predictor."""
    header = {"form": "table", "sizes": {"steps": 1, "blocks": 1, "tokens": 4, "width": 8, "grid": [2, 2]}}
    header |= {"mean": None}
    contents: dict[str, tuple[dict[str, torch.Tensor], Any]] = {
        "bare tensors": ({"table.0": torch.zeros(1, 4)}, None),
        "another form": ({"table.0": torch.zeros(1, 4)}, header | {"form": "oracle"}),
        "no sizes": ({"table.0": torch.zeros(1, 4)}, {"form": "table"}),
        "wrong shape": ({"table.0": torch.zeros(2, 4)}, header),
        "extra tensor": ({"table.0": torch.zeros(1, 4), "more": torch.zeros(1)}, header),
    }
    for name, (tensors, head) in contents.items():
        meta = {"tcc.predictor": json.dumps(head)} if head else None
        safetensors.torch.save_file(tensors, folder / name, metadata=meta)
    (folder / "text").write_text("no tensors")
    return {path.name: path for path in folder.iterdir()}


def test_other_files_are_refused(tmp_path: Path) -> None:
    """Every one with its name, and what to do."""
    files = bad_predictors(tmp_path)
    assert len(files) == 6
    for path in files.values():
        with pytest.raises(PlanError, match=f"{path.name} is no predictor: make one with `tcc train predictor`"):
            load_predictor(path)
    with pytest.raises(PlanError, match=r"there is no file .*missing"):
        load_predictor(tmp_path / "missing")


def test_what_cannot_be_written_is_said(tmp_path: Path) -> None:
    """A predictor and what was learned; safetensors raises an error of its own."""
    with pytest.raises(PlanError, match=r"missing.p\.partial: the predictor cannot be written .*: write to"):
        scrambled("table").save(tmp_path / "missing" / "p")
    with pytest.raises(PlanError, match=r"missing.s: what was learned cannot be written"):
        save_learned(Router(torch.zeros(1, 1), ("a.out",)), tmp_path / "missing" / "s")


# --- what was learned, as files


@pytest.mark.parametrize(
    "learned",
    [
        Router(torch.tensor([[float("nan"), float("nan")], [0.25, 0.5]]), ("a.out", "b.out")),
        Importance(torch.arange(24.0).view(2, 3, 4) / 32),
        StreamPredictor(SIZES).learned(),
    ],
    ids=lambda x: type(x).__name__,
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_what_was_learned_is_read_back(learned: Any, dtype: torch.dtype, tmp_path: Path) -> None:
    """Tensors come back as float32, rounded to what the file stores; names come back as they were."""
    save_learned(learned, tmp_path / "f", dtype)
    loaded = load_learned(tmp_path / "f")
    assert type(loaded) is type(learned)
    for name, value in vars(learned).items():
        if isinstance(value, torch.Tensor):
            torch.testing.assert_close(getattr(loaded, name), value.to(dtype).float(), rtol=0, atol=0, equal_nan=True)
        else:
            assert getattr(loaded, name) == value


@pytest.mark.parametrize("bad", [1.5, -0.25, float("nan"), float("inf")])
def test_importances_lie_between_0_and_1(bad: float) -> None:
    """The message says which one does not."""
    scores = torch.rand(2, 3, 4)
    scores[1, 0, 3] = bad
    with pytest.raises(PlanError, match=rf"step 1, block 0, token 3: the importance is {bad}; they lie in 0\.\.1"):
        Importance(scores)


def test_probes_of_sizes_that_disagree_are_refused() -> None:
    """Each tensor has its shape, and they fit each other."""
    good = StreamPredictor(SIZES).learned()
    with pytest.raises(PlanError, match=r"probes are \[D, H\], \[H\]"):
        replace(good, offset=good.hidden)
    with pytest.raises(PlanError, match="the sizes of the probes do not agree"):
        replace(good, mean=good.mean[:, :, :-1])


def test_a_file_of_something_else_is_refused(tmp_path: Path) -> None:
    """A predictor's weights are not what was learned for a plan; nor are files with other entries."""
    scrambled("table").save(tmp_path / "weights")
    header = {"tcc.learned": json.dumps({"kind": "importance"})}
    safetensors.torch.save_file({"numbers": torch.zeros(2)}, tmp_path / "other", metadata=header)
    for name in ("weights", "other"):
        with pytest.raises(PlanError, match=f"{name} is no router, importance or probes: make one with `tcc train "):
            load_learned(tmp_path / name)
