"""The oracle: plan semantics on the captured graph, slowly and obviously.

Every value is computed for all tokens; masks then decide which of it counts. Nothing is gathered, no pass runs, and no
code is shared with the compiler beyond the captured graph and the names of its sites.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import fx, nn

from tcc.errors import PlanError
from tcc.info import ModelInfo, inspect
from tcc.passes.sites import Analysis, Site
from tcc.passes.tokens import Axis
from tcc.plan import Action, CachePlan, Compute, Hold, Reuse, Skip, TopK, Update
from tcc.plan.checks import check_model, check_sites
from tcc.plan.scores import Attended, Entropy, Fixed, Mapped, Norm, Probe, Score, Stale, Term, kv_of

__all__ = ["Reference"]

ATTENTION = torch.ops.aten.scaled_dot_product_attention.default
SOFTMAX = (torch.ops.aten.softmax.int, torch.ops.aten._softmax.default)


class Reference:
    """Runs a plan by its definition; called like the compiled model, once per step.

    Args:
        model: the model.
        plan: the plan, or the policy that makes it.
        info: what `tcc.inspect` returned for the model, to save capturing it again.

    Raises:
        PlanError: at the first call, where the plan does not fit the model.
    """

    def __init__(
        self, model: nn.Module, plan: CachePlan | Callable[[ModelInfo], CachePlan], info: ModelInfo | None = None
    ) -> None:
        if not isinstance(plan, CachePlan) and not callable(plan):
            raise PlanError(f"plan={plan!r:.60} is neither a plan nor a policy: tcc.Reference(model, plan)")
        self._model = model
        self._request = plan
        self._info = info
        self.reset()

    def reset(self) -> None:
        """Start a new run: the next call is step 0 and nothing is stored."""
        self.step = 0
        self._stored: dict[str, list[torch.Tensor]] = {}
        self._maps: dict[Mapped, torch.Tensor] = {}
        self._ages: dict[str, torch.Tensor] = {}

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Run the next step."""
        if self._info is None:
            self._info = inspect(self._model, *args, **kwargs)
        if self.step == 0:
            self.reset()
            self._plan = self._request if isinstance(self._request, CachePlan) else self._request(self._info)
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
        self._chosen: dict[TopK, torch.Tensor] = {}
        self._before = {slot: list(values) for slot, values in self._stored.items()}
        maps: dict[Mapped, torch.Tensor] = {}
        rest = iter(inputs)
        for node in gm.graph.nodes:
            args, kwargs = self._arguments(node, actions, env)
            if node.op == "placeholder":
                env[node.name] = next(rest)
            elif node.op == "get_attr":
                env[node.name] = getattr(gm, node.target)
            elif node.op == "output":
                self._grow_older(env)
                self._maps |= maps
                return list(args[0])
            elif node.target in SOFTMAX:
                env[node.name] = node.target(self._compete(node, actions, args[0], env), *args[1:], **kwargs)
                maps |= self._columns(node, env[node.name])
            elif node.target is ATTENTION:
                maps |= self._attended(node.name, args, kwargs)
                env[node.name] = self._attend(node.name, actions, args, kwargs, env)
            else:
                env[node.name] = node.target(*args, **kwargs)
            for site, action in actions.items():
                self._act(site, action, node.name, env)
        raise AssertionError("a graph ends with its output")

    def _arguments(self, node: fx.Node, actions: dict[Site, Action], env: dict[str, Any]) -> Any:
        """What `node` is called with: the values so far, with long skips that enter here as the plan says."""
        skips: dict[str, Any] = {}
        for site, action in actions.items():
            if node.name in site.readers:
                skips[site.values[0]] = self._value(site, site.name, action, env[site.values[0]], env)
        return fx.map_arg((node.args, node.kwargs), lambda n: skips[n.name] if n.name in skips else env[n.name])

    def _act(self, site: Site, action: Action, name: str, env: dict[str, Any]) -> None:
        """Apply the action where `name` has just completed the site."""
        if site.kind == "block":
            if name == site.stream_out:
                delta = self._value(site, site.name, action, sum(env[v] for v in site.values), env)
                if not isinstance(action, Compute):
                    env[name] = env[site.stream_in] + delta
        elif name in site.values and not site.readers:
            slot = site.slots[site.values.index(name)]
            env[name] = self._value(site, slot, action, env[name], env)

    def _value(
        self, site: Site, slot: str, action: Action, computed: torch.Tensor, env: dict[str, Any]
    ) -> torch.Tensor:
        """The site's value under `action`, by the definitions of DESIGN section 3; updates what is stored."""
        stored = self._stored.setdefault(slot, [])
        if isinstance(action, Compute):
            stored.insert(0, self._as_kept(computed))
            return computed
        if isinstance(action, Update):
            kept = _spread(self._kept(action, env), computed, site.axis, site.batch)
            value = torch.where(kept, computed, stored[0])
            if action.store:
                stored[0] = self._as_kept(value)
            return value
        if isinstance(action, Skip):
            return torch.zeros_like(computed)
        if isinstance(action, Reuse) and action.order:
            return sum((c * v for c, v in zip(action.coefficients, stored, strict=False)), torch.zeros_like(computed))
        assert isinstance(action, (Reuse, Hold))
        return stored[0]

    def _as_kept(self, computed: torch.Tensor) -> torch.Tensor:
        """A copy with what the plan's slots keep of it."""
        dtype = self._plan.slot_dtype
        if dtype is None or not computed.is_floating_point() or dtype.itemsize >= computed.dtype.itemsize:
            return computed.clone()
        most = torch.finfo(dtype).max
        return computed.clamp(-most, most).to(dtype).to(computed.dtype)

    def _attend(
        self, name: str, actions: dict[Site, Action], args: Any, kwargs: Any, env: dict[str, Any]
    ) -> torch.Tensor:
        """Attention, with the keys of dropped tokens masked out where the plan says `kept`."""
        for site, action in _with_kept_keys(name, actions):
            key = args[1]
            place = site.attention.index(name)
            kept = self._kept(action, env)
            visible = _spread(kept, key, site.key_axes[place], site.key_batch[place]).transpose(-2, -1)
            bias = torch.zeros(visible.shape, dtype=key.dtype, device=key.device)
            bias = bias.masked_fill(~visible, -torch.inf)
            given = args[3] if len(args) > 3 else kwargs.get("attn_mask")
            if given is not None:
                bias = bias + _bias(given, key)
            args = (*args[:3], bias, *args[4:])
            kwargs = {k: v for k, v in kwargs.items() if k != "attn_mask"}
        out: torch.Tensor = ATTENTION(*args, **kwargs)
        return out

    def _compete(
        self, softmax: fx.Node, actions: dict[Site, Action], logits: torch.Tensor, env: dict[str, Any]
    ) -> torch.Tensor:
        """What attention written out compares, with the columns of dropped tokens masked out likewise."""
        for site, action in _with_kept_keys(softmax.name, actions):
            place = site.attention.index(softmax.name)
            keys = site.key_axes[place].at(_softmax_dim(softmax, logits))
            visible = _spread(self._kept(action, env), logits, keys, site.key_batch[place])
            logits = logits.masked_fill(~visible, -torch.inf)
        return logits

    @property
    def _analysis(self) -> Analysis:
        assert self._info is not None
        return self._info.analysis

    def _kept(self, action: Update, env: dict[str, Any]) -> torch.Tensor:
        """True at the kept tokens: `[S]`, or `[B, S]` where every sample has its own."""
        tokens = action.tokens
        if isinstance(tokens, TopK):
            if tokens not in self._chosen:
                self._chosen[tokens] = self._choose(tokens, env)
            return self._chosen[tokens]
        kept = torch.zeros(self._analysis.num_tokens, dtype=torch.bool)
        kept[self._plan.tokens[tokens]] = True
        return kept

    def _choose(self, tokens: TopK, env: dict[str, Any]) -> torch.Tensor:
        """The `count` tokens with the highest score, the first ones among equals: `[B, S]`, or `[S]` if shared."""
        score = self._plan.score_of(tokens)
        scores = self._scores(score, env)
        scores = scores.mean(0, keepdim=True) if score.shared else scores
        groups, count = [torch.arange(scores.shape[1])], tokens.count
        kept = torch.zeros(scores.shape, dtype=torch.bool)
        if score.per_cell:
            groups = self._cells(score)
            kept[:] = True  # what is no image token
            kept[:, torch.cat(groups)] = False
            count -= int(kept[0].sum())
        for row in range(scores.shape[0]):
            for group in groups:
                order = scores[row, group].cpu().argsort(descending=True, stable=True)
                kept[row, group[order[: count // len(groups)]]] = True
        return kept[0] if score.shared else kept

    def _scores(self, score: Score, env: dict[str, Any]) -> torch.Tensor:
        """The score of every token, `[B, S]` float32."""
        total = torch.zeros(self._analysis.batch, self._analysis.num_tokens)
        for weight, term in score.terms:
            total = total + weight * self._term(term, env).cpu()
        if score.bonus:
            for row in range(total.shape[0]):
                for cell in self._cells(score):
                    total[row, cell[total[row, cell].argmax()]] *= 1 + score.bonus
        return total

    def _term(self, term: Term, env: dict[str, Any]) -> torch.Tensor:
        if isinstance(term, Fixed):
            return self._plan.tables[term.table].float()
        if isinstance(term, Stale):
            return self._ages[term.site]
        if isinstance(term, Attended):
            return F.normalize(self._maps[term], dim=1, eps=1e-12)
        if isinstance(term, Entropy):
            return F.normalize(1 + self._maps[term], dim=1, eps=1e-12)
        x = self._read(self._analysis.sites[term.site], env)
        if isinstance(term, Norm):
            return F.normalize(x.norm(dim=2), dim=1, eps=1e-12)
        assert isinstance(term, Probe)
        hidden, offset, weight, bias = (
            self._plan.tables[name].float().to(x.device) for name in (term.hidden, term.offset, term.weight, term.bias)
        )
        return F.gelu(F.layer_norm(x, x.shape[-1:]) @ hidden + offset) @ weight + bias

    def _read(self, site: Site, env: dict[str, Any]) -> torch.Tensor:
        """What a score reads of a site, `[B, S, channels]` float32."""
        if isinstance(self._plan.action(self.step, site.name), (Update, Reuse, Hold)):
            x = self._before[site.slots[-1]][0]
        else:
            x = sum(env[v] for v in site.values) if site.kind == "block" else env[site.values[-1]]
        return _apart(x.float(), site.axis, site.batch)

    def _cells(self, score: Score) -> list[torch.Tensor]:
        """The token positions of every grid cell."""
        if not score.cell:
            return []
        places = torch.arange(*self._analysis.image_tokens).view(-1, *self._analysis.grid[-2:])
        return [
            cell.flatten()
            for frame in places
            for rows in frame.split(score.cell)
            for cell in rows.split(score.cell, dim=1)
        ]

    def _attended(self, name: str, args: Any, kwargs: Any) -> dict[Mapped, torch.Tensor]:
        """What the scores ask of the map of attention `name`: how much each token is attended to, or how widely."""
        found: dict[Mapped, torch.Tensor] = {}
        for term in {t for s in self._plan.scores.values() for _, t in s.terms if isinstance(t, Mapped)}:
            if not self._plan.computes(self.step, term.branch):
                continue
            if isinstance(term, Attended):
                site = self._analysis.sites[kv_of(term.branch)]
                if name == site.attention[0]:
                    sums = _softmax(args, kwargs).sum(-2, keepdim=True)
                    found[term] = _apart(sums, site.axis.at(sums.dim() - 1), site.batch).mean(2)
            elif name in self._analysis.cross[term.branch].attention:
                cross, rows = self._analysis.cross[term.branch], _softmax(args, kwargs)
                columns = [_apart(column, cross.axis, cross.batch).mean(2) for column in torch.split(rows, 1, -1)]
                shares = torch.stack(columns, dim=2)  # [B, S, others]
                if term.halves:
                    shares = torch.stack(shares.chunk(2)).mean(0).repeat(2, 1, 1)
                found[term] = -(shares * (shares + 1e-7).log()).sum(2)
        return found

    def _columns(self, softmax: fx.Node, weights: torch.Tensor) -> dict[Mapped, torch.Tensor]:
        """The same of `Attended`, where attention is written out and its weights are at hand."""
        found: dict[Mapped, torch.Tensor] = {}
        for term in {t for s in self._plan.scores.values() for _, t in s.terms if isinstance(t, Attended)}:
            site = self._analysis.sites[kv_of(term.branch)]
            if softmax.name == site.attention[0] and self._plan.computes(self.step, term.branch):
                dim = _softmax_dim(softmax, weights)
                columns = _apart(weights.float(), site.axis.at(dim), site.batch)
                found[term] = columns.sum(2) * weights.shape[dim] / columns.shape[2]  # as many queries as keys
        return found

    def _grow_older(self, env: dict[str, Any]) -> None:
        """The age of every token at the sites that scores ask for, after this step."""
        for name in {t.site for s in self._plan.scores.values() for _, t in s.terms if isinstance(t, Stale)}:
            action = self._plan.action(self.step, name)
            older = self._ages.get(name, torch.zeros(self._analysis.batch, self._analysis.num_tokens)) + 1
            if isinstance(action, Compute):
                older = torch.zeros_like(older)
            elif isinstance(action, Update) and action.store:
                older = older.masked_fill(self._kept(action, env), 0)
            self._ages[name] = older


def _with_kept_keys(name: str, actions: dict[Site, Action]) -> list[tuple[Site, Update]]:
    """The updates whose queries see the kept tokens alone in the attention that `name` stands for."""
    return [
        (site, action)
        for site, action in actions.items()
        if isinstance(action, Update) and action.attention == "kept" and name in site.attention and site.kind != "kv"
    ]


def _softmax_dim(softmax: fx.Node, like: torch.Tensor) -> int:
    dim = softmax.args[1]
    assert isinstance(dim, int)
    return dim % like.dim()


def _softmax(args: Any, kwargs: Any) -> torch.Tensor:
    """The softmax map of an attention, `[..., queries, keys]`."""
    query, key = args[0].float(), args[1].float()
    if query.dim() > 3:  # several query heads may share one key head
        key = key.repeat_interleave(query.shape[-3] // key.shape[-3], dim=-3)
    logits = query @ key.transpose(-2, -1) * (kwargs.get("scale") or query.shape[-1] ** -0.5)
    given = args[3] if len(args) > 3 else kwargs.get("attn_mask")
    logits = logits if given is None else logits + _bias(given, logits)
    if args[5] if len(args) > 5 else kwargs.get("is_causal"):
        logits = logits.masked_fill(torch.ones_like(logits).tril() == 0, float("-inf"))
    weights: torch.Tensor = logits.softmax(-1)
    return weights


def _spread(kept: torch.Tensor, like: torch.Tensor, axis: Axis, batch: Axis | None) -> torch.Tensor:
    """`kept`, `[S]` or `[B, S]`, shaped to broadcast along `axis`, and the samples' dimension, of `like`.

    Rows of others that are joined to the tokens are kept.
    """
    kept, dim = F.pad(kept, (axis.before, axis.after), value=True), axis.dim
    sizes = [1] * like.dim()
    sizes[dim] = kept.shape[-1]
    if kept.dim() == 2 and batch is not None:
        kept = kept.repeat(batch.outer, 1).repeat_interleave(batch.inner, dim=0)
        sizes[batch.dim] = kept.shape[0]
        kept = kept if batch.dim < dim else kept.T
    return kept.reshape(sizes).to(like.device)


def _apart(x: torch.Tensor, axis: Axis, batch: Axis | None) -> torch.Tensor:
    """`x` as `[B, S, everything else]`, without the rows of others that are joined to the tokens."""
    x = x.movedim(axis.dim, -1)
    x = x[..., axis.before : x.shape[-1] - axis.after]
    if batch is None:
        return x.reshape(1, -1, x.shape[-1]).transpose(1, 2)
    x = x.movedim(batch.dim - (batch.dim > axis.dim), 0)
    x = x.reshape(batch.outer, -1, batch.inner, *x.shape[1:]).movedim(1, 0)
    return x.reshape(x.shape[0], -1, x.shape[-1]).transpose(1, 2)


def _bias(mask: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
    """An attention mask as numbers to add."""
    if mask.dtype != torch.bool:
        return mask
    return torch.zeros(mask.shape, dtype=like.dtype, device=like.device).masked_fill(~mask, -torch.inf)
