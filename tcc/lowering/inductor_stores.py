"""What Inductor is told about what slots keep: store it as soon as it is there, and add sums up in the slot.

Left alone, it stores at the end of the step, adds all terms of a sum in one loop, and every value waits for that. The
loops made here for sums are fused with no others, or they would be moved together again.
"""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, fx
from torch._inductor import ir
from torch._inductor.custom_graph_pass import CustomGraphPass, get_hash_for_files
from torch._inductor.lowering import register_lowering
from torch._inductor.virtualized import V

from tcc.passes.write_slots import additions

__all__ = ["StoreEarly"]

aten = torch.ops.aten
#: What `NarrowSlots` puts between a value and its slot, as Inductor has it.
_CASTS = {
    *(aten._to_copy.default, torch.ops.prims.convert_element_type.default),
    *(aten.clamp.default, aten.clamp_min.default, aten.clamp_max.default),
}


@torch.library.custom_op("tcc::put", mutates_args=())
def put(slot: Tensor, value: Tensor, alone: bool) -> Tensor:
    """`value`, in the memory of `slot` where the backend can put it there; nobody reads what the slot held before.

    Args:
        slot: of the shape and dtype of `value`.
        value: what is put there.
        alone: whether nobody else reads `value`, so that it can be computed there.
    """
    return value.clone()


@put.register_fake
def _(slot: Tensor, value: Tensor, alone: bool) -> Tensor:
    return torch.empty_like(value)


@register_lowering(torch.ops.tcc.put.default, type_promotion_kind=None)
def _lower_put(slot: Any, value: Any, alone: bool) -> Any:
    if not (alone and _can_be_made_elsewhere(value.data)):
        # computed anew: a value that is kept for the copy would change what Inductor keeps of the stream
        value = ir.Pointwise.create(
            device=value.get_device(), dtype=value.get_dtype(), inner_fn=value.make_loader(), ranges=value.get_size()
        )
    name = ir.MutationLayoutSHOULDREMOVE.realize_into(value.data, slot.data, unsafe_alias=True).get_name()
    V.graph.no_fuse_buffer_names.add(name)
    return slot


@torch.library.custom_op("tcc::made", mutates_args=())
def made(value: Tensor) -> Tensor:
    """`value`, which the backend computes here and now, and not where it is read."""
    return value.clone()


@made.register_fake
def _(value: Tensor) -> Tensor:
    return torch.empty_like(value)


@register_lowering(torch.ops.tcc.made.default, type_promotion_kind=None)
def _lower_made(value: Any) -> Any:
    value.realize()
    V.graph.no_fuse_buffer_names.add(value.get_name())
    return value


def _can_be_made_elsewhere(data: Any) -> bool:
    """Not a view, and no buffer whose memory is settled, such as what a block that is compiled once returns."""
    layout = getattr(getattr(data, "data", None), "layout", None)  # what is not computed yet has none
    return isinstance(data, ir.StorageBox) and (layout is None or isinstance(layout, ir.FlexibleLayout))


class StoreEarly(CustomGraphPass):
    """Of the graph that Inductor compiles: move `copy_(slot, value)` to where the value is made.

    Where nobody else reads the old value:

    1. What hands a slot's old value on to another slot comes first of all.
    2. Of a sum whose parts nobody else reads, `put(slot, put(slot, put(slot, a) + b) + c)`, each as soon as its term is
       there: Inductor has moved all of them to the copy, to be near it.
    3. A sum that is kept in a narrower dtype is added up in its own, each term as soon as it is there, and then cast.
    4. Any other value is copied as soon as it is there. AOTAutograd has put all copies last, and Inductor would begin
       with the least that can be done, such as all modulations, in place of waiting for them with all values.
    """

    def __call__(self, graph: fx.Graph) -> None:
        """Edit `graph`."""
        copies = graph.find_nodes(op="call_function", target=aten.copy_.default)
        for copy in copies:
            _write_directly(graph, copy)
        start, moved = next(n for n in graph.nodes if n.op != "placeholder"), set[fx.Node]()
        for copy in copies:
            slot, val = copy.args[:2]
            free = slot.op == "placeholder" and slot.users.keys() - {copy} <= moved
            if free and val.op == "placeholder" and copy is not start:
                start.prepend(copy)
                moved.add(copy)
            elif free and (sums := additions(val)):
                _make_all_early(sums)
                first = sums[0].all_input_nodes[0]
                self._put(graph, slot, first, sums[0], alone=len(first.users) == 1)
                for add, reader in zip(sums, [*sums[1:], copy], strict=True):
                    self._put(graph, slot, add, reader, alone=True)
            elif free and val.op == "call_function":
                sums = additions(_before_casts(val))
                _make_all_early([*sums, val] if sums else [])
                for add, reader in itertools.pairwise(sums):
                    self._replace(graph, add, reader, torch.ops.tcc.made.default, (add,))
                val.append(copy)

    def uuid(self) -> Any:
        """What changes with this file, and the one that tells Inductor what it may keep for reuse."""
        return get_hash_for_files((__file__, str(Path(__file__).with_name("inductor_reuse.py"))))

    def _put(self, graph: fx.Graph, slot: fx.Node, val: fx.Node, reader: fx.Node, *, alone: bool) -> None:
        self._replace(graph, val, reader, torch.ops.tcc.put.default, (slot, val, alone))

    def _replace(self, graph: fx.Graph, val: fx.Node, reader: fx.Node, op: Any, args: tuple[Any, ...]) -> None:
        """`reader` reads what `op` makes of `val`, right after it."""
        with graph.inserting_after(val):
            new = graph.call_function(op, args)
        new.meta["val"] = val.meta["val"]
        reader.replace_input_with(val, new)


def _write_directly(graph: fx.Graph, copy: fx.Node) -> None:
    """`copy_(slot, copy(slot, value))`, as torch 2.15 has it where the value is an input, is `copy_(slot, value)`."""
    slot, val = copy.args[:2]
    assert isinstance(val, fx.Node)
    if val.target is aten.copy.default and val.args[0] is slot:
        copy.update_arg(1, val.args[1])
        if not val.users:
            graph.erase_node(val)


def _before_casts(val: fx.Node) -> fx.Node:
    """The value that `val` is a narrower copy of, if nobody else reads it: itself, or what is clamped and cast."""
    while val.target in _CASTS and len(val.all_input_nodes[0].users) == 1:
        val = val.all_input_nodes[0]
    return val


def _make_all_early(chain: list[fx.Node]) -> None:
    """Of values that are each made of the one before."""
    for before, node in zip([None, *chain], chain, strict=False):
        _make_early(node, before)


def _make_early(node: fx.Node, before: fx.Node | None) -> None:
    """Move an addition or a cast, and what it alone needs beside `before`, to where all that it reads is there."""
    moved, todo = {node}, [node]
    while todo:
        more = [each for each in todo.pop().all_input_nodes if each is not before and _is_cheap(each)]
        moved.update(more)
        todo += more
    read = [each for node in moved for each in node.all_input_nodes if each not in moved]
    made = [each for each in read if each.op == "call_function"]
    if made:
        last = max(made)
        for node in sorted(moved):
            last.append(node)
            last = node


def _is_cheap(node: fx.Node) -> bool:
    """Whether it has one reader and is made point by point, or of the graph's inputs alone, as masks are."""
    if node.op != "call_function" or len(node.users) != 1:
        return False
    inputs = node.all_input_nodes
    by_point = torch.Tag.pointwise in getattr(node.target, "tags", ())
    return by_point or all(n.op == "placeholder" or _is_cheap(n) for n in inputs)
