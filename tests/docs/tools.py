"""Finds the code on a page and runs it."""

import doctest
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

CODE = re.compile(r"^```(?:python|\{code-cell\}[^\n]*)\n(.*?)^```$", re.DOTALL | re.MULTILINE)


def code_of(page: Path) -> Iterator[tuple[str, int]]:
    """Yields the blocks of a page that run, each with the number of its first line: Python and cells of notebooks."""
    text = page.read_text()
    for found in CODE.finditer(text):
        yield found[1], text.count("\n", 0, found.start(1))


def run(code: str, line: int, page: Path, names: dict[str, Any]) -> dict[str, Any]:
    """Runs one block. If it begins with >>>, checks that it prints the output on the page. Returns its names."""
    if not code.startswith(">>>"):
        exec(compile("\n" * line + code, str(page), "exec"), names)
        return names
    test = doctest.DocTestParser().get_doctest(code, names, page.name, str(page), line)
    flags = doctest.ELLIPSIS | doctest.NORMALIZE_WHITESPACE
    assert doctest.DocTestRunner(optionflags=flags).run(test, clear_globs=False).failed == 0
    return test.globs


def too_long(code: str) -> list[str]:
    """Returns the lines of a block that do not fit the column of the site."""
    return [line for line in code.split("\n") if len(line) > 88]
