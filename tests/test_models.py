"""The DiT architecture, its weight files, and the shipped model."""

from __future__ import annotations

import argparse
import re
from pathlib import Path

import pytest
import safetensors.torch
import torch
from torch.utils.flop_counter import FlopCounterMode

from tcc.errors import ModelError
from tcc.models import DiT, DiTConfig, load_dit, load_weights, reference_model, save_weights
from tcc.models.dit import sincos_positions

BLOCK = {
    "attn.qkv.weight": (1152, 384),
    "attn.qkv.bias": (1152,),
    "attn.proj.weight": (384, 384),
    "attn.proj.bias": (384,),
    "mlp.fc1.weight": (1536, 384),
    "mlp.fc1.bias": (1536,),
    "mlp.fc2.weight": (384, 1536),
    "mlp.fc2.bias": (384,),
    "adaLN_modulation.1.weight": (2304, 384),
    "adaLN_modulation.1.bias": (2304,),
}
DIT_S_2 = {
    "pos_embed": (1, 256, 384),
    "x_embedder.proj.weight": (384, 4, 2, 2),
    "x_embedder.proj.bias": (384,),
    "t_embedder.mlp.0.weight": (384, 256),
    "t_embedder.mlp.0.bias": (384,),
    "t_embedder.mlp.2.weight": (384, 384),
    "t_embedder.mlp.2.bias": (384,),
    "y_embedder.embedding_table.weight": (1001, 384),
    **{f"blocks.{n}.{name}": shape for n in range(12) for name, shape in BLOCK.items()},
    "final_layer.linear.weight": (32, 384),
    "final_layer.linear.bias": (32,),
    "final_layer.adaLN_modulation.1.weight": (768, 384),
    "final_layer.adaLN_modulation.1.bias": (768,),
}


def tiny(**overrides: object) -> DiT:
    """A DiT of 16 tokens, width 32 and two blocks whose gates are open."""
    sizes = {
        "input_size": 8,
        "in_channels": 4,
        "hidden_size": 32,
        "depth": 2,
        "num_heads": 2,
        "num_classes": 5,
    }
    model = DiT(**{**sizes, **overrides}).eval()
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.copy_(0.1 * torch.randn(parameter.shape, generator=generator))
    return model


def inputs(model: DiT, batch: int = 2) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """A seeded batch for a model."""
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(batch, model.config.in_channels, *model.config.input_size, generator=generator)
    return x, torch.arange(batch) * 100, torch.arange(batch)


def test_names_and_shapes_are_those_of_the_public_checkpoints() -> None:
    """DiT-S/2 has exactly the tensors of the public state dict."""
    with torch.device("meta"):
        state = DiT.from_name("DiT-S/2", input_size=32).state_dict()

    assert {name: tuple(tensor.shape) for name, tensor in state.items()} == DIT_S_2


@pytest.mark.parametrize(
    ("name", "size", "gmacs"),
    [
        ("DiT-S/2", 32, 6.056),
        ("DiT-B/2", 32, 23.005),
        ("DiT-L/2", 32, 80.698),
        ("DiT-XL/2", 32, 118.621),
        ("DiT-XL/2", 64, 524.538),
    ],
)
def test_macs_equal_the_published_anchors(name: str, size: int, gmacs: float) -> None:
    """Matmuls, convolutions, attention products and adaLN add up to the published MACs."""
    with torch.device("meta"), FlopCounterMode(display=False) as counter:
        model = DiT.from_name(name, input_size=size)
        model(torch.empty(1, 4, size, size), torch.empty(1), torch.empty(1, dtype=torch.int64))

    assert round(counter.get_total_flops() / 2e9, 3) == gmacs


def test_parameter_count_of_xl() -> None:
    """DiT-XL/2 has 675.1 million parameters, fixed positions included."""
    with torch.device("meta"):
        count = sum(parameter.numel() for parameter in DiT.from_name("DiT-XL/2").parameters())

    assert round(count / 1e6, 1) == 675.1


