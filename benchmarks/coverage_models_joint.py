"""Entries: image models whose text takes part in the attention, in streams of its own or beside the image."""

from __future__ import annotations

from typing import Any

import torch
from coverage_models import Parts, entry, grid_ids, levels, noise, ones, times

HEADS: dict[str, Any] = dict(attention_head_dim=16, num_attention_heads=2)


@entry("SD3Transformer2DModel")
def _sd3() -> Parts:
    config = dict(sample_size=8, in_channels=4, out_channels=4, num_layers=3, joint_attention_dim=24, **HEADS)
    config |= dict(caption_projection_dim=32, pooled_projection_dim=20, pos_embed_max_size=8, qk_norm="rms_norm")
    config |= dict(dual_attention_layers=(0,))
    inputs = dict(hidden_states=noise(2, 4, 8, 8), encoder_hidden_states=noise(2, 7, 24), timestep=times())
    return config, inputs | dict(pooled_projections=noise(2, 20))


@entry("AuraFlowTransformer2DModel")
def _aura_flow() -> Parts:
    config = dict(sample_size=8, num_mmdit_layers=2, num_single_dit_layers=2, joint_attention_dim=24, **HEADS)
    config |= dict(caption_projection_dim=32, pos_embed_max_size=64)
    return config, dict(hidden_states=noise(2, 4, 8, 8), encoder_hidden_states=noise(2, 7, 24), timestep=levels())


def _flux_inputs(channels: int, text: int, axes: int = 3) -> dict[str, Any]:
    inputs = dict(hidden_states=noise(2, 12, channels), encoder_hidden_states=noise(2, 7, text), timestep=levels())
    return inputs | dict(img_ids=grid_ids(3, 4, axes=axes), txt_ids=torch.zeros(7, axes))


@entry("FluxTransformer2DModel")
def _flux() -> Parts:
    config = dict(in_channels=8, num_layers=2, num_single_layers=2, joint_attention_dim=24, **HEADS)
    config |= dict(pooled_projection_dim=20, guidance_embeds=True, axes_dims_rope=(4, 6, 6))
    return config, _flux_inputs(8, 24) | dict(pooled_projections=noise(2, 20), guidance=torch.full((2,), 3.5))


@entry("Flux2Transformer2DModel")
def _flux2() -> Parts:
    config = dict(in_channels=8, num_layers=2, num_single_layers=2, joint_attention_dim=24, **HEADS)
    config |= dict(timestep_guidance_channels=16, axes_dims_rope=(4, 4, 4, 4))
    return config, _flux_inputs(8, 24, axes=4) | dict(guidance=torch.full((2,), 3.5))


@entry("Flux3Transformer2DModel")
def _flux3() -> Parts:
    config = dict(in_channels=8, cond_in_channels=8, num_layers=2, num_single_layers=2, **HEADS)
    config |= dict(joint_attention_dim=24, timestep_channels=16, axes_dims_rope=(4, 4, 4, 4))
    inputs = _flux_inputs(8, 24, axes=4)
    return config, inputs | dict(image_cond_hidden_states=noise(2, 6, 8), image_cond_ids=grid_ids(2, 3, axes=4))


@entry("BriaTransformer2DModel")
def _bria() -> Parts:
    config = dict(in_channels=8, num_layers=2, num_single_layers=2, joint_attention_dim=24, **HEADS)
    config |= dict(pooled_projection_dim=None, axes_dims_rope=[4, 6, 6])
    return config, _flux_inputs(8, 24) | dict(timestep=times())


@entry("BriaFiboTransformer2DModel")
def _bria_fibo() -> Parts:
    config = dict(in_channels=8, num_layers=2, num_single_layers=2, joint_attention_dim=24, **HEADS)
    config |= dict(pooled_projection_dim=None, axes_dims_rope=[4, 6, 6], text_encoder_dim=20)
    return config, _flux_inputs(8, 24) | dict(timestep=times(), text_encoder_layers=[noise(2, 7, 20)] * 4)


@entry("BriaFibo2Transformer2DModel", note="without a text mask: with one, tensor values set the number of gist tokens")
def _bria_fibo2() -> Parts:
    config = dict(in_channels=4, dim=32, n_layers=3, n_refiner_layers=2, n_heads=2, cap_feat_dim=24)
    config |= dict(injection_layer_ids=(1,), perceiver_num_layers=2, min_num_gist_tokens=3, max_num_gist_tokens=4)
    config |= dict(gist_step=1, gist_min_text_len=4, gist_max_text_len=8, axes_dims=(4, 6, 6), axes_lens=(32, 32, 32))
    inputs = dict(hidden_states=noise(2, 4, 8, 8), timestep=levels(), encoder_hidden_states=noise(2, 2, 7, 24))
    return config, inputs


@entry("ChromaTransformer2DModel")
def _chroma() -> Parts:
    config = dict(in_channels=8, num_layers=2, num_single_layers=2, joint_attention_dim=24, **HEADS)
    config |= dict(axes_dims_rope=(4, 6, 6), approximator_num_channels=16, approximator_hidden_dim=16)
    return config | dict(approximator_layers=2), _flux_inputs(8, 24)


