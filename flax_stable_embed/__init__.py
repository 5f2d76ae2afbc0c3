"""Stable embeddings and 8-bit optimizers for JAX."""
