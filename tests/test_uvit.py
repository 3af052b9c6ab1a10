"""The U-ViT architecture: the public layout, its cost, and its arithmetic written out independently."""

from __future__ import annotations

import functools
import math

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import tcc
from tcc.errors import ModelError
from tcc.models import UViT, UViTConfig
from tcc.passes.macs import node_macs
from tcc.plan import Compute, Hold
from tests.running import CLOSE, call, session, token_plan
from tests.tiny_models import case, fill, noise, relative_error

#: (blocks, width, heads) by size, from the paper's table 1 with its middle block.
PUBLISHED = {"S": (13, 512, 8), "M": (17, 768, 12), "L": (21, 1024, 16), "H": (29, 1152, 16)}


def layout(blocks: int, width: int, tokens: int, patch: int, rows: int, *, conv: bool) -> dict[str, tuple[int, ...]]:
    """The state dict of a public checkpoint on 4 channels, name by name."""
    half, patches = blocks // 2, 4 * patch * patch
    block = {
        "norm1.weight": (width,), "norm1.bias": (width,), "norm2.weight": (width,), "norm2.bias": (width,),
        "attn.qkv.weight": (3 * width, width), "attn.proj.weight": (width, width), "attn.proj.bias": (width,),
        "mlp.fc1.weight": (4 * width, width), "mlp.fc1.bias": (4 * width,),
        "mlp.fc2.weight": (width, 4 * width), "mlp.fc2.bias": (width,),
    }  # fmt: skip
    long = block | {"skip_linear.weight": (width, 2 * width), "skip_linear.bias": (width,)}
    places = {f"in_blocks.{i}": block for i in range(half)} | {"mid_block": block}
    places |= {f"out_blocks.{i}": long for i in range(half)}
    return {
        "pos_embed": (1, tokens, width),
        "patch_embed.proj.weight": (width, 4, patch, patch), "patch_embed.proj.bias": (width,),
        **({"label_emb.weight": (rows, width)} if rows else {}),
        **{f"{place}.{name}": shape for place, names in places.items() for name, shape in names.items()},
        "norm.weight": (width,), "norm.bias": (width,),
        "decoder_pred.weight": (patches, width), "decoder_pred.bias": (patches,),
        **({"final_layer.weight": (4, 4, 3, 3), "final_layer.bias": (4,)} if conv else {}),
    }  # fmt: skip


def shapes(model: UViT) -> dict[str, tuple[int, ...]]:
    """Names and shapes of the state dict."""
    return {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}


def tiny(**overrides: object) -> UViT:
    """A U-ViT of 2 + 4 x 4 tokens, width 32 and five blocks, with random weights everywhere."""
    sizes = {"input_size": 8, "hidden_size": 32, "depth": 4, "num_heads": 2, "num_classes": 5}
    model = fill(UViT(**{**sizes, **overrides}))
    assert isinstance(model, UViT)
    return model


def inputs(model: UViT) -> tuple[Tensor, ...]:
    """Inputs of one call, batch 2."""
    args = (noise(2, model.config.in_channels, *model.config.input_size), torch.tensor([3, 700]), torch.tensor([1, 5]))
    return args if model.config.num_classes else args[:2]