@entry("OvisImageTransformer2DModel")
def _ovis() -> Parts:
    config = dict(in_channels=8, out_channels=8, num_layers=2, num_single_layers=2, **HEADS)
    return config | dict(joint_attention_dim=24, axes_dims_rope=(4, 6, 6)), _flux_inputs(8, 24)


@entry("LongCatImageTransformer2DModel")
def _longcat_image() -> Parts:
    config = dict(in_channels=8, num_layers=2, num_single_layers=2, joint_attention_dim=24, **HEADS)
    return config | dict(pooled_projection_dim=24, axes_dims_rope=[4, 6, 6]), _flux_inputs(8, 24)


@entry("CogView3PlusTransformer2DModel")
def _cogview3() -> Parts:
    config = dict(in_channels=4, out_channels=4, num_layers=3, text_embed_dim=24, time_embed_dim=16, **HEADS)
    config |= dict(condition_dim=4, pos_embed_max_size=8, sample_size=8)
    return config, _cogview_inputs() | dict(original_size=_size(8, 8))


@entry("CogView4Transformer2DModel")
def _cogview4() -> Parts:
    config = dict(in_channels=4, out_channels=4, num_layers=3, text_embed_dim=24, time_embed_dim=16, **HEADS)
    config |= dict(condition_dim=4, pos_embed_max_size=8, sample_size=8, rope_axes_dim=(16, 16))
    return config, _cogview_inputs() | dict(original_size=_size(8, 8))


@entry("GlmImageTransformer2DModel")
def _glm_image() -> Parts:
    config = dict(in_channels=4, out_channels=4, num_layers=3, text_embed_dim=24, time_embed_dim=16, **HEADS)
    config |= dict(condition_dim=4, prior_vq_quantizer_codebook_size=32)
    inputs = _cogview_inputs() | dict(prior_token_id=torch.arange(32).reshape(2, 16))
    return config, inputs | dict(prior_token_drop=torch.zeros(2, 16, dtype=torch.bool))


def _cogview_inputs() -> dict[str, Any]:
    inputs = dict(hidden_states=noise(2, 4, 8, 8), encoder_hidden_states=noise(2, 7, 24), timestep=times())
    return inputs | dict(target_size=_size(8, 8), crop_coords=_size(0, 0))


def _size(height: int, width: int) -> torch.Tensor:
    return torch.tensor([[height, width]] * 2, dtype=torch.float32)


@entry("ErnieImageTransformer2DModel")
def _ernie() -> Parts:
    config = dict(hidden_size=32, num_attention_heads=2, num_layers=3, ffn_hidden_size=64, in_channels=4)
    config |= dict(out_channels=4, text_in_dim=24, rope_axes_dim=(4, 6, 6))
    inputs = dict(hidden_states=noise(2, 4, 4, 4), timestep=times(), text_bth=noise(2, 7, 24))
    return config, inputs | dict(text_lens=torch.tensor([7, 5]))


@entry("HiDreamImageTransformer2DModel", note="dense feed-forwards: the routed experts loop over counted rows")
def _hidream() -> Parts:
    config = dict(patch_size=2, in_channels=4, num_layers=2, num_single_layers=2, caption_channels=[24, 20], **HEADS)
    config |= dict(text_emb_dim=16, num_routed_experts=0, num_activated_experts=0, axes_dims_rope=(4, 6, 6))
    config |= dict(max_resolution=(8, 8), llama_layers=[0, 1, 1, 0])
    inputs = dict(hidden_states=noise(2, 12, 16), hidden_states_masks=torch.ones(2, 12), img_sizes=[(3, 4)] * 2)
    inputs |= dict(img_ids=grid_ids(3, 4).expand(2, -1, -1), timesteps=times(), pooled_embeds=noise(2, 16))
    inputs |= dict(encoder_hidden_states_t5=noise(2, 5, 24))
    return config, inputs | dict(encoder_hidden_states_llama3=noise(2, 2, 6, 20))


@entry("HunyuanImageTransformer2DModel", note="one text: the second is packed by a mask into unknown lengths")
def _hunyuan_image() -> Parts:
    config = dict(in_channels=4, out_channels=4, num_layers=2, num_single_layers=2, num_refiner_layers=2, **HEADS)
    config |= dict(mlp_ratio=2.0, text_embed_dim=24, rope_axes_dim=(8, 8))
    inputs = dict(hidden_states=noise(2, 4, 4, 4), timestep=times().float(), encoder_hidden_states=noise(2, 7, 24))
    return config, inputs | dict(encoder_attention_mask=ones(2, 7))


@entry("Ideogram4Transformer2DModel")
def _ideogram() -> Parts:
    config = dict(in_channels=8, num_layers=3, intermediate_size=64, adaln_dim=16, llm_features_dim=24, **HEADS)
    config |= dict(mrope_section=(4, 2, 2))
    kinds = torch.tensor([[3] * 7 + [2] * 12] * 2)  # text, then image
    places = torch.cat([torch.arange(7.0)[:, None].expand(-1, 3), grid_ids(3, 4)]).expand(2, -1, -1)
    inputs = dict(hidden_states=noise(2, 19, 8), timestep=levels(), encoder_hidden_states=noise(2, 19, 24))
    return config, inputs | dict(position_ids=places.long(), segment_ids=ones(2, 19), indicator=kinds)


