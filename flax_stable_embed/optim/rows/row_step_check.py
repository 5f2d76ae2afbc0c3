"""Checks by trial that an optimizer treats the rows of a table one by one.

    step(rows)[some] == step(rows[some])

`row_sparse` gives the wrong result for an optimizer that couples rows, for example by a norm of the full table. No
attribute of an optax transform tells this. So the first step runs the optimizer on a few rows of random numbers, once
together with other rows and once alone, and compares. For semantics="catch_up" it also checks that a step with a zero
gradient multiplies moments and parameters by constant factors.
"""

import warnings
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from ..trees import Params
from .catch_up import measure_decays, rows_without_gradient
from .row_step import RowStep, StepInputs, TableRows

ACCUMULATES = (
    "`tx` contains {}, which sums gradients over steps, but each step touches other rows. Add up the gradients of "
    "microbatches with fse.sum_microbatches instead, and make one step."
)
_ACCUMULATORS = optax.MultiStepsState, optax.ApplyEvery
_GRADIENT_SIZES = 1.0, 1e4, 1e-4  # factors in three steps, so that limits such as clipping take effect in one of them


def check_once(checked: set, tx: Any, inputs: StepInputs, tables: Any, extra_args: Any, catches_up: bool) -> None:
    """Raises if `tx` cannot be used with `row_sparse`; does nothing after the first check that passed.

    Args:
        checked: Keys of the checks that have passed. A key is added.
        tx: The optimizer.
        inputs: Gradients, parameters and state of the present step. Only their shapes and dtypes matter.
        tables: The places of the tables.
        extra_args: Further keyword arguments of `update`.
        catches_up: Whether to check what semantics="catch_up" needs.

    Raises:
        TypeError: `tx` sums gradients over steps, or does not treat rows one by one.
        ValueError: `catches_up`, and a step with a zero gradient is not a multiplication by factors.
    """
    key = inputs.tree, inputs.state_tree, tuple(tables), inputs.params is None
    if key in checked:
        return
    for state in jax.tree.leaves(inputs.state_tree.unflatten(inputs.state), is_leaf=_accumulates):
        if _accumulates(state):
            raise TypeError(ACCUMULATES.format(type(state).__name__))
    step = RowStep(tx, extra_args, fused=False)
    try:
        with jax.ensure_compile_time_eval(), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            try:
                small = _small_copy(tx, inputs, tables)
            except ValueError:
                return  # `rules` of the optimizer depend on shapes that the small tables do not have
            row_by_row = _is_row_by_row(step, small, tables)
            decays = not catches_up or not row_by_row or _decays_by_factors(step, small, tables)
    except jax.errors.JAXTypeError:
        return  # hyperparameters are traced, so there are no numbers to compare
    if not row_by_row:
        raise TypeError(
            "`tx` does not treat the rows of a table one by one: a row gets another update if other rows are present. "
            "If `tx` clips by a norm over all gradients, move that out: optax.chain(fse.clip_by_global_norm(1.0), "
            "fse.row_sparse(tx)). Trust ratios, factored moments and orthogonalized updates need dense gradients."
        )
    if not decays:
        raise ValueError(
            "`semantics='catch_up'` needs a `tx` whose step with a zero gradient multiplies moments and weights by "
            "factors, as Adam with decoupled weight decay does. This `tx` does not. Use semantics='lazy', or decoupled "
            "weight decay as in adamw."
        )
    checked.add(key)


def _accumulates(x: Any) -> bool:
    return isinstance(x, _ACCUMULATORS)


def _small_copy(tx: Any, inputs: StepInputs, tables: Any) -> StepInputs:
    """Returns the same problem with random numbers, few rows per table, and axes of size 2 elsewhere.

    Some optimizers factor the moments of arrays with at least 128 rows and columns. A table that is so large gets 130
    of both here, so that it is treated alike.
    """
    rng = np.random.default_rng(0)

    def numbers(place: int, like: Any) -> Any:
        if like is None:
            return None
        shape = (2,) * jnp.ndim(like)
        if place in tables:
            rows, features = (min(n, 130) for n in like.shape)
            shape = max(4, rows + (rows == features)), features
        return jnp.asarray(rng.standard_normal(shape), like.dtype)

    grads = [numbers(i, g) for i, g in enumerate(inputs.grads)]
    params = [numbers(i, p) for i, p in enumerate(inputs.params or inputs.grads)]
    state = tx.init(inputs.tree.unflatten(params))
    given = None if inputs.params is None else inputs.tree.unflatten(params)
    return StepInputs.of(inputs.tree, inputs.paths, grads, given, state)


