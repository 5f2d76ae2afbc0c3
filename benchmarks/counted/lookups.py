"""Counts the bytes that a StableEmbed moves, as kernels and as XLA compiles it for TPU. Nothing runs.

    python -m benchmarks lookups            writes results/lookups.json, prints the table
    python -m benchmarks lookups --quick    one small table; writes no file

Needs the extra `tpu`, but no TPU. The compiled program tells the bytes that it moves to and from the memory of the
chip, and the bytes of temporaries. A lookup reads one row per token, and an addition to rows in place reads and writes
only these rows, so they count instead of the full table. XLA's program for v6e looks rows up on the SparseCore. The
compiler does not print such a program, so it has no count of bytes.
"""

import json
import os
from collections.abc import Callable, Iterator
from functools import partial
from importlib.metadata import version
from importlib.util import find_spec
from itertools import product
from math import prod
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

import flax_stable_embed as fse
from flax_stable_embed.ops.embedding.normalized_rows.api import normalized_rows
from flax_stable_embed.ops.embedding.normalized_rows.reference import Options, reference

from ..harness import report
from ..harness.modules import Shape
from . import compiled as compiled_program
from .compiled import QUIET, Stored, devices_of, operations

CHIPS = ("v5e", "v6e")
SHAPES = Shape(32_768, 4096, 65_536), Shape(32_768, 768, 65_536), Shape(262_144, 2048, 8192)
QUICK = (Shape(4096, 1024, 8192),)
WAYS: dict[str, Callable] = {"XLA": reference, "kernels": normalized_rows}
BOTH, FORWARD, BACKWARD = "forward and backward", "forward", "backward"


def compiled(shape: Shape, way: str, what: str, device: Any, dtype: Any = jnp.float32) -> Any:
    """Compiles the output, the gradients of all parameters, or both, for one chip."""
    options = Options(1e-5, None, in_bounds=False, dtype=jnp.dtype(dtype), kernels=("tpu",), in_float32=True)
    here = jax.sharding.SingleDeviceSharding(device)

    def array(*extents: int, dtype: Any = jnp.float32) -> Any:
        return jax.ShapeDtypeStruct(extents, dtype, sharding=here)

    def step(table: Any, scale: Any, bias: Any, ids: Any, dy: Any) -> Any:
        y, pullback = jax.vjp(lambda *parameters: WAYS[way](options, *parameters, ids), table, scale, bias)
        return {FORWARD: (y,), BACKWARD: pullback(dy), BOTH: (y, *pullback(dy))}[what]

    vector, ids = array(shape.features), array(shape.tokens, dtype=jnp.int32)
    args = (
        array(shape.num_embeddings, shape.features),
        vector,
        vector,
        ids,
        array(shape.tokens, shape.features, dtype=dtype),
    )
    return jax.jit(step).lower(*args).compile()


# --- on meshes, next to Flax's modules --------------------------------------------------------------------------------

ROWS, FEATURES, BATCH, LENGTH = 32_768, 2048, 32, 1024
MESHES = {  # the shape of the mesh, and how table and ids are sharded
    "one chip": ((1, 1), P(), P("data")),
    "4 chips, replicated table": ((4, 1), P(), P("data")),
    "4 chips, table over features": ((4, 1), P(None, "data"), P("data")),
    "4 chips, table over rows": ((4, 1), P("data"), P("data")),
    "2 x 2 chips, table over features": ((2, 2), P(None, "model"), P("data")),
}


class FlaxStableEmbed(linen.Module):
    """Flax's modules with the equation of a stable embedding."""

    num_embeddings: int
    features: int
    dtype: Any

    @linen.compact
    def __call__(self, ids: Any) -> Any:
        rows = linen.Embed(self.num_embeddings, self.features, dtype=self.dtype)(ids)
        return linen.LayerNorm(1e-5, self.dtype)(rows)


