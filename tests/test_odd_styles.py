"""What `info` says of an unusual branch is what the compiler does: prunable and equal to the reference, or refused."""

from __future__ import annotations

import pytest
import torch

from tcc.errors import PlanError
from tcc.plan import CachePlan, TopK, Update
from tcc.plan.checks import check_sites
from tcc.plan.scores import Fixed, Score
from tests.odd_styles import ODD
from tests.test_block_styles import KEPT, every_update, run
from tests.tiny_models import noise


@pytest.mark.parametrize("name", ODD)
def test_what_is_said_to_be_prunable_is(name: str) -> None:
    """Every prunable site runs in every mode, with static sets and chosen ones; what is not is refused with the reason.

    A branch that mixes tokens by products is `attn` in every block, whether it is recognised or not.
    """
    odd, which = ODD[name], ODD[name].case()
    sites = which.info.sites
    branches = [f"blocks.{block}.{branch}" for block in (0, 1) for branch in ("attn", "mlp")]
    assert [s.name for s in sites.values() if s.kind == "delta"] == [f"{branch}.delta" for branch in branches]
    for branch in branches:
        site = sites[f"{branch}.delta"]
        expected = odd.reason if (site.name.split(".")[2] == "attn") == odd.attends else ""
        assert expected in site.reason
        assert bool(expected) == (not site.prunable)
        if not site.prunable:
            with pytest.raises(PlanError, match=r"cannot be pruned|not prunable"):
                check_sites(refused_plan(site.name), which.info.analysis)
    macs = run(which, every_update(which.info))
    assert max(macs[1:]) < macs[0]


@pytest.mark.parametrize("name", [name for name, odd in ODD.items() if not odd.reason])
@pytest.mark.parametrize("tokens", ["some", "chosen"])
def test_neighbours_that_are_updated_alike_are_right(name: str, tokens: str) -> None:
    """They share a slot."""
    which = ODD[name].case()
    sites = [site.name for site in which.info.sites.values() if site.kind == "delta" and site.prunable]
    update = Update("some" if tokens == "some" else TopK("fixed", len(KEPT)))
    actions = {(step, site): update for site in sites for step in (1, 2)}
    score = {"fixed": Score(((1.0, Fixed("noise")),))} if tokens == "chosen" else {}
    tables = {"noise": noise(2, which.info.num_tokens, seed=3)} if tokens == "chosen" else {}
    run(which, CachePlan(3, actions, {"some": torch.tensor(KEPT)}, scores=score, tables=tables))


def refused_plan(site: str) -> CachePlan:
    """A plan that updates tokens of one site."""
    return CachePlan(2, {(1, site): Update("some")}, {"some": torch.tensor(KEPT)})
