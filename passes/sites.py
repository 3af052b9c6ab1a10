"""The sites of a captured graph: the named values that a plan may keep from one step to the next.

Sites refer to graph nodes by name, and copies of a graph keep the names, so one analysis serves every variant.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

import torch
from torch import fx

from tcc.passes.graph import shape, source_line, value
from tcc.passes.grid import find_grid
from tcc.passes.macs import count
from tcc.passes.streams import Block, Branch, Dataflow, Skip, Stream, find_stream
from tcc.passes.token_axis import NotTokenLocal, narrowing, operands
from tcc.passes.tokens import Axis

__all__ = ["Analysis", "Site", "analyse", "follow"]

aten = torch.ops.aten
#: Products whose second factor may be computed from other tokens: attention written out.
_PRODUCTS = {aten.mm.default, aten.bmm.default, aten.matmul.default, aten.addmm.default, aten.baddbmm.default}


@dataclass(frozen=True)
class Site:
    """A value that can be kept from step to step.

    Attributes:
        name: `<block>.<branch>.out`, `.delta`, `.kv`, `<block>.delta`, `<block>.stream` or `<block>.skip`.
        kind: `out`, `delta`, `block`, `stream`, `skip` or `kv`.
        block: the index of its block; one past the last for `out.stream`.
        values: names of the graph values it consists of: one; K and V for `kv`; the summands for `block`.
        stream_in: name of the stream value that a `delta` or `block` is added to, else "".
        stream_out: name of the stream value after that addition, else "".
        attention: names of the self-attention nodes that compute it.
        shape: the shape of each kept tensor.
        dtype: their dtype.
        axis: where the tokens lie in them.
        macs: multiply-accumulates of computing it from the stream, for the captured batch.
        reason: why its tokens cannot be pruned, "" where they can.
        sole_reader: whether nothing but this site reads the stream value that it is added to.
        readers: names of the nodes for which alone the site stands in for its value (a long skip); () means all.
        batch: where the samples lie in them, None where there is one sample or they cannot be followed.
        key_batch: for every attention, where the samples lie in its keys and values, likewise.
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
        if self.block != other.block or {self.kind, other.kind} & {"kv", "stream", "skip"}:
            return False
        if "block" in (self.kind, other.kind):
            return True
        return self.name.rsplit(".", 1)[0] == other.name.rsplit(".", 1)[0]


@dataclass(frozen=True)
class Analysis:
    """What the analyses found out about a captured graph.

    Attributes:
        blocks: block names, in order.
        sites: every site by name, in graph order.
        token_axis: the token axis of the stream.
        num_tokens: the tokens of the stream, S.
        stream_shape: the shape of the stream, `[B, S, D]`.
        grid: the grid of the image tokens, (h, w) or (t, h, w); () where none was found.
        image_tokens: the positions of the image tokens in the stream, from and up to but not including; all tokens
            where no grid was found.
        macs: the graph's MACs, for the captured batch.
        positions: where every graph value stands in the order of computation, by name.
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

    @property
    def batch(self) -> int:
        """How many samples the stream holds: its first dimension, or the second where the first counts tokens."""
        if self.token_axis.dim:
            return self.stream_shape[0]
        return self.stream_shape[1] if len(self.stream_shape) > 2 else 1


def analyse(graph: fx.Graph) -> Analysis:
    """Stream, blocks, sites, token axis and grid of `graph`.

    Raises:
        AnalysisError: the graph has no recognisable residual stream.
    """
    stream, flow = find_stream(graph), Dataflow(graph)
    axis = _token_axis(stream, flow)
    sites: dict[str, Site] = {}
    for index, block in enumerate(stream.blocks):
        for site in _block_sites(block, index, axis, flow):
            sites[site.name] = site
    grid, start = find_grid(stream, axis)
    last = stream.blocks[-1].stream_out
    end = _stream_site("out", len(stream.blocks), last, axis)
    sites[end.name] = end
    return Analysis(
        blocks=tuple(block.name for block in stream.blocks),
        sites=sites,
        token_axis=axis,
        num_tokens=stream.shape[axis.dim],
        stream_shape=stream.shape,
        grid=grid,
        image_tokens=(start, start + math.prod(grid)) if grid else (0, stream.shape[axis.dim]),
        macs=count(graph.nodes),
        positions={node.name: i for i, node in enumerate(graph.nodes)},
    )


def follow(target: fx.Node, axis: Axis, origin: fx.Node, flow: Dataflow) -> tuple[set[Axis], str]:
    """Follow the token axis of `target` up to `origin`.

    Returns:
        The axes under which `origin` is reached, and the reason why the tokens cannot be followed ("" if they can).
    """
    found: set[Axis] = set()
    todo, seen = [(target, axis)], set()
    while todo:
        node, here = todo.pop()
        if (node, here) in seen:
            continue
        seen.add((node, here))
        if node is origin:
            found.add(here)
        elif flow.depends(node, origin):
            try:
                wanted = narrowing(node, here, 1).operands
            except NotTokenLocal as blocked:
                return found, f"{blocked} ({source_line(node)})"
            if node.target in _PRODUCTS and any(
                path not in wanted and (operand is origin or flow.depends(operand, origin))
                for path, operand in operands(node)
            ):
                attention = "attention is recognised where it is torch's scaled_dot_product_attention"
                return found, f"{node.target} mixes tokens; {attention} ({source_line(node)})"
            todo += [(operand, wanted[path]) for path, operand in operands(node) if path in wanted]
    return found, ""


def _token_axis(stream: Stream, flow: Dataflow) -> Axis:
    """The stream dimension that the first self-attention's queries count; the last but one where none tells."""
    for block in stream.blocks:
        for _, branch in block.branches:
            for node in branch.attention:
                query = node.args[0]
                assert isinstance(query, fx.Node)
                axes, reason = follow(query, Axis(len(shape(query)) - 2), branch.origin, flow)
                if not reason and len(axes) == 1:
                    return axes.pop()
    return Axis(max(0, len(stream.shape) - 2))


