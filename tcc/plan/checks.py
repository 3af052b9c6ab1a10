"""Check a plan against the model it is to run on."""

from __future__ import annotations

import difflib

from tcc.errors import PlanError
from tcc.passes.sites import Analysis, Site
from tcc.plan.actions import Action, Compute, Reuse, Update
from tcc.plan.check_scores import check_scores
from tcc.plan.facts import ModelKey
from tcc.plan.plan import CachePlan
from tcc.plan.site_name import SiteName

__all__ = ["check_model", "check_sites"]


def check_model(plan: CachePlan, key: ModelKey) -> None:
    """Check that `plan` was made for the model, the shapes and the graph that `key` describes.

    Raises:
        PlanError: names what differs. A plan written by hand (`plan.model is None`) belongs to any model.
    """
    if plan.model is None:
        return
    theirs, ours = dict(plan.model.inputs), dict(key.inputs)
    if list(theirs) != list(ours):
        raise PlanError(
            f"the plan is for another model: it takes inputs {', '.join(theirs)}, this one takes {', '.join(ours)}. "
            "Make the plan from tcc.inspect of this model"
        )
    for name, sizes in theirs.items():
        if sizes != ours[name]:
            raise PlanError(
                f"the plan is for another {_which(sizes, ours[name])}: input '{name}' has shape {list(sizes)} in the "
                f"plan and {list(ours[name])} here. Make the plan with inputs of the size you run"
            )
    if plan.model.graph_hash != key.graph_hash:
        raise PlanError(
            f"the plan is for another model: its graph hash is {plan.model.graph_hash[:12]}, this model's is "
            f"{key.graph_hash[:12]}. Make the plan from tcc.inspect of this model"
        )


def _which(theirs: tuple[int, ...], ours: tuple[int, ...]) -> str:
    if len(theirs) == len(ours) and theirs[1:] == ours[1:]:
        return "batch size"
    return "resolution" if len(theirs) == len(ours) == 4 and theirs[:2] == ours[:2] else "input shape"


def check_sites(plan: CachePlan, analysis: Analysis) -> None:
    """Check every site, token set and action of `plan` against the analysed graph.

    Raises:
        PlanError: names the step, the site and the remedy.
    """
    for site in plan.sites:
        if site not in analysis.sites:
            raise PlanError(_unknown(site, analysis))
    for name, kept in plan.tokens.items():
        if int(kept[-1]) >= analysis.num_tokens:
            raise PlanError(
                f"token set '{name}': position {int(kept[-1])} is out of range, the stream has "
                f"{analysis.num_tokens} tokens (0..{analysis.num_tokens - 1})"
            )
    _check_overlaps([analysis.sites[s] for s in plan.sites])
    check_scores(plan, analysis)
    for step in range(plan.num_steps):
        actions = plan.at(step)
        for name, action in actions.items():
            if isinstance(action, Update):
                _check_update(f"step {step}, site '{name}'", analysis, analysis.sites[name], actions)
        _check_shared_keys(f"step {step}", analysis, actions)


def _unknown(site: str, analysis: Analysis) -> str:
    name = SiteName.parse(site)
    if name.stream not in analysis.streams:
        others = ", ".join(f"'{stream}'" for stream in analysis.streams if stream) or "no other streams"
        return f"site '{site}': the model has no stream '{name.stream}'; beside the main one it has {others}"
    blocks = (*analysis.blocks, *analysis.side_blocks)
    if not any(f"{name.owner}.".startswith(f"{block}.") for block in (*blocks, "out")):
        near = difflib.get_close_matches(name.owner, blocks, n=1)
        hint = f"did you mean '{near[0]}'?" if near else f"blocks are {analysis.blocks[0]} .. {analysis.blocks[-1]}"
        return f"site '{site}': the model has no such block; {hint}"
    near = difflib.get_close_matches(site, analysis.sites, n=3, cutoff=0.0)
    return f"site '{site}': the model has no such site; near ones: {', '.join(near)} (tcc inspect lists them all)"


def _check_overlaps(sites: list[Site]) -> None:
    for i, a in enumerate(sites):
        for b in sites[i + 1 :]:
            if a.overlaps(b):
                raise PlanError(
                    f"sites '{a.name}' and '{b.name}' keep parts of the same branch: name only one of them in a plan"
                )


def _check_update(where: str, analysis: Analysis, site: Site, actions: dict[str, Action]) -> None:
    action = actions[site.name]
    assert isinstance(action, Update)
    if not site.prunable:
        raise PlanError(f"{where}: its tokens cannot be pruned: {site.reason}. Use compute or reuse here")
    if site.kind == "kv":
        return
    kept_keys = [s for s in analysis.sites.values() if s.kind == "kv" and s.attention[0] in site.attention]
    if action.attention == "cached" and len(kept_keys) < len(site.attention):
        raise PlanError(
            f"{where}: attention 'cached' needs a site for all keys; the branch has {len(site.attention)} attention "
            f"products with {len(kept_keys)} such site(s): use 'kept' or 'current'"
        )
    for keys in kept_keys:
        theirs = actions.get(keys.name)
        if action.attention == "kept" and not isinstance(theirs, Compute | None):
            raise PlanError(f"{where}: attention 'kept' does not read '{keys.name}', which is {theirs}: use 'cached'")
        if action.attention == "cached" and not _same_rows(theirs, action):
            raise PlanError(
                f"{where}: attention 'cached' reads '{keys.name}': the plan must update it with the same tokens at "
                f"this step, and has {theirs or 'no such row'}"
            )


def _check_shared_keys(where: str, analysis: Analysis, actions: dict[str, Action]) -> None:
    """Sites that share an attention see the same keys in it."""
    first: dict[str, str] = {}
    for name, action in actions.items():
        if not isinstance(action, Update) or action.attention != "kept" or analysis.sites[name].kind == "kv":
            continue
        for node in analysis.sites[name].attention:
            other = first.setdefault(node, name)
            theirs = actions[other]
            if isinstance(theirs, Update) and theirs.tokens != action.tokens:
                raise PlanError(
                    f"{where}: sites '{other}' and '{name}' share an attention, which sees the kept tokens alone, and "
                    f"keep different ones, {theirs.tokens} and {action.tokens}: give both the same token set"
                )


def _same_rows(keys: Action | None, action: Update) -> bool:
    return isinstance(keys, Update) and keys.tokens == action.tokens


def forecast_depth(plan: CachePlan, site: str) -> int:
    """How many computed values the plan needs of `site`."""
    return 1 + max((a.order for _, a in plan.column(site) if isinstance(a, Reuse)), default=0)
