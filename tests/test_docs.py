"""The pages of docs/: their code runs, and the reference has every public name."""

import doctest
import re
from pathlib import Path

import pytest

from tests.tools import public_names

DOCS = Path(__file__).parents[1] / "docs"
PAGES = sorted(DOCS.rglob("*.md"))


def in_the_reference():
    """Full names of what autodoc is told to document."""
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


def code_of(page):
    """What a page runs, piece by piece, with the number of its first line: fenced python, and cells of notebooks."""
    text = page.read_text()
    for found in re.finditer(r"^```(?:python|\{code-cell\}.*)\n(.*?)^```$", text, re.DOTALL | re.MULTILINE):
        yield found[1], text.count("\n", 0, found.start(1))


def run(page):
    """Runs a page from top to bottom; where a piece begins with >>>, what it prints must be what is there."""
    names = {"__name__": page.stem}
    for code, line in code_of(page):
        if code.startswith(">>>"):
            test = doctest.DocTestParser().get_doctest(code, names, page.name, str(page), line)
            flags = doctest.ELLIPSIS | doctest.NORMALIZE_WHITESPACE
            assert doctest.DocTestRunner(optionflags=flags).run(test, clear_globs=False).failed == 0
            names = test.globs
        else:
            exec(compile("\n" * line + code, str(page), "exec"), names)


def pages():
    """Notebooks run in every build of the site as well."""
    for page in PAGES:
        if any(code_of(page)):
            marks = [pytest.mark.slow] if "{code-cell}" in page.read_text() else []
            yield pytest.param(page, marks=marks, id=page.stem)


@pytest.mark.parametrize("page", list(pages()))
def test_code_of_a_page_runs(page, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    run(page)
