"""Learning-to-Cache: plans from routers, and the import of the published router files."""

from __future__ import annotations

import argparse
import os
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from tcc import plans
from tcc.errors import PlanError
from tcc.learned import Importance, Router, load_learned, save_learned
from tcc.plan import CachePlan, Compute, Reuse
from tests.published import dit_xl2, uvit_h2
from tests.tiny_models import case

PUBLISHED = Path(__file__).parents[2] / "shared" / "data" / "l2c-routers"
OUT = tuple(f"blocks.{b}.{branch}.out" for b in (0, 1) for branch in ("attn", "mlp"))


def router(num_steps: int, value: float | torch.Tensor, shifted: bool = False, sites: Any = OUT) -> Router:
    """A router with one score everywhere, or with the given scores `[P-steps, sites]`."""
    scores = torch.full((num_steps, len(sites)), value if isinstance(value, float) else torch.nan)
    if isinstance(value, torch.Tensor):
        p_steps = sorted(set(range(num_steps)) - set(plans.i_steps_of_pairs(num_steps, shifted)))
        scores[p_steps] = value
    scores[list(plans.i_steps_of_pairs(num_steps, shifted))] = torch.nan
    return Router(scores, sites)


def reused(plan: CachePlan, part: str = "") -> list[tuple[int, str]]:
    """Where the plan reuses a site whose name has `part` in it."""
    return [(step, site) for (step, site), action in plan.actions.items() if action == Reuse() and part in site]


# --- schedules


@pytest.mark.parametrize(
    ("num_steps", "shifted", "schedule"),
    [(6, False, "IPIPIP"), (5, False, "IIPIP"), (1, False, "I"), (6, True, "IIPIPI"), (2, True, "II")],
)
def test_steps_come_in_pairs(num_steps: int, shifted: bool, schedule: str) -> None:
    """Counted down to 0, odd indices are full; shifted, evaluations 3, 5, ... of 1 .. NFE reuse."""
    plan = plans.l2c(case("dit").info, num_steps=num_steps, router=router(num_steps, 0.0, shifted))
    assert str(plan.schedule) == schedule


@pytest.mark.parametrize(("nfe", "count"), [(50, 24), (20, 9)])
def test_shifted_p_steps_are_never_the_second_evaluation(nfe: int, count: int) -> None:
    """NFE / 2 - 1 of them, and evaluations 2i (steps 2i - 1) are full."""
    full = set(plans.i_steps_of_pairs(nfe, shifted=True))
    assert len(set(range(nfe)) - full) == count
    assert full > set(range(1, nfe, 2))


# --- plans


def test_a_router_of_zeros_is_fora_with_interval_2() -> None:
    """Action for action, and in MACs."""
    info = case("dit").info
    plan = plans.l2c(info, num_steps=6, router=router(6, 0.0))
    fora = plans.fora(info, num_steps=6, interval=2, count="up")
    assert (plan.actions, plan.cost) == (fora.actions, fora.cost)


def test_a_router_of_ones_computes_everything() -> None:
    """No step reuses, nothing is stored."""
    plan = plans.l2c(case("dit").info, num_steps=6, router=router(6, 1.0))
    assert (set(plan.actions.values()), plan.bound, plan.slot_bytes) == ({Compute()}, 1.0, 0)


def test_a_site_is_computed_where_its_score_is_above_theta() -> None:
    """Strictly above."""
    scores = torch.tensor([[0.5, 0.25, 0.75, 1.0], [0.0, 0.5, 0.51, 0.49]])
    plan = plans.l2c(case("dit").info, num_steps=4, router=router(4, scores), theta=0.5)
    assert reused(plan) == [(1, OUT[0]), (1, OUT[1]), (3, OUT[0]), (3, OUT[1]), (3, OUT[3])]
    assert plan.policy == {"name": "l2c", "router": "given", "theta": 0.5, "shifted": False, "sites": None}


