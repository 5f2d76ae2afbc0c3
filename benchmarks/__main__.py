"""Runs the benchmark of single steps; see `measured/steps.py`."""

import sys

from .measured import steps

steps.main(sys.argv[1:])