def _is_row_by_row(step: RowStep, inputs: StepInputs, tables: Any) -> bool:
    """Returns whether two rows get the same results alone as among others.

    There are four steps, whose gradients have different sizes. In the last one another row is NaN.
    """
    some = np.array([0, 2])
    grads = inputs.grads
    for size in (*_GRADIENT_SIZES, None):
        changed = [g if g is None else g * (1.0 if size is None else size) for g in grads]
        if size is None:
            changed = [jnp.asarray(g).at[1].set(jnp.nan) if i in tables else g for i, g in enumerate(changed)]
        inputs = inputs._replace(grads=[g if g is None else g.astype(o.dtype) for g, o in zip(changed, grads)])
        kept = {place: inputs.rows_of_state(place) for place in tables}
        all_rows = {place: np.arange(inputs.grads[place].shape[0]) for place in tables}
        among_all = step(inputs, _select_rows(inputs, kept, all_rows))
        try:
            alone = step(inputs, _select_rows(inputs, kept, dict.fromkeys(tables, some)))
        except (TypeError, ValueError):  # shapes of moments that do not fit fewer rows
            return False
        pairs = [(among_all.out[place][some], alone.out[place]) for place in tables]
        pairs += [(among_all.state[i][some], alone.state[i]) for place in tables for i in kept[place]]
        pairs += [(a, b) for a, b, owner in zip(among_all.state, alone.state, inputs.owners) if owner is None]
        if not all(_are_close(a, b) for a, b in pairs):
            return False
        inputs = inputs._replace(state=among_all.state)
    return True


def _select_rows(inputs: StepInputs, kept: dict[int, list[int]], rows: dict[int, np.ndarray]) -> dict[int, TableRows]:
    """Returns the given rows of every table."""
    params: Params = inputs.params
    return {
        place: TableRows(
            inputs.grads[place][at],
            None if params is None else params[place][at],
            {i: inputs.state[i][at] for i in kept[place]},
        )
        for place, at in rows.items()
    }


def _decays_by_factors(step: RowStep, inputs: StepInputs, tables: Any) -> bool:
    """Returns whether steps with a zero gradient only multiply by the factors that `measure_decays` finds.

    Three steps are compared. Moments are compared from zero and after a step with a gradient. Parameters are compared
    only from zero moments, because momentum may continue to move them.
    """
    n = max(len(inputs.rows_of_state(place)) for place in tables) + 1
    unit_rows = rows_without_gradient(inputs, tables, np.concatenate([np.eye(n), 2 * np.eye(n)]))
    after = step(inputs, unit_rows)
    for place, rows in unit_rows.items():
        u = after.out[place]
        still = all(np.max(np.abs(after.state[i][n - 1]), initial=0.0) < 1e-6 for i in rows.state)
        if not (still and _are_close(2 * u[n - 1], u[2 * n - 1])):
            return False
    all_rows = {place: np.arange(inputs.grads[place].shape[0]) for place in tables}
    kept = {place: inputs.rows_of_state(place) for place in tables}
    given: Any = inputs.params  # not None, which `row_sparse` has checked
    moved = step(inputs, _select_rows(inputs, kept, all_rows)).state
    inputs = inputs._replace(grads=[g if g is None else jnp.zeros_like(g) for g in inputs.grads])
    for state, compare_params in ((inputs.state, True), (moved, False)):
        now, params = inputs._replace(state=state), {place: given[place] for place in tables}
        moments, want = {i: state[i] for place in tables for i in kept[place]}, dict(params)
        for _ in range(3):
            decays = measure_decays(step, now, tables)
            for place, decay in decays.items():
                want[place] = want[place] * jnp.exp(decay.log_params).astype(want[place].dtype)
                moments |= {i: moments[i] * c.astype(moments[i].dtype) for i, c in decay.moments.items()}
            after = step(now, _select_rows(now, kept, all_rows))
            params = {place: p + after.out[place] for place, p in params.items()}
            now = now._replace(state=after.state, params=[params.get(i, p) for i, p in enumerate(given)])
        if compare_params and not all(_are_close(params[place], want[place], 1e-6) for place in tables):
            return False
        if not all(_are_close(now.state[i], x, 1e-6) for i, x in moments.items()):
            return False
    return True


def _are_close(a: Any, b: Any, least: float = 0.0) -> bool:
    """Returns whether two arrays are equal up to rounding errors, or up to `least`; None equals None."""
    if a is None or b is None:
        return a is b
    tolerance = 1e-5 if a.dtype.itemsize > 2 else 2e-2
    x, y = np.asarray(a, np.float64), np.asarray(b, np.float64)
    return bool(
        np.all(
            np.isclose(x, y, rtol=tolerance, atol=least + tolerance * np.max(np.abs(x), initial=0.0), equal_nan=True)
        )
    )
