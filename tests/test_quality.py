"""The comparison of policies, on a tiny random model and a handful of images."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from types import ModuleType

import pytest
import torch

import tcc
from tcc.metrics import Statistics, frechet_distance, real_statistics
from tcc.models import DiT, save_weights
from tcc.plan import CachePlan, Compute, Reuse
from tests.scripts import QUALITY, modules_of

pytestmark = pytest.mark.usefixtures("own_threads")
scripts = modules_of(*QUALITY)


@pytest.fixture(scope="module")
def weights(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A DiT of 2 blocks and 16 tokens on images of 32x32, with random weights."""
    torch.manual_seed(0)
    sizes = {"input_size": 32, "patch_size": 8, "in_channels": 1, "hidden_size": 16, "depth": 2, "num_heads": 2}
    model = DiT(**sizes, num_classes=10, learn_sigma=False)  # type: ignore[arg-type]
    for parameter in model.parameters():
        parameter.data.normal_(0, 0.2)
    path = tmp_path_factory.mktemp("model") / "tiny.safetensors"
    save_weights(model, path)
    return str(path)


def run(scripts: dict[str, ModuleType], weights: str, out: Path, *options: str, what: str = "run") -> int:
    """The script's command line: 4 steps, chunks of 4 images, not compiled."""
    common = ["--model", weights, "--steps", "4", "--chunk", "4", "--batch", "2", "--backend", "eager"]
    status: int = scripts["quality"].main([what, "--out", str(out), *common, *options])
    return status


def chunks(out: Path) -> dict[str, bytes]:
    """Every measured chunk."""
    return {str(path.relative_to(out)): path.read_bytes() for path in sorted(out.rglob("*.safetensors"))}


def rows(out: Path, name: str = "quality") -> dict[str, dict[str, object]]:
    """The rows of a report, by name."""
    return {row["row"]: row for row in json.loads((out / f"{name}.json").read_text())["rows"]}


def test_a_run_is_reported(scripts: dict[str, ModuleType], weights: str, tmp_path: Path) -> None:
    """Every row has its numbers in the table, in the JSON and in the plot; fewer steps are counted by their steps."""
    out, results = tmp_path / "out", tmp_path / "results"
    options = ("--seeds", "0", "1", "--samples", "4", "--only", "FORA", "steps", "--results", str(results))
    assert run(scripts, weights, out, *options) == 0
    assert run(scripts, weights, out, *options, "--rounds", "1", what="time") == 0

    found = rows(results)
    multistep = {f"DPM-Solver++ 2M{kind}, {count} steps" for kind in ("", " log-SNR") for count in (2, 1)}
    fewer = {"uncached", "3 steps", "2 steps", "1 steps"}
    assert found.keys() == {*fewer, *multistep, "FORA N=2", "FORA N=3", "FORA N=4"}
    assert found["DPM-Solver++ 2M, 2 steps"]["bound"] == 2.0
    assert found["2 steps"]["bound"] == 2.0
    assert found["2 steps"]["run_steps"] == 2
    assert found["uncached"]["psnr"] == {"0": None, "1": None}
    for row in found.values():
        assert row["samples"] == 4
        assert row["fd"].keys() == {"0", "1"}  # type: ignore[attr-defined]
        assert row["seconds_per_image"] > 0  # type: ignore[operator]
    table = (results / "quality.md").read_text()
    header = next(line for line in table.splitlines() if line.startswith("| row"))
    assert [cell.strip() for cell in header.strip("|").split("|")] == list(scripts["quality_report"].COLUMNS)
    assert all(f"| {name} |" in table for name in found)
    assert (results / "quality-4.png").read_bytes()[:4] == b"\x89PNG"


