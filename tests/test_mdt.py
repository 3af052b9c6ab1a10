"""MDT and MDTv2: the public layout, the cost, the arithmetic written out independently, and plans on both."""

from __future__ import annotations

import functools
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import tcc
from tcc.errors import ModelError
from tcc.models import MDT, DiT, MDTConfig, MDTv2, load_dit, load_model, load_weights, save_weights
from tcc.passes.graph import shape
from tests.running import CLOSE, call, hold_plan, session, token_plan
from tests.tiny_models import Case, case, fill, mdt, relative_error

Shapes = dict[str, tuple[int, ...]]
#: (blocks, width, heads) by size, as DiT's.
PUBLISHED = {"S": (12, 384, 6), "B": (12, 768, 12), "L": (24, 1024, 16), "XL": (28, 1152, 16)}


def block_layout(width: int, heads: int, side: int, *, skip: bool = False) -> Shapes:
    """The tensors of a block on a square grid."""
    linears = {
        "attn.qkv": (3, 1),
        "attn.proj": (1, 1),
        "mlp.fc1": (4, 1),
        "mlp.fc2": (1, 4),
        "adaLN_modulation.1": (6, 1),
    }
    linears |= {"skip_linear": (1, 2)} if skip else {}
    found: Shapes = {f"{name}.weight": (rows * width, columns * width) for name, (rows, columns) in linears.items()}
    found |= {f"{name}.bias": (rows * width,) for name, (rows, _) in linears.items()}
    found["attn.rel_pos_bias.relative_position_bias_table"] = ((2 * side - 1) ** 2 + 3, heads)
    found["attn.rel_pos_bias.relative_position_index"] = (side**2, side**2)
    return found


def layout(blocks: dict[str, int], skips: tuple[str, ...], width: int, heads: int, side: int, patch: int) -> Shapes:
    """The state dict of a public checkpoint on 4 channels, but for what only training needs."""
    found: Shapes = {}
    for name, count in blocks.items():
        block = block_layout(width, heads, side, skip=name in skips)
        found |= {f"{name}.{i}.{tensor}": sizes for i in range(count) for tensor, sizes in block.items()}
    return found | {
        "pos_embed": (1, side**2, width), "decoder_pos_embed": (1, side**2, width),
        "x_embedder.proj.weight": (width, 4, patch, patch), "x_embedder.proj.bias": (width,),
        "t_embedder.mlp.0.weight": (width, 256), "t_embedder.mlp.0.bias": (width,),
        "t_embedder.mlp.2.weight": (width, width), "t_embedder.mlp.2.bias": (width,),
        "y_embedder.embedding_table.weight": (1001, width),
        "final_layer.linear.weight": (patch * patch * 8, width), "final_layer.linear.bias": (patch * patch * 8,),
        "final_layer.adaLN_modulation.1.weight": (2 * width, width),
        "final_layer.adaLN_modulation.1.bias": (2 * width,),
    }  # fmt: skip


def shapes(model: MDT | MDTv2) -> Shapes:
    """Names and shapes of the state dict."""
    return {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}


@pytest.mark.parametrize("patch", [2, 4, 8])
@pytest.mark.parametrize("size", PUBLISHED)
def test_names_and_shapes_of_version_1(size: str, patch: int) -> None:
    """Every published size, on latents of 32 x 32."""
    depth, width, heads = PUBLISHED[size]
    with torch.device("meta"):
        model = MDT.from_name(f"MDT-{size}/{patch}")
    assert shapes(model) == layout({"blocks": depth}, (), width, heads, 32 // patch, patch)
    assert (model.config.num_heads, model.config.decode_layer) == (heads, 2)


@pytest.mark.parametrize("size", PUBLISHED)
def test_names_and_shapes_of_version_2(size: str) -> None:
    """Four decoder blocks; the others in two halves."""
    depth, width, heads = PUBLISHED[size]
    with torch.device("meta"):
        model = MDTv2.from_name(f"MDTv2-{size}/2")
    blocks = {"en_inblocks": depth // 2 - 2, "en_outblocks": depth // 2 - 2, "de_blocks": 4}
    assert shapes(model) == layout(blocks, ("en_outblocks", "de_blocks"), width, heads, 16, 2)
    assert model.config.num_heads == heads


def test_macs_are_those_of_dit_and_the_skip_linears() -> None:
    """6.06 GMAC for S/2, as DiT; version 2 has 4 + 4 linear maps of twice the width on 256 tokens more."""
    inputs = (torch.empty(1, 4, 32, 32, device="meta"), *torch.zeros(2, 1, device="meta").long())
    with torch.device("meta"):
        macs = [
            tcc.inspect(kind.from_name(name).eval(), *inputs).macs
            for kind, name in ((DiT, "DiT-S/2"), (MDT, "MDT-S/2"), (MDTv2, "MDTv2-S/2"))
        ]
    assert round(macs[0] / 1e9, 2) == 6.06
    assert macs[1] == macs[0]
    assert macs[2] == macs[0] + 8 * 256 * 2 * 384**2


def linear(w: dict[str, Tensor], x: Tensor, name: str) -> Tensor:
    """A linear map by name."""
    return x @ w[f"{name}.weight"].T + w[f"{name}.bias"]


def norm(x: Tensor) -> Tensor:
    """A layer norm without weights."""
    centred = x - x.mean(-1, keepdim=True)
    return centred / (centred.square().mean(-1, keepdim=True) + 1e-6).sqrt()


def tanh_gelu(x: Tensor) -> Tensor:
    """GELU in its tanh form."""
    return 0.5 * x * (1 + torch.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)))


