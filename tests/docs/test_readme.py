"""Tests of README: its code runs, its figures equal the results, and its links work on a package index."""

import json
import re
import tomllib
from pathlib import Path

import pytest

from benchmarks.counted import compiled
from benchmarks.harness.tree_steps import BASELINE, OURS
from benchmarks.measured import gpu
from tests.cases import OPTIMIZERS
from tests.docs.tools import code_of, run, too_long

ROOT = Path(__file__).parents[2]
PAGE = ROOT / "README.md"
README = PAGE.read_text()
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())


@pytest.mark.parametrize(("code", "line"), list(code_of(PAGE)), ids=lambda x: f"line {x}" if isinstance(x, int) else "")
def test_code_in_the_readme_runs(code, line, capsys):
    """Each block runs alone."""
    run(code, line, PAGE, {"__name__": "readme"})
    assert not too_long(code)


def test_the_first_screen_has_its_parts_in_order():
    parts = (
        "8-bit optimizers for JAX",
        "pip install",
        "```diff",
        "![",
        "<!-- headline",
        ">>> print(fse.describe",
        "## Features",
    )
    places = [README.index(part) for part in parts]
    assert places == sorted(places)
    visible = re.sub(r"<!--.*?-->|!\[.*?\]\(.*?\)", "", README.split("```python")[0])
    assert len(visible.split()) <= 150


def test_the_first_sentence_says_how_much_memory_is_saved():
    """Adam: two codes of one byte, and two scales of four bytes per block of 256, instead of 8 bytes."""
    assert f"by up to {8 / (2 + 2 * 4 / 256):.1f}x at the same loss" in README.split("\n\n")[1]


def test_commands_for_a_checkout_say_how_long_they_take():
    assert re.search(r"make train +# about \d+ minutes", README) and re.search(
        r"make test +# about \d+ minutes", README
    )


def test_rows_that_the_readme_quotes_are_those_of_the_docs():
    quoted = re.findall(r"^\| .* \|$", README.split("| there | here |\n")[1].split("\n\n")[0], re.MULTILINE)
    pages = [(ROOT / "docs" / name).read_text() for name in ("bitsandbytes.md", "optax.md")]
    assert quoted
    for row in quoted:
        assert any(f"\n{row}\n" in page for page in pages), row


@pytest.mark.parametrize("case", OPTIMIZERS, ids=lambda case: case.name)
def test_every_optimizer_is_in_the_table(case):
    assert f"`fse.{case.name}`" in README.split("## Optimizers")[1].split("```python")[0]


def test_figures_of_kernels_equal_the_counts_and_measurements():
    rows = json.loads(compiled.FILE.read_text())["rows"]
    of_kernels = [row for row in rows if row["step"] == "`adamw8bit`"]
    (moved,) = {f"{row['bytes']:.2f}" for row in of_kernels}
    (base,) = {f"{row['bytes']:.0f}" for row in rows if row["step"] == "`optax.adamw`, updates"}
    pages = ("README.md", "docs/performance.md", "docs/faq.md")
    text, page, answers = (" ".join((ROOT / name).read_text().split()) for name in pages)
    assert f"moves {moved} bytes per parameter, and in fp32 it moves {base}" in text
    assert f"moves {moved} bytes per parameter, where `optax.adamw` moves {base}" in page
    assert f"counts {moved} instead of {base} bytes per parameter" in answers
    ratios = {}
    for results in gpu.everywhere():
        busy = {name: row["device_ms"] for name, row in results["model"].items() if "device_ms" in row}
        ratios[results["environment"]["device"].split()[1]] = f"{busy[OURS] / busy[BASELINE]:.2f}"
        assert busy["bitsandbytes `AdamW8bit`"] > 3 * busy[OURS]
    assert f"takes {ratios['H100']} of `optax.adamw`'s time on an H100 and {ratios['H200']} on an H200" in text
    assert f"{ratios['H100']} of it on an H100 and {ratios['H200']} of it on an H200" in answers
    assert f"takes {ratios['H100']} of `optax.adamw`'s time; on the H200 it takes {ratios['H200']}" in page


def test_links_work_on_a_package_index():
    """The package index gets README with the substitutions of pyproject.toml."""
    hook = PROJECT["tool"]["hatch"]["metadata"]["hooks"]["fancy-pypi-readme"]
    text = README
    for one in hook["substitutions"]:
        text = re.sub(one["pattern"], one["replacement"], text)
    repository = PROJECT["project"]["urls"]["Repository"]
    for image, target in re.findall(r"(!?)\[[^\]]*\]\(([^)]+)\)", text):
        assert target.startswith("https://"), target
        if target.startswith((f"{repository}/blob/", f"{repository}/raw/")):  # not the badge of ci
            kind, branch, path = target.removeprefix(f"{repository}/").split("/", 2)
            assert (kind, branch) == ("raw" if image else "blob", "main")
            assert (ROOT / path.partition("#")[0]).exists(), target
    assert f"url = {{{repository}}}" in text  # in the citation
