"""Diffusion transformers to compile: public architectures (DiT, U-ViT), their weights, and the shipped model."""

from tcc.models.dit import DiT, DiTConfig
from tcc.models.uvit import UViT, UViTConfig
from tcc.models.weights import load_dit, load_weights, reference_model, save_weights

__all__ = ["DiT", "DiTConfig", "UViT", "UViTConfig", "load_dit", "load_weights", "reference_model", "save_weights"]
