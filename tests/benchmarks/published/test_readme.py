"""Tests that generated parts are found by their marks."""

import pytest

from benchmarks.published import readme


@pytest.fixture
def parts(monkeypatch):
    monkeypatch.setattr(readme, "PARTS", {"one": lambda: "new one", "two": lambda: "| new |\n| two |"})


def test_a_page_gets_the_parts_that_it_has_marks_for(parts):
    text = "a\n<!-- one: from here -->\nold\n<!-- /one -->\nb\n<!-- two: from there -->\n<!-- /two -->\n"
    new = text.replace("old", "new one").replace("there -->\n", "there -->\n| new |\n| two |\n")
    assert readme.replace_parts(text) == new == readme.replace_parts(new)


def test_parts_of_the_example_are_not_changed(parts):
    text = "<!-- language_model: by the example -->\nold\n<!-- /language_model -->\n"
    assert readme.replace_parts(text) == text


def test_an_unknown_part_is_an_error_that_lists_the_names(parts):
    with pytest.raises(ValueError, match=r"no part named 'three'\. The names are: one, two\."):
        readme.replace_parts("<!-- three: from here -->\n<!-- /three -->\n")


def test_quoted_marks_are_not_parts(parts):
    text = ':start-after: "<!-- one: from here -->"\n:end-before: "<!-- /one -->"\n'
    assert readme.replace_parts(text) == text


def test_every_part_is_on_a_page():
    found = [name for page in readme.pages() for name in readme.parts_of(page.read_text())]
    assert {*found} - {*readme.BY_THE_EXAMPLE} == {*readme.PARTS}
