"""Hand-made rules for which branches a P-step reuses: what a trained router has to beat.

Learning-to-Cache compares its router with the first four (Ma et al., NeurIPS 2024, arXiv 2406.01733, Fig. 4). The last
is what its trained routers look like: a switch in time more than in depth.
"""

from __future__ import annotations

import os

import numpy as np

from tcc.calibrate import Calibration
from tcc.errors import PlanError
from tcc.info import ModelInfo
from tcc.plan import CachePlan
from tcc.plan.site_name import SiteName
from tcc.plans.branches import Kept, branch_plan, branch_sites, p_steps
from tcc.plans.checks import check_seed, check_share
from tcc.plans.options import plain_options

__all__ = ["bottom_up", "metric", "random_units", "time_cut", "top_down"]


@plain_options
def bottom_up(
    info: ModelInfo, *, num_steps: int, share: float = 0.5, interval: int = 2, sites: Kept = "out"
) -> CachePlan:
    """Reuse the first branches of the model at every P-step, compute the others.

    A baseline of Learning-to-Cache (Ma et al., NeurIPS 2024, arXiv 2406.01733, Fig. 4).

    Args:
        info: the model.
        num_steps: denoising steps.
        share: the share of the branches that a P-step reuses, 0..1, rounded to whole branches.
        interval: every `interval`-th step from the first on computes everything; the others are P-steps.
        sites: keep branch outputs before the gate (`out`) or after it (`delta`).

    Raises:
        PlanError: an option is out of range.
    """
    names, count = _counted(info, share, sites)
    cached = {(step, name) for step in p_steps(num_steps, interval) for name in names[:count]}
    policy = {"name": "bottom_up", "share": share, "interval": interval, "sites": sites}
    return branch_plan(info, num_steps, names, cached, policy)


@plain_options
def top_down(
    info: ModelInfo, *, num_steps: int, share: float = 0.5, interval: int = 2, sites: Kept = "out"
) -> CachePlan:
    """Reuse the last branches of the model at every P-step, compute the others.

    A baseline of Learning-to-Cache (Ma et al., NeurIPS 2024, arXiv 2406.01733, Fig. 4).

    Args:
        info: the model.
        num_steps: denoising steps.
        share: the share of the branches that a P-step reuses, 0..1, rounded to whole branches.
        interval: every `interval`-th step from the first on computes everything; the others are P-steps.
        sites: keep branch outputs before the gate (`out`) or after it (`delta`).

    Raises:
        PlanError: an option is out of range.
    """
    names, count = _counted(info, share, sites)
    cached = {(step, name) for step in p_steps(num_steps, interval) for name in names[len(names) - count :]}
    policy = {"name": "top_down", "share": share, "interval": interval, "sites": sites}
    return branch_plan(info, num_steps, names, cached, policy)


@plain_options
def random_units(
    info: ModelInfo, *, num_steps: int, share: float = 0.5, interval: int = 2, seed: int = 0, sites: Kept = "out"
) -> CachePlan:
    """Reuse random branches, as many at every P-step and others at each.

    A baseline of Learning-to-Cache (Ma et al., NeurIPS 2024, arXiv 2406.01733, Fig. 4).

    Args:
        info: the model.
        num_steps: denoising steps.
        share: the share of the branches that a P-step reuses, 0..1, rounded to whole branches.
        interval: every `interval`-th step from the first on computes everything; the others are P-steps.
        seed: of the draws.
        sites: keep branch outputs before the gate (`out`) or after it (`delta`).

    Raises:
        PlanError: an option is out of range.
    """
    check_seed(seed)
    names, count = _counted(info, share, sites)
    cached = {
        (step, names[unit])
        for step in p_steps(num_steps, interval)
        for unit in np.random.default_rng([seed, step]).permutation(len(names))[:count]
    }
    policy = {"name": "random_units", "share": share, "interval": interval, "seed": seed, "sites": sites}
    return branch_plan(info, num_steps, names, cached, policy)


@plain_options
def metric(
    info: ModelInfo,
    *,
    num_steps: int,
    errors: Calibration | str | os.PathLike[str],
    share: float = 0.5,
    interval: int = 2,
) -> CachePlan:
    """Reuse the branches that change least, over all P-steps: those of lowest `|g| * ||f_m - f_s||^2`.

    A baseline of Learning-to-Cache (Ma et al., NeurIPS 2024, arXiv 2406.01733, Fig. 4). f is the branch's output before
    its gate g, m the P-step and s the last step that computed everything. Both factors are measured on the uncached
    model: ||f_m - f_s||^2 as a mean over the batch, |g| as the ratio of the L2 norms after and before the gate. The
    paper does not say how it forms them.

    Args:
        info: the model.
        num_steps: denoising steps.
        errors: measured changes of the `out` and `delta` sites at least `interval - 1` steps back, or their file; see
            `tcc.calibrate.calibrate`.
        share: the share of all branches of all P-steps that is reused, 0..1, rounded to whole branches.
        interval: every `interval`-th step from the first on computes everything; the others are P-steps.

    Raises:
        PlanError: an option is out of range, or the measurement is of another model, fewer steps, or not as far back.
    """
    check_share("share", share)
    steps, outs, errors = p_steps(num_steps, interval), branch_sites(info, "out"), Calibration.of(errors)
    back = min(interval, num_steps) - 1
    out = errors.columns(outs, num_steps, back)
    delta = errors.columns([SiteName.parse(name).but("delta") for name in outs], num_steps, back)
    gate = (errors.square[:, delta] / errors.square[:, out].clamp_min(1e-30)).sqrt()
    ranked = sorted(
        (float(gate[step, unit] * errors.square_change[step % interval - 1, step, column]), step, unit)
        for step in steps
        for unit, column in enumerate(out)
    )
    cached = {(step, outs[unit]) for _, step, unit in ranked[: round(share * len(ranked))]}
    policy = {"name": "metric", "share": share, "interval": interval}
    return branch_plan(info, num_steps, outs, cached, policy)


@plain_options
def time_cut(info: ModelInfo, *, num_steps: int, cut: float = 0.5, interval: int = 2, sites: Kept = "out") -> CachePlan:
    """One cutoff in time: before it P-steps reuse all branches, after it every step computes everything.

    Of no paper, tcc's own: a rule with two parameters that mimics Learning-to-Cache's trained routers, which reuse
    nearly everything in the noisy half of the steps and nearly nothing in the other.

    Args:
        info: the model.
        num_steps: denoising steps.
        cut: the share of the steps before the cutoff, 0..1, rounded to whole steps; 1 is `fora(count="up")`.
        interval: before the cutoff, every `interval`-th step from the first on computes everything.
        sites: keep branch outputs before the gate (`out`) or after it (`delta`).

    Raises:
        PlanError: an option is out of range.
    """
    check_share("cut", cut)
    names = branch_sites(info, sites)
    noisy = [step for step in p_steps(num_steps, interval) if step < round(cut * num_steps)]
    policy = {"name": "time_cut", "cut": cut, "interval": interval, "sites": sites}
    return branch_plan(info, num_steps, names, {(step, name) for step in noisy for name in names}, policy)


def _counted(info: ModelInfo, share: float, sites: Kept) -> tuple[list[str], int]:
    """The branches, and how many of them a share is."""
    check_share("share", share)
    names = branch_sites(info, sites)
    if not names:
        raise PlanError("the model has no branches whose values could be kept (see tcc inspect)")
    return names, round(share * len(names))
