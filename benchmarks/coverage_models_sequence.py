"""Entries: models of sound, of embeddings and of molecules, whose tokens lie in one sequence."""

from __future__ import annotations

import torch
from coverage_models import Parts, entry, levels, noise, ones, rotary


@entry("AceStepTransformer1DModel")
def _ace_step() -> Parts:
    config = dict(hidden_size=32, intermediate_size=64, num_hidden_layers=4, num_attention_heads=2, head_dim=16)
    config |= dict(num_key_value_heads=1, in_channels=12, audio_acoustic_hidden_dim=4, sliding_window=4)
    config |= dict(encoder_hidden_size=24)
    inputs = dict(hidden_states=noise(2, 24, 4), timestep=levels(), timestep_r=torch.full((2,), 0.3))
    return config, inputs | dict(encoder_hidden_states=noise(2, 7, 24), context_latents=noise(2, 24, 8))


@entry("LongCatAudioDiTTransformer")
def _longcat_audio() -> Parts:
    config = dict(dit_dim=32, dit_depth=3, dit_heads=2, dit_text_dim=24, latent_dim=4, ff_mult=2.0)
    inputs = dict(hidden_states=noise(2, 12, 4), encoder_hidden_states=noise(2, 7, 24), timestep=levels())
    inputs |= dict(encoder_attention_mask=ones(2, 7).bool(), attention_mask=ones(2, 12).bool())
    return config, inputs | dict(latent_cond=noise(2, 12, 4))


@entry("MiniMaxMusic3Transformer1DModel")
def _minimax_music() -> Parts:
    config = dict(in_channels=4, condition_dim=8, num_layers=3, num_attention_heads=2, attention_head_dim=16)
    config |= dict(ff_inner_dim=64, rotary_dim=8, fourier_embedding_dim=16)
    return config, dict(hidden_states=noise(2, 4, 12), timestep=levels(), encoder_hidden_states=noise(2, 12, 8))


@entry("MiniMaxMusic3RVQDepthDecoder")
def _minimax_depth() -> Parts:
    config = dict(hidden_size=32, num_layers=3, num_attention_heads=2, intermediate_size=64, audio_vocab_size=16)
    return config, dict(inputs_embeds=noise(2, 8, 32))


@entry("PriorTransformer")
def _prior() -> Parts:
    config = dict(num_attention_heads=2, attention_head_dim=16, num_layers=3, embedding_dim=20, num_embeddings=7)
    inputs = dict(hidden_states=noise(2, 20), timestep=torch.full((2,), 500), proj_embedding=noise(2, 20))
    return config, inputs | dict(encoder_hidden_states=noise(2, 7, 20), attention_mask=ones(2, 7).bool())


@entry("StableAudioDiTModel")
def _stable_audio() -> Parts:
    config = dict(in_channels=4, out_channels=4, num_layers=3, attention_head_dim=16, num_attention_heads=2)
    config |= dict(num_key_value_attention_heads=1, cross_attention_dim=24, cross_attention_input_dim=20)
    config |= dict(time_proj_dim=16, global_states_input_dim=16)
    inputs = dict(hidden_states=noise(2, 4, 12), timestep=levels(), encoder_hidden_states=noise(2, 7, 20))
    inputs |= dict(global_hidden_states=noise(2, 1, 16), rotary_embedding=rotary(13, 8))
    return config, inputs


@entry("StableAudio3DiTModel")
def _stable_audio3() -> Parts:
    config = dict(io_channels=4, embed_dim=32, depth=3, num_heads=2, cond_token_dim=20, global_cond_dim=16)
    config |= dict(local_add_cond_dim=5, timestep_features_dim=16, ff_mult=2.0, num_memory_tokens=5)
    inputs = dict(hidden_states=noise(2, 4, 12), timestep=levels(), encoder_hidden_states=noise(2, 7, 20))
    return config, inputs | dict(global_hidden_states=noise(2, 16), local_add_cond=noise(2, 5, 12))


@entry("T5FilmDecoder", changing=("decoder_input_tokens", "decoder_noise_time"))
def _t5_film() -> Parts:
    config = dict(input_dims=8, targets_length=12, d_model=32, num_layers=3, num_heads=2, d_kv=16, d_ff=64)
    inputs = dict(encodings_and_masks=[(noise(2, 7, 32), torch.ones(2, 7))], decoder_input_tokens=noise(2, 12, 8))
    return config, inputs | dict(decoder_noise_time=levels())


@entry("RFD4ProteinaTransformer")
def _proteina() -> Parts:
    config = dict(nlayers=4, token_dim=32, nheads=2, dim_cond=16, pair_repr_dim=8, latent_dim=4, tri_mult_c=8)
    config |= dict(token_type_emb_dim=8, cath_emb_dim=8, t_emb_dim=8, seq_sep_dim=8, xt_pair_dist_dim=6)
    config |= dict(feats_seq=("xt_bb_ca", "xt_local_latents", "token_type"), num_sequence_classes=9)
    config |= dict(
        feats_cond_seq=("time_emb_bb_ca", "time_emb_local_latents"), feats_pair_repr=("xt_bb_ca_pair_dists",)
    )
    inputs = dict(bb_ca=noise(2, 12, 3), local_latents=noise(2, 12, 4), bb_ca_time=levels())
    inputs |= dict(local_latents_time=levels(), padding_mask=ones(2, 12).bool(), token_type=ones(2, 12))
    flags = dict(is_in_context_conditioning=torch.zeros(2, 12), supports_local_latent=torch.ones(2, 12))
    return config, inputs | dict(conditioning=flags)
