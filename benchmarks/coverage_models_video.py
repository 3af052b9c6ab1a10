"""Entries: video models."""

from __future__ import annotations

from typing import Any

import torch
from coverage_models import Parts, entry, levels, noise, ones, rotary, times

HEADS: dict[str, Any] = dict(attention_head_dim=16, num_attention_heads=2)
#: A latent video `[B, C, frames, height, width]` of 2 x 2 x 3 tokens.
VIDEO = (2, 4, 2, 4, 6)


@entry("CogVideoXTransformer3DModel")
def _cogvideox() -> Parts:
    config = dict(in_channels=4, out_channels=4, time_embed_dim=16, text_embed_dim=24, num_layers=3, **HEADS)
    config |= dict(sample_width=6, sample_height=4, sample_frames=5, max_text_seq_length=7)
    config |= dict(use_rotary_positional_embeddings=True)
    inputs = dict(hidden_states=noise(2, 2, 4, 4, 6), encoder_hidden_states=noise(2, 7, 24), timestep=times())
    return config, inputs | dict(image_rotary_emb=rotary(12, 16))


@entry("ConsisIDTransformer3DModel")
def _consisid() -> Parts:
    config = dict(in_channels=4, out_channels=4, time_embed_dim=16, text_embed_dim=24, num_layers=4)
    config |= dict(num_attention_heads=3, attention_head_dim=16)
    config |= dict(sample_width=6, sample_height=4, sample_frames=5, max_text_seq_length=7, is_train_face=True)
    config |= dict(use_rotary_positional_embeddings=True, cross_attn_dim_head=8, cross_attn_num_heads=2)
    config |= dict(LFE_id_dim=16, LFE_vit_dim=16, LFE_depth=5, LFE_dim_head=8, LFE_num_heads=2, LFE_num_id_token=2)
    config |= dict(LFE_num_querie=4, LFE_output_dim=32, LFE_ff_mult=1, LFE_num_scale=5)
    inputs = dict(hidden_states=noise(2, 2, 4, 4, 6), encoder_hidden_states=noise(2, 7, 24), timestep=times())
    inputs |= dict(image_rotary_emb=rotary(12, 16), id_cond=noise(2, 16))
    return config, inputs | dict(id_vit_hidden=[noise(2, 3, 16, seed=i) for i in range(5)])


@entry("LatteTransformer3DModel")
def _latte() -> Parts:
    config = dict(in_channels=4, out_channels=4, num_layers=3, sample_size=8, patch_size=2, video_length=3, **HEADS)
    config |= dict(cross_attention_dim=32, attention_bias=True, activation_fn="gelu-approximate", caption_channels=24)
    config |= dict(num_embeds_ada_norm=100, norm_type="ada_norm_single", norm_elementwise_affine=False)
    return config, dict(hidden_states=noise(2, 4, 3, 8, 8), timestep=times(), encoder_hidden_states=noise(2, 7, 24))


@entry("AllegroTransformer3DModel")
def _allegro() -> Parts:
    config = dict(num_attention_heads=2, attention_head_dim=24, num_layers=3, cross_attention_dim=48)
    config |= dict(sample_height=4, sample_width=6, sample_frames=2, caption_channels=24)
    inputs = dict(hidden_states=noise(*VIDEO), encoder_hidden_states=noise(2, 7, 24), timestep=times())
    inputs |= dict(attention_mask=torch.ones(2, 2, 4, 6), encoder_attention_mask=ones(2, 7))
    places = torch.cartesian_prod(torch.arange(2), torch.arange(2), torch.arange(3)).T.reshape(3, 1, 12)
    return config, inputs | dict(image_rotary_emb=((rotary(3, 8),) * 3, tuple(places.contiguous())))


def _wan(**more: Any) -> dict[str, Any]:
    config = dict(in_channels=4, out_channels=4, text_dim=24, freq_dim=16, ffn_dim=64, num_layers=3, **HEADS)
    return config | more


def _wan_inputs(channels: int = 4, frames: int = 2) -> dict[str, Any]:
    return dict(hidden_states=noise(2, channels, frames, 4, 6), timestep=times(), encoder_hidden_states=noise(2, 7, 24))


@entry("WanTransformer3DModel")
def _wan_entry() -> Parts:
    return _wan(rope_max_seq_len=32), _wan_inputs()


