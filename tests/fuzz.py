"""Throws random inputs at the functions that handle states: each gives the right result, or an error that says why.

    python -m tests.fuzz --seconds 600            other seeds each time; prints them, and ends with 1 if one failed
    python -m tests.fuzz --seeds 17 93            runs these again
    make fuzz SECONDS=7200

A seed stands for a pytree of parameters, an optimizer, a damage or none, and an operation. It fails if

- an error is neither a ValueError nor a TypeError, or names nothing: no `argument`, no 'path'
- a result has another structure, shape or dtype than the function promises
- finite inputs give NaN or infinity, or a damaged state trains without an error (unless the damage is a legal change)
- the process ends, or an operation takes longer than a minute

Seeds that have failed once are in `CORPUS`, and `make test` runs them again.
"""

import argparse
import re
import subprocess
import sys
import time
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

import flax_stable_embed as fse

CORPUS = (25, 1096, 1136, 1146, 2030, 137299937, 137300597, 137301159)
SLOW = 60  # seconds that an operation may take
SHAPES = [(), (0,), (1,), (7,), (64,), (64, 64), (33, 5), (0, 4), (4, 0), (1, 128)]
SHAPES += [(3, 3, 1, 64), (2, 2, 2, 2, 2), (4, 64, 64)]
FLOATS, OTHERS = ["float32", "bfloat16"], ["float16", "int32", "bool", "complex64", "float8_e4m3fn"]
SMALL = fse.StateFormat(min_size=0)


class Pair(NamedTuple):
    """A container that is not a dict, a list or a tuple."""

    first: Any
    second: Any


class Case(NamedTuple):
    """What a seed stands for."""

    params: Any
    optimizer: str
    tx: Any
    damage: str
    operation: str
    rng: np.random.Generator

    def __str__(self) -> str:
        shapes = jax.tree.map(lambda x: f"{x.dtype}{list(x.shape)}", self.params)
        return f"{self.operation} with {self.optimizer}, damage: {self.damage}, parameters: {shapes}"


OPTIMIZERS = {
    "adamw8bit": lambda: fse.adamw8bit(1e-3, state_format=SMALL),
    "adam8bit dynamic": lambda: fse.adam8bit(1e-3, state_format=fse.StateFormat("dynamic", min_size=0)),
    "lion8bit linear": lambda: fse.lion8bit(1e-3, state_format=fse.StateFormat("linear", min_size=0)),
    "rowwise": lambda: fse.adamw8bit(1e-3, rules=((".*", "rowwise"),)),
    "bf16": lambda: fse.rmsprop8bit(1e-3, momentum=0.9, rules=((".*", "bf16"),)),
    "stochastic": lambda: fse.adamw8bit(1e-3, state_format=fse.StateFormat(rounding="stochastic", min_size=0)),
    "lamb8bit": lambda: fse.lamb8bit(1e-3, state_format=SMALL),
    "lars8bit": lambda: fse.lars8bit(1e-3, state_format=SMALL),
    "adagrad8bit": lambda: fse.adagrad8bit(1e-3, state_format=SMALL),
    "ademamix8bit": lambda: fse.ademamix8bit(1e-3, state_format=SMALL),
    "sgd8bit": lambda: fse.sgd8bit(1e-3, momentum=0.9, state_format=SMALL),
    "quantize_state": lambda: fse.quantize_state(optax.adam(1e-3), state_format=SMALL),
    "split_weights": lambda: fse.split_weights(fse.adamw8bit(1e-3, state_format=SMALL)),
    "split_weights 32": lambda: fse.split_weights(fse.lion8bit(1e-3, state_format=SMALL), 32),
    "stochastic_round_updates": lambda: fse.stochastic_round_updates(fse.adamw8bit(1e-3, state_format=SMALL)),
    "chain": lambda: fse.chain(optax.clip_by_global_norm(1.0), fse.adamw8bit(1e-3, state_format=SMALL)),
    "percentile_clipping": lambda: fse.chain(fse.percentile_clipping(10), fse.sgd8bit(1e-3, momentum=0.9)),
    "in_place": lambda: fse.in_place(fse.adamw8bit(1e-3, state_format=SMALL)),
    "MultiSteps": lambda: optax.MultiSteps(fse.adamw8bit(1e-3, state_format=SMALL), 2),
    "inject_hyperparams": lambda: optax.inject_hyperparams(fse.adamw8bit)(learning_rate=1e-3),
    "optax.adamw": lambda: optax.adamw(1e-3),
}
OF_OPTAX = "optax.adamw", "MultiSteps", "inject_hyperparams"
DAMAGES = ["none"] * 4 + ["dtype", "shape", "missing", "none leaf", "python number", "swapped"]
DAMAGES += ["nan gradient", "inf weight", "other params", "zeros"]
OPERATIONS = ["update", "fused_update", "jit", "describe", "abstract_state", "init"]
OPERATIONS += ["convert_state", "adapt_state", "reset_moments", "master_weights"]


