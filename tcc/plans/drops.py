"""Dropping branches instead of reusing them: the controls that show what the cache is worth."""

from __future__ import annotations

import os

import numpy as np

from tcc.info import ModelInfo
from tcc.learned import Router
from tcc.plan import CachePlan, Skip
from tcc.plans.branches import branch_plan, branch_sites, p_steps
from tcc.plans.checks import check_seed, check_share
from tcc.plans.l2c import find_router, name_of, scored_below
from tcc.plans.options import plain_options

__all__ = ["learning_to_drop", "random_drop"]


@plain_options
def random_drop(info: ModelInfo, *, num_steps: int, share: float = 0.1, interval: int = 2, seed: int = 0) -> CachePlan:
    """Drop random branches of the P-steps: nothing is added to the stream there.

    A control of Learning-to-Cache (Ma et al., NeurIPS 2024, arXiv 2406.01733, Tables 5 and 7).

    Args:
        info: the model.
        num_steps: denoising steps.
        share: the share of all branches of all P-steps that is dropped, 0..1, rounded to whole branches.
        interval: every `interval`-th step from the first on computes everything; the others are P-steps.
        seed: of the draw.

    Raises:
        PlanError: an option is out of range.
    """
    check_share("share", share)
    check_seed(seed)
    names = branch_sites(info, "delta")
    units = [(step, name) for step in p_steps(num_steps, interval) for name in names]
    drawn = np.random.default_rng(seed).permutation(len(units))[: round(share * len(units))]
    policy = {"name": "random_drop", "share": share, "interval": interval, "seed": seed}
    return branch_plan(info, num_steps, names, {units[i] for i in drawn}, policy, Skip())


@plain_options
def learning_to_drop(
    info: ModelInfo,
    *,
    num_steps: int,
    router: Router | str | os.PathLike[str],
    theta: float = 0.1,
    shifted: bool = False,
) -> CachePlan:
    """Learning-to-Cache's training with the reused branch replaced by nothing.

    A control of Learning-to-Cache (Ma et al., NeurIPS 2024, arXiv 2406.01733, Tables 5 and 7). Where the router's score
    is at most `theta`, nothing is added to the stream.

    Args:
        info: the model.
        num_steps: denoising steps.
        router: a router trained for dropping (`tcc train router --drop`), or its file, as for `l2c`.
        theta: the threshold, 0..1.
        shifted: as for `l2c`.

    Raises:
        PlanError: the router has another number of steps or sites that the model lacks, or an option is out of range.
    """
    found = find_router(info, num_steps, router, shifted, "delta")
    policy = {"name": "learning_to_drop", "router": name_of(router), "theta": theta, "shifted": shifted}
    return branch_plan(info, num_steps, found.sites, scored_below(found, theta), policy, Skip())
