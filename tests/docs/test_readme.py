"""The README's code runs, and what it says in figures is what the result files say."""

import json
import re
from pathlib import Path

import pytest

from benchmarks.counted import compiled
from benchmarks.harness.tree_steps import BASELINE, OURS
from benchmarks.measured import gpu
from tests.cases import OPTIMIZERS

ROOT = Path(__file__).parents[2]
README = (ROOT / "README.md").read_text()


@pytest.mark.parametrize(
    "code", re.findall(r"```python\n(.*?)```", README, re.DOTALL), ids=["nnx", "linen", "fused", "family"]
)
def test_code_in_the_readme_runs(code, capsys):
    exec(compile(code, "README.md", "exec"), {"__name__": "readme"})


def test_rows_that_the_readme_quotes_are_those_of_the_docs():
    quoted = re.findall(r"^\| .* \|$", README.split("| there | here |\n")[1].split("\n\n")[0], re.MULTILINE)
    pages = [(ROOT / "docs" / name).read_text() for name in ("bitsandbytes.md", "optax.md")]
    assert quoted
    for row in quoted:
        assert any(f"\n{row}\n" in page for page in pages), row


@pytest.mark.parametrize("case", OPTIMIZERS, ids=lambda case: case.name)
def test_every_optimizer_is_in_the_table(case):
    assert f"`fse.{case.name}`" in README.split("## The optimizers")[1].split("```python")[0]


def test_what_the_readme_says_of_kernels_is_what_was_counted_and_measured():
    rows = json.loads(compiled.FILE.read_text())["rows"]
    of_kernels = [row for row in rows if row["step"] == "`adamw8bit`"]
    (moved,) = {f"{row['bytes']:.2f}" for row in of_kernels}
    (base,) = {f"{row['bytes']:.0f}" for row in rows if "optax" in row["step"] and row["chip"].startswith("v")}
    text = " ".join(README.split())
    assert f"{moved} bytes of memory traffic a parameter for AdamW where fp32 AdamW has {base}, and no temp" in text
    assert all(row["temporaries"] < 0.005 for row in of_kernels)
    ratios = {}
    for results in gpu.everywhere():
        busy = {name: row["device_ms"] for name, row in results["model"].items() if "device_ms" in row}
        ratios[results["environment"]["device"].split()[1]] = f"{busy[OURS] / busy[BASELINE]:.2f}"
        assert busy[OURS] / busy["bitsandbytes `AdamW8bit`"] < 1 / 3
    said = f"{ratios['H100']} of `optax.adamw`'s time on an H100 and {ratios['H200']} on an H200, and less than a third"
    assert f"{said} of that of bitsandbytes' `AdamW8bit`" in text
