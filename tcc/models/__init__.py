"""Diffusion transformers to compile: the public DiT architecture, its weights, and the shipped model."""

from tcc.models.dit import DiT, DiTConfig
from tcc.models.weights import load_dit, load_weights, reference_model, save_weights

__all__ = ["DiT", "DiTConfig", "load_dit", "load_weights", "reference_model", "save_weights"]
