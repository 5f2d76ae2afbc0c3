"""Tests whether the default codec and rounding are earned: trainings from ordinary learning rates up to unstable ones.

    python -m benchmarks quality                 trains all runs of the grid that are missing, then table and plot
    python -m benchmarks quality --hours 2       stops after two hours; the same command continues later
    python -m benchmarks quality --seeds 5       more seeds than 3
    python -m benchmarks quality --only digits   the runs whose names match a regular expression
    python -m benchmarks quality --list          lists the names of the runs and marks the finished ones
    python -m benchmarks quality --collect       results/quality.json and .png from the finished runs; trains nothing.
                                                 Runs in quality.json with the same settings are kept
    python -m benchmarks quality --table         prints results/quality.json as Markdown
    python -m benchmarks quality --plot          draws results/quality.png from results/quality.json

There are two tasks. `language` is a small version of the model and text of examples/language_model.py. `digits` is a
convolutional network on scikit-learn's handwritten digits (extras: examples, test). Its pixels are noisy, so that the
loss does not end near zero, where it would be mostly chance. It is quick and has more seeds per cell. Seeds fix the
first parameters and the batches, so runs with the same seed and learning rate differ only in the storage of the
optimizer.

Each run is a file in runs/quality/, so the grid may be interrupted at any moment. All cells get their first seed before
any cell gets its second, so an unfinished grid is balanced. `quality_report.py` defines which runs are unstable.

Blocks are the library's choice ("default"), or 256 neighbors of the flattened parameter as in bitsandbytes ("256"), or
the full parameter ("tensor"): a single scale for all elements, as in the paper's experiments without blocks. For the
last two, parameters are flattened before they reach the optimizer, and updates are reshaped afterwards.
"""

import dataclasses
import functools
import importlib
import json
import math
import re
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx

import flax_stable_embed as fse

from ..harness import report
from . import quality_report

ROOT = report.ROOT
RUNS = ROOT / "runs" / "quality"
SEEDS = 3
# As in the example: the largest global norm, the weight decay of matrices, and the share of steps that are warmup.
CLIP, WEIGHT_DECAY, WARMUP = 1.0, 0.1, 0.1
VALIDATIONS = 5  # during a run; one more comes before the first step
NUDGE = 1e-6  # relative; a few units in the last place of float32


# --- the grid --------------------------------------------------------------------------------------------------------


class Cell(NamedTuple):
    """The storage of the optimizer state, and the embedding module. A cell, a learning rate and a seed make a run."""

    task: Literal["language", "digits"]
    codec: Literal["fp32", "root", "dynamic", "linear"]
    blocks: Literal["default", "256", "tensor"] = "default"
    rounding: Literal["nearest", "dither", "stochastic"] = "nearest"
    embedding: Literal["stable", "embed"] = "stable"
    embedding_bits: Literal[32, 8] = 32
    nudged: bool = False  # the first parameters differ by NUDGE, which shows how far apart two equal runs drift

    @property
    def name(self) -> str:
        """Returns a short, unique name: the fields that differ from the default."""
        own = [str(v) for v, default in zip(self[2:6], Cell._field_defaults.values()) if v != default]
        return "-".join([self.task, self.codec, *own, *["nudged"] * self.nudged])


_lm, _digits = functools.partial(Cell, "language"), functools.partial(Cell, "digits")
_paper = functools.partial(_lm, embedding="embed", embedding_bits=8)  # the paper before the stable embedding

