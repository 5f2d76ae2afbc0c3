"""Transforms around any optimizer."""
