"""The slots of a plan, known before it runs: their bytes, when they hold a value, and which share a buffer."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from tcc.errors import PlanError
from tcc.tables import TextTable

if TYPE_CHECKING:
    from tcc.passes.sites import Site
    from tcc.program.program import Binding, SlotSpec, Variant

__all__ = ["Memory", "SlotUse", "find_memory", "in_units"]

_SHOWN = 5  # slots that an error names


@dataclass(frozen=True)
class SlotUse:
    """One slot, and when it is needed.

    Attributes:
        name: the slot: a site's name, `.k` and `.v` for keys and values, `+n` for the sum with the n following sites,
            `~a` for the value computed a computations before the newest.
        shape: its shape, for the captured batch.
        dtype: its dtype.
        bytes: its size.
        kind: the kind of its site (`out`, `delta`, `block`, `stream`, `skip`, `kv`); "" for what scores read.
        block: the site's block and stream; "" for what scores read.
        steps: the steps that read it, write it, or come between a write and a read.
        buffer: the slot whose buffer it lives in: its own name, or that of one which is needed at other steps.
    """

    name: str
    shape: tuple[int, ...]
    dtype: torch.dtype
    bytes: int
    kind: str
    block: str
    steps: tuple[int, ...]
    buffer: str


@dataclass(frozen=True)
class Memory:
    """What a session of a plan allocates beside the model's own memory.

    Attributes:
        slots: the slots.
        num_steps: the steps of the plan.
    """

    slots: tuple[SlotUse, ...]
    num_steps: int

    @property
    def total(self) -> int:
        """The bytes that a session allocates for slots: those of all buffers."""
        return sum(slot.bytes for slot in self.slots if slot.buffer == slot.name)

    @property
    def peak(self) -> int:
        """The most bytes that hold a value at one step; `total` would be as low if any two slots could share."""
        return max((sum(s.bytes for s in self.slots if step in s.steps) for step in range(self.num_steps)), default=0)

    def table(self) -> TextTable:
        """The slots, largest first."""
        title = f"slots: {in_units(self.total)} allocated, at most {in_units(self.peak)} needed at one step"
        table = TextTable(title=title)
        for column in ("slot", "shape", "dtype", "KiB", "steps", "buffer"):
            table.add_column(column, justify="right" if column == "KiB" else "left")
        for slot in sorted(self.slots, key=lambda slot: -slot.bytes):
            shape, dtype = " x ".join(map(str, slot.shape)), str(slot.dtype).removeprefix("torch.")
            buffer = "own" if slot.buffer == slot.name else slot.buffer
            table.add_row(slot.name, shape, dtype, f"{slot.bytes / 1024:.1f}", _ranges(slot.steps), buffer)
        return table

    def check(self, max_slot_bytes: int | None) -> None:
        """Hold the plan against a budget.

        Args:
            max_slot_bytes: the most bytes that one session may allocate for slots; None is no limit.

        Raises:
            PlanError: the slots take more. Names those that cost most, and what each way to need less saves.
        """
        if max_slot_bytes is None or self.total <= max_slot_bytes:
            return
        largest = sorted((s for s in self.slots if s.buffer == s.name), key=lambda slot: -slot.bytes)
        named = ", ".join(f"'{slot.name}' {in_units(slot.bytes)}" for slot in largest[:_SHOWN])
        more = f" and {len(largest) - _SHOWN} more" if len(largest) > _SHOWN else ""
        ways = "; ".join(f"{way} saves {in_units(saved)}" for way, saved in self.savings().items())
        raise PlanError(
            f"the plan's slots take {in_units(self.total)} for the captured batch, and max_slot_bytes allows "
            f"{in_units(max_slot_bytes)}. The largest: {named}{more}. What would save: {ways}"
        )

    def savings(self) -> dict[str, int]:
        """Bytes that each way to write the plan otherwise would save, where that is known without asking its policy."""
        own = [slot for slot in self.slots if slot.buffer == slot.name]
        keys = sum(slot.bytes for slot in own if slot.kind == "kv")
        older = sum(slot.bytes for slot in own if "~" in slot.name)
        blocks: dict[str, list[int]] = {}
        for slot in own:
            if slot.kind in ("out", "delta"):
                blocks.setdefault(slot.block, []).append(slot.bytes)
        merged = sum(sum(sizes) - max(sizes) for sizes in blocks.values())
        wide = sum(slot.bytes // 2 for slot in own if slot.dtype == torch.float32)
        found = {
            "attention 'kept' or 'current', without stored keys": keys,
            "reuse in place of forecasts (order=0)": older,
            "one delta per block (level='block')": merged,
            "slots in bfloat16 (slot_dtype=torch.bfloat16, on the command line --slot-dtype bfloat16)": wide,
            "caching half of the sites": self.total // 2,
        }
        return {way: saved for way, saved in found.items() if saved}


def find_memory(
    slots: Sequence[SlotSpec],
    variants: Sequence[Variant],
    bindings: Sequence[Binding],
    sites: Mapping[str, Site],
    *,
    share: bool = True,
) -> Memory:
    """When the slots of a plan's variants are needed, and which share a buffer: none, where `share` is false."""
    used = steps_in_use(variants, bindings)
    buffers = share_buffers(slots, used) if share else {slot.name: slot.name for slot in slots}
    found = []
    for slot in slots:
        site = sites.get(_site_of(slot.name))
        kind, block = (site.kind, f"{site.block}@{site.stream}") if site else ("", "")
        steps, buffer = _steps(used[slot.name]), buffers[slot.name]
        found.append(SlotUse(slot.name, slot.shape, slot.dtype, slot.bytes, kind, block, steps, buffer))
    return Memory(tuple(found), len(bindings))


