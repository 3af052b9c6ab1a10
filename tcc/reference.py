"""The oracle: plan semantics on the captured graph, slowly and obviously.

Every value is computed for all tokens; masks then decide which of it counts. Nothing is gathered, no pass runs, and no
code is shared with the compiler beyond the captured graph and the names of its sites.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import fx, nn

from tcc.checks import check_model, check_sites
from tcc.info import ModelInfo, inspect
from tcc.passes.sites import Site
from tcc.plan import Action, CachePlan, Compute, Hold, Reuse, Skip, Update

__all__ = ["Reference"]

ATTENTION = torch.ops.aten.scaled_dot_product_attention.default


class Reference:
    """Runs a plan by its definition; called like the compiled model, once per step.

    Args:
        model: the model.
        plan: the plan.
        info: what `tcc.inspect` returned for the model, to save capturing it again.

    Raises:
        PlanError: at the first call, where the plan does not fit the model.
    """

    def __init__(self, model: nn.Module, plan: CachePlan, info: ModelInfo | None = None) -> None:
        self._model = model
        self._plan = plan
        self._info = info
        self.reset()

    def reset(self) -> None:
        """Start a new run: the next call is step 0 and nothing is stored."""
        self.step = 0
        self._stored: dict[str, list[torch.Tensor]] = {}

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Run the next step."""
        if self._info is None:
            self._info = inspect(self._model, *args, **kwargs)
        if self.step == 0:
            self.reset()
            check_model(self._plan, self._info.key)
            check_sites(self._plan, self._info.analysis)
        inputs = self._info.captured.flatten(args, kwargs)
        with torch.no_grad():
            outputs = self._run(inputs)
        self.step = (self.step + 1) % self._plan.num_steps
        return self._info.captured.unflatten(outputs)

    def _run(self, inputs: list[torch.Tensor]) -> list[Any]:
        assert self._info is not None
        gm = self._info.captured.gm
        named = self._plan.at(self.step)  # in the graph's order: a block's change is added before the stream is held
        actions = {site: named[name] for name, site in self._info.sites.items() if name in named}
        env: dict[str, Any] = {}
        rest = iter(inputs)
        for node in gm.graph.nodes:
            seen = self._seen(node.name, actions, env)
            args, kwargs = fx.map_arg((node.args, node.kwargs), lambda n, seen=seen: seen[n.name])
            if node.op == "placeholder":
                env[node.name] = next(rest)
            elif node.op == "get_attr":
                env[node.name] = getattr(gm, node.target)
            elif node.op == "output":
                return list(args[0])
            elif node.target is ATTENTION:
                env[node.name] = self._attend(node.name, actions, args, kwargs)
            else:
                env[node.name] = node.target(*args, **kwargs)
            for site, action in actions.items():
                self._act(site, action, node.name, env)
        raise AssertionError("a graph ends with its output")

    def _seen(self, name: str, actions: dict[Site, Action], env: dict[str, Any]) -> dict[str, Any]:
        """What node `name` sees: the values so far, with the long skips that it alone takes in as the plan has them."""
        skips = {s.values[0]: (s, action) for s, action in actions.items() if name in s.readers}
        return (
            {**env, **{v: self._value(s, s.name, action, env[v]) for v, (s, action) in skips.items()}} if skips else env
        )

    def _act(self, site: Site, action: Action, name: str, env: dict[str, Any]) -> None:
        """Apply the action where `name` has just completed the site."""
        if site.kind == "block":
            if name == site.stream_out:
                delta = self._value(site, site.name, action, sum(env[v] for v in site.values))
                if not isinstance(action, Compute):
                    env[name] = env[site.stream_in] + delta
        elif name in site.values and not site.readers:
            slot = site.slots[site.values.index(name)]
            env[name] = self._value(site, slot, action, env[name])

    def _value(self, site: Site, slot: str, action: Action, computed: torch.Tensor) -> torch.Tensor:
        """The site's value under `action`, by the definitions of DESIGN section 3; updates what is stored."""
        stored = self._stored.setdefault(slot, [])
        if isinstance(action, Compute):
            stored.insert(0, computed.clone())
            return computed
        if isinstance(action, Update):
            kept = self._mask(action, site.axis.dim, computed)
            value = torch.where(kept, computed, stored[0])
            if action.store:
                stored[0] = value
            return value
        if isinstance(action, Skip):
            return torch.zeros_like(computed)
        if isinstance(action, Reuse) and action.order:
            return sum((c * v for c, v in zip(action.coefficients, stored, strict=False)), torch.zeros_like(computed))
        assert isinstance(action, (Reuse, Hold))
        return stored[0]

    def _attend(self, name: str, actions: dict[Site, Action], args: Any, kwargs: Any) -> torch.Tensor:
        """Attention, with the keys of dropped tokens masked out where the plan says `kept`."""
        for site, action in actions.items():
            if (
                isinstance(action, Update)
                and action.attention == "kept"
                and name in site.attention
                and site.kind != "kv"
            ):
                key = args[1]
                visible = self._mask(action, key.dim() - 2, key).flatten()
                bias = torch.zeros(1, visible.numel(), dtype=key.dtype, device=key.device)
                bias = bias.masked_fill(~visible, -torch.inf)
                given = args[3] if len(args) > 3 else kwargs.get("attn_mask")
                if given is not None:
                    if given.dtype == torch.bool:
                        given = torch.zeros(given.shape, dtype=key.dtype, device=key.device).masked_fill(
                            ~given, -torch.inf
                        )
                    bias = bias + given
                args = (*args[:3], bias, *args[4:])
                kwargs = {k: v for k, v in kwargs.items() if k != "attn_mask"}
        out: torch.Tensor = ATTENTION(*args, **kwargs)
        return out

    def _mask(self, action: Update, dim: int, like: torch.Tensor) -> torch.Tensor:
        """True at the kept tokens, shaped to broadcast along dimension `dim` of `like`."""
        kept = torch.zeros(like.shape[dim], dtype=torch.bool, device=like.device)
        kept[self._plan.tokens[str(action.tokens)].to(like.device)] = True
        return kept.view([-1 if i == dim else 1 for i in range(like.dim())])
