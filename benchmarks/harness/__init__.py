"""Shared by all benchmarks: timing, contenders, models and shapes, results and tables."""
