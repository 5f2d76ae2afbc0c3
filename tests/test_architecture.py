"""Tests the structure: imports go down only, tests mirror the package, and every public name is documented."""

import ast
import inspect
import subprocess
import sys
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

import flax_stable_embed as fse
from tests.tools import public_names

PACKAGE = Path(fse.__file__).parent
TESTS = Path(__file__).parent
FILES = sorted(PACKAGE.rglob("*.py"))

# What each layer may import, besides the standard library and its own folder.
ALLOWED = {
    "ops": {"jax", "numpy"},
    "linen": {"jax", "numpy", "flax", "ops.embedding"},
    "nnx": {"jax", "numpy", "flax", "ops.embedding"},
    "optim": {"jax", "numpy", "optax", "ops"},
    "interop": {"jax", "numpy", "optax", "flax", "ops", "optim", "linen", "nnx"},
    "experimental": {"optim"},
}
WITH_FLAX = {"optim/boxes.py", "optim/rows/row_value_and_grad.py"}

# Levels inside a layer, from the ground up. A file or folder imports only from lower levels of its layer.
LEVELS = {
    "ops": [
        {"dtypes", "jax_compat", "rounding"},
        {"sealed", "argument_sharding", "sharding", "split_weights"},
        {"counter_random", "lowering", "sharded_like"},
        {"blockwise", "embedding"},
        {"blockwise_step"},
    ],
    "optim": [
        {"boxes", "derivatives", "split_parameter"},
        {"trees"},
        {"arguments", "placement"},
        {"fused_update", "microbatches"},
        {"storage"},
        {"engine", "rows"},
        {"methods", "states", "step_in_backward", "transforms"},
    ],
}
FACES = {"ops"}  # folders whose `__init__` is their public face and imports from all of their levels


def imports_of(path):
    """Absolute names of all imports in a file. The name of the package itself is left out."""
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


def part_of(module):
    """The layer of a module and its level there, by name: ("optim", "storage")."""
    layer, _, rest = module.partition(".")
    return layer, rest.partition(".")[0]


@pytest.mark.parametrize("layer", LEVELS)
def test_inside_a_layer_imports_go_down_only(layer):
    level_of = {name: level for level, names in enumerate(LEVELS[layer]) for name in names}
    on_disk = {
        path.stem for path in (PACKAGE / layer).iterdir() if path.suffix == ".py" or (path / "__init__.py").exists()
    }
    assert on_disk - {"__init__"} == level_of.keys(), "every file and folder has a level"
    for path in sorted((PACKAGE / layer).rglob("*.py")):
        own = path.relative_to(PACKAGE / layer).with_suffix("").parts[0]
        if own == "__init__" and layer in FACES:
            continue
        for imported in imports_of(path):
            there, name = part_of(imported)
            if there == layer and name != own:
                assert level_of[name] < level_of[own], f"{path} imports {imported}, which is not below it"


def module_of(path):
    parts = path.relative_to(PACKAGE).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def test_no_files_import_each_other_in_a_circle():
    modules = {module_of(path): path for path in FILES}
    graph = {}
    for module, path in modules.items():
        found = {name if name in modules else name.rpartition(".")[0] for name in imports_of(path)}
        graph[module] = (found & modules.keys()) - {module}
    try:
        TopologicalSorter({m: found for m, found in graph.items() if m}).prepare()
    except CycleError as error:
        pytest.fail(f"files import each other: {' -> '.join(error.args[1])}")


@pytest.mark.parametrize("layer", ["ops", "optim", "interop"])
def test_every_test_of_the_package_is_named_after_its_file(layer):
    """`test_lowering.py` tests `lowering.py` of the same folder; `test_lowering_on_meshes.py` is a part of it."""
    for path in sorted((TESTS / layer).rglob("test_*.py")):
        folder = PACKAGE / path.parent.relative_to(TESTS)
        names = {p.stem for p in folder.glob("*.py")} | {p.name for p in folder.iterdir() if p.is_dir()}
        tested = path.stem.removeprefix("test_")
        assert any(tested == name or tested.startswith(f"{name}_") for name in names), f"{path}: no such file"


def test_no_kernel_language_is_imported_before_it_is_chosen():
    for path in FILES:
        top = [n for n in ast.parse(path.read_text()).body if isinstance(n, ast.Import | ast.ImportFrom)]
        of_kernels = path.name.startswith(("pallas_", "gpu_"))
        assert of_kernels or not any(word in ast.unparse(n) for n in top for word in ("pallas", "gpu_")), path


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
