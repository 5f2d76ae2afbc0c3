"""The README's code runs, and its figures are those of the result files."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks import errors, readme

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()


@pytest.mark.parametrize(
    "code", re.findall(r"```python\n(.*?)```", README, re.DOTALL), ids=["nnx", "linen", "fused", "family"]
)
def test_code_in_the_readme_runs(code, capsys):
    exec(compile(code, "README.md", "exec"), {"__name__": "readme"})


@pytest.mark.parametrize("path", sorted({name for name, _ in readme.PARTS}))
def test_generated_figures_are_up_to_date(path):
    assert readme.rendered()[ROOT / path] == (ROOT / path).read_text(), "run `python -m benchmarks readme`"


@pytest.mark.parametrize("name", ["language_model", "linear"])
def test_tables_of_the_language_model_are_those_of_its_results(name):
    command = [sys.executable, "examples/report.py", f"examples/results/{name}.json"]
    text = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout
    assert text.strip() in README, f"run `python examples/report.py FILE --readme {name}`"


def test_round_trip_errors_in_the_docs_are_those_of_the_code():
    for measured, written in zip(errors.measure(), readme.newest()["errors"], strict=True):
        assert (measured["data"], measured["codec"]) == (written["data"], written["codec"])
        for size, pair in written["errors"].items():
            assert measured["errors"][size] == pytest.approx(pair, rel=1e-4)


def test_every_link_within_the_repository_leads_somewhere():
    for page in ROOT.glob("*.md"):
        for target in re.findall(r"\]\((?!https?:)([^)#]+)", page.read_text()):
            assert (ROOT / target).exists(), f"{page.name}: {target}"
