"""Measured changes of sites, against hooks on the model's modules."""

from __future__ import annotations

import functools
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from tcc.calibrate import Calibration, Recorder, calibrate
from tcc.errors import CallError, PlanError
from tcc.samplers import sample
from tests.tiny_models import Case, case, dit, noise, tensor_of

STEPS = 5


def run(model: Any, steps: int = STEPS, seed: int = 7) -> Tensor:
    """Two images under guidance."""
    labels = torch.tensor([1, 2])
    return sample(model, noise(2, 4, 8, 8, seed=seed), labels, num_steps=steps, cfg_scale=1.5, null_class=10)


@functools.cache
def guided() -> Case:
    """The tiny DiT with the batch of a guided call for two images."""
    return dit(batch=4)


@functools.cache
def calibration() -> Calibration:
    """Of that model."""
    return calibrate(guided().info, run, num_steps=STEPS, back=2)


@functools.cache
def hooked() -> dict[str, list[Tensor]]:
    """The outputs of the attention and MLP modules at every step, by hooks on the eager model."""
    seen: dict[str, list[Tensor]] = {}
    model = guided().model
    hooks = [
        module.register_forward_hook(lambda _m, _i, out, name=name: seen.setdefault(f"{name}.out", []).append(out))
        for name, module in model.named_modules()
        if re.fullmatch(r"blocks\.\d\.(attn|mlp)", name)
    ]
    run(model)
    for hook in hooks:
        hook.remove()
    return seen


def test_it_measures_what_hooks_see() -> None:
    """Sizes, and changes over one step and two, of every branch's output; double sums, so equal to float32 rounding."""
    found = calibration()
    for site, values in hooked().items():
        column = found.sites.index(site)
        for step, value in enumerate(values):
            assert float(found.absolute[step, column]) == pytest.approx(float(value.abs().mean()), rel=1e-5)
            assert float(found.square[step, column]) == pytest.approx(float(value.square().mean()), rel=1e-5)
            for k in (1, 2):
                absolute, square = found.absolute_change[k - 1, step, column], found.square_change[k - 1, step, column]
                if step < k:
                    assert absolute.isnan()
                    assert square.isnan()
                    continue
                change = value - values[step - k]
                # the values agree to 1e-6 of their size: so do their changes, however small
                assert float(absolute) == pytest.approx(float(change.abs().mean()), rel=1e-4)
                assert float(square) == pytest.approx(float(change.square().mean()), rel=1e-4)


def test_relative_l1_is_smoothcaches() -> None:
    """|v - v'|_1 / |v|_1, over the whole batch."""
    site = "blocks.1.mlp.out"
    values = hooked()[site]
    expected = [float((a - b).norm(p=1) / a.norm(p=1)) for a, b in zip(values[2:], values, strict=False)]
    found = calibration().relative_l1(2)[2:, calibration().sites.index(site)]
    assert found.tolist() == pytest.approx(expected, rel=1e-4)


def test_no_change_of_nothing_is_no_change() -> None:
    """And a change from nothing is without bound."""
    zero, one = torch.zeros(1, 2), torch.zeros(1, 1, 2)
    one[0, 0, 1] = 1.0
    assert Calibration(("a.mlp.out", "b.mlp.out"), zero, zero, one, one).relative_l1(1).tolist() == [[0.0, torch.inf]]


def test_the_recorder_computes_the_uncached_model() -> None:
    """The images are the model's own."""
    recorder = Recorder(guided().info, num_steps=STEPS)
    torch.testing.assert_close(run(recorder), run(guided().model))


def test_runs_are_averaged() -> None:
    """Two runs of other noise: the mean of what each gives."""
    info = guided().info
    each = [calibrate(info, lambda model, s=seed: run(model, seed=s), num_steps=STEPS, back=1) for seed in (1, 2)]
    both = calibrate(info, lambda model: [run(model, seed=seed) for seed in (1, 2)], num_steps=STEPS, back=1)
    for table in ("absolute", "square", "absolute_change", "square_change"):
        mean = (getattr(each[0], table) + getattr(each[1], table)) / 2
        torch.testing.assert_close(getattr(both, table), mean, equal_nan=True)