def _block_sites(block: Block, index: int, axis: Axis, flow: Dataflow) -> list[Site]:
    sites = [_stream_site(block.name, index, block.entry, axis)]
    sites += [_skip_site(block.name, index, number, skip, axis) for number, skip in enumerate(block.skips)]
    for name, branch in block.branches:
        sites += _branch_sites(f"{block.name}.{name}", index, branch, axis, flow)
    if block.continuous:
        sites.append(_block_delta(block, index, axis, flow))
    return sites


def _stream_site(block: str, index: int, node: fx.Node, axis: Axis) -> Site:
    val = value(node)
    reason = "a stream is held as a whole: prune the sites that are added to it"
    return Site(
        f"{block}.stream", "stream", index, (node.name,), "", "", (), tuple(val.shape), val.dtype, axis, 0, reason,
        batch=_batch(node, axis),
    )  # fmt: skip


def _skip_site(block: str, index: int, number: int, skip: Skip, axis: Axis) -> Site:
    val = value(skip.value)
    name = f"{block}.skip{number + 1}.skip" if number else f"{block}.skip"
    reason = "a long skip is held as a whole: prune the sites that are added to the stream"
    return Site(
        name, "skip", index, (skip.value.name,), "", "", (), tuple(val.shape), val.dtype, axis, 0, reason,
        readers=(skip.reader.name,), batch=_batch(skip.value, axis),
    )  # fmt: skip


def _branch_sites(prefix: str, index: int, branch: Branch, axis: Axis, flow: Dataflow) -> list[Site]:
    own = _self_attention(branch, flow)
    names = tuple(node.name for node in own)
    batch = _batch(branch.origin, axis)
    keys = tuple(_key_batch(node, branch.origin, batch, flow) for node in own)
    reason = _why_not(branch.delta, axis, [(branch, branch.origin)], flow)
    macs = count(branch.nodes)
    delta = value(branch.delta)
    sites = [
        Site(
            f"{prefix}.out", "out", index, (branch.out.name,), "", "", names,
            shape(branch.out), value(branch.out).dtype, axis, macs, reason, batch=batch, key_batch=keys,
        ),
        Site(
            f"{prefix}.delta", "delta", index, (branch.delta.name,), branch.stream_in.name, branch.add.name, names,
            tuple(delta.shape), delta.dtype, axis, macs, reason, _sole_reader(branch.stream_in, branch.add, flow),
            batch=batch, key_batch=keys,
        ),
    ]  # fmt: skip
    if len(own) == 1:
        sites.insert(0, _kv_site(prefix, index, own[0], branch, axis, flow))
    return sites


