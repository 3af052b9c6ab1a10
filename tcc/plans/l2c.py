"""Learning-to-Cache: a trained router says which branches a P-step reuses."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from tcc.errors import PlanError
from tcc.info import ModelInfo
from tcc.learned import Router, load_learned
from tcc.plan import CachePlan
from tcc.plan.site_name import SiteName
from tcc.plans.branches import Kept, branch_plan
from tcc.plans.checks import check_number, check_whole
from tcc.plans.options import plain_options
from tcc.plans.routers import read_published_router

__all__ = ["find_router", "l2c", "name_of", "scored_below"]


@plain_options
def l2c(
    info: ModelInfo,
    *,
    num_steps: int,
    router: Router | str | os.PathLike[str],
    theta: float = 0.1,
    shifted: bool = False,
    sites: Kept | None = None,
) -> CachePlan:
    """Learning-to-Cache (Ma et al., NeurIPS 2024, arXiv 2406.01733, section 3.3 and Algorithm 2).

    At the steps for which the router has scores, a branch is computed where its score is above `theta` and reused where
    it is not; its gate is recomputed. All other steps compute everything. The text of the paper states the threshold
    and the coefficient of the stream (alpha = 0) the other way round; this follows its loss, its code and its
    checkpoints.

    The published DDIM-50 router of DiT-XL/2 gives the paper's numbers: 47.43 % of the P-steps' units, 4.36 T MACs. For
    U-ViT-H/2 the shares and units are the published ones (63.79 %), and leave 1.88 T MACs, where Table 2 states 1.92 T.
    The paper counts no products of attention: with them, as `plan.macs` counts, it is 4.52 T and 1.94 T.

    Args:
        info: the model.
        num_steps: denoising steps; for a solver that evaluates the model twice per step, evaluations.
        router: a trained router, or its file: one that `tcc train router` wrote, or a published one (`.pt`, `.pth`; see
            `read_published_router`).
        theta: the threshold, 0..1; the paper takes 0.1 for DiT with 256 tokens, 0.9 for U-ViT.
        shifted: a published file was trained on DPM-Solver-2's schedule (see `i_steps_of_pairs`). A router of our own
            knows its schedule.
        sites: keep branch outputs before the gate (`out`, the paper) or after it (`delta`); if None, what the router
            was trained with.

    Raises:
        PlanError: the router has another number of steps or sites that the model lacks, or an option is out of range.
    """
    found = find_router(info, num_steps, router, shifted, sites)
    policy = {"name": "l2c", "router": name_of(router), "theta": theta, "shifted": shifted, "sites": sites}
    return branch_plan(info, num_steps, found.sites, scored_below(found, theta), policy)


def name_of(router: Router | str | os.PathLike[str]) -> str:
    """What a plan records of the router it was made from: the name of its file."""
    return "given" if isinstance(router, Router) else Path(router).name


def scored_below(router: Router, theta: float) -> set[tuple[int, str]]:
    """Where the router does not ask for computation: (step, site) with a score of at most `theta`.

    Raises:
        PlanError: `theta` is outside 0..1.
    """
    check_number("theta", theta, 0, 1, "a threshold for scores")
    return {(int(step), router.sites[unit]) for step, unit in (router.scores <= theta).nonzero().tolist()}


def find_router(
    info: ModelInfo, num_steps: int, router: Router | str | os.PathLike[str], shifted: bool, sites: Kept | None
) -> Router:
    """The router as an object, with steps and sites that fit.

    Raises:
        PlanError: it does not fit the model, the number of steps or the options.
    """
    check_whole("num_steps", num_steps, 1)
    if not isinstance(router, (Router, str, os.PathLike)):
        raise PlanError(f"router={router!r:.40}: give a Router, or its file (`tcc train router --learned` writes one)")
    if not isinstance(router, Router) and Path(router).suffix in (".pt", ".pth"):
        found: Any = read_published_router(router, info, num_steps=num_steps, shifted=shifted)
    elif shifted:
        raise PlanError("shifted=True is for published files (.pt, .pth): this router knows its own P-steps")
    else:
        found = router if isinstance(router, Router) else load_learned(router)
    if not isinstance(found, Router):
        raise PlanError(f"{router} holds the importance of tokens (TokenCache), not a router: use tokencache")
    if found.scores.shape[0] != num_steps:
        raise PlanError(f"the router was trained for {found.scores.shape[0]} steps, and num_steps={num_steps}")
    if sites not in (None, "out", "delta"):
        raise PlanError(f"sites={sites!r}: use 'out' (before the gate) or 'delta' (after it)")
    names = tuple(SiteName.parse(name).but(sites) if sites else name for name in found.sites)
    for name in names:
        if name not in info.sites:
            asked = f", with sites={sites!r}" if sites else ""
            raise PlanError(f"the router is for other sites{asked}, or another model: this one has no site '{name}'")
    return Router(found.scores, names)
