"""The coverage of diffusers' transformer classes: the entries, and some rows from end to end."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from types import ModuleType

import pytest

pytest.importorskip("diffusers")

BENCHMARKS = Path(__file__).parents[1] / "benchmarks"
#: One class of a kind, and the most that its pruned step may cost, over the full one.
WHOLE = {
    "DiTTransformer2DModel": 0.6,  # one stream
    "SD3Transformer2DModel": 0.7,  # a text stream beside it
    "LuminaNextDiT2DModel": 0.6,  # cross-attention inside the branch of self-attention
    "ErnieImageTransformer2DModel": 0.6,  # tokens first, samples second; text behind the image
    "T5FilmDecoder": 0.65,  # attention written out
    "StableAudioDiTModel": 0.6,  # a token of the time before the others
    "PriorTransformer": 0.6,  # the output is one token of many
    "TransformerTemporalModel": 0.7,  # frames are the tokens, places are samples
    "SanaTransformer2DModel": 0.96,  # linear attention and a convolution in the feed-forward: neither can be pruned
}


@pytest.fixture(scope="module")
def script() -> Iterator[ModuleType]:
    """The script as a module; it imports its entries by name, as when it is run."""
    before = set(sys.modules)
    sys.path.insert(0, str(BENCHMARKS))
    try:
        yield __import__("model_coverage")
    finally:
        sys.path.remove(str(BENCHMARKS))
        for name in {n for n in set(sys.modules) - before if n.startswith(("coverage_", "model_coverage"))}:
            sys.modules.pop(name)


def test_every_class_has_an_entry(script: ModuleType) -> None:
    """A class that a new version of diffusers brings shows here."""
    assert set(script.ENTRIES) == set(script.coverage_models.classes())


@pytest.mark.parametrize("name", WHOLE)
@pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::DeprecationWarning")
def test_a_class_goes_through_all_columns(script: ModuleType, name: str) -> None:
    """Captured with the model's bits, all blocks found, pruned with fewer MACs, and equal to the reference."""
    row = script.examine(name, "eager")

    assert row.whole, row.why
    assert row.details["actions"] == ["pruned", "reuse", "hold"]
    assert row.details["pruned_macs"] < WHOLE[name]
    assert row.details["found"] == row.details["blocks"]
    assert row.details["effect"] > 0.01


@pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::DeprecationWarning")
def test_a_class_goes_through_all_columns_as_a_bundle(script: ModuleType) -> None:
    """Exported, loaded and run by ONNX Runtime."""
    pytest.importorskip("onnx", reason="needs the ONNX packages: pip install 'tcc[onnx]'")
    row = script.examine("DiTTransformer2DModel", "onnx")
    assert row.whole, row.why
    assert 0 < row.details["error"] < row.details["effect"]


