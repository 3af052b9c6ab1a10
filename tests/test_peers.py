"""The comparison with other caches: on a tiny random model, a few steps, not compiled by Inductor."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import json
import sys
from collections.abc import Callable, Iterator
from importlib.util import find_spec
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

import tcc
from tcc.cli.compare import Method, Task
from tcc.errors import PlanError
from tcc.metrics import psnr
from tcc.models import DiT
from tests.scripts import imported
from tests.tiny_models import fill, relative_error

SCRIPTS = (
    "provenance", "step_speed", "quality_store", "quality_rows", "peers_models", "peers_methods", "peers_plans",
    "peers_probe", "peers",
)  # fmt: skip
Scripts = dict[str, ModuleType]
needs_diffusers = pytest.mark.skipif(find_spec("diffusers") is None, reason="needs diffusers")
needs_cache_dit = pytest.mark.skipif(find_spec("cache_dit") is None, reason="needs cache-dit: pip install 'tcc[bench]'")
KEYS = {
    "method", "family", "package", "mode", "steps", "seconds", "seconds_p90", "speedup", "macs", "bound",
    "realised_share", "psnr", "identical", "error", "fd", "cache_bytes", "peak_bytes", "compile_seconds",
    "graph_breaks", "recompiles", "rounds", "reason", "process", "part",
}  # fmt: skip


@pytest.fixture(scope="module")
def scripts() -> Iterator[Scripts]:
    """The scripts as modules."""
    with imported(SCRIPTS) as modules:
        yield modules


@pytest.fixture
def tiny(scripts: Scripts) -> Any:
    """A DiT of 3 blocks and 16 tokens, with random weights."""
    sizes = {"input_size": 8, "patch_size": 2, "in_channels": 1, "hidden_size": 32, "depth": 3, "num_heads": 2}
    model = fill(DiT(**sizes, num_classes=3, learn_sigma=False))  # type: ignore[arg-type]
    return scripts["peers_models"].Subject("tiny", model.eval(), (1, 8, 8), 3, "blocks", trained=True)


@pytest.fixture
def draw(scripts: Scripts, tiny: Any) -> Callable[..., torch.Tensor]:
    """The images of a peer with these settings after so many steps; of the uncached model, without a peer."""
    task = tiny.task(2, seed=0)

    def run(attach: Callable[..., Any] | None = None, steps: int = 4, runs: int = 1, **settings: Any) -> torch.Tensor:
        if attach is None:
            *_, images = task.denoise(tiny.model, steps)
            return images
        copied = scripts["peers_models"].target(tiny, steps, lambda model: list(task.denoise(model, steps)))
        attached = attach(copied, **settings)
        for _ in range(runs):
            attached.reset()
            *_, images = task.denoise(attached.around(copied.model), steps)
        return images

    return run


def test_a_copy_shares_the_weights_and_leaves_the_model_alone(scripts: Scripts, tiny: Any) -> None:
    """Peers of large models cost no memory, and one peer's changes are not seen by another."""
    copied = scripts["peers_models"].target(tiny, 4, lambda model: None)
    own, others = list(tiny.model.parameters()), list(copied.model.parameters())
    assert all(one is other for one, other in zip(own, others, strict=True))
    assert copied.denoiser.blocks is copied.blocks
    assert copied.blocks is not tiny.model.blocks
    assert type(copied.blocks[0]) is not type(tiny.model.blocks[0])


@needs_diffusers
def test_first_block_cache_that_never_reuses_is_the_model(scripts: Scripts, draw: Callable[..., torch.Tensor]) -> None:
    """A threshold below every difference computes all; above every difference, all steps but the first reuse."""
    attach = scripts["peers_methods"].first_block
    assert torch.equal(draw(attach, threshold=-1.0), draw())
    assert float(psnr(draw(attach, threshold=1e9), draw()).mean()) < 100


