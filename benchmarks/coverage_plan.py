"""A plan for any model: reuse, hold, and pruned tokens with every kind of attention, each at some step."""

from __future__ import annotations

import torch

import tcc
from tcc.passes.sites import Site
from tcc.plan import Action, Attention, CachePlan, Compute, Hold, Reuse, Update

__all__ = ["STEPS", "actions_of", "mixed_plan"]

#: Step 0 computes all; 1 prunes all that can be; 2 prunes the first half of the blocks and reuses the second;
#: 3 holds the stream in the middle; 4 prunes again, from what all that left in the slots.
STEPS = 5
TOKENS = "every second"
ATTENTION: tuple[Attention, ...] = ("kept", "current", "cached")


def mixed_plan(info: tcc.ModelInfo) -> CachePlan:
    """The plan: one or several sites of every block in every stream, and a hold on the main stream."""
    draft = _Draft(info)
    parts = dict.fromkeys((site.block, site.stream) for site in info.sites.values())
    for block, stream in parts:
        draft.add_block(block, [s for s in info.sites.values() if (s.block, s.stream) == (block, stream)])
    draft.hold()
    return CachePlan(num_steps=STEPS, actions=draft.actions, tokens={TOKENS: torch.arange(0, info.num_tokens, 2)})


def actions_of(plan: CachePlan) -> list[str]:
    """The kinds of action that the plan takes, in words."""
    names = {Update: "pruned", Reuse: "reuse", Hold: "hold"}
    return [word for kind, word in names.items() if any(isinstance(a, kind) for a in plan.actions.values())]


class _Draft:
    def __init__(self, info: tcc.ModelInfo) -> None:
        self.info = info
        self.actions: dict[tuple[int, str], Action] = {}
        self.attention = 0

    def add_block(self, block: int, sites: list[Site]) -> None:
        """The whole block's change for every second block that has such a site, else a site of each branch."""
        whole = [s for s in sites if s.kind == "block"]
        chosen = whole[:1] if block % 2 else []
        for site in chosen or [s for s in sites if s.kind == ("delta" if block % 4 else "out")]:
            self.add(site, [s for s in sites if s.kind == "kv"], late=block >= len(self.info.blocks) / 2)

    def add(self, site: Site, keys: list[Site], *, late: bool) -> None:
        """The column of one site, and of the keys that it reads from the slot."""
        keys = [k for k in keys if set(k.attention) <= set(site.attention)]
        attention = self.next_attention(site, keys)
        keys = keys if attention == "cached" else []
        for column in (site, *keys):
            for step in range(1, STEPS):
                self.actions[step, column.name] = self.action(step, column, attention, late=late)

    def action(self, step: int, site: Site, attention: Attention, *, late: bool) -> Action:
        if step == 3 or (step == 1 and not site.prunable):  # at step 1, nothing but pruning saves work
            return Compute()
        if (late and step == 2) or not site.prunable:
            return Reuse()
        return Update(TOKENS, attention)

    def next_attention(self, site: Site, keys: list[Site]) -> Attention:
        """The three kinds in turn, for sites with attention; cached keys only where every attention has a site."""
        if not site.attention:
            return "kept"
        self.attention += 1
        found = ATTENTION[self.attention % 3]
        complete = {name for key in keys if key.prunable for name in key.attention} == set(site.attention)
        return "current" if found == "cached" and not complete else found

    def hold(self) -> None:
        """Hold the stream that enters the middle block at step 3, and long skips at the step before."""
        streams = [s for s in self.info.sites.values() if s.kind == "stream" and not s.stream]
        self.actions[3, streams[len(streams) // 2].name] = Hold()
        for skip in (s for s in self.info.sites.values() if s.kind == "skip"):
            self.actions[2, skip.name] = Hold()
