"""AOTInductor bundles: one package for all variants, weights outside, equal to the compiled model."""

from __future__ import annotations

import functools
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

from tcc.errors import BundleError
from tcc.export import bundle, load
from tcc.export.verify import verify
from tests.export.bundles import STEPS, flat_inputs, mixed, session
from tests.export.test_manifest import rewrite
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


@pytest.mark.parametrize("name", ["dit", "uvit", "hf_pixart"])
def test_a_package_computes_what_the_compiled_model_computes(name: str, tmp_path: Path) -> None:
    """All variants in one file without a weight in it; at every step of two runs; then without the model's code."""
    which = case(name)
    written = bundle(which.model, mixed, (which.args, which.kwargs), tmp_path / name, target="aoti")
    runner, compiled = load(written.folder), session(which)
    for _ in range(2):
        errors = list(verify(runner, compiled, functools.partial(flat_inputs, which)))
        assert [error.step for error in errors] == list(range(STEPS))
        assert max(error.relative for error in errors) < CLOSE
    graphs = written.manifest.graphs
    assert {graph.file for graph in graphs} == {"steps.pt2"}
    assert written.manifest.files["steps.pt2"].bytes < len(graphs) * 2**21
    with zipfile.ZipFile(written.folder / "steps.pt2") as package:
        assert not [name for name in package.namelist() if name.endswith((".cpp", ".pkl"))]
    if name == "dit":
        done = subprocess.run(
            [sys.executable, "-c", ALONE, str(written.folder)], capture_output=True, text=True, check=False
        )
        assert done.stdout.strip() == "True", done.stderr
        rewrite(written.folder, lambda d: d["graphs"][0].update(weights=["pos_embed"]))
        with pytest.raises(BundleError, match=r"steps.pt2: 'step0' reads other weights than the manifest says"):
            load(written.folder)
