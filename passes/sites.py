"""The sites of a captured graph: the named values that a plan may keep from one step to the next.

Sites refer to graph nodes by name, and copies of a graph keep the names, so one analysis serves every variant.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import fx

from tcc.passes.dataflow import Dataflow
from tcc.passes.follow import batch_axis, follow
from tcc.passes.graph import shape, value
from tcc.passes.grid import find_grid
from tcc.passes.keys import Cross, Keys, cross_attention, self_attention
from tcc.passes.macs import count
from tcc.passes.residual_adds import guess_axis
from tcc.passes.streams import Block, Branch, Stream, find_streams
from tcc.passes.tokens import Axis
from tcc.plan.site_name import SiteName

__all__ = ["Analysis", "Site", "analyse"]

aten = torch.ops.aten


@dataclass(frozen=True)
class Site:
    """A value that can be kept from step to step.

    Attributes:
        name: `<block>.<branch>.out`, `.delta`, `.kv`, `<block>.delta`, `<block>.stream` or `<block>.skip`, with the
            stream where it is not the main one: `<block>.delta@text`.
        kind: `out`, `delta`, `block`, `stream`, `skip` or `kv`.
        block: the index of its block; one past the last for `out.stream`, and more for blocks that only other streams
            than the main one pass through.
        values: names of the graph values it consists of: one; K and V for `kv`; the summands for `block`.
        stream_in: name of the stream value that a `delta` or `block` is added to, else ""; so where somebody reads the
            delta beside that addition: its value is replaced then, and the stream follows.
        stream_out: name of the stream value after that addition, else "".
        attention: names of the nodes that stand for the self-attention in it: torch's attention, or a softmax.
        shape: the shape of each kept tensor.
        dtype: their dtype.
        axis: where the tokens of its stream lie in them; rows of others may be joined to them.
        macs: multiply-accumulates of computing it from the stream, for the captured batch.
        reason: why its tokens cannot be pruned, "" where they can.
        sole_reader: whether nothing but this site and branches `beside` it reads the stream value that it is added to.
        beside: branches on other streams that read that value too.
        guarded: whether they read it through the attention of this site alone.
        readers: names of the nodes for which alone the site stands in for its value (a long skip); () means all.
        batch: where the samples lie in them, None where there is one sample or they cannot be followed.
        key_batch: for every attention, where the samples lie in its keys and values, likewise.
        key_axes: for every attention, where the stream's tokens lie in its keys and values.
    """

    name: str
    kind: str
    block: int
    values: tuple[str, ...]
    stream_in: str
    stream_out: str
    attention: tuple[str, ...]
    shape: tuple[int, ...]
    dtype: torch.dtype
    axis: Axis
    macs: int
    reason: str
    sole_reader: bool = False
    readers: tuple[str, ...] = ()
    batch: Axis | None = None
    key_batch: tuple[Axis | None, ...] = ()
    key_axes: tuple[Axis, ...] = ()
    beside: tuple[str, ...] = ()
    guarded: bool = True

    def __hash__(self) -> int:
        return hash(self.name)  # kinds of steps hold all their sites, and are looked up for every step

    @property
    def stream(self) -> str:
        """The name of its stream, "" for the main one."""
        return SiteName.parse(self.name).stream

    @property
    def prunable(self) -> bool:
        """Whether single tokens of the site can be updated."""
        return not self.reason

    @property
    def slots(self) -> tuple[str, ...]:
        """The names of the slots that keep it."""
        return (f"{self.name}.k", f"{self.name}.v") if self.kind == "kv" else (self.name,)

    @property
    def bytes(self) -> int:
        """The size of its slots."""
        return math.prod(self.shape) * self.dtype.itemsize * len(self.slots)

    def overlaps(self, other: Site) -> bool:
        """Whether both sites keep parts of the same branch, so that a plan can act on only one of them."""
        mine, theirs = SiteName.parse(self.name), SiteName.parse(other.name)
        if {self.kind, other.kind} & {"kv", "stream", "skip"} or mine.stream != theirs.stream:
            return False
        if "block" in (self.kind, other.kind):
            return self.block == other.block
        return mine.owner == theirs.owner


@dataclass(frozen=True)
class Analysis:
    """What the analyses found out about a captured graph.

    Attributes:
        blocks: the names of the blocks that the main stream passes through, in order.
        sites: every site by name, in graph order.
        token_axis: the token axis of the main stream, where it holds its own tokens alone.
        num_tokens: the tokens of the main stream, S. Where tokens of other streams are joined to it, they are not
            counted.
        stream_shape: the shape of the main stream, likewise, `[B, S, D]`.
        grid: the grid of the image tokens, (h, w) or (t, h, w); () where none was found.
        image_tokens: the positions of the image tokens among the S, from and up to but not including: those on the
            grid, or those that the output is made of where no grid was found.
        macs: the graph's MACs, for the captured batch.
        positions: where every graph value stands in the order of computation, by name.
        streams: the names of the streams; the first is the main one, "".
        side_blocks: the names of the blocks that only other streams pass through.
        cross: branches of the main stream with one cross-attention whose queries are the stream's tokens, by name.
    """

    blocks: tuple[str, ...]
    sites: dict[str, Site]
    token_axis: Axis
    num_tokens: int
    stream_shape: tuple[int, ...]
    grid: tuple[int, ...]
    image_tokens: tuple[int, int]
    macs: int
    positions: Mapping[str, int] = field(default_factory=dict, compare=False)
    streams: tuple[str, ...] = ("",)
    side_blocks: tuple[str, ...] = ()
    cross: Mapping[str, Cross] = field(default_factory=dict)

    @property
    def batch(self) -> int:
        """How many samples the stream holds: its first dimension, or the second where the first counts tokens."""
        if self.token_axis.dim:
            return self.stream_shape[0]
        return self.stream_shape[1] if len(self.stream_shape) > 2 else 1


def analyse(graph: fx.Graph) -> Analysis:
    """Streams, blocks, sites, token axis and grid of `graph`.

    Raises:
        AnalysisError: the graph has no recognisable residual stream.
    """
    flow = Dataflow(graph)
    streams = find_streams(graph, flow)
    main, order = streams[0], _in_order(streams)
    blocks = tuple(block.name for block in main.blocks)
    side = tuple(dict.fromkeys(block.name for _, block in order if block.name not in blocks))
    index = {name: i + (name in side) for i, name in enumerate((*blocks, *side))}
    view = _View(flow, {stream.name: _token_axis(stream, flow) for stream in streams}, streams)
    found = {(stream.name, block.name): view.sites(stream.name, index[block.name], block) for stream, block in order}
    sites = {site.name: site for stream, block in order for site in found[stream.name, block.name]}
    last = main.branches[-1]
    end = _held("out.stream", len(blocks), last.add, view.axis("", last) or guess_axis(last.add))
    axis = view.axes[""]
    grid, start = find_grid(main.branches[0].stream_in, view.axis("", main.branches[0]), last.add, end.axis)
    tokens = axis.count(main.shape)
    image = (start, start + math.prod(grid)) if grid else (0, tokens)
    if main.rows_out and not grid:
        first_row, last_row = (min(tokens, max(0, row - end.axis.before)) for row in main.rows_out)
        image = (first_row, last_row)
    return Analysis(
        blocks=blocks,
        sites={**sites, end.name: end},
        token_axis=axis,
        num_tokens=tokens,
        stream_shape=main.shape,
        grid=grid,
        image_tokens=image,
        macs=count(graph.nodes),
        positions={node.name: i for i, node in enumerate(graph.nodes)},
        streams=tuple(stream.name for stream in streams),
        side_blocks=side,
        cross=view.cross,
    )


def _in_order(streams: Sequence[Stream]) -> list[tuple[Stream, Block]]:
    """The blocks of all streams as they are computed; of one block, the main stream first."""
    first: dict[str, fx.Node] = {}
    parts = [(stream, block) for stream in streams for block in stream.blocks]
    for _, block in parts:
        first[block.name] = min(first.get(block.name, block.stream_out), block.stream_out)
    return sorted(parts, key=lambda part: first[part[1].name])


def _token_axis(stream: Stream, flow: Dataflow) -> Axis:
    """The stream dimension that the first self-attention's queries count; the last but one where none tells.

    Where samples, or windows of tokens, have a dimension of their own, the tokens have one too.
    """
    for block in stream.blocks:
        for _, branch in block.branches:
            for node in branch.attention:
                query = flow.attention[node].query
                axes, reason = follow(query.node, query.axis, branch.origin, flow)
                found = next(iter(axes), None)
                if reason or found is None or len(axes) > 1 or found.others:
                    continue
                if found.plain or len(stream.shape) < 3:
                    return found
    return Axis(max(0, len(stream.shape) - 2))


def _held(name: str, index: int, node: fx.Node, axis: Axis, reader: fx.Node | None = None) -> Site:
    """The site of a stream, or of the long skip that `reader` takes."""
    val, readers = value(node), () if reader is None else (reader.name,)
    what, to = ("stream", "it") if reader is None else ("long skip", "the stream")
    reason = f"a {what} is held as a whole: prune the sites that are added to {to}"
    return Site(
        name, what.split()[-1], index, (node.name,), "", "", (), tuple(val.shape), val.dtype, axis, 0, reason,
        readers=readers, batch=batch_axis(node, axis),
    )  # fmt: skip


@dataclass
class _View:
    """What making a site needs to know of the graph.

    Attributes:
        flow: who depends on whom.
        axes: the token axis of every stream, where it holds its own tokens alone.
        streams: the streams.
        cross: the cross-attentions of the main stream's branches; filled as their sites are made.
    """

    flow: Dataflow
    axes: dict[str, Axis]
    streams: Sequence[Stream]

    def __post_init__(self) -> None:
        self._adds: dict[fx.Node, tuple[SiteName, fx.Node]] = {}
        for stream in self.streams:
            for block in stream.blocks:
                self._adds |= {
                    branch.add: (SiteName(f"{block.name}.{name}", "delta", stream.name), branch.delta)
                    for name, branch in block.branches
                }
        self._keys: set[fx.Node] = set()
        self.cross: dict[str, Cross] = {}

    def axis(self, stream: str, branch: Branch) -> Axis | None:
        """Where the stream's tokens lie as `branch` is added; None where they cannot be told from others."""
        axis, sizes = self.axes[stream], self._shape(stream)
        if shape(branch.add) == sizes:
            return axis
        if branch.others is None or (branch.others != (0, 0) and axis != guess_axis(branch.add)):
            return None
        found = replace(axis, before=branch.others[0], after=branch.others[1])
        return found if found.count(shape(branch.add)) == axis.count(sizes) else None

    def _shape(self, stream: str) -> tuple[int, ...]:
        return next(s.shape for s in self.streams if s.name == stream)

    def sites(self, stream: str, index: int, block: Block) -> list[Site]:
        """The sites of what `block` does to a stream."""
        first = block.branches[0][1]
        axis = self.axis(stream, first) or guess_axis(first.add)
        found = [_held(str(SiteName(block.name, "stream", stream)), index, block.entry, axis)]
        for number, skip in enumerate(block.skips):
            owner = f"{block.name}.skip{number + 1}" if number else block.name
            found.append(_held(str(SiteName(owner, "skip", stream)), index, skip.value, axis, skip.reader))
        for name, branch in block.branches:
            found += self._branch_sites(SiteName(f"{block.name}.{name}", "", stream), index, branch)
        if block.continuous:
            found.append(self._block_delta(SiteName(block.name, "delta", stream), index, block))
        return found

    def _branch_sites(self, name: SiteName, index: int, branch: Branch) -> list[Site]:
        flow = self.flow
        own = self_attention(branch, flow)
        axis = self.axis(name.stream, branch) or guess_axis(branch.add)
        batch = batch_axis(branch.origin, axis)
        keys = [Keys.of(node, branch.origin, axis, batch, flow) for node in own]
        reason = self._why_not(name.stream, branch, axis, branch.origin, keys)
        macs = count(branch.nodes)
        beside = self._readers(branch.stream_in, branch.add, name.stream)
        guarded = self._readers(branch.stream_in, branch.add, name.stream, own) == ()
        out, change = value(branch.out), value(branch.delta)
        added = (branch.stream_in.name, branch.add.name) if branch.delta.users.keys() == {branch.add} else ("", "")
        delta = Site(
            name.but("delta"), "delta", index, (branch.delta.name,), *added,
            tuple(node.name for node in own), tuple(change.shape), change.dtype, axis, macs, reason,
            beside is not None, batch=batch, key_batch=tuple(k.batch for k in keys),
            key_axes=tuple(k.axis for k in keys), beside=beside or (), guarded=guarded,
        )  # fmt: skip
        before_gate = replace(
            delta, name=name.but("out"), kind="out", values=(branch.out.name,), stream_in="", stream_out="",
            shape=tuple(out.shape), dtype=out.dtype, sole_reader=False, beside=(), guarded=True,
        )  # fmt: skip
        sites = [before_gate, delta]
        cross = None if name.stream else cross_attention(branch, axis, batch, self._no_prompts(), flow)
        if cross is not None:
            self.cross[name.branch] = cross
        if (
            len(own) == 1 and own[0] not in self._keys and flow.attention[own[0]].same_layout
        ):  # keys that two streams share are the first one's
            self._keys.add(own[0])
            sites.insert(0, self._kv_site(name, index, own[0], branch, keys[0]))
        return sites

    def _no_prompts(self) -> list[fx.Node]:
        """Where the streams begin whose tokens are no prompt: audio, or another picture."""
        return [s.blocks[0].stream_in for s in self.streams if s.name and not s.name.startswith("text")]

    def _kv_site(self, name: SiteName, index: int, node: fx.Node, branch: Branch, keys: Keys) -> Site:
        key, val = self.flow.attention[node].key.node, self.flow.attention[node].value.node
        macs = count(self.flow.between(branch.origin, [key, val]))
        reason = self._unnamed(name.stream, branch) or keys.reason
        return Site(
            name.but("kv"), "kv", index, (key.name, val.name), "", "", (node.name,), shape(key), value(key).dtype,
            keys.axis, macs, reason, batch=keys.batch, key_batch=(keys.batch,), key_axes=(keys.axis,),
        )  # fmt: skip

    def _block_delta(self, name: SiteName, index: int, block: Block) -> Site:
        parts, flow = [branch for _, branch in block.branches], self.flow
        axis = self.axis(name.stream, parts[0]) or guess_axis(parts[0].add)
        batch = batch_axis(block.stream_in, axis)
        own = [self_attention(b, flow) for b in parts]
        keys = [[Keys.of(node, block.stream_in, axis, batch, flow) for node in nodes] for nodes in own]
        reasons = [self._why_not(name.stream, b, axis, block.stream_in, k) for b, k in zip(parts, keys, strict=True)]
        beside = self._readers(block.stream_in, block.stream_out, name.stream)
        guards = [node for nodes in own for node in nodes]
        guarded = self._readers(block.stream_in, block.stream_out, name.stream, guards) == ()
        val = value(parts[-1].delta)
        return Site(
            str(name), "block", index, tuple(b.delta.name for b in parts), block.stream_in.name,
            block.stream_out.name, tuple(node.name for node in guards), tuple(val.shape), val.dtype,
            axis, count({n for b in parts for n in b.nodes}), next(filter(None, reasons), ""), beside is not None,
            batch=batch, key_batch=tuple(k.batch for ks in keys for k in ks),
            key_axes=tuple(k.axis for ks in keys for k in ks), beside=beside or (), guarded=guarded,
        )  # fmt: skip

    def _unnamed(self, stream: str, branch: Branch) -> str:
        """Why a plan cannot even name single tokens of a branch; "" if it can."""
        if stream:
            return f"token sets are of the main stream, not of '{stream}': compute or reuse it as a whole"
        known = self.axis(stream, branch) is not None
        return "" if known else "its tokens are not in the order that they have in other blocks"

    def _why_not(self, stream: str, branch: Branch, axis: Axis, origin: fx.Node, keys: Sequence[Keys]) -> str:
        """Why the tokens of a branch cannot be computed alone, from `origin`; "" if they can."""
        axes, reason = follow(branch.delta, axis, origin, self.flow)
        reason = self._unnamed(stream, branch) or reason or next((k.reason for k in keys if k.reason), "")
        if reason or axes - {axis}:
            return reason or "the tokens change their order on the way from the stream"
        return "" if axis.plain else "the stream's tokens share their dimension with something else"

    def _readers(
        self, stream_in: fx.Node, stream_out: fx.Node, stream: str, behind: Sequence[fx.Node] = ()
    ) -> tuple[str, ...] | None:
        """The branches on other streams that read `stream_in`; None if something reads it that is no branch.

        What is read through the nodes `behind` is left out.
        """
        todo, seen, found = [(stream_in, node) for node in stream_in.users], {stream_out, *behind}, []
        while todo:
            source, node = todo.pop()
            if node in seen:
                continue
            name, delta = self._adds.get(node, (None, None))
            if name is not None and name.stream != stream:
                if source is not delta:  # it goes on along the other stream, whatever the branch does
                    return None
                found.append(name.branch)
                continue
            seen.add(node)
            if node.op == "output" or (name is not None and not self.flow.depends(stream_out, node)):
                return None
            todo += [(node, user) for user in node.users]
        return tuple(dict.fromkeys(found))