def test_positions_follow_the_formula() -> None:
    """Token (row 1, column 2): first half sin, cos of the column, second half of the row; all fixed."""
    width, row, column = 8, 1, 2
    omega = [1.0, 10000 ** (-1 / 2)]
    expected = [f(torch.tensor(p * w)) for p in (column, row) for f in (torch.sin, torch.cos) for w in omega]

    positions = sincos_positions(width, (2, 3))

    assert positions.shape == (1, 6, width)
    torch.testing.assert_close(positions[0, row * 3 + column], torch.stack(expected), rtol=1e-6, atol=1e-6)
    assert not DiT(input_size=4, hidden_size=8, depth=1, num_heads=1).pos_embed.requires_grad


def test_a_fresh_model_predicts_zero() -> None:
    """adaLN-Zero: the head starts at zero, so a fresh model's output is exactly zero."""
    model = DiT(input_size=8, hidden_size=32, depth=2, num_heads=2, num_classes=5).eval()

    assert model(*inputs(model)).count_nonzero() == 0


def test_a_fresh_block_is_the_identity() -> None:
    """adaLN-Zero: the gates start at zero, so a fresh block returns its stream unchanged."""
    model = DiT(input_size=8, hidden_size=32, depth=1, num_heads=2).eval()
    x, c = torch.randn(2, 16, 32), torch.randn(2, 32)

    assert torch.equal(x, model.blocks[0](x, c))


@pytest.mark.parametrize(("learn_sigma", "channels"), [(True, 8), (False, 4)])
def test_learned_sigma_doubles_the_channels(learn_sigma: bool, channels: int) -> None:
    """The output has 2C channels with learned sigma and C without."""
    model = tiny(learn_sigma=learn_sigma)

    assert model(*inputs(model)).shape == (2, channels, 8, 8)


def test_patches_and_pixels_agree_on_a_rectangle() -> None:
    """Unpatchify puts token (row, column), pixel (i, j), channel c at [c, row * P + i, column * P + j]."""
    model = tiny(input_size=(4, 8), learn_sigma=False)
    image = torch.arange(4 * 4 * 8.0).view(1, 4, 4, 8)
    tokens = image.view(1, 4, 2, 2, 4, 2).permute(0, 2, 4, 3, 5, 1).reshape(1, 8, 16)

    assert torch.equal(image, model.unpatchify(tokens))


def test_labels_drop_to_the_null_class_in_training_only() -> None:
    """With dropout 1, training sees the null row for every label; eval sees the label."""
    model = tiny(class_dropout_prob=1.0)
    labels = torch.tensor([0, 3])
    table = model.y_embedder.embedding_table.weight

    assert torch.equal(table[labels], model.y_embedder(labels))
    assert torch.equal(table[[5, 5]], model.y_embedder.train()(labels))


def test_no_dropout_means_no_null_row() -> None:
    """Without class dropout the table has one row per class and the config names no null class."""
    model = tiny(class_dropout_prob=0.0)

    assert len(model.y_embedder.embedding_table.weight) == 5
    assert model.config.null_class is None
    assert tiny().config.null_class == 5


def test_export_captures_the_forward_whole() -> None:
    """torch.export (non-strict) returns the same numbers as the model."""
    model = tiny()
    program = torch.export.export(model, inputs(model), strict=False)

    assert torch.equal(model(*inputs(model)), program.module()(*inputs(model)))


def test_fractional_timesteps_embed_like_integers() -> None:
    """A float t and the equal int64 t give the same output."""
    model = tiny()
    x, t, y = inputs(model)

    assert torch.equal(model(x, t, y), model(x, t.float(), y))


