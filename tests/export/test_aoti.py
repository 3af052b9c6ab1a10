"""AOTInductor bundles: one package for all variants, weights outside, equal to the compiled model."""

from __future__ import annotations

import functools
import json
import shutil
import subprocess
import sys
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from tcc.errors import BundleError, CallError, ExportError
from tcc.export import load
from tcc.export.aoti_engine import open_aoti
from tcc.export.manifest import read
from tcc.export.stamp import expected
from tcc.export.verify import verify
from tests.export.bundles import STEPS, allowed_bytes, bundle_bytes, flat_inputs, planned, session
from tests.export.mutations import rewrite, rezip, seal
from tests.running import CLOSE
from tests.tiny_models import case

pytestmark = [
    pytest.mark.compiles,
    pytest.mark.filterwarnings("ignore:.*torch.jit.script_method.*:DeprecationWarning"),  # importing Inductor
]

ALONE = """
import sys, torch, tcc
runner = tcc.load(sys.argv[1])
outputs = [runner(*(torch.zeros(s.shape, dtype=s.torch_dtype) for s in runner.manifest.inputs)) for _ in range(3)]
assert not [name for name in sys.modules if name.startswith(("tests", "diffusers", "tcc.models.dit"))]
print(float(outputs[2].abs().sum()) > 0)
"""


@pytest.mark.parametrize("name", ["dit", "uvit", "hf_pixart", "chosen"])
def test_a_package_computes_what_the_compiled_model_computes(name: str, packaged: Any) -> None:
    """All variants in one file without a weight in it; at every step of two runs."""
    (which, plan), written = planned(name), packaged(name)
    runner, compiled = load(written.folder), session(which, plan)
    for _ in range(2):
        errors = list(verify(runner, compiled, functools.partial(flat_inputs, which)))
        assert [error.step for error in errors] == list(range(STEPS))
        assert max(error.relative for error in errors) < CLOSE
    graphs = written.manifest.graphs
    assert {graph.file for graph in graphs} == {"steps.pt2"}
    assert bundle_bytes(written.folder) <= allowed_bytes(which.model, written.manifest)
    with zipfile.ZipFile(written.folder / "steps.pt2") as package:
        assert not [name for name in package.namelist() if name.endswith(".pkl")]
        sources = {each.filename: each.file_size for each in package.infolist() if each.filename.endswith(".cpp")}
    assert len(sources) >= len(graphs)  # torch 2.11 finds a variant's metadata by the name of its source
    assert not any(sources.values())


def test_a_package_runs_without_the_code_of_the_model(packaged: Any) -> None:
    """In a process that imports neither it nor the tests."""
    done = subprocess.run(
        [sys.executable, "-c", ALONE, str(packaged("dit").folder)], capture_output=True, text=True, check=False
    )
    assert done.stdout.strip() == "True", done.stderr


def forge(folder: Path) -> None:
    """Let the package say of itself what the manifest says of it."""
    manifest, weights = read(folder), load_file(folder / "weights.safetensors")

    def edit(content: dict[str, bytes]) -> None:
        name = stamps(content)
        found = json.loads(content[name])
        for number, graph in enumerate(manifest.graphs):
            code = {key: text for key, text in found[graph.entry].items() if key.startswith(("file ", "processor"))}
            found[graph.entry] = expected(manifest, number, weights) | code
        content[name] = json.dumps(found).encode()

    rezip(folder / "steps.pt2", edit)
    seal(folder)


DIFFER: list[tuple[Callable[[dict[str, Any]], object], str]] = [
    (
        lambda d: d["slots"][0].update(shape=[2**17, 2**17]),
        r"is slot:.*: float32 \[2, 16, 32\], and .* \[131072, 131072\]",
    ),
    (lambda d: d["slots"][0].update(dtype="int64"), r"is slot:.*: float32 \[2, 16, 32\], and .* int64 \[2, 16, 32\]"),
    (
        lambda d: d["inputs"][2].update(values=99),
        r"the input 2 is y: int64 \[2\], 0 to 10, and .* y: int64 \[2\], 0 to 98",
    ),
    (lambda d: d["outputs"][0].update(shape=[1]), r"the output 0 is output: float32 .* says output: float32 \[1\]"),
    (lambda d: d["inputs"][1].update(dtype="int32"), r"the input 1 is t: int64 \[2\], and the manifest says t: int32"),
    (lambda d: d["graphs"][0].update(entry="step1"), r"'step1': the graph is 1, and the manifest says 0"),
    (lambda d: d["graphs"][0].update(entry="none"), r"'none' is not in the package: the manifest was altered"),
    (lambda d: d["graphs"][0].update(weights=["pos_embed"]), r"the weight '.*' is .*, and the manifest says none"),
    (lambda d: d.update(device="cuda"), r"the device is cpu, and the manifest says cuda"),
]