def attend_by_hand(w: dict[str, Tensor], config: MDTConfig, x: Tensor, name: str) -> Tensor:
    """Attention one head at a time, with the bias of every pair of tokens looked up by their places."""
    (rows, columns), width, outs = config.grid, config.hidden_size, []
    table = w[f"{name}.rel_pos_bias.relative_position_bias_table"]
    places = [divmod(token, columns) for token in range(rows * columns)]
    offsets = [[(a - c + rows - 1) * (2 * columns - 1) + b - d + columns - 1 for c, d in places] for a, b in places]
    q, k, v = linear(w, x, f"{name}.qkv").split(width, dim=-1)
    for head, part in enumerate(torch.arange(width).chunk(config.num_heads)):
        logits = q[..., part] @ k[..., part].transpose(1, 2) / math.sqrt(width // config.num_heads)
        outs.append((logits + table[torch.tensor(offsets), head]).softmax(-1) @ v[..., part])
    return linear(w, torch.cat(outs, dim=-1), f"{name}.proj")


def block_by_hand(
    w: dict[str, Tensor], config: MDTConfig, c: Tensor, x: Tensor, name: str, skip: Tensor | None = None
) -> Tensor:
    """One block."""
    if skip is not None:
        x = linear(w, torch.cat([x, skip], dim=-1), f"{name}.skip_linear")
    modulation = linear(w, c * c.sigmoid(), f"{name}.adaLN_modulation.1").unsqueeze(1)
    shift, scale, gate, shift2, scale2, gate2 = modulation.split(config.hidden_size, dim=-1)
    x = x + gate * attend_by_hand(w, config, norm(x) * (1 + scale) + shift, f"{name}.attn")
    inner = linear(w, norm(x) * (1 + scale2) + shift2, f"{name}.mlp.fc1")
    return x + gate2 * linear(w, tanh_gelu(inner), f"{name}.mlp.fc2")


def by_hand(model: MDT | MDTv2, x: Tensor, t: Tensor, y: Tensor) -> Tensor:
    """The model written out over its state dict."""
    w, config = model.state_dict(), model.config
    angles = t[:, None] * 10000.0 ** (-torch.arange(128) / 128)
    hidden = linear(w, torch.cat([angles.cos(), angles.sin()], dim=1), "t_embedder.mlp.0")
    c = linear(w, hidden * hidden.sigmoid(), "t_embedder.mlp.2") + w["y_embedder.embedding_table.weight"][y]
    patches = x.unfold(2, config.patch_size, config.patch_size).unfold(3, config.patch_size, config.patch_size)
    patches = patches.permute(0, 2, 3, 1, 4, 5).flatten(3).flatten(1, 2)
    stream = patches @ w["x_embedder.proj.weight"].flatten(1).T + w["x_embedder.proj.bias"] + w["pos_embed"]
    block = functools.partial(block_by_hand, w, config, c)
    embedded, kept, half = stream, [], (config.depth - config.decode_layer) // 2
    if isinstance(model, MDT):
        for i in range(config.depth):
            more = w["decoder_pos_embed"] if i == config.depth - config.decode_layer else 0
            stream = block(stream + more, f"blocks.{i}")
    else:
        for i in range(half):
            stream = block(stream, f"en_inblocks.{i}")
            kept.append(stream)
        for i in range(half):
            stream = block(stream, f"en_outblocks.{i}", kept[half - 1 - i])
        stream = stream + w["decoder_pos_embed"]
        for i in range(config.decode_layer):
            stream = block(stream, f"de_blocks.{i}", embedded)
    return _head(model, stream, c)


def _head(model: MDT | MDTv2, stream: Tensor, c: Tensor) -> Tensor:
    w, (rows, columns), patch = model.state_dict(), model.config.grid, model.config.patch_size
    shift, scale = linear(w, c * c.sigmoid(), "final_layer.adaLN_modulation.1").unsqueeze(1).chunk(2, dim=-1)
    out = linear(w, norm(stream) * (1 + scale) + shift, "final_layer.linear")
    image = torch.empty(len(out), model.config.out_channels, rows * patch, columns * patch)
    for token in range(rows * columns):
        row, column = token // columns * patch, token % columns * patch
        pixels = out[:, token].reshape(-1, patch, patch, model.config.out_channels).permute(0, 3, 1, 2)
        image[:, :, row : row + patch, column : column + patch] = pixels
    return image


@pytest.mark.parametrize("version", [MDT, MDTv2])
@pytest.mark.parametrize(
    "options",
    [{}, {"learn_sigma": True, "num_heads": 1}, {"depth": 8, "decode_layer": 4, "patch_size": 4, "mlp_ratio": 2.0}],
)
def test_the_forward_equals_the_model_written_out(version: type[MDT | MDTv2], options: dict[str, Any]) -> None:
    """Against an implementation that shares no code, in float32 (a few hundred roundings of 6e-8)."""
    which = mdt(version, **options)
    assert isinstance(which.model, version)
    with torch.no_grad():
        torch.testing.assert_close(which.model(*which.args), by_hand(which.model, *which.args), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("version", [MDT, MDTv2])
def test_places_on_a_grid_that_is_not_square(version: type[MDT | MDTv2]) -> None:
    """Rows and columns of the bias keep apart."""
    model = fill(
        version(input_size=(4, 8), hidden_size=16, depth=6, num_heads=2, num_classes=3, decode_layer=2), std=0.2
    )
    assert isinstance(model, version)
    args = (torch.randn(2, 4, 4, 8), torch.tensor([5, 600]), torch.tensor([0, 2]))
    with torch.no_grad():
        torch.testing.assert_close(model(*args), by_hand(model, *args), rtol=1e-4, atol=1e-4)


# --- weights


def public_checkpoint(model: MDT | MDTv2, path: Path) -> None:
    """A file as published: with the tensors that only masked training uses."""
    block = block_layout(model.config.hidden_size, model.config.num_heads, model.config.grid[0])
    extra = {f"sideblocks.0.{name}": torch.zeros(shape) for name, shape in block.items()}
    torch.save({**model.state_dict(), **extra, "mask_token": torch.zeros(1, 1, model.config.hidden_size)}, path)


@pytest.mark.parametrize("name", ["MDT-S/2", "MDTv2-S/2"])
def test_published_files_load_without_what_only_training_needs(tmp_path: Path, name: str) -> None:
    """The file names its model; its side block and mask token are left out, and nothing else may be."""
    kind = MDT if name.startswith("MDT-") else MDTv2
    model = kind.from_name(name, input_size=8)
    public_checkpoint(model, tmp_path / "w.pt")
    loaded = load_model(tmp_path / "w.pt")
    assert type(loaded) is kind
    assert loaded.config == model.config
    assert all(torch.equal(tensor, loaded.state_dict()[key]) for key, tensor in model.state_dict().items())
    torch.save({**model.state_dict(), "strange": torch.zeros(1)}, tmp_path / "w.pt")
    with pytest.raises(ModelError, match="strange is unknown to the model"):
        load_weights(kind.from_name(name, input_size=8), tmp_path / "w.pt")


@pytest.mark.parametrize("name", ["dit", "uvit", "mdt", "mdtv2"])
def test_saved_weights_of_all_families_need_no_arguments_to_load(tmp_path: Path, name: str) -> None:
    """Configuration and numbers round-trip; integer tables stay integers in half precision."""
    which = case(name)
    model: Any = which.model
    save_weights(model, tmp_path / "w.safetensors", torch.float32)
    loaded = load_model(tmp_path / "w.safetensors")
    assert (type(loaded), loaded.config) == (type(model), model.config)
    with torch.no_grad():
        assert torch.equal(loaded(*which.args), model(*which.args))
    save_weights(model, tmp_path / "half.safetensors")
    half = load_model(tmp_path / "half.safetensors")
    assert {key: tensor.dtype for key, tensor in half.state_dict().items()} == {
        key: tensor.dtype for key, tensor in model.state_dict().items()
    }


def test_a_file_of_another_family_is_named(tmp_path: Path) -> None:
    """Where a DiT is needed, and where the weights do not fit."""
    model = case("mdtv2").model
    assert isinstance(model, MDTv2)
    save_weights(model, tmp_path / "w.safetensors")
    with pytest.raises(ModelError, match="holds the weights of MDTv2, and a DiT is needed"):
        load_dit(tmp_path / "w.safetensors")
    message = r"It fits MDTv2\(hidden_size=16, depth=6, patch_size=2, .*decode_layer=2\) with the right num_heads"
    with pytest.raises(ModelError, match=message):
        load_weights(DiT(input_size=8, hidden_size=16, depth=2, num_heads=2), tmp_path / "w.safetensors")


def test_config_survives_json() -> None:
    """A config read back from JSON equals the one written, and builds the same model."""
    config = MDTv2(input_size=8, hidden_size=16, depth=6, num_heads=2, decode_layer=2).config
    assert config == MDTConfig.from_json(config.to_json()) == MDTv2.from_config(config).config


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"decode_layer": 6}, r"decode_layer 6 of depth 6: use 1..5"),
        ({"decode_layer": 3}, "decode_layer 3 of depth 6 leaves the encoder 3 blocks: it has two halves of one size"),
    ],
)
def test_impossible_decoders_are_refused(wrong: dict[str, int], message: str) -> None:
    """Each impossible split is named."""
    with pytest.raises(ModelError, match=message):
        MDTv2(input_size=8, hidden_size=16, depth=6, num_heads=2, **wrong)


