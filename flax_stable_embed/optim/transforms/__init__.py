"""Transforms that work around or before any optimizer: 8-bit state, stochastic rounding, percentile clipping."""
