"""The ordered lists of passes: from the captured graph to one step variant, and from that to what a backend gets."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from tcc.passes.base import Pass
from tcc.passes.choose_tokens import Choice
from tcc.passes.contiguous_rows import ContiguousRows
from tcc.passes.drop_dead_parts import DropDeadParts
from tcc.passes.drop_dead_stores import DropDeadStores
from tcc.passes.entries import NO_RECORDS, Entry, Records, history
from tcc.passes.fold_timesteps import Fold, FoldTimesteps
from tcc.passes.insert_slots import InsertSlots
from tcc.passes.lower_tokens import LowerTokens
from tcc.passes.merge_runs import MergeRuns
from tcc.passes.narrow_slots import NarrowSlots
from tcc.passes.outline_repeats import OutlineRepeats
from tcc.passes.prune_tokens import PruneTokens
from tcc.passes.repeats import Stretch
from tcc.passes.split_projections import SplitProjections
from tcc.passes.write_rows import WriteRows
from tcc.passes.write_slots import WriteSlots
from tcc.plan import Compute

__all__ = ["ALL", "Rewrites", "StepKind", "lowering_passes", "storing_passes", "variant_passes"]


@dataclass(frozen=True)
class Rewrites:
    """Which of the rewrites are made that change time and memory alone; to measure what each of them is worth.

    Attributes:
        merge_runs: neighbours with one token set, or sets within each other, gather once and scatter once.
        merge_spans: neighbours on the stream that are treated alike share one summed slot.
        drop_dead_stores: what no later step reads is not stored.
        drop_dead_parts: parts of products that nobody reads are not computed.
        write_rows: of a slot whose tokens are updated in part, those are written alone.
        share_buffers: slots that no step needs both of have one buffer. This changes memory alone: the variants are the
            same, and name other slots.
        share_variants: steps that differ in nothing but what they store have one variant, and store alike. Without it
            there is more to compile and less that is stored in vain, so that more slots can share a buffer; that is
            what a plan gets whose slots take more than `max_slot_bytes`.
    """

    merge_runs: bool = True
    merge_spans: bool = True
    drop_dead_stores: bool = True
    drop_dead_parts: bool = True
    write_rows: bool = True
    share_buffers: bool = True
    share_variants: bool = True


ALL = Rewrites()


@dataclass(frozen=True)
class StepKind:
    """Everything that decides the graph of a step; steps of one kind share a variant.

    Attributes:
        entries: the actions.
        live: the slots that the step must store.
        sets: every token set that the actions name by number: its size, or how it is chosen.
        num_tokens: the tokens of the stream.
        records: what the step notes down for the scores of later steps.
        slot_dtype: what slots keep wider values in.
        rewrites: what is left out of the pipeline.
        nested: token sets that are within another, see `MergeRuns`.
    """

    entries: tuple[Entry, ...]
    live: frozenset[str]
    sets: tuple[int | Choice, ...]
    num_tokens: int
    records: Records = NO_RECORDS
    slot_dtype: torch.dtype | None = None
    rewrites: Rewrites = ALL
    nested: frozenset[tuple[int, int]] = frozenset()

    @property
    def slots(self) -> frozenset[str]:
        """The slots of the actions."""
        return frozenset(history(slot, age) for e in self.entries for slot in e.slots for age in range(e.depth))


def variant_passes(kind: StepKind) -> list[Pass]:
    """The passes for one kind of step, in order."""
    narrow = [NarrowSlots(kind.slots, kind.slot_dtype)] if kind.slot_dtype else []
    live = [DropDeadStores(kind.live)] if kind.rewrites.drop_dead_stores else []
    merge = [MergeRuns(kind.nested)] if kind.rewrites.merge_runs else []
    return [
        # first: names of sites are names of this graph
        InsertSlots(kind.entries, kind.sets, kind.num_tokens, kind.records),
        *live,  # before pruning: a dead store would keep whole values alive
        *narrow,  # after: a dead store needs no rounding
        *merge,  # before pruning: gathers that cancel need not move
        SplitProjections(),  # before pruning: a fused projection is one value, needed whole for its keys
        PruneTokens(),
        *merge,  # gathers that pruning has brought next to a scatter
        LowerTokens(),  # last: the passes above look for the token operators
    ]


def lowering_passes(
    kind: StepKind, *, folds: tuple[Fold, ...] = (), num_steps: int = 0, regional: bool = False
) -> list[Pass]:
    """The first passes for a variant that is compiled in this process, in order: while it returns what it stores.

    Args:
        kind: what it does.
        folds: the values that are computed once per run.
        num_steps: the steps of a run, for which there are such values.
        regional: what variants repeat will be compiled for itself.
    """
    computes = all(isinstance(entry.action, Compute) for entry in kind.entries)
    return [
        # first: parts of what is read from a table cost nothing
        *([FoldTimesteps(folds, num_steps)] if folds else []),
        # a step that computes everything keeps the model's own products, and with them its bits
        *([DropDeadParts()] if kind.rewrites.drop_dead_parts and not computes else []),
        *([WriteRows()] if kind.rewrites.write_rows else []),
        # last: what passes between two operators lies as the graph now says
        *([ContiguousRows()] if regional else []),
    ]


def storing_passes(repeats: Sequence[Stretch] | None = None) -> list[Pass]:
    """The last passes for such a variant, in order.

    Args:
        repeats: what becomes one sub-graph, which is compiled once; None to compile the variant as a whole.
    """
    return [
        *([OutlineRepeats(tuple(repeats))] if repeats is not None else []),  # before: copies write different slots
        WriteSlots(),
    ]