def test_the_macs_of_a_router_plan() -> None:
    """A P-step saves the MACs of the branches that it reuses; without attention products, their layers alone."""
    info, n, d = case("dit").info, 16, 32
    plan = plans.l2c(info, num_steps=2, router=router(2, torch.tensor([[0.0, 1.0, 1.0, 0.0]])))
    assert plan.cost is not None
    assert info.macs - plan.cost.step_macs[1] == 4 * n * d * d + 2 * n * n * d + 8 * n * d * d
    assert plan.macs - info.layer_macs(plan) == 3 * 2 * n * n * d


def test_a_router_keeps_what_it_was_trained_with() -> None:
    """Unless told otherwise."""
    info = case("dit").info
    after = router(4, 0.0, sites=tuple(name.replace(".out", ".delta") for name in OUT))
    assert plans.l2c(info, num_steps=4, router=after).sites == after.sites
    assert plans.l2c(info, num_steps=4, router=after, sites="out").sites == OUT


def test_cycles_may_be_longer_than_pairs() -> None:
    """The rows that have scores are the P-steps, whatever trained them."""
    scores = torch.zeros(5, 4)
    scores[0] = torch.nan
    assert str(plans.l2c(case("dit").info, num_steps=5, router=Router(scores, OUT)).schedule) == "IPPPP"


def test_any_number_of_branches() -> None:
    """PixArt's blocks have three: self-attention, cross-attention, MLP."""
    info = case("hf_pixart").info
    sites = tuple(name for name, site in info.sites.items() if site.kind == "out")
    assert len(sites) == 3 * len(info.blocks)
    plan = plans.l2c(info, num_steps=4, router=router(4, 0.0, sites=sites))
    assert len(reused(plan)) == 2 * len(sites)


def test_a_router_file(tmp_path: Path) -> None:
    """What training writes."""
    save_learned(router(4, 0.0), tmp_path / "router.safetensors")
    plan = plans.l2c(case("dit").info, num_steps=4, router=tmp_path / "router.safetensors")
    assert len(reused(plan)) == 2 * 4


def zeros(steps: int, sites: tuple[str, ...] = OUT) -> Router:
    """Scores at every step."""
    return Router(torch.zeros(steps, len(sites)), sites)


BAD_ROUTERS: dict[str, tuple[Callable[[], Any], str]] = {
    "steps": (lambda: {"router": router(6, 0.0)}, "the router was trained for 6 steps, and num_steps=4"),
    "model": (
        lambda: {"router": router(4, 0.0, sites=("blocks.7.mlp.out",))},
        "the router is for other sites, or another model: this one has no site 'blocks.7.mlp.out'",
    ),
    "theta": (lambda: {"router": router(4, 0.0), "theta": 1.5}, "theta=1.5: expected a threshold for scores, 0..1"),
    "theta NaN": (
        lambda: {"router": router(4, 0.0), "theta": float("nan")},
        "theta=nan: expected a threshold for scores, 0..1",
    ),
    "sites": (lambda: {"router": router(4, 0.0), "sites": "kv"}, "sites='kv': use 'out'"),
    "shifted": (lambda: {"router": router(4, 0.0), "shifted": True}, "shifted=True is for published files"),
    "first step": (lambda: {"router": zeros(4)}, "step 0, site 'blocks.0.attn.out': reuse reads 1 stored value"),
    "no file": (lambda: {"router": "nowhere.safetensors"}, "there is no file nowhere.safetensors"),
}


@pytest.mark.parametrize("kind", BAD_ROUTERS)
def test_a_router_that_does_not_fit_is_refused(kind: str) -> None:
    """With what is wrong."""
    options, message = BAD_ROUTERS[kind]
    with pytest.raises(PlanError, match=re.escape(message)):
        plans.l2c(case("dit").info, num_steps=4, **options())


def test_token_importance_is_no_router(tmp_path: Path) -> None:
    """The message names the policy that takes it."""
    save_learned(Importance(torch.zeros(4, 2, 16)), tmp_path / "tokens.safetensors")
    with pytest.raises(PlanError, match=r"holds the importance of tokens .* use tokencache"):
        plans.l2c(case("dit").info, num_steps=4, router=tmp_path / "tokens.safetensors")


