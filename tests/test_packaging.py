"""What users install: the wheel's content, its names, and what importing it costs."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import zipfile
from email.parser import HeaderParser
from pathlib import Path
from typing import Any

import pytest

import tcc

ROOT = Path(__file__).parents[1]
#: folder of the tree -> folder of the wheel
MAPPED = {"tcc": "tcc", "passes": "tcc/passes", "export": "tcc/export"}
#: needed by one target or one command each: imported in the functions that need them
HEAVY = {
    "diffusers", "matplotlib", "onnx", "onnxruntime", "onnxruntime_ep_nv_tensorrt_rtx", "onnxscript", "tensorrt",
    "torch_tensorrt", "transformers",
}  # fmt: skip

IMPORT_ALL = """
import importlib, json, pkgutil, sys
import tcc
loaded = sorted(name for name in sys.modules if "." not in name)
before = {name: getattr(tcc, name) for name in tcc.__all__}
modules = [found.name for found in pkgutil.walk_packages(tcc.__path__, "tcc.")]
for name in modules:
    importlib.import_module(name)
shadowed = [name for name, value in before.items() if getattr(tcc, name) is not value]
print(json.dumps({"file": tcc.__file__, "loaded": loaded, "modules": modules, "shadowed": shadowed,
                  "compile": type(tcc.compile).__name__, "compiles": tcc.compile.__module__}))
"""


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The wheel, built from a copy of the tree: a build/ folder in the tree could lend it files that are gone."""
    work = tmp_path_factory.mktemp("wheel")
    source = work / "source"
    source.mkdir()
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source)
    for name in MAPPED:
        shutil.copytree(ROOT / name, source / name, ignore=shutil.ignore_patterns("__pycache__"))
    command = [sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", str(work), str(source)]
    done = subprocess.run(command, capture_output=True, text=True, cwd=work, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    return next(work.glob("tcc-*.whl"))


@pytest.fixture(scope="module")
def content(wheel: Path) -> set[str]:
    """The names of the wheel's files, without its metadata."""
    with zipfile.ZipFile(wheel) as archive:
        return {name for name in archive.namelist() if ".dist-info/" not in name}


@pytest.fixture(scope="module")
def site(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the wheel unpacked, as pip would leave it."""
    folder = tmp_path_factory.mktemp("site")
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(folder)
    return folder


@pytest.fixture(scope="module")
def imported(site: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """What a fresh interpreter in another folder reports after importing every module of the wheel."""
    env = {**os.environ, "PYTHONPATH": str(site)}
    elsewhere = tmp_path_factory.mktemp("elsewhere")
    command = [sys.executable, "-W", "ignore", "-c", IMPORT_ALL]
    done = subprocess.run(command, capture_output=True, text=True, cwd=elsewhere, env=env, check=False)
    assert done.returncode == 0, done.stderr
    found: dict[str, Any] = json.loads(done.stdout)
    assert Path(found["file"]).is_relative_to(site)
    return found


def tree(*patterns: str) -> set[str]:
    """The files of the tree that match, named as in the wheel."""
    return {
        f"{target}/{path.relative_to(ROOT / folder).as_posix()}"
        for folder, target in MAPPED.items()
        for pattern in patterns
        for path in (ROOT / folder).rglob(pattern)
    }


def test_wheel_holds_exactly_the_modules_of_the_tree(content: set[str]) -> None:
    """A package that pyproject.toml does not name is absent from a wheel without a word from setuptools."""
    assert tree("*.py") == {name for name in content if name.endswith(".py")}


def test_wheel_holds_the_weights_and_the_type_marker(content: set[str]) -> None:
    """The shipped models, their description and `py.typed` travel with the code."""
    weights = tree("*.safetensors")

    assert weights
    assert weights | {"tcc/py.typed", "tcc/data/README.md"} <= content


def test_wheel_holds_nothing_else(content: set[str]) -> None:
    """No tests, caches or stray files."""
    assert content <= tree("*.py", "*.safetensors", "*.md", "py.typed")


def test_metadata(wheel: Path) -> None:
    """The version is the package's own; licence, lowest torch and the command are declared."""
    with zipfile.ZipFile(wheel) as archive:
        info = next(name.split("/")[0] for name in archive.namelist() if ".dist-info/" in name)
        metadata = HeaderParser().parsestr(archive.read(f"{info}/METADATA").decode())
        commands = archive.read(f"{info}/entry_points.txt").decode()
        licence = archive.read(f"{info}/licenses/LICENSE").decode()

    assert tcc.__version__ == metadata["Version"]
    assert metadata["License-Expression"] == "Apache-2.0"
    assert "Apache License" in licence
    assert "torch>=2.11" in metadata.get_all("Requires-Dist", [])
    assert "tcc = tcc.cli:main" in commands


def test_every_module_imports_from_another_folder(imported: dict[str, Any]) -> None:
    """The wheel works without the repository beside it."""
    expected = {name.removesuffix(".py").removesuffix("/__init__").replace("/", ".") for name in tree("*.py")}

    assert expected - {"tcc"} == set(imported["modules"])


def test_public_names_are_not_shadowed_by_modules(imported: dict[str, Any]) -> None:
    """Importing a submodule binds its name in `tcc`: no module may be called like a public function."""
    assert imported["shadowed"] == []
    assert (imported["compile"], imported["compiles"]) == ("function", "tcc.driver.driver")


def test_import_loads_no_heavy_package(imported: dict[str, Any]) -> None:
    """`import tcc` loads torch and small things; plots, exporters and pipelines wait until they are used."""
    assert HEAVY & set(imported["loaded"]) == set()


def test_passes_and_export_are_not_importable_at_the_top(imported: dict[str, Any]) -> None:
    """Only `tcc.passes` and `tcc.export` exist: a second copy of a pass module would be a second set of classes."""
    assert {"passes", "export"} & set(imported["loaded"]) == set()
