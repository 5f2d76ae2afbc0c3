"""Benchmarks that time steps on this machine."""
