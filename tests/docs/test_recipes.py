"""Tests the script of docs/recipes.md that compiles for TPU; test_pages.py runs the other blocks of the page."""

import importlib.util
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from tests.docs.tools import too_long

ROOT = Path(__file__).parents[2]
(SCRIPT,) = re.findall(r"^```py\n(.*?)^```$", (ROOT / "docs" / "recipes.md").read_text(), re.DOTALL | re.MULTILINE)


def test_the_script_fits_the_column_of_the_site():
    assert not too_long(SCRIPT)


@pytest.mark.skipif(importlib.util.find_spec("libtpu") is None, reason="libtpu is not installed: make test EXTRAS=tpu")
def test_the_script_compiles_a_step_in_place_without_collectives():
    """The script runs in its own process, because it sets the environment before it imports JAX."""
    command = [sys.executable, "-c", SCRIPT]
    run = subprocess.run(command, cwd=ROOT, env=os.environ | {"PYTHONPATH": str(ROOT)}, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    for line in ("bytes of temporaries: 0", "fused kernel: True", "collectives: False"):
        assert line in run.stdout
    assert not run.stderr  # libtpu is quiet
