"""A frozen model in two forms: all sites computed, or each mixed with its stored value by a weight."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx, nn

from tcc.errors import CallError, PlanError
from tcc.info import ModelInfo
from tcc.passes.base import run_passes
from tcc.passes.sites import Site
from tcc.passes.superpose import Superpose
from tcc.plan import CachePlan, Compute
from tcc.plan.checks import check_sites

__all__ = ["Student", "Values"]


@dataclass(frozen=True)
class Values:
    """What one call gives.

    Attributes:
        output: the model's output, in its own structure.
        stored: by site, what the next step finds stored; without gradients.
        streams: the stream values that were asked for, by site, `[B, S, D]`.
    """

    output: Any
    stored: dict[str, Tensor]
    streams: dict[str, Tensor]


class Student:
    """A frozen model whose sites can be mixed with stored values, differentiable in the weights alone.

    The model's parameters are shared, never changed, and never given gradients.

    Args:
        info: what `tcc.inspect` returned for the model; calls have its shapes.
        sites: the names of the sites to mix, of kinds `out`, `delta` and `block`.
        streams: the names of `stream` sites whose values calls return: `out.stream` is the final one.
        fast: compile both forms with Inductor; takes a minute, and pays for long training.

    Raises:
        PlanError: there are no sites, the model has no such site, or it cannot be mixed.
    """

    def __init__(
        self, info: ModelInfo, sites: Sequence[str], *, streams: Sequence[str] = (), fast: bool = False
    ) -> None:
        if not sites:
            raise PlanError("there is nothing to learn without sites: name some, such as all of kind `out`")
        check_sites(
            CachePlan(num_steps=1, actions={(0, name): Compute() for name in (*sites, *streams)}), info.analysis
        )
        self.info = info
        self.sites = tuple(sites)
        self.streams = tuple(streams)
        self._fast = fast
        self._frozen = _frozen(info.captured.gm)
        self._mixed: dict[tuple[int, int], Any] = {(1, 1): self._build(self._mixture((1, 1)))}
        self._computed = self._build(Superpose(read=self._named(self.sites + self.streams)))

    def compute(self, *args: Any, **kwargs: Any) -> Values:
        """Compute every site: an I-step, and the teacher of a P-step. Keeps nothing for gradients.

        Raises:
            CallError: the call differs from the captured one.
        """
        with torch.no_grad():
            outputs = list(self._computed(*self.info.captured.flatten(args, kwargs)))
        return self._values(outputs)

    def mix(self, stored: Mapping[str, Tensor], weights: Mapping[str, Tensor], *args: Any, **kwargs: Any) -> Values:
        """Mix every site: `weight * computed + (1 - weight) * stored`.

        Args:
            stored: the stored value of every site.
            weights: `[1 or B, 1 or S]` in 0..1, by site; a site without one is computed (weight 1).
            args: the model's positional inputs.
            kwargs: its keyword inputs.

        Returns:
            Output and streams have gradients where weights do; `stored` has none.

        Raises:
            CallError: a site that is not mixed here, a weight that does not fit the stream, or another call than the
                captured one.
        """
        rows = self._rows(weights)
        tensors = [t for name in self.sites for t in (stored[name].detach(), rows[name].to(stored[name].dtype))]
        first = rows[self.sites[0]]
        sizes = (first.shape[0], first.shape[1])
        if sizes not in self._mixed:
            self._mixed[sizes] = self._build(self._mixture(sizes))
        outputs = list(self._mixed[sizes](*self.info.captured.flatten(args, kwargs), *tensors))
        return self._values(outputs)

    def _rows(self, weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """A weight for every site, all of one shape."""
        for name, weight in weights.items():
            if name not in self.sites:
                raise CallError(f"there is a weight for site '{name}', which is not mixed: add it to the sites")
            allowed = ({1, self.info.batch}, {1, self.info.num_tokens})
            if weight.dim() != 2 or any(size not in known for size, known in zip(weight.shape, allowed, strict=True)):
                raise CallError(
                    f"the weight of site '{name}' has shape {list(weight.shape)}, expected [1 or {self.info.batch}, "
                    f"1 or {self.info.num_tokens}]: samples and tokens"
                )
        device = self.info.captured.inputs[0].device
        rows = {name: weights[name] if name in weights else torch.ones(1, 1, device=device) for name in self.sites}
        sizes = [max(weight.shape[dim] for weight in rows.values()) for dim in range(2)]
        others = [name for name in self.sites if "@" in name]
        if sizes[1] > 1 and others:
            raise CallError(
                f"site '{others[0]}' is on another stream, with tokens of its own: leave it out, or give each site one "
                "weight per sample"
            )
        return {name: weight.expand(sizes) for name, weight in rows.items()}

    def _values(self, outputs: list[Tensor]) -> Values:
        """Take the flat outputs apart: the model's, the stored values, the streams."""
        count = len(outputs) - len(self.sites) - len(self.streams)
        stored, streams = outputs[count : count + len(self.sites)], outputs[count + len(self.sites) :]
        return Values(
            self.info.captured.unflatten(outputs[:count]),
            {name: tensor.detach() for name, tensor in zip(self.sites, stored, strict=True)},
            dict(zip(self.streams, streams, strict=True)),
        )

    def _named(self, names: Sequence[str]) -> tuple[Site, ...]:
        return tuple(self.info.sites[name] for name in names)

    def _mixture(self, weight: tuple[int, int]) -> Superpose:
        return Superpose(self._named(self.sites), self._named(self.streams), weight)

    def _build(self, superpose: Superpose) -> Any:
        graph = fx.Graph()
        graph.output(graph.graph_copy(self._frozen.graph, {}))
        gm = fx.GraphModule(self._frozen, graph)
        run_passes(gm, [superpose], label="student")
        return _compiled(gm) if self._fast else gm


def _compiled(gm: fx.GraphModule) -> Callable[..., Any]:
    """The graph by Inductor, with a backward of its own, where the weights want gradients."""
    compiled = torch.compile(gm, fullgraph=True, dynamic=False)

    def run(*tensors: Tensor) -> Any:
        with warnings.catch_warnings():  # Dynamo looks at the gradients of all inputs, computed weights too
            warnings.filterwarnings("ignore", message=r"The \.grad attribute of a Tensor")
            return compiled(*tensors)

    return run


def _frozen(gm: fx.GraphModule) -> fx.GraphModule:
    """The same graph on the same weights, as buffers: autograd does not see them."""
    root, graph = nn.Module(), fx.Graph()
    for node in gm.graph.nodes:
        if node.op == "get_attr":
            root.register_buffer(str(node.target), getattr(gm, str(node.target)).detach())
    graph.output(graph.graph_copy(gm.graph, {}))
    return fx.GraphModule(root, graph)