@pytest.mark.parametrize(
    ("scores", "message"),
    [
        (torch.zeros(3), r"a router has scores \[steps, 4\], got \[3\]"),
        (torch.full((2, 4), 1.5), r"step 0, site 'blocks.0.attn.out': the router's score is 1.5; scores lie in 0..1"),
        (torch.tensor([[0.0, torch.nan, 0.0, 0.0]]), r"step 0, site 'blocks.0.mlp.out': the router's score is nan"),
    ],
)
def test_scores_lie_in_0_to_1(scores: torch.Tensor, message: str) -> None:
    """And a row has all of them or none."""
    with pytest.raises(PlanError, match=message):
        Router(scores, OUT)


def test_a_router_names_a_site_once() -> None:
    """Two scores for one site would contradict each other."""
    with pytest.raises(PlanError, match="names each of its sites once"):
        Router(torch.zeros(1, 2), ("blocks.0.mlp.out",) * 2)


def test_routers_survive_their_file(tmp_path: Path) -> None:
    """Scores, NaN rows and names."""
    saved = router(4, 0.25)
    save_learned(saved, tmp_path / "router.safetensors")
    loaded = load_learned(tmp_path / "router.safetensors")
    assert isinstance(loaded, Router)
    assert loaded.sites == saved.sites
    assert loaded.p_steps == (1, 3)
    torch.testing.assert_close(loaded.scores, saved.scores, equal_nan=True, rtol=0, atol=0)


# --- published files


def logits(num_steps: int = 6, units: int = 4) -> dict[str, torch.Tensor]:
    """A file's content: router i has the logits i, i + 0.25, ... - 2."""
    return {f"{i}.prob": torch.arange(units) / 4 + i - 2.0 for i in range(num_steps)}


def training_checkpoint(routers: Any) -> dict[str, Any]:
    """The format of the DiT routers: optimiser and command line beside them."""
    return {"routers": routers, "opt": {"state": {}, "param_groups": [{"lr": 1e-3}]}, "args": argparse.Namespace(l1=0)}


def read(tmp_path: Path, content: Any, num_steps: int = 6, **options: Any) -> Router:
    """Write a file and read it for the tiny DiT."""
    torch.save(content, tmp_path / "router.pt")
    return plans.read_published_router(tmp_path / "router.pt", case("dit").info, num_steps=num_steps, **options)


def test_a_training_checkpoint_counts_down(tmp_path: Path) -> None:
    """Router i belongs to the step that is i steps before the end; odd i are not used."""
    found = read(tmp_path, training_checkpoint(logits()))
    assert (found.sites, found.p_steps) == (OUT, (1, 3, 5))
    for step in found.p_steps:
        torch.testing.assert_close(found.scores[step], logits()[f"{5 - step}.prob"].sigmoid(), rtol=0, atol=0)


def test_a_plain_file_counts_solver_steps(tmp_path: Path) -> None:
    """Router i belongs to the first evaluation of solver step i; 0 and the last ones are not used."""
    found = read(tmp_path, logits(), shifted=True)
    assert found.p_steps == (2, 4)
    for step in found.p_steps:
        torch.testing.assert_close(found.scores[step], logits()[f"{step // 2}.prob"].sigmoid(), rtol=0, atol=0)


def test_l2c_takes_a_published_file(tmp_path: Path) -> None:
    """By its path; sigmoid(-2.2) is about 0.1."""
    content = logits() | {"0.prob": torch.tensor([-3.0, -2.0, -2.5, 0.0])}
    torch.save(training_checkpoint(content), tmp_path / "router.pth")
    plan = plans.l2c(case("dit").info, num_steps=6, router=str(tmp_path / "router.pth"))
    assert reused(plan) == [(5, OUT[0]), (5, OUT[2])]
    assert plan.policy["router"] == "router.pth"


class Bomb:
    """An object that would run a command if it were unpickled."""

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, ("executed",)


