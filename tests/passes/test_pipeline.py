"""The whole pipeline, stage by stage: every pass but the first keeps what the graph computes."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, fx

import tcc
from tcc.passes.base import run_passes
from tcc.passes.pipeline import variant_passes
from tcc.passes.tokens import gather_tokens, scatter_tokens
from tcc.plan import CachePlan, Compute, Hold, Reuse, Skip, Update
from tcc.program import build_program
from tests.graphs import place_of
from tests.tiny_models import case, relative_error

#: float32 sums in another order.
CLOSE = 5e-6
KEPT = [0, 3, 5, 6, 10, 11]


def plan(kind: str, name: str) -> CachePlan:
    """A plan that computes for two steps, and then uses one kind of action on every block."""
    info = case(name).info
    tokens = {"T": torch.tensor(KEPT)}
    blocks = [site for site, s in info.sites.items() if s.kind == "block"]
    keys = [site for site, s in info.sites.items() if s.kind == "kv"]
    action: Any = {
        "kept": Update("T", "kept"),
        "current": Update("T", "current"),
        "cached": Update("T", "cached"),
        "reuse": Reuse(),
        "forecast": Reuse(1, (2.0, -1.0)),
        "skip": Skip(),
        "hold": Hold(),
    }[kind]
    sites = ["out.stream"] if kind == "hold" else [*keys, *blocks] if kind == "cached" else blocks
    actions = {(s, site): Compute() if s < 2 else action for s in range(4) for site in sites}
    return CachePlan(num_steps=4, actions=actions, tokens=tokens)


def inputs(gm: fx.GraphModule) -> dict[str, Tensor]:
    """Real tensors for every input by name; the same name gets the same tensor at every stage."""
    made = {}
    for node in gm.graph.nodes:
        if node.op == "placeholder":
            name, val = node.meta.get("input", node.target), node.meta["val"]
            generator = torch.Generator().manual_seed(sum(map(ord, name)))
            made[name] = torch.randn(val.shape, generator=generator)
            if name.startswith("kept_"):
                made[name] = torch.tensor(KEPT)
            elif name.startswith("place_"):
                made[name] = place_of(KEPT, val.shape[0])
            elif not val.dtype.is_floating_point:
                made[name] = torch.ones(val.shape, dtype=val.dtype)
    return made


def results(gm: fx.GraphModule) -> dict[str, Tensor]:
    """What the graph computes: its outputs by number, its stores by slot."""
    with torch.no_grad():
        outputs = gm(*inputs(gm).values())
    stores = gm.meta.get("stores", ())
    names = [*map(str, range(len(outputs) - len(stores))), *stores]
    return dict(zip(names, outputs, strict=True))


@pytest.mark.parametrize("kind", ["kept", "current", "cached", "reuse", "forecast", "skip", "hold"])
@pytest.mark.parametrize("name", ["dit", "hf_pixart"])
def test_every_pass_after_the_first_keeps_the_results(name: str, kind: str) -> None:
    """Outputs and stores agree from stage to stage, and no token operator is left at the end."""
    info = case(name).info
    program = build_program(info.captured, info.analysis, plan(kind, name), check=False)
    for variant in program.variants:
        graph = fx.Graph()
        graph.output(graph.graph_copy(info.captured.gm.graph, {}))
        gm = fx.GraphModule(info.captured.gm, graph)
        before: dict[str, Tensor] | None = None
        for item in variant_passes(variant.kind):
            run_passes(gm, [item])
            after = results(gm)
            if before is not None:
                assert set(after) <= set(before), item.name
                assert all(relative_error(after[key], before[key]) <= CLOSE for key in after), item.name
            before = after
        targets = {node.target for node in gm.graph.nodes}
        assert not targets & {gather_tokens, scatter_tokens}


@pytest.mark.parametrize("kind", ["kept", "current", "cached", "reuse", "forecast"])
def test_a_second_run_of_the_pipeline_s_tail_changes_nothing(kind: str) -> None:
    """Once a variant is built, none of its rewriting passes finds more to do."""
    info = case("dit").info
    program = build_program(info.captured, info.analysis, plan(kind, "dit"), check=False)
    for variant in program.variants:
        graph = fx.Graph()
        graph.output(graph.graph_copy(variant.gm.graph, {}))
        gm = fx.GraphModule(variant.gm, graph)
        records = run_passes(gm, variant_passes(variant.kind)[2:])
        assert {record.name: record.edits for record in records if record.edits} == {}


def test_a_variant_records_its_passes() -> None:
    """One record per pass, in order, with what it did."""
    info = case("dit").info
    program = build_program(info.captured, info.analysis, plan("kept", "dit"))
    names = [item.name for item in variant_passes(program.variants[1].kind)]
    assert [record.name for record in program.variants[1].records] == names
    edits = {record.name: record.edits for record in program.variants[1].records}
    assert edits["InsertSlots"] > 0
    assert edits["PruneTokens"] > 0
    assert edits["LowerTokens"] > 0


def test_building_tells_its_progress() -> None:
    """A line before each variant."""
    info = case("dit").info
    lines: list[str] = []
    build_program(info.captured, info.analysis, plan("kept", "dit"), check=False, progress=lines.append)
    assert lines == ["rewriting variant 1/2", "rewriting variant 2/2"]
    assert tcc.plans.full(info, num_steps=2).schedule.i_steps == (0, 1)
