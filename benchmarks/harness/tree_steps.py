"""Runs steps of optimizers on full pytrees of parameters, as contenders that take turns; see timing.py.

On a GPU a turn is several steps in a row, so that the host stays ahead of the device. The time that the device was busy
is read from the profiler.
"""

import functools
import gc
import sys
import tempfile
from collections.abc import Callable
from importlib.util import find_spec
from math import prod
from pathlib import Path
from statistics import median
from time import perf_counter
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

import flax_stable_embed as fse

from . import report
from .contenders import ADAMW, LEARNING_RATE, step_of
from .shapes import many_small
from .timing import alternate, quartiles

BASELINE, OURS = "`optax.adamw`", "`fse.adamw8bit`, `fused_update`"
Tree = dict[str, Any]


def steps() -> int:
    """Returns the number of steps in a turn. On a GPU it is large, so that the host stays ahead."""
    return 10 if jax.default_backend() == "gpu" else 1


class Run(NamedTuple):
    """A contender that is compiled and ready. `turn` runs some steps and waits for the last one."""

    turn: Callable[[], None]
    compile_s: float
    state_bytes: int
    temp_bytes: int | None


# --- contenders ------------------------------------------------------------------------------------------------------


class Holder:
    """Parameters and gradients. Contenders of one framework share them and update the same parameters in place."""

    def __init__(self, shapes: dict[str, tuple[int, ...]], dtype: Any = jnp.float32):
        keys = dict(zip(shapes, jax.random.split(jax.random.key(0), len(shapes))))
        make = jax.jit(lambda key, shape: jax.random.normal(key, shape, dtype), static_argnums=1)
        self.grads = {name: 1e-3 * make(keys[name], shape) for name, shape in shapes.items()}
        self.params = {name: 0.02 * make(keys[name], shape) for name, shape in shapes.items()}

    @functools.cached_property
    def for_torch(self) -> list[Any]:
        """Returns torch parameters of the same shapes, with gradients, on the GPU."""
        import torch

        made = []
        for p in self.params.values():
            made.append(torch.nn.Parameter(0.02 * torch.randn(p.shape, device="cuda")))
            made[-1].grad = 1e-3 * torch.randn(p.shape, device="cuda")
        return made


def start(holder: Holder, tx: Any, fused: bool = True) -> Run:
    """Compiles a step of one transform, with parameters and state in place."""
    state = jax.jit(tx.init)(holder.params)
    jitted = jax.jit(step_of(tx, fused), donate_argnums=(0, 1))
    began = perf_counter()
    compiled = jitted.lower(holder.params, state, holder.grads).compile()
    compile_s = perf_counter() - began
    state_bytes = sum(x.nbytes for x in jax.tree.leaves(state))

    def turn() -> None:
        nonlocal state
        for _ in range(steps()):
            holder.params, state = jitted(holder.params, state, holder.grads)  # dispatched faster than `compiled`
        jax.block_until_ready((holder.params, state))

    turn()
    return Run(turn, compile_s, state_bytes, compiled.memory_analysis().temp_size_in_bytes)


def start_torch(holder: Holder, peer: str) -> Run:
    """Prepares an optimizer of torch, torchao or bitsandbytes."""
    import torch

    if peer == "torch":
        make = functools.partial(torch.optim.AdamW, fused=True)
    elif peer == "torchao":
        from torchao.optim import AdamW8bit as make
    else:
        from bitsandbytes.optim import AdamW8bit as make
    options = {"lr": LEARNING_RATE, "betas": (ADAMW["b1"], ADAMW["b2"]), "eps": ADAMW["eps"]}
    optimizer = make(holder.for_torch, **options, weight_decay=ADAMW["weight_decay"])

    def turn() -> None:
        for _ in range(steps()):
            optimizer.step()
        torch.cuda.synchronize()

    before = torch.cuda.memory_allocated()
    began = perf_counter()
    turn()
    compile_s = perf_counter() - began
    turn()
    return Run(turn, compile_s, torch.cuda.memory_allocated() - before, None)


def ours(codec: str = "root", rounding: str = "nearest", *, rules: Any = (), implementation: Any = None, **form: Any):
    """Returns AdamW of this library."""
    state_format = fse.StateFormat(codec, rounding, **form)
    return fse.adamw8bit(LEARNING_RATE, **ADAMW, rules=rules, state_format=state_format, implementation=implementation)


EIGHT = ((".*", 8),)  # 8 bits for all arrays that are large enough, also embeddings, as in other libraries
FIELD: dict[str, Callable[[Holder], Run]] = {
    BASELINE: lambda holder: start(holder, optax.adamw(LEARNING_RATE, **ADAMW), fused=False),
    OURS: lambda holder: start(holder, ours(rules=EIGHT)),
    "`fse.adamw8bit`, `update`": lambda holder: start(holder, ours(rules=EIGHT), fused=False),
    "`fse.adamw8bit`, embeddings in fp32 (default rules)": lambda holder: start(holder, ours()),
    "`fse.adamw8bit`, `dynamic`": lambda holder: start(holder, ours("dynamic", rules=EIGHT)),
    "`fse.adamw8bit`, stochastic": lambda holder: start(holder, ours(rounding="stochastic", rules=EIGHT)),
    "`fse.adamw8bit`, `xla`": lambda holder: start(holder, ours(rules=EIGHT, implementation="xla")),
    "torch `AdamW(fused=True)`": lambda holder: start_torch(holder, "torch"),
    "torchao `AdamW8bit`": lambda holder: start_torch(holder, "torchao"),
    "bitsandbytes `AdamW8bit`": lambda holder: start_torch(holder, "bitsandbytes"),
}


