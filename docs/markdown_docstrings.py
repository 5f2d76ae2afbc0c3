"""Docstrings are Markdown, as editors and notebooks show them: here they become what autodoc reads.

Formulas between dollars, indented equations, names between backticks, which link to the reference where it has them.
"""

import importlib
import inspect
import re
from typing import Any

PACKAGE = "flax_stable_embed"
MODULES = (PACKAGE, f"{PACKAGE}.linen", f"{PACKAGE}.nnx", f"{PACKAGE}.ops", f"{PACKAGE}.interop.bitsandbytes")


def public(name: str) -> bool:
    """Whether a full name is one of ours: a function or class in the table of contents of a public module."""
    module, _, attribute = name.rpartition(".")
    value = getattr(importlib.import_module(module), attribute, None) if module in MODULES else None
    return getattr(value, "__module__", "").startswith(PACKAGE) and not inspect.ismodule(value)


def link(name: str, module: str) -> str:
    """What stands between backticks, as a link if it is a public name, seen from `module`."""
    full = re.sub(r"^fse\.", f"{PACKAGE}.", name)
    for candidate in (full, f"{module}.{name}", f"{PACKAGE}.{name}"):
        if re.fullmatch(r"[\w.]+", name) and public(candidate):
            return f":py:obj:`{name} <{candidate}>`"
    return f"``{name}``"


def inline(text: str, module: str) -> str:
    """One stretch of prose."""
    pieces = re.split(r"(`[^`]+`|\$[^$]+\$)", text)
    for i, piece in enumerate(pieces):
        if i % 2 == 0:
            pieces[i] = re.sub(r"\||(?<!\*)\*(?!\*)", r"\\\g<0>", piece)
        elif piece.startswith("$"):
            pieces[i] = f":math:`{' '.join(piece[1:-1].split())}`"
        else:
            pieces[i] = link(" ".join(piece[1:-1].split()), module)
    return "".join(pieces)


def formula(found: re.Match) -> str:
    """A formula on lines of its own."""
    return f"\n{found[1]}.. math:: {' '.join(found[2].split())}\n"


def convert(text: str, module: str) -> str:
    """A docstring as reStructuredText, but for its sections, which napoleon reads."""
    text = re.sub(r"^( *)\$\$(.*?)\$\$$", formula, text, flags=re.MULTILINE | re.DOTALL)
    paragraphs = re.split(r"\n{2,}", text)
    for i, paragraph in enumerate(paragraphs):
        if paragraph.lstrip().startswith((">>>", ".. math::")):
            continue
        if paragraph.startswith("    "):  # an equation or a table, as it stands
            paragraphs[i] = f"::\n\n{paragraph}"
        else:
            paragraphs[i] = inline(paragraph, module)
    return "\n\n".join(paragraphs)


class Named:
    """A default value by its name: `float32`, not `<class 'jax.numpy.float32'>`."""

    def __init__(self, value: Any):
        self.name = getattr(value, "__name__", None) or repr(value)

    def __repr__(self) -> str:
        return self.name


def signature_of_module(cls: type) -> str:
    """The arguments of a Flax module, whose class hides them (NNX) or adds its own (Linen)."""
    parameters = inspect.signature(cls.__init__).parameters.values()
    kept = [p.replace(annotation=p.empty) for p in parameters if p.name not in ("self", "parent", "name")]
    named = [p if p.default is p.empty else p.replace(default=Named(p.default)) for p in kept]
    return str(inspect.Signature(named))


def setup(app: Any) -> dict[str, bool]:
    """Text runs before napoleon does."""

    def text(app, what, name, obj, options, lines):
        module = max((m for m in MODULES if name.startswith(f"{m}.")), key=len, default=PACKAGE)
        lines[:] = convert("\n".join(lines), module).split("\n")

    def signature(app, what, name, obj, options, signature, returns):
        return (signature_of_module(obj), None) if name.endswith("Embed") else None

    app.connect("autodoc-process-docstring", text, priority=400)
    app.connect("autodoc-process-signature", signature)
    return {"parallel_read_safe": True}
