"""How the site is built: `make docs`."""

import sys
from importlib import metadata
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))  # for markdown_docstrings.py

project = "flax_stable_embed"
release = metadata.version("flax-stable-embed")
extensions = ["myst_nb", "sphinx.ext.autodoc", "sphinx.ext.napoleon", "sphinx.ext.mathjax", "markdown_docstrings"]
exclude_patterns = ["_build"]

html_theme = "furo"
html_title = f"{project} {release}"

myst_enable_extensions = ["dollarmath"]
myst_heading_anchors = 3
nb_execution_mode = "force"  # the notebooks run in every build, and one that fails stops it
nb_execution_raise_on_error = True
nb_execution_timeout = 120

autodoc_member_order = "bysource"
autodoc_typehints = "none"  # what an argument may be, its line says; types would be unions of everything like an array
napoleon_numpy_docstring = False
napoleon_use_param = False  # a list of names, without a search for their types
napoleon_use_rtype = False
napoleon_use_ivar = True
napoleon_custom_sections = [("Raises", "params_style")]  # several exceptions may share a line
maximum_signature_line_length = 88
nitpicky = True
nitpick_ignore_regex = [("py:class", r".*\._report\..*")]  # types of the rows of reports