# The questions, and the cells that answer them, as (label, cell). The first cell of a question is its reference.
QUESTIONS: dict[str, tuple[tuple[str, Cell], ...]] = {
    "The paper's ladder": (
        ("fp32, plain embedding", _lm("fp32", embedding="embed")),
        ("linear, one scale per tensor, plain embedding", _paper("linear", "tensor")),
        ("dynamic, one scale per tensor, plain embedding", _paper("dynamic", "tensor")),
        ("dynamic, blocks, plain embedding", _paper("dynamic")),
        ("dynamic, blocks, stable embedding", _lm("dynamic")),
        ("root, one scale per tensor, plain embedding", _paper("root", "tensor")),
        ("root, blocks, plain embedding", _paper("root")),
        ("root, blocks, stable embedding", _lm("root")),
        ("root, blocks, dither, stable embedding: the default", _lm("root", rounding="dither")),
        ("fp32, stable embedding", _lm("fp32")),
    ),
    "Codecs and rounding": (
        ("fp32", _lm("fp32")),
        ("fp32, first parameters nudged", _lm("fp32", nudged=True)),
        ("root, nearest", _lm("root")),
        ("root, dither", _lm("root", rounding="dither")),
        ("root, stochastic", _lm("root", rounding="stochastic")),
        ("dynamic, nearest", _lm("dynamic")),
        ("dynamic, dither", _lm("dynamic", rounding="dither")),
        ("dynamic, stochastic", _lm("dynamic", rounding="stochastic")),
        ("linear, nearest", _lm("linear")),
        ("linear, dither", _lm("linear", rounding="dither")),
        ("linear, stochastic", _lm("linear", rounding="stochastic")),
    ),
    "Moments of a plain embedding": (
        ("fp32", _lm("fp32", embedding="embed")),
        ("root, embedding in fp32", _lm("root", embedding="embed")),
        ("root, embedding in 8 bits", _paper("root")),
        ("dynamic, embedding in fp32", _lm("dynamic", embedding="embed")),
        ("dynamic, embedding in 8 bits", _paper("dynamic")),
    ),
    "Moments of the embedding": (
        ("fp32", _lm("fp32")),
        ("root, embedding in fp32", _lm("root")),
        ("root, embedding in 8 bits", _lm("root", embedding_bits=8)),
        ("root, embedding in 8 bits, dither", _lm("root", rounding="dither", embedding_bits=8)),
        ("root, embedding in 8 bits, stochastic", _lm("root", rounding="stochastic", embedding_bits=8)),
        ("dynamic, embedding in fp32", _lm("dynamic")),
        ("dynamic, embedding in 8 bits", _lm("dynamic", embedding_bits=8)),
        ("linear, embedding in fp32", _lm("linear")),
        ("linear, embedding in 8 bits", _lm("linear", embedding_bits=8)),
    ),
    "Blocks": (
        ("fp32", _lm("fp32")),
        ("root, default blocks", _lm("root")),
        ("root, blocks of 256", _lm("root", "256")),
        ("dynamic, default blocks", _lm("dynamic")),
        ("dynamic, blocks of 256: bitsandbytes", _lm("dynamic", "256")),
    ),
    "Handwritten digits": (
        ("fp32", _digits("fp32")),
        ("fp32, first parameters nudged", _digits("fp32", nudged=True)),
        ("root, nearest", _digits("root")),
        ("root, dither", _digits("root", rounding="dither")),
        ("root, stochastic", _digits("root", rounding="stochastic")),
        ("dynamic, nearest", _digits("dynamic")),
        ("dynamic, dither", _digits("dynamic", rounding="dither")),
        ("dynamic, stochastic", _digits("dynamic", rounding="stochastic")),
        ("linear, nearest", _digits("linear")),
        ("linear, dither", _digits("linear", rounding="dither")),
        ("linear, stochastic", _digits("linear", rounding="stochastic")),
    ),
}
CELLS = tuple(dict.fromkeys(cell for rows in QUESTIONS.values() for _, cell in rows))


class Run(NamedTuple):
    """One training."""

    cell: Cell
    rate: float
    seed: int

    @property
    def name(self) -> str:
        """Returns the name of the run."""
        return f"{self.cell.name}-rate{self.rate:g}-seed{self.seed}"


# --- the tasks -------------------------------------------------------------------------------------------------------


GRID = ("rates", "more_seeds")  # the fields of a task that determine which runs exist


