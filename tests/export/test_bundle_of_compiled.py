"""Bundles of compiled models that have been called, reset, changed or cast since; and rows that attend to nothing."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import tcc
from tcc.errors import CallError, ExportError
from tcc.export import bundle, load, verify
from tcc.export.runner import Runner
from tcc.plan import CachePlan, Compute, Reuse
from tests.running import CLOSE
from tests.tiny_models import Case, dit, fill, noise, relative_error, tensor_of

pytest.importorskip("onnx", reason="needs the ONNX packages: pip install 'tcc[onnx]'")


def policy(info: tcc.ModelInfo, steps: int = 4) -> CachePlan:
    """Every second step reuses the first block."""
    return info.count(CachePlan(steps, {(step, "blocks.0.delta"): Reuse() for step in range(1, steps, 2)}))


@torch.no_grad()
def uncached(which: Case) -> Tensor:
    """What the model itself computes."""
    return tensor_of(which.model(*which.args))


def called() -> tuple[Case, tcc.CompiledModel]:
    """A compiled model whose first image has begun."""
    which = dit()
    fast = tcc.compile(which.model, policy, example_inputs=(which.args, {}), backend="eager")
    fast(*which.args)
    return which, fast


def test_a_model_whose_weights_were_replaced_is_not_exported(tmp_path: Path) -> None:
    """The compiled model refuses to run then, too; values that change in place are exported."""
    which, fast = called()
    with torch.no_grad():
        next(which.model.parameters()).mul_(1.5)
    made = load(bundle(fast, out=tmp_path / "in-place").folder)
    assert relative_error(made(*which.args), uncached(which)) < CLOSE
    which.model.load_state_dict({k: 2 * v for k, v in which.model.state_dict().items()}, assign=True)
    with pytest.raises(CallError, match=r"were replaced after it was compiled, .* call tcc.compile anew"):
        bundle(fast, out=tmp_path / "replaced")


def test_a_model_whose_settings_changed_is_not_exported(tmp_path: Path) -> None:
    """Before a call has found out whether it computes the same."""
    which = dit()
    which.model.remark = "old"
    fast = tcc.compile(which.model, policy, example_inputs=(which.args, {}), backend="eager")
    which.model.remark = "new"
    with pytest.raises(CallError, match=r"'remark' of the model changed after it was compiled: call it once more"):
        bundle(fast, out=tmp_path / "changed")
    assert not (tmp_path / "changed").exists()
    with pytest.warns(UserWarning, match="'remark' of the model changed"):
        fast(*which.args)
    bundle(fast, out=tmp_path / "seen")


def test_the_whole_plan_is_exported_wherever_the_model_starts(tmp_path: Path) -> None:
    """`reset(start_step=...)` chooses a step for the images of this process."""
    which, fast = called()
    fast.reset(start_step=2)
    fast(*which.args)
    runner = load(bundle(fast, out=tmp_path / "bundle").folder)
    reference = tcc.Reference(which.model, policy)
    for _ in range(4):
        assert relative_error(runner(*which.args), tensor_of(reference(*which.args))) < CLOSE


@pytest.mark.filterwarnings("ignore:.*torch.jit.script:DeprecationWarning")  # Inductor's own imports
@pytest.mark.parametrize("target", ["onnx", pytest.param("aoti", marks=pytest.mark.compiles)])
def test_autocast_around_the_export_changes_nothing(target: str, tmp_path: Path) -> None:
    """The graph has been captured without."""
    which, fast = called()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        runner = load(bundle(fast, out=tmp_path / "bundle", target=target).folder)
    made = runner(*which.args)
    assert made.dtype == torch.float32
    assert relative_error(made, uncached(which)) < CLOSE


def test_a_bundle_is_written_to_the_folder_that_one_is_in(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """`out="."`, if it is empty."""
    which, fast = called()
    folder = tmp_path / "here"
    folder.mkdir()
    monkeypatch.chdir(folder)
    bundle(fast, out=".")
    assert relative_error(load(folder)(*which.args), uncached(which)) < CLOSE


class Attend(nn.Module):
    """Attention with a mask, and a pointwise branch."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.qkv = nn.LayerNorm(16), nn.Linear(16, 48)
        self.proj, self.up = nn.Linear(16, 16), nn.Linear(16, 16)

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        """Attend, add, compute, add."""
        q, k, v = (part.unflatten(2, (2, 8)).transpose(1, 2) for part in self.qkv(self.norm(x)).chunk(3, -1))
        seen = nn.functional.scaled_dot_product_attention(q, k, v, mask[:, None, None])
        x = x + self.proj(seen.transpose(1, 2).flatten(2))
        return x + torch.relu(self.up(self.norm(x)))