def test_unknown_name_lists_the_sizes() -> None:
    """from_name names the offender and the choices."""
    with pytest.raises(ModelError, match=r"unknown DiT size 'DiT-XS/2'; choose one of DiT-S/2, .*DiT-XL/8"):
        DiT.from_name("DiT-XS/2")


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"input_size": 9}, "input_size 9x9 is not a multiple of patch_size 2"),
        ({"num_heads": 5}, "num_heads 5 does not divide hidden_size 32"),
        ({"hidden_size": 34}, "hidden_size 34 is not a multiple of 4"),
        ({"class_dropout_prob": 1.5}, r"class_dropout_prob must lie in \[0, 1\], got 1.5"),
    ],
)
def test_impossible_sizes_are_refused(wrong: dict[str, float], message: str) -> None:
    """Each impossible size is named."""
    with pytest.raises(ModelError, match=message):
        tiny(**wrong)


def test_config_survives_json() -> None:
    """A config read back from JSON equals the one written."""
    config = tiny(input_size=(4, 8)).config

    assert config == DiTConfig.from_json(config.to_json())


def test_saved_weights_need_no_arguments_to_load(tmp_path: Path) -> None:
    """save_weights and load_dit round-trip the configuration and the numbers."""
    model = tiny()
    save_weights(model, tmp_path / "w.safetensors", dtype=torch.float32)

    loaded = load_dit(tmp_path / "w.safetensors")

    assert model.config == loaded.config
    assert torch.equal(model(*inputs(model)), loaded(*inputs(model)))


def test_half_precision_storage_keeps_the_positions_exact(tmp_path: Path) -> None:
    """A float16 file loads as float32, with the fixed positions unrounded."""
    model = tiny()
    save_weights(model, tmp_path / "w.safetensors")

    loaded = load_dit(tmp_path / "w.safetensors")

    assert {torch.float32} == {tensor.dtype for tensor in loaded.state_dict().values()}
    assert torch.equal(model.pos_embed, loaded.pos_embed)
    half = model.blocks[0].attn.qkv.weight.half().float()
    assert torch.equal(half, loaded.blocks[0].attn.qkv.weight)


@pytest.mark.parametrize("wrapper", [None, "ema", "model"])
def test_published_pt_files_load(tmp_path: Path, wrapper: str | None) -> None:
    """A .pt state dict loads strictly, bare or wrapped; 'ema' wins over 'model'."""
    model = tiny()
    state: dict[str, object] = dict(model.state_dict())
    if wrapper:
        worse = {name: torch.zeros_like(tensor) for name, tensor in model.state_dict().items()}
        state = {"model": worse, "args": argparse.Namespace(model="DiT"), wrapper: state}
    torch.save(state, tmp_path / "w.pt")

    loaded = load_weights(tiny(), tmp_path / "w.pt")

    assert torch.equal(model(*inputs(model)), loaded(*inputs(model)))


def test_published_pt_files_name_their_model(tmp_path: Path) -> None:
    """load_dit infers the configuration of a published size from the shapes alone."""
    model = DiT.from_name("DiT-S/8", input_size=16, num_classes=7)
    torch.save(model.state_dict(), tmp_path / "w.pt")

    assert model.config == load_dit(tmp_path / "w.pt").config


class Surprise:
    """An object that runs code when unpickled."""

    def __reduce__(self) -> tuple[object, tuple[str]]:
        return print, ("unpickled",)