@dataclass(frozen=True)
class Language:
    """The language model and the text of the example."""

    steps: int = 300
    # The second rate is the best for fp32. With the last, fp32 diverges.
    rates: tuple[float, ...] = (1e-3, 4e-3, 1.6e-2, 6.4e-2, 0.256, 1.0)
    width: int = 128
    layers: int = 2
    vocab: int = 2048
    context: int = 64
    batch_size: int = 8
    windows: int = 128  # of the held-out text
    more_seeds: int = 1  # for each seed that was asked for
    text: tuple[Path, ...] = ()  # files to use instead of the standard library's
    cache: Path = ROOT / "runs"

    @functools.cached_property
    def corpus(self) -> Any:
        """Returns the token ids of the text."""
        return _example("corpus").load(self.cache, self.vocab, list(self.text))

    @property
    def settings(self) -> dict[str, Any]:
        """Returns everything that a run depends on, except for its cell, rate and seed."""
        own = {f.name: getattr(self, f.name) for f in dataclasses.fields(self)}
        return {k: v for k, v in own.items() if k not in (*GRID, "text", "cache")} | {"text": self.corpus.key}

    def model(self, cell: Cell, seed: int) -> nnx.Module:
        lm = _example("language_model")
        return lm.LanguageModel(self.vocab, self.width, self.layers, embedding=cell.embedding, rngs=nnx.Rngs(seed))

    def loss(self, params, graphdef, windows) -> jax.Array:
        return _example("language_model").loss_of(params, graphdef, windows)

    def batch(self, seed: int, step: int) -> np.ndarray:
        length = self.context + 1  # a window's last token is only a target
        return _example("corpus").batch(self.corpus.train, seed, step, batch_size=self.batch_size, length=length)

    def held_out(self) -> np.ndarray:
        """Returns the windows for validation, in groups that are evaluated one at a time."""
        text = self.corpus.validation
        windows = _example("corpus").evenly_spaced(text, windows=self.windows, length=self.context + 1)
        return windows.reshape(-1, self.batch_size, self.context + 1)


@dataclass(frozen=True)
class Digits:
    """A convolutional network on 1797 noisy handwritten digits of 8 x 8 pixels (Alpaydin and Kaynak 1998)."""

    steps: int = 300
    rates: tuple[float, ...] = (1e-3, 5e-3, 2e-2, 1e-1)  # the second is the best for fp32
    width: int = 32
    batch_size: int = 64
    held_out_images: int = 597  # which leaves 1200 for training
    noise: float = 0.5  # standard deviation; ink is 1 and paper 0
    more_seeds: int = 3

    @functools.cached_property
    def data(self) -> tuple[np.ndarray, np.ndarray]:
        from sklearn.datasets import load_digits

        images, labels = load_digits(return_X_y=True)
        order = np.random.default_rng(0).permutation(len(images))
        return (images[order].reshape(-1, 8, 8, 1) / 16).astype(np.float32), labels[order].astype(np.int32)

    @property
    def settings(self) -> dict[str, Any]:
        return {k: v for k, v in dataclasses.asdict(self).items() if k not in GRID}

    def model(self, cell: Cell, seed: int) -> nnx.Module:
        return ConvNet(self.width, rngs=nnx.Rngs(seed))

    def loss(self, params, graphdef, batch) -> jax.Array:
        images, labels = batch
        logits = nnx.merge(graphdef, params)(images)
        return optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean()

    def batch(self, seed: int, step: int) -> tuple[np.ndarray, np.ndarray]:
        images, labels = (x[self.held_out_images :] for x in self.data)
        rng = np.random.default_rng((seed, step))
        chosen = rng.integers(len(images), size=self.batch_size)
        return self._noisy(images[chosen], rng), labels[chosen]

    def held_out(self) -> tuple[np.ndarray, np.ndarray]:
        images, labels = (x[None, : self.held_out_images] for x in self.data)
        return self._noisy(images, np.random.default_rng(1)), labels

    def _noisy(self, images: np.ndarray, rng: np.random.Generator) -> np.ndarray:
        return images + np.float32(self.noise) * rng.standard_normal(images.shape, np.float32)


