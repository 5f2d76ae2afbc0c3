"""Tests that word vectors find similar words, and that the last line is the one in the README."""

import json
import re
import subprocess
import sys
import sysconfig
from pathlib import Path

import pytest

EXAMPLES = Path(__file__).parents[2] / "examples"
NUMBER = re.compile(r"\d[\d.,]*")


def run(*arguments):
    done = subprocess.run(
        [sys.executable, str(EXAMPLES / "word_vectors.py"), *arguments], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_a_short_run_on_a_few_files_learns_and_ends_with_the_line_of_the_readme():
    text = [*sorted(Path(json.__file__).parent.glob("*.py")), Path(sysconfig.get_path("stdlib")) / "argparse.py"]
    out = run("--steps", "300", "--text", *map(str, text))
    line = out.splitlines()[-1]
    first, last, *_ = (float(number.rstrip(".,")) for number in NUMBER.findall(line))
    assert last < 0.85 * first
    assert re.search(r"words and [\d,]+ names to learn", out) and "encode:" in out
    section = (EXAMPLES / "README.md").read_text().split("## `word_vectors.py`")[1].split("\n## ")[0]
    assert any(NUMBER.sub("#", quote.strip()) == NUMBER.sub("#", line) for quote in section.splitlines())


@pytest.mark.slow
def test_the_full_run_finds_similar_words():
    out = run()
    found = dict(re.findall(r"^ *(.+?): (.*)$", out, re.MULTILINE))
    assert "decode" in found["encode"] and "TestSuite" in found["TestCase"] and "abspath" in found["os path"]