def case_of(seed: int) -> Case:
    """Returns the case of a seed."""
    rng = np.random.default_rng(seed)
    pick = lambda options: options[int(rng.integers(len(options)))]  # noqa: E731

    def leaf():
        exotic = rng.random() < 0.06
        dtype = jnp.dtype(pick(OTHERS if exotic else FLOATS))
        return jnp.asarray(rng.normal(size=pick(SHAPES))).astype(dtype)

    def tree(depth):
        kind = rng.integers(8 if depth else 1)
        if kind < 3:
            return leaf()
        names = ["kernel", "bias", "embedding", "scale", "a/b", "value", "0", "wte"]
        inside = [tree(depth - 1) for _ in range(int(rng.integers(1, 4)))]
        if kind == 3:
            return inside
        if kind == 4:
            return Pair(inside[0], inside[-1] if rng.random() < 0.8 else None)
        if kind == 5:
            return {i: x for i, x in enumerate(inside)}
        return {str(rng.permutation(names)[i]): x for i, x in enumerate(inside)}

    params = {"layer": tree(2), "head": tree(1)}
    name = pick(list(OPTIMIZERS))
    return Case(params, name, OPTIMIZERS[name](), pick(DAMAGES), pick(OPERATIONS), rng)


def damaged(case: Case, state: Any) -> Any:
    """Returns the state with a damage of the kind that loaders and hands do."""
    leaves, structure = jax.tree.flatten(state)
    if not leaves:
        return state
    i, other = (int(case.rng.integers(len(leaves))) for _ in range(2))
    x = leaves[i]
    if case.damage == "dtype":
        leaves[i] = jnp.asarray(x).astype([jnp.float16, jnp.float32, jnp.int8, jnp.int32][int(case.rng.integers(4))])
    elif case.damage == "shape":
        leaves[i] = jnp.pad(x, [(0, 1)] * x.ndim) if x.ndim else jnp.zeros(3, x.dtype)
    elif case.damage == "none leaf":
        leaves[i] = None
    elif case.damage == "python number":
        leaves[i] = 0
    elif case.damage == "swapped":
        leaves[i], leaves[other] = leaves[other], leaves[i]
    elif case.damage == "zeros":
        return jax.tree.map(jnp.zeros_like, state)
    elif case.damage == "missing":
        flat = list(state) if isinstance(state, tuple) else [state]
        return tuple(flat[:-1])
    return structure.unflatten(leaves)


def changed(case: Case, params: Any) -> Any:
    """Returns parameters of which some have grown, and some are new or gone."""

    def grown(x):
        if not x.ndim or case.rng.random() < 0.6:
            return x
        longer = int(case.rng.integers(x.ndim))  # one axis, so that the array stays small
        return jnp.pad(x, [(0, (axis == longer) * int(case.rng.integers(1, 3)) * 32) for axis in range(x.ndim)])

    new = jax.tree.map(grown, params)
    if case.rng.random() < 0.3:
        new = new | {"new": jnp.ones((64, 32))}
    if case.rng.random() < 0.2:
        new.pop("head")
    return new


def run(seed: int) -> str | None:
    """Runs the case of a seed. Returns what is wrong, or None."""
    case = case_of(seed)
    try:
        return _run(case)
    except (ValueError, TypeError) as error:
        text = str(error)
        names_something = re.search(r"`[\w.\[\]]+|'[\w/.]*'|\"", text)
        return (
            None if names_something else f"{case}\n  an error that names nothing: {type(error).__name__}: {text[:300]}"
        )
    except Exception as error:  # of any kind: that is the test
        return f"{case}\n  {type(error).__name__}: {str(error)[:300]}"


