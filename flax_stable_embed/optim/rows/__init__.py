"""Embedding tables by their rows."""
