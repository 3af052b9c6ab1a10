"""tcc: a token-caching compiler for diffusion transformers."""