@entry("WanVACETransformer3DModel")
def _wan_vace() -> Parts:
    config = _wan(rope_max_seq_len=32, num_layers=4, vace_layers=[0, 2], vace_in_channels=6)
    inputs = _wan_inputs() | dict(control_hidden_states=noise(2, 6, 2, 4, 6))
    return config, inputs | dict(control_hidden_states_scale=torch.ones(2))


@entry("WanAnimateTransformer3DModel")
def _wan_animate() -> Parts:
    config = _wan(in_channels=12, latent_channels=4, num_layers=4, rope_max_seq_len=32, inject_face_latents_blocks=2)
    config |= dict(image_dim=None, motion_encoder_channel_sizes={"4": 16, "8": 16, "16": 16}, motion_encoder_size=16)
    config |= dict(motion_style_dim=8, motion_dim=4, motion_encoder_dim=16, face_encoder_hidden_dim=16)
    config |= dict(face_encoder_num_heads=2)
    inputs = _wan_inputs(12, 3) | dict(pose_hidden_states=noise(2, 4, 2, 4, 6))
    return config, inputs | dict(face_pixel_values=noise(2, 3, 5, 16, 16))


@entry("WanAnimate2Transformer3DModel", note="its cache is an object that it writes to; grid sizes are read as numbers")
def _wan_animate2() -> Parts:
    from diffusers.models.transformers.transformer_wan_animate_2 import WanAnimate2KVCache

    config = dict(text_len=7, in_dim=8, dim=32, ffn_dim=64, freq_dim=16, text_dim=24, out_dim=4, num_heads=2)
    config |= dict(num_layers=3, use_img_emb=False)
    inputs = dict(hidden_states=[noise(4, 2, 4, 6)], timestep=times(1), encoder_hidden_states=[noise(7, 24)])
    inputs |= dict(condition_latents=[noise(4, 2, 4, 6)], kv_cache=WanAnimate2KVCache(3), kv_cache_mode="extract")
    return config, inputs | dict(seq_len=12, offset_grid_sizes=torch.tensor([[2, 2, 3]]))


@entry("SkyReelsV2Transformer3DModel")
def _skyreels() -> Parts:
    config = _wan(rope_max_seq_len=32, inject_sample_info=True)
    return config, _wan_inputs() | dict(fps=torch.tensor([0, 1]))


@entry("ChronoEditTransformer3DModel")
def _chrono_edit() -> Parts:
    return _wan(rope_max_seq_len=32, rope_temporal_skip_len=4), _wan_inputs()


@entry("AnyFlowTransformer3DModel")
def _any_flow() -> Parts:
    inputs = dict(hidden_states=noise(2, 2, 4, 4, 6), timestep=torch.full((2, 2), 500.0))
    inputs |= dict(r_timestep=torch.full((2, 2), 300.0), encoder_hidden_states=noise(2, 7, 24))
    return _wan(rope_max_seq_len=32), inputs


@entry("AnyFlowFARTransformer3DModel")
def _any_flow_far() -> Parts:
    inputs = dict(hidden_states=noise(2, 4, 4, 8, 8), timestep=torch.full((2, 4), 500.0))
    inputs |= dict(r_timestep=torch.full((2, 4), 300.0), encoder_hidden_states=noise(2, 7, 24))
    return _wan(rope_max_seq_len=64, chunk_partition=(1, 3)), inputs | dict(chunk_partition=[1, 3])


@entry("HeliosTransformer3DModel")
def _helios() -> Parts:
    inputs = _wan_inputs() | dict(indices_hidden_states=torch.tensor([[7, 8]] * 2))
    inputs |= dict(latents_history_short=noise(2, 4, 1, 4, 6), indices_latents_history_short=torch.tensor([[6]] * 2))
    inputs |= dict(latents_history_mid=noise(2, 4, 2, 4, 6), indices_latents_history_mid=torch.tensor([[4, 5]] * 2))
    inputs |= dict(latents_history_long=noise(2, 4, 4, 4, 6))
    return _wan(rope_dim=(4, 6, 6)), inputs | dict(indices_latents_history_long=torch.arange(4).expand(2, -1))


