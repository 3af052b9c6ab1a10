"""Reading and extending FX graphs: values, new nodes, printed text, source lines."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import fx
from torch.fx._lazy_graph_module import _LazyGraphModule  # torch has no public one (2.11-2.13)

from tcc.errors import PassError
from tcc.passes.fake_values import evaluate, fake_mode_of

__all__ = [
    "UNKNOWN",
    "copy_of",
    "emit",
    "fake_mode_of",
    "graph_hash",
    "graph_text",
    "operators_of",
    "output_values",
    "shape",
    "size",
    "sized_by_data",
    "source_line",
    "value",
    "write_code",
]

#: A size that depends on the data, such as how many elements of a mask are true.
UNKNOWN = -1
#: What a node does, and what comes out: target, arguments, keyword arguments, value.
Call = tuple[Any, Any, Any, Any]
_COPIES = {torch.ops.aten.clone.default, torch.ops.aten.contiguous.default}


def value(node: fx.Node) -> Any:
    """The fake tensor (or other value) that `node` produces."""
    return node.meta["val"]


def shape(node: fx.Node) -> tuple[int, ...]:
    """The shape of the tensor that `node` produces, `UNKNOWN` where a size depends on the data; () for other values."""
    val = node.meta.get("val")
    return tuple(map(size, val.shape)) if isinstance(val, torch.Tensor) else ()


def size(found: int | torch.SymInt) -> int:
    """`found`, or `UNKNOWN` where it depends on the data."""
    known = isinstance(found, int) or found.node.expr.is_number
    return int(found) if known else UNKNOWN


def sized_by_data(node: fx.Node) -> bool:
    """Whether a size of the value, of what it is computed from, or in the call itself depends on the data."""
    around = (node, *node.all_input_nodes)
    return any(UNKNOWN in shape(n) or isinstance(n.meta.get("val"), torch.SymInt) for n in around)


def copy_of(gm: fx.GraphModule) -> fx.GraphModule:
    """A copy of the graph with the same weights, whose code is written when it is first called: most are not."""
    graph, new = fx.Graph(), dict[fx.Node, fx.Node]()
    for node in gm.graph.nodes:
        if node.op == "output":
            graph.output(fx.map_arg(node.args[0], new.__getitem__))
            continue
        copy = new[node] = graph.create_node(node.op, node.target, name=node.name, type_expr=node.type)
        # Here: create_node takes long to look through them; and past Node.__setattr__, which looks the node up anew.
        object.__setattr__(copy, "args", fx.map_arg(node.args, new.__getitem__))
        if node.kwargs:
            object.__setattr__(copy, "kwargs", fx.map_arg(node.kwargs, new.__getitem__))
        copy.meta.update(node.meta)
    return _LazyGraphModule(gm, graph)


def write_code(gm: fx.GraphModule) -> None:
    """Write the code of a copy now."""
    _LazyGraphModule.force_recompile(gm)


def emit(
    graph: fx.Graph,
    target: Callable[..., Any],
    args: tuple[Any, ...],
    kwargs: dict[str, Any] | None = None,
    *,
    like: fx.Node | None = None,
) -> fx.Node:
    """Add a call at the graph's insertion point, with its fake value.

    Args:
        graph: the graph; the caller has set its insertion point.
        target: the function to call.
        args: its arguments; nodes stand for their values.
        kwargs: its keyword arguments.
        like: a node whose module path and source line the new one takes over.

    Raises:
        RuntimeError: the call is not valid for its arguments; names `like` and its source line.
    """
    node = graph.call_function(target, args, kwargs or {})
    if like is not None:
        for key in ("nn_module_stack", "stack_trace"):
            if key in like.meta:
                node.meta[key] = like.meta[key]
    try:
        node.meta["val"] = evaluate(node, fake_mode_of(graph))
    except Exception as error:
        made_for = f" made for node '{like.name}', {source_line(like)}" if like is not None else ""
        raise RuntimeError(f"{target}{made_for}: {error}") from error
    return node


def output_values(graph: fx.Graph) -> tuple[Any, ...]:
    """The flat tuple that the graph returns."""
    return tuple(graph.output_node().args[0])  # type: ignore[arg-type]


def source_line(node: fx.Node) -> str:
    """The user's source line that made `node` (the innermost outside torch), or its module path where none is known."""
    trace = node.meta.get("stack_trace") or ""
    places = [line.strip() for line in trace.splitlines() if line.strip().startswith("File ")]
    own = [place for place in places if "/torch/" not in place]
    if places:
        return (own or places)[-1]
    return f"module {module_path(node) or '(top)'}"


