"""Which inputs of a captured graph say where the caller's loop is: the noise level (the timestep), and the sample."""

from __future__ import annotations

import math

import torch
from torch import fx

from tcc.passes.graph import output_values, shape, value
from tcc.passes.macs import node_macs

__all__ = ["is_single", "noise_level", "reaches_wave", "samples"]

aten = torch.ops.aten

_WAVES = {aten.sin.default, aten.cos.default}
_LOOKUPS = {aten.embedding.default, aten.index.Tensor, aten.index_select.default}
#: Words for the noise level in names of a forward's parameters, which are the interface that users call a model by.
_WORDS = {"t", "timestep", "timesteps", "step", "sigma", "sigmas", "logsnr"}
_SINGLE_WORDS = {"time", "times"}  # of a row of numbers for each sample they may be sizes: `time_ids`


def noise_level(graph: fx.Graph) -> int | None:
    """The position, among the graph's inputs, of the noise level; None where nothing tells.

    It is one number for all, or for each sample. Of such inputs it is one that is named like a noise level and whose
    sine or cosine is taken before anything is multiplied or looked up; then one that is named so; then one by waves;
    and the only one of real numbers, if there is no other. The first among equals: a guidance strength stands after
    the timestep. Whole numbers that are looked up and not named so are labels. Numbers for each token or frame are
    taken for noise levels only if they are named so: positions become waves too.
    """
    inputs = [node for node in graph.nodes if node.op == "placeholder"]
    doubts = [(not _is_named(node), not reaches_wave(node), is_single(node)) for node in inputs]
    single = [(*doubt, n) for n, doubt in enumerate(doubts) if doubt[2] and not (doubt[0] and doubt[1])]
    spread = [(*doubt, n) for n, doubt in enumerate(doubts) if _is_number(inputs[n]) and not any(doubt)]
    real = [(*doubts[n], n) for n, node in enumerate(inputs) if doubts[n][2] and value(node).is_floating_point()]
    found = single or spread or (real if len(real) == 1 else [])
    return min(found)[-1] if found else None


def samples(graph: fx.Graph) -> tuple[int, ...]:
    """The positions of the inputs that may be the sample: all of those that are most like the first output.

    A denoiser's output has the shape of its sample but for channels, or as many elements, where one of both is in
    patches. Where no input is so, they have as many of the output's sizes, dimension by dimension, as any has.
    """
    inputs = [node for node in graph.nodes if node.op == "placeholder"]
    outputs = [shape(node) for node in output_values(graph) if isinstance(node, fx.Node)]
    alike = {n: _alike(shape(node), outputs[0]) for n, node in enumerate(inputs) if outputs and not is_single(node)}
    return tuple(position for position, count in alike.items() if count == max(alike.values()))


def _alike(sizes: tuple[int, ...], output: tuple[int, ...]) -> tuple[bool, int]:
    count = sum(a == b for a, b in zip(sizes, output, strict=False))
    return math.prod(sizes) == math.prod(output) or len(sizes) == len(output) <= count + 1, count


def _is_number(node: fx.Node) -> bool:
    val = value(node)
    return isinstance(val, torch.Tensor) and val.dtype != torch.bool and not val.is_complex()


def is_single(node: fx.Node) -> bool:
    """Whether it is a number, or one for each sample."""
    return _is_number(node) and all(size == 1 for size in shape(node)[1:])


def _is_named(node: fx.Node) -> bool:
    words = set(str(node.target).lower().split("_"))
    return bool(words & (_WORDS | _SINGLE_WORDS if is_single(node) else _WORDS)) or {"noise", "level"} <= words


def reaches_wave(start: fx.Node) -> bool:
    """Whether a sine or cosine is taken of it before anything is multiplied or looked up."""
    seen, todo = {start}, [start]
    while todo:
        for user in todo.pop().users:
            if user.target in _WAVES:
                return True
            if user not in seen and not node_macs(user) and user.target not in _LOOKUPS:
                seen.add(user)
                todo.append(user)
    return False