@entry("CosmosTransformer3DModel")
def _cosmos() -> Parts:
    config = dict(
        in_channels=4, out_channels=4, num_layers=3, mlp_ratio=2, text_embed_dim=24, adaln_lora_dim=8, **HEADS
    )
    config |= dict(max_size=(4, 8, 8), concat_padding_mask=False)
    inputs = dict(hidden_states=noise(*VIDEO), timestep=times(), encoder_hidden_states=noise(2, 7, 24))
    return config, inputs | dict(fps=16)


@entry("EasyAnimateTransformer3DModel")
def _easy_animate() -> Parts:
    config = dict(in_channels=4, out_channels=4, patch_size=2, sample_width=6, sample_height=4, num_layers=4, **HEADS)
    config |= dict(mmdit_layers=2, time_embed_dim=8, text_embed_dim=24, time_position_encoding_type="3d_rope")
    return config, dict(hidden_states=noise(*VIDEO), timestep=times(), encoder_hidden_states=noise(2, 7, 24))


def _hunyuan(**more: Any) -> dict[str, Any]:
    config = dict(in_channels=4, out_channels=4, num_layers=2, num_single_layers=2, num_refiner_layers=2, **HEADS)
    return config | dict(mlp_ratio=2.0, text_embed_dim=24, pooled_projection_dim=20, rope_axes_dim=(4, 6, 6)) | more


def _hunyuan_inputs(batch: int = 2) -> dict[str, Any]:
    inputs = dict(hidden_states=noise(batch, *VIDEO[1:]), timestep=times(batch))
    inputs |= dict(encoder_hidden_states=noise(batch, 7, 24), encoder_attention_mask=ones(batch, 7))
    return inputs | dict(pooled_projections=noise(batch, 20), guidance=torch.full((batch,), 6000.0))


@entry("HunyuanVideoTransformer3DModel")
def _hunyuan_video() -> Parts:
    return _hunyuan(), _hunyuan_inputs()


@entry("HunyuanVideoFramepackTransformer3DModel", note="one sample: with several, rows are masked up to a counted end")
def _framepack() -> Parts:
    config = _hunyuan(has_image_proj=True, image_proj_dim=16, has_clean_x_embedder=True)
    inputs = _hunyuan_inputs(1) | dict(image_embeds=noise(1, 3, 16), indices_latents=torch.tensor([10, 11]))
    inputs |= dict(latents_clean=noise(1, 4, 2, 4, 6), indices_latents_clean=torch.tensor([0, 9]))
    inputs |= dict(latents_history_2x=noise(1, 4, 2, 4, 8), indices_latents_history_2x=torch.tensor([7, 8]))
    inputs |= dict(latents_history_4x=noise(1, 4, 4, 8, 8), indices_latents_history_4x=torch.arange(3, 7))
    return config, inputs


@entry("HunyuanVideo15Transformer3DModel")
def _hunyuan_video15() -> Parts:
    config = dict(in_channels=4, out_channels=4, num_layers=3, num_refiner_layers=2, mlp_ratio=2.0, **HEADS)
    config |= dict(text_embed_dim=24, text_embed_2_dim=20, image_embed_dim=16, rope_axes_dim=(4, 6, 6), target_size=16)
    inputs = dict(hidden_states=noise(*VIDEO), timestep=times().float(), encoder_hidden_states=noise(2, 7, 24))
    inputs |= dict(encoder_attention_mask=ones(2, 7), encoder_hidden_states_2=noise(2, 5, 20))
    return config, inputs | dict(encoder_attention_mask_2=ones(2, 5), image_embeds=noise(2, 3, 16))


@entry("JoyImageEditTransformer3DModel")
def _joy_image() -> Parts:
    config = dict(in_channels=4, hidden_size=32, num_attention_heads=2, text_dim=24, mlp_width_ratio=2.0, num_layers=3)
    config |= dict(rope_dim_list=[4, 6, 6])
    return config, dict(hidden_states=noise(*VIDEO), timestep=times(), encoder_hidden_states=noise(2, 7, 24))


