"""Counts the memory of gradients: of a training step on a model of 12 layers, compiled for TPU and GPU. Nothing runs.

    python -m benchmarks gradients            writes results/gradients.json, prints the table
    python -m benchmarks gradients --quick    one way; writes no file

The layers are two matrices of 1024 x 4096, and the step sees 256 tokens, so that activations are small. The counts are
exact and come from the compiled program:
    arguments   parameters and optimizer state, bytes per parameter; they are updated in place
    temporaries memory that it needs besides them, bytes per parameter: gradients, sums, activations
    micro-step  bytes that a microbatch without a step of the optimizer reads and writes, besides its backward pass

Neither a TPU nor a GPU is needed, only their compilers: the extra `tpu` or the extra `cuda`.
"""

import json
import os
from functools import partial
from importlib.util import find_spec
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

import flax_stable_embed as fse

from ..harness import report
from .compiled import GPU, QUIET, compiling_for, devices_of, has_cuda, memory_bytes

FILE = report.RESULTS / "gradients.json"
LAYERS, WIDTH, HIDDEN, TOKENS, MICROBATCHES = 12, 1024, 4096, 256, 4
PARAMETERS = LAYERS * 2 * WIDTH * HIDDEN


class Way(NamedTuple):
    """A way to get from microbatches to new parameters."""

    tx: optax.GradientTransformation
    dtype: Any = jnp.float32
    scanned: bool = True  # the layers are stacked, and a `jax.lax.scan` runs them
    released: bool = False  # `fse.experimental.step_in_backward`
    sums: Any = None  # dtype of the sums of gradients over microbatches
    multi: bool = False  # `optax.MultiSteps`


ADAMW, ADAMW8BIT = optax.adamw(1e-3), fse.adamw8bit(1e-3)
SPLIT = fse.split_weights(ADAMW8BIT)
WAYS = {
    "`optax.adamw`, float32": Way(ADAMW),
    "`adamw8bit`, float32": Way(ADAMW8BIT),
    "`split_weights(adamw8bit)`": Way(SPLIT, jnp.bfloat16),
    "the same, a list of layers": Way(SPLIT, jnp.bfloat16, scanned=False),
    "the same, `step_in_backward`": Way(SPLIT, jnp.bfloat16, released=True),
    "4 microbatches, `optax.MultiSteps`": Way(SPLIT, jnp.bfloat16, multi=True),
    "4 microbatches, `microbatch_mean()`": Way(SPLIT, jnp.bfloat16, sums=jnp.float32),
    "4 microbatches, `microbatch_mean(bfloat16)`": Way(SPLIT, jnp.bfloat16, sums=jnp.bfloat16),
}
QUICK = "the same, `step_in_backward`"


def layer(params, x):
    """A layer of the model."""
    return x + jax.nn.gelu(x @ params["up"]) @ params["down"]


def loss_of(x):
    """Stands for the rest of the model."""
    return jnp.mean(jnp.square(x.astype(jnp.float32)))


def loss_fn(params, batch):
    """Runs the layers, as a list or stacked. Only their inputs are kept for the backward pass."""
    each = jax.checkpoint(layer)
    if isinstance(params, list):
        for one in params:
            batch = each(one, batch)
        return loss_of(batch)
    return loss_of(jax.lax.scan(lambda x, one: (each(one, x), None), batch, params)[0])


def parameters(way: Way) -> Any:
    """Returns the shapes of the parameters."""
    ahead = (LAYERS,) if way.scanned else ()
    one = {"up": (WIDTH, HIDDEN), "down": (HIDDEN, WIDTH)}
    shapes = {name: jax.ShapeDtypeStruct((*ahead, *shape), way.dtype) for name, shape in one.items()}
    return shapes if way.scanned else [shapes] * LAYERS


def stepped(tx, grads, state, params):
    """Runs the step of any optimizer."""
    if hasattr(tx, "fused_update"):
        return fse.fused_update(tx, grads, state, params)
    updates, state = tx.update(grads, state, params)
    return optax.apply_updates(params, updates), state


def multi_steps(way: Way) -> tuple[optax.MultiSteps, Any]:
    """Returns the wrapper of optax, and the shapes of its state with sums in float32."""
    multi, params = optax.MultiSteps(way.tx, MICROBATCHES), parameters(way)
    state = jax.eval_shape(multi.init, params)
    wide = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, jnp.float32), state.acc_grads)
    return multi, state._replace(acc_grads=wide)


