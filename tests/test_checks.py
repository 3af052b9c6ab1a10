"""A plan is checked against the model it is to run on; every refusal names the offender and the remedy."""

from __future__ import annotations

import functools
import re
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import tcc
from tcc.errors import PlanError
from tcc.plan import Action, CachePlan, Compute, Hold, Reuse, Skip, TopK, Update
from tcc.plan.checks import check_model, check_sites, forecast_depth
from tcc.plan.scores import Attended, Fixed, Norm, Probe, Score, Term
from tests.tiny_models import Attention, Block, Case, Tokens, case, dit, noise

BLOCK, KEYS = "blocks.0.delta", "blocks.0.attn.kv"
TOKENS = {"T": torch.tensor([0, 3]), "U": torch.tensor([1, 2])}


@functools.cache
def other(kind: str) -> Case:
    """The tiny DiT, but for one thing."""
    options: dict[str, dict[str, Any]] = {
        "batch": {"batch": 1},
        "resolution": {"input_size": 16},
        "depth": {"depth": 1},
        "width": {"hidden_size": 16},
        "channels": {"in_channels": 3},
        "dtype": {},
    }
    made = dit(**options[kind])
    if kind == "dtype":
        return Case(made.model.bfloat16(), (made.args[0].bfloat16(), *made.args[1:]), {})
    return made


REASONS = {
    "batch": r"the plan is for another batch size: input 'x' has shape \[2, 4, 8, 8\] in the plan and \[1, 4, 8, 8\]",
    "resolution": r"the plan is for another resolution: input 'x' has shape \[2, 4, 8, 8\] in .* \[2, 4, 16, 16\] here",
    "channels": r"the plan is for another input shape: input 'x' has shape \[2, 4, 8, 8\] in .* \[2, 3, 8, 8\] here",
    "depth": "the plan is for another model: its graph hash is",
    "width": "the plan is for another model: its graph hash is",
    "dtype": "the plan is for another model: its graph hash is",
}


@pytest.mark.parametrize("kind", REASONS)
def test_a_plan_for_another_model_is_refused(kind: str) -> None:
    """The message says what differs, and how to make the right plan."""
    plan = tcc.plans.full(case("dit").info, num_steps=2)
    with pytest.raises(PlanError, match=REASONS[kind] + "(.|\n)* Make the plan "):
        check_model(plan, other(kind).info.key)


def test_the_reference_checks_the_model() -> None:
    """As the compiler does, at its first call."""
    reference = tcc.Reference(other("batch").model, tcc.plans.full(case("dit").info, num_steps=2), other("batch").info)
    with pytest.raises(PlanError, match="another batch size"):
        reference(*other("batch").args)


def test_tcc_compile_checks_the_model() -> None:
    """The check is made before anything is rewritten."""
    plan = tcc.plans.full(case("dit").info, num_steps=2)
    which = other("batch")
    with pytest.raises(PlanError, match="another batch size"):
        tcc.compile(which.model, plan, backend="eager", example_inputs=(which.args, {}))


def test_a_plan_for_other_inputs_is_refused() -> None:
    """A model that takes other inputs altogether."""
    plan = tcc.plans.full(case("dit").info, num_steps=2)
    message = "the plan is for another model: it takes inputs x, t, y, this one takes x. Make the plan from tcc.inspect"
    with pytest.raises(PlanError, match=message):
        check_model(plan, case("separate").info.key)


def test_other_weights_are_the_same_model() -> None:
    """A plan depends on the graph, not on what the weights hold."""
    check_model(tcc.plans.full(case("dit").info, num_steps=2), dit().info.key)


def test_a_plan_written_by_hand_is_for_any_model() -> None:
    """Without a key there is nothing to compare; sites are checked all the same."""
    check_model(CachePlan(num_steps=1, actions={}), other("depth").info.key)


def check(actions: dict[tuple[int, str], Action], name: str = "dit", tokens: dict[str, Tensor] | None = None) -> None:
    """Check a two-step plan against a model."""
    plan = CachePlan(num_steps=2, actions=actions, tokens=TOKENS if tokens is None else tokens)
    check_sites(plan, case(name).info.analysis)


