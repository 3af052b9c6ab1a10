"""The rows of the comparison of policies, and what is trained for them."""

from __future__ import annotations

import json
from pathlib import Path
from types import ModuleType

import pytest
import torch

import tcc
from tcc.models import DiT
from tcc.plan import CachePlan, Compute, Reuse
from tcc.samplers import Diffusion
from tests.scripts import QUALITY, modules_of

pytestmark = pytest.mark.usefixtures("own_threads")
scripts = modules_of(*QUALITY)


def counts(plan: CachePlan) -> dict[tuple[int, str], object]:
    """How many tokens are recomputed, at every step and branch that computes some."""
    sizes = {name: len(kept) for name, kept in plan.tokens.items()}
    updates = {at: action.tokens for at, action in plan.actions.items() if isinstance(action, tcc.Update)}
    return {at: sizes[tokens] if isinstance(tokens, str) else tokens.count for at, tokens in updates.items()}


@pytest.mark.parametrize("kind", ["comparison", "ablation"])
def test_the_rows_are_plans(scripts: dict[str, ModuleType], kind: str) -> None:
    """Names are unique; every row that is not learned makes a plan; controls have the counts of their row.

    They cost no more than it does: what ranks the tokens has its price.
    """
    quality_rows = scripts["quality_rows"]
    sizes = {"input_size": 32, "patch_size": 4, "in_channels": 1, "hidden_size": 16, "depth": 8, "num_heads": 2}
    model = DiT(**sizes, num_classes=10).eval()  # type: ignore[arg-type]
    info = tcc.inspect(model, torch.zeros(2, 1, 32, 32), *torch.zeros(2, 2, dtype=torch.int64))
    listed = getattr(quality_rows, kind)(20)
    assert len({row.name for row in listed}) == len(listed)

    fixed = [row for row in listed if not any(isinstance(o, quality_rows.Learned) for o in row.options.values())]
    paired = {row.control for row in listed} | {row.name for row in listed if row.control}
    kinds = {(row.policy, tuple(row.options)): row for row in fixed if row.run_steps is None and row.visits is None}
    fixed = [row for row in fixed if row.name in paired or row in kinds.values()]  # of alike rows the last
    made = {row.name: row.plan(info, 20, Path("nowhere")) for row in fixed}
    names = {row.name for row in listed}
    for row in listed:
        assert not row.control or row.control in names
        if row.name in made and row.control in made:
            assert counts(made[row.name]) == counts(made[row.control])
            assert made[row.name].macs <= made[row.control].macs


def test_a_shuffled_plan_has_the_same_counts_at_other_places(scripts: dict[str, ModuleType]) -> None:
    """Of a plan that reuses the first three of eight attentions at every other step: three of eight, and as cheap."""
    sizes = {"input_size": 8, "patch_size": 2, "in_channels": 4, "hidden_size": 16, "depth": 8, "num_heads": 2}
    model = DiT(**sizes, num_classes=10).eval()  # type: ignore[arg-type]
    info = tcc.inspect(model, torch.zeros(2, 4, 8, 8), *torch.zeros(2, 2, dtype=torch.int64))
    branches = [f"blocks.{i}.{branch}.out" for i in range(8) for branch in ("attn", "mlp")]
    reused = {(step, f"blocks.{i}.attn.out"): Reuse() for step in (1, 3, 5) for i in range(3)}
    table = {(step, name): reused.get((step, name), Compute()) for step in range(6) for name in branches}
    plan = info.count(CachePlan(num_steps=6, actions=table))
    shuffled = scripts["quality_rows"].shuffle(info, plan)

    assert shuffled.macs == plan.macs
    assert shuffled.actions != plan.actions
    for step in range(6):
        at = shuffled.at(step)
        assert sum(at[f"blocks.{i}.attn.out"] == Reuse() for i in range(8)) == (3 if step % 2 else 0)
        assert all(at[f"blocks.{i}.mlp.out"] == Compute() for i in range(8))
    assert (
        len({tuple(sorted(site for site, action in shuffled.at(s).items() if action == Reuse())) for s in (1, 3, 5)})
        > 1
    )


def test_the_sampler_visits_the_steps_that_it_is_given(scripts: dict[str, ModuleType]) -> None:
    """Timesteps of the longer run; all of them are that run."""
    visits, every = scripts["quality_rows"].Visits, Diffusion().timesteps(20)

    assert visits(of=20, visited=(0, 3, 19)).timesteps(3) == (every[0], every[3], every[19])
    assert visits(of=20, visited=tuple(range(20))).steps(20) == Diffusion().steps(20)


def test_what_the_rows_need_is_made(scripts: dict[str, ModuleType], tmp_path: Path) -> None:
    """A calibration and searched steps for the reference model are files that the policies take; none is made twice."""
    learn = scripts["quality_learn"]
    options = ["--learned", str(tmp_path), "--steps", "4", "--images", "2", "--evaluations", "2", "--threads", "1"]
    options += ["--backend", "eager", "--only", "calibration", "steps-ddim4-0.5"]
    assert learn.main(options) == 0

    made = {path.name: path.stat().st_mtime_ns for path in tmp_path.iterdir()}
    assert made.keys() == {"calibration-ddim4.safetensors", "i-steps-ddim4-0.5.json", "ddim-steps-ddim4-0.5.json"}
    assert learn.main(options) == 0
    assert {path.name: path.stat().st_mtime_ns for path in tmp_path.iterdir()} == made
    info = tcc.inspect(tcc.models.reference_model(), torch.zeros(2, 1, 32, 32), *torch.zeros(2, 2, dtype=torch.int64))
    needy = [
        row
        for row in scripts["quality_rows"].comparison(4)
        if row.name in ("metric 50%", "forecast 50%, steps searched")
    ]
    assert [row.plan(info, 4, tmp_path).num_steps for row in needy] == [4, 4]


def test_what_a_training_took_is_told(scripts: dict[str, ModuleType], tmp_path: Path) -> None:
    """Its options, iterations and seconds stand in the results."""
    learn = scripts["quality_learn"]
    options = ["--learned", str(tmp_path), "--results", str(tmp_path), "--steps", "2", "--minutes", "0.01"]
    assert learn.main([*options, "--threads", "1", "--only", "runs-importance"]) == 0
    (row,) = json.loads((tmp_path / "training.json").read_text())["rows"]
    assert row["file"] == "runs-importance-ddim2.safetensors"
    assert row["options"] == "predictor --form table --target 0.5 --iterations 60"
    assert 0 < row["iterations"] < 60
    assert 0 < row["seconds"] < 60


def test_every_core_name_names_a_row(scripts: dict[str, ModuleType]) -> None:
    """The list of core rows and the list of rows agree."""
    rows = scripts["quality_rows"]
    names = [row.name for steps in (50, 20) for row in rows.comparison(steps)]

    assert all(any(name.startswith(core) for name in names) for core in rows.CORE)
