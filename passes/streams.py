"""Find the residual streams of a captured graph, their blocks and their branches, from dataflow alone.

A stream is a chain of residual adds (`chains`). The main one is the stream that the output is computed from; another is
named after the model input that it begins with. Adds made by the same block (the module path up to its last number)
form a block, on whatever stream they are. Between two blocks something else may make a stream anew, such as a linear
map of the stream and of an earlier one: the latter is a long skip. No class is known by name.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Container, Sequence
from dataclasses import dataclass, replace
from itertools import groupby, pairwise

import torch
from torch import fx

from tcc.errors import AnalysisError
from tcc.passes.chains import Chain, find_chains
from tcc.passes.dataflow import Dataflow
from tcc.passes.follow import mixes_by_product
from tcc.passes.graph import cat_dim, module_path, shape
from tcc.passes.residual_adds import Add, base_of, guess_axis

__all__ = ["Block", "Branch", "Skip", "Stream", "find_streams"]

aten = torch.ops.aten


@dataclass(frozen=True)
class Branch:
    """One residual branch: `out = stream_in + delta`.

    Attributes:
        kind: `attn`, `cross` or `mlp`.
        add: the residual add.
        stream_in: the add's stream operand.
        origin: the stream value that the branch reads (`stream_in`, or an earlier one for parallel branches).
        delta: the add's branch operand, after the gate.
        out: the branch's output before its gate; `delta` where there is none.
        nodes: the nodes that are computed for this branch alone.
        attention: its attention, by the nodes that stand for it.
        others: how many rows before and after the stream's tokens belong to others; None where that is not known.
    """

    kind: str
    add: fx.Node
    stream_in: fx.Node
    origin: fx.Node
    delta: fx.Node
    out: fx.Node
    nodes: tuple[fx.Node, ...]
    attention: tuple[fx.Node, ...]
    others: tuple[int, int] | None = (0, 0)


@dataclass(frozen=True)
class Skip:
    """A long skip: an earlier value of the stream that enters again between two blocks.

    Attributes:
        value: what enters, of the stream's shape.
        reader: the node that takes it in.
        beside: the operand of `reader` that comes from the block before, of the stream's shape; None if there is none.
    """

    value: fx.Node
    reader: fx.Node
    beside: fx.Node | None


@dataclass(frozen=True)
class Block:
    """What a transformer block does to one stream: consecutive branches, and the long skips that enter before them.

    Attributes:
        name: the block's name; blocks of several streams that are one module have one name.
        branches: the branches by name.
        skips: the long skips.
    """

    name: str
    branches: tuple[tuple[str, Branch], ...]
    skips: tuple[Skip, ...] = ()

    @property
    def entry(self) -> fx.Node:
        """The stream entering the block, before any long skip is joined to it, `[B, S, D]`."""
        beside = self.skips[0].beside if self.skips else None
        return self.stream_in if beside is None else beside

    @property
    def stream_in(self) -> fx.Node:
        """The stream that the first branch is added to, after all long skips, `[B, S, D]`."""
        return self.branches[0][1].stream_in

    @property
    def stream_out(self) -> fx.Node:
        """The stream leaving the block, `[B, S, D]`."""
        return self.branches[-1][1].add

    @property
    def continuous(self) -> bool:
        """Whether nothing but the branches changes the stream inside the block."""
        parts = [branch for _, branch in self.branches]
        return all(b.stream_in is a.add for a, b in pairwise(parts))


@dataclass(frozen=True)
class Stream:
    """A residual stream.

    Attributes:
        name: "" for the main stream.
        blocks: its blocks, in order.
        rows_out: the rows of its last value that the output is made of, from and up to but not including; all if None.
    """

    name: str
    blocks: tuple[Block, ...]
    rows_out: tuple[int, int] | None = None

    @property
    def branches(self) -> list[Branch]:
        """All branches, in order."""
        return [branch for block in self.blocks for _, branch in block.branches]

    @property
    def shape(self) -> tuple[int, ...]:
        """Its shape where it holds its own tokens alone, `[B, S, D]`."""
        alone = [branch.add for branch in self.branches if branch.others == (0, 0)]
        return shape(min(alone or [self.branches[-1].add], key=lambda add: shape(add)[guess_axis(add).dim]))


def find_streams(graph: fx.Graph, flow: Dataflow) -> tuple[Stream, ...]:
    """The residual streams of `graph`, the main one first.

    Raises:
        AnalysisError: no chain of at least two residual adds around matrix products exists.
    """
    chains, total = find_chains(graph, flow)
    if not chains:
        raise AnalysisError(
            "no residual stream found: tcc looks for a chain of `x = x + f(x)` with matrix products in f and one "
            f"width throughout, and found {total} such add(s) in {len(flow.nodes)} graph nodes. "
            "Check that the whole model was captured and that its blocks add to their input"
        )
    found = _attending([(chain, _branches(chain, flow)) for chain in chains])
    parts = [branches for _, branches in found]
    rows = chains[0].rows_out if parts[0][-1].add is chains[0].adds[-1].add else None
    names = _stream_names([chain.roots for chain, _ in found])
    order = sorted((branch.add, number) for number, branches in enumerate(parts) for branch in branches)
    blocks = _block_names(order, {branch.add: branch for branches in parts for branch in branches})
    return tuple(
        Stream(name, _with_skips(_blocks(branches, blocks), flow), None if name else rows)
        for name, branches in zip(names, parts, strict=True)
    )


def _branches(chain: Chain, flow: Dataflow) -> list[Branch]:
    streams = [base_of(chain.adds[0].stream_in)]
    found = []
    for item, others in zip(chain.adds, chain.others, strict=True):
        streams += [node for node in (base_of(item.stream_in), item.stream_in) if node is not streams[-1]]
        origin = next(s for s in reversed(streams) if flow.depends(item.delta, s))
        nodes = tuple(flow.between(origin, [item.delta]))
        found.append(replace(_branch(item, origin, nodes, flow), others=others))
        streams.append(item.add)
    return found


def _branch(item: Add, origin: fx.Node, nodes: tuple[fx.Node, ...], flow: Dataflow) -> Branch:
    attention = tuple(n for n in nodes if n in flow.attention)
    own = [n for n in attention if flow.is_self_attention(n, origin)]
    mixing = not attention and mixes_by_product(item.delta, guess_axis(item.add), origin, flow)
    kind = "attn" if own or mixing else ("cross" if attention else "mlp")
    out = _before_gate(item.delta, origin, flow)
    return Branch(kind, item.add, item.stream_in, origin, item.delta, out, nodes, attention)


def _before_gate(delta: fx.Node, origin: fx.Node, flow: Dataflow) -> fx.Node:
    """The factor of `delta = gate * out` that comes from the stream, where the gate is the same for all tokens."""
    if delta.target is not aten.mul.Tensor:
        return delta
    for gate, out in (delta.args, delta.args[::-1]):
        if not (isinstance(gate, fx.Node) and isinstance(out, fx.Node)):
            continue
        if flow.depends(out, origin) and not flow.depends(gate, origin) and shape(out) == shape(delta):
            return out
    return delta


def _attending(parts: Sequence[tuple[Chain, list[Branch]]]) -> list[tuple[Chain, list[Branch]]]:
    """The streams with attention, and of each the stretches of one shape with attention; where there is any at all."""
    found = []
    for chain, branches in parts:
        stretches = [list(stretch) for _, stretch in groupby(branches, key=lambda branch: shape(branch.add))]
        kept = [branch for stretch in stretches if any(b.attention for b in stretch) for branch in stretch]
        if kept:
            found.append((chain, kept))
    return found or [parts[0]]


def _block_names(order: Sequence[tuple[fx.Node, int]], branches: dict[fx.Node, Branch]) -> dict[fx.Node, str]:
    """The block of every add: adds of one module are a block, on whatever stream they are.

    Where one module holds all adds of a model, a block starts at each attention.
    """
    groups: list[tuple[str, list[tuple[fx.Node, int]]]] = []
    for add, stream in order:
        path = _block_path(module_path(add))
        same = bool(groups) and groups[-1][0] == path
        begun = same and any(number == stream for _, number in groups[-1][1])
        if same and (_numbered(path) or not begun or branches[add].kind != "attn"):
            groups[-1][1].append((add, stream))
        else:
            groups.append((path, [(add, stream)]))
    taken = {"out", *(f"{path}.{branches[add].kind}" for path, adds in groups for add, _ in adds)}
    names = _unique([path for path, _ in groups], taken)
    return {add: name for name, (_, adds) in zip(names, groups, strict=True) for add, _ in adds}


def _blocks(branches: Sequence[Branch], names: dict[fx.Node, str]) -> tuple[Block, ...]:
    return tuple(
        Block(name, _named(list(parts))) for name, parts in groupby(branches, key=lambda branch: names[branch.add])
    )


def _with_skips(blocks: Sequence[Block], flow: Dataflow) -> tuple[Block, ...]:
    """Find the long skips of every block: what enters between it and the block before, and is not from that block."""
    first, found = blocks[0].stream_in, [blocks[0]]
    for before, block in pairwise(blocks):
        way = [before.stream_out, *flow.between(before.stream_out, [block.stream_in])]
        skips = [
            Skip(entering, reader, next((n for n in reader.all_input_nodes if n in way and _alike(n, first)), None))
            for reader in way[1:]
            if not _joins_rows(reader)
            for entering in reader.all_input_nodes
            if entering not in way and _alike(entering, first) and (entering is first or flow.depends(entering, first))
        ]
        found.append(replace(block, skips=tuple(skips)))
    return tuple(found)


def _joins_rows(node: fx.Node) -> bool:
    """Whether `node` joins rows of several streams, and not channels of one."""
    return node.target is aten.cat.default and cat_dim(node) != len(shape(node)) - 1


def _alike(a: fx.Node, b: fx.Node) -> bool:
    return shape(a) == shape(b)


def _block_path(path: str) -> str:
    """`path` up to its last number: `blocks.3.attn` -> `blocks.3`. What follows an `@` in a site's name is a stream."""
    path = path.replace("@", "_")
    parts = path.split(".")
    last = max((i for i, part in enumerate(parts) if part.isdigit()), default=None)
    return path if last is None else ".".join(parts[: last + 1])


