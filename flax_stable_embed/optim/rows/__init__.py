"""Gradients and updates of single rows of embedding tables."""
