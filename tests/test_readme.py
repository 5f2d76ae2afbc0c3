"""The README's code runs, and its figures are those of the result files."""

import ast
import inspect
import json
import re
import statistics
import subprocess
import sys
from pathlib import Path

import optax
import pytest

import flax_stable_embed as fse
from benchmarks import errors, quality_report, readme, report, rounding, switch

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()


@pytest.mark.parametrize(
    "code",
    re.findall(r"```python\n(.*?)```", README, re.DOTALL),
    ids=["nnx", "linen", "fused", "family", "sparse nnx", "sparse linen", "kernels"],
)
def test_code_in_the_readme_runs(code, capsys):
    exec(compile(code, "README.md", "exec"), {"__name__": "readme"})


def rows_of_the_table():
    table = README.split("## From bitsandbytes, from Flax")[1].split("\n## ")[0]
    for line in re.findall(r"^\| (.*) \|$", table, re.MULTILINE)[1:]:
        there, here = line.replace("\\|", "/").split(" | ")
        yield there, here


def named(node):
    """What a dotted name in code is, or the method of an optimizer or class; None for a name of the reader's."""
    if isinstance(node, ast.Attribute):
        owner = named(node.value)
        return None if owner is None else getattr(owner, node.attr)
    return {"fse": fse, "optax": optax}.get(node.id) if isinstance(node, ast.Name) else None


@pytest.mark.parametrize(("there", "here"), list(rows_of_the_table()), ids=lambda x: x if len(x) < 40 else x[:40])
def test_every_row_of_the_table_names_what_there_is(there, here):
    """Every name exists and takes the arguments that the row gives it; rules and formats can be made."""
    if here == "planned":
        assert "Paged" in there
        return
    codes = [code for code in re.findall(r"`([^`]+)`", here) if "fse." in code or "optax." in code or "rules=" in code]
    assert codes or "above" in here or re.search(r"`(rmsprop|dump|nnx)", here)
    for code in codes:
        tree = ast.parse(f"f({code})" if re.match(r"\w+=", code) else code)
        for node in ast.walk(tree):
            if isinstance(node, ast.Attribute):
                named(node)
            if isinstance(node, ast.Call) and (found := named(node.func)) is not None:
                parameters = inspect.signature(found).parameters
                open_ended = any(p.kind is p.VAR_KEYWORD for p in parameters.values())
                assert open_ended or {keyword.arg for keyword in node.keywords} <= parameters.keys(), code
        if code.startswith(("rules=", "state_format=")):
            values = {"...": "0.5"}
            option = eval(code.partition("=")[2].replace("...", values["..."]), {"fse": fse})
            fse.adamw8bit(1e-3, **{code.partition("=")[0]: option})


@pytest.mark.parametrize("path", sorted({name for name, _ in readme.PARTS}))
@pytest.mark.one_in(2)
def test_generated_figures_are_up_to_date(path):
    assert readme.rendered()[ROOT / path] == (ROOT / path).read_text(), "run `python -m benchmarks readme`"


@pytest.mark.parametrize("name", ["language_model", "linear"])
def test_tables_of_the_language_model_are_those_of_its_results(name):
    command = [sys.executable, "examples/report.py", f"examples/results/{name}.json"]
    text = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout
    assert text.strip() in README, f"run `python examples/report.py FILE --readme {name}`"


@pytest.mark.slow
def test_round_trip_errors_in_the_docs_are_those_of_the_code():
    for measured, written in zip(errors.measure(), readme.newest()["errors"], strict=True):
        assert (measured["data"], measured["codec"]) == (written["data"], written["codec"])
        for size, pair in written["errors"].items():
            assert measured["errors"][size] == pytest.approx(pair, rel=1e-4)


def test_every_link_within_the_repository_leads_somewhere():
    for page in ROOT.glob("*.md"):
        for target in re.findall(r"\]\((?!https?:)([^)#]+)", page.read_text()):
            assert (ROOT / target).exists(), f"{page.name}: {target}"


def test_what_the_readme_says_of_the_grid_is_what_it_shows():
    results = json.loads((report.HOME / "results" / "quality.json").read_text())
    assert len(results["runs"]) == results["planned"]

    def against_fp32(cell, rate):
        values = quality_report.differences(results, cell, f"{cell.split('-')[0]}-fp32", rate)
        return statistics.mean(values), statistics.stdev(values) / len(values) ** 0.5

    for task, rate, limit in (("language", 0.004, 1e-3), ("digits", 0.005, 5e-3)):
        for codec in ("root", "dynamic", "root-stochastic", "dynamic-stochastic"):
            difference, error = against_fp32(f"{task}-{codec}", rate)
            assert abs(difference) < limit
            assert abs(difference) < 2 * error or "stochastic" in codec
    assert abs(against_fp32("language-root-8", 0.004)[0]) < 1e-3
    share = {
        c["cell"]: quality_report.unstable_share(quality_report.of_cell(results, c["cell"])) for c in results["runs"]
    }
    assert all(share[c] > 0.8 for c in ("language-linear-8", "language-linear-tensor-embed-8", "digits-linear"))

    def unstable(cell, rate):
        return quality_report.unstable_share(quality_report.of_cell(results, cell, rate))

    assert unstable("language-dynamic-tensor-embed-8", 0.256) > 0.5
    blocks = (
        "root-tensor-embed-8",
        "dynamic-embed-8",
        "root-embed-8",
        "fp32-embed",
        "dynamic",
        "root",
        "root-8",
        "dynamic-8",
    )
    assert not any(
        unstable(f"language-{cell}", rate) for cell in blocks for rate in (0.001, 0.004, 0.016, 0.064, 0.256)
    )
    assert unstable("language-fp32", 0.256) == 1 / 3
    assert {unstable(cell, 1.0) for cell in share if cell.startswith("language")} == {1}
    for stable, plain in (("fp32", "fp32-embed"), ("root", "root-embed-8")):
        gain = quality_report.differences(results, f"language-{stable}", f"language-{plain}", 0.004)
        assert statistics.mean(gain) < -0.08


def test_what_the_readme_says_of_rounding_and_of_switches_is_what_they_show():
    rows = {(row["codec"], row["rounding"]): row for row in json.loads(rounding.FILE.read_text())["rows"]}
    assert rows["root", "nearest"]["size"] < min(row["size"] for key, row in rows.items() if key != ("root", "nearest"))
    for codec in ("root", "dynamic"):
        nearest, stochastic = (rows[codec, name] for name in ("nearest", "stochastic"))
        assert nearest["second_moment_after"] > 1.02 and abs(stochastic["second_moment_after"] - 1) < 0.01
        assert abs(stochastic["size"] - 1) < 0.01
    results = json.loads(switch.FILE.read_text())
    most = max(abs(gap) for pair in switch.SWITCHES for gap in switch.gaps(results, "{}, then {}".format(*pair)))
    assert min(switch.gaps(results, "fp32, then root begun anew")) > 5 * most