def _numbered(path: str) -> bool:
    return path.rsplit(".", 1)[-1].isdigit()


def _unique(paths: Sequence[str], taken: Container[str]) -> list[str]:
    """`paths`, with a number where one is empty, not the only one, or what something else is called, if numbered."""
    alone = {path for path, count in Counter(paths).items() if path and count == 1}
    alone -= {path for path in alone if path in taken or path.rstrip("0123456789") in taken}
    numbered = [path if path in alone else f"{path}.block{i}".lstrip(".") for i, path in enumerate(paths)]
    return [
        name if path == name or name not in alone else f"{name}_" for path, name in zip(paths, numbered, strict=True)
    ]


def _named(parts: Sequence[Branch]) -> tuple[tuple[str, Branch], ...]:
    seen: dict[str, int] = {}
    named = []
    for branch in parts:
        seen[branch.kind] = seen.get(branch.kind, 0) + 1
        number = seen[branch.kind]
        named.append((branch.kind if number == 1 else f"{branch.kind}{number}", branch))
    return tuple(named)


#: Words of a model input's name that do not tell one stream from another, and words for what they are.
_WORDS = {"encoder": "text", "prompt": "text", "caption": "text", "txt": "text", "img": "image"}
_FILLERS = {"hidden", "states", "state", "embeds", "embed", "embedding", "embeddings", "latents", "features", "input",
            "tokens", "x"}  # fmt: skip


def _stream_names(roots: Sequence[Sequence[fx.Node]]) -> list[str]:
    """Empty for the main stream, then the names of the inputs that the others begin with, and `stream2` without one."""
    names = [""]
    for own in roots[1:]:
        alone = [node for node in own if node not in roots[0]] or [node for node in own if node is not roots[0][0]]
        name = _short(max(alone, key=lambda node: len(shape(node))).name) if alone else ""
        names.append(_free(name or "stream", names))
    return names


def _short(name: str) -> str:
    """`encoder_hidden_states` -> `text`, `audio_hidden_states` -> `audio`; "" where nothing is left."""
    words = [_WORDS.get(word, word) for word in name.strip("_").split("_") if word and word not in _FILLERS]
    return "_".join(dict.fromkeys(words))


def _free(name: str, taken: Sequence[str]) -> str:
    number = 2
    found = name if name != "stream" else "stream2"
    while found in taken:
        found, number = f"{name}{number + (name == 'stream')}", number + 1
    return found