@needs_diffusers
@pytest.mark.parametrize(
    ("name", "settings"),
    [
        ("first_block", {"threshold": 1e9}),
        ("taylorseer", {"interval": 5, "order": 1, "modules": None}),
        ("mag", {"threshold": 10.0, "max_skip": 3}),
    ],
)
def test_a_second_run_is_the_first(
    scripts: Scripts, draw: Callable[..., torch.Tensor], name: str, settings: dict[str, Any]
) -> None:
    """A reset leaves nothing of the run before; and what was attached does something."""
    attach = getattr(scripts["peers_methods"], name)
    one = draw(attach, steps=6, **settings)
    assert torch.equal(one, draw(attach, steps=6, runs=2, **settings))
    assert not torch.equal(one, draw(steps=6))


def pixart(scripts: Scripts) -> Any:
    """The PixArt of the comparison, of 2 blocks and 16 tokens; its gates do not vanish."""
    subject = scripts["peers_models"].pixart(layers=2, heads=2, size=8, tokens=5)
    return dataclasses.replace(subject, model=fill(subject.model))


@needs_diffusers
@pytest.mark.parametrize(
    ("peer", "settings", "twin", "options"),
    [
        ("taylorseer", {"interval": 3, "order": 2, "modules": None}, "taylorseer", {"order": 2, "attention": True}),
        ("taylorseer", {"interval": 5, "order": 1, "modules": "all"}, "taylorseer", {"order": 1, "attention": False}),
        ("first_block", {"threshold": 0.5}, "blocks", {"first": 1}),
        ("mag", {"threshold": 0.5, "max_skip": 2}, "blocks", {"first": 0}),
        ("pyramid", {"interval": 2}, "broadcast", {"interval": 2}),
        ("pyramid", {"interval": 2, "cross": 3}, "broadcast", {"interval": 2, "cross": 3}),
        pytest.param("dual_block", {"threshold": 0.9, "warmup": 2}, "blocks", {"first": 1}, marks=needs_cache_dit),
        pytest.param(
            "dual_block", {"threshold": 0.9, "warmup": 4, "order": 1}, "blocks", {"first": 1, "order": 1},
            marks=needs_cache_dit,
        ),
    ],
)  # fmt: skip
@pytest.mark.filterwarnings("default")  # of the packages
def test_a_plan_repeats_what_a_peer_decided(
    scripts: Scripts, tiny: Any, peer: str, settings: dict[str, Any], twin: str, options: dict[str, Any]
) -> None:
    """The same images, of the same MACs: the rows can be compared."""
    methods, steps = scripts["peers_methods"], 11
    if settings.get("modules"):
        settings = {**settings, "modules": methods.MODULES}
    subject = pixart(scripts) if peer == "pyramid" else tiny
    task = subject.task(2, seed=0)
    target = scripts["peers_models"].target(subject, steps, lambda model: list(task.denoise(model, steps)))
    attached = getattr(methods, peer)(target, **settings)
    method = Method("peer", lambda: (attached.reset(), attached.around(target.model))[1], tuple(range(steps)))
    with torch.no_grad():
        work = scripts["peers_probe"].eager_work(method, task)
        *_, theirs = task.denoise(method.open(), steps)
        *_, uncached = task.denoise(subject.model, steps)

    info = tcc.inspect(subject.model, *task.first_call()[0])
    plan = getattr(scripts["peers_plans"], twin)(info, work.step_macs, task.timesteps(steps), **options)
    *_, ours = task.denoise(tcc.compile(subject.model, plan, backend="eager"), steps)
    assert relative_error(ours, theirs) < 1e-5
    assert relative_error(ours, uncached) > 1e-4
    assert plan.cost is not None
    saved = [had - macs * info.batch for had, macs in zip(work.step_macs, plan.cost.step_macs, strict=True)]
    embedded = 4 * 5 * 2 * 128**2  # prompts, in vain where no attention to them is left: a dead part of tcc's graph
    assert set(saved) <= ({0, embedded} if "cross" in options else {0})