@entry("JoyImageEditPlusTransformer3DModel")
def _joy_image_plus() -> Parts:
    config = dict(in_channels=4, hidden_size=32, num_attention_heads=2, text_dim=24, mlp_width_ratio=2.0, num_layers=3)
    config |= dict(rope_dim_list=[4, 6, 6])
    inputs = dict(hidden_states=noise(2, 12, 4, 1, 2, 2), timestep=times(), encoder_hidden_states=noise(2, 7, 24))
    inputs |= dict(encoder_hidden_states_mask=torch.ones(2, 7))
    return config, inputs | dict(shape_list=[[(1, 2, 3), (1, 2, 3)], [(1, 2, 3), (1, 2, 2)]])


@entry("Kandinsky5Transformer3DModel")
def _kandinsky5() -> Parts:
    config = dict(in_visual_dim=4, in_text_dim=24, in_text_dim2=20, time_dim=16, out_visual_dim=4, model_dim=32)
    config |= dict(ff_dim=64, num_text_blocks=2, num_visual_blocks=3, axes_dims=(4, 6, 6))
    inputs = dict(hidden_states=noise(2, 2, 4, 6, 4), encoder_hidden_states=noise(2, 7, 24), timestep=times())
    inputs |= dict(pooled_projections=noise(2, 20), text_rope_pos=torch.arange(7))
    return config, inputs | dict(visual_rope_pos=(torch.arange(2), torch.arange(2), torch.arange(3)))


@entry("Kandinsky6Transformer3DModel")
def _kandinsky6() -> Parts:
    config = dict(in_visual_dim=4, out_visual_dim=4, in_text_dim=24, in_text_dim2=20, time_dim=16, model_dim=32)
    config |= dict(ff_dim=64, num_text_blocks=2, num_visual_blocks=3, axes_dims=(4, 6, 6), visual_cond=False)
    config |= dict(in_audio_dim=4, out_audio_dim=4, model_dim_a=16, time_dim_a=16, ff_dim_a=32, axes_dims_a=(4, 6, 6))
    inputs = dict(hidden_states=noise(2, 2, 4, 6, 4), encoder_hidden_states=noise(2, 7, 24), timestep=times())
    return config, inputs | dict(pooled_projections=noise(2, 20), audio_hidden_states=noise(2, 5, 4))


@entry("LTXVideoTransformer3DModel")
def _ltx() -> Parts:
    config = dict(in_channels=4, out_channels=4, cross_attention_dim=32, num_layers=3, caption_channels=24, **HEADS)
    inputs = dict(hidden_states=noise(2, 12, 4), encoder_hidden_states=noise(2, 7, 24), timestep=times())
    return config, inputs | dict(encoder_attention_mask=ones(2, 7), num_frames=2, height=2, width=3)


def _ltx2() -> dict[str, Any]:
    config = dict(in_channels=4, out_channels=4, cross_attention_dim=32, num_layers=3, caption_channels=24, **HEADS)
    config |= dict(audio_in_channels=4, audio_out_channels=4, audio_num_attention_heads=2, audio_attention_head_dim=8)
    return config | dict(audio_cross_attention_dim=16)


@entry("LTX2VideoTransformer3DModel")
def _ltx2_video() -> Parts:
    inputs = dict(hidden_states=noise(2, 12, 4), audio_hidden_states=noise(2, 5, 4), timestep=times())
    inputs |= dict(encoder_hidden_states=noise(2, 7, 24), audio_encoder_hidden_states=noise(2, 7, 24))
    inputs |= dict(encoder_attention_mask=ones(2, 7), audio_encoder_attention_mask=ones(2, 7))
    return _ltx2(), inputs | dict(num_frames=2, height=2, width=3, audio_num_frames=5)


@entry("SanaWMLTX2RefinerTransformer3DModel")
def _sana_wm_refiner() -> Parts:
    inputs = dict(hidden_states=noise(2, 12, 4), encoder_hidden_states=noise(2, 7, 24), timestep=times())
    return _ltx2(), inputs | dict(video_rotary_emb=tuple(t.expand(2, -1, -1) for t in rotary(12, 32)))


@entry("MochiTransformer3DModel")
def _mochi() -> Parts:
    config = dict(num_layers=3, pooled_projection_dim=20, in_channels=4, text_embed_dim=24, time_embed_dim=16, **HEADS)
    config |= dict(max_sequence_length=7)
    inputs = dict(hidden_states=noise(*VIDEO), encoder_hidden_states=noise(2, 7, 24), timestep=times())
    return config, inputs | dict(encoder_attention_mask=ones(2, 7).bool())


