"""What a graph of ONNX may do, and how large its values may get: read from the file before ONNX Runtime sees it."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tcc.errors import BundleError, ExportError
from tcc.export import load
from tcc.export.onnx_operators import OPERATORS, largest_value
from tests.export.mutations import BODIES, edit_graph, expand, forge, recount, rewrite

onnx = pytest.importorskip("onnx", reason="needs the ONNX packages: pip install 'tcc[onnx]'")
FLOAT = onnx.TensorProto.FLOAT


def altered(original: Path, folder: Path, edit: Callable[[Any], object]) -> Path:
    """A copy of a bundle whose first graph was edited, by someone who counts and forges everything anew."""
    shutil.copytree(original, folder)
    edit_graph(folder / "step0.onnx", edit)
    recount(folder)
    forge(folder)
    return folder


def relu(model: Any, **settings: Any) -> Any:
    """An operator more, on the first output's value; returns its node."""
    node = onnx.helper.make_node("Relu", [model.graph.output[0].name], ["more"], **settings)
    model.graph.node.append(node)
    model.graph.value_info.add(name="more").type.CopyFrom(model.graph.output[0].type)
    return model.graph.node[-1]


def of_an_input(model: Any) -> None:
    """A value as large as a caller says."""
    model.graph.input.append(onnx.helper.make_tensor_value_info("size", onnx.TensorProto.INT64, [1]))
    expand(model, target="size")


def overridden(model: Any) -> None:
    """The same; the caller is offered a default."""
    expand(model)
    model.graph.input.append(onnx.helper.make_tensor_value_info("many", onnx.TensorProto.INT64, [1]))


def function(model: Any) -> None:
    """An operator of the file's own."""
    model.functions.add(name="Relu", domain="")


HARM: dict[str, tuple[Callable[[Any], object], str]] = {
    "loop": (BODIES["loop"], r"step0.onnx: an operator 'Loop', which no export writes: do not use this bundle"),
    "choice": (BODIES["choice"], r"an operator 'If', which no export writes"),
    "constant": (BODIES["constant"], r"an operator 'ConstantOfShape', which no export writes"),
    "repeat": (BODIES["repeat"], rf"the graph has {3 * 2**30} bytes in its largest value, and the manifest says \d+:"),
    "lie": (BODIES["lie"], r"ONNX Runtime cannot read the graph .*Inferred=805306368 Declared=1"),
    "of an input": (of_an_input, r"an operator Expand whose result is as large as the data say"),
    "overridden": (overridden, r"an operator Expand whose result is as large as the data say"),
    "domain": (lambda m: relu(m, domain="com.microsoft"), r"an operator 'com.microsoft::Relu', which no"),
    "opset": (lambda m: m.opset_import.add(domain="x", version=1), r"its operators are of \[\('', 22\), \('x', 1\)\]"),
    "function": (function, r"not a graph of ONNX that tcc wrote \(the model has the field 25\)"),
    "overload": (lambda m: setattr(relu(m), "overload", "x"), r"an operator of the kind 'x'"),
    "sparse": (lambda m: m.graph.sparse_initializer.add(), r"the graph has the field 15"),
    "unknown size": (lambda m: m.graph.value_info.pop(), r"a value '.*' of unknown size, which no export writes"),
}


@pytest.mark.parametrize("kind", HARM)
def test_a_graph_that_does_harm_is_refused(kind: str, small: Path, tmp_path: Path) -> None:
    """Before it runs, under checksums, stamps and counts that fit."""
    edit, message = HARM[kind]
    with pytest.raises(BundleError, match=message):
        load(altered(small, tmp_path / "bundle", edit), device="cpu")


def test_operators_are_counted(small: Path, tmp_path: Path) -> None:
    """One more than the manifest says; with the manifest's consent, one more is no harm."""
    folder = altered(small, tmp_path / "more", relu)
    load(folder, device="cpu")
    rewrite(folder, lambda document: document["graphs"][0].update(operators=1))
    with pytest.raises(BundleError, match=r"step0.onnx: the graph has \d+ operators, and the manifest says 1: the"):
        load(folder, device="cpu")


def test_what_is_declared_is_bounded(small: Path) -> None:
    """A bundle may say of itself that it computes much; the caller says how much is too much."""
    load(small, device="cpu", max_value_bytes=2**20)
    with pytest.raises(BundleError, match=r"small: a value of .* KiB; at most 10 B: pass max_value_bytes if that is"):
        load(small, device="cpu", max_value_bytes=10)


def test_what_a_loader_would_refuse_is_not_exported(tmp_path: Path) -> None:
    """An operator that is not in the list: at export, not when the bundle is opened."""
    assert "Sinh" not in OPERATORS
    ends = [onnx.helper.make_tensor_value_info(name, FLOAT, [2, 3]) for name in "xy"]
    for operator in ("Sinh", "Sin"):
        graph = onnx.helper.make_graph([onnx.helper.make_node(operator, ["x"], ["y"])], "g", ends[:1], ends[1:])
        model = onnx.helper.make_model(graph, opset_imports=[onnx.helper.make_opsetid("", 22)], ir_version=10)
        onnx.save(model, tmp_path / f"{operator}.onnx")
    assert largest_value(tmp_path / "Sin.onnx") == 24
    with pytest.raises(ExportError, match=r"the graph's ONNX form has an operator 'Sinh'; .* use the target aoti"):
        largest_value(tmp_path / "Sinh.onnx")