@pytest.mark.parametrize("patch", [2, 4])
@pytest.mark.parametrize("size", PUBLISHED)
def test_names_and_shapes_are_those_of_the_public_checkpoints(size: str, patch: int) -> None:
    """Every published size has exactly the tensors of the public state dict (32 x 32 latents, 1000 classes + null)."""
    blocks, width, heads = PUBLISHED[size]
    with torch.device("meta"):
        model = UViT.from_name(f"UViT-{size}/{patch}", input_size=32)
    tokens = 2 + (32 // patch) ** 2
    assert shapes(model) == layout(blocks, width, tokens, patch, 1001, conv=size != "H")
    assert model.config.num_heads == heads
    assert model.config.num_tokens == tokens


def test_an_unconditional_model_has_no_label_table() -> None:
    """One condition token, the time; no label."""
    model = tiny(num_classes=0, has_null_class=False, final_conv=True)
    assert shapes(model) == layout(5, 32, 17, 2, 0, conv=True)
    assert model.config.null_class is None
    assert model(*inputs(model)).shape == (2, 4, 8, 8)


def test_macs_of_the_huge_size_equal_the_anchors() -> None:
    """133.19 GMAC, and 128.74 without attention products (methods.md 3.3): both leave out the patch convolution."""
    with torch.device("meta"):
        info = tcc.inspect(UViT.from_name("UViT-H/2").eval(), torch.empty(1, 4, 32, 32), *torch.zeros(2, 1).long())
    nodes = {node: node_macs(node) for node in info.captured.gm.graph.nodes}
    attention = sum(macs for node, macs in nodes.items() if "attention" in str(node.target))
    convolution = sum(macs for node, macs in nodes.items() if "conv2d" in str(node.target))
    assert info.macs == sum(nodes.values())
    assert convolution == 256 * 1152 * 16
    assert round((info.macs - convolution) / 1e9, 2) == 133.19
    assert round((info.macs - convolution - attention) / 1e9, 2) == 128.74
    assert len(info.blocks) == 29


def linear(w: dict[str, Tensor], x: Tensor, name: str) -> Tensor:
    """A linear map by name, with its bias if there is one."""
    return x @ w[f"{name}.weight"].T + w.get(f"{name}.bias", torch.zeros(()))


def norm(w: dict[str, Tensor], x: Tensor, name: str) -> Tensor:
    """A layer norm by name."""
    centred = x - x.mean(-1, keepdim=True)
    return centred / (centred.square().mean(-1, keepdim=True) + 1e-5).sqrt() * w[f"{name}.weight"] + w[f"{name}.bias"]


def block_by_hand(w: dict[str, Tensor], heads: int, x: Tensor, name: str) -> Tensor:
    """A block after its skip linear, one head at a time."""
    width, outs = x.shape[-1], []
    q, k, v = linear(w, norm(w, x, f"{name}.norm1"), f"{name}.attn.qkv").split(width, dim=-1)
    for part in torch.arange(width).chunk(heads):
        logits = q[..., part] @ k[..., part].transpose(1, 2) / math.sqrt(width // heads)
        outs.append(logits.softmax(-1) @ v[..., part])
    x = x + linear(w, torch.cat(outs, dim=-1), f"{name}.attn.proj")
    inner = linear(w, norm(w, x, f"{name}.norm2"), f"{name}.mlp.fc1")
    return x + linear(w, inner * 0.5 * (1 + torch.erf(inner / math.sqrt(2))), f"{name}.mlp.fc2")


def by_hand(model: UViT, x: Tensor, t: Tensor, y: Tensor | None = None) -> Tensor:
    """U-ViT written out over its state dict, with explicit attention and loops in place of reshapes."""
    w, config = model.state_dict(), model.config
    patch, width, (rows, columns) = config.patch_size, config.hidden_size, config.grid
    block = functools.partial(block_by_hand, w, config.num_heads)
    tokens = []
    for row in range(rows):
        for column in range(columns):
            pixels = x[:, :, row * patch : (row + 1) * patch, column * patch : (column + 1) * patch].flatten(1)
            tokens.append(pixels @ w["patch_embed.proj.weight"].flatten(1).T + w["patch_embed.proj.bias"])
    angles = t[:, None] * 10000.0 ** (-torch.arange(width // 2) / (width // 2))
    tokens.insert(0, torch.cat([angles.cos(), angles.sin()], dim=1))
    if y is not None:
        tokens.insert(0, w["label_emb.weight"][y])
    stream, kept = torch.stack(tokens, dim=1) + w["pos_embed"], []
    for i in range(config.depth // 2):
        stream = block(stream, f"in_blocks.{i}")
        kept.append(stream)
    stream = block(stream, "mid_block")
    for i in range(config.depth // 2):
        joined = torch.cat([stream, kept[-1 - i]], dim=-1)
        stream = block(linear(w, joined, f"out_blocks.{i}.skip_linear"), f"out_blocks.{i}")
    patches = linear(w, norm(w, stream, "norm"), "decoder_pred")[:, config.num_extras :]
    image = torch.empty_like(x)
    for token in range(rows * columns):
        row, column = token // columns * patch, token % columns * patch
        pixels = patches[:, token].reshape(-1, patch, patch, config.in_channels).permute(0, 3, 1, 2)
        image[:, :, row : row + patch, column : column + patch] = pixels
    if config.final_conv:
        image = F.conv2d(image, w["final_layer.weight"], w["final_layer.bias"], padding=1)
    return image


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"input_size": (4, 8), "final_conv": True},
        {"patch_size": 4, "num_heads": 4, "depth": 2, "mlp_ratio": 2.0},
        {"num_classes": 0, "has_null_class": False},
    ],
)
def test_the_forward_equals_the_model_written_out(options: dict[str, object]) -> None:
    """Against an implementation that shares no code, in float32 (a few hundred roundings of 6e-8)."""
    model = tiny(**options)
    with torch.no_grad():
        torch.testing.assert_close(model(*inputs(model)), by_hand(model, *inputs(model)), rtol=1e-4, atol=1e-5)


def test_config_survives_json() -> None:
    """A config read back from JSON equals the one written, and builds the same model."""
    config = tiny(input_size=(4, 8)).config
    assert config == UViTConfig.from_json(config.to_json()) == UViT.from_config(config).config


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"input_size": 9}, "input_size 9x9 is not a multiple of patch_size 2"),
        ({"num_heads": 5}, "num_heads 5 does not divide hidden_size 32"),
        ({"depth": 3}, "depth 3: half of the blocks keep their streams"),
        ({"num_classes": 0}, "has_null_class without classes"),
    ],
)
def test_impossible_sizes_are_refused(wrong: dict[str, object], message: str) -> None:
    """Each impossible size is named."""
    with pytest.raises(ModelError, match=message):
        tiny(**wrong)


