"""Trains a small language model that changes halfway, and takes the state of its optimizer along with `adapt_state`.

    python -m benchmarks changes                writes results/changes.json, prints the table
    python -m benchmarks changes --quick        a few steps; writes no file

The transformer of bytes of `finetuning.py` learns source code, at a constant learning rate. After half of the steps

    vocabulary   grows from 128 to 256 rows, in the embedding and in the head
    unfrozen     its blocks are trained too, which were frozen before
    adapters     low-rank adapters are added to a matrix of each block
    neurons      one hidden unit in 20 gets new weights, and its moments are reset (`reset_moments`)

Every storage is compared with float32 moments that are adapted in the same way, from the same parameters and on the
same batches. In "all moments start again" the state is a new one after the change.
"""

from collections.abc import Callable
from functools import partial
from statistics import mean
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

import flax_stable_embed as fse

from ..harness import report
from . import finetuning
from .finetuning import SMALL, WIDTH, batches, texts

STEPS, SEEDS, RATE, RANK = 300, (21, 22, 23), 2e-3, 4
AGAIN = "root, all moments start again"
STORED: dict[str, optax.GradientTransformation] = {
    "float32 (`optax.adamw`)": optax.adamw(RATE),
    "root": fse.adamw8bit(RATE, state_format=SMALL, rules=((".*", 8),)),
    "dynamic": fse.adamw8bit(RATE, state_format=fse.StateFormat("dynamic", min_size=0), rules=((".*", 8),)),
    'root, the embedding "rowwise"': fse.adamw8bit(
        RATE, state_format=SMALL, rules=(("^embedding", "rowwise"), (".*", 8))
    ),
    '"bf16"': fse.adamw8bit(RATE, rules=((".*", "bf16"),)),
    AGAIN: fse.adamw8bit(RATE, state_format=SMALL, rules=((".*", 8),)),
}
Params = Any


class Change(NamedTuple):
    """A change of the model after half of the steps.

    first: Returns the parameters that are trained before it, from all of `finetuning.start`, and those that are frozen.
    after: Returns both after it, from both before it.
    resets: Returns the mask of the moments that are reset, for `reset_moments`.
    bytes: The number of different bytes before it.
    """

    first: Callable[[Params], tuple[Params, Params]]
    after: Callable[[Params, Params], tuple[Params, Params]]
    resets: Callable[[Params], Any] | None = None
    bytes: int = 256


def _everything(params: Params) -> tuple[Params, Params]:
    return params, {}


def _few_rows(params: Params) -> tuple[Params, Params]:
    return params | {"embedding": params["embedding"][:128], "head": params["head"][:, :128]}, {}


def _more_rows(params: Params, frozen: Params) -> tuple[Params, Params]:
    rows = finetuning.start()
    embedding = jnp.concatenate([params["embedding"], rows["embedding"][128:]])
    head = jnp.concatenate([params["head"], rows["head"][:, 128:]], axis=1)
    return params | {"embedding": embedding, "head": head}, frozen


def _without_blocks(params: Params) -> tuple[Params, Params]:
    return {name: x for name, x in params.items() if name != "blocks"}, {"blocks": params["blocks"]}


def _with_adapters(params: Params, frozen: Params) -> tuple[Params, Params]:
    def adapter(key):
        down = 0.02 * jax.random.normal(key, (WIDTH, RANK))
        return {"down": down, "up": jnp.zeros((RANK, 4 * WIDTH))}

    keys = jax.random.split(jax.random.key(5), len(params["blocks"]))
    return params | {"adapters": [adapter(key) for key in keys]}, frozen


DEAD = jnp.arange(4 * WIDTH) % 20 == 7


def _new_neurons(params: Params, frozen: Params) -> tuple[Params, Params]:
    fresh = finetuning.start()["blocks"]

    def renewed(block, new):
        up = jnp.where(DEAD, new["up"][:, ::-1], block["up"])
        return block | {"up": up, "down": jnp.where(DEAD[:, None], 0.0, block["down"])}

    return params | {"blocks": [renewed(*both) for both in zip(params["blocks"], fresh)]}, frozen


def _dead(params: Params) -> Any:
    masks = jax.tree.map(lambda _: False, params)
    masks["blocks"] = [mask | {"up": DEAD[None], "down": DEAD[:, None]} for mask in masks["blocks"]]
    return masks


