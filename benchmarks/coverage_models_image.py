"""Entries: image models with one stream, text by cross-attention or not at all."""

from __future__ import annotations

import torch
from coverage_models import Parts, entry, levels, noise, ones, rotary, times


@entry("DiTTransformer2DModel")
def _dit() -> Parts:
    config = dict(num_attention_heads=2, attention_head_dim=16, in_channels=4, out_channels=8, num_layers=3)
    config |= dict(sample_size=8, patch_size=2, num_embeds_ada_norm=10)
    return config, dict(hidden_states=noise(2, 4, 8, 8), timestep=times(), class_labels=torch.tensor([1, 2]))


@entry("PixArtTransformer2DModel")
def _pixart() -> Parts:
    config = dict(num_attention_heads=2, attention_head_dim=16, in_channels=4, num_layers=3, sample_size=8)
    config |= dict(cross_attention_dim=32, caption_channels=24, use_additional_conditions=False)
    inputs = dict(hidden_states=noise(2, 4, 8, 8), encoder_hidden_states=noise(2, 7, 24), timestep=times())
    inputs |= dict(added_cond_kwargs={"resolution": None, "aspect_ratio": None})
    return config, inputs | dict(encoder_attention_mask=torch.tensor([[1.0] * 7, [1.0] * 4 + [0.0] * 3]))


@entry("SanaTransformer2DModel")
def _sana() -> Parts:
    config = dict(in_channels=4, out_channels=4, num_attention_heads=2, attention_head_dim=16, num_layers=3)
    config |= dict(num_cross_attention_heads=2, cross_attention_head_dim=16, cross_attention_dim=32)
    config |= dict(caption_channels=24, sample_size=8)
    return config, dict(hidden_states=noise(2, 4, 4, 6), encoder_hidden_states=noise(2, 7, 24), timestep=times())


@entry("HunyuanDiT2DModel")
def _hunyuan_dit() -> Parts:
    config = dict(num_attention_heads=2, attention_head_dim=16, hidden_size=32, in_channels=4, patch_size=2)
    config |= dict(sample_size=8, num_layers=6, mlp_ratio=2.0, cross_attention_dim=24, cross_attention_dim_t5=24)
    config |= dict(pooled_projection_dim=16, text_len=5, text_len_t5=6, activation_fn="gelu-approximate")
    inputs = dict(hidden_states=noise(2, 4, 8, 8), timestep=torch.full((2,), 500.0))
    inputs |= dict(encoder_hidden_states=noise(2, 5, 24), text_embedding_mask=ones(2, 5))
    inputs |= dict(encoder_hidden_states_t5=noise(2, 6, 24), text_embedding_mask_t5=ones(2, 6))
    inputs |= dict(image_meta_size=torch.full((2, 6), 8.0), style=torch.zeros(2, dtype=torch.int64))
    return config, inputs | dict(image_rotary_emb=rotary(16, 16))


@entry("LuminaNextDiT2DModel")
def _lumina_next() -> Parts:
    config = dict(sample_size=8, in_channels=4, hidden_size=32, num_layers=3, num_attention_heads=2, num_kv_heads=2)
    config |= dict(multiple_of=16, cross_attention_dim=24)
    angles = torch.arange(8)[:, None, None] * torch.ones(1, 8, 8) * torch.linspace(0.1, 1, 8)
    inputs = dict(hidden_states=noise(2, 4, 8, 8), timestep=levels(), encoder_hidden_states=noise(2, 7, 24))
    return config, inputs | dict(cross_attention_kwargs={}, encoder_mask=ones(2, 7), image_rotary_emb=_polar(angles))


def _polar(angles: torch.Tensor) -> torch.Tensor:
    return torch.polar(torch.ones_like(angles), angles)


@entry("Transformer2DModel")
def _transformer_2d() -> Parts:
    config = dict(num_attention_heads=2, attention_head_dim=16, in_channels=8, num_layers=3, norm_num_groups=4)
    config |= dict(cross_attention_dim=24)
    return config, dict(hidden_states=noise(2, 8, 4, 4), encoder_hidden_states=noise(2, 7, 24))


@entry("DreamLiteTransformer2DModel")
def _dream_lite() -> Parts:
    config = dict(num_attention_heads=2, attention_head_dim=16, in_channels=32, num_layers=3, norm_num_groups=4)
    config |= dict(cross_attention_dim=24, use_linear_projection=True, qk_norm="rms_norm")
    return config, dict(hidden_states=noise(2, 32, 4, 4), encoder_hidden_states=noise(2, 7, 24))


@entry("PRXTransformer2DModel")
def _prx() -> Parts:
    config = dict(in_channels=4, context_in_dim=24, hidden_size=32, mlp_ratio=2.0, num_heads=2, depth=3)
    config |= dict(axes_dim=[8, 8])
    return config, dict(hidden_states=noise(2, 4, 8, 8), timestep=levels(), encoder_hidden_states=noise(2, 7, 24))


@entry("Kandinsky6SRTransformer3DModel")
def _kandinsky6_sr() -> Parts:
    config = dict(in_visual_dim=4, out_visual_dim=8, time_dim=16, model_dim=32, ff_dim=64, num_visual_blocks=3)
    config |= dict(axes_dims=(4, 6, 6), nabla_window=(1, 1, 1))
    return config, dict(hidden_states=noise(1, 1, 16, 16, 9), timestep=times(1))


@entry("UVit2DModel", changing=("encoder_hidden_states", "pooled_text_emb"))
def _uvit_2d() -> Parts:
    config = dict(hidden_size=32, cond_embed_dim=16, encoder_hidden_size=24, vocab_size=32, codebook_size=24)
    config |= dict(in_channels=32, block_out_channels=32, num_res_blocks=1, num_hidden_layers=3, sample_size=4)
    config |= dict(num_attention_heads=2, block_num_heads=2, intermediate_size=64, micro_cond_encode_dim=8)
    config |= dict(micro_cond_embed_dim=40)
    inputs = dict(input_ids=torch.arange(32).reshape(2, 4, 4) % 24, encoder_hidden_states=noise(2, 7, 24))
    return config, inputs | dict(pooled_text_emb=noise(2, 16), micro_conds=torch.full((2, 5), 4.0))
