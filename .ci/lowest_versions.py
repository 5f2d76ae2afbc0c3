"""Prints the lowest versions that pyproject.toml allows, as constraints for pip. `make test-oldest` installs them."""

import re
import tomllib
from pathlib import Path

text = (Path(__file__).parent.parent / "pyproject.toml").read_text()
pyproject = tomllib.loads(text)
project = pyproject["project"]
for requirement in (
    *project["dependencies"],
    *project["optional-dependencies"]["examples"],
    *pyproject["dependency-groups"]["test"],
):
    name, version = re.fullmatch(r"([\w-]+)>=([\d.]+)", requirement).groups()
    print(f"{name}=={version}")
