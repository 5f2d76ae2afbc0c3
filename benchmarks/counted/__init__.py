"""Benchmarks that count bytes, instructions and collectives exactly. Nothing runs."""
