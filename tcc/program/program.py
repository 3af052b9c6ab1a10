"""A program: the variants of a plan, and which step runs which one with which tokens."""

from __future__ import annotations

import contextlib
import gc
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace

import torch
from torch import fx

from tcc.capture import Captured
from tcc.passes.base import PassRecord, run_passes, verify
from tcc.passes.graph import copy_of, output_values, value
from tcc.passes.macs import count
from tcc.passes.pipeline import ALL, Rewrites, StepKind, variant_passes
from tcc.passes.sites import Analysis
from tcc.plan import CachePlan, Cost, TopK
from tcc.plan.checks import check_sites
from tcc.program.memory import Memory, find_memory
from tcc.program.step_kinds import StepTable, find_step_kinds, share_stores

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
        extras: the graph's inputs after the model's own, by name (`slot:...`, `kept_0`, `place_0`, `coefficients_0`,
            `table_0`).
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
    """What one step runs: a variant, and the tensors for its token, coefficient and table inputs."""

    variant: int
    tensors: dict[str, torch.Tensor]


@dataclass(frozen=True)
class Program:
    """All variants of a plan, the step -> variant table, and the slots.

    Attributes:
        captured: the model's graph.
        variants: the variants; a slot that has the buffer of another goes by that one's name.
        bindings: what every step runs.
        slots: the slots that have a buffer of their own.
        memory: all slots, with their sizes and the steps that need them.
    """

    captured: Captured
    variants: tuple[Variant, ...]
    bindings: tuple[Binding, ...]
    slots: tuple[SlotSpec, ...]
    memory: Memory

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
    max_slot_bytes: int | None = None,
    rewrites: Rewrites = ALL,
) -> Program:
    """Rewrite the captured graph once per distinct kind of step.

    Args:
        captured: the model's graph.
        analysis: what is known about it.
        plan: the plan.
        check: verify the graph after every pass.
        progress: called with a line before each variant is built.
        known: variants of the same graph that exist already; new ones are added to it.
        max_slot_bytes: the most bytes that a session may allocate for slots. Steps that differ in nothing but what
            they store share a variant, and store alike; where that takes too much, they get variants of their own.
        rewrites: which rewrites are made, to measure what each of them is worth.

    Raises:
        PlanError: the plan does not fit the graph, or its slots take more than `max_slot_bytes`.
        PassError, VerificationError: a pass failed.
    """
    check_sites(plan, analysis)
    kinds, tables = find_step_kinds(plan, analysis, rewrites)
    share = rewrites.share_buffers
    made = _Making(captured, analysis, plan, tables, check, progress, {} if known is None else known, share)
    program = made.program(share_stores(kinds) if rewrites.share_variants else kinds)
    if max_slot_bytes is not None and program.slot_bytes > max_slot_bytes:  # more variants, and fewer slots at a time
        program = made.program(kinds)
    program.memory.check(max_slot_bytes)
    return program


@contextlib.contextmanager
def _collecting_after() -> Iterator[None]:
    """Python collects garbage after the block, and not within.

    A variant is tens of thousands of objects, made in one go, and all of them stay: collections in between would go
    over everything that lives, torch and the other variants too, and find nothing.
    """
    collecting = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if collecting:
            gc.enable()


@dataclass(frozen=True)
class _Making:
    """What programs of one plan are made of."""

    captured: Captured
    analysis: Analysis
    plan: CachePlan
    tables: list[StepTable]
    check: bool
    progress: Callable[[str], None] | None
    known: dict[StepKind, Variant]
    share_buffers: bool

    @_collecting_after()
    def program(self, kinds: list[StepKind]) -> Program:
        """The program whose steps are of these kinds."""
        distinct = list(dict.fromkeys(kinds))
        if self.check and any(kind not in self.known for kind in distinct):
            verify(self.captured.gm, "capture")  # once: of its copies, what a pass changes
        for number, kind in enumerate(distinct):
            if kind not in self.known:
                if self.progress:
                    self.progress(f"rewriting variant {number + 1}/{len(distinct)}")
                self.known[kind] = _build_variant(self.captured.gm, kind, f"variant{number}", self.check)
        variants = [self.known[kind] for kind in distinct]
        numbers = {kind: number for number, kind in enumerate(distinct)}
        bindings = tuple(
            Binding(numbers[kind], _tensors(self.plan, self.analysis, table))
            for kind, table in zip(kinds, self.tables, strict=True)
        )
        slots = _slots(variants)
        memory = find_memory(slots, variants, bindings, self.analysis.sites, share=self.share_buffers)
        shared = {slot.name: slot.buffer for slot in memory.slots if slot.buffer != slot.name}
        variants = [_renamed(variant, shared) for variant in variants]
        own = tuple(slot for slot in slots if slot.name not in shared)
        return Program(self.captured, tuple(variants), bindings, own, memory)


def _renamed(variant: Variant, names: Mapping[str, str]) -> Variant:
    """`variant` with other names for some slots."""
    if not names.keys() & {*variant.stores, *(name.removeprefix("slot:") for name in variant.extras)}:
        return variant
    gm = copy_of(variant.gm)
    for node in gm.graph.nodes:
        if node.meta.get("slot") in names:
            slot = names[node.meta["slot"]]
            node.meta |= {"slot": slot, "input": f"slot:{slot}"}
    stores = tuple(names.get(slot, slot) for slot in variant.stores)
    gm.meta["stores"] = stores
    extras = tuple(n.meta["input"] for n in gm.graph.nodes if n.op == "placeholder" and "input" in n.meta)
    return replace(variant, gm=gm, extras=extras, stores=stores)


def _build_variant(gm: fx.GraphModule, kind: StepKind, label: str, check: bool) -> Variant:
    copy = copy_of(gm)
    records = run_passes(copy, variant_passes(kind), label=label, check=check, verified=True)
    for node in list(copy.graph.nodes):
        if node.op == "placeholder" and "input" in node.meta and not node.users:
            copy.graph.erase_node(node)
    copy.recompile()
    extras = tuple(n.meta["input"] for n in copy.graph.nodes if n.op == "placeholder" and "input" in n.meta)
    stores = copy.meta.get("stores", ())
    return Variant(copy, kind, extras, stores, count(copy.graph.nodes), tuple(records))


def _tensors(plan: CachePlan, analysis: Analysis, table: StepTable) -> dict[str, torch.Tensor]:
    tensors: dict[str, torch.Tensor] = {}
    for number, name in enumerate(table.tokens):
        if isinstance(name, TopK):
            continue
        kept = plan.tokens[name].clone()  # the caller may change theirs
        place = torch.full((analysis.num_tokens,), -1, dtype=torch.int64)
        place[kept] = torch.arange(kept.numel())
        tensors |= {f"kept_{number}": kept, f"place_{number}": place}
    for number, weights in enumerate(table.coefficients):
        tensors[f"coefficients_{number}"] = torch.tensor(weights, dtype=torch.float32)
    for number, name in enumerate(table.tables):
        tensors[f"table_{number}"] = plan.tables[name].to(torch.float32, copy=True)
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
