"""Policies: functions `(info, *, num_steps, ...) -> CachePlan`, one per method, one file per family.

Each docstring names the method and its source. `info` is what `tcc.inspect` returns.
"""

from tcc.plans.branches import i_steps_of_pairs
from tcc.plans.drops import learning_to_drop, random_drop
from tcc.plans.fora import fora
from tcc.plans.forecast import forecast
from tcc.plans.heuristics import bottom_up, metric, random_units, time_cut, top_down
from tcc.plans.holds import deepcache, delta_dit, faster_diffusion
from tcc.plans.l2c import l2c
from tcc.plans.placement import first_evaluations, percentile_steps, tprr_steps
from tcc.plans.routers import read_published_router
from tcc.plans.shifted import shifted
from tcc.plans.smoothcache import smoothcache
from tcc.plans.taylorseer import taylorseer
from tcc.plans.toca import duca, toca
from tcc.plans.tokencache import tokencache
from tcc.plans.tokens import choose_tokens
from tcc.plans.tprr import tprr
from tcc.plans.uncached import full

__all__ = [
    "POLICIES",
    "bottom_up",
    "choose_tokens",
    "deepcache",
    "delta_dit",
    "duca",
    "faster_diffusion",
    "first_evaluations",
    "fora",
    "forecast",
    "full",
    "i_steps_of_pairs",
    "l2c",
    "learning_to_drop",
    "metric",
    "percentile_steps",
    "random_drop",
    "random_units",
    "read_published_router",
    "shifted",
    "smoothcache",
    "taylorseer",
    "time_cut",
    "toca",
    "tokencache",
    "top_down",
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
        tokencache,
        taylorseer,
        forecast,
        delta_dit,
        deepcache,
        faster_diffusion,
        toca,
        duca,
        l2c,
        learning_to_drop,
        smoothcache,
        time_cut,
        bottom_up,
        top_down,
        random_units,
        metric,
        random_drop,
    )
}