def cat_dim(node: fx.Node) -> int:
    """The dimension that a concatenation joins."""
    dim = node.args[1] if len(node.args) > 1 else node.kwargs.get("dim", 0)
    assert isinstance(dim, int)
    return dim % len(shape(node))


def module_path(node: fx.Node) -> str:
    """The dotted path of the module whose forward made `node`."""
    stack = node.meta.get("nn_module_stack") or {}
    paths = [entry[0] for entry in stack.values()]
    return str(paths[-1]) if paths else ""


def graph_text(graph: fx.Graph) -> str:
    """The graph as text, one node a line, values numbered so that node names do not matter."""
    numbers = numbers_of(graph.nodes)
    return "\n".join(line(node, call_of(node), numbers) for node in graph.nodes)


def numbers_of(nodes: Iterable[fx.Node]) -> dict[fx.Node, str]:
    """What stands for each node in a graph's text."""
    return {node: f"%{i}" for i, node in enumerate(nodes)}


def graph_hash(graph: fx.Graph, extra: Iterable[str] = ()) -> str:
    """SHA-256 over what the graph computes: the same for all weights, devices, and layouts that a device prefers.

    Parameters count by name, shape and dtype; copies do not count, and a view is a reshape.
    """
    digest, count = hashlib.sha256(), 0
    numbers: dict[fx.Node, str] = {}
    for node in graph.nodes:
        if node.target in _COPIES:
            numbers[node] = numbers[node.args[0]]
            continue
        numbers[node], count = f"%{count}", count + 1
        text = re.sub(r"device\(type='\w+'(, index=\d+)?\)", "device", line(node, call_of(node), numbers))
        digest.update(re.sub(r"aten\.(_unsafe_)?view\.default", "aten.reshape.default", text).encode())
    for item in extra:
        digest.update(item.encode())
    return digest.hexdigest()


def call_of(node: fx.Node) -> Call:
    """What `node` does now, and its value."""
    return node.target, node.args, node.kwargs, node.meta.get("val")


def line(node: fx.Node, call: Call, numbers: dict[fx.Node, str]) -> str:
    """The line of a graph's text for `node`, when it does or did `call`."""
    target, given, named, val = call
    args, kwargs = fx.map_arg((given, named), lambda n: _Name(numbers.get(n, n.name)))
    what = str(target) if node.op in ("placeholder", "get_attr") else _target_name(target)
    inputs = ", ".join([*map(repr, args), *(f"{k}={v!r}" for k, v in kwargs.items())])
    return f"{numbers[node]} = {node.op} {what}({inputs}) -> {_describe(val)}"


class _Name(str):
    def __repr__(self) -> str:
        return str(self)


def _target_name(target: Any) -> str:
    return str(target) if not callable(target) or hasattr(target, "_schema") else target.__name__


def _describe(val: Any) -> str:
    if isinstance(val, torch.Tensor):
        return f"{str(val.dtype).removeprefix('torch.')}{list(map(size, val.shape))}"
    if isinstance(val, (tuple, list)):
        return "(" + ", ".join(_describe(v) for v in val) + ")"
    return type(val).__name__


def operators_of(target: Any) -> list[Any]:
    """The operators, as they stand in graphs, that a target means: itself, all overloads, or a custom operator.

    Raises:
        PassError: it is no operator.
    """
    if hasattr(target, "_opoverload"):  # what torch.library.custom_op returns
        return [target._opoverload]
    if isinstance(target, torch._ops.OpOverloadPacket):
        return [getattr(target, name) for name in target.overloads()]  # type: ignore[no-untyped-call]
    if not callable(target):
        raise PassError(f"{target!r} is no operator: name one, such as torch.ops.aten.linear.default")
    return [target]
