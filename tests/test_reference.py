"""The oracle itself: the reference interpreter against the definitions, written out by hand for the tiny DiT.

Everything is in float64, so that only a wrong definition can differ.
"""

from __future__ import annotations

import functools
import math
from typing import Any

import pytest
import torch
from torch import Tensor

import tcc
from tcc.errors import PlanError
from tcc.plan import Action, CachePlan, Compute, Hold, Reuse, Skip, Update
from tests.tiny_models import Case, dit, noise, uvit

CLOSE = 1e-12
TOKENS = {"T0": torch.tensor([0, 3, 5, 6, 11]), "T1": torch.tensor([1, 2, 3, 15])}
Store = dict[str, Tensor]


@functools.cache
def double_dit() -> Case:
    """The tiny DiT in float64."""
    made = dit()
    return Case(made.model.double(), (made.args[0].double(), *made.args[1:]), {})


def inputs(step: int) -> tuple[Tensor, Tensor, Tensor]:
    """Another image and another noise level at every step."""
    (x, t, y), _ = double_dit().inputs(step)
    return x.double(), t + 40 * step, y


def keep(name: str) -> Tensor:
    """True at the kept tokens, `[1, 16, 1]`."""
    mask = torch.zeros(1, 16, 1, dtype=torch.bool)
    mask[:, TOKENS[name]] = True
    return mask


def attend(q: Tensor, k: Tensor, v: Tensor, visible: Tensor | None) -> Tensor:
    """Softmax attention in full, `[B, heads, S, d]`; keys that are not visible weigh nothing."""
    scores = q @ k.transpose(-1, -2) / math.sqrt(q.shape[-1])
    if visible is not None:
        scores = scores.masked_fill(~visible.reshape(1, 1, 1, -1), -math.inf)
    weights = scores.exp() / scores.exp().sum(-1, keepdim=True)
    return weights @ v


def branches(block: Any, x: Tensor, c: Tensor, store: Store, key: str, how: Update | None) -> tuple[Tensor, ...]:
    """The block's branch outputs and gates, for all tokens: `attn`, its gate, and a function for the MLP."""
    shift, scale, gate, shift2, scale2, gate2 = (m.unsqueeze(1) for m in block.adaLN_modulation(c).chunk(6, dim=1))
    h = block.norm1(x) * (1 + scale) + shift
    q, k, v = block.attn.qkv(h).reshape(2, 16, 3, 2, 16).permute(2, 0, 3, 1, 4)
    visible = None
    if how is not None and how.attention == "kept":
        visible = keep(str(how.tokens))
    if how is not None and how.attention == "cached":
        mask = keep(str(how.tokens)).unsqueeze(1)
        k, v = torch.where(mask, k, store[key + ".k"]), torch.where(mask, v, store[key + ".v"])
    if how is None or how.store:
        store[key + ".k"], store[key + ".v"] = k, v
    attn = block.attn.proj(attend(q, k, v, visible).transpose(1, 2).reshape(2, 16, 32))

    def mlp(stream: Tensor) -> Tensor:
        out: Tensor = block.mlp(block.norm2(stream) * (1 + scale2) + shift2)
        return out

    return attn, gate, mlp, gate2  # type: ignore[return-value]