def test_pickled_objects_are_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A .pt file that would run code is refused, and the code does not run."""
    torch.save({"ema": tiny().state_dict(), "extra": Surprise()}, tmp_path / "w.pt")

    with pytest.raises(ModelError, match="holds pickled objects, which tcc refuses to run"):
        load_weights(tiny(), tmp_path / "w.pt")
    assert capsys.readouterr().out == ""


@pytest.mark.parametrize(
    ("content", "message"),
    [([1, 2], "holds no state dict"), ({"lr": 0.1}, "holds no state dict"), (None, "holds no state dict")],
)
def test_files_without_a_state_dict_are_refused(tmp_path: Path, content: object, message: str) -> None:
    """Plain data that is no state dict is refused."""
    torch.save(content, tmp_path / "w.pt")

    with pytest.raises(ModelError, match=message):
        load_weights(tiny(), tmp_path / "w.pt")


def test_wrong_shapes_say_which_model_fits(tmp_path: Path) -> None:
    """Weights of DiT-S/8 in another model: the error names tensor, shapes and constructor."""
    torch.save(DiT.from_name("DiT-S/8", input_size=16).state_dict(), tmp_path / "w.pt")
    message = (
        r"w\.pt does not fit this model: pos_embed is \[1, 4, 384\] in the file and "
        r"\[1, 16, 32\] in the model \(and \d+ more\)\. It fits DiT\.from_name\(\"DiT-S/8\", "
        r"input_size=16, in_channels=4, num_classes=1000, class_dropout_prob=0\.1, learn_sigma=True\)"
    )
    with pytest.raises(ModelError, match=message):
        load_weights(tiny(), tmp_path / "w.pt")


def test_wrong_custom_shapes_say_which_sizes_fit(tmp_path: Path) -> None:
    """Weights of no published size: the error spells out the sizes."""
    save_weights(tiny(depth=1), tmp_path / "w.safetensors")

    with pytest.raises(ModelError, match=r"blocks\.1.* It fits DiT\(hidden_size=32, depth=1, patch_size=2"):
        load_weights(tiny(), tmp_path / "w.safetensors")


def test_missing_tensors_are_named(tmp_path: Path) -> None:
    """A state dict that lacks a tensor is refused by the tensor's name."""
    state = tiny().state_dict()
    del state["final_layer.linear.bias"]
    safetensors.torch.save_file(state, tmp_path / "w.safetensors")

    with pytest.raises(ModelError, match=re.escape("final_layer.linear.bias is missing from the file")):
        load_weights(tiny(), tmp_path / "w.safetensors")


def test_weights_of_something_else_are_refused(tmp_path: Path) -> None:
    """A safetensors file of another network is named as no DiT."""
    safetensors.torch.save_file({"fc.weight": torch.zeros(2, 2)}, tmp_path / "w.safetensors")

    with pytest.raises(ModelError, match="not the weights of a DiT"):
        load_dit(tmp_path / "w.safetensors")
    with pytest.raises(ModelError, match="It holds no weights of a DiT"):
        load_weights(tiny(), tmp_path / "w.safetensors")


def test_unpublished_width_needs_heads(tmp_path: Path) -> None:
    """Without a header and with an unpublished width, load_dit asks for num_heads and then works."""
    model = tiny()
    torch.save(model.state_dict(), tmp_path / "w.pt")

    with pytest.raises(ModelError, match="depth 2 and width 32: pass num_heads"):
        load_dit(tmp_path / "w.pt")
    assert model.config == load_dit(tmp_path / "w.pt", num_heads=2).config


def test_damaged_and_missing_files_are_refused(tmp_path: Path) -> None:
    """A missing file, a cut safetensors file and a cut .pt file each get their own sentence."""
    save_weights(tiny(), tmp_path / "w.safetensors")
    (tmp_path / "cut.safetensors").write_bytes((tmp_path / "w.safetensors").read_bytes()[:1000])
    (tmp_path / "cut.pt").write_bytes(b"")

    with pytest.raises(ModelError, match="there is no weight file at"):
        load_dit(tmp_path / "none.pt")
    with pytest.raises(ModelError, match="is not a readable safetensors file"):
        load_dit(tmp_path / "cut.safetensors")
    with pytest.raises(ModelError, match="is not a plain PyTorch weight file"):
        load_dit(tmp_path / "cut.pt")


def test_reference_model_is_shipped() -> None:
    """The shipped model loads without arguments and has the promised sizes."""
    model = reference_model()

    assert not model.training
    assert (model.config.num_tokens, model.config.depth, model.config.hidden_size) == (64, 12, 128)
    assert model.config.null_class == 10
    assert sum(parameter.numel() for parameter in model.parameters()) == 3_658_256
    assert torch.equal(sincos_positions(128, (8, 8)), model.pos_embed)