#: What is said of a file with one in it, wherever it stands.
UNPICKLED = f"it holds objects other than tensors, which are not executed (it names {os.name}.mkdir)"

BAD_FILES: dict[str, tuple[Any, str]] = {
    "deeper model": (logits(units=6), "router 0 has 6 units, and the model has 4 branches in 2 blocks"),
    "one short row": (logits() | {"3.prob": torch.zeros(3)}, "router 3 has 3 units, and the model has 4 branches"),
    "fewer steps": (logits(5), "holds 5 routers, and num_steps=6: '5.prob' is missing"),
    "more steps": (logits(8), "holds 8 routers, and num_steps=6; a router serves the number of steps"),
    "extra key": (logits() | {"6.bias": torch.zeros(4)}, "holds more than a router: '6.bias'"),
    "extra key beside": (
        training_checkpoint(logits()) | {"model": torch.zeros(1)},
        "holds more than a router: 'model'",
    ),
    "missing key": (
        {key: row for key, row in logits().items() if key != "2.prob"},
        "holds 5 routers, and num_steps=6: '2.prob' is missing",
    ),
    "NaN": (
        logits() | {"1.prob": torch.tensor([0.0, 0.0, torch.nan, 0.0])},
        "router 1: the logit of 'blocks.1.attn.out' is nan",
    ),
    "infinite": (logits() | {"1.prob": torch.full((4,), torch.inf)}, "the logit of 'blocks.0.attn.out' is inf"),
    "no vector": (logits() | {"0.prob": torch.zeros(2, 2)}, "expected a vector of logits, found torch.float32 [2, 2]"),
    "integers": (logits() | {"0.prob": torch.zeros(4).long()}, "expected a vector of logits, found torch.int64 [4]"),
    "sparse": (logits() | {"0.prob": torch.zeros(4).to_sparse()}, "found a sparse_coo tensor"),
    "meta": (logits() | {"0.prob": torch.zeros(4, device="meta")}, "found no values (a meta tensor)"),
    "float8": (logits() | {"0.prob": torch.zeros(4).to(torch.float8_e4m3fn)}, "found torch.float8_e4m3fn [4]"),
    "no tensor": (logits() | {"0.prob": 3.0}, "expected a vector of logits, found float"),
    "a tensor": (torch.zeros(3), "expected a router's vectors '0.prob', '1.prob', ..., found Tensor"),
    "a list": ({"routers": [torch.zeros(4)]}, "expected a router's vectors '0.prob', '1.prob', ..., found list"),
    "an object": (
        training_checkpoint(logits()) | {"args": Bomb()},
        UNPICKLED,
    ),
    "an object alone": (Bomb(), UNPICKLED),
    "an object beside the vectors": (logits() | {"6.prob": Bomb()}, UNPICKLED),
    "an object for a vector": (logits() | {"0.prob": Bomb()}, UNPICKLED),
    "an object for the routers": (training_checkpoint(Bomb()), UNPICKLED),
    "an object in the routers": (training_checkpoint(logits() | {"0.prob": Bomb()}), UNPICKLED),
}


