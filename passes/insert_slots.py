"""Put a step's actions into the graph: slots as inputs and outputs, and the tokens that are updated.

What comes out is correct and slow: updated sites are still computed for all tokens, then gathered. The passes after
this one move the gathers to where they save work.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from torch import fx

from tcc.passes.attention import Attention, find_attention
from tcc.passes.base import Pass
from tcc.passes.choose_tokens import Choice, age_slot, choose, map_slot, older, read_map
from tcc.passes.entries import NO_RECORDS, Entry, Records, history
from tcc.passes.gathers import clear, gather, scatter
from tcc.passes.graph import emit, fake_mode_of, output_values, value
from tcc.passes.restrict_keys import restrict_keys
from tcc.passes.sites import Site
from tcc.passes.tokens import Axis
from tcc.plan import Compute, Hold, Reuse, Skip, Update

__all__ = ["InsertSlots"]

aten = torch.ops.aten


@dataclass(frozen=True)
class InsertSlots(Pass):
    """Insert the slots and actions of one kind of step.

    Before: `x1 = x0 + f(x0)` and the action `update(T, kept)` for `f`'s delta
    After:  `x1 = scatter(x0 + slot, gather(x0 + f(x0), T), T)`, keys and values in `f` gathered to `T`, and an output
            `scatter(slot, gather(f(x0), T), T)`

    1. compute: the value becomes an output.
    2. reuse, hold: the slot stands in for the value. A forecast is a linear combination of the history slots.
    3. update: as above, without the output where it does not store; `current` leaves keys and values alone, `cached`
       is an update of the `kv` site.
    4. skip: zero stands in for the value.
    5. A dynamic token set is chosen right after the last value that its score reads.
    6. What scores of later steps read is stored: how much tokens are attended to, and their ages.
    """

    exact: ClassVar[bool] = False
    entries: tuple[Entry, ...]
    sets: tuple[int | Choice, ...] = ()
    num_tokens: int = 0
    records: Records = NO_RECORDS

    def run(self, gm: fx.GraphModule) -> int:
        """Edit `gm`; see the class."""
        edit = _Edit(gm, find_attention(gm.graph) if self._asks_for_attention else {})
        for number, tokens in enumerate(self.sets):
            if isinstance(tokens, Choice):
                edit.choose_tokens(number, tokens)
            else:
                edit.add_tokens(number, tokens, self.num_tokens)
        edit.record(self.records)
        for entry in self.entries:
            edit.apply(entry)
        if edit.count:
            edit.finish()
        return edit.count

    @property
    def _asks_for_attention(self) -> bool:
        actions = (entry.action for entry in self.entries)
        return bool(self.records.maps) or any(isinstance(a, Update) and a.attention == "kept" for a in actions)


@dataclass
class _Edit:
    """One run of the pass over one graph."""

    gm: fx.GraphModule
    attention: dict[fx.Node, Attention]
    count: int = 0
    inputs: dict[str, fx.Node] = field(default_factory=dict)
    stores: dict[str, fx.Node] = field(default_factory=dict)
    moved: dict[fx.Node, fx.Node] = field(default_factory=dict)
    aliases: list[fx.Node] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.graph = self.gm.graph
        self.nodes = {node.name: node for node in self.graph.nodes}
        self.first = next(n for n in self.graph.nodes if n.op != "placeholder")
        self.old = set(self.graph.nodes)
        self.chosen: dict[str, tuple[fx.Node, fx.Node]] = {}
        self.restricted: set[tuple[fx.Node, str]] = set()

    def apply(self, entry: Entry) -> None:
        action, keys = entry.action, entry.sites[0].kind == "kv"
        if isinstance(action, Update) and action.attention == "kept" and not keys:
            for site, tokens in entry.sets:
                self._restrict_keys(site, tokens or str(action.tokens))
        if entry.sites[0].stream_out:
            self._apply_to_stream(entry)
        else:
            self._apply_each(entry)

    def finish(self) -> None:
        """Append the stored values to the output, in slot order."""
        output = self.graph.output_node()
        names = sorted(self.stores)
        output.args = ((*output_values(self.graph), *(self._now(self.stores[name]) for name in names)),)
        self.gm.meta["stores"] = tuple(names)
        for alias in self.aliases:
            alias.replace_all_uses_with(alias.all_input_nodes[0])

    def _apply_each(self, entry: Entry) -> None:
        """Sites whose values are replaced one by one: `out`, `kv`, `stream`, `skip`."""
        site = entry.sites[0]
        for name, slot in zip(site.values, site.slots, strict=True):
            node = self._now(self.nodes[name])
            if isinstance(entry.action, Compute):
                self._store(entry, slot, node)
                continue
            # before the next node, not after this one: several calls then stand in the order they are made
            with self.graph.inserting_before(node.next):
                new = self._stand_in(entry, slot, node)
            self._replace(node, new, site.readers)
            if isinstance(entry.action, Update) and entry.action.store:
                self._store(entry, slot, new)

    def _apply_to_stream(self, entry: Entry) -> None:
        """Sites that are added to the stream: the sum after the addition is what changes."""
        last, slot, action = entry.sites[-1], entry.slots[0], entry.action
        if entry.narrowing and isinstance(action, Update):
            self._keep_rows(entry)
            first = last
        else:
            first = entry.sites[0]
        before, after = self._now(self.nodes[first.stream_in]), self.nodes[last.stream_out]
        with self.graph.inserting_before(after.next):
            if isinstance(action, Compute):
                self._store(entry, slot, self._sum(entry))
                return
            if isinstance(action, Skip):  # a value of its own: who holds the stream below must not hold it above
                new = self._unchanged(before, after)
            elif isinstance(action, Update):
                new = self._updated_stream(entry, before, after)
            else:
                new = self._call(aten.add.Tensor, before, self._stand_in(entry, slot, after), like=after)
        self._replace(after, new)

    def _unchanged(self, before: fx.Node, after: fx.Node) -> fx.Node:
        """The stream `before` in place of `after`: what is left out may have widened its dtype."""
        if value(before).dtype != value(after).dtype:
            return self._call(aten._to_copy.default, before, like=after, dtype=value(after).dtype)
        new = self._call(aten.alias.default, before, like=after)
        self.aliases.append(new)
        return new

    def _keep_rows(self, entry: Entry) -> None:
        """What all sites but the last add to the stream: to the tokens of their sets alone, the others wait."""
        for site, tokens in entry.sets[:-1]:
            before, after = self._now(self.nodes[site.stream_in]), self.nodes[str(site.stream_out)]
            pair = self._tokens(tokens)
            with self.graph.inserting_before(after.next):
                new = self._scatter(before, self._gather(after, pair, site, after), pair, site, after)
            self._replace(after, new)

    def _updated_stream(self, entry: Entry, before: fx.Node, after: fx.Node) -> fx.Node:
        assert isinstance(entry.action, Update)
        tokens, site = self._tokens(str(entry.action.tokens)), entry.sites[-1]
        slot = self._slot(entry.slots[0], after)
        if entry.action.store and not entry.narrowing:  # of the tokens of a site's set nothing is kept
            delta = self._gather(self._sum(entry), tokens, site, after)
            self._store(entry, entry.slots[0], self._scatter(slot, delta, tokens, site, after))
        base = self._call(aten.add.Tensor, before, slot, like=after)
        return self._scatter(base, self._gather(after, tokens, site, after), tokens, site, after)

    def _stand_in(self, entry: Entry, slot: str, node: fx.Node) -> fx.Node:
        """What stands in for the computed value `node`; inserted at the graph's insertion point."""
        action = entry.action
        if isinstance(action, Skip):
            val = value(node)
            fill = {"dtype": val.dtype, "device": val.device}
            return self._call(aten.full.default, list(val.shape), 0, like=node, **fill)
        if isinstance(action, Update):
            tokens, site = self._tokens(str(action.tokens)), entry.sites[0]
            rows = self._gather(node, tokens, site, node)
            return self._scatter(self._slot(slot, node), rows, tokens, site, node)
        if isinstance(action, Reuse) and action.order:
            return self._forecast(entry, slot, node)
        assert isinstance(action, (Reuse, Hold))
        return self._slot(slot, node)

    def _forecast(self, entry: Entry, slot: str, node: fx.Node) -> fx.Node:
        assert isinstance(entry.action, Reuse)
        size = (entry.action.order + 1,)
        weights = self._input(f"coefficients_{entry.coefficients}", size, torch.float32, value(node).device)
        total: fx.Node | None = None
        for age in range(size[0]):
            weight = self._call(aten.select.int, weights, 0, age, like=node)
            term = self._call(aten.mul.Tensor, self._slot(history(slot, age), node), weight, like=node)
            total = term if total is None else self._call(aten.add.Tensor, total, term, like=node)
        assert total is not None
        return total

    def _restrict_keys(self, site: Site, tokens: str) -> None:
        """Attention `kept`: every attention of the site sees the kept tokens alone."""
        kept, _ = self._tokens(tokens)
        for name, batch, axis in _keys(site):
            node = self.nodes[name]
            if (node, tokens) in self.restricted:
                continue
            self.restricted.add((node, tokens))
            self.count += 1
            restrict_keys(self.graph, self.attention[node], kept, axis, batch)

    def _gather(self, x: fx.Node, tokens: tuple[fx.Node, fx.Node], site: Site, like: fx.Node) -> fx.Node:
        return gather(self.graph, x, tokens[0], site.axis, site.batch, like)

    def _scatter(
        self, base: fx.Node, rows: fx.Node, tokens: tuple[fx.Node, fx.Node], site: Site, like: fx.Node
    ) -> fx.Node:
        return scatter(self.graph, base, rows, tokens, site.axis, site.batch, like)

    def _sum(self, entry: Entry) -> fx.Node:
        """The sum of the entry's values: each is added as soon as it exists, so that no more than one waits for it."""
        total, *rest = (self._term(name, site, kept) for site, kept in entry.sets for name in site.values)
        for term in rest:
            last = max(total, term)
            with self.graph.inserting_before(self._after(last)):
                total = self._call(aten.add.Tensor, total, term, like=term)
        return total

    def _term(self, name: str, site: Site, tokens: str) -> fx.Node:
        """A value, with zeros where tokens of the set keep none of it."""
        node = self._now(self.nodes[name])
        if not tokens:
            return node
        with self.graph.inserting_before(self._after(node)):
            return clear(self.graph, node, self._tokens(tokens), site.axis, site.batch, node)

    def _after(self, node: fx.Node) -> fx.Node:
        """What stands behind `node`; inputs stand before all else."""
        return self.first if node.op == "placeholder" else node.next

    def _store(self, entry: Entry, slot: str, node: fx.Node) -> None:
        """Make `node` the slot's next value; on compute, older values move up by one."""
        self.count += 1
        self.stores[slot] = node
        for age in range(1, entry.depth):
            self.stores[history(slot, age)] = self._slot(history(slot, age - 1), node)

    def _slot(self, slot: str, like: fx.Node) -> fx.Node:
        val = value(like)
        return self._slot_of(slot, tuple(val.shape), val.dtype, val.device)

    def _slot_of(self, slot: str, sizes: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> fx.Node:
        node = self._input(f"slot:{slot}", sizes, dtype, device)
        node.meta["slot"] = slot
        return node

    def choose_tokens(self, number: int, choice: Choice) -> None:
        """Choose a dynamic token set, right after the last value that its score reads."""
        sizes, device = (choice.batch, choice.num_tokens), self._device
        given = {name: self._input(f"table_{name}", shape, torch.float32, device) for name, shape in choice.tables}
        given |= {slot: self._slot_of(slot, sizes, torch.float32, device) for slot in choice.record_slots}
        stored = {
            s: self._slot_of(s.slots[-1], s.shape, s.dtype, device) for s in choice.sites if s.name in choice.stored
        }
        ends = [
            n for s in choice.sites if s not in stored for n in ((s.stream_out,) if s.kind == "block" else s.values)
        ]

        def read(site: Site) -> fx.Node:
            if site in stored:
                return stored[site]
            return self._sum(Entry((site,), Compute())) if site.kind == "block" else self.nodes[site.values[-1]]

        last = max([self.first.prev, *(self.nodes[name] for name in ends)])
        at_start = last is self.first.prev
        with self.graph.inserting_before(last.next):
            self.chosen[str(number)] = choose(
                self.graph, choice, read, given.__getitem__, self.first if at_start else last
            )
        if at_start:  # more inputs come before the choice
            self.first = last.next
        self.count += 1

    def record(self, records: Records) -> None:
        """Store what scores of later steps read: maps of attention, and the ages of tokens."""
        for term, at in records.maps:
            attention = self.attention[self.nodes[at.attention[0]]]
            self.stores[map_slot(term)] = read_map(attention, term, at.batch, at.axis)
            self.count += 1
        for name, tokens in records.ages:
            slot, device = age_slot(name), self._device
            with self.graph.inserting_before(self.graph.output_node()):
                if tokens is None:
                    new = self._call(aten.full.default, list(records.shape), 0.0, device=device, like=self.first)
                else:
                    place = self._tokens(tokens)[1] if tokens else None
                    new = older(self.graph, self._slot_of(slot, records.shape, torch.float32, device), place)
            self.stores[slot] = new
            self.count += 1

    @property
    def _device(self) -> torch.device:
        found: torch.device = value(self.first).device if "val" in self.first.meta else torch.device("cpu")
        return found

    def _tokens(self, number: str) -> tuple[fx.Node, fx.Node]:
        if number in self.chosen:
            return self.chosen[number]
        return self.inputs[f"kept_{number}"], self.inputs[f"place_{number}"]

    def add_tokens(self, number: int, kept: int, total: int) -> None:
        """Make the two inputs that describe a token set: the kept positions, and the place of every token."""
        self._input(f"kept_{number}", (kept,), torch.int64, self._device)
        self._input(f"place_{number}", (total,), torch.int64, self._device)

    def _input(self, name: str, sizes: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> fx.Node:
        if name not in self.inputs:
            with self.graph.inserting_before(self.first):
                node = self.graph.placeholder(_identifier(name))
            with fake_mode_of(self.graph):
                node.meta["val"] = torch.empty(sizes, dtype=dtype, device=device)
            node.meta["input"] = name
            self.inputs[name] = node
        return self.inputs[name]

    def _replace(self, node: fx.Node, new: fx.Node, readers: tuple[str, ...] = ()) -> None:
        """Let `new` take the place of `node`, for `readers` if given, else for all but what `new` is made from."""
        self.count += 1
        if readers:
            node.replace_all_uses_with(new, delete_user_cb=lambda user: user.name in readers)
            return
        made = {new}
        todo = [new]
        while todo:
            for source in todo.pop().all_input_nodes:
                if source not in made and source not in self.old:
                    made.add(source)
                    todo.append(source)
        node.replace_all_uses_with(new, delete_user_cb=lambda user: user not in made)
        self.moved[node] = new

    def _now(self, node: fx.Node) -> fx.Node:
        while node in self.moved:
            node = self.moved[node]
        return node

    def _call(self, target: Any, *args: Any, like: fx.Node, **kwargs: Any) -> fx.Node:
        return emit(self.graph, target, args, kwargs, like=like)


def _keys(site: Site) -> Iterator[tuple[str, Axis | None, Axis]]:
    """Every attention of a site, and where samples and tokens lie in its keys."""
    count = len(site.attention)
    batches, axes = site.key_batch or (None,) * count, site.key_axes or (Axis(-2),) * count
    return zip(site.attention, batches, axes, strict=True)


def _identifier(name: str) -> str:
    return "".join(c if c.isalnum() else "_" for c in name)
