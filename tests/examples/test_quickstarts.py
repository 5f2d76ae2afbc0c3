"""Tests that the quick starts run and print the line that examples/README.md shows."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

EXAMPLES = Path(__file__).parents[2] / "examples"
NUMBER = re.compile(r"\d+\.\d+")


@pytest.mark.parametrize("name", ["quickstart_linen.py", "quickstart_nnx.py"])
@pytest.mark.slow  # the notebooks of the site train the same models
def test_the_last_line_is_the_one_in_the_readme(name):
    done = subprocess.run([sys.executable, str(EXAMPLES / name)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    line = done.stdout.splitlines()[-1]
    first, last, held, fp32 = map(float, NUMBER.findall(line))
    assert last < first / 4
    assert held < fp32 / 2

    section = (EXAMPLES / "README.md").read_text().split(f"## `{name}`")[1].split("\n## ")[0]
    quoted = next(quote for quote in section.splitlines() if quote.startswith("    loss "))
    assert NUMBER.sub("#", quoted.strip()) == NUMBER.sub("#", line)
    # The losses may differ in their last digits from machine to machine; the bytes may not.
    assert [float(number) for number in NUMBER.findall(quoted)] == [
        pytest.approx(first, rel=0.02),
        pytest.approx(last, rel=0.2),
        held,
        fp32,
    ]