def _kv_site(prefix: str, index: int, node: fx.Node, branch: Branch, axis: Axis, flow: Dataflow) -> Site:
    key, val = node.args[1], node.args[2]
    assert isinstance(key, fx.Node)
    assert isinstance(val, fx.Node)
    where = Axis(len(shape(key)) - 2)
    reason = _keys_reason(branch, axis, branch.origin, flow)
    macs = count(n for n in flow.between(branch.origin, [key, val]))
    batch = _key_batch(node, branch.origin, _batch(branch.origin, axis), flow)
    return Site(
        f"{prefix}.kv", "kv", index, (key.name, val.name), "", "", (node.name,),
        shape(key), value(key).dtype, where, macs, reason, batch=batch, key_batch=(batch,),
    )  # fmt: skip


def _block_delta(block: Block, index: int, axis: Axis, flow: Dataflow) -> Site:
    parts = [branch for _, branch in block.branches]
    reason = next((r for b in parts if (r := _why_not(b.delta, axis, [(p, block.stream_in) for p in parts], flow))), "")
    val = value(parts[-1].delta)
    batch = _batch(block.stream_in, axis)
    attention = [(node, _key_batch(node, b.origin, batch, flow)) for b in parts for node in _self_attention(b, flow)]
    return Site(
        f"{block.name}.delta", "block", index, tuple(b.delta.name for b in parts), block.stream_in.name,
        block.stream_out.name, tuple(node.name for node, _ in attention), tuple(val.shape), val.dtype, axis,
        count({n for b in parts for n in b.nodes}), reason, _sole_reader(block.stream_in, block.stream_out, flow),
        batch=batch, key_batch=tuple(keys for _, keys in attention),
    )  # fmt: skip


def _batch(stream: fx.Node, axis: Axis) -> Axis | None:
    """Where the samples of a stream lie: its first dimension, or the second where the first counts tokens."""
    dim = 0 if axis.dim else 1
    return Axis(dim) if len(shape(stream)) > 2 and shape(stream)[dim] > 1 else None


def _key_batch(node: fx.Node, origin: fx.Node, batch: Axis | None, flow: Dataflow) -> Axis | None:
    """Where the samples of the stream `origin` lie in the keys and values of attention `node`."""
    if batch is None:
        return None
    samples = shape(origin)[batch.dim]
    keys = [operand for operand in node.args[1:3] if isinstance(operand, fx.Node)]
    for dim, size in enumerate(shape(keys[0])[:-2]):
        for outer in dict.fromkeys((1, size // samples)):
            here = Axis(dim, outer, size // (samples * outer) if outer else 0)
            if here.outer * here.inner * samples == size and all(
                follow(k, here, origin, flow) == ({batch}, "") for k in keys
            ):
                return here
    return None


def _sole_reader(stream_in: fx.Node, stream_out: fx.Node, flow: Dataflow) -> bool:
    """Whether everything computed from `stream_in` reaches the rest of the graph through `stream_out` alone."""
    todo, seen = list(stream_in.users), {stream_out}
    while todo:
        node = todo.pop()
        if node in seen:
            continue
        if not flow.depends(stream_out, node):
            return False
        seen.add(node)
        todo += node.users
    return True


def _self_attention(branch: Branch, flow: Dataflow) -> list[fx.Node]:
    return [n for n in branch.attention if isinstance(n.args[1], fx.Node) and flow.depends(n.args[1], branch.origin)]


def _why_not(target: fx.Node, axis: Axis, parts: Iterable[tuple[Branch, fx.Node]], flow: Dataflow) -> str:
    """Why the tokens of `target` cannot be computed alone, "" if they can."""
    for branch, origin in parts:
        if target is branch.delta:
            axes, reason = follow(target, axis, origin, flow)
            reason = reason or _keys_reason(branch, axis, origin, flow)
            if reason or axes - {axis}:
                return reason or "the tokens change their order on the way from the stream"
    return "" if axis.plain else "the stream's tokens share their dimension with something else"


def _keys_reason(branch: Branch, axis: Axis, origin: fx.Node, flow: Dataflow) -> str:
    for node in _self_attention(branch, flow):
        for operand in node.args[1:3]:
            assert isinstance(operand, fx.Node)
            axes, reason = follow(operand, Axis(len(shape(operand)) - 2), origin, flow)
            if reason or axes != {axis}:
                return reason or f"keys of attention '{node.name}' do not follow the stream's tokens"
    return ""
