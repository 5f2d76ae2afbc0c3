"""Measures the cost of changing the storage of moments in the middle of a training, with `fse.convert_state`.

    python -m benchmarks switch                  writes results/switch.json, prints the table; about 20 minutes
    python -m benchmarks switch --seeds 1        fewer seeds than 3; writes no file

The language model of `quality.py` is trained at the best learning rate of fp32, half of the steps with one storage and
half with another. It is compared with trainings that never change, from the same parameters and on the same batches.
One training resets the moments to zero at the change, while the learning rate schedule continues.
"""

from statistics import mean
from typing import Any

import jax
import optax
from flax import nnx

import flax_stable_embed as fse

from ..harness import report
from . import quality, quality_report

SEEDS = 3
NEVER = ("fp32", "root", "dynamic")
SWITCHES = (("fp32", "root"), ("root", "fp32"), ("fp32", "dynamic"), ("dynamic", "root"), ("root", "dynamic"))


class Trainer:
    """Trains one task, seed by seed, with compiled steps for every storage."""

    def __init__(self, task: Any):
        self.task, self.held_out = task, task.held_out()
        cells = {codec: quality.Cell("language", codec) for codec in NEVER}
        self.programs = {codec: quality.program(task, cell) for codec, cell in cells.items()}
        self.optimizers = {codec: quality.scheduled(task, cell, task.rates[1]) for codec, cell in cells.items()}

    def begin(self, seed: int) -> Any:
        """Returns the first parameters."""
        return nnx.split(self.task.model(quality.Cell("language", "fp32"), seed))[1]

    def train(self, codec: str, seed: int, params: Any, state: Any, steps: range) -> tuple[Any, Any]:
        """Returns parameters and state after these steps."""
        for step in steps:
            batch = self.task.batch(seed, step)
            params, state, _ = self.programs[codec].step(params, state, batch, self.task.rates[1])
        return params, state

    def loss(self, params: Any) -> float:
        """Returns the validation loss."""
        return float(self.programs["fp32"].validate(params, self.held_out))

    def convert(self, before: str, after: str, params: Any, state: Any) -> Any:
        """Returns the state with another storage."""
        return fse.convert_state(self.optimizers[before], self.optimizers[after], params, state)

    def reset(self, after: str, params: Any, state: Any) -> Any:
        """Returns a new state that keeps the step count of the schedule in `state`."""
        is_schedule = lambda x: isinstance(x, optax.ScaleByScheduleState)  # noqa: E731
        fresh = self.programs[after].init(params)
        return jax.tree.map(lambda new, old: old if is_schedule(new) else new, fresh, state, is_leaf=is_schedule)


def measure(task: Any, seeds: int) -> dict[str, Any]:
    """Returns the last validation losses of every training, seed by seed."""
    trainer, losses = Trainer(task), {}
    half = task.steps // 2
    first, second = range(1, half + 1), range(half + 1, task.steps + 1)
    for seed in range(seeds):
        at_half = {}
        for codec in NEVER:
            params = trainer.begin(seed)
            params, state = trainer.train(codec, seed, params, trainer.programs[codec].init(params), first)
            at_half[codec] = jax.device_get((params, state))
            params, _ = trainer.train(codec, seed, params, state, second)
            losses.setdefault(codec, []).append(trainer.loss(params))
        for before, after in SWITCHES:
            params, state = at_half[before]
            converted = trainer.convert(before, after, params, state)
            params, _ = trainer.train(after, seed, params, converted, second)
            losses.setdefault(f"{before}, then {after}", []).append(trainer.loss(params))
        params, state = at_half["fp32"]
        zeros = trainer.reset("root", params, trainer.convert("fp32", "root", params, state))
        params, _ = trainer.train("root", seed, params, zeros, second)
        losses.setdefault("fp32, then root with moments reset", []).append(trainer.loss(params))
    return {"environment": report.environment("switch"), "steps": task.steps, "losses": losses}


def gaps(results: dict[str, Any], name: str) -> list[float]:
    """Returns the relative differences from fp32 throughout, seed by seed."""
    return [loss / base - 1 for loss, base in zip(results["losses"][name], results["losses"]["fp32"], strict=True)]


def markdown(results: dict[str, Any]) -> str:
    """Returns the losses as a table."""
    seeds = len(results["losses"]["fp32"])
    lines = [
        f"`python -m benchmarks switch`: {results['steps']} steps with the change in the middle, {seeds} seeds.",
        "",
        "| moments | validation loss | difference from fp32 throughout |",
        "| --- | --: | --: |",
    ]
    for name, losses in results["losses"].items():
        gap = "" if name == "fp32" else quality_report.spread_of(gaps(results, name))
        lines.append(f"| {name}{' throughout' if name in NEVER else ''} | {mean(losses):.4f} | {gap} |")
    return "\n".join(lines)


FILE = report.RESULTS / "switch.json"


def main(arguments: list[str], task: Any = None) -> None:
    """Trains, prints, and keeps the results if they have all seeds."""
    parser = report.parser("switch", __doc__)
    parser.add_argument("--seeds", type=int, default=SEEDS)
    args = parser.parse_args(arguments)
    results = measure(task or quality.tasks()["language"], args.seeds)
    print(markdown(results))
    if args.seeds == SEEDS:
        report.save(results, FILE)
