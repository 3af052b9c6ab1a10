"""Models with several residual streams: their sites, and plans on each of them, compiled and by the reference."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import pytest
import torch

import tcc
from tcc.errors import PlanError
from tcc.plan import Action, CachePlan, Compute, Hold, Reuse, Skip, TopK, Update
from tcc.plan.scores import Attended, Norm, Score, Stale
from tcc.program import build_program
from tests.joint_models import IMAGE, TEXT, joint
from tests.running import CLOSE, call, session
from tests.tiny_models import relative_error

C, R, H = Compute(), Reuse(), Hold()
SETS = {"even": torch.arange(0, IMAGE, 2), "third": torch.arange(0, IMAGE, 3)}
EVEN, THIRD = Update("even"), Update("third")

#: case: the blocks on the main stream, with the rows of others before and after its tokens, and those on other streams
STREAMS: dict[str, tuple[dict[str, tuple[int, int]], dict[str, list[str]]]] = {
    "joint": ({"pairs.0": (0, 0), "pairs.1": (0, 0)}, {"text": ["pairs.0"]}),
    "joint, then single": (
        {"pairs.0": (0, 0), "pairs.1": (0, 0), "single.0": (TEXT, 0), "single.1": (TEXT, 0)},
        {"text": ["pairs.0", "pairs.1"]},
    ),
    "joint, single, joint": (
        {"pairs.0": (0, 0), "single.0": (TEXT, 0), "again.0": (0, 0), "again.1": (0, 0)},
        {"text": ["pairs.0", "again.0"]},
    ),
    "as much text as image": (
        {"pairs.0": (0, 0), "pairs.1": (0, 0), "single.0": (IMAGE, 0)},
        {"text": ["pairs.0", "pairs.1"]},
    ),
    "audio": (
        {"image.0": (0, 0), "block2": (0, 0), "image.1": (0, 0), "block5": (0, 0)},
        {"audio": ["audio.0", "block2", "audio.1", "block5"]},
    ),
    "hf_sd3": (
        {"transformer_blocks.0": (0, 0), "transformer_blocks.1": (0, 0)},
        {"text": ["transformer_blocks.0"]},
    ),
    "hf_flux": (
        {
            "transformer_blocks.0": (0, 0),
            "transformer_blocks.1": (0, 0),
            "single_transformer_blocks.0": (TEXT, 0),
            "single_transformer_blocks.1": (TEXT, 0),
        },
        {"text": ["transformer_blocks.0", "transformer_blocks.1"]},
    ),
}
PLANNED = ("joint", "joint, then single")


def named(name: str, kind: str, stream: str | None = None) -> list[str]:
    """The sites of a kind, on one stream or on all."""
    sites = joint(name).info.sites.values()
    return [site.name for site in sites if site.kind == kind and stream in (None, site.stream)]


def columns(rows: dict[str, Iterable[Action]]) -> CachePlan:
    """A plan from a column of actions per site."""
    actions = {(step, site): action for site, column in rows.items() for step, action in enumerate(column)}
    return CachePlan(1 + max(step for step, _ in actions), actions, SETS)


def check(name: str, plan: CachePlan) -> None:
    """The compiled plan gives what the reference gives, and not what the model gives without a plan."""
    which, steps = joint(name), range(plan.num_steps)
    compiled, reference = session(which, plan, check=True), tcc.Reference(which.model, plan, which.info)
    differ = False
    for step in steps:
        expected = call(reference, which, step)
        assert relative_error(call(compiled, which, step), expected) < CLOSE
        with torch.no_grad():
            differ |= relative_error(call(which.model, which, step), expected) > 10 * CLOSE
    assert differ, "a plan that changes nothing proves nothing"


@pytest.mark.parametrize("name", STREAMS)
def test_every_stream_and_block_is_found(name: str) -> None:
    """Blocks in order, on their streams; rows of other streams that are joined to the main one's are counted."""
    main, others = STREAMS[name]
    info = joint(name).info
    assert info.blocks == tuple(main)
    assert info.analysis.streams == ("", *others)
    assert {s.name.removesuffix(".stream"): s.axis.others or (0, 0) for s in info.sites.values() if _enters(s)} == main
    for stream, blocks in others.items():
        assert named(name, "stream", stream) == [f"{block}.stream@{stream}" for block in blocks]
    assert info.num_tokens == (16 if name == "hf_sd3" else IMAGE)
    assert info.image_tokens == (0, info.num_tokens)
    assert info.grid == ((4, 4) if name == "hf_sd3" else ())


def _enters(site: Any) -> bool:
    return site.kind == "stream" and not site.stream and site.name != "out.stream"