def test_psnr_and_distance_are_those_of_the_images(
    scripts: dict[str, ModuleType], weights: str, tmp_path: Path
) -> None:
    """Sampled and measured again, without chunks: the same numbers."""
    out, results = tmp_path / "out", tmp_path / "results"
    options = ("--seeds", "3", "--samples", "8", "--only", "FORA N=2", "--results", str(results))
    assert run(scripts, weights, out, *options) == 0

    quality = scripts["quality"]
    model = tcc.models.load_dit(weights)
    info = tcc.inspect(model, torch.zeros(4, 1, 32, 32), torch.zeros(4, dtype=torch.int64), torch.arange(4))
    compiled = tcc.compile(model, tcc.plans.fora(info, num_steps=4, interval=2), backend="eager")
    drawn = [quality.noise(model, 3, chunk, 4) for chunk in range(2)]
    x, y = torch.cat([noise for noise, _ in drawn]), torch.cat([labels for _, labels in drawn])
    options = {"num_steps": 4, "cfg_scale": 1.5}
    fora = torch.cat([tcc.samplers.sample(compiled, x[i : i + 2], y[i : i + 2], **options) for i in range(0, 8, 2)])
    errors = (fora - tcc.samplers.sample(model, x, y, **options)).square().mean(dim=(1, 2, 3))
    row = rows(results)["FORA N=2"]
    assert row["psnr"]["3"] == pytest.approx(float((10 * (4 / errors).log10()).mean()), abs=1e-3)  # type: ignore[index]
    distance = frechet_distance(Statistics.of(tcc.metrics.feature_network()(fora)), real_statistics())
    assert row["fd"]["3"] == pytest.approx(distance, rel=1e-4)  # type: ignore[index]