COMPUTED: dict[tuple[int, str], Action] = {(0, BLOCK): Compute(), (0, KEYS): Compute()}


def test_valid_plans_pass() -> None:
    """Every attention mode with what it needs."""
    check({**COMPUTED, (1, BLOCK): Update("T", "kept")})
    check({(0, BLOCK): Compute(), (1, BLOCK): Update("T", "current")})
    check({**COMPUTED, (1, BLOCK): Update("T", "cached"), (1, KEYS): Update("T", "cached")})
    check({**COMPUTED, (1, BLOCK): Update("T", "current"), (1, KEYS): Reuse()})
    check({(0, "blocks.0.mlp.delta"): Compute(), (1, "blocks.0.mlp.delta"): Update("T", "cached")})
    check({(0, BLOCK): Compute(), (0, "blocks.0.stream"): Compute(), (1, "blocks.0.stream"): Hold()})


UNKNOWN = {
    "block.0.delta": r"site 'block.0.delta': the model has no such block; did you mean 'blocks.0'\?",
    "blocks.2.delta": r"site 'blocks.2.delta': the model has no such block; did you mean 'blocks.1'\?",
    "zzz.delta": r"site 'zzz.delta': the model has no such block; blocks are blocks.0 .. blocks.1",
    "blocks.0.mpl.out": r"site 'blocks.0.mpl.out': the model has no such site; near ones: blocks.0.mlp.out, ",
    "blocks.0.cross.out": r"no such site; near ones: .*\(tcc inspect lists them all\)",
    "blocks.0.delta@text": r"the model has no stream 'text'; beside the main one it has no other streams",
    "blocks.0.skip": r"no such site; near ones: blocks.0.",
    "out.delta": r"no such site; near ones: \w",
}


@pytest.mark.parametrize("site", UNKNOWN)
def test_an_unknown_site_is_refused_with_a_hint(site: str) -> None:
    """A misspelt block or branch gets the nearest names."""
    with pytest.raises(PlanError, match=UNKNOWN[site]):
        check({(0, site): Compute()})


def test_a_token_out_of_range_is_refused() -> None:
    """The message names the set, the position and the range."""
    tokens = {"T": torch.tensor([0, 16])}
    with pytest.raises(
        PlanError, match=r"token set 'T': position 16 is out of range, the stream has 16 tokens \(0..15\)"
    ):
        check(COMPUTED, tokens=tokens)


@pytest.mark.parametrize(
    ("one", "other"),
    [
        ("blocks.0.delta", "blocks.0.attn.delta"),
        ("blocks.0.delta", "blocks.0.mlp.out"),
        ("blocks.1.attn.out", "blocks.1.attn.delta"),
    ],
)
def test_overlapping_sites_are_refused(one: str, other: str) -> None:
    """Two sites that keep parts of one branch contradict each other."""
    with pytest.raises(PlanError, match="keep parts of the same branch: name only one of them in a plan") as caught:
        check({(0, other): Compute(), (0, one): Compute()})
    assert f"'{one}'" in str(caught.value)
    assert f"'{other}'" in str(caught.value)


def test_tokens_that_cannot_be_pruned_are_refused_with_the_reason() -> None:
    """The reason is the analysis's; whole-branch actions remain."""
    site = "blocks.0.mlp.delta"
    message = rf"step 1, site '{site}': its tokens cannot be pruned: aten.conv1d.default convolves.* Use compute"
    with pytest.raises(PlanError, match=message):
        check({(0, site): Compute(), (1, site): Update("T")}, "conv")
    check({(0, site): Compute(), (1, site): Reuse()}, "conv")


def test_kept_attention_does_not_read_the_key_slot() -> None:
    """A plan that refreshes keys that nobody reads is a mistake."""
    message = rf"step 1, site '{BLOCK}': attention 'kept' does not read '{KEYS}', which is Update\(.*use 'cached'"
    with pytest.raises(PlanError, match=message):
        check({**COMPUTED, (1, BLOCK): Update("T", "kept"), (1, KEYS): Update("T")})