class ConvNet(nnx.Module):
    """A network of two convolutions, pooling, and two dense layers."""

    def __init__(self, width: int, *, rngs: nnx.Rngs):
        self.first = nnx.Conv(1, width, (3, 3), rngs=rngs)
        self.second = nnx.Conv(width, 2 * width, (3, 3), rngs=rngs)
        self.dense = nnx.Linear(16 * 2 * width, 4 * width, rngs=rngs)
        self.head = nnx.Linear(4 * width, 10, rngs=rngs)

    def __call__(self, images):
        x = jax.nn.relu(self.second(jax.nn.relu(self.first(images))))
        x = nnx.max_pool(x, (2, 2), (2, 2))
        return self.head(jax.nn.relu(self.dense(x.reshape(len(x), -1))))


def _example(name: str) -> Any:
    """Imports a module of examples/. These are scripts that find one another by their folder."""
    folder = str(ROOT / "examples")
    if folder not in sys.path:
        sys.path.append(folder)
    return importlib.import_module(name)


def tasks() -> dict[str, Any]:
    """Returns the tasks for this machine. With an accelerator, models are wider and train longer."""
    if jax.default_backend() == "cpu":
        return {"language": Language(), "digits": Digits()}
    return {"language": Language(steps=1200, width=256, batch_size=32), "digits": Digits(steps=1200, width=64)}


# --- one run ---------------------------------------------------------------------------------------------------------


def optimizer(cell: Cell, schedule: Callable, params: Any) -> optax.GradientTransformation:
    """Returns gradient clipping followed by AdamW, stored as the cell says."""
    mask = _example("language_model").decayed(params)
    options = {"weight_decay": WEIGHT_DECAY, "mask": lambda _: mask}  # the mask also applies to flattened parameters
    if cell.codec == "fp32":
        adamw = optax.adamw(schedule, **options)
    else:
        # A block size of at least the length of the parameter makes it one block.
        size = {"default": None, "256": 256, "tensor": max(p.size for p in jax.tree.leaves(params))}[cell.blocks]
        form = fse.StateFormat(codec=cell.codec, rounding=cell.rounding, block_size=size)
        rules = (("embedding$", 8),) if cell.embedding_bits == 8 else ()
        adamw = fse.adamw8bit(schedule, **options, rules=rules, state_format=form)
    return optax.chain(optax.clip_by_global_norm(CLIP), adamw if cell.blocks == "default" else flattened(adamw))


def flattened(tx: optax.GradientTransformation) -> optax.GradientTransformation:
    """Runs `tx` on flattened parameters, so that a block may be any run of neighbors."""

    def flat(tree):
        return jax.tree.map(jnp.ravel, tree)

    def update(grads, state, params):
        updates, state = tx.update(flat(grads), state, flat(params))
        return jax.tree.map(lambda u, p: u.reshape(p.shape), updates, params), state

    return optax.GradientTransformation(lambda params: tx.init(flat(params)), update)


def scheduled(task: Any, cell: Cell, rate: Any) -> optax.GradientTransformation:
    """Returns the optimizer of the cell, with a learning rate that warms up to `rate` and then decays."""
    shapes = jax.eval_shape(lambda: nnx.split(task.model(cell, 0))[1])
    warmup = max(1, round(WARMUP * task.steps))
    unit = optax.warmup_cosine_decay_schedule(0.0, 1.0, warmup, task.steps, end_value=0.1)
    return optimizer(cell, lambda count: rate * unit(count), shapes)


class Program(NamedTuple):
    """The functions that runs of one cell share. They are compiled once for all rates and seeds."""

    init: Callable  # params -> opt_state
    step: Callable  # params, opt_state, batch, rate -> params, opt_state, loss
    validate: Callable  # params, held_out -> loss