@pytest.mark.parametrize("name", ["joint", "hf_sd3"])
def test_a_joint_block_has_sites_for_both_streams(name: str) -> None:
    """Keys that both see are one site; what is added is one per stream. The last block has none for the text."""
    block = joint(name).info.blocks[0]
    own = [f"{branch}.{kind}" for branch in ("attn", "mlp") for kind in ("out", "delta")]
    found = [site.removeprefix(block) for site in joint(name).info.sites if site.startswith(block)]
    text = [f".{site}@text" for site in ("stream", *own, "delta")]
    assert found == [".stream", ".attn.kv", *(f".{site}" for site in own), ".delta", *text]
    keys, image = joint(name).info.sites[f"{block}.attn.kv"], joint(name).info.num_tokens
    assert keys.shape[-2] == image + TEXT
    assert keys.axis.others == (0, TEXT)
    assert keys.axis.count(keys.shape) == image
    assert all(site.prunable for site in joint(name).info.sites.values() if site.kind == "out" and not site.stream)


def test_sites_of_two_streams_do_not_overlap() -> None:
    """A plan may act on the image's delta and on the text's output, and not twice on either."""
    sites = joint("joint").info.sites
    image, text = sites["pairs.0.attn.delta"], sites["pairs.0.attn.out@text"]
    assert not image.overlaps(text)
    assert not sites["pairs.0.delta"].overlaps(text)
    assert sites["pairs.0.delta@text"].overlaps(text)
    assert text.overlaps(sites["pairs.0.attn.delta@text"])


def test_macs_of_a_block_with_two_streams() -> None:
    """The text's part costs what its own products and the attention cost; text and image are 5 and 12 rows of 16."""
    sites, batch = joint("joint").info.sites, 2
    attention = (IMAGE + TEXT) ** 2 * 16 * 2
    assert sites["pairs.0.attn.delta@text"].macs == batch * (TEXT * 16 * 16 * 4 + attention)
    assert sites["pairs.0.attn.delta"].macs == batch * (IMAGE * 16 * 16 * 4 + attention)


@pytest.mark.parametrize("name", PLANNED)
@pytest.mark.parametrize("stream", ["", "text", None])
@pytest.mark.parametrize("kind", ["out", "block"])
def test_reuse_on_one_stream_and_on_both(name: str, stream: str | None, kind: str) -> None:
    """What one stream keeps, the other still reads."""
    check(name, columns({site: [C, R, C, Reuse(1, (2.0, -1.0))] for site in named(name, kind, stream)}))


def test_streams_that_are_reused_together_share_a_slot_each() -> None:
    """Nothing reads the streams between the blocks then; where the text is computed, the image's are kept apart."""
    which = joint("joint, then single")
    sites = {stream: named("joint, then single", "block", stream)[:2] for stream in ("", "text")}
    column = [C, R]

    def slots(*chosen: str) -> list[str]:
        plan = columns({site: column for site in chosen})
        return [slot.name for slot in build_program(which.info.captured, which.info.analysis, plan).slots]

    assert slots(*sites[""], *sites["text"]) == ["pairs.0.delta+1", "pairs.0.delta@text+1"]
    assert slots(*sites[""]) == ["pairs.0.delta", "pairs.1.delta"]


@pytest.mark.parametrize("name", ["control", "pooled control"])
@pytest.mark.parametrize("kind", ["block", "delta"])
def test_a_stream_that_is_added_to_another_is_read(name: str, kind: str) -> None:
    """Whatever its branches do: each keeps a slot of its own, so that the sum after it is known."""
    check(name, columns({site: [C, R] for site in named(name, kind)}))


@pytest.mark.parametrize(("name", "site"), [(n, s) for n in PLANNED for s in ("pairs.1.stream", "pairs.0.stream@text")])
def test_one_stream_is_held_while_the_other_is_computed(name: str, site: str) -> None:
    """What only fed the held stream is not computed; what the other reads of it is."""
    plan = columns({site: [C, H, C]})
    if site.endswith("1.stream"):
        check(name, plan)
    full, held = (joint(name).info.count(plan).cost.step_macs[step] for step in (0, 1))  # type: ignore[union-attr]
    assert held < full


@pytest.mark.parametrize("attention", ["kept", "current", "cached"])
@pytest.mark.parametrize("kind", ["block", "out"])
@pytest.mark.parametrize("name", PLANNED)
def test_image_tokens_are_pruned_beside_text(name: str, kind: str, attention: Any) -> None:
    """One token set serves blocks of either form: rows of the text are always kept."""
    updates = [Update(tokens, attention) for tokens in ("even", "third")]
    rows: dict[str, Iterable[Action]] = {site: [C, *updates, R] for site in named(name, kind, "")}
    if attention == "cached":
        rows |= {site: [C, EVEN, THIRD, R] for site in named(name, "kv")}
    plan = columns(rows)
    check(name, plan)
    cost = joint(name).info.count(plan).cost
    assert cost is not None
    assert cost.step_macs[0] > cost.step_macs[1] > cost.step_macs[2]


def test_a_dynamic_set_serves_blocks_of_either_form() -> None:
    """Tokens are ranked among the image tokens: by what is stored of them, by age and by maps of joint attention."""
    name, score = "joint, then single", "pairs.0.delta"
    terms = ((1.0, Norm("single.0.delta")), (0.5, Attended("pairs.1.attn")), (0.1, Stale(score)))
    column = (C, Update(TopK("s", 5)), Update(TopK("s", 5)))
    actions = {(step, site): action for site in named(name, "block", "") for step, action in enumerate(column)}
    check(name, CachePlan(3, actions, scores={"s": Score(terms)}))