def test_a_peer_that_computes_every_step_has_no_plan_of_its_own(scripts: Scripts, tiny: Any) -> None:
    """What it adds to a step by itself is no decision."""
    info = tcc.inspect(tiny.model, *tiny.task(2, seed=0).first_call()[0])
    with pytest.raises(PlanError, match="it computed every step: there is no decision to repeat"):
        scripts["peers_plans"].blocks(info, [1000.0, 1002.0, 1000.0], [3.0, 2.0, 1.0], first=1)


def test_a_device_that_is_not_there_is_one_line(scripts: Scripts, capsys: pytest.CaptureFixture[str]) -> None:
    """Told before anything is built."""
    assert scripts["peers"].main(["--device", "cuda:99"]) == 2
    assert "--device cuda:99: torch sees" in capsys.readouterr().err


@needs_diffusers
def test_work_is_counted_operator_by_operator(scripts: Scripts, tiny: Any) -> None:
    """A first-block cache that always reuses computes one block of three after the first step, and holds residuals."""
    torch._dynamo.reset()  # type: ignore[no-untyped-call] # else the blocks may be compiled already
    bench = scripts["peers"].Bench(tiny, steps=4, batch=2, seed=0, backend="eager")
    bench.add_uncached()
    methods = scripts["peers_methods"]
    always = functools.partial(scripts["peers_plans"].blocks, first=1)
    bench.add_peer(methods._peer("FBC", "FBC", "diffusers", methods.first_block, threshold=1e9, twin=always))
    eager, compiled, own, peer, peer_compiled, peer_blocks, twin = [entry.line for entry in bench.entries]
    assert eager.macs == pytest.approx(bench.uncached_work.macs / 2, rel=1e-9)  # tcc counts what the operators do
    assert compiled.macs == own.macs == eager.macs
    block = 2 * _block_macs(tiny.model)
    assert eager.macs - peer.macs == pytest.approx(3 * 2 * block, rel=1e-9)
    assert (twin.method, twin.package) == ("FBC, diffusers' steps", "tcc")
    assert twin.macs == pytest.approx(peer.macs, rel=1e-9)
    residuals = 3 * 4 * 16 * 32 * 4  # the head's residual and output, and the tail's residual: [4, 16, 32] float32
    assert peer.cache_bytes == pytest.approx(residuals, rel=0.1)
    assert peer_compiled.graph_breaks > 0
    assert peer_blocks.compile_seconds > 0
    assert peer_blocks.graph_breaks == 0
    assert compiled.graph_breaks == 0


def _block_macs(model: DiT) -> int:
    """MACs of a block for one image: adaLN, qkv, attention, projection, MLP."""
    width, tokens, hidden = 32, 16, 128
    return 6 * width * width + tokens * (4 * width * width + 2 * tokens * width + 2 * width * hidden)


