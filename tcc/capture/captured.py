"""From a model and its inputs to one functional FX graph.

The only module that touches the exported program's inner form.
"""

from __future__ import annotations

import functools
import inspect
import logging
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx, nn
from torch.export import ExportedProgram
from torch.export.graph_signature import InputKind, OutputKind
from torch.utils import _pytree as pytree  # no public pytree module in torch 2.11-2.13

from tcc.capture.call_form import Leaf, bind, normal_form
from tcc.capture.explain import explain
from tcc.capture.leftovers import no_leftovers
from tcc.errors import CallError, CaptureError, ShapeError
from tcc.passes.base import run_passes
from tcc.passes.graph import graph_hash, graph_text, shape, source_line, value
from tcc.passes.noise_level import noise_level, samples
from tcc.passes.normalize import Normalize
from tcc.passes.views import owner

__all__ = ["Captured", "InputSpec", "capture"]

logger = logging.getLogger(__name__)

#: What an argument is that is certainly no structure.
_LEAVES = frozenset({torch.Tensor, bool, int, float, str, type(None)})


@dataclass(frozen=True)
class InputSpec:
    """One tensor input: what a call must look like.

    Attributes:
        name: its name in the graph, close to the forward's parameter name.
        shape: its shape.
        dtype: its dtype.
        device: its device.
    """

    name: str
    shape: tuple[int, ...]
    dtype: torch.dtype
    device: torch.device

    def check(self, tensor: Any) -> None:
        """Check what a call gives for this input.

        Raises:
            ShapeError, CallError: it is not what was captured.
        """
        if not isinstance(tensor, torch.Tensor):
            raise CallError(
                f"input '{self.name}' is {tensor!r}, expected a tensor: what was a tensor at capture stays one"
            )
        if tensor.dtype != self.dtype:
            raise CallError(
                f"input '{self.name}' has dtype {tensor.dtype}, expected {self.dtype}: a compiled model runs the "
                f"dtypes it was captured with. Cast it ({self.name}.to({self.dtype})), or call tcc.compile anew for "
                "another dtype"
            )
        if tensor.device != self.device:
            raise CallError(
                f"input '{self.name}' is on {tensor.device}, expected {self.device}: a compiled model runs on the "
                "device it was captured on"
            )
        if tuple(tensor.shape) != self.shape:
            raise ShapeError(
                f"input '{self.name}' has shape {list(tensor.shape)}, expected {list(self.shape)}: what was captured "
                "runs the shapes (resolution, prompt length, batch) of its capture. Call it with these, or capture the "
                "new ones: tcc.inspect, or tcc.compile(..., on_shape_change='recapture'), which compiles again for each"
            )


