"""Measures this library: `python -m benchmarks --list` names every benchmark.

Folders say how a number is obtained:

- `measured`: timed on this machine.
- `counted`: exact, from shapes or from compiled programs. Nothing runs.
- `tried`: experiments on quality, such as trainings with each codec.
- `published`: tables and pictures of the documentation, made from `results`.
- `harness`: shared by the others.
"""