def _site_of(slot: str) -> str:
    """The site, or the first of the sites, that a slot keeps."""
    name = re.sub(r"(\+\d+)?(~\d+)?$", "", slot)
    return re.sub(r"(\.kv(@.*)?)\.[kv]$", r"\1", name)


def steps_in_use(variants: Sequence[Variant], bindings: Sequence[Binding]) -> dict[str, int]:
    """For every slot the steps at which its buffer holds a value, is read or is written, as a bit set.

    A step counts even where what it stores is not read: steps that share a variant store the same.
    """
    used: dict[str, int] = {}
    needed: set[str] = set()
    for step in reversed(range(len(bindings))):
        variant = variants[bindings[step].variant]
        writes = set(variant.stores)
        reads = {name.removeprefix("slot:") for name in variant.extras if name.startswith("slot:")}
        for name in needed | writes | reads:
            used[name] = used.get(name, 0) | 1 << step
        needed = (needed - writes) | reads
    return used


def share_buffers(slots: Sequence[SlotSpec], used: Mapping[str, int]) -> dict[str, str]:
    """For every slot the slot whose buffer it has: one of its shape and dtype that is never needed at the same step.

    First come, first served, in the order in which slots are first needed.
    """
    taken: dict[str, int] = {}
    owners: dict[str, SlotSpec] = {}
    chosen: dict[str, str] = {}
    for slot in sorted(slots, key=lambda slot: (used[slot.name] & -used[slot.name], slot.name)):
        alike = (slot.shape, slot.dtype, slot.device)
        fits = (
            name
            for name, owner in owners.items()
            if (owner.shape, owner.dtype, owner.device) == alike and not taken[name] & used[slot.name]
        )
        chosen[slot.name] = next(fits, slot.name)
        owners.setdefault(chosen[slot.name], slot)
        taken[chosen[slot.name]] = taken.get(chosen[slot.name], 0) | used[slot.name]
    return chosen


def _steps(bits: int) -> tuple[int, ...]:
    return tuple(step for step in range(bits.bit_length()) if bits >> step & 1)


def _ranges(steps: Sequence[int]) -> str:
    """`0-3, 7`."""
    parts: list[list[int]] = []
    for step in steps:
        if parts and parts[-1][-1] == step - 1:
            parts[-1] = [parts[-1][0], step]
        else:
            parts.append([step])
    return ", ".join("-".join(map(str, part)) for part in parts)


def in_units(count: int) -> str:
    """Bytes in the largest unit that shows them: `10 B`, `1.5 KiB`, `20 MiB`."""
    if count < 2**10:
        return f"{count} B"
    if count < 2**20:
        return f"{count / 2**10:.4g} KiB"
    return f"{count / 2**20:.4g} MiB" if count < 2**30 else f"{count / 2**30:.4g} GiB"
