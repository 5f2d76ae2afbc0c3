"""Converts docstrings from Markdown, which editors show, to reStructuredText.

Converts formulas between dollar signs, indented equations, and names between backticks.
A name that has an entry in the reference becomes a link to it.
"""

import importlib
import inspect
import re
from typing import Any

PACKAGE = "flax_stable_embed"
MODULES = (
    PACKAGE,
    f"{PACKAGE}.linen",
    f"{PACKAGE}.nnx",
    f"{PACKAGE}.ops",
    f"{PACKAGE}.interop.bitsandbytes",
)


def public(name: str) -> bool:
    """Returns whether a full name is a function or class of a public module."""
    module, _, attribute = name.rpartition(".")
    if module not in MODULES:
        return False
    value = getattr(importlib.import_module(module), attribute, None)
    ours = getattr(value, "__module__", "").startswith(PACKAGE)
    return ours and not inspect.ismodule(value)


def link(name: str, module: str) -> str:
    """Converts text between backticks, to a link if `module` can see such a name."""
    full = re.sub(r"^fse\.", f"{PACKAGE}.", name)
    for candidate in (full, f"{module}.{name}", f"{PACKAGE}.{name}"):
        if re.fullmatch(r"[\w.]+", name) and public(candidate):
            return f":py:obj:`{name} <{candidate}>`"
    return f"``{name}``"


def inline(text: str, module: str) -> str:
    """Converts one paragraph of prose."""
    parts = re.split(r"(`[^`]+`|\$[^$]+\$)", text)
    for i, part in enumerate(parts):
        if i % 2 == 0:
            parts[i] = re.sub(r"\||(?<!\*)\*(?!\*)", r"\\\g<0>", part)
        elif part.startswith("$"):
            parts[i] = f":math:`{' '.join(part[1:-1].split())}`"
        else:
            parts[i] = link(" ".join(part[1:-1].split()), module)
    return "".join(parts)


def formula(found: re.Match) -> str:
    """Converts a formula on lines of its own."""
    return f"\n{found[1]}.. math:: {' '.join(found[2].split())}\n"


def convert(text: str, module: str) -> str:
    """Converts a docstring, except for its sections, which napoleon reads."""
    text = re.sub(r"^( *)\$\$(.*?)\$\$$", formula, text, flags=re.MULTILINE | re.DOTALL)
    paragraphs = re.split(r"\n{2,}", text)
    for i, paragraph in enumerate(paragraphs):
        if paragraph.lstrip().startswith((">>>", ".. math::")):
            continue
        if paragraph.startswith("    "):  # an equation or a table: kept as it is
            paragraphs[i] = f"::\n\n{paragraph}"
        else:
            paragraphs[i] = inline(paragraph, module)
    return "\n\n".join(paragraphs)


class Named:
    """Shows a default value by its name: `float32`, not `<class '...float32'>`."""

    def __init__(self, value: Any):
        self.name = getattr(value, "__name__", None) or repr(value)

    def __repr__(self) -> str:
        return self.name


def signature_of_module(cls: type) -> str:
    """Returns the arguments of a Flax module, without those that Flax adds."""
    shown = []
    for p in inspect.signature(cls.__init__).parameters.values():
        if p.name not in ("self", "parent", "name"):
            default = p.empty if p.default is p.empty else Named(p.default)
            shown.append(p.replace(annotation=p.empty, default=default))
    return str(inspect.Signature(shown))


def setup(app: Any) -> dict[str, bool]:
    """Registers both conversions; that of the text runs before napoleon."""

    def text(app, what, name, obj, options, lines):
        prefixes = [m for m in MODULES if name.startswith(f"{m}.")]
        module = max(prefixes, key=len, default=PACKAGE)
        lines[:] = convert("\n".join(lines), module).split("\n")

    def signature(app, what, name, obj, options, signature, returns):
        return (signature_of_module(obj), None) if name.endswith("Embed") else None

    app.connect("autodoc-process-docstring", text, priority=400)
    app.connect("autodoc-process-signature", signature)
    return {"parallel_read_safe": True}
