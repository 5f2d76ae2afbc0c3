"""Tests of docs/: code runs, the reference has every public name, and figures equal those of the results."""

import ast
import functools
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
from benchmarks.measured import embedding, steps
from benchmarks.published import pictures, readme
from benchmarks.tried import errors, quality_report, rounding, switch
from tests.docs.tools import code_of, run, too_long
from tests.tools import public_names

ROOT = Path(__file__).parents[2]
DOCS = ROOT / "docs"
PAGES = sorted(DOCS.rglob("*.md"))
ELSEWHERE = {"frameworks", "scaling"}  # their code runs in tests/frameworks/test_recipes.py and test_scaling.py
IN_HOST_MEMORY = {"rules"}  # their code needs host memory, which XLA for CPU has from JAX 0.10 on


def in_the_reference():
    """Yields the full names that the pages of the reference document."""
    for page in (DOCS / "reference").glob("*.md"):
        module = ""
        for directive, name in re.findall(
            r"^\.\. (currentmodule|autofunction|autoclass):: ([\w.]+)", page.read_text(), re.M
        ):
            if directive == "currentmodule":
                module = f"{name}."
            else:
                yield name if name.startswith("flax_stable_embed.") else module + name


def test_every_public_name_is_in_the_reference_once():
    assert sorted(in_the_reference()) == sorted(name for name, _ in public_names())


def pages():
    """Notebooks run in every build of the site as well."""
    for page in PAGES:
        if any(code_of(page)) and page.stem not in ELSEWHERE:
            marks = [pytest.mark.slow] if "{code-cell}" in page.read_text() else []
            marks += [pytest.mark.recent_compiler] if page.stem in IN_HOST_MEMORY else []
            yield pytest.param(page, marks=marks, id=page.stem)


@pytest.mark.parametrize("page", list(pages()))
def test_code_of_a_page_runs(page, tmp_path, monkeypatch, capsys):
    """A page runs from top to bottom."""
    monkeypatch.chdir(tmp_path)
    names = {"__name__": page.stem}
    for code, line in code_of(page):
        names = run(code, line, page, names)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(DOCS)))
def test_code_of_a_page_fits_the_column_of_the_site(page):
    assert not [line for code, _ in code_of(page) for line in too_long(code)]


# --- tables of names ---


def rows_of_the_tables():
    """Yields the rows of the tables on the pages for users of other libraries: the name there and the name here."""
    for page in ("bitsandbytes.md", "optax.md"):
        table = (DOCS / page).read_text().split("| there | here |\n|---|---|\n")[1].split("\n\n")[0]
        for line in table.split("\n"):
            there, here = line.strip("| ").replace("\\|", "/").split(" | ")
            yield there, here


def named(node):
    """Returns the object that a dotted name in code refers to; None for a name that the reader would define."""
    if isinstance(node, ast.Attribute):
        owner = named(node.value)
        return None if owner is None else getattr(owner, node.attr)
    return {"fse": fse, "optax": optax}.get(node.id) if isinstance(node, ast.Name) else None


@pytest.mark.parametrize(("there", "here"), list(rows_of_the_tables()), ids=lambda x: x if len(x) < 40 else x[:40])
def test_every_name_in_a_table_of_names_exists(there, here):
    """Every name accepts the arguments in its row; rules and formats can be made."""
    codes = [code for code in re.findall(r"`([^`]+)`", here) if "fse." in code or "optax." in code or "rules=" in code]
    assert codes, here
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


# --- figures ---

rendered = functools.cache(readme.rendered)


@pytest.mark.parametrize("page", readme.pages(), ids=lambda page: str(page.relative_to(ROOT)))
def test_generated_figures_are_up_to_date(page):
    assert rendered()[page] == page.read_text(), "run `python -m benchmarks readme`"


@pytest.mark.parametrize(("name", "page"), [("language_model", "README.md"), ("linear", "docs/quality.md")])
def test_tables_of_the_language_model_equal_its_results(name, page):
    command = [sys.executable, "examples/report.py", f"examples/results/{name}.json"]
    text = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout
    assert text.strip() in (ROOT / page).read_text(), f"run `python examples/report.py FILE --publish {name}`"


@pytest.mark.slow
def test_round_trip_errors_in_the_docs_equal_those_of_the_code():
    for measured, written in zip(errors.measure(), steps.newest()["errors"], strict=True):
        assert (measured["data"], measured["codec"]) == (written["data"], written["codec"])
        for size, pair in written["errors"].items():
            assert measured["errors"][size] == pytest.approx(pair, rel=1e-4)


@pytest.mark.parametrize("page", [*ROOT.glob("*.md"), *PAGES], ids=lambda page: str(page.relative_to(ROOT)))
def test_every_link_within_the_repository_works(page):
    for target in re.findall(r"\]\((?!https?:)([^)#]+)", page.read_text()):
        assert (page.parent / target).exists(), target


def test_the_summary_of_the_grid_agrees_with_its_results():
    results = json.loads(quality_report.FILE.read_text())
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


def test_the_summaries_of_rounding_and_of_switches_agree_with_their_results():
    rows = {(row["codec"], row["rounding"]): row for row in json.loads(rounding.FILE.read_text())["rows"]}
    assert rows["root", "nearest"]["size"] < min(row["size"] for key, row in rows.items() if key != ("root", "nearest"))
    for codec in ("root", "dynamic"):
        nearest, stochastic = (rows[codec, name] for name in ("nearest", "stochastic"))
        assert nearest["second_moment_after"] > 1.02 and abs(stochastic["second_moment_after"] - 1) < 0.01
        assert abs(stochastic["size"] - 1) < 0.01
    results = json.loads(switch.FILE.read_text())
    most = max(abs(gap) for pair in switch.SWITCHES for gap in switch.gaps(results, "{}, then {}".format(*pair)))
    assert min(switch.gaps(results, "fp32, then root with moments reset")) > 5 * most


def test_the_description_of_the_pictures_of_the_format_agrees_with_them():
    smallest = {
        (codec, signed): pictures.magnitudes(codec, signed)[0] for codec in pictures.COLORS for signed in (0, 1)
    }
    assert smallest["dynamic", 1] < smallest["root", 1] < smallest["linear", 1]
    assert smallest["root", 0] < smallest["dynamic", 0] < smallest["linear", 0]
    for signed in (False, True):
        found = {codec: pictures.largest(pictures.relative_errors(codec, signed)) for codec in pictures.COLORS}
        assert all(x[-1] < 0.01 for x in found.values())  # near the scale alike
        lost = {codec: (x >= 1).sum() for codec, x in found.items()}
        assert lost["linear"] > max(lost["root"], lost["dynamic"])  # loses everything first


def test_ratios_on_the_page_of_embeddings_equal_the_results():
    results = json.loads(embedding.FILE.read_text())
    steps = {tuple(step["shape"]): step["rows"] for step in results["steps"]}
    small, large = (steps[rows, 512, 256]["dense"]["ms"][1] for rows in (50_304, 503_040))
    text = " ".join((DOCS / "embeddings.md").read_text().split())
    assert f"takes {results['growth']['rows'][1]:.2f} times as long" in text
    assert f"takes {large / small:.0f} times as long" in text


@pytest.mark.parametrize("name", pictures.PICTURES)
def test_a_picture_can_be_drawn_and_exists(name, tmp_path):
    pictures.PICTURES[name]().savefig(tmp_path / name, dpi=20)
    page = DOCS / "format.md" if name in pictures.FORMAT else ROOT / "README.md"
    assert (pictures.FOLDER / name).exists() and f"images/{name}" in page.read_text()
