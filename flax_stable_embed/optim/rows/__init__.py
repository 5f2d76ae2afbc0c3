"""Gradients of single rows of embedding tables, and optimizer steps that touch only these rows."""