@entry("MotifVideoTransformer3DModel", note="no decoder blocks (the default): rows of two streams are one there")
def _motif() -> Parts:
    config = dict(in_channels=4, out_channels=4, num_layers=2, num_single_layers=2, **HEADS)
    config |= dict(mlp_ratio=2.0, text_embed_dim=24, rope_axes_dim=(4, 6, 6), enable_text_cross_attention_dual=True)
    config |= dict(enable_text_cross_attention_single=True)
    inputs = dict(hidden_states=noise(*VIDEO), timestep=times(), encoder_hidden_states=noise(2, 7, 24))
    return config, inputs | dict(encoder_attention_mask=ones(2, 7))


@entry("SanaVideoTransformer3DModel")
def _sana_video() -> Parts:
    config = dict(in_channels=4, out_channels=4, num_layers=3, num_cross_attention_heads=2, **HEADS)
    config |= dict(cross_attention_head_dim=16, cross_attention_dim=32, caption_channels=24, sample_size=6)
    config |= dict(rope_max_seq_len=32)
    return config, dict(hidden_states=noise(*VIDEO), encoder_hidden_states=noise(2, 7, 24), timestep=times())


@entry("SanaWMTransformer3DModel")
def _sana_wm() -> Parts:
    config = dict(in_channels=4, num_layers=4, hidden_size=32, num_attention_heads=2, linear_head_dim=16)
    config |= dict(softmax_every_n=2, caption_channels=24, mlp_ratio=2.0, image_size=96)
    config |= dict(chunk_plucker_post_attn_blocks=2, chunk_plucker_channels=6)
    inputs = dict(
        hidden_states=noise(2, 4, 2, 2, 3),
        timestep=torch.full((2, 1, 2), 500.0),
        encoder_hidden_states=noise(2, 1, 7, 24),
    )
    return config, inputs | dict(encoder_attention_mask=ones(2, 7))


@entry("TransformerTemporalModel")
def _temporal() -> Parts:
    config = dict(in_channels=8, num_layers=3, norm_num_groups=4, cross_attention_dim=None, **HEADS)
    return config, dict(hidden_states=noise(6, 8, 2, 3), num_frames=3)


@entry("Cosmos3OmniTransformer")
def _cosmos3() -> Parts:
    config = dict(head_dim=16, hidden_size=32, intermediate_size=64, latent_channel=4, latent_patch_size=2)
    config |= dict(num_attention_heads=2, num_hidden_layers=3, num_key_value_heads=1, patch_latent_dim=16)
    config |= dict(vocab_size=50, rope_scaling={"mrope_section": [4, 2, 2]})
    inputs = dict(vision_tokens=[noise(1, 4, 2, 4, 6)], vision_timesteps=torch.full((12,), 500.0))
    inputs |= dict(input_ids=torch.arange(7), text_indexes=torch.arange(7), und_len=7, sequence_length=19)
    inputs |= dict(position_ids=torch.arange(19).expand(3, -1), vision_token_shapes=[(2, 2, 3)])
    inputs |= dict(vision_sequence_indexes=torch.arange(7, 19), vision_mse_loss_indexes=torch.arange(7, 19))
    return config, inputs | dict(vision_noisy_frame_indexes=[torch.arange(2)])


@entry("MiniMaxH3Transformer3DModel")
def _minimax_h3() -> Parts:
    config = dict(hidden_size=48, num_attention_heads=2, attention_head_dim=30, num_layers=3, ffn_dim=64)
    config |= dict(in_channels=4, audio_in_channels=6, text_dim=24, freq_dim=16, time_embed_hidden_dim=32)
    config |= dict(time_embed_dim=16, rope_freq_dim=4)
    tags = torch.tensor([0] * 7 + [1] * 12 + [2] * 4)
    inputs = dict(hidden_states=noise(2, 12, 16), audio_hidden_states=noise(2, 4, 6), timestep=levels(2))
    inputs |= dict(encoder_hidden_states=noise(2, 7, 24), timestep_indices=(tags > 0).long(), token_tags=tags)
    inputs |= dict(position_ids=torch.arange(23)[:, None].expand(-1, 3).float(), text_indices=torch.arange(7))
    return config, inputs | dict(video_indices=torch.arange(7, 19), audio_indices=torch.arange(19, 23))
