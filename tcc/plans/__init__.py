"""Policies: functions `(info, *, num_steps, ...) -> CachePlan`, one per method, one file per family.

Each docstring names the method and its source. `info` is what `tcc.inspect` returns.
"""

from tcc.plans.branches import i_steps_of_pairs
from tcc.plans.fora import fora
from tcc.plans.holds import deepcache, delta_dit, faster_diffusion
from tcc.plans.l2c import l2c
from tcc.plans.placement import percentile_steps, tprr_steps
from tcc.plans.routers import read_published_router
from tcc.plans.taylorseer import taylorseer
from tcc.plans.tokens import choose_tokens
from tcc.plans.tprr import tprr
from tcc.plans.uncached import full

__all__ = [
    "POLICIES",
    "choose_tokens",
    "deepcache",
    "delta_dit",
    "faster_diffusion",
    "fora",
    "full",
    "i_steps_of_pairs",
    "l2c",
    "percentile_steps",
    "read_published_router",
    "taylorseer",
    "tprr",
    "tprr_steps",
]

#: Every policy by name: what `tcc plan --policy` takes.
POLICIES = {
    policy.__name__: policy
    for policy in (
        full,
        fora,
        tprr,
        taylorseer,
        delta_dit,
        deepcache,
        faster_diffusion,
        l2c,
    )
}