# --- what tcc sees, and plans


def test_the_skips_of_version_2() -> None:
    """The decoder takes the embedded input. The first block after the middle takes its own stream twice: no skip."""
    info = case("mdtv2").info
    skips = {site.name: site.values for site in info.sites.values() if site.kind == "skip"}
    embedded = info.sites["en_inblocks.0.stream"].values
    assert skips == {
        "en_outblocks.1.skip": info.sites["en_inblocks.1.stream"].values,
        "de_blocks.0.skip": embedded,
        "de_blocks.1.skip": embedded,
    }
    assert info.blocks == tuple(f"{part}.{i}" for part in ("en_inblocks", "en_outblocks", "de_blocks") for i in (0, 1))
    assert all(site.prunable for site in info.sites.values() if site.kind not in ("stream", "skip"))
    assert (info.grid, info.image_tokens) == ((4, 4), (0, 16))


def assert_equal_the_reference(which: Case, plan: tcc.CachePlan) -> None:
    """Compiled without a backend, verified after each pass, on two images."""
    compiled, reference = session(which, plan, check=True), tcc.Reference(which.model, plan, which.info)
    for step in range(2 * plan.num_steps):
        assert relative_error(call(compiled, which, step), call(reference, which, step)) < CLOSE


@pytest.mark.parametrize("attention", ["kept", "current", "cached"])
@pytest.mark.parametrize("name", ["mdt", "mdtv2"])
def test_token_plans_equal_the_reference(name: str, attention: str) -> None:
    """The kept tokens' queries and keys see the biases of their own rows and columns."""
    plan = token_plan(name, attention=attention, tokens="checkerboard")
    assert_equal_the_reference(case(name), plan)