@pytest.mark.parametrize(
    ("keys", "has"),
    [
        ({}, "no such row"),
        ({(0, KEYS): Compute()}, r"Compute\("),
        ({(0, KEYS): Compute(), (1, KEYS): Reuse()}, r"Reuse\("),
        ({(0, KEYS): Compute(), (1, KEYS): Update("U")}, r"Update\(tokens='U'"),
    ],
)
def test_cached_attention_needs_its_keys_refreshed(keys: dict[tuple[int, str], Action], has: str) -> None:
    """With the same tokens, at the same step."""
    has = r"Compute\(" if has == "no such row" and keys else has
    message = (
        rf"attention 'cached' reads '{KEYS}': the plan must update it with the same tokens at this step, and has {has}"
    )
    with pytest.raises(PlanError, match=message):
        check({(0, BLOCK): Compute(), (1, BLOCK): Update("T", "cached"), **keys})


class Twice(nn.Module):
    """Two attentions side by side in one branch."""

    def __init__(self) -> None:
        super().__init__()
        self.one, self.two = Attention(16), Attention(16)

    def forward(self, x: Tensor) -> Tensor:
        """The sum of both."""
        out: Tensor = self.one(x) + self.two(x)
        return out


def test_cached_attention_needs_a_site_for_all_keys() -> None:
    """A branch with two attentions has no key site, and says so instead of using present keys."""
    blocks: list[nn.Module] = []
    for _ in range(2):
        block = Block(16)
        block.attn = Twice()  # type: ignore[assignment]
        blocks.append(block)
    analysis = tcc.inspect(Tokens(blocks).eval(), noise(2, 12, 16)).analysis
    assert "blocks.0.attn.kv" not in analysis.sites
    for attention in ("kept", "current", "cached"):
        actions: dict[tuple[int, str], Action] = {(0, BLOCK): Compute(), (1, BLOCK): Update("T", attention)}
        plan = CachePlan(num_steps=2, actions=actions, tokens=TOKENS)
        if attention == "cached":
            with pytest.raises(PlanError, match=r"the branch has 2 attention products with 0 such site\(s\)"):
                check_sites(plan, analysis)
        else:
            check_sites(plan, analysis)


def test_forecast_depth_is_the_history_that_a_site_needs() -> None:
    """One value, or one more than the highest order."""
    rows: dict[tuple[int, str], Action] = {(3, BLOCK): Reuse(2, (1.0, 1.0, 1.0)), (4, BLOCK): Reuse()}
    plan = CachePlan(num_steps=5, actions={**rows, (0, KEYS): Compute()})
    assert (forecast_depth(plan, BLOCK), forecast_depth(plan, KEYS)) == (3, 1)


MLP = "blocks.0.mlp.out"
TABLES = {
    "s": torch.zeros(16),
    "b": torch.zeros(3, 16),
    "t": torch.zeros(4),
    "w": torch.zeros(32, 4),
    "v": torch.zeros(8, 4),
}


def dynamic(
    *terms: Term,
    count: int = 4,
    site: str = MLP,
    name: str = "dit",
    more: dict[tuple[int, str], Action] | None = None,
    **options: Any,
) -> None:
    """Check a two-step plan whose second step updates one site by a score."""
    attention = options.pop("attention", "current")
    actions: dict[tuple[int, str], Action] = {(1, site): Update(TopK("mine", count), attention), **(more or {})}
    scores = {"mine": Score(tuple((1.0, term) for term in terms), **options)}
    check_sites(CachePlan(2, actions, TOKENS, scores=scores, tables=TABLES), case(name).info.analysis)


