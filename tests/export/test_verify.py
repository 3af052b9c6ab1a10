"""Verification: random calls cover what a bundle takes, and a bundle that ignores a part of it is caught."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from tcc.cli.export import check
from tcc.cli.subjects import Subject
from tcc.errors import ExportError
from tcc.export import load
from tcc.export.inputs import describe, random_inputs
from tcc.export.manifest import Input, file_entry
from tcc.export.verify import verify
from tests.export.bundles import flat_inputs, mixed, session
from tests.export.mutations import rewrite
from tests.running import CLOSE
from tests.tiny_models import case

onnx = pytest.importorskip("onnx", reason="needs the ONNX packages: pip install 'tcc[onnx]'")


def freeze(folder: Path, name: str, value: torch.Tensor) -> None:
    """Alter every graph of a bundle, as a bad exporter would: what reads the input `name` reads a constant instead."""

    def change(document: dict[str, Any]) -> None:
        for graph in document["graphs"]:
            proto = onnx.load(folder / graph["file"], load_external_data=False)
            proto.graph.initializer.append(onnx.numpy_helper.from_array(value.numpy(), "frozen"))
            for node in proto.graph.node:
                node.input[:] = ["frozen" if given == name else given for given in node.input]
            (folder / graph["file"]).write_bytes(proto.SerializeToString())
            document["files"][graph["file"]] = vars(file_entry(folder / graph["file"]))

    rewrite(folder, change)


@pytest.mark.parametrize("number", [1, 2], ids=["timestep", "label"])
@pytest.mark.parametrize("name", ["dit", "uvit"])
def test_a_bundle_with_a_constant_input_is_caught(name: str, number: int, written: Any, tmp_path: Path) -> None:
    """It computes what the model does only where all calls have that constant."""
    which, folder = case(name), Path(shutil.copytree(written(name).folder, tmp_path / "bundle"))
    constant = which.args[number]
    freeze(folder, ("x", "t", "y")[number], constant)

    def worst(inputs: Callable[[int], list[torch.Tensor]]) -> float:
        return max(error.relative for error in verify(load(folder, device="cpu"), session(which), inputs))

    def with_constant(step: int) -> list[torch.Tensor]:
        return [constant if i == number else tensor for i, tensor in enumerate(flat_inputs(which, step))]

    assert worst(with_constant) < CLOSE
    assert worst(lambda step: flat_inputs(which, step)) > 100 * CLOSE


def test_the_command_refuses_a_bundle_with_a_constant_input(written: Any, tmp_path: Path) -> None:
    """`tcc export --verify` lets the bundle pass that was written, and stops at one that forgot the labels."""
    which, folder = case("dit"), Path(shutil.copytree(written("dit").folder, tmp_path / "bundle"))
    subject, plan = Subject(which.model, which.args, which.kwargs, "tiny"), mixed(which.info)
    assert max(error.relative for error in check(folder, subject, plan, "eager")) < CLOSE
    freeze(folder, "y", which.args[2])
    with pytest.raises(ExportError, match=r"differs by .* of the largest value, .* do not ship this bundle"):
        check(folder, subject, plan, "eager")


def test_random_calls_cover_the_schedule_and_the_tables() -> None:
    """Timesteps fall from 1000 to 0 in as many parts as there are steps; every row of a table comes up."""
    which = case("dit")
    call = random_inputs(describe(which.info.captured), [*which.args], 20)
    calls = [call(step) for step in range(20)]
    for step, (x, t, y) in enumerate(calls):
        assert (x.dtype, t.dtype, y.dtype) == (torch.float32, torch.int64, torch.int64)
        assert ((950 - 50 * step <= t) & (t < 1000 - 50 * step)).all()
    assert {label for *_, y in calls for label in y.tolist()} == set(range(11))  # ten classes, and none
    assert len({float(x.sum()) for x, *_ in calls}) == 20
    assert all(torch.equal(a, b) for a, b in zip(call(3), calls[3], strict=True))
    again = random_inputs(describe(which.info.captured), [*which.args], 20, seed=1)(3)
    assert not torch.equal(again[0], calls[3][0])


def test_masks_and_fractions_stay_what_they_are() -> None:
    """A mask is made of the values that the given one has, and never empty; noise levels of at most 1 stay so."""
    mask = torch.tensor([[1.0, 1.0, 0.0], [1.0, 0.0, 0.0]])
    specs = (
        Input("mask", (2, 3), "float32", role="mask", axes=("batch", "rows")),
        Input("t", (2,), "float32", role="timestep", axes=("batch",)),
        Input("row", (2,), "int64", role="timestep", axes=("batch",), values=4),
        Input("size", (2,), "int64", role="number", axes=("batch",)),
    )
    given = [mask, torch.tensor([0.5, 0.5]), torch.tensor([1, 1]), torch.tensor([64, 96])]
    calls = [random_inputs(specs, given, 8)(step) for step in range(8)]
    assert all(set(m.flatten().tolist()) <= {0.0, 1.0} and bool((m[:, 0] == 1).all()) for m, *_ in calls)
    assert len({tuple(m.flatten().tolist()) for m, *_ in calls}) > 2
    levels = [float(t.max()) for _, t, *_ in calls]
    assert levels == sorted(levels, reverse=True)
    assert 1 >= levels[0] > 0.87
    assert {row for *_, rows, _ in calls for row in rows.tolist()} == {0, 1, 2, 3}
    assert {size for *_, sizes in calls for size in sizes.tolist()} == {64, 96}


def test_a_bundle_says_what_its_inputs_are(written: Any) -> None:
    """Each by its part in sampling, its axes and its range."""
    found = {spec.name: spec for spec in written("hf_pixart").manifest.inputs}
    assert {name: spec.role for name, spec in found.items()} == {
        "hidden_states": "sample", "encoder_hidden_states": "embedding", "timestep": "timestep",
        "encoder_attention_mask": "mask",
    }  # fmt: skip
    assert found["encoder_hidden_states"].axes == ("batch", "rows", "channels")
    x, t, y = written("dit").manifest.inputs
    assert x.axes == ("batch", "channels", "height", "width")
    assert (t.role, t.values, y.role, y.values) == ("timestep", 0, "label", 11)
    assert str(y) == "y: int64 in 0 to 10, 2 batch; a label for each sample"
    assert len({spec.meaning for spec in (x, t, y, *found.values())}) == 5