@pytest.mark.parametrize(("change", "message"), DIFFER)
def test_a_manifest_of_something_else_is_refused(
    change: Callable[[dict[str, Any]], object], message: str, packaged: Any, tmp_path: Path
) -> None:
    """Before the package is opened; nothing is allocated for it."""
    folder = Path(shutil.copytree(packaged("dit").folder, tmp_path / "bundle"))
    rewrite(folder, change)
    with pytest.raises(BundleError, match=message):
        open_aoti(folder, read(folder), torch.device("cpu"))


def test_compiled_code_checks_what_it_is_given(
    packaged: Any, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    """Where the package's own description was forged, too: a slot of another shape or dtype, an input too many."""
    x, t, y = flat_inputs(case("dit"), 0)
    changes: list[tuple[Callable[[dict[str, Any]], object], str]] = [
        (lambda d: d["slots"][0].update(shape=[1]), "unmatched dim value"),
        (lambda d: d["slots"][0].update(dtype="float16"), "unmatched dtype"),
        (lambda d: d["graphs"][0]["inputs"].pop(), "inputs vector size"),
    ]
    for number, (change, reason) in enumerate(changes):
        folder = Path(shutil.copytree(packaged("dit").folder, tmp_path / str(number)))
        rewrite(folder, change)
        forge(folder)
        runner = load(folder)
        with pytest.raises(CallError, match=r"step 0, graph 0: the aoti runtime failed \(") as caught:
            runner(x, t, y)
        assert reason in f"{caught.value}{capfd.readouterr().err}"  # torch 2.11 writes it to the standard error alone
        assert runner.step == 0
    with pytest.raises(
        CallError, match=r"input 'y' holds 11, and the model looks it up in a table of 11: give 0 to 10"
    ):
        load(packaged("dit").folder)(x, t, torch.tensor([3, 11]))


PACKAGES: list[tuple[Callable[[dict[str, bytes]], object], str]] = [
    (lambda files: files.update({"steps/../x": b""}), r"holds 'steps/../x', which no export writes: do not use it"),
    (
        lambda files: files.update({"steps/data/weights/w": b""}),
        r"holds 'steps/data/weights/w', which no export writes",
    ),
    (
        lambda files: files.update({code(files)[0].removesuffix("so") + "cpp": b"int x;"}),
        r"holds .steps/data/aotinductor/step0/.*, which no export writes: do not use it",
    ),
    (
        lambda files: files.update({code(files)[0]: files[code(files)[1]]}),
        r"'step0': the file .*so is .*, and the manifest",
    ),
    (lambda files: files.update({code(files)[0]: b"no library"}), r"'step0': the file .*so is .*, and the manifest"),
    (lambda files: files.pop(stamps(files)), r"steps.pt2: not a package that tcc wrote"),
    (lambda files: files.update({stamps(files): b'{"a": {}, "a": {}}'}), r"the name 'a' comes twice in an object"),
]


def code(files: dict[str, bytes]) -> list[str]:
    """The libraries in a package."""
    return [name for name in files if name.endswith(".so")]


def stamps(files: dict[str, bytes]) -> str:
    """The file that says what was compiled for what."""
    return next(name for name in files if name.endswith("tcc_stamps.json"))


@pytest.mark.parametrize(("edit", "message"), PACKAGES)
def test_a_package_that_no_export_writes_is_not_opened(
    edit: Callable[[dict[str, bytes]], object], message: str, packaged: Any, tmp_path: Path
) -> None:
    """Under checksums that fit: paths that lead out of it, pickles, libraries in other places, no description."""
    folder = Path(shutil.copytree(packaged("dit").folder, tmp_path / "bundle"))
    rezip(folder / "steps.pt2", edit)
    seal(folder)
    with pytest.raises(BundleError, match=message):
        load(folder)
    rezip(folder / "steps.pt2", lambda files: None, zipfile.ZIP_DEFLATED)
    seal(folder)
    with pytest.raises(
        BundleError, match=r"(is compressed, which no export does|which no export writes): do not use it"
    ):
        load(folder)


def test_a_package_is_for_one_kind_of_device(packaged: Any) -> None:
    """It is machine code."""
    if torch.cuda.is_available():
        with pytest.raises(ExportError, match=r"compiled for cpu, and it was to be loaded on cuda: export it there"):
            load(packaged("dit").folder, device="cuda")
    with pytest.raises(BundleError, match=r"unknown device 'meta': use cpu or cuda"):
        load(packaged("dit").folder, device="meta")
