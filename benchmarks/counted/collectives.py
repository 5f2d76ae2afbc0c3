"""Counts the communication between the chips of a slice in a training step, in the compiled program. Nothing runs.

    python -m benchmarks collectives            writes results/collectives.json, prints the tables; about an hour
    python -m benchmarks collectives --quick    one mesh; writes no file

Needs the extra `tpu`. A decoder is trained with `optax.adamw` and with `adamw8bit`, under FSDP and with a second mesh
axis. The program of one chip tells the arrays that its collectives return, by kind, and their bytes. This compiler
writes a reduce-scatter as an all-reduce and then slices its result, so it counts as an all-reduce. Collectives of the
optimizer are told by their names: they carry its scope, or the name of the state. For embeddings only the output and
the gradients are compiled.
"""

import os
import re
from collections import Counter
from collections.abc import Callable
from functools import partial
from importlib.util import find_spec
from itertools import product
from math import prod
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.experimental.layout import Layout, with_layout_constraint
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

import flax_stable_embed as fse

from ..harness import report
from ..harness.modules import EmbedThenNorm
from ..harness.transformer import Transformer
from . import compiled

FILE = report.RESULTS / "collectives.json"
SMALL, LARGE = Transformer(), Transformer(width=4096, hidden=11008, head=128, layers=1)
TOKENS = 128  # per sequence; every device has one sequence
SCOPE = "optimizer"

BASELINE, BY_ROWS = "`optax.adamw`", "`optax.adamw`, gradients row by row in memory"
UPDATE, FUSED = "`update`", "`fused_update`"
FREE = "`fused_update`, blocks along axes that are not sharded"


class Case(NamedTuple):
    """A training step on a slice: its mesh, the type of its axes, and the optimizer."""

    slice: str
    mesh: tuple[int, int]  # fsdp x tensor
    axes: str
    step: str

    @property
    def model(self) -> Transformer:
        """Returns the model that is trained on the slice."""
        return SMALL if self.slice == "v5e:4x4" else LARGE

    @property
    def optimizer(self) -> Any:
        """Returns the optimizer, with the number of shards that a user of this mesh would set."""
        if self.step == BASELINE:
            return optax.adamw(1e-3)
        if self.step == BY_ROWS:
            return optax.chain(optax.stateless(_by_rows), optax.adamw(1e-3))
        if self.step == FREE:
            first = fse.Rule(state_format=fse.StateFormat(block_axis=0, shards=1))
            last = fse.StateFormat(block_axis=-1, shards=1)
            return fse.adamw8bit(1e-3, rules=(("(out|down)/kernel", first),), state_format=last)
        return fse.adamw8bit(1e-3, state_format=fse.StateFormat(shards=max(self.mesh)))


def _by_rows(grads: Any, params: Any) -> Any:
    """Returns the gradients in the layout that a kernel takes."""
    del params
    return jax.tree.map(lambda g: with_layout_constraint(g, Layout(tuple(range(g.ndim)))), grads)


def _cases() -> list[Case]:
    cases = []
    for where, meshes, steps in (
        ("v5e:4x4", ((16, 1), (4, 4)), (BASELINE, BY_ROWS, UPDATE, FUSED)),
        ("v5e:16x16", ((256, 1), (16, 16)), (BASELINE, BY_ROWS, FUSED, FREE)),
        ("v5p:4x4x4", ((64, 1), (16, 4)), (BASELINE, BY_ROWS, FUSED)),
    ):
        for mesh, axes, step in product(meshes, ("Auto", "Explicit"), steps):
            if (step == FREE and mesh[1] > 1) or (step == UPDATE and axes == "Explicit"):
                continue  # every axis is sharded; array types carry the sharding; both paths step the same arrays
            if step == BY_ROWS and mesh[1] == 1:
                continue  # compared with kernels on a mesh of two axes only
            cases.append(Case(where, mesh, axes, step))
    return cases


CASES = _cases()
QUICK = [case for case in CASES if case.slice == "v5e:4x4" and case.mesh == (4, 4) and case.axes == "Auto"]


def mesh_of(case: Case) -> Mesh:
    """Returns a mesh of chips to compile for. No chip has to be there."""
    from jax.experimental import topologies

    devices = topologies.get_topology_desc(platform="tpu", topology_name=case.slice).devices
    kinds = (getattr(AxisType, case.axes),) * 2
    return Mesh(np.array(devices).reshape(case.mesh), ("fsdp", "tensor"), axis_types=kinds)