MODULES = {"StableEmbed": (fse.linen.StableEmbed, FlaxStableEmbed), "Embed": (fse.linen.Embed, linen.Embed)}


def on_mesh(module: Any, where: str, devices: Any) -> Any:
    """Compiles outputs and gradients of a module of ROWS x FEATURES, whose gradients are sharded as its parameters."""
    sizes, of_table, of_ids = MESHES[where]
    mesh = Mesh(np.array(devices[: prod(sizes)]).reshape(sizes), ("data", "model"), axis_types=(AxisType.Auto,) * 2)

    def place(x: Any, spec: P) -> Any:
        return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=NamedSharding(mesh, spec))

    shapes = jax.eval_shape(module.init, jax.random.key(0), jnp.zeros((1, 1), jnp.int32))
    params = jax.tree.map(lambda x: place(x, of_table if x.ndim == 2 else P()), shapes)
    ids = place(jax.ShapeDtypeStruct((BATCH, LENGTH), jnp.int32), of_ids)
    dy = place(jax.ShapeDtypeStruct((BATCH, LENGTH, FEATURES), module.dtype), of_ids)

    def step(params: Any, ids: Any, dy: Any) -> Any:
        y, pullback = jax.vjp(lambda params: module.apply(params, ids), params)
        return y, pullback(dy)[0]

    shardings = dy.sharding, jax.tree.map(lambda x: x.sharding, params)
    return jax.jit(step, out_shardings=shardings).lower(params, ids, dy).compile()


def measured_on_mesh(name: str, where: str, dtype: Any, devices: Any) -> dict[str, Any]:
    """Returns the bytes that our module and Flax's move to and from the memory of one chip."""
    ours, theirs = (on_mesh(kind(ROWS, FEATURES, dtype=dtype), where, devices).as_text() for kind in MODULES[name])
    row = {"module": name, "where": where, "dtype": jnp.dtype(dtype).name, "kernels": compiled_program.kernels(ours)}
    return row | {"ours": compiled_program.memory_bytes(ours), "theirs": compiled_program.memory_bytes(theirs)}


# --- tables -----------------------------------------------------------------------------------------------------------


def moved_bytes(text: str, shape: Shape) -> int:
    """Returns the bytes moved to and from the memory of the chip. Of a table, only the rows that are needed count."""
    table = shape[:2]

    def moved(x: Stored, rows: int) -> int:
        return rows * x.width * shape.features if x.shape == table else x.bytes

    def of_operations() -> Iterator[int]:
        for name, results, operands in operations(text):
            is_lookup = name.startswith(("gather", "normalized_rows")) and "gradient" not in name
            in_place = "scatter" in name and any(x.shape == table for x in operands)
            rows = shape.tokens if is_lookup else min(table[0], shape.tokens)
            looks = is_lookup or in_place or "gradient" in name
            yield sum(moved(x, rows) if looks else x.bytes for x in operands)
            yield sum(moved(x, rows) if in_place else x.bytes for x in results)

    return sum(of_operations())


def measured(chip: str, shape: Shape, what: str, way: str, device: Any) -> dict[str, Any]:
    """Returns the counts of one program."""
    program = compiled(shape, way, what, device)
    try:
        moved = moved_bytes(program.as_text(), shape)
    except jax.errors.JaxRuntimeError:  # the compiler cannot print a program that uses the SparseCore
        moved = None
    temporaries = program.memory_analysis().temp_size_in_bytes
    return {"chip": chip, "shape": shape, "what": what, "way": way, "bytes": moved, "temporaries": temporaries}


def measure(quick: bool) -> dict[str, Any]:
    """Returns the counts of all programs. A quick run has one small table on one chip."""
    os.environ.update(QUIET)
    results = {"environment": report.environment("lookups"), "compiler": version("libtpu")}
    cases = product(CHIPS[:1] if quick else CHIPS, QUICK if quick else SHAPES, (FORWARD, BOTH), WAYS)
    results["rows"] = [measured(*case, devices_of(case[0])[0]) for case in cases]
    everywhere = product(MODULES, list(MESHES)[1:2] if quick else MESHES, (jnp.float32, jnp.bfloat16))
    results["meshes"] = [measured_on_mesh(*case, devices_of("v5e")) for case in everywhere]
    return json.loads(json.dumps(results))