def program(task: Any, cell: Cell) -> Program:
    """Compiles the functions of a cell."""
    graphdef, _ = nnx.split(task.model(cell, 0))
    tx = functools.partial(scheduled, task, cell)

    @functools.partial(jax.jit, donate_argnums=(0, 1))
    def step(params, opt_state, batch, rate):
        loss, grads = jax.value_and_grad(task.loss)(params, graphdef, batch)
        updates, opt_state = tx(rate).update(grads, opt_state, params)
        return optax.apply_updates(params, updates), opt_state, loss

    @jax.jit
    def validate(params, held_out):
        return jax.lax.map(lambda batch: task.loss(params, graphdef, batch), held_out).mean()

    return Program(jax.jit(tx(1.0).init), step, validate)


def train(task: Any, run: Run, compiled: Program, held_out: Any) -> dict[str, Any]:
    """Trains one run and returns its losses: of every batch, and for validation. A validation loss of NaN ends it."""
    _, params = nnx.split(task.model(run.cell, run.seed))
    if run.cell.nudged:
        params = jax.tree.map(lambda p: p * (1 + NUDGE), params)
    opt_state = compiled.init(params)
    losses, validation = [], [[0, float(compiled.validate(params, held_out))]]
    every = math.ceil(task.steps / VALIDATIONS)
    for step in range(1, task.steps + 1):
        params, opt_state, loss = compiled.step(params, opt_state, task.batch(run.seed, step), run.rate)
        losses.append(loss)
        if step % every == 0 or step == task.steps:
            validation.append([step, float(compiled.validate(params, held_out))])
            if not math.isfinite(validation[-1][1]):
                break
    return {"losses": [_number(x) for x in losses], "validation": [[s, _number(x)] for s, x in validation]}


def _number(x: Any) -> float | None:
    """Returns a loss for JSON: six digits, or None if it is not finite."""
    return float(f"{float(x):.6g}") if math.isfinite(x) else None


# --- the grid's runs -------------------------------------------------------------------------------------------------


def settings_of(task: Any, run: Run) -> dict[str, Any]:
    """Returns everything that the result of a run depends on."""
    return {**run.cell._asdict(), "rate": run.rate, "seed": run.seed, "sizes": task.settings}


def grid(field: dict[str, Any], seeds: int, only: str = "") -> list[Run]:
    """Returns the runs in the order of training: all cells with the first seed, then all with the second."""
    runs = []
    for turn in range(seeds):
        for cell in CELLS:
            task = field[cell.task]
            own = range(turn * task.more_seeds, (turn + 1) * task.more_seeds)
            runs += [Run(cell, rate, seed) for rate in task.rates for seed in own]
    return [run for run in runs if re.search(only, run.name)]


def finished(folder: Path, task: Any, run: Run) -> dict[str, Any] | None:
    """Returns the record of a run with exactly these settings, or None."""
    path = folder / f"{run.name}.json"
    record = json.loads(path.read_text()) if path.exists() else None
    return record if record and record["settings"] == settings_of(task, run) else None


def train_all(runs: list[Run], field: dict[str, Any], folder: Path, hours: float) -> None:
    """Trains the unfinished runs until the time is over, and prints how long the rest will take."""
    folder.mkdir(parents=True, exist_ok=True)
    left = [run for run in runs if finished(folder, field[run.cell.task], run) is None]
    print(f"{len(runs)} runs, {len(runs) - len(left)} of them finished", flush=True)
    programs, held_out = {}, {name: task.held_out() for name, task in field.items()}
    began, seconds = time.monotonic(), {name: [] for name in field}
    for i, run in enumerate(left):
        start, task = time.monotonic(), field[run.cell.task]
        if start - began > 3600 * hours:
            return print(f"{hours:g} hours are over; {len(left) - i} runs are left", flush=True)
        if run.cell not in programs:
            programs[run.cell] = program(task, run.cell)
        record = {"settings": settings_of(task, run), **train(task, run, programs[run.cell], held_out[run.cell.task])}
        record["seconds"] = round(time.monotonic() - start, 2)
        seconds[run.cell.task].append(record["seconds"])
        unfinished = folder / f"{run.name}.tmp"
        unfinished.write_text(json.dumps(record) + "\n")
        unfinished.replace(folder / f"{run.name}.json")
        minutes = _seconds_left([r.cell.task for r in left[i + 1 :]], seconds) / 60
        judged = quality_report.unstable(record["losses"], record["validation"]) or "stable"
        last = record["validation"][-1][1]
        print(
            f"{i + 1}/{len(left)} {run.name}: {last} ({judged}), {record['seconds']:.0f} s; {minutes:.0f} minutes left",
            flush=True,
        )


