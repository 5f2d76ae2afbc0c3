"""The house keeps its order: imports go down only, and every public name is documented."""

import ast
import inspect
import subprocess
import sys
from pathlib import Path

import pytest

import flax_stable_embed as fse
from tests.tools import public_names

PACKAGE = Path(fse.__file__).parent
FILES = sorted(PACKAGE.rglob("*.py"))

# What each layer may import, besides the standard library and its own folder.
ALLOWED = {
    "ops": {"jax", "numpy"},
    "linen": {"jax", "numpy", "flax", "ops.embedding"},
    "nnx": {"jax", "numpy", "flax", "ops.embedding"},
    "optim": {"jax", "numpy", "optax", "ops"},
    "interop": {"jax", "numpy", "optax", "flax", "ops", "optim", "linen", "nnx"},
}
WITH_FLAX = {"optim/boxes.py", "optim/rows/row_value_and_grad.py"}


def imports_of(path):
    """Absolute names of all imports in a file; the package's own without its name in front."""
    package = path.relative_to(PACKAGE).with_suffix("").parts
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.level:
            base = package[: len(package) - node.level]
            module = ".".join((*base, *filter(None, (node.module or "").split("."))))
            yield from (f"{module}.{alias.name}".strip(".") for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield node.module


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(PACKAGE)))
def test_imports_go_down_only(path):
    name = str(path.relative_to(PACKAGE))
    layer = name.split("/")[0].removesuffix(".py")
    if layer == "__init__":
        return
    allowed = ALLOWED[layer] | {layer} | ({"flax"} if name in WITH_FLAX else set())
    for imported in imports_of(path):
        inside = any(imported == a or imported.startswith(a + ".") for a in allowed)
        assert inside or imported.split(".")[0] in sys.stdlib_module_names, f"{name} imports {imported}"


def test_no_kernel_language_is_imported_before_it_is_chosen():
    for path in FILES:
        top = [n for n in ast.parse(path.read_text()).body if isinstance(n, ast.Import | ast.ImportFrom)]
        assert path.name.startswith("pallas_") or not any("pallas" in ast.unparse(n) for n in top), path


def test_importing_the_package_touches_no_device():
    code = "import flax_stable_embed, jax._src.xla_bridge as bridge; assert not bridge._backends"
    subprocess.run([sys.executable, "-c", code], check=True)


@pytest.mark.parametrize(("name", "value"), list(public_names()), ids=lambda x: x if isinstance(x, str) else "")
def test_every_public_name_is_documented(name, value):
    assert inspect.getdoc(value), name
    if inspect.isfunction(value):
        assert ">>>" in value.__doc__, f"{name} has no example"
    if name.endswith("8bit"):
        source = [] if "interop" in name else ["Rule"]  # of bitsandbytes' own: bitsandbytes
        other = f"`fse.{name.rsplit('.')[-1]}" if "interop" in name else "`optax."
        for part in ("$$", "bitsandbytes", other, *source):
            assert part in value.__doc__, f"{name} does not say: {part}"