def compiled_step(case: Case, model: Transformer) -> Any:
    """Compiles a training step: gradients, and the step of the optimizer with parameters and state in place."""
    tx, mesh = case.optimizer, mesh_of(case)
    specs, fused = model.specs(), case.step in (FUSED, FREE)

    def shaped(x, spec):
        return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=NamedSharding(mesh, spec))

    def step(params, state, ids):
        loss, grads = jax.value_and_grad(model.loss)(params, ids)
        with jax.named_scope(SCOPE):
            if fused:
                return *fse.fused_update(tx, grads, state, params), loss
            updates, state = tx.update(grads, state, params)
            return optax.apply_updates(params, updates), state, loss

    with jax.set_mesh(mesh):
        params = jax.tree.map(shaped, model.shapes(), specs)
        state = fse.abstract_state(tx, params)
        ids = jax.ShapeDtypeStruct((case.mesh[0], TOKENS), jnp.int32, sharding=NamedSharding(mesh, P("fsdp")))
        return jax.jit(step, donate_argnums=(0, 1)).lower(params, state, ids).compile()


# --- collectives of a compiled program -------------------------------------------------------------------------------

KINDS = "all-gather|all-reduce|reduce-scatter|all-to-all|ragged-all-to-all|collective-permute|collective-broadcast"
COLLECTIVE = re.compile(rf"^\s+(?:ROOT )?%([\w.-]+) = (.*?) ({KINDS})(-start)?\((.*)$", re.MULTILINE)
ARRAY = re.compile(r"\b([a-z]+\d*)\[([\d,]*)\]")


class Moved(NamedTuple):
    """The arrays that one collective returns on one device."""

    kind: str
    bytes: tuple[int, ...]  # of each array
    of_optimizer: bool


def collectives(text: str) -> list[Moved]:
    """Returns each collective of a compiled program once. Parts of one that overlap with other work share a channel."""
    found = {}
    for name, result, kind, start, rest in COLLECTIVE.findall(text):
        sizes = [
            prod(int(n) for n in extents.split(",") if n) * compiled.SIZES[dtype]
            for dtype, extents in ARRAY.findall(result)
        ]
        if start:  # operands, results and auxiliary arrays; for a permutation, operand and result have the same size
            sizes = sizes[:1] if kind == "collective-permute" else sizes[len(sizes) // 2 :]
        channel = re.search(r"channel_id=(\d+)", rest)
        of = re.search(r'op_name="([^"]*)"', rest)
        ours = of is not None and (f"/{SCOPE}/" in of[1] or of[1].startswith("state"))
        found.setdefault((kind, channel[1] if channel else name), Moved(kind, tuple(sizes), ours))
    return list(found.values())


def counted(moved: list[Moved]) -> dict[str, Any]:
    """Returns how many arrays each kind of collective returns, and the bytes of all of them."""
    kinds = Counter()
    for one in moved:
        kinds[one.kind] += len(one.bytes)
    return {"arrays": dict(sorted(kinds.items())), "bytes": sum(sum(one.bytes) for one in moved)}


def straddling(case: Case, model: Transformer) -> int | None:
    """Returns how many parameters have a block that is split between chips, according to `fse.describe`."""
    if case.step in (BASELINE, BY_ROWS):
        return None
    with jax.set_mesh(mesh_of(case)):
        rows = fse.describe(case.optimizer, model.shapes(), shardings=model.specs()).rows
    return sum(bool(row.straddles) for row in rows)


def measured(case: Case, model: Transformer | None = None) -> dict[str, Any]:
    """Returns the counts of one step, of the model of the slice by default."""
    model = model or case.model
    moved = collectives(compiled_step(case, model).as_text())
    optimizer = counted([one for one in moved if one.of_optimizer])
    return case._asdict() | {"straddling": straddling(case, model), "all": counted(moved), "optimizer": optimizer}


# --- the embedding ---------------------------------------------------------------------------------------------------


TABLES = {"vocabulary": P("tensor", None), "features": P(None, "tensor"), "both": P("tensor", "fsdp")}
MODULES: dict[str, Callable[[], Any]] = {
    "`nn.Embed`, `nn.LayerNorm`": lambda: EmbedThenNorm(32_000, 1024, use_fast_variance=False),
    "`fse.linen.StableEmbed`": lambda: fse.linen.StableEmbed(32_000, 1024),
}


def compiled_embedding(module: Any, spec: P, mesh: Mesh) -> Any:
    """Compiles output and gradients of a module. Its table is sharded as `spec` says, and the ids over "fsdp"."""
    ids = jax.ShapeDtypeStruct((16, TOKENS), jnp.int32)
    params = jax.eval_shape(module.init, jax.random.key(0), ids)

    def place(x):
        return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=NamedSharding(mesh, spec if x.ndim == 2 else P()))

    def step(params, ids, cotangent):
        y, pullback = jax.vjp(lambda params: module.apply(params, ids), params)
        return jax.lax.with_sharding_constraint(y, P("fsdp")), pullback(cotangent)[0]

    with jax.set_mesh(mesh):
        params, rows = jax.tree.map(place, params), NamedSharding(mesh, P("fsdp"))
        ids = jax.ShapeDtypeStruct(ids.shape, ids.dtype, sharding=rows)
        cotangent = jax.ShapeDtypeStruct((*ids.shape, 1024), jnp.float32, sharding=rows)
        out = rows, jax.tree.map(lambda x: x.sharding, params)
        return jax.jit(step, out_shardings=out).lower(params, ids, cotangent).compile()