def _seconds_left(names: list[str], seconds: dict[str, list[float]]) -> float:
    """Estimates from the mean of each task's runs. A task without runs counts as the slowest task that has some."""
    means = {name: sum(s) / len(s) for name, s in seconds.items() if s}
    return sum(means.get(name, max(means.values())) for name in names)


def collect(
    runs: list[Run], field: dict[str, Any], folder: Path, seeds: int, earlier: dict[str, Any] | None = None
) -> dict[str, Any]:
    """Returns the finished runs as one record, without the losses of single batches.

    Args:
        runs: The grid.
        field: The tasks.
        folder: Where finished runs are.
        seeds: The number of seeds that was asked for.
        earlier: An earlier record, perhaps of another machine. Its runs are kept where `folder` has no newer ones, if
            its tasks have the same settings.
    """
    rows, described = [], {name: {"rates": list(task.rates), **task.settings} for name, task in field.items()}
    environment, kept = report.environment("quality", ["--seeds", str(seeds)]), {}
    if earlier is not None and earlier["tasks"] == described:
        old = {"device": earlier["environment"]["device"]}
        kept = {(row["cell"], row["rate"], row["seed"]): old | row for row in earlier["runs"]}
    for run in runs:
        record = finished(folder, field[run.cell.task], run)
        if record is None:
            rows += [row] if (row := kept.pop((run.cell.name, run.rate, run.seed), None)) else []
            continue
        losses, validation = record["losses"], record["validation"]
        row = {**run.cell._asdict(), "cell": run.cell.name, "rate": run.rate, "seed": run.seed}
        row |= {"validation": validation, "unstable": quality_report.unstable(losses, validation)}
        row |= {"highest_loss": max((x for x in losses if x is not None), default=None), "seconds": record["seconds"]}
        rows.append(row | {"device": environment["device"]})
    return {
        "environment": environment,
        "planned": len(runs),
        "tasks": described,
        "questions": {title: [[label, cell.name] for label, cell in rows] for title, rows in QUESTIONS.items()},
        "runs": rows,
    }


# --- the command line ------------------------------------------------------------------------------------------------


def main(arguments: list[str], field: dict[str, Any] | None = None) -> None:
    """Trains, collects and reports. `field` has the tasks by name; the default is `tasks()`."""
    parser = report.parser("quality", __doc__)
    option = parser.add_argument
    option("--hours", type=float, default=math.inf, help="start no run after so many hours")
    option("--seeds", type=int, default=SEEDS)
    option("--only", default="", metavar="PATTERN", help="train only runs whose names match")
    option("--list", action="store_true")
    option("--collect", action="store_true")
    option("--table", action="store_true")
    option("--plot", action="store_true")
    option("--runs", type=Path, default=RUNS, metavar="DIR")
    option("--results", type=Path, default=report.RESULTS, metavar="DIR")
    args = parser.parse_args(arguments)
    file = args.results / "quality.json"
    if not (args.table or args.plot):
        field = field or tasks()
        runs = grid(field, args.seeds, args.only)
        if args.list:
            for run in runs:
                print("x" if finished(args.runs, field[run.cell.task], run) else " ", run.name)
            return
        if not args.collect:
            train_all(runs, field, args.runs, args.hours)
        earlier = json.loads(file.read_text()) if file.exists() else None
        results = collect(grid(field, args.seeds), field, args.runs, args.seeds, earlier)
        report.save(results, file)
        print(f"{len(results['runs'])} of {results['planned']} runs collected")
    results = json.loads(file.read_text())
    if not args.plot:
        print(quality_report.markdown(results))
    if not args.table:
        quality_report.plot(results, args.results / "quality.png")
        print(f"plotted: {args.results / 'quality.png'}")
