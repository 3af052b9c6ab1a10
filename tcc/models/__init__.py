"""Diffusion transformers to compile: DiT, U-ViT, MDT and MDTv2, their weights, and the shipped model."""

from tcc.models.architecture import Architecture
from tcc.models.config import ModelConfig
from tcc.models.dit import DiT, DiTConfig
from tcc.models.mdt import MDT, MDTConfig, MDTv2
from tcc.models.uvit import UViT, UViTConfig
from tcc.models.weights import ARCHITECTURES, load_dit, load_model, load_weights, reference_model, save_weights

__all__ = [
    "ARCHITECTURES",
    "MDT",
    "Architecture",
    "DiT",
    "DiTConfig",
    "MDTConfig",
    "MDTv2",
    "ModelConfig",
    "UViT",
    "UViTConfig",
    "load_dit",
    "load_model",
    "load_weights",
    "reference_model",
    "save_weights",
]
