"""Whether an optimizer treats the rows of a table one by one, tried on a few rows of random numbers."""

import warnings
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from .catch_up import measure_decays, rows_without_gradient
from .row_step import RowStep, StepInputs, TableRows

ACCUMULATES = (
    "{} sums gradients over steps, but the rows of one step are not those of another. Accumulate the gradients of "
    "microbatches instead, with fse.sum_microbatches, and make one step."
)
_ACCUMULATORS = optax.MultiStepsState, optax.ApplyEvery
_GRADIENT_SIZES = 1.0, 1e4, 1e-4  # in three steps, between which limits take effect


def check_once(checked: set, tx: Any, inputs: StepInputs, tables: Any, extra_args: Any, catches_up: bool) -> None:
    """Raises where `tx` does not do with a few rows what it does with all of them; tried on random numbers."""
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
                return  # rules that go by shapes
            row_by_row = _is_row_by_row(step, small, tables)
            decays = not catches_up or not row_by_row or _decays_by_factors(step, small, tables)
    except jax.errors.JAXTypeError:
        return  # hyper-parameters are traced
    if not row_by_row:
        raise TypeError(
            "`tx` does not treat the rows of a table one by one: on some rows alone it does something else than on the "
            "same rows among others. Norms over all gradients belong before it, optax.chain(fse.clip_by_global_norm("
            "1.0), fse.row_sparse(tx)); trust ratios, factored moments and orthogonalised updates need whole gradients."
        )
    if not decays:
        raise ValueError(
            "semantics='catch_up' needs an optimizer that without a gradient multiplies moments and weights by "
            "factors, such as Adam's with decoupled weight decay, but `tx` does not. Use 'lazy', or decay like adamw."
        )
    checked.add(key)


def _accumulates(x: Any) -> bool:
    return isinstance(x, _ACCUMULATORS)


def _small_copy(tx: Any, inputs: StepInputs, tables: Any) -> StepInputs:
    """The same parameters with fewer rows in each table, and two numbers an axis elsewhere.

    Some optimizers factor what has 128 rows and columns: where the table has them, so have its few rows.
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
    """Whether two rows among others, some of which are NaN at last, make the steps that they make alone."""
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
        except (TypeError, ValueError):  # moments whose shapes do not go with fewer rows
            return False
        pairs = [(among_all.out[place][some], alone.out[place]) for place in tables]
        pairs += [(among_all.state[i][some], alone.state[i]) for place in tables for i in kept[place]]
        pairs += [(a, b) for a, b, owner in zip(among_all.state, alone.state, inputs.owners) if owner is None]
        if not all(_are_close(a, b) for a, b in pairs):
            return False
        inputs = inputs._replace(state=among_all.state)
    return True


def _select_rows(inputs: StepInputs, kept: dict[int, list[int]], rows: dict[int, np.ndarray]) -> dict[int, TableRows]:
    """These rows of every table."""
    params: Any = inputs.params
    return {
        place: TableRows(
            inputs.grads[place][at],
            None if params is None else params[place][at],
            {i: inputs.state[i][at] for i in kept[place]},
        )
        for place, at in rows.items()
    }


def _decays_by_factors(step: RowStep, inputs: StepInputs, tables: Any) -> bool:
    """Whether three steps without a gradient are what factors say: of parameters that have not moved, and of moments.

    (Parameters that have moved may go on to, by momentum.)
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
    given: Any = inputs.params  # checked by `step` of the transform
    moved = step(inputs, _select_rows(inputs, kept, all_rows)).state
    inputs = inputs._replace(grads=[g if g is None else jnp.zeros_like(g) for g in inputs.grads])
    for state, of_params in ((inputs.state, True), (moved, False)):
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
        if of_params and not all(_are_close(params[place], want[place], 1e-6) for place in tables):
            return False
        if not all(_are_close(now.state[i], x, 1e-6) for i, x in moments.items()):
            return False
    return True


def _are_close(a: Any, b: Any, least: float = 0.0) -> bool:
    """Within rounding or `least`, of numbers and what else there may be in a state."""
    if a is None or b is None:
        return a is b
    tolerance = 1e-5 if a.dtype.itemsize > 2 else 2e-2
    x, y = np.asarray(a, np.float64), np.asarray(b, np.float64)
    return bool(
        np.all(
            np.isclose(x, y, rtol=tolerance, atol=least + tolerance * np.max(np.abs(x), initial=0.0), equal_nan=True)
        )
    )
