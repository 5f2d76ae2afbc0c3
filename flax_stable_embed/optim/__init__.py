"""Optax transforms that keep optimizer moments in one byte each; one file per optimizer."""
