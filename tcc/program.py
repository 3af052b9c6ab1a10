"""A program: the variants of a plan, and which step runs which one with which tokens."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import fx

from tcc.capture import Captured
from tcc.checks import check_sites, forecast_depth
from tcc.liveness import Span, find_spans, live_stores, slot_names
from tcc.passes.base import PassRecord, run_passes
from tcc.passes.graph import output_values, value
from tcc.passes.insert_slots import Entry
from tcc.passes.macs import count
from tcc.passes.pipeline import StepKind, variant_passes
from tcc.passes.sites import Analysis
from tcc.plan import Action, CachePlan, Cost, Reuse, Update

__all__ = ["Binding", "Program", "SlotSpec", "Variant", "build_program"]


@dataclass(frozen=True)
class SlotSpec:
    """One slot: a buffer that keeps a value between steps."""

    name: str
    shape: tuple[int, ...]
    dtype: torch.dtype
    device: torch.device

    @property
    def bytes(self) -> int:
        """Its size."""
        return torch.Size(self.shape).numel() * self.dtype.itemsize


@dataclass(frozen=True)
class Variant:
    """The rewritten graph for one kind of step.

    Attributes:
        gm: the graph: the model's inputs, then `reads` and `extras` as inputs; the model's outputs, then `stores`.
        kind: what it does.
        extras: the graph's inputs after the model's own, by name (`slot:...`, `kept_0`, `place_0`, `coefficients_0`).
        stores: the slots whose new values the graph returns after the model's outputs.
        macs: its MACs, for the captured batch.
        records: what each pass did.
    """

    gm: fx.GraphModule
    kind: StepKind
    extras: tuple[str, ...]
    stores: tuple[str, ...]
    macs: int
    records: tuple[PassRecord, ...]


@dataclass(frozen=True)
class Binding:
    """What one step runs: a variant, and the tensors for its token and coefficient inputs."""

    variant: int
    tensors: dict[str, torch.Tensor]


@dataclass(frozen=True)
class Program:
    """All variants of a plan, the step -> variant table, and the slots."""

    captured: Captured
    variants: tuple[Variant, ...]
    bindings: tuple[Binding, ...]
    slots: tuple[SlotSpec, ...]

    @property
    def slot_bytes(self) -> int:
        """The bytes of all slots."""
        return sum(slot.bytes for slot in self.slots)

    def cost(self, analysis: Analysis) -> Cost:
        """MACs per step for one image and guidance branch, and the slots' bytes."""
        batch = analysis.batch
        steps = tuple(self.variants[b.variant].macs // batch for b in self.bindings)
        return Cost(analysis.macs // batch, steps, self.slot_bytes)


def build_program(
    captured: Captured,
    analysis: Analysis,
    plan: CachePlan,
    *,
    check: bool = True,
    progress: Callable[[str], None] | None = None,
    known: dict[StepKind, Variant] | None = None,
) -> Program:
    """Rewrite the captured graph once per distinct kind of step.

    Args:
        captured: the model's graph.
        analysis: what is known about it.
        plan: the plan.
        check: verify the graph after every pass.
        progress: called with a line before each variant is built.
        known: variants of the same graph that exist already; new ones are added to it.

    Raises:
        PlanError: the plan does not fit the graph.
        PassError, VerificationError: a pass failed.
    """
    check_sites(plan, analysis)
    kinds, tables = _step_kinds(plan, analysis)
    distinct = list(dict.fromkeys(kinds))
    known = {} if known is None else known
    for number, kind in enumerate(distinct):
        if kind not in known:
            if progress:
                progress(f"rewriting variant {number + 1}/{len(distinct)}")
            known[kind] = _build_variant(captured.gm, kind, f"variant{number}", check)
    variants = [known[kind] for kind in distinct]
    bindings = tuple(
        Binding(distinct.index(kind), _tensors(plan, analysis, table))
        for kind, table in zip(kinds, tables, strict=True)
    )
    return Program(captured, tuple(variants), bindings, _slots(variants))


@dataclass(frozen=True)
class _Table:
    """The inputs of one step that are not in its kind: token sets and coefficients, in the order of their numbers."""

    tokens: tuple[str, ...]
    coefficients: tuple[tuple[float, ...], ...]


def _step_kinds(plan: CachePlan, analysis: Analysis) -> tuple[list[StepKind], list[_Table]]:
    spans = find_spans(plan, analysis)
    stores = [live_stores(plan, span, analysis.num_tokens) for span in spans]
    kinds, tables = [], []
    for step in range(plan.num_steps):
        entries, table = _entries(plan, spans, step)
        live = frozenset(
            name for entry, ages in zip(entries, stores, strict=True) for name in slot_names(entry.slots, ages[step])
        )
        counts = tuple(plan.tokens[name].numel() for name in table.tokens)
        kinds.append(StepKind(entries, live, counts, analysis.num_tokens))
        tables.append(table)
    return _share_stores(kinds), tables


def _share_stores(kinds: list[StepKind]) -> list[StepKind]:
    """One variant for steps that differ in nothing but stores: what is live at one of them is stored at all of them."""
    live: dict[StepKind, frozenset[str]] = {}
    for kind in kinds:
        key = replace(kind, live=frozenset())
        live[key] = live.get(key, frozenset()) | kind.live
    return [replace(kind, live=live[replace(kind, live=frozenset())]) for kind in kinds]


def _entries(plan: CachePlan, spans: list[Span], step: int) -> tuple[tuple[Entry, ...], _Table]:
    tokens: list[str] = []
    coefficients: list[tuple[float, ...]] = []
    entries = []
    for span in spans:
        action: Action = plan.action(step, span[0].name)
        number = 0
        if isinstance(action, Update):
            name = str(action.tokens)
            tokens += [name] if name not in tokens else []
            action = replace(action, tokens=str(tokens.index(name)))
        if isinstance(action, Reuse) and action.order:
            coefficients += [action.coefficients] if action.coefficients not in coefficients else []
            number = coefficients.index(action.coefficients)
            action = Reuse(action.order, (0.0,) * (action.order + 1))
        entries.append(Entry(span, action, forecast_depth(plan, span[0].name), number))
    return tuple(entries), _Table(tuple(tokens), tuple(coefficients))


def _build_variant(gm: fx.GraphModule, kind: StepKind, label: str, check: bool) -> Variant:
    graph = fx.Graph()
    output = graph.graph_copy(gm.graph, {})
    graph.output(output)
    copy = fx.GraphModule(gm, graph)
    records = run_passes(copy, variant_passes(kind), label=label, check=check)
    for node in list(copy.graph.nodes):
        if node.op == "placeholder" and "input" in node.meta and not node.users:
            copy.graph.erase_node(node)
    copy.recompile()
    extras = tuple(n.meta["input"] for n in copy.graph.nodes if n.op == "placeholder" and "input" in n.meta)
    stores = copy.meta.get("stores", ())
    return Variant(copy, kind, extras, stores, count(copy.graph.nodes), tuple(records))


def _tensors(plan: CachePlan, analysis: Analysis, table: _Table) -> dict[str, torch.Tensor]:
    tensors: dict[str, torch.Tensor] = {}
    for number, name in enumerate(table.tokens):
        kept = plan.tokens[name]
        place = torch.full((analysis.num_tokens,), -1, dtype=torch.int64)
        place[kept] = torch.arange(kept.numel())
        tensors |= {f"kept_{number}": kept, f"place_{number}": place}
    for number, weights in enumerate(table.coefficients):
        tensors[f"coefficients_{number}"] = torch.tensor(weights, dtype=torch.float32)
    return tensors


def _slots(variants: list[Variant]) -> tuple[SlotSpec, ...]:
    """Every slot that a variant writes or reads; an update of all tokens reads one that nobody needs to write."""
    found: dict[str, torch.Tensor] = {}
    for variant in variants:
        values = output_values(variant.gm.graph)
        stored = values[len(values) - len(variant.stores) :]
        found |= {name: value(node) for name, node in zip(variant.stores, stored, strict=True)}
        reads = [n for n in variant.gm.graph.nodes if n.op == "placeholder" and "slot" in n.meta]
        found |= {node.meta["slot"]: value(node) for node in reads}
    return tuple(SlotSpec(name, tuple(val.shape), val.dtype, val.device) for name, val in sorted(found.items()))