def test_a_broken_off_run_counts_as_far_as_it_came() -> None:
    """`reset` starts anew; the steps that were run are in the means, the others are not."""
    recorder = Recorder(guided().info, num_steps=STEPS, back=1)
    x, t, y = guided().args
    recorder(x, torch.full_like(t, 999), y)
    recorder.reset()
    run(recorder)
    found = recorder.result()
    assert found.absolute[0].tolist() != calibration().absolute[0].tolist()
    torch.testing.assert_close(found.absolute[1:], calibration().absolute[1:])
    torch.testing.assert_close(found.absolute_change[0], calibration().absolute_change[0], equal_nan=True)


@pytest.mark.parametrize(
    ("calls", "message"),
    [(2 * STEPS, "step 0 is called at noise level .* and was at 999 in the run before"), (STEPS - 1, "4 of 5 steps")],
)
def test_a_loop_of_other_calls_than_steps_is_refused(calls: int, message: str) -> None:
    """What it measures would be of other steps than the plan's; a run that was left is begun anew by `reset`."""
    recorder = Recorder(guided().info, num_steps=STEPS, back=1)
    x, t, y = guided().args

    def measure() -> None:
        for level in torch.linspace(999, 0, calls).long():
            recorder(x, torch.full_like(t, int(level)), y)
        recorder.result()

    with pytest.raises(PlanError, match=message):
        measure()


def test_a_run_that_was_left_is_no_run() -> None:
    """Without a noise level, the count of calls alone tells."""
    info = case("separate").info
    recorder = Recorder(info, num_steps=2, back=1)
    for _ in range(3):
        recorder(*case("separate").args)
    with pytest.raises(PlanError, match=r"the last run ended after 1 of 2 steps: num_steps counts .* call reset"):
        recorder.result()


def test_sites_of_every_kind() -> None:
    """A block's change is the sum of its branches' changes, keys and values are one measure, streams are values."""
    which, site = case("dit"), "blocks.0"
    names = [f"{site}.attn.kv", f"{site}.attn.delta", f"{site}.mlp.delta", f"{site}.delta", f"{site}.stream"]
    names.append("blocks.1.stream")
    values: dict[str, Tensor] = {}
    recorder = Recorder(which.info, num_steps=1, sites=names)
    tensor_of(recorder(*which.args))
    found = recorder.result()
    blocks = which.model.blocks
    streams: list[Tensor] = []
    hooks = [block.register_forward_hook(lambda _m, args, out: streams.extend((args[0], out))) for block in blocks]
    qkv = blocks[0].attn.qkv.register_forward_hook(lambda _m, _i, out: values.update(qkv=out))
    with torch.no_grad():
        which.model(*which.args)
    for hook in (*hooks, qkv):
        hook.remove()
    expected = [values["qkv"][..., 32:], streams[1] - streams[0], streams[0], streams[1]]
    columns = [names.index(n) for n in (f"{site}.attn.kv", f"{site}.delta", f"{site}.stream", "blocks.1.stream")]
    for column, value in zip(columns, expected, strict=True):
        assert float(found.square[0, column]) == pytest.approx(float(value.square().mean()), rel=1e-5)


def test_a_calibration_survives_its_file(tmp_path: Path) -> None:
    """Bit for bit, NaN included."""
    calibration().save(tmp_path / "errors.safetensors")
    loaded = Calibration.load(tmp_path / "errors.safetensors")
    assert (loaded.sites, loaded.num_steps, loaded.back) == (calibration().sites, STEPS, 2)
    for table in ("absolute", "square", "absolute_change", "square_change"):
        torch.testing.assert_close(
            getattr(loaded, table), getattr(calibration(), table), rtol=0, atol=0, equal_nan=True
        )