def test_what_fails_is_a_row(script: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    """A class that cannot be built says so, in one line and with the stage."""

    def parts() -> None:
        raise ValueError("no such size\nmore")

    monkeypatch.setitem(script.ENTRIES, "Broken", script.coverage_models.Entry("Broken", parts, (), "half of it"))
    row = script.examine("Broken", "eager")

    assert (row.whole, row.captured, row.why) == (False, False, "built: ValueError: no such size")
    assert sys.modules["coverage_table"].cells(asdict(row))[-1] == "built: ValueError: no such size; half of it"


def test_the_readme_has_the_table_of_the_results(script: ModuleType) -> None:
    """The table between the two marks is the one that the results make, and so is the file's."""
    tables, folder = sys.modules["coverage_table"], BENCHMARKS / "results"
    eager, others = tables.read(folder), {backend: tables.read(folder, backend) for backend in tables.OTHERS}
    text = (BENCHMARKS.parent / "README.md").read_text()
    assert tables.block(eager, others) in text
    assert tables.markdown(eager, others) == (folder / "coverage.md").read_text()
    assert {row["name"] for row in eager["rows"]} == set(script.ENTRIES)
    assert eager["commit"]
    assert text.count("<details>") == text.count("</details>")


def made(name: str, **details: object) -> dict[str, object]:
    """A row of one backend."""
    good = dict.fromkeys(("captured", "sites", "plan", "matches"), True)
    return {"name": name, **good, "why": "", "note": "", "seconds": 1.0, "stage": "matches", "details": details}


def test_the_table_is_written_between_its_marks(script: ModuleType, tmp_path: Path) -> None:
    """The rest of the file stays; a backend's column stands where it was run; a reason is cut to a length."""
    tables = sys.modules["coverage_table"]
    good = made("A", found=2, blocks=3, prunable=4, branches=5, pruned_macs=0.5, error=2e-7)
    bad = made("B") | {"captured": False, "why": "x | " * 100}
    path = tmp_path / "README.md"
    path.write_text(f"one\n{tables.BEGIN}\nold\n{tables.END}\ntwo\n")
    other = {"rows": [good, bad]}
    for others, cell in (({}, ""), ({"inductor": other, "onnx": {}}, "yes, 2e-07 | "), ({"onnx": other}, "2e-07 | ")):
        tables.write_readme(path, {"rows": [good, bad]}, others)
        lines = path.read_text().splitlines()
        assert (lines[0], lines[1], lines[-2], lines[-1]) == ("one", tables.BEGIN, tables.END, "two")
        assert f"| A | 2/3 | 4/5 | 0.50 | 2e-07 | {cell} |" in lines
        assert any(line.startswith("| B |") and line.endswith(" ... |") and "\\|" in line for line in lines)
        assert "<summary>All 2 classes, 1 of them through all columns</summary>" in lines
    path.write_text("no marks")
    with pytest.raises(ValueError, match="has no place for the table"):
        tables.write_readme(path, {"rows": [good]}, {})


def test_a_run_that_was_cut_off_goes_on(script: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Rows are written as they are made, with their commit; a resumed run makes the others alone."""
    asked: list[str] = []

    class Examiner:
        def __init__(self, *_: object) -> None:
            pass

        def row(self, name: str) -> object:
            asked.append(name)
            if len(asked) == 2:
                raise KeyboardInterrupt
            return script.Row(name)

        def stop(self) -> None:
            pass

    monkeypatch.setattr(script, "Examiner", Examiner)
    monkeypatch.setattr(script, "README", tmp_path / "README.md")
    (tmp_path / "README.md").write_text("<!-- coverage: begin --><!-- coverage: end -->")
    monkeypatch.setattr(
        script.coverage_models, "classes", lambda: dict.fromkeys(("WanTransformer3DModel", "SD3Transformer2DModel"))
    )
    options = ["--results", str(tmp_path), "--resume"]
    with pytest.raises(KeyboardInterrupt):
        script.main(options)
    first = json.loads((tmp_path / "coverage.json").read_text())
    assert [row["name"] for row in first["rows"]] == asked[:1]
    assert first["rows"][0]["commit"] == first["commit"] != ""
    script.main(options)
    assert len(asked) == 3
    assert {row["name"] for row in json.loads((tmp_path / "coverage.json").read_text())["rows"]} == set(asked)
    assert "All 2 classes, 0 of them" in (tmp_path / "README.md").read_text()
    script.main(["--results", str(tmp_path), "--only", "SD3Transformer2DModel"])
    assert len(asked) == 4
    assert len(json.loads((tmp_path / "coverage.json").read_text())["rows"]) == 2
    (tmp_path / "other").mkdir()
    assert script.main(["--results", str(tmp_path / "other"), "--backend", "onnx"]) == 0
    assert [path.name for path in (tmp_path / "other").iterdir()] == ["coverage-onnx.json"]
    with pytest.raises(SystemExit, match="--resume goes on with the rows in a folder: name it with --results"):
        script.main(["--resume"])


def test_a_block_is_found_by_its_path(script: ModuleType) -> None:
    """Blocks inside a module's, or around it, are that module's; a longer number is another block."""
    assert script._same("blocks.1", "blocks.1")
    assert script._same("blocks.1", "blocks.1.block3")
    assert script._same("blocks.1.layers.0", "blocks.1")
    assert not script._same("blocks.1", "blocks.10")
