"""Configures the site that `make docs` builds."""

import sys
import tomllib
from importlib import metadata
from pathlib import Path

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE))  # for markdown_docstrings.py
PROJECT = tomllib.loads((HERE.parent / "pyproject.toml").read_text())["project"]

project = "flax_stable_embed"
copyright = "2026, the flax_stable_embed authors, Apache-2.0"
release = metadata.version("flax-stable-embed")
extensions = [
    "myst_nb",
    "sphinx.ext.autodoc",
    "sphinx.ext.napoleon",
    "sphinx.ext.mathjax",
    "sphinx_copybutton",
    "markdown_docstrings",
]
exclude_patterns = ["_build"]

html_theme = "furo"
html_title = f"{project} {release}"
html_theme_options = {  # links from each page to its source in the repository
    "source_repository": PROJECT["urls"]["Repository"],
    "source_branch": "main",
    "source_directory": "docs/",
}
copybutton_prompt_text = r">>> |\.\.\. "
copybutton_prompt_is_regexp = True

myst_enable_extensions = ["dollarmath"]
myst_heading_anchors = 3
nb_execution_mode = "force"  # every build runs the notebooks; a failure stops it
nb_execution_raise_on_error = True
nb_execution_timeout = 120

autodoc_member_order = "bysource"
# Descriptions of arguments name their types; annotations would be long unions.
autodoc_typehints = "none"
napoleon_numpy_docstring = False
napoleon_use_param = False  # shows a list of names and does not look for their types
napoleon_use_rtype = False
napoleon_use_ivar = True
# Several exceptions may share a line.
napoleon_custom_sections = [("Raises", "params_style")]
maximum_signature_line_length = 88
nitpicky = True
not_exported = r"flax_stable_embed\.(optim|interop\.bitsandbytes\.report)\..*"
nitpick_ignore_regex = [("py:class", not_exported)]