CHANGES = {
    "vocabulary": Change(_few_rows, _more_rows, bytes=128),
    "unfrozen": Change(_without_blocks, lambda trained, frozen: (trained | frozen, {})),
    "adapters": Change(_everything, _with_adapters),
    "neurons": Change(_everything, _new_neurons, resets=_dead),
}


def loss_of(trained: Params, frozen: Params, ids: Any) -> Any:
    """Returns the loss of the model, with adapters added to their matrices."""
    params = dict(trained | frozen)
    adapters = params.pop("adapters", None)
    if adapters:
        pairs = zip(params["blocks"], adapters)
        params["blocks"] = [block | {"up": block["up"] + a["down"] @ a["up"]} for block, a in pairs]
    return finetuning.loss_of(params, ids)


class Trainer:
    """Trains with one optimizer. Its step is compiled once for each set of parameters."""

    def __init__(self, tx: optax.GradientTransformation):
        @partial(jax.jit, donate_argnums=(0, 1))
        def step(trained, state, frozen, ids):
            updates, state = tx.update(jax.grad(loss_of)(trained, frozen, ids), state, trained)
            return optax.apply_updates(trained, updates), state

        self.tx, self.step = tx, step

    def run(self, change: Change, seed: int, steps: int, text: Any, *, again: bool) -> tuple[Params, Params]:
        """Returns the parameters after a training with a change: those that are trained, and those that are frozen."""
        trained, frozen = jax.tree.map(jnp.copy, change.first(finetuning.start()))
        state = self.tx.init(trained)
        for i, ids in enumerate(batches(text, seed, steps)):
            if i == steps // 2:
                before = trained
                trained, frozen = jax.tree.map(jnp.copy, change.after(trained, frozen))
                state = self.changed(change, state, before, trained, again=again)
            few = ids % change.bytes if i < steps // 2 else ids
            trained, state = self.step(trained, state, frozen, few)
        return trained, frozen

    def changed(self, change: Change, state: Any, before: Params, after: Params, *, again: bool) -> Any:
        """Returns the state after a change."""
        if again:
            return self.tx.init(after)
        state, _ = fse.adapt_state(self.tx, state, before, after)
        return state if change.resets is None else fse.reset_moments(self.tx, state, after, change.resets(after))


def measure(shorter: int = 1) -> dict[str, Any]:
    """Returns the validation losses of every change, storage and seed."""
    code, _ = texts()
    ends = len(code) * 9 // 10
    validate = jax.jit(loss_of)
    rows, steps = [], STEPS // shorter
    for stored, tx in STORED.items():
        trainer = Trainer(tx)
        for name, change in CHANGES.items():
            runs = [trainer.run(change, seed, steps, code[:ends], again=stored == AGAIN) for seed in SEEDS]
            held_out = [list(batches(code[ends:], 999, 16))] * len(runs)
            losses = [mean(float(validate(*run, ids)) for ids in them) for run, them in zip(runs, held_out)]
            rows.append({"stored": stored, "change": name, "losses": losses})
    return {"environment": report.environment("changes"), "steps": steps, "rows": rows}


def markdown(results: dict[str, Any]) -> str:
    """Returns the table: one line per storage, one column per change."""
    losses = {(row["stored"], row["change"]): row["losses"] for row in results["rows"]}
    base = next(iter(STORED))
    lines = [["moments", *CHANGES], ["---", *["--:" for _ in CHANGES]]]
    for stored in STORED:
        cells = []
        for name in CHANGES:
            gaps = [x / y - 1 for x, y in zip(losses[stored, name], losses[base, name], strict=True)]
            gap = "" if stored == base else f" ({mean(gaps):+.2%}, {min(gaps):+.2%} to {max(gaps):+.2%})"
            cells.append(f"{mean(losses[stored, name]):.4f}{gap}")
        lines.append([stored, *cells])
    about = (
        f"`python -m benchmarks changes`: validation loss of a model that changes after half of {results['steps']} "
        f"steps, mean of {len(SEEDS)} seeds. In brackets the difference from float32 moments that are adapted in the "
        "same way: its mean, and its range over seeds."
    )
    return about + "\n\n" + report.table(lines)


FILE = report.RESULTS / "changes.json"


def main(arguments: list[str], save: Callable = report.save) -> None:
    """Measures, prints, and keeps the results of a full run."""
    report.run(
        "changes",
        __doc__,
        arguments,
        lambda quick: measure(50 if quick else 1),
        markdown,
        lambda results: save(results, FILE),
    )