def embed(x: Tensor, t: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
    """Stream and conditioning."""
    model: Any = double_dit().model
    return model.x_embedder(x) + model.pos_embed, model.t_embedder(t) + model.y_embedder(y)


def read_off(stream: Tensor, c: Tensor) -> Tensor:
    """The model's output from the last stream."""
    model: Any = double_dit().model
    out: Tensor = model.unpatchify(model.final_layer(stream, c))
    return out


def reference_outputs(actions: dict[tuple[int, str], Action], steps: int) -> list[Tensor]:
    """What the reference gives at every step."""
    which = double_dit()
    reference = tcc.Reference(which.model, CachePlan(num_steps=steps, actions=actions, tokens=TOKENS), which.info)
    return [reference(*inputs(step)) for step in range(steps)]


def assert_same(results: list[Tensor], expected: list[Tensor]) -> None:
    """Equal up to float64 rounding, at every step."""
    for step, (result, wanted) in enumerate(zip(results, expected, strict=True)):
        assert float((result - wanted).abs().max()) <= CLOSE * float(wanted.abs().max()), f"step {step}"


@torch.no_grad()
def test_without_actions_it_is_the_model() -> None:
    """A plan that names nothing gives the model's outputs, bit for bit."""
    result = reference_outputs({}, 2)
    assert all(torch.equal(result[step], double_dit().model(*inputs(step))) for step in range(2))


@torch.no_grad()
@pytest.mark.parametrize("attention", ["kept", "current", "cached"])
@pytest.mark.parametrize("stores", [True, False])
def test_updated_block_deltas(attention: Any, stores: bool) -> None:
    """Kept tokens get the new change, dropped ones the stored; each attention mode sees its own keys."""
    model: Any = double_dit().model
    rows: list[Action] = [
        Compute(),
        Update("T0", attention, stores),
        Update("T1", attention, stores),
        Compute(),
        Update("T0", attention, stores),
    ]
    sites = ["blocks.0.delta", "blocks.1.delta"]
    sites += ["blocks.0.attn.kv", "blocks.1.attn.kv"] if attention == "cached" else []
    actions = {(step, site): action for step, action in enumerate(rows) for site in sites}
    store: Store = {}
    expected = []
    for step, action in enumerate(rows):
        x, c = embed(*inputs(step))
        how = action if isinstance(action, Update) else None
        for name, block in enumerate(model.blocks):
            attn, gate, mlp, gate2 = branches(block, x, c, store, f"kv{name}", how)
            delta = gate * attn + gate2 * mlp(x + gate * attn)
            if how is not None:
                delta = torch.where(keep(str(how.tokens)), delta, store[f"delta{name}"])
            if how is None or how.store:
                store[f"delta{name}"] = delta
            x = x + delta
        expected.append(read_off(x, c))
    assert_same(reference_outputs(actions, len(rows)), expected)


def run_branches(steps_of: dict[str, list[Any]]) -> list[Tensor]:
    """Block 0's branches by hand: per step a function of value and history, None for compute; block 1 is computed."""
    model: Any = double_dit().model
    kept: dict[str, list[Tensor]] = {site: [] for site in steps_of}

    def act(site: str, step: int, value: Tensor) -> Tensor:
        if site not in steps_of:
            return value
        rule = steps_of[site][step]
        if rule is None:
            kept[site].insert(0, value)
            return value
        result: Tensor = rule(value, kept[site])
        return result

    outputs = []
    for step in range(len(next(iter(steps_of.values())))):
        x, c = embed(*inputs(step))
        attn, gate, mlp, gate2 = branches(model.blocks[0], x, c, {}, "0", None)
        x = x + act("attn.delta", step, gate * act("attn.out", step, attn))
        x = x + act("mlp.delta", step, gate2 * act("mlp.out", step, mlp(x)))
        attn, gate, mlp, gate2 = branches(model.blocks[1], x, c, {}, "1", None)
        x = x + gate * attn
        outputs.append(read_off(x + gate2 * mlp(x), c))
    return outputs


@torch.no_grad()
@pytest.mark.parametrize("site", ["attn.out", "attn.delta", "mlp.out", "mlp.delta"])
def test_reused_branches(site: str) -> None:
    """A reused output meets the present gate, a reused delta brings its old one."""
    actions = {(0, f"blocks.0.{site}"): Compute(), (1, f"blocks.0.{site}"): Reuse(), (2, f"blocks.0.{site}"): Reuse()}

    def newest(_: Tensor, history: list[Tensor]) -> Tensor:
        return history[0]

    assert_same(reference_outputs(actions, 3), run_branches({site: [None, newest, newest]}))


@torch.no_grad()
def test_forecasts_combine_computed_values() -> None:
    """Coefficients go from the newest computed value to the oldest; forecasts themselves are not stored."""
    site = "mlp.out"
    name = f"blocks.0.{site}"
    actions: dict[tuple[int, str], Action] = {
        (3, name): Reuse(2, (3.0, -3.0, 1.0)),
        (4, name): Reuse(1, (2.5, -1.5)),
        (5, name): Compute(),
        (6, name): Reuse(2, (1.0, 0.5, 0.25)),
    }

    def combine(*weights: float) -> Any:
        return lambda _, history: sum(w * v for w, v in zip(weights, history, strict=False))

    rules = [None, None, None, combine(3.0, -3.0, 1.0), combine(2.5, -1.5), None, combine(1.0, 0.5, 0.25)]
    assert_same(reference_outputs(actions, 7), run_branches({site: rules}))


@torch.no_grad()
def test_updated_mlp_outputs() -> None:
    """A branch that is updated alone: kept rows new, dropped rows stored, and the result is stored."""
    name = "blocks.0.mlp.out"
    actions: dict[tuple[int, str], Action] = {(0, name): Compute(), (1, name): Update("T0"), (2, name): Update("T1")}

    def update(tokens: str) -> Any:
        def rule(value: Tensor, history: list[Tensor]) -> Tensor:
            history[0] = torch.where(keep(tokens), value, history[0])
            return history[0]

        return rule

    assert_same(reference_outputs(actions, 3), run_branches({"mlp.out": [None, update("T0"), update("T1")]}))


@torch.no_grad()
def test_skipped_branches_are_zero_and_store_nothing() -> None:
    """After a skip, a reuse still gives the value stored before it."""
    name = "blocks.0.attn.delta"
    actions: dict[tuple[int, str], Action] = {(0, name): Compute(), (1, name): Skip(), (2, name): Reuse()}
    rules = [None, lambda value, _: torch.zeros_like(value), lambda _, history: history[0]]
    assert_same(reference_outputs(actions, 3), run_branches({"attn.delta": rules}))


@torch.no_grad()
def test_a_held_stream_enters_the_block() -> None:
    """Block 1 gets the stream of step 0, under the present conditioning."""
    model: Any = double_dit().model
    actions: dict[tuple[int, str], Action] = {(0, "blocks.1.stream"): Compute(), (1, "blocks.1.stream"): Hold()}
    x, c = embed(*inputs(0))
    stream = model.blocks[0](x, c)
    expected = [read_off(model.blocks[1](stream, c), c)]
    _, c = embed(*inputs(1))
    expected.append(read_off(model.blocks[1](stream, c), c))
    assert_same(reference_outputs(actions, 2), expected)


@torch.no_grad()
def test_a_held_skip_enters_one_block_and_leaves_the_stream_alone() -> None:
    """The middle block sees the second block's present stream, and only the block with the skip the stored one."""
    which = uvit()
    model: Any = which.model.double()
    args = [(noise(2, 4, 8, 8, seed=step).double(), *which.args[1:]) for step in range(2)]
    plan = CachePlan(num_steps=2, actions={(0, "out_blocks.0.skip"): Compute(), (1, "out_blocks.0.skip"): Hold()})
    reference = tcc.Reference(model, plan)
    results = [reference(*inputs) for inputs in args]

    kept: list[Tensor] = []
    model.in_blocks[1].register_forward_hook(lambda *call: kept.append(call[2]))
    expected = [model(*args[0])]
    hook = model.out_blocks[0].register_forward_pre_hook(lambda _, call: (call[0], kept[0]))
    expected.append(model(*args[1]))
    hook.remove()
    assert float((expected[1] - model(*args[1])).abs().max()) > 1e-3
    assert_same(results, expected)


@pytest.mark.parametrize("order", [1, -1])
@torch.no_grad()
def test_the_order_in_which_a_plan_names_its_sites_means_nothing(order: int) -> None:
    """A block's change is added before the stream behind it is held, even where the plan names the stream first."""
    rows = [((0, "blocks.0.delta"), Compute()), ((1, "blocks.0.delta"), Reuse())]
    rows += [((0, "blocks.1.stream"), Compute()), ((1, "blocks.1.stream"), Hold())]
    model: Any = double_dit().model
    x, c = embed(*inputs(0))
    stream = model.blocks[0](x, c)
    _, c = embed(*inputs(1))
    result = reference_outputs(dict(rows[::order]), 2)[1]
    assert_same([result], [read_off(model.blocks[1](stream, c), c)])


def test_the_reference_checks_the_plan_at_its_first_call() -> None:
    """The oracle refuses what the compiler refuses."""
    which = double_dit()
    reference = tcc.Reference(
        which.model, CachePlan(num_steps=1, actions={(0, "blocks.7.delta"): Compute()}), which.info
    )
    with pytest.raises(PlanError, match="no such block"):
        reference(*inputs(0))


def test_the_reference_starts_again_after_the_last_step() -> None:
    """Nothing is carried from one run to the next."""
    which = double_dit()
    actions: dict[tuple[int, str], Action] = {(0, "blocks.0.delta"): Compute(), (1, "blocks.0.delta"): Reuse()}
    reference = tcc.Reference(which.model, CachePlan(num_steps=2, actions=actions), which.info)
    first = [reference(*inputs(step)) for step in range(2)]
    assert reference.step == 0
    assert all(torch.equal(reference(*inputs(step)), first[step]) for step in range(2))


def test_the_reference_takes_policies_as_compiling_does() -> None:
    """And says at once where it is given something else."""
    which = double_dit()
    policy = functools.partial(tcc.plans.fora, num_steps=2, interval=2)
    made, known = (tcc.Reference(which.model, plan) for plan in (policy, policy(which.info)))
    assert all(torch.equal(made(*inputs(step)), known(*inputs(step))) for step in range(2))
    with pytest.raises(PlanError, match=r"plan='p.safetensors' is neither a plan nor a policy"):
        tcc.Reference(which.model, "p.safetensors")  # type: ignore[arg-type]