@dataclass(frozen=True)
class Captured:
    """A model as one functional graph.

    Attributes:
        gm: placeholders are the tensor inputs in call order, weights are `get_attr` nodes that share the model's
            tensors, the output is a flat tuple.
        inputs: the tensor inputs.
        constants: the flattened inputs that are not tensors, by position; fixed at capture.
        in_spec: the structure of `(args, kwargs)` in normal form, see `tcc.capture.call_form`.
        out_spec: the structure of the result.
        signature: the signature that calls are bound to, or None where the source was an ExportedProgram.
        hash: content hash of the graph (operators, shapes, dtypes; not the weights).
        noise_level: the position of the noise level among the inputs; None where none was named or found.
        samples: the positions of the inputs that may be the sample.
        autocast: the dtype that `torch.autocast` cast to while it was captured; None where it was off. The graph has
            these casts.
    """

    gm: fx.GraphModule
    inputs: tuple[InputSpec, ...]
    constants: Mapping[int, Any]
    in_spec: pytree.TreeSpec
    out_spec: pytree.TreeSpec
    signature: inspect.Signature | None
    hash: str
    noise_level: int | None = None
    samples: tuple[int, ...] = ()
    autocast: torch.dtype | None = None

    def flatten(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> list[torch.Tensor]:
        """The tensor inputs of a call, in the graph's order.

        Raises:
            CallError: the call's structure, a constant, a shape (ShapeError), a dtype, a device or autocast differs
                from the capture.
        """
        if _autocast(self.inputs) != self.autocast:
            raise CallError(
                f"the call is made with autocast {_state(_autocast(self.inputs))}, and the model was captured with "
                f"autocast {_state(self.autocast)}: make all calls alike, example_inputs included"
            )
        leaves = self._plain_leaves(args, kwargs)
        if leaves is None:
            leaves, spec = pytree.tree_flatten(bind(self.signature, args, kwargs))
            if spec != self.in_spec:
                raise CallError(self._other_structure(spec))
        tensors = []
        for position, leaf in enumerate(leaves):
            if position not in self.constants:
                tensors.append(leaf)
            elif not _same_constant(leaf, self.constants[position]):
                bound = bind(self.signature, args, kwargs)
                raise CallError(
                    f"argument {self._leaf_name(bound, position)} is {_shown(leaf)} but was "
                    f"{self.constants[position]!r} at capture: values that are not tensors are compiled in; pass a "
                    "tensor if it changes from call to call, and the same arguments at every call"
                )
        for spec_, tensor in zip(self.inputs, tensors, strict=True):
            spec_.check(tensor)
        return [tensor.contiguous() for tensor in tensors]  # itself, unless it is a slice, a transpose or the like

    @functools.cached_property
    def _defaults(self) -> tuple[tuple[str, Any], ...] | None:
        """The forward's parameters and their defaults, where each was one tensor or constant at capture; else None."""
        found = [] if self.signature is None else list(self.signature.parameters.values())
        if not found or any(parameter.kind is not parameter.POSITIONAL_OR_KEYWORD for parameter in found):
            return None
        plain = self.in_spec == pytree.tree_structure(((0,) * len(found), {}))
        return tuple((parameter.name, parameter.default) for parameter in found) if plain else None

    def _plain_leaves(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> list[Any] | None:
        """The leaves of a call that has the captured structure at first sight; None where it takes a closer look.

        A step's time beside its graph would else be spent on binding and flattening.
        """
        if self._defaults is None:
            return None
        rest = self._defaults[len(args) :]
        leaves = [*args, *(kwargs.get(name, default) for name, default in rest)]
        known = len(leaves) == len(self._defaults) and sum(name in kwargs for name, _ in rest) == len(kwargs)
        return leaves if known and all(type(leaf) in _LEAVES for leaf in leaves) else None

    def _other_structure(self, spec: pytree.TreeSpec) -> str:
        """What to say of a call whose arguments have the structure `spec`."""
        now, then = (dict(enumerate(s.child(0).children())) for s in (spec, self.in_spec))
        found = [
            f"argument '{self._parameter(number)}': now {now.get(number)}, captured {then.get(number)}"
            for number in sorted(now.keys() | then.keys())
            if now.get(number) != then.get(number)
        ] or [f"keyword arguments: now {spec.child(1).context}, captured {self.in_spec.child(1).context}"]
        return (
            "the call's arguments are structured differently from the capture "
            f"({'; '.join(found)}): pass the same arguments at every call, or compile again"
        )

    def _leaf_name(self, bound: tuple[tuple[Any, ...], dict[str, Any]], position: int) -> str:
        """What the call's argument, or the part of one, is called that is flattened to `position`."""
        _, argument, *path = pytree.tree_flatten_with_path(bound)[0][position][0]
        if isinstance(argument, pytree.SequenceKey):
            name = self._parameter(argument.idx)
        else:
            name = argument.key if isinstance(argument, pytree.MappingKey) else str(argument)
        return f"'{name}{pytree.keystr(tuple(path))}'"

    def _parameter(self, number: int) -> str:
        """The name of the forward's parameter of that number."""
        names = [] if self.signature is None else list(self.signature.parameters)
        return names[number] if number < len(names) else str(number)

    def is_same(self, other: Captured) -> bool:
        """Whether both compute the same: one graph, of the same weights, and equal constants."""
        mine, theirs = (dict((*c.gm.named_parameters(), *c.gm.named_buffers())) for c in (self, other))
        return self.hash == other.hash and all(_same_weight(mine[name], theirs.get(name)) for name in mine)

    def unflatten(self, outputs: list[Any]) -> Any:
        """The model's own output structure from the graph's flat outputs."""
        return pytree.tree_unflatten(outputs, self.out_spec)


def capture(
    model: nn.Module | ExportedProgram, args: tuple[Any, ...], kwargs: dict[str, Any], *, level: str | None = None
) -> Captured:
    """Capture `model` called with `args` and `kwargs` as one functional graph.

    Args:
        model: a module in eval mode, or an `ExportedProgram` (then `args` and `kwargs` are its example inputs).
        args: positional inputs; every tensor's shape is fixed by this.
        kwargs: keyword inputs.
        level: the name of the input that is the noise level; searched in the graph if not given.

    Raises:
        CaptureError: `torch.export` refused the model, its graph changes the model's state or reads values by strides,
            or it has no input `level`.
    """
    signature = None
    if isinstance(model, ExportedProgram):
        program = model
    else:
        signature = inspect.signature(model.forward)
        bind(signature, args, kwargs)  # says what does not fit
        program = _export(model, args, kwargs)
    program = _decomposed(program)
    leaves, in_spec = normal_form(signature, program.call_spec.in_spec)
    gm, constants = _unlift(program, leaves)
    _check_strides(gm.graph)
    run_passes(gm, [Normalize()], label="capture")
    inputs = tuple(
        InputSpec(str(n.target), shape(n), value(n).dtype, value(n).device)
        for n in gm.graph.nodes
        if n.op == "placeholder"
    )
    inner = [graph_text(module.graph) for module in gm.children() if isinstance(module, fx.GraphModule)]
    found = noise_level(gm.graph) if level is None else _position(level, [spec.name for spec in inputs])
    digest = graph_hash(gm.graph, inner)
    out_spec = program.call_spec.out_spec
    autocast = None if isinstance(model, ExportedProgram) else _autocast(inputs)
    return Captured(gm, inputs, constants, in_spec, out_spec, signature, digest, found, samples(gm.graph), autocast)


def _autocast(inputs: Sequence[InputSpec]) -> torch.dtype | None:
    """The dtype that `torch.autocast` casts to on the inputs' device; None where it is off."""
    kind = inputs[0].device.type if inputs else "cpu"
    on = torch.amp.is_autocast_available(kind) and torch.is_autocast_enabled(kind)
    return torch.get_autocast_dtype(kind) if on else None


def _state(autocast: torch.dtype | None) -> str:
    return "off" if autocast is None else f"to {autocast}"


def _position(level: str, names: list[str]) -> int:
    if level not in names:
        raise CaptureError(
            f"noise_level={level!r}: the model has no tensor input of that name; its inputs are {', '.join(names)}"
        )
    return names.index(level)


def _export(model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> ExportedProgram:
    if model.training:
        raise CaptureError("the model is in training mode (dropout would be captured): call model.eval() first")
    try:
        with torch.no_grad(), no_leftovers(model):
            return torch.export.export(model, *_plain(args, kwargs), strict=False)
    except Exception as error:
        raise CaptureError(explain(model, error)) from error


def _plain(args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """The inputs in the one layout that is compiled, and no tensor in two places.

    Export would read one of two inputs that are the same tensor wherever the other belongs.
    """
    seen: set[int] = set()

    def once(leaf: Any) -> Any:
        if not isinstance(leaf, torch.Tensor):
            return leaf
        first = id(leaf) not in seen
        seen.add(id(leaf))
        return leaf.contiguous() if first else leaf.clone(memory_format=torch.contiguous_format)

    found: tuple[tuple[Any, ...], dict[str, Any]] = pytree.tree_map(once, (args, kwargs))
    return found


def _decomposed(program: ExportedProgram) -> ExportedProgram:
    """Functional form with an *empty* table: `linear`, `layer_norm` and attention stay whole."""
    with warnings.catch_warnings():  # torch copies its own tree specs in a way that it warns about
        warnings.filterwarnings("ignore", message=".*LeafSpec", category=FutureWarning)
        program = program.run_decompositions({})
    changed = [
        spec.target
        for spec in program.graph_signature.output_specs
        if spec.kind in (OutputKind.BUFFER_MUTATION, OutputKind.USER_INPUT_MUTATION)
    ]
    if changed:
        raise CaptureError(
            f"the model writes to {', '.join(map(str, changed))} while it runs, so steps are not repeatable: "
            "return the new value instead of storing it"
        )
    return program


def _check_strides(graph: fx.Graph) -> None:
    """Refuse what depends on how a computed value lies in memory: what a plan puts in its place may lie otherwise."""
    for node in graph.nodes:
        if node.target is torch.ops.aten.as_strided.default and owner(node).op == "call_function":
            raise CaptureError(
                f"the model reads a computed value by strides (as_strided), {source_line(node)}: reused and scattered "
                "values may lie in memory otherwise. Write it with reshape, unfold or slices"
            )


def _unlift(program: ExportedProgram, leaves: Sequence[Any]) -> tuple[fx.GraphModule, dict[int, Any]]:
    """A graph module whose weights are attributes, and the constant inputs by position among `leaves`."""
    root, graph = nn.Module(), fx.Graph()
    names: dict[fx.Node, fx.Node] = {}
    specs = {spec.arg.name: spec for spec in program.graph_signature.input_specs}
    constants: dict[int, Any] = {}
    users = [n for n in program.graph.nodes if n.op == "placeholder" and specs[n.name].kind == InputKind.USER_INPUT]
    for position, leaf in enumerate(leaves):  # the model's inputs first, then its weights
        node = users[leaf.number] if isinstance(leaf, Leaf) else None
        if node is None or not isinstance(node.meta.get("val"), torch.Tensor):
            constants[position] = leaf if node is None else node.meta.get("val")
        else:
            names[node] = graph.node_copy(node)
    for node in program.graph.nodes:
        if node.op == "placeholder":
            if specs[node.name].kind != InputKind.USER_INPUT:
                names[node] = _weight(root, graph, node, _tensor_of(program, specs[node.name]))
                names[node].meta["weight"] = specs[node.name].target
            continue
        if node.op == "get_attr":
            node.meta["val"] = getattr(program.graph_module, str(node.target))  # the graph of an inner function
            setattr(root, str(node.target), node.meta["val"])
        if node.op == "output":
            graph.output(tuple(fx.map_arg(tuple(node.args[0]), names.__getitem__)))
            continue
        names[node] = graph.node_copy(node, names.__getitem__)
    return fx.GraphModule(root, graph), constants


def _tensor_of(program: ExportedProgram, spec: Any) -> torch.Tensor:
    name = spec.target
    found = program.state_dict.get(name)
    tensor: torch.Tensor = program.constants[name] if found is None else found
    return tensor


def _weight(root: nn.Module, graph: fx.Graph, node: fx.Node, tensor: torch.Tensor) -> fx.Node:
    name = node.name.replace(".", "_")
    if isinstance(tensor, nn.Parameter):
        root.register_parameter(name, tensor)
    else:
        root.register_buffer(name, tensor)
    new = graph.get_attr(name)
    new.meta["val"] = node.meta["val"]
    return new


def _same_constant(now: Any, then: Any) -> bool:
    return now is then or bool(type(now) is type(then) and not isinstance(then, torch.Tensor) and now == then)


def _same_weight(now: torch.Tensor, then: torch.Tensor | None) -> bool:
    if now is then or then is None or isinstance(now, nn.Parameter):
        return now is then
    return now.shape == then.shape and now.dtype == then.dtype and bool(torch.equal(now, then))


def _shown(leaf: Any) -> str:
    return f"a tensor {list(leaf.shape)}" if isinstance(leaf, torch.Tensor) else repr(leaf)