def test_a_run_that_was_stopped_goes_on_to_the_same_numbers(
    scripts: dict[str, ModuleType], weights: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Killed in its fourth chunk, started again, then deepened: bit-identical to one run, and nothing is redone."""
    quality = scripts["quality"]
    options = ("--seeds", "0", "--only", "FORA N=2", "2 steps")
    assert run(scripts, weights, tmp_path / "whole", *options, "--samples", "8") == 0

    real, done = quality.run_chunk, []

    def dies_in_the_fourth(*arguments: object) -> None:
        if len(done) == 3:
            raise KeyboardInterrupt
        done.append(arguments)
        real(*arguments)

    with monkeypatch.context() as patch:
        patch.setattr(quality, "run_chunk", dies_in_the_fourth)
        with pytest.raises(KeyboardInterrupt):
            run(scripts, weights, tmp_path / "parts", *options, "--samples", "8")
    assert len(chunks(tmp_path / "parts")) == 3
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "parts").rglob("*.safetensors")}
    assert run(scripts, weights, tmp_path / "parts", *options, "--samples", "4") == 0
    assert run(scripts, weights, tmp_path / "parts", *options, "--samples", "8") == 0

    assert chunks(tmp_path / "parts") == chunks(tmp_path / "whole")
    assert {path: path.stat().st_mtime_ns for path in before} == before


def test_breadth_comes_first(scripts: dict[str, ModuleType], monkeypatch: pytest.MonkeyPatch) -> None:
    """All rows have few samples before any row has many, and what is there is left out."""
    quality = scripts["quality"]
    monkeypatch.setattr(quality, "LEVELS", (4, 8))
    monkeypatch.setattr(quality.Store, "has", lambda folder, seed, chunk: (folder, chunk) == ("a", 0))
    todays = [argparse.Namespace(folder=name) for name in "ab"]
    order = [(entry.folder, seed, chunk) for entry, seed, chunk in quality.todo(todays, [7], 12, 4)]

    assert order == [("b", 7, 0), ("a", 7, 1), ("b", 7, 1), ("a", 7, 2), ("b", 7, 2)]


def test_rows_are_compared_at_the_same_number_of_images(
    scripts: dict[str, ModuleType], weights: str, tmp_path: Path
) -> None:
    """A row with more images is counted with as many as the others have."""
    out, results = tmp_path / "out", tmp_path / "results"
    assert run(scripts, weights, out, "--seeds", "0", "--samples", "8", "--only", "FORA N=2") == 0
    options = ("--seeds", "0", "--samples", "4", "--only", "FORA N=2", "FORA N=3")
    assert run(scripts, weights, out, *options) == 0
    wide = ("--seeds", "0", "--only", "FORA N=2", "FORA N=3", "--results", str(results))
    assert run(scripts, weights, out, *wide, what="report") == 0

    assert {row["samples"] for row in rows(results).values()} == {4}


def test_rows_of_a_table_are_of_the_same_seeds(
    scripts: dict[str, ModuleType], weights: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A seed that one row lacks counts for none, or, where it is asked for, leaves that row out."""
    out, results = tmp_path / "out", tmp_path / "results"
    assert run(scripts, weights, out, "--seeds", "0", "1", "--samples", "4", "--only", "FORA N=2") == 0
    options = ("--only", "FORA N=2", "FORA N=3", "--results", str(results))
    assert run(scripts, weights, out, "--seeds", "0", "--samples", "4", *options) == 0
    assert run(scripts, weights, out, *options, what="report") == 0
    assert {name: list(row["fd"]) for name, row in rows(results).items()} == {
        "uncached": ["0"], "FORA N=2": ["0"], "FORA N=3": ["0"],
    }  # fmt: skip
    assert run(scripts, weights, out, "--seeds", "0", "1", *options, what="report") == 0
    assert {name: list(row["fd"]) for name, row in rows(results).items()} == {
        "uncached": ["0", "1"], "FORA N=2": ["0", "1"],
    }  # fmt: skip
    assert "for want of images: FORA N=3 (4)" in capsys.readouterr().out


def test_a_seed_of_an_earlier_report_counts(scripts: dict[str, ModuleType], weights: str, tmp_path: Path) -> None:
    """Two seeds sampled apart and reported one after the other: the rows of one report of both."""
    only = ("--samples", "4", "--only", "FORA N=2", "DDIM 50%", "--learned", str(tmp_path))
    (tmp_path / scripts["quality_rows"].visited_file(0.5).format(steps=4)).write_text("[0, 2]")
    first, second, both = (tmp_path / name for name in ("first", "second", "both"))
    assert run(scripts, weights, first, *only, "--seeds", "0", "--results", str(first)) == 0
    earlier = ("--earlier", str(first / "quality.json"))
    assert run(scripts, weights, second, *only, "--seeds", "1", *earlier, "--results", str(second)) == 0
    assert run(scripts, weights, both, *only, "--seeds", "0", "1", "--results", str(both)) == 0

    assert rows(second) == rows(both)
    assert rows(both)["DDIM 50%, steps searched"]["visited"] == [0, 2]
    assert rows(both)["FORA N=2"]["fd"].keys() == rows(both)["FORA N=2"]["sampled"].keys() == {"0", "1"}  # type: ignore[attr-defined]


def test_a_seed_that_some_rows_lack_waits_in_the_file(
    scripts: dict[str, ModuleType], weights: str, tmp_path: Path
) -> None:
    """Tables are of seeds that all rows have; a later report that has the rest counts what waited, from the file."""
    out, early, late, both = (tmp_path / name for name in ("out", "early", "late", "both"))
    names = ("--samples", "4", "--only", "FORA N=2", "FORA N=3")
    assert run(scripts, weights, out, *names, "--seeds", "0") == 0
    assert run(scripts, weights, out, *names[:-1], "--seeds", "1") == 0
    assert run(scripts, weights, out, *names, "--results", str(early), what="report") == 0
    assert {tuple(row["fd"]) for row in rows(early).values()} == {("0",)}  # type: ignore[arg-type]
    waiting = json.loads((early / "quality.json").read_text())["other_seeds"]
    assert {row["row"]: list(row["fd"]) for row in waiting} == {"uncached": ["1"], "FORA N=2": ["1"]}

    rest = (*names[:3], "FORA N=3", "--seeds", "1")
    assert run(scripts, weights, tmp_path / "new", *rest) == 0
    earlier = ("--earlier", str(early / "quality.json"), "--results", str(late))
    assert run(scripts, weights, tmp_path / "new", *names, *earlier, what="report") == 0
    assert run(scripts, weights, out, *rest) == 0
    assert run(scripts, weights, out, *names, "--results", str(both), what="report") == 0
    assert rows(late) == rows(both)
    assert list(rows(late)["FORA N=2"]["fd"]) == ["0", "1"]  # type: ignore[call-overload]


def test_a_row_of_an_earlier_report_alone_is_in_the_table(
    scripts: dict[str, ModuleType], weights: str, tmp_path: Path
) -> None:
    """With its seeds and its times; and times count only where all rows have one."""
    first, second = tmp_path / "first", tmp_path / "second"
    of_first = ("--samples", "4", "--seeds", "0", "--only", "FORA N=2", "--results", str(first))
    assert run(scripts, weights, first, *of_first) == 0
    assert run(scripts, weights, first, *of_first, "--rounds", "1", what="time") == 0
    assert rows(first)["FORA N=2"]["speedup"] is not None
    of_second = ("--samples", "4", "--seeds", "0", "--only", "FORA N=3", "--earlier", str(first / "quality.json"))
    assert run(scripts, weights, second, *of_second, "--results", str(second)) == 0

    found = rows(second)
    assert found.keys() == {"uncached", "FORA N=2", "FORA N=3"}
    assert found["FORA N=2"] == {**rows(first)["FORA N=2"], "speedup": None, "seconds_per_image": None}
    assert found["uncached"]["timing"] == rows(first)["uncached"]["timing"]


def test_earlier_results_that_do_not_fit_are_refused(
    scripts: dict[str, ModuleType], weights: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Of other settings, of another plan, of another number of images, and none at all."""
    out, results = tmp_path / "out", tmp_path / "results"
    options = ("--seeds", "0", "--samples", "4", "--only", "FORA N=2")
    assert run(scripts, weights, out, *options, "--results", str(results)) == 0
    record = json.loads((results / "quality.json").read_text())
    row = next(row for row in record["rows"] if row["row"] == "FORA N=2")
    changed = {
        "is of other settings": {**record, "settings": {**record["settings"], "cfg": 3.0}},
        "has another plan in the earlier results": {**record, "rows": [{**row, "plan": "0123456789"}]},
        "pass --samples 8": {**record, "rows": [{**row, "samples": 8}]},
    }
    for message, content in changed.items():
        (tmp_path / "changed.json").write_text(json.dumps(content))
        assert run(scripts, weights, out, *options, "--earlier", str(tmp_path / "changed.json"), what="report") == 2
        assert message in capsys.readouterr().err
    assert run(scripts, weights, out, *options, "--earlier", str(tmp_path / "none.json"), what="report") == 2
    assert "there is no" in capsys.readouterr().err


def test_the_curve_of_fewer_steps_and_the_front(scripts: dict[str, ModuleType]) -> None:
    """At a cost halfway between two counts the value is the mean of theirs; outside the curve there is none.

    A row is on the front if no cheaper row is as good.
    """
    report, quality_rows = scripts["quality_report"], scripts["quality_rows"]

    def at(cost: float, distance: float, family: str) -> object:
        names = {"row": f"{cost}", "family": family, "steps": 4, "run_steps": 4}
        numbers = {"macs": 1, "bound": 9.0, "samples": 4, "psnr": {"0": 30.0}, "fd": {"0": distance}, "sampled": {}}
        return report.Measured(**names, **numbers, speedup=1 / cost)

    curve = [at(0.2, 10.0, quality_rows.FEWER), at(0.4, 6.0, quality_rows.FEWER)]
    assert report.at_equal_cost(curve, at(0.3, 5.0, "FORA"), "mean_fd") == pytest.approx(8.0)
    assert report.at_equal_cost(curve, at(0.5, 5.0, "FORA"), "mean_fd") is None
    rows = [*curve, at(0.3, 5.0, "FORA"), at(0.6, 5.5, "FORA")]
    assert [report.on_front(rows, row, "mean_fd") for row in rows] == [True, False, True, False]
    assert [report.on_front(rows, row, "mean_psnr") for row in rows] == [True, False, False, False]


def test_a_plan_is_told_by_its_table_alone(scripts: dict[str, ModuleType]) -> None:
    """Names and costs do not count; actions and token sets do."""
    digest = scripts["quality_store"].digest
    actions = {(0, "blocks.0.delta"): Compute(), (1, "blocks.0.delta"): Reuse()}
    plan = CachePlan(num_steps=2, actions=actions)

    assert digest(plan) == digest(CachePlan(num_steps=2, actions=actions, policy={"name": "fora"}))
    assert digest(plan) == "c24df7fdaa"  # what has been measured stays valid when plans get new fields
    others = [
        CachePlan(num_steps=3, actions=actions),
        CachePlan(num_steps=2, actions={**actions, (1, "blocks.0.delta"): tcc.Skip()}),
        CachePlan(num_steps=2, actions={(0, "blocks.1.delta"): Compute(), (1, "blocks.1.delta"): Reuse()}),
        CachePlan(num_steps=2, actions=actions, tokens={"kept": torch.tensor([0])}),
        CachePlan(num_steps=2, actions=actions, tokens={"kept": torch.tensor([1])}),
    ]
    assert len({digest(plan), *map(digest, others)}) == 6


@pytest.mark.parametrize(
    ("options", "message"),
    [(("--chunk", "6"), "is of other settings (chunk 4 -> 6)"), (("--batch", "3"), "--chunk 4 is not a multiple of")],
)
def test_mistakes_get_one_line(
    scripts: dict[str, ModuleType],
    weights: str,
    tmp_path: Path,
    options: tuple[str, ...],
    message: str,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """A store of other settings, and a batch that does not divide a chunk."""
    assert run(scripts, weights, tmp_path, "--samples", "4", "--only", "1 steps") == 0

    assert run(scripts, weights, tmp_path, *options) == 2
    assert message in capsys.readouterr().err


def test_rows_with_other_steps_to_visit_are_kept_apart(
    scripts: dict[str, ModuleType], weights: str, tmp_path: Path
) -> None:
    """A searched list of steps is run as it is written, and a new list begins a new row."""
    name = scripts["quality_rows"].visited_file(0.5).format(steps=4)
    options = ("--seeds", "0", "--samples", "4", "--only", "DDIM 50%", "2 steps", "--learned", str(tmp_path))
    found = []
    for number, visited in enumerate(([0, 3], [0, 2])):
        (tmp_path / name).write_text(json.dumps(visited))
        results = tmp_path / f"results{number}"
        assert run(scripts, weights, tmp_path / "out", *options, "--results", str(results)) == 0
        found.append(rows(results))

    even, placed = (
        (f["2 steps"]["psnr"]["0"] for f in found),
        [f["DDIM 50%, steps searched"]["psnr"]["0"] for f in found],
    )  # type: ignore[index]
    assert placed[0] == pytest.approx(next(even), rel=1e-6)  # two steps spread evenly are the first and the last
    assert placed[1] != pytest.approx(placed[0], rel=1e-3)


def test_listing_rows_settles_nothing(scripts: dict[str, ModuleType], weights: str, tmp_path: Path) -> None:
    """A folder that nothing was measured in yet is free for any settings."""
    out = tmp_path / "out"
    assert run(scripts, weights, out, "--only", "FORA", what="list") == 0
    assert not out.exists()


def test_the_sampler_tells_rows_apart(scripts: dict[str, ModuleType], tmp_path: Path) -> None:
    """Plain DDIM has no key of its own, so that what was measured stays; every other sampler and option has one."""
    quality_rows, store = scripts["quality_rows"], scripts["quality_store"].Store(tmp_path, {})
    plan = CachePlan(num_steps=2, actions={})
    options = ({}, {"sampler": "dpm-solver++2m"}, {"sampler": "ddim", "sampler_options": {"eta": 0.5}})
    options += ({"sampler": "dpm-solver++2m", "sampler_options": {"spacing": "log-snr"}},)
    keys = [quality_rows.Row("row", "row", "full", **given).drawn_by(4, tmp_path)[1] for given in options]

    assert keys[0] == ""
    assert len({store.row(4, "row", plan, key) for key in keys}) == 4