def least_bytes(shape: Shape, what: str) -> int:
    """Returns the bytes that any program has to move: a row and an output per token, and gradients in and out."""
    rows, table = 4 * shape.tokens * shape.features, 4 * shape.num_embeddings * shape.features
    return 2 * rows + (0 if what == FORWARD else rows + table + min(rows, table))


def markdown(results: dict[str, Any]) -> str:
    """Returns the table: one line per shape and computation, some columns per chip."""
    rows = {(row["chip"], *row["shape"], row["what"], row["way"]): row for row in results["rows"]}
    chips = list(dict.fromkeys(row["chip"] for row in results["rows"]))
    columns = [f"{chip}: {what}" for chip in chips for what in ("GB, XLA", "kernels", "temporaries, XLA", "kernels")]
    lines = [["table, tokens", "computation", "least GB", *columns], ["---", "---", *["--:"] * (len(columns) + 1)]]
    for *sizes, what in dict.fromkeys((*row["shape"], row["what"]) for row in results["rows"]):
        shape = Shape(*sizes)
        here = [rows[chip, *shape, what, way] for chip in chips for way in WAYS]
        by_chip = [here[k : k + 2] for k in range(0, len(here), 2)]
        counted = [_gb(row[field]) for both in by_chip for field in ("bytes", "temporaries") for row in both]
        name = f"{shape.num_embeddings:,} x {shape.features:,}, {shape.tokens:,}"
        lines.append([name, what, _gb(least_bytes(shape, what)), *counted])
    env = results["environment"]
    about = (
        f"`python -m benchmarks lookups` at {env['commit']}: counts of the compiler (libtpu {results['compiler']}); "
        "nothing has run. `StableEmbed` in float32 on one chip: GB moved to and from its memory, and GB of temporaries."
    )
    return about + "\n\n" + report.table(lines) + "\n\n" + _meshes(results["meshes"])


def _meshes(rows: list[dict[str, Any]]) -> str:
    """Returns the table of meshes: one line per mesh, two columns per module and dtype."""
    kinds = list(dict.fromkeys((row["module"], row["dtype"]) for row in rows))
    lines = [["v5e", *(f"`{module}`, {dtype}" for module, dtype in kinds)], ["---", *["--:"] * len(kinds)]]
    for where in dict.fromkeys(row["where"] for row in rows):
        here = {(row["module"], row["dtype"]): row for row in rows if row["where"] == where}
        ratios = [f"{here[kind]['ours'] / here[kind]['theirs']:.2f}" for kind in kinds]
        lines.append([where, *(f"{x}, kernels" if here[kind]["kernels"] else x for x, kind in zip(ratios, kinds))])
    return (
        "Bytes that one chip moves to and from its memory for outputs and gradients, relative to Flax's modules, for a "
        f"float32 table of {ROWS:,} x {FEATURES:,} and {BATCH * LENGTH:,} tokens. Flax sums gradients of bfloat16 "
        "outputs in bfloat16. Ours are sums in float32.\n\n" + report.table(lines)
    )


def _gb(n: int | None) -> str:
    return "" if n is None else f"{n / 1e9:.2f}"


FILE = report.RESULTS / "lookups.json"


def main(arguments: list[str]) -> None:
    """Counts, prints, and keeps the results of a full run."""
    missing = "" if find_spec("libtpu") else "No compiler for TPU is installed. Install the extra `tpu`."
    keep = partial(report.save, path=FILE)
    report.run("lookups", __doc__, arguments, measure, markdown, keep, missing=missing)