def test_a_file_that_cannot_be_written_is_said(tmp_path: Path) -> None:
    """A folder is in its place."""
    with pytest.raises(PlanError, match=r"the calibration cannot be written .*: write to"):
        calibration().save(tmp_path)


def test_files_that_are_none_are_refused(tmp_path: Path) -> None:
    """Missing, text, cut off."""
    with pytest.raises(PlanError, match=r"there is no file .*errors\.safetensors"):
        Calibration.load(tmp_path / "errors.safetensors")
    calibration().save(tmp_path / "whole")
    for content in (b"{}", (tmp_path / "whole").read_bytes()[:200]):
        (tmp_path / "errors.safetensors").write_bytes(content)
        with pytest.raises(PlanError, match="is not a calibration: make one with"):
            Calibration.load(tmp_path / "errors.safetensors")


def test_what_cannot_be_measured_is_refused() -> None:
    """An unknown site, no steps, an unfinished run, tables that do not fit, a loop of another length."""
    info = guided().info
    with pytest.raises(PlanError, match=r"site 'blocks.9.mlp.out': the model has no such site"):
        Recorder(info, num_steps=2, sites=["blocks.9.mlp.out"])
    with pytest.raises(PlanError, match="num_steps=0, back=3: both are at least 1"):
        Recorder(info, num_steps=0)
    with pytest.raises(PlanError, match="num_steps=2, back=0: both are at least 1"):
        Recorder(info, num_steps=2, back=0)
    with pytest.raises(PlanError, match="1 of 2 steps were measured"):
        calibrate(info, lambda model: model(*guided().args), num_steps=2)
    with pytest.raises(CallError, match="the sampler runs 5 steps, but the model's plan has 6"):
        calibrate(info, run, num_steps=6)
    tables = [torch.zeros(2, 1), torch.zeros(2, 1), torch.zeros(1, 2, 1), torch.zeros(2, 2, 1)]
    with pytest.raises(PlanError, match=r"and 'square_change' is \[2, 2, 1\]"):
        Calibration(("a.mlp.out",), *tables)


def test_what_is_not_finite_is_refused(tmp_path: Path) -> None:
    """With step and site: plans would be made from it. Changes from before the run are none, and no mistake."""
    with pytest.raises(PlanError, match=r"step 0, site 'blocks\.0\.attn\.out': the measured 'absolute' is not finite"):
        calibrate(guided().info, lambda model: run(lambda x, t, y: model(x * torch.nan, t, y)), num_steps=STEPS)
    change = torch.full((2, 3, 1), torch.nan)
    change[0, 1:] = 1.0
    change[1, 2:] = torch.inf
    with pytest.raises(PlanError, match=r"step 2, site 'a.mlp.out': the measured 'square_change' is not finite"):
        Calibration(("a.mlp.out",), torch.ones(3, 1), torch.ones(3, 1), change.nan_to_num(posinf=1.0), change)
    found = calibration()
    found.save(tmp_path / "errors")
    tables = load_file(tmp_path / "errors")
    with safe_open(tmp_path / "errors", "pt") as file:
        header = file.metadata()
    tables["square"][3, 1] = torch.nan
    save_file(tables, tmp_path / "errors", header)
    with pytest.raises(PlanError, match=f"errors: step 3, site '{found.sites[1]}': the measured 'square'"):
        Calibration.load(tmp_path / "errors")


def test_columns_must_fit_the_plan() -> None:
    """Steps, reach and sites."""
    found = calibration()
    assert found.columns(["blocks.0.mlp.out"], STEPS, 2) == [found.sites.index("blocks.0.mlp.out")]
    with pytest.raises(PlanError, match="measured 5 steps, and num_steps=6"):
        found.columns([], 6, 1)
    with pytest.raises(PlanError, match="looks 2 steps back, and 3 are needed: measure with back=3"):
        found.columns([], STEPS, 3)
    with pytest.raises(PlanError, match=r"did not measure site 'blocks\.9\.mlp\.out'"):
        found.columns(["blocks.9.mlp.out"], STEPS, 1)
