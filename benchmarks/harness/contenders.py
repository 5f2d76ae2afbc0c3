"""Lists the contenders: AdamW of optax, this library, bitsandbytes and torchao, with the same hyper-parameters.

A contender has a name, a path and `start(problem) -> Run`. All of them train one float32 parameter on one fixed
gradient. `Run.step()` runs one step and waits until it has ended.
"""

from collections.abc import Callable
from functools import cached_property, partial
from importlib.metadata import PackageNotFoundError, version
from time import perf_counter
from typing import Any, NamedTuple

import jax
import numpy as np
import optax

import flax_stable_embed as fse
from flax_stable_embed.ops.blockwise.codecs import CODECS

from . import report
from .shapes import Shape

ADAMW = {"b1": 0.9, "b2": 0.999, "eps": 1e-8, "weight_decay": 1e-4}  # optax's defaults
LEARNING_RATE = 1e-3
BASELINE = "optax.adamw"


class Run(NamedTuple):
    """A contender that is compiled and ready."""

    step: Callable[[], None]
    compile_s: float  # tracing and compilation; for torch, bitsandbytes and torchao the first step
    state_bytes: int
    temp_bytes: int | None  # None: its framework does not report them
    stored: str  # how the moments are stored


class Contender(NamedTuple):
    """One line of the tables. `skip` is the reason why it cannot run here."""

    name: str
    path: str
    start: Callable[["Problem"], Run]
    skip: str | None = None


class Problem:
    """A parameter and its gradient. Contenders of one framework share both, and have separate states."""

    def __init__(self, shape: Shape):
        rng = np.random.default_rng(0)
        self.shape = shape
        self.params, self.grads = (
            _tree(shape.path, jax.numpy.array(scale * rng.standard_normal(shape.shape, np.float32)))
            for scale in (np.float32(0.02), np.float32(1e-3))
        )

    @cached_property
    def torch_parameter(self) -> Any:
        """Returns the parameter for torch, with the gradient as its `grad`."""
        import torch

        p, g = (torch.tensor(np.asarray(jax.tree.leaves(x)[0])) for x in (self.params, self.grads))
        parameter = torch.nn.Parameter(p)
        parameter.grad = g
        return parameter


def _tree(path: str, leaf: Any) -> Any:
    for key in reversed(path.split("/")):
        leaf = {key: leaf}
    return leaf


def contenders() -> list[Contender]:
    """Returns all contenders, the baseline first. Those that cannot run here carry the reason."""
    ours = [
        Contender(f"fse.adamw8bit {codec}", path, partial(_start_jax, codec=codec, fused=path == "fused_update"))
        for codec in CODECS
        for path in ("fused_update", "update")
    ]
    peers = [Contender(f"{p} AdamW8bit", "step", partial(_start_torch, peer=p), _skip(p)) for p in PEERS]
    return [Contender(BASELINE, "update", partial(_start_jax, codec=None, fused=False)), *ours, *peers]


# --- JAX -------------------------------------------------------------------------------------------------------------


def step_of(tx: Any, fused: bool) -> Callable:
    """Returns `(params, state, grads) -> (params, state)`, with parameters in place if `fused`. It is not jitted."""

    def step(params, state, grads):
        if fused:
            return fse.fused_update(tx, grads, state, params)
        updates, state = tx.update(grads, state, params)
        return optax.apply_updates(params, updates), state

    return step


def _start_jax(problem: Problem, codec: str | None, fused: bool) -> Run:
    if codec is None:
        tx, stored = optax.adamw(LEARNING_RATE, **ADAMW), "fp32"
    else:
        form = fse.StateFormat(codec=codec)
        tx = fse.adamw8bit(LEARNING_RATE, **ADAMW, rules=problem.shape.rules, state_format=form)
        (row,) = fse.describe(tx, problem.params).rows
        stored = row.block or "fp32"

    state = tx.init(problem.params)
    state_bytes = sum(x.nbytes for x in jax.tree.leaves(state))
    jitted = jax.jit(step_of(tx, fused), donate_argnums=(0, 1))
    start = perf_counter()
    compiled = jitted.lower(problem.params, state, problem.grads).compile()
    compile_s = perf_counter() - start

    def one_step():  # the jitted function is dispatched faster than `compiled`
        nonlocal state
        problem.params, state = jax.block_until_ready(jitted(problem.params, state, problem.grads))

    return Run(one_step, compile_s, state_bytes, compiled.memory_analysis().temp_size_in_bytes, stored)


# --- torch -----------------------------------------------------------------------------------------------------------

PEERS = ("bitsandbytes", "torchao")


def _skip(peer: str) -> str | None:
    try:
        version("torch"), version(peer)
    except PackageNotFoundError:
        return "not installed"
    return None if jax.default_backend() == "cpu" else "compared on CPU only"


def _start_torch(problem: Problem, peer: str) -> Run:
    import torch

    torch.set_num_threads(report.cores())
    if peer == "bitsandbytes":
        from bitsandbytes.optim import AdamW8bit
    else:
        from torchao.optim import AdamW8bit
    p = problem.torch_parameter
    betas = ADAMW["b1"], ADAMW["b2"]
    optimizer = AdamW8bit([p], LEARNING_RATE, betas, ADAMW["eps"], ADAMW["weight_decay"])
    start = perf_counter()
    optimizer.step()
    compile_s = perf_counter() - start
    tensors = _tensors(optimizer.state[p])
    stored = "dynamic, 256 along the flattened array" if any(x.dtype == torch.uint8 for x in tensors) else "fp32"
    return Run(optimizer.step, compile_s, sum(x.nbytes for x in tensors), None, stored)


def _tensors(state: dict[str, Any]) -> list[Any]:
    """Returns the tensors of the state, without the 256 values of the code (`qmap`), which parameters can share."""
    import torch

    found = []
    for name, x in state.items():
        if hasattr(x, "__tensor_flatten__"):
            names, _ = x.__tensor_flatten__()
            found += _tensors({n: getattr(x, n) for n in names})
        elif isinstance(x, torch.Tensor) and not name.startswith("qmap"):
            found.append(x)
    return found
