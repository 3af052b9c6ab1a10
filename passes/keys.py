"""Where the tokens and the samples of a stream lie in the queries and keys of attention."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import fx

from tcc.passes.dataflow import Dataflow
from tcc.passes.follow import follow
from tcc.passes.graph import cat_dim, shape
from tcc.passes.paths import operands
from tcc.passes.streams import Branch
from tcc.passes.tokens import Axis

__all__ = ["Cross", "Keys", "cross_attention", "self_attention"]

aten = torch.ops.aten


@dataclass(frozen=True)
class Cross:
    """An attention of the main stream's tokens to others: a prompt's.

    Attributes:
        attention: the name of its node, alone.
        axis: where the stream's tokens lie in its queries.
        batch: where the samples lie in them, None where there is one sample or they cannot be followed.
    """

    attention: tuple[str]
    axis: Axis
    batch: Axis | None


@dataclass(frozen=True)
class Keys:
    """Where the tokens and the samples of a stream lie in the keys and values of an attention, or why not."""

    axis: Axis
    batch: Axis | None
    reason: str

    @staticmethod
    def of(node: fx.Node, origin: fx.Node, axis: Axis, batch: Axis | None, flow: Dataflow) -> Keys:
        """Follow the keys and values of `node` up to the stream value `origin`, whose tokens lie along `axis`."""
        first = ""
        for here in _key_axes(node, axis, origin, flow):
            rows = (flow.attention[node].key, flow.attention[node].value)
            reasons = [_reason(r.node, here.at(r.axis.dim), axis, origin, flow) for r in rows]
            reason = next(filter(None, reasons), "")
            if not reason:
                return Keys(here, _key_batch(node, origin, batch, flow), "")
            first = first or reason
        axes = _key_axes(node, axis, origin, flow)
        return Keys(axes[0], _key_batch(node, origin, batch, flow), first)


def _reason(operand: fx.Node, here: Axis, axis: Axis, origin: fx.Node, flow: Dataflow) -> str:
    axes, reason = follow(operand, here, origin, flow)
    if reason or axes == {axis}:
        return reason
    return "keys of its attention do not follow the stream's tokens"


def _key_axes(node: fx.Node, axis: Axis, origin: fx.Node, flow: Dataflow) -> list[Axis]:
    """Where the tokens may lie in the keys of `node`: as in the stream, or among others that are joined to them."""
    key, dim = flow.attention[node].key.node, flow.attention[node].key.axis.dim
    rows, tokens = shape(key)[dim], axis.count(shape(origin))
    starts = [axis.before]
    for join in flow.between(origin, [key]):
        if join.target is aten.cat.default:
            sizes = [shape(part)[cat_dim(join)] for _, part in operands(join)]
            starts += [sum(sizes[:i]) + axis.before for i in range(len(sizes))]
    fitting = dict.fromkeys(start for start in starts if start + tokens <= rows)
    return [Axis(dim, before=start, after=rows - start - tokens) for start in fitting] or [Axis(dim)]


def _key_batch(node: fx.Node, origin: fx.Node, batch: Axis | None, flow: Dataflow) -> Axis | None:
    """Where the samples of the stream `origin` lie in the keys and values of attention `node`, and in its weights.

    They lie at one place in all of these, or it counts as not found.
    """
    attention = flow.attention[node]
    dims = {attention.key.axis.dim, attention.value.axis.dim}
    return _samples([attention.key.node, *attention.values], dims, origin, batch, flow)


def _samples(
    places: Sequence[fx.Node], dims: set[int], origin: fx.Node, batch: Axis | None, flow: Dataflow
) -> Axis | None:
    """Where the samples of the stream `origin` lie in all of `places`, whose dimensions `dims` count something else."""
    if batch is None:
        return None
    samples = shape(origin)[batch.dim]
    for dim, size in enumerate(shape(places[0])):
        for outer in dict.fromkeys((1, size // samples)) if dim not in dims else ():
            here = Axis(dim, outer, size // (samples * outer) if outer else 0)
            if here.outer * here.inner * samples == size and all(
                here.dim < len(shape(k)) and follow(k, here, origin, flow) == ({batch}, "") for k in places
            ):
                return here
    return None


def cross_attention(
    branch: Branch, axis: Axis, batch: Axis | None, streams: Sequence[fx.Node], flow: Dataflow
) -> Cross | None:
    """The attention of a branch to a prompt, if there is one and its queries are the stream's tokens.

    Its keys come neither from the stream nor from `streams`.
    """
    own = self_attention(branch, flow)
    others = [flow.attention[node] for node in branch.attention if node not in own]
    if len(others) != 1 or others[0].written is not None:
        return None
    query = others[0].query
    if follow(query.node, query.axis, branch.origin, flow) != ({axis}, ""):
        return None
    if any(flow.depends(others[0].key.node, start) for start in streams):
        return None
    samples = _samples([query.node], {query.axis.dim}, branch.origin, batch, flow)
    return Cross((others[0].node.name,), query.axis, samples)


def self_attention(branch: Branch, flow: Dataflow) -> list[fx.Node]:
    """The attention nodes of a branch whose keys or values are the stream's, or computed from it."""
    return [node for node in branch.attention if flow.is_self_attention(node, branch.origin)]