def measured_embeddings() -> list[dict[str, Any]]:
    """Returns the counts of every module and every sharding of its table."""
    mesh, rows = mesh_of(QUICK[0]), []
    for (axes, spec), (name, make) in product(TABLES.items(), MODULES.items()):
        moved = collectives(compiled_embedding(make(), spec, mesh).as_text())
        rows.append({"table": axes, "module": name, "all": counted(moved)})
    return rows


# --- the tables ------------------------------------------------------------------------------------------------------


def measure(quick: bool) -> dict[str, Any]:
    """Returns the counts of all steps. A quick run has one mesh."""
    os.environ.update(compiled.QUIET)
    rows = []
    for case in QUICK if quick else CASES:
        rows.append(measured(case))
        jax.clear_caches()
    environment = report.environment("collectives")
    return {"environment": environment, "rows": rows, "embeddings": measured_embeddings()}


def beyond(row: dict[str, Any], rows: list[dict[str, Any]]) -> float:
    """Returns by which share a step moves more bytes than that of `optax.adamw` on the same mesh."""
    same = [r for r in rows if r["step"] == BASELINE and all(r[k] == row[k] for k in ("slice", "mesh", "axes"))]
    return row["all"]["bytes"] / same[0]["all"]["bytes"] - 1


def markdown(results: dict[str, Any]) -> str:
    """Returns one table of training steps and one of embeddings."""
    rows, env = results["rows"], results["environment"]
    head = [
        "slice",
        "fsdp x tensor",
        "axes",
        "step",
        "all collectives",
        "MB",
        "optimizer",
        "more than `optax.adamw`",
    ]
    lines = [head, [*["---"] * 4, *["--:"] * 4]]
    for row in rows:
        ours = row["optimizer"]
        extra = beyond(row, rows)
        more = [] if row["step"] == BASELINE else [_arrays(ours), "none" if extra == 0 else f"{extra:+.3%}"]
        mesh = " x ".join(map(str, row["mesh"]))
        where = [row["slice"], mesh, row["axes"], row["step"]]
        lines.append([*where, _arrays(row["all"]), f"{row['all']['bytes'] / 1e6:,.1f}", *(more or ["", ""])])
    tables = [["table sharded over", "output and gradients of", "collectives", "MB"], ["---", "---", "--:", "--:"]]
    for row in results["embeddings"]:
        size = f"{row['all']['bytes'] / 1e6:,.2f}"
        tables.append([row["table"], row["module"], _arrays(row["all"]), size])
    models = [f"width {m.width}, {m.hidden:,} hidden units and depth {m.layers}" for m in (SMALL, LARGE)]
    about = (
        f"`python -m benchmarks collectives` at {env['commit']}: counts of the compiler for TPU (jax "
        f"{env['versions']['jax']}); nothing has run. The model is a decoder of {models[0]} on {rows[0]['slice']}, and "
        f"of {models[1]} on larger slices, with a vocabulary of {SMALL.vocabulary:,}. The table counts the arrays "
        "that the collectives of a training step return on one chip, and their bytes. "
        '"Row by row in memory" means row-major order. '
        "A reduce-scatter counts as an all-reduce, because this compiler writes it as one."
    )
    return "\n\n".join([about, report.table(lines), report.table(tables)])


def _arrays(entry: dict[str, Any]) -> str:
    return ", ".join(f"{n} {kind}" for kind, n in entry["arrays"].items()) or "none"


def main(arguments: list[str]) -> None:
    """Counts, prints, and keeps the results of a full run."""
    missing = "" if find_spec("libtpu") else "No compiler for TPU is installed. Install the extra `tpu`."
    keep = partial(report.save, path=FILE)
    report.run("collectives", __doc__, arguments, measure, markdown, keep, missing=missing)