PEERS = ("torch", "torchao", "bitsandbytes")


def field() -> dict[str, Callable[[Holder], Run]]:
    """Returns the contenders that can run here."""
    gpu = jax.default_backend() == "gpu" and find_spec("torch") is not None
    there = {p: gpu and find_spec(p) is not None for p in PEERS}
    return {name: make for name, make in FIELD.items() if there.get(name.split()[0], True)}


def compared(shapes: dict[str, tuple[int, ...]], contenders: dict[str, Callable[[Holder], Run]], rounds: int) -> Tree:
    """Returns one row per contender."""
    holder, runs, rows = Holder(shapes), {}, {}
    for name, make in contenders.items():
        try:
            runs[name] = make(holder)
        except Exception as error:  # one library that fails on this GPU must not lose the rest
            if "fse" in name or "optax" in name:
                raise
            rows[name] = {"skip": f"{type(error).__name__}: {error}"[:200]}
    turns = alternate({name: run.turn for name, run in runs.items()}, budget_s=rounds, most_rounds=rounds)
    size = sum(map(prod, shapes.values()))
    for name, run in runs.items():
        state = run.state_bytes / size
        ms = quartiles([1e3 * t / steps() for t in turns[name]])
        rows[name] = {
            "state_bytes_per_parameter": state,
            "temp_bytes_per_parameter": None if run.temp_bytes is None else run.temp_bytes / size,
            "ms": ms,
            "device_ms": busy_ms(run.turn),
            "ratio": quartiles([t / b for t, b in zip(turns[name], turns[BASELINE])]),
            "gb_per_s": size * (12 + 2 * state) / ms[1] / 1e6,
            "first_s": run.compile_s,
        }
    del runs
    gc.collect()
    return {name: rows[name] for name in contenders}


def busy_ms(turn: Callable[[], None]) -> float | None:
    """Returns the milliseconds that the GPU was busy per step, the median of three turns, or None without a GPU."""
    if jax.default_backend() != "gpu":
        return None
    return median(_busy_ms(turn) for _ in range(3))


def _busy_ms(turn: Callable[[], None]) -> float:
    with tempfile.TemporaryDirectory() as folder:
        with jax.profiler.trace(folder):
            turn()
        (found,) = Path(folder).rglob("*.xplane.pb")
        profile = jax.profiler.ProfileData.from_file(str(found))
        planes = [plane for plane in profile.planes if plane.name.startswith("/device:GPU")]
        lines = [line for plane in planes for line in plane.lines if line.name.startswith("Stream")]
        return sum(event.duration_ns for line in lines for event in line.events) / 1e6 / steps()


# --- full models -----------------------------------------------------------------------------------------------------


def small_leaves(quick: bool, rounds: int, count: int = 2000) -> Tree:
    """Returns the rows for many small parameters, all with 8-bit moments."""
    shapes = many_small(20 if quick else count)
    tx = ours(rules=EIGHT, min_size=0)
    params = {name: jax.ShapeDtypeStruct(shape, jnp.float32) for name, shape in shapes.items()}
    stored = {x.dtype for x in jax.tree.leaves(jax.eval_shape(tx.init, params)[0].mu)}
    assert stored == {jnp.dtype(jnp.int8)}, stored
    ours_alone = {BASELINE: FIELD[BASELINE], OURS: lambda holder: start(holder, tx)}
    return compared(shapes, ours_alone, rounds)


def training(quick: bool, rounds: int, batch: int = 8, context: int = 512) -> Tree:
    """Returns the rows for a training step of the example's language model, in fp32 and in 8 bits."""
    from flax import nnx

    sys.path.insert(0, str(report.ROOT / "examples"))
    import language_model

    width, layers, vocabulary = (64, 1, 128) if quick else (768, 8, 32768)
    batch, context = (2, 16) if quick else (batch, context)
    windows = jax.random.randint(jax.random.key(0), (batch, context + 1), 0, vocabulary)
    model = language_model.LanguageModel(vocabulary, width, layers, embedding="stable", rngs=nnx.Rngs(0))
    graphdef, params = nnx.split(model)
    size = sum(x.size for x in jax.tree.leaves(params))
    runs = {}
    for name in ("adamw", "adamw8bit", "adamw8bit, `fused_update`"):
        args = language_model.arguments().parse_args(["--optimizer", name.split(",")[0]])
        tx = language_model.make_optimizer(args)
        update = step_of(tx, "fused" in name)

        def step(params: Any, state: Any, windows: Any, update: Any = update) -> Any:
            loss, grads = jax.value_and_grad(language_model.loss_of)(params, graphdef, windows)
            return *update(params, state, grads), loss

        own = jax.tree.map(jnp.copy, params)
        runs[name] = _training_turn(jax.jit(step, donate_argnums=(0, 1)), own, jax.jit(tx.init)(own), windows)
    turns = alternate(runs, 4.0, rounds)
    rows = {}
    for name, turn in runs.items():
        ms = quartiles([1e3 * t / steps() for t in turns[name]])
        ratio = quartiles([t / b for t, b in zip(turns[name], turns["adamw"])])
        rows[name] = {
            "parameters": size,
            "tokens": batch * context,
            "ms": ms,
            "ratio": ratio,
            "device_ms": busy_ms(turn),
        }
    return rows


def _training_turn(step: Any, params: Any, state: Any, windows: Any) -> Callable[[], None]:
    def turn() -> None:
        nonlocal params, state
        for _ in range(steps()):
            params, state, loss = step(params, state, windows)
        jax.block_until_ready(loss)

    turn()
    return turn