def _run(case: Case) -> str | None:
    tx, params = case.tx, case.params
    if case.operation == "describe":
        str(fse.describe(tx, params))
        return None
    state = tx.init(params)
    if case.operation == "init":
        return _same(case, jax.eval_shape(tx.init, params), state)
    if case.operation == "abstract_state":
        return _same(case, fse.abstract_state(tx, params), state)
    grads = jax.tree.map(lambda p: jnp.asarray(case.rng.normal(size=p.shape)).astype(p.dtype), params)
    if case.damage == "nan gradient":
        grads = jax.tree.map(lambda g: g * np.nan if jnp.issubdtype(g.dtype, jnp.inexact) else g, grads)
    if case.damage == "inf weight":
        params = jax.tree.map(lambda p: p * np.inf if jnp.issubdtype(p.dtype, jnp.inexact) else p, params)
    if case.damage == "other params":
        params = changed(case, params)
        grads = jax.tree.map(jnp.ones_like, params)
    elif case.damage not in ("none", "nan gradient", "inf weight"):
        state = damaged(case, state)
    healthy = case.damage in ("none", "zeros")
    if case.operation in ("update", "jit", "fused_update"):
        if case.optimizer in OF_OPTAX and case.damage != "none":
            return None  # optax checks nothing
        return _stepped(case, grads, state, params, healthy=healthy)
    if case.operation == "convert_state":
        other = OPTIMIZERS[case.optimizer]()
        return _same(case, fse.convert_state(tx, other, params, state), tx.init(params))
    if case.operation == "adapt_state":
        new = changed(case, case.params)
        adapted, report = fse.adapt_state(tx, state, case.params, new)
        str(report)
        return _same(case, adapted, tx.init(new))
    if case.operation == "reset_moments":
        where = jax.tree.map(lambda _: bool(case.rng.integers(2)), case.params)
        after, want = fse.reset_moments(tx, state, case.params, where), tx.init(case.params)
        if case.damage in ("dtype", "swapped"):  # what is not reset stays as it is, and floats may have been cast
            return None if jax.tree.structure(after) == jax.tree.structure(want) else f"{case}\n  another structure"
        return _same(case, after, want)
    if case.operation == "master_weights":
        fse.master_weights(tx, params, state)
    return None


def _stepped(case: Case, grads: Any, state: Any, params: Any, *, healthy: bool) -> str | None:
    tx = case.tx

    def step(params, state, grads):
        if case.operation == "fused_update" and hasattr(tx, "fused_update"):
            return fse.fused_update(tx, grads, state, params)
        updates, state = tx.update(grads, state, params)
        return optax.apply_updates(params, updates), state

    new, after = (jax.jit(step) if case.operation == "jit" else step)(params, state, grads)
    if wrong := _same(case, new, params) or _same(case, after, tx.init(params)):
        return wrong
    finite = [jnp.isfinite(x).all() for x in jax.tree.leaves(new) if jnp.issubdtype(x.dtype, jnp.floating)]
    if healthy and case.optimizer not in OF_OPTAX and not all(finite):
        return f"{case}\n  finite inputs gave NaN or infinity"
    return None


def _same(case: Case, found: Any, want: Any) -> str | None:
    """Returns what differs in structure, shapes and dtypes."""
    if jax.tree.structure(found) != jax.tree.structure(want):
        return f"{case}\n  another structure"
    for x, y in zip(jax.tree.leaves(found), jax.tree.leaves(want)):
        if (jnp.shape(x), jnp.result_type(x)) != (jnp.shape(y), jnp.result_type(y)):
            shapes = " instead of ".join(f"{jnp.result_type(a)}{list(jnp.shape(a))}" for a in (x, y))
            return f"{case}\n  {shapes}"
    return None


def main() -> None:
    """Runs seeds, in processes of their own, for some time."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=600)
    parser.add_argument("--seeds", type=int, nargs="*", help="run these, in this process")
    args = parser.parse_args()
    if args.seeds is not None:
        wrong = [(seed, text) for seed in args.seeds if (text := _timed(seed))]
        for seed, text in wrong:
            print(f"seed {seed}: {text}", flush=True)
        sys.exit(bool(wrong))
    first = time.time_ns() // 10**6 % 10**9
    end, done, failed = time.monotonic() + args.seconds, 0, 0
    while time.monotonic() < end:
        seeds = [str(first + done + i) for i in range(100)]
        command = [sys.executable, "-W", "ignore", "-m", "tests.fuzz", "--seeds", *seeds]
        try:
            out = subprocess.run(command, capture_output=True, text=True, timeout=100 * SLOW)
        except subprocess.TimeoutExpired:
            out = subprocess.CompletedProcess(command, -1, f"seeds {seeds[0]} to {seeds[-1]}: a hang", "")
        if out.returncode:
            failed += 1
            print(out.stdout or f"seeds {seeds[0]} to {seeds[-1]}: the process ended with {out.returncode}", flush=True)
            print(out.stderr[-1000:] if out.returncode not in (0, 1) else "", flush=True)
        done += len(seeds)
    print(f"{done} cases from seed {first}; {failed} of {done // 100} batches had failures")
    sys.exit(bool(failed))


def _timed(seed: int) -> str | None:
    began = time.monotonic()
    found = run(seed)
    took = time.monotonic() - began
    return found or (f"took {took:.0f} s" if took > SLOW else None)


if __name__ == "__main__":
    main()
