"""What users and readers rely on: names, signatures, docstrings, sizes, and which way dependencies point."""

from __future__ import annotations

import ast
import dataclasses
import importlib
import inspect
import pkgutil
import re
import subprocess
import sys
import types
from pathlib import Path

import pytest

import tcc
import tcc.passes
from tcc import errors
from tcc.passes.base import Pass
from tcc.passes.pipeline import StepKind, variant_passes

ROOT = Path(__file__).parents[1]
SOURCES = sorted(
    path for folder in ("tcc", "passes", "export", "tests", "benchmarks") for path in (ROOT / folder).rglob("*.py")
)
FUNCTION_LINES, FILE_LINES = 80, 400

PUBLIC = {
    "CachePlan", "CompiledModel", "Compute", "Hold", "ModelInfo", "Reference", "Reuse", "Schedule", "Skip", "TopK",
    "Update", "compile", "errors", "inspect", "plans",
}  # fmt: skip


def test_the_public_names() -> None:
    """`tcc` offers these names, and no submodule stands in the place of a function."""
    assert set(tcc.__all__) >= PUBLIC
    assert all(hasattr(tcc, name) for name in tcc.__all__)
    assert not isinstance(tcc.compile, types.ModuleType)
    assert not isinstance(tcc.inspect, types.ModuleType)
    assert tcc.plans.tprr is importlib.import_module("tcc.plans").tprr
    assert set(tcc.plans.__all__) >= set(tcc.plans.POLICIES) >= {"full", "fora", "l2c", "tprr"}


def test_the_signatures_of_design() -> None:
    """As the design writes them: the model and the plan, then options by keyword."""
    assert list(inspect.signature(tcc.compile).parameters)[:3] == ["model", "plan", "example_inputs"]
    for policy in tcc.plans.POLICIES.values():
        first, *options = inspect.signature(policy).parameters.values()
        assert first.name == "info"
        assert all(option.kind is inspect.Parameter.KEYWORD_ONLY for option in options)
        assert options[0].name == "num_steps"
    offered = {"reset", "new_session", "cache_context", "plan", "info", "program"}
    assert offered <= set(dir(tcc.CompiledModel))
    assert {"save", "load", "summary", "plot", "macs", "bound", "schedule", "memory"} <= set(dir(tcc.CachePlan))
    assert {"blocks", "sites", "grid", "macs", "table"} <= set(dir(tcc.ModelInfo))


def test_every_error_of_tcc_is_a_tcc_error() -> None:
    """One base class to catch, and the built-in class that fits."""
    classes = [getattr(errors, name) for name in errors.__all__]
    assert all(issubclass(cls, errors.TccError) for cls in classes)
    assert issubclass(errors.PlanError, ValueError)
    assert issubclass(errors.CaptureError, RuntimeError)
    assert issubclass(errors.CallError, RuntimeError)


def modules() -> list[str]:
    """All modules of tcc, its passes and its exporters."""
    found = ["tcc"]
    found += [m.name for m in pkgutil.walk_packages(tcc.__path__, "tcc.") if not m.name.startswith("tcc.export")]
    return found + [m.name for m in pkgutil.walk_packages(tcc.passes.__path__, "tcc.passes.")]


@pytest.mark.parametrize("name", sorted(set(modules())))
def test_every_public_thing_has_a_docstring(name: str) -> None:
    """Modules, and the classes, functions, methods and properties that they define under a public name."""
    module = importlib.import_module(name)
    assert (module.__doc__ or "").strip(), name
    for label, value in vars(module).items():
        if label.startswith("_") or getattr(value, "__module__", None) != name:
            continue
        if inspect.isclass(value) or inspect.isfunction(value):
            assert (value.__doc__ or "").strip(), f"{name}.{label}"
        if inspect.isclass(value):
            for member, inner in vars(value).items():
                if not member.startswith("_") and (inspect.isfunction(inner) or isinstance(inner, property)):
                    assert (inner.__doc__ or inspect.getdoc(getattr(value, member)) or "").strip(), (
                        f"{name}.{label}.{member}"
                    )


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: str(path.relative_to(ROOT)))
def test_files_and_functions_stay_small(path: Path) -> None:
    """A file has at most 400 lines, a function at most 80."""
    text = path.read_text()
    assert len(text.splitlines()) <= FILE_LINES
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
            assert node.end_lineno is not None
            assert node.end_lineno - node.lineno + 1 <= FUNCTION_LINES, node.name


def pass_classes() -> list[type[Pass]]:
    """Every pass that the package defines, but the interface."""
    for found in pkgutil.iter_modules(tcc.passes.__path__, "tcc.passes."):
        importlib.import_module(found.name)
    return sorted(
        (c for c in Pass.__subclasses__() if c.__module__.startswith("tcc.passes.")), key=lambda c: c.__name__
    )


@pytest.mark.parametrize("cls", pass_classes(), ids=lambda cls: cls.__name__)
def test_every_pass_keeps_the_house_rules(cls: type[Pass]) -> None:
    """A frozen dataclass in a file of its own name, with its tests, and a docstring that shows its rewrites."""
    assert dataclasses.is_dataclass(cls)
    assert cls.__dataclass_params__.frozen  # type: ignore[attr-defined]
    name = re.sub(r"(?<!^)(?=[A-Z])", "_", cls.__name__).lower()
    assert cls.__module__ == f"tcc.passes.{name}"
    assert (ROOT / "tests" / "passes" / f"test_{name}.py").exists()
    text = cls.__doc__ or ""
    assert ("Before:" in text and "After:" in text) or "->" in text
    assert isinstance(cls.exact, bool)


def test_the_pipeline_is_one_visible_list() -> None:
    """Every entry is a pass of the package, in an order that a reader can check."""
    names = [item.name for item in variant_passes(StepKind((), frozenset(), (), 4))]
    assert names[0] == "InsertSlots"
    assert names[-1] == "LowerTokens"
    assert names.index("DropDeadStores") < names.index("PruneTokens")
    assert names.index("SplitProjections") < names.index("PruneTokens")


def test_passes_do_not_import_the_runtime() -> None:
    """Dependencies point one way: command line, compile, export and passes, plan and graph analysis."""
    forbidden = {"tcc.runtime", "tcc.lowering", "tcc.driver", "tcc.program", "tcc.export", "tcc.cli"}
    for path in (ROOT / "passes").glob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            names = [node.module or ""] if isinstance(node, ast.ImportFrom) else []
            names += [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            assert not {n for n in names if n in forbidden or n.rpartition(".")[0] in forbidden}, path.name


def test_importing_tcc_imports_no_exporter_and_no_plotting() -> None:
    """What only some users need is imported where it is used."""
    code = "import sys, tcc; print(*sorted({m.partition('.')[0] for m in sys.modules}))"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    loaded = set(result.stdout.split())
    assert not loaded & {
        "onnx",
        "onnxruntime",
        "onnxscript",
        "matplotlib",
        "diffusers",
        "transformers",
        "torch_tensorrt",
    }