@pytest.mark.filterwarnings("ignore:(Validating sparse tensor|Sparse) invariant:UserWarning")  # torch tells of it
@pytest.mark.parametrize("kind", BAD_FILES)
def test_a_file_that_is_no_router_is_refused(kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Naming what is wrong; nothing in it runs."""
    monkeypatch.chdir(tmp_path)
    content, message = BAD_FILES[kind]
    with pytest.raises(PlanError, match=re.escape(message)):
        read(tmp_path, content)
    assert not Path("executed").exists()


def test_the_object_would_run_a_command(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Read as torch reads files that are trusted, it does: what the refusals above are worth."""
    monkeypatch.chdir(tmp_path)
    torch.save(training_checkpoint(Bomb()), "router.pt")
    torch.load("router.pt", weights_only=False)
    assert Path("executed").is_dir()


@pytest.mark.parametrize("size", [0, 100, 1000])
def test_a_damaged_file_is_refused(size: int, tmp_path: Path) -> None:
    """Empty, or cut off."""
    torch.save(logits(), tmp_path / "whole.pt")
    (tmp_path / "cut.pt").write_bytes((tmp_path / "whole.pt").read_bytes()[:size])
    with pytest.raises(PlanError, match=r"cut.pt is not a router file that can be read safely: it is damaged"):
        plans.read_published_router(tmp_path / "cut.pt", case("dit").info, num_steps=6)


def test_a_missing_file_is_named() -> None:
    """And so is an odd number of evaluations of a solver that takes two."""
    with pytest.raises(PlanError, match=r"there is no router file at nowhere\.pt"):
        plans.l2c(case("dit").info, num_steps=6, router="nowhere.pt")
    with pytest.raises(PlanError, match="DPM-Solver-2 takes two evaluations per solver step, got num_steps=5"):
        plans.i_steps_of_pairs(5, shifted=True)


# --- published numbers


def published(name: str) -> Path:
    """A published router; they have no licence and are not shipped."""
    if not (PUBLISHED / name).is_file():
        pytest.skip(f"{name} is not at {PUBLISHED}: the published routers are not shipped, they state no licence")
    return PUBLISHED / name


#: Computed attention and MLP units of every P-step, from the last step back to the noisy ones (methods.md 2.8).
ACTIVE = "21/15 18/11 18/8 5/6 3/5 3/4 2/4 1/1 0/1 2/1 0/0 0/0 0/1 0/0"


def test_the_published_router_of_dit_xl2() -> None:
    """Table 4 and Table 1 of the paper: 47.43 % of the P-step units reused, 4.36 T MACs, 5.72 T uncached."""
    info = dit_xl2()
    plan = plans.l2c(info, num_steps=50, router=published("DDIM50_router.pt"))
    shares = [100 * len(reused(plan, part)) / units for part, units in (("", 1400), (".mlp.", 700), (".attn.", 700))]
    assert [f"{share:.2f}" for share in shares] == ["47.43", "47.86", "47.00"]
    assert f"{info.layer_macs(plan) / 1e12:.2f}" == "4.36"
    assert f"{info.layer_macs(plans.full(info, num_steps=50)) / 1e12:.2f}" == "5.72"
    active = [
        "/".join(str(28 - sum(s == step for s, _ in reused(plan, part))) for part in (".attn.", ".mlp."))
        for step in range(49, 0, -2)
    ]
    assert active[11:] == ACTIVE.split()
    assert all(26 <= int(a.split("/")[0]) <= 28 and a.endswith("/28") for a in active[:11])


def test_the_published_router_of_u_vit_h2() -> None:
    """Table 4 with its two columns put right: 63.79 % of the P-step units, MLP 67.05, attention 60.54; theta 0.9.

    Uncached, the MACs are those of Table 2 (2.58 T). For the plan it states 1.92 T, which does not follow from these
    shares: 158 attention units of 4 d^2 N and 175 MLP units of 8 d^2 N leave 1.88 T.
    """
    info = uvit_h2()
    plan = plans.l2c(info, num_steps=20, router=published("dpm20_router.pth"), theta=0.9, shifted=True)
    counts = [len(reused(plan, part)) for part in (".attn.", ".mlp.")]
    assert counts == [158, 175]
    shares = [100 * sum(counts) / 522, 100 * counts[1] / 261, 100 * counts[0] / 261]
    assert [f"{share:.2f}" for share in shares] == ["63.79", "67.05", "60.54"]
    active = [
        "/".join(str(29 - sum(s == step for s, _ in reused(plan, part))) for part in (".attn.", ".mlp."))
        for step in range(2, 20, 2)
    ]
    assert active == ["0/0", "2/0", "5/1", "4/2", "5/3", "10/6", "26/23", "26/26", "25/25"]
    uncached = info.layer_macs(plans.full(info, num_steps=20))
    assert uncached / 1e12 == pytest.approx(2.58, abs=0.0051)
    assert uncached - info.layer_macs(plan) == (158 * 4 + 175 * 8) * 1152**2 * 258