@pytest.mark.parametrize(("attention", "columns"), [("kept", 8), ("current", 16), ("cached", 16)])
def test_the_bias_is_cut_to_the_kept_tokens(attention: str, columns: int) -> None:
    """Rows always; columns where the keys are those of kept tokens alone."""
    variants = session(case("mdt"), token_plan("mdt", attention=attention, level="block")).executable.program.variants
    products = [n for n in variants[1].gm.graph.nodes if "scaled_dot_product" in str(n.target)]
    masks = {shape(n.kwargs.get("attn_mask") or n.args[3]) for n in products}
    assert masks == {(2, 8, columns)}


@pytest.mark.parametrize("name", ["mdt", "mdtv2"])
def test_reused_and_held_values_equal_the_reference(name: str) -> None:
    """FORA, the last stream, DeepCache and Faster Diffusion."""
    which = case(name)
    for plan in (
        tcc.plans.fora(which.info, num_steps=4, interval=2),
        hold_plan(),
        tcc.plans.deepcache(which.info, num_steps=4, interval=2),
        tcc.plans.faster_diffusion(which.info, num_steps=4, key_steps=2),
    ):
        assert_equal_the_reference(which, plan)


@pytest.mark.parametrize("name", ["mdt", "mdtv2"])
def test_a_plan_that_only_computes_is_the_model(name: str) -> None:
    """Bit for bit."""
    which = case(name)
    model = session(which, tcc.CachePlan(num_steps=2, actions={}))
    with torch.no_grad():
        assert all(torch.equal(call(model, which, step), call(which.model, which, step)) for step in range(2))