def test_images_for_fd_are_of_all_classes(scripts: Scripts, tiny: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """In turn, and of noise of their own, whatever the batch."""
    drawn: list[Task] = []

    def draw_none(_: object, task: Task) -> torch.Tensor:
        drawn.append(task)
        return torch.zeros(2, 1, 8, 8)

    monkeypatch.setattr(scripts["peers"], "run", draw_none)
    monkeypatch.setattr(scripts["peers"], "feature_network", lambda: lambda images: torch.rand(len(images), 128))
    bench = scripts["peers"].Bench(tiny, steps=2, batch=2, seed=0, backend="eager")
    assert bench.fd(0) is None
    bench.fd(5)(None)
    assert torch.cat([task.labels for task in drawn]).tolist() == [0, 1, 2, 0, 1, 2]
    assert len({float(x) for task in drawn for x in task.noise[:, 0, 0, 0]}) == 6


@needs_diffusers
def test_the_harness_measures_methods_side_by_side(
    scripts: Scripts, tiny: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Rows of all kinds; the JSON of each has the same keys; a peer that cannot be attached says why."""
    peers = scripts["peers"]
    monkeypatch.setitem(peers.SUBJECTS, "tiny", lambda: tiny)
    options = ["--model", "tiny", "--steps", "4", "--batch", "2", "--backend", "eager", "--rounds", "1"]
    options += ["--threads", str(torch.get_num_threads()), "--results", str(tmp_path / "out")]
    options += ["--fd-images", "4"]
    assert peers.main([*options, "--only", "FORA N=2,FirstBlockCache 0.2,broadcast N=2"]) == 0
    record = json.loads((tmp_path / "out" / "peers-tiny-2x4.json").read_text())
    rows = {(row["method"], row["mode"]): row for row in record["rows"]}
    assert all(row.keys() == KEYS for row in rows.values())
    assert rows["uncached", "torch.compile"]["speedup"] == 1
    assert rows["uncached", "eager"]["identical"]
    assert rows["FORA N=2", "tcc"]["bound"] > 1.3
    assert rows["FirstBlockCache 0.2", "eager"]["seconds"] > 0
    assert rows["FirstBlockCache 0.2", "eager"]["fd"] == rows["FirstBlockCache 0.2", "torch.compile"]["fd"] > 0
    failed = rows["PyramidAttentionBroadcast N=2", "eager"]
    assert "match no module" in failed["reason"]
    assert failed["seconds"] is None
    assert rows["FORA N=2", "tcc"]["peak_bytes"] > rows["uncached", "tcc"]["peak_bytes"] > 0
    assert {path.suffix for path in (tmp_path / "out").iterdir()} == {".json", ".md", ".png"}

    earlier = tmp_path / "out" / "peers-tiny-2x4.json"
    more = [*options, "--fd-images", "0", "--results", str(tmp_path / "more"), "--with", str(earlier)]
    assert peers.main([*more, "--only", "FORA N=3"]) == 0
    joined = json.loads((tmp_path / "more" / "peers-tiny-2x4.json").read_text())
    assert joined["rows"][: len(record["rows"])] == record["rows"]
    assert [(row["method"], row["part"]) for row in joined["rows"][len(record["rows"]) :]] == [("FORA N=3", 1)]
    assert [part["settings"]["batch"] for part in joined["parts"]] == [2, 2]
    rows = (tmp_path / "more" / "peers-tiny-2x4.md").read_text().splitlines()
    assert [row.split(" | ")[3] for row in rows if row.startswith(("| method", "| FORA N="))] == ["process", "1", "2"]
    assert "Seconds compare within a process alone" in rows[-1]
    assert "process" not in (tmp_path / "out" / "peers-tiny-2x4.md").read_text()
    with pytest.raises(SystemExit, match=r"measured with other settings \(steps\)"):
        peers.main([*more, "--only", "nothing", "--steps", "3"])


def test_a_missing_package_is_a_reason(scripts: Scripts, tiny: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """The other rows are measured all the same."""
    monkeypatch.setitem(sys.modules, "cache_dit", None)
    bench = scripts["peers"].Bench(tiny, steps=2, batch=1, seed=0, backend="eager")
    bench.add_peer(next(peer for peer in scripts["peers"].PEERS if peer.package == "cache_dit"))
    assert [line.mode for line in bench.failed] == ["eager", "torch.compile", "compiled blocks"]
    assert all("cache_dit" in line.reason for line in bench.failed)
    assert not bench.entries


@needs_cache_dit
@pytest.mark.filterwarnings("default")  # of cache-dit and what it imports
def test_dual_block_cache_reuses_after_its_warm_up(
    scripts: Scripts, draw: Callable[..., torch.Tensor], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Within the warm-up it is the model; a second run is the first; and compiler settings are taken back."""
    methods = scripts["peers_methods"]
    attach = methods.dual_block
    assert torch.equal(draw(attach, threshold=1e9, warmup=4), draw())
    cached = draw(attach, threshold=1e9, warmup=2)
    assert not torch.equal(cached, draw())
    assert torch.equal(cached, draw(attach, threshold=1e9, warmup=2, runs=2))
    before = torch._inductor.config.get_config_copy()
    with contextlib.suppress(KeyError), methods.cache_dit_settings():
        assert torch._inductor.config.get_config_copy() != before
        raise KeyError
    assert torch._inductor.config.get_config_copy() == before