def step_of(way: Way) -> tuple[Any, Any]:
    """Returns the training step and the shapes of its state. It donates parameters and state."""
    params = parameters(way)
    if way.released:
        released = fse.experimental.step_in_backward(lambda _, layers, batch: loss_of(layers(layer, batch)), way.tx)

        def step(params, state, batch):
            loss, _, params, state = released({}, params, state, batch)
            return params, state, loss

        return step, jax.eval_shape(jax.vmap(way.tx.init), params)
    tx, state = multi_steps(way) if way.multi else (way.tx, jax.eval_shape(way.tx.init, params))

    def step(params, state, batch):
        value_and_grad = jax.value_and_grad(loss_fn)
        if way.sums is not None:
            mean = fse.microbatch_mean(way.sums, step=state.count)
            microbatch = optax.microbatching.microbatch
            value_and_grad = microbatch(value_and_grad, argnums=1, microbatch_size=TOKENS, accumulator=mean)
        loss, grads = value_and_grad(params, batch)
        return *stepped(tx, grads, state, params), loss

    return step, state


def lowered(function, device, *args):
    """Compiles a function of arrays with these shapes, of which it donates the first two."""
    sharding = jax.sharding.SingleDeviceSharding(device)
    args = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding), args)
    with compiling_for(device):
        return jax.jit(function, donate_argnums=(0, 1)).lower(*args).compile()


def micro_step_bytes(way: Way, device: Any) -> float | None:
    """Returns the bytes per parameter that a microbatch moves besides its backward pass, if no step follows it."""
    params = parameters(way)
    if way.multi:
        multi, state = multi_steps(way)
        program = lowered(
            lambda params, state, grads: stepped(multi, grads, state, params), device, params, state, params
        )
        return memory_bytes(program.as_text()) / PARAMETERS
    if way.sums is None:
        return None
    mean = fse.microbatch_mean(way.sums, step=jnp.int32(0))
    carry = jax.eval_shape(mean.init, params)
    program = lowered(lambda carry, _, grads: mean.update(carry, grads, 0), device, carry, (), params)
    return memory_bytes(program.as_text()) / PARAMETERS


def measure(quick: bool) -> dict[str, Any]:
    """Returns the counts of all ways."""
    os.environ.update(QUIET)
    rows = []
    for chip in ("v5e",) if quick else ("v5e", GPU):
        devices = devices_of(chip)
        for name, way in WAYS.items():
            if devices is None or (quick and name != QUICK):
                continue
            step, state = step_of(way)
            batch = jax.ShapeDtypeStruct((TOKENS * (MICROBATCHES if way.sums is not None else 1), WIDTH), way.dtype)
            memory = lowered(step, devices[0], parameters(way), state, batch).memory_analysis()
            counts = {
                "arguments": memory.argument_size_in_bytes / PARAMETERS,
                "temporaries": memory.temp_size_in_bytes / PARAMETERS,
                "micro_step": micro_step_bytes(way, devices[0]) if chip == "v5e" else None,
            }
            rows.append({"chip": chip, "way": name} | counts)
    if not quick and FILE.exists():
        made = {row["chip"] for row in rows}
        rows += [row for row in json.loads(FILE.read_text())["rows"] if row["chip"] not in made]
    return {"environment": report.environment("gradients"), "rows": sorted(rows, key=lambda row: row["chip"] == GPU)}


def markdown(results: dict[str, Any]) -> str:
    """Returns the table: one line per way, some columns per chip."""
    by_way: dict[str, dict[str, Any]] = {}
    for row in results["rows"]:
        by_way.setdefault(row["way"], {})[row["chip"]] = row
    chips = list(dict.fromkeys(row["chip"] for row in results["rows"]))
    columns = ["parameters and state", *(f"{chip}: temporaries" for chip in chips), *(f"{chip}: all" for chip in chips)]
    lines = [["step", *columns, "micro-step moves"], ["---", *["--:"] * (len(columns) + 1)]]
    for name, rows in by_way.items():
        first = next(iter(rows.values()))
        temporaries = [f"{rows[chip]['temporaries']:.2f}" if chip in rows else "" for chip in chips]
        every = [f"{rows[chip]['arguments'] + rows[chip]['temporaries']:.2f}" if chip in rows else "" for chip in chips]
        micro = f"{first['micro_step']:.2f}" if first["micro_step"] else ""
        lines.append([name, f"{first['arguments']:.2f}", *temporaries, *every, micro])
    about = (
        f"`python -m benchmarks gradients`: bytes per parameter of a training step on {LAYERS} stacked layers of two "
        f"matrices, {WIDTH:,} x {HIDDEN:,}, with {TOKENS} tokens per microbatch. Counted by the compilers; nothing has "
        "run. Gradients, sums and activations are temporaries. The last column counts what a microbatch moves on v5e "
        "without a step of the optimizer, besides its backward pass."
    )
    return about + "\n\n" + report.table(lines)


def main(arguments: list[str]) -> None:
    """Counts, prints, and keeps the results of a full run."""
    there = find_spec("libtpu") or has_cuda()
    missing = "" if there else "No compiler for TPU or GPU is installed. Install the extra `tpu` or the extra `cuda`."
    report.run("gradients", __doc__, arguments, measure, markdown, partial(report.save, path=FILE), missing=missing)