class Masked(nn.Module):
    """Two blocks of attention with a mask."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList([Attend(), Attend()])

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        """Block by block."""
        for block in self.blocks:
            x = block(x, mask)
        return x


@pytest.mark.parametrize("mask", [torch.ones(2, 12).bool(), torch.zeros(2, 12)], ids=["bool", "added"])
def test_a_row_that_attends_to_nothing_is_zero_as_in_torch(mask: Tensor, tmp_path: Path) -> None:
    """An empty prompt, for example: ONNX's attention would have the mean of all values, or no number."""
    model, x = fill(Masked(), std=0.3), noise(2, 12, 16)
    runner = load(bundle(model, lambda info: CachePlan(1, {}), ((x, mask), {}), tmp_path / "bundle").folder)
    mask = mask.clone()
    mask[1] = False if mask.dtype == torch.bool else -torch.inf
    mask[0, 3:] = mask[1, 3:]
    with torch.no_grad():
        assert relative_error(runner(x, mask), model(x, mask)) < CLOSE


class Named(nn.Module):
    """A parameter has the name of an argument, or an argument the name of the result."""

    def __init__(self, parameter: str) -> None:
        super().__init__()
        self.name, self.block = parameter, nn.Sequential(nn.Linear(16, 16), nn.GELU(), nn.Linear(16, 16))
        self.register_parameter(parameter, nn.Parameter(torch.ones(16)))

    def forward(self, x: Tensor, output: Tensor) -> Tensor:
        """Two residual additions."""
        x = x * getattr(self, self.name) + output
        x = x + self.block(x)
        out: Tensor = x + self.block(x)
        return out


def test_names_that_mean_two_things_are_refused(tmp_path: Path) -> None:
    """A graph of ONNX has one name for everything."""
    x = noise(2, 12, 16)
    for parameter, name in (("x", "x"), ("other", "output")):
        with pytest.raises(ExportError, match=rf"'{name}' is the name of more than one input, weight or output"):
            bundle(Named(parameter).eval(), CachePlan(1, {}), ((x, x), {}), tmp_path / "bundle")


def test_a_step_by_number_between_calls(tmp_path: Path) -> None:
    """Who says the step may begin a run; the calls after it go on from there."""
    which, fast = called()
    runner = load(bundle(fast, out=tmp_path / "bundle").folder)
    x, _, y = which.args

    def level(step: int) -> Tensor:
        return torch.tensor([9 - step] * 2)

    for step in range(4):
        runner(x, level(step), y)
    runner.run_step(0, x, level(0), y)
    reference = tcc.Reference(which.model, policy)
    reference(x, level(0), y)
    assert relative_error(runner(x, level(1), y), tensor_of(reference(x, level(1), y))) < CLOSE


def test_what_is_infinite_on_one_side_is_told(tmp_path: Path) -> None:
    """Half precision overflows so; a quotient of infinities is no number, and would be the largest of none."""
    which, fast = called()
    runner: Runner = load(bundle(fast, out=tmp_path / "bundle").folder)

    def compiled(*tensors: Tensor) -> Any:
        return torch.full_like(which.model(*tensors), torch.inf)

    errors = list(verify.verify(runner, compiled, lambda step: list(which.args)))
    assert [error.relative for error in errors] == [torch.inf] * 4


def test_zeros_of_both_signs_are_one_coefficient() -> None:
    """They are equal, and a bundle compares bytes."""
    first, second = Reuse(1, (1.0, 0.0)), Reuse(1, (1.0, -0.0))
    assert repr(first) == repr(second)
    assert CachePlan(3, {(0, "a.delta"): Compute()}) == CachePlan(3, {(0, "a.delta"): Compute()})
