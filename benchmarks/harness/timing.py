"""Times contenders in turns, in one process: every contender has a turn in every round.

Machines drift, because clocks change and other processes run. So contenders are compared within a round and never
across runs. The order rotates from round to round, every second round runs backwards, and a ratio is taken between two
turns of one round. A turn is one step, or as many as fill `TURN_S` after an untimed one, which warms up caches and
threads.
"""

from collections.abc import Callable
from statistics import quantiles
from time import perf_counter
from typing import Any

import jax
import jax.numpy as jnp

TURN_S = 0.02  # much longer than the resolution of the clock and than a scheduler's slice of a few ms
LEAST_ROUNDS, MOST_ROUNDS = 5, 41  # quartiles need a few samples; more than 41 do not move the medians


def alternate(
    steps: dict[Any, Callable[[], None]], budget_s: float, most_rounds: int = MOST_ROUNDS
) -> dict[Any, list[float]]:
    """Returns the seconds per step of every contender in every round. All rounds take about `budget_s` seconds."""
    repeats, round_s = {}, 0.0
    for i, step in steps.items():
        seconds = _time(step, 1)
        if seconds < TURN_S:  # the first call has extra costs
            seconds = _time(step, 3)
        repeats[i] = max(1, round(TURN_S / seconds))
        round_s += seconds * (repeats[i] + (repeats[i] > 1))
    rounds = min(most_rounds, max(LEAST_ROUNDS, int(budget_s / round_s)))
    turns: dict[Any, list[float]] = {i: [] for i in steps}
    for r in range(rounds):
        order = list(steps)[r % len(steps) :] + list(steps)[: r % len(steps)]
        for i in order if r % 2 == 0 else reversed(order):
            turns[i].append(_turn(steps[i], repeats[i]))
    return turns


def _turn(step: Callable[[], None], repeats: int) -> float:
    if repeats > 1:
        step()
    return _time(step, repeats)


def _time(step: Callable[[], None], repeats: int) -> float:
    start = perf_counter()
    for _ in range(repeats):
        step()
    return (perf_counter() - start) / repeats


def quartiles(values: list[float]) -> list[float]:
    """Returns lower quartile, median and upper quartile."""
    return quantiles(values, n=4, method="inclusive")


def copy_gb_per_s(size: int = 1 << 26) -> float:
    """Returns the bandwidth of memory: bytes read and written per second by `x + 1` in place, on `size` floats."""
    add = jax.jit(lambda x: x + 1, donate_argnums=0)
    x = jnp.zeros(size, jnp.float32)
    seconds = []
    for _ in range(8):
        start = perf_counter()
        x = jax.block_until_ready(add(x))
        seconds.append(perf_counter() - start)
    return 8 * size / quartiles(seconds[1:])[1] / 1e9