@entry("Krea2Transformer2DModel")
def _krea() -> Parts:
    config = dict(in_channels=8, num_layers=3, num_key_value_heads=1, intermediate_size=64, **HEADS)
    config |= dict(timestep_embed_dim=16, text_hidden_dim=24, num_text_layers=4, text_num_attention_heads=2)
    config |= dict(text_num_key_value_heads=2, text_intermediate_size=32, axes_dims_rope=(4, 6, 6))
    inputs = dict(hidden_states=noise(2, 12, 8), encoder_hidden_states=noise(2, 7, 4, 24), timestep=levels())
    return config, inputs | dict(position_ids=torch.cat([torch.zeros(7, 3), grid_ids(3, 4)]))


@entry("Lumina2Transformer2DModel")
def _lumina2() -> Parts:
    config = dict(sample_size=8, in_channels=4, hidden_size=32, num_layers=3, num_refiner_layers=2, num_kv_heads=1)
    config |= dict(num_attention_heads=2, multiple_of=16, axes_dim_rope=(4, 6, 6), axes_lens=(32, 16, 16))
    inputs = dict(hidden_states=noise(2, 4, 8, 8), timestep=levels(), encoder_hidden_states=noise(2, 7, 24))
    return config | dict(cap_feat_dim=24), inputs | dict(encoder_attention_mask=ones(2, 7))


@entry("NucleusMoEImageTransformer2DModel")
def _nucleus() -> Parts:
    config = dict(
        in_channels=16, out_channels=4, num_layers=5, joint_attention_dim=24, axes_dims_rope=(4, 6, 6), **HEADS
    )
    config |= dict(mlp_ratio=2.0, num_experts=4, moe_intermediate_dim=16, num_key_value_heads=1)
    config |= dict(capacity_factors=[2.0] * 5, dense_moe_strategy="leave_first_three_blocks_dense")
    inputs = dict(hidden_states=noise(2, 12, 16), img_shapes=[(1, 3, 4)] * 2, encoder_hidden_states=noise(2, 7, 24))
    return config, inputs | dict(encoder_hidden_states_mask=ones(2, 7).bool(), timestep=levels())


@entry("OmniGenTransformer2DModel")
def _omnigen() -> Parts:
    config = dict(in_channels=4, hidden_size=32, num_attention_heads=2, num_key_value_heads=2, intermediate_size=64)
    config |= dict(num_layers=3, pad_token_id=0, vocab_size=50, pos_embed_max_size=8, time_step_dim=16)
    config |= dict(max_position_embeddings=64, original_max_position_embeddings=32)
    config |= dict(rope_scaling={"short_factor": [1.0] * 8, "long_factor": [1.1] * 8, "type": "su"})
    inputs = dict(hidden_states=noise(2, 4, 8, 8), timestep=levels(), input_ids=torch.arange(14).reshape(2, 7))
    inputs |= dict(input_img_latents=[], input_image_sizes={}, attention_mask=torch.ones(2, 24, 24))
    return config, inputs | dict(position_ids=torch.arange(24).expand(2, -1))


@entry("QwenImageTransformer2DModel")
def _qwen() -> Parts:
    config = dict(
        in_channels=16, out_channels=4, num_layers=3, joint_attention_dim=24, axes_dims_rope=(4, 6, 6), **HEADS
    )
    inputs = dict(hidden_states=noise(2, 12, 16), encoder_hidden_states=noise(2, 7, 24), timestep=levels())
    return config, inputs | dict(encoder_hidden_states_mask=ones(2, 7), img_shapes=[[(1, 3, 4)]] * 2)


@entry("QwenImage21Transformer2DModel")
def _qwen21() -> Parts:
    config = dict(in_channels=16, out_channels=16, num_layers=3, context_in_dim=24, axes_dims_rope=(4, 6, 6), **HEADS)
    inputs = dict(hidden_states=noise(2, 16, 16), encoder_hidden_states=noise(2, 7, 24), timestep=levels())
    return config, inputs | dict(img_shapes=[[(1, 4, 4)]] * 2, img_mask=torch.tensor([[False] * 7 + [True] * 4] * 2))


@entry("ZImageTransformer2DModel")
def _z_image() -> Parts:
    config = dict(in_channels=4, dim=32, n_layers=3, n_refiner_layers=2, n_heads=2, n_kv_heads=2, cap_feat_dim=24)
    config |= dict(axes_dims=[4, 6, 6], axes_lens=[128, 32, 32])
    inputs = dict(x=[noise(4, 1, 12, 12), noise(4, 1, 12, 12, seed=8)], t=levels())
    return config, inputs | dict(cap_feats=[noise(11, 24), noise(11, 24, seed=8)])