def test_unknown_name_lists_the_sizes() -> None:
    """from_name names the offender and the choices."""
    with pytest.raises(ModelError, match=r"unknown UViT size 'UViT-XL/2'; choose one of UViT-S/2, .*UViT-H/4"):
        UViT.from_name("UViT-XL/2")


def test_labels_are_asked_for() -> None:
    """A conditional model without labels would have one token too few."""
    model = tiny()
    with pytest.raises(ModelError, match="a model of 5 classes needs the labels y"):
        model(*inputs(model)[:2])


def held(sites: list[str], computed: tuple[int, ...], num_steps: int = 4) -> tcc.CachePlan:
    """A plan that holds the sites at every step but the computed ones."""
    rows = {(step, site): Compute() if step in computed else Hold() for step in range(num_steps) for site in sites}
    return tcc.CachePlan(num_steps=num_steps, actions=rows)


def linears(*counts: int) -> int:
    """MACs per image of that many (blocks, skip linears) on 18 tokens of width 16."""
    blocks, skips = counts
    return blocks * (18 * 12 * 16**2 + 2 * 18 * 18 * 16) + skips * 18 * 2 * 16**2


ENDS = 16 * 16 * 16 + 18 * 16 * 16  #: patch embedding and head of the tiny model


@pytest.mark.parametrize(
    ("sites", "left"),
    [
        (["out_blocks.1.stream"], (2, 1)),
        (["out_blocks.0.stream"], (4, 2)),
        (["out_blocks.0.stream", "out_blocks.0.skip", "out_blocks.1.skip"], (2, 2)),
        (["out_blocks.1.skip"], (5, 2)),
    ],
)
def test_what_only_fed_a_held_value_disappears(sites: list[str], left: tuple[int, int]) -> None:
    """DeepCache runs the outermost blocks, Faster Diffusion the decoder with its skip linears, and nothing else."""
    plan = case("uvit").info.count(held(sites, computed=(0, 2)))
    full = linears(5, 2) + ENDS
    ends = ENDS - (16**3 if len(sites) > 1 else 0)  # without the encoder, nothing reads the image
    assert plan.cost is not None
    assert plan.cost.step_macs == (full, linears(*left) + ends) * 2


@pytest.mark.parametrize(
    "plan",
    [
        held(["out_blocks.1.stream"], (0, 2)),
        held(["out_blocks.0.stream", "out_blocks.0.skip", "out_blocks.1.skip"], (0, 2)),
        held(["mid_block.stream", "out_blocks.0.skip"], (0,)),
    ],
)
def test_held_streams_and_skips_equal_the_reference(plan: tcc.CachePlan) -> None:
    """Also where the held stream is the value of a skip that is held or computed."""
    assert_equal_the_reference(plan)


@pytest.mark.parametrize("attention", ["kept", "current", "cached"])
@pytest.mark.parametrize("level", ["block", "branch", "out"])
def test_token_plans_equal_the_reference(level: str, attention: str) -> None:
    """Pruned blocks on both sides of the long skips."""
    assert_equal_the_reference(token_plan("uvit", level=level, attention=attention, tokens="checkerboard"))


def assert_equal_the_reference(plan: tcc.CachePlan) -> None:
    """Compiled without a backend, verified after each pass, on two images."""
    which = case("uvit")
    compiled, reference = session(which, plan, check=True), tcc.Reference(which.model, plan, which.info)
    for step in range(2 * plan.num_steps):
        assert relative_error(call(compiled, which, step), call(reference, which, step)) < CLOSE


def test_a_reuse_plan_equals_the_reference() -> None:
    """FORA on all branches."""
    assert_equal_the_reference(tcc.plans.fora(case("uvit").info, num_steps=4, interval=2))


@pytest.mark.parametrize("stored", [False, True])
def test_a_plan_that_only_computes_is_the_model(stored: bool) -> None:
    """Bit for bit, also where streams and skips are stored on the way."""
    which = case("uvit")
    sites = [s.name for s in which.info.sites.values() if s.kind in ("skip", "stream")] if stored else []
    model = session(which, held(sites, computed=(0, 1), num_steps=2))
    with torch.no_grad():
        assert all(torch.equal(call(model, which, step), call(which.model, which, step)) for step in range(2))