def test_a_stream_of_another_width() -> None:
    """Video and audio: either may be reused, held or skipped; the other attends to what there is."""
    check("audio", columns({site: [C, R, Skip()] for site in named("audio", "delta", "audio")}))
    check("audio", columns({site: [C, EVEN, R] for site in named("audio", "block", "")}))
    both = columns({site: [C, R, C] for site in named("audio", "out")})
    check("audio", both)


POLICIES: dict[str, Callable[[tcc.ModelInfo], CachePlan]] = {
    "fora": functools.partial(tcc.plans.fora, num_steps=4, interval=2),
    "taylorseer": functools.partial(tcc.plans.taylorseer, num_steps=6, interval=2, order=1),
    "forecast": functools.partial(tcc.plans.forecast, num_steps=4, i_steps=2, order=1),
    "delta_dit": functools.partial(tcc.plans.delta_dit, num_steps=4, span=1),
    "deepcache": functools.partial(tcc.plans.deepcache, num_steps=3, interval=3),
    "faster_diffusion": functools.partial(tcc.plans.faster_diffusion, num_steps=3, key_steps=[0]),
    "random_drop": functools.partial(tcc.plans.random_drop, num_steps=4, share=0.5),
    "tprr": functools.partial(tcc.plans.tprr, num_steps=4, k1=1, tokens="uniform"),
    "tokencache": functools.partial(
        tcc.plans.tokencache, num_steps=4, scores="norm", attention="kept", level="block", select="global"
    ),
    "toca": functools.partial(tcc.plans.toca, num_steps=6, interval=3, ratio=0.4, cell=0),
    "duca": functools.partial(tcc.plans.duca, num_steps=6, interval=3, ratio=0.4, cell=0, score="random"),
}


@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize("name", PLANNED)
def test_policies_act_on_all_streams(name: str, policy: str) -> None:
    """Each policy on joint blocks, and on joint and then single ones."""
    plan = POLICIES[policy](joint(name).info)
    check(name, plan)
    assert plan.bound > 1
    if policy not in ("deepcache", "faster_diffusion", "tprr", "tokencache"):
        assert any("@text" in site for site in plan.sites)


@pytest.mark.parametrize("policy", ["fora", "forecast", "tprr"])
@pytest.mark.parametrize("name", ["hf_sd3", "hf_flux"])
def test_policies_on_models_of_diffusers(name: str, policy: str) -> None:
    """SD3 and Flux, small."""
    check(name, POLICIES[policy](joint(name).info))


def test_a_plan_with_streams_is_saved_and_loaded(tmp_path: Path) -> None:
    """Names with @ come back as they were."""
    plan = POLICIES["fora"](joint("joint").info)
    plan.save(str(tmp_path / "plan.safetensors"))
    loaded = CachePlan.load(str(tmp_path / "plan.safetensors"))
    assert loaded.actions == plan.actions
    assert "pairs.0.attn.out@text" in loaded.sites
    assert loaded.summary() == plan.summary()


#: a plan's column for a site, and what the error says
REFUSED: dict[str, tuple[str, list[Action], str]] = {
    "another stream": (
        "pairs.0.delta@audio",
        [C, R],
        r"site 'pairs.0.delta@audio': the model has no stream 'audio'; beside the main one it has 'text'",
    ),
    "a block without that stream": ("pairs.1.delta@text", [C, R], "the model has no such site; near ones: pairs."),
    "tokens of another stream": (
        "pairs.0.delta@text",
        [C, EVEN],
        "its tokens cannot be pruned: token sets are of the main stream, not of 'text': compute or reuse it as a whole",
    ),
}


@pytest.mark.parametrize("kind", REFUSED)
def test_what_a_stream_cannot_do_is_refused(kind: str) -> None:
    """The message names the stream and the remedy."""
    site, column, message = REFUSED[kind]
    with pytest.raises(PlanError, match=message):
        joint("joint").info.count(columns({site: column}))


def test_a_score_does_not_read_another_stream() -> None:
    """Its tokens are others."""
    plan = CachePlan(
        2,
        {(0, "pairs.0.delta"): C, (1, "pairs.0.delta"): Update(TopK("s", 5))},
        scores={"s": Score(((1.0, Norm("pairs.0.delta@text")),))},
    )
    with pytest.raises(PlanError, match="cannot be told apart: they are of the stream 'text'"):
        joint("joint").info.count(plan)


def test_audio_is_no_prompt() -> None:
    """Cross-attention to another stream tells nothing of a prompt: ToCa's entropy does not read it."""
    info = joint("audio").info
    assert "block2.cross.delta" in info.sites
    assert info.analysis.cross == {}
    with pytest.raises(PlanError, match="has no cross-attention to read"):
        tcc.plans.toca(info, num_steps=4, score="entropy", cell=0)