BAD_SETS: dict[str, tuple[Callable[[], None], str]] = {
    "too many": (lambda: dynamic(Fixed("s"), count=17), "TopK(score='mine', count=17): the stream has only 16 tokens"),
    "unknown site": (
        lambda: dynamic(Norm("blocks.9.delta")),
        "score 'mine', Norm(site='blocks.9.delta'): the model has no",
    ),
    "unknown branch": (
        lambda: dynamic(Attended("blocks.0.mlp")),
        "no branch with one self-attention of that name (such",
    ),
    "rows of a table": (lambda: dynamic(Fixed("t")), "table 't' has shape [4], this model needs [16] or [2, 16]"),
    "samples of a table": (
        lambda: dynamic(Fixed("b")),
        "table 'b' has shape [3, 16], this model needs [16] or [2, 16]",
    ),
    "width of a probe": (
        lambda: dynamic(Probe("blocks.0.stream", "v", "t", "t", "s")),
        "table 'v' has shape [8, 4], this model needs [32, 4]",
    ),
    "bias of a probe": (
        lambda: dynamic(Probe("blocks.0.stream", "w", "t", "t", "t")),
        "table 't' has shape [4], this model needs [16]",
    ),
    "cell": (lambda: dynamic(Fixed("s"), cell=3, bonus=1.0), "cell=3 must divide both sides of the 4 x 4 grid"),
    "count per cell": (
        lambda: dynamic(Fixed("s"), cell=2, per_cell=True, count=6),
        "the count must be a multiple of the 4 cells",
    ),
    "no grid": (
        lambda: _without_grid(),
        "the model's token grid is unknown for 12 tokens: grid cells need an image grid",
    ),
    "its own value": (
        lambda: (
            dynamic(Norm("blocks.0.stream"), site="blocks.0.delta", more={(1, "blocks.0.stream"): Compute()})
            or dynamic(Norm("blocks.1.stream"), site="blocks.0.delta")
        ),
        "which the step computes only after the tokens are needed at 'blocks.0.delta': read a site that comes earlier",
    ),
    "keys of a later attention": (
        lambda: (
            dynamic(Norm("blocks.0.attn.out"), site="blocks.0.mlp.out")
            or dynamic(Norm("blocks.0.mlp.out"), site="blocks.0.attn.out", attention="kept")
        ),
        "the score reads 'blocks.0.mlp.out', which the step computes only after the tokens are needed at",
    ),
    "skipped": (
        lambda: dynamic(Norm("blocks.0.attn.out"), more={(1, "blocks.0.attn.out"): Skip()}),
        "the score reads 'blocks.0.attn.out', which the step skips",
    ),
    "part of a site": (
        lambda: dynamic(Norm("blocks.0.mlp.delta")),
        "keeps a part of what 'blocks.0.mlp.out' keeps, which the plan acts on: read 'blocks.0.mlp.out'",
    ),
}


def _without_grid() -> None:
    actions: dict[tuple[int, str], Action] = {(1, MLP): Update(TopK("mine", 4))}
    score = Score(((1.0, Norm(MLP)),), cell=2, per_cell=True)
    check_sites(CachePlan(2, actions, scores={"mine": score}), case("separate").info.analysis)


@pytest.mark.parametrize("kind", BAD_SETS)
def test_a_dynamic_set_that_the_model_does_not_allow_is_refused(kind: str) -> None:
    """The message names the score or the set, what is wrong, and what to do."""
    make, message = BAD_SETS[kind]
    with pytest.raises(PlanError, match=re.escape(message)):
        make()


def test_samples_that_cannot_be_followed_share_their_set() -> None:
    """Where the keys' samples are unknown, a set of its own for each sample is refused, and a shared one is not."""
    analysis = case("dit").info.analysis
    sites = {name: replace(site, key_batch=(None,) * len(site.attention)) for name, site in analysis.sites.items()}
    blind = replace(analysis, sites=sites)
    for shared in (True, False):
        actions: dict[tuple[int, str], Action] = {(1, BLOCK): Update(TopK("mine", 4), "kept")}
        plan = CachePlan(2, actions, scores={"mine": Score(((1.0, Norm("blocks.0.stream")),), shared=shared)})
        if shared:
            check_sites(plan, blind)
        else:
            with pytest.raises(
                PlanError, match=r"samples cannot be followed into the keys of .* use Score\(shared=True\)"
            ):
                check_sites(plan, blind)
