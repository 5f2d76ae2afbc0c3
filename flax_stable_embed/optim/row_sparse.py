r"""Any optimizer that treats rows one by one, on the rows that a batch touched and on nothing else of a table.

    m_i, p_i <- step(g_i, m_i, p_i)    for the rows i of the gradient;    all other rows stay as they are

The rows of parameters and moments are gathered, the optimizer makes its step on them as on any array, and they are put
back, in place where the arrays are donated: the formula is the dense one's own.
"""

import warnings
from typing import Any, Literal, NamedTuple, get_args

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import Array

from ..ops.rows import SparseRows, distinct, is_sparse_rows, set_rows, take_rows
from ._boxes import is_box, unbox
from ._rowwise import Problem, Rows, RowStep, step_on_rows
from ._rules import path_name
from ._storage import is_none
from ._tables import are_tables, ids_of_tables
from ._transform import FusedTransformation, is_fused

Semantics = Literal["lazy", "catch_up"]
# Sums of logarithms are whole multiples of this, so that differences are exact however long a training is (they wrap
# around at 32, where a decay is complete).
UNIT = 2.0**-26


class RowSparseState(NamedTuple):
    """State of `row_sparse(tx, semantics="catch_up")`; with "lazy" it is that of `tx` alone."""

    inner_state: Any
    count: Array  # shape=(), dtype=int32: steps done
    log_decay: Any  # like the parameters, int32 (): sum over the steps of log(1 - rate * decay), in units of UNIT
    remainder: Any  # like the parameters, float32 (): what `log_decay` lacks, less than a unit
    last: Any  # like the parameters, int32 (num_rows,): the count after the last step that touched a row
    last_log_decay: Any  # like the parameters, int32 (num_rows,): `log_decay` after that step


def row_sparse(
    tx: optax.GradientTransformation, semantics: Semantics = "lazy", *, mask: Any = None
) -> FusedTransformation:
    r"""`tx`, which updates only those rows of embedding tables, and of their moments, that a batch touched.

    $$m_i, \theta_i \leftarrow \mathrm{tx}(g_i, m_i, \theta_i) \ \text{for the rows } i \text{ of the gradient}$$

    The cost of a step grows with the rows of the batch and not with the table. Row gradients come from
    `fse.row_value_and_grad`; of a dense gradient (`jax.grad`), the rows are those of `token_ids`, an argument of
    `update`. The update of a table is a `fse.SparseRows` that `optax.apply_updates`, `TrainState` and `nnx.Optimizer`
    add to it. Under `jit`, donate parameters and state: their rows are then written in place.

    `tx` may be any optimizer that treats the rows of these tables one by one: of optax sgd (and momentum), adagrad,
    adam, adamw, rmsprop, lion and most others, and those of this library, whose other parameters may be in 8 bits;
    tables keep fp32 moments. It sees small arrays in the place of tables, so that every option works as always. The
    first step checks on a few rows of random numbers that it really treats rows one by one. Norms over all gradients
    belong before it: `optax.chain(fse.clip_by_global_norm(1.0), fse.row_sparse(tx))`. (A function of parameters, as a
    mask can be, sees the shapes of the rows; `fse.where` sees those of the tables.)

    The semantics, for a row that was not touched for k steps:

    - "lazy": these steps are skipped, as in torch.optim.SparseAdam and TensorFlow's LazyAdam. Moments do not decay in
      them, and bias corrections go by the count of all steps, as there.
    - "catch_up": before the row's next step, what a step with gradient zero does by itself is made up for:

      $$m_i \leftarrow c^k m_i, \qquad \theta_i \leftarrow \theta_i \prod_s (1 - \alpha_s \lambda)$$

      with c the decay rate of each moment (b1, b2, 1 for Adagrad's sum) and the product over the skipped steps, whose
      learning rates may follow a schedule. Both are read off `tx` itself, from its step on rows of ones. Moments and
      decoupled weight decay are then those of the dense optimizer, and for optimizers without momentum (SGD, RMSprop,
      Adagrad) so is the trajectory. Not made up for is how momentum would have moved the row meanwhile: for k large
      that is at most b1 / (1 - b1) times its last step.
      The state has two more numbers for each row. Decay rates must not change, and a step not decay to zero or below.

    Sums of gradients over steps are not row by row: `optax.MultiSteps` is refused; see `fse.sum_microbatches`.

    Args:
        tx: the optimizer.
        semantics: "lazy" or "catch_up".
        mask: a pytree of booleans like the parameters, or a function of them that gives one: the tables. By default
            two-dimensional parameters with the name of an embedding, as in the default rules of `adamw8bit`. It
            matters for "catch_up", which keeps numbers for each row, and where `token_ids` is one array.

    Returns:
        An optax transform; `update(grads, state, params, token_ids=None)`. `token_ids`: for dense gradients, the ids
        that were looked up: an array, where there is one table, or `{"path/of/embedding": array or list of arrays}`.
        A row whose id is missing is not updated. It also serves `fse.fused_update` if `tx` does.

    Raises:
        TypeError: `tx` is not an optax transform, accumulates steps or does not treat rows one by one; moments of a
            table in 8 bits.
        ValueError: other semantics; in `update`, no row gradients and no `token_ids`; with "catch_up", no `params`, a
            table that `mask` does not name, or a `tx` whose moments or weights do not decay by a factor.

    >>> import jax.numpy as jnp, optax, flax_stable_embed as fse
    >>> tx = fse.row_sparse(optax.sgd(1.0))
    >>> params = {"embedding": jnp.zeros((1000, 2))}
    >>> rows = fse.SparseRows.of_lookups(jnp.array([7, 7]), jnp.ones((2, 2)), num_rows=1000)
    >>> updates, state = tx.update({"embedding": rows}, tx.init(params), params)
    >>> optax.apply_updates(params, updates)["embedding"][7]
    Array([-2., -2.], dtype=float32)

    Source: torch.optim.SparseAdam; the product of skipped decays: pytorch/pytorch#3137.
    """
    if isinstance(tx, optax.MultiSteps):
        raise TypeError(_ACCUMULATES.format("optax.MultiSteps"))
    if not (hasattr(tx, "init") and hasattr(tx, "update")):
        raise TypeError(f"`tx` must be an optax transform, got {tx!r}.")
    if semantics not in get_args(Semantics):
        raise ValueError(f"`semantics` must be 'lazy' or 'catch_up', got {semantics!r}.")
    catches_up, checked = semantics == "catch_up", set()

    def init(params):
        inner = tx.init(params)
        return _initial(inner, params, mask) if catches_up else inner

    def step(fused, grads, state, params, token_ids, extra_args):
        inner_state = state.inner_state if catches_up else state
        problem = _problem(grads, params, inner_state, token_ids, mask)
        tables = {i: g for i, g in enumerate(problem.grads) if is_sparse_rows(g)}
        one = RowStep(tx, fused, extra_args)
        _check_once(checked, tx, problem, tables, extra_args, catches_up)
        if not catches_up:
            outcome = step_on_rows(one, problem, tables)
            return problem.tree.unflatten(outcome.outputs), problem.state_tree.unflatten(outcome.state)
        if params is None:
            raise ValueError("semantics='catch_up' needs `params`: call update(grads, state, params); got None.")
        records = _Records(problem, tables, state)
        decays = _decays(RowStep(tx, False, extra_args), problem, tables)
        outcome = step_on_rows(one, problem, tables, lambda *cut: records.catch_up(decays, *cut))
        inner_state = problem.state_tree.unflatten(outcome.state)
        return problem.tree.unflatten(outcome.outputs), records.after(inner_state, decays)

    def update(updates, state, params=None, *, token_ids=None, **extra_args):
        return step(False, updates, state, params, token_ids, extra_args)

    def fused_update(grads, state, params, *, token_ids=None, **extra_args):
        return step(True, grads, state, params, token_ids, extra_args)

    return FusedTransformation(init, update, fused_update if is_fused(tx) else None)


_ACCUMULATES = (
    "{} sums gradients over steps, but the rows of one step are not those of another. Accumulate the gradients of "
    "microbatches instead, with fse.sum_microbatches, and make one step."
)
_ACCUMULATORS = optax.MultiStepsState, optax.ApplyEvery


def _is_leaf(x: Any) -> bool:
    return x is None or is_sparse_rows(x)


def _problem(grads: Any, params: Any, state: Any, token_ids: Any, mask: Any) -> Problem:
    """The step's arrays, with row gradients in the place of dense ones where `token_ids` says so."""
    pairs, tree = jax.tree_util.tree_flatten_with_path(grads, is_leaf=_is_leaf)
    paths, leaves = [path_name(path) for path, _ in pairs], [g for _, g in pairs]
    known = {path: g.shape[0] for path, g in zip(paths, leaves) if len(getattr(g, "shape", ())) == 2}
    if token_ids is not None:
        dense = [path in known and not is_sparse_rows(g) for path, g in zip(paths, leaves)]
        chosen = are_tables(mask, tree.unflatten(leaves), paths, leaves)
        tables = {path: known[path] for path, ours, d in zip(paths, chosen, dense) if ours and d}
        unneeded = not tables and any(map(is_sparse_rows, leaves))  # row gradients know their rows
        found = {} if unneeded else ids_of_tables(token_ids, tables, known)
        for i, path in enumerate(paths):
            if path in found and dense[i]:
                indices = distinct(found[path], known[path])
                leaves[i] = SparseRows(indices, take_rows(jnp.asarray(leaves[i]), indices), known[path])
    if not any(map(is_sparse_rows, leaves)):
        raise ValueError(
            "`row_sparse` got no row gradients. Take them from fse.row_value_and_grad, or give the ids that were "
            "looked up: tx.update(grads, state, params, token_ids=ids)."
        )
    problem = Problem.of(tree, paths, leaves, params, state)
    if params is not None:
        for path, g, p in zip(paths, leaves, problem.params or ()):
            if is_sparse_rows(g) and getattr(p, "shape", None) != g.shape:
                raise ValueError(
                    f"The row gradient of {path!r} is of a table of shape {g.shape}, but it has {p.shape}."
                )
    return problem


# --- catching up -----------------------------------------------------------------------------------------------------


def _initial(inner_state: Any, params: Any, mask: Any) -> RowSparseState:
    pairs, tree = jax.tree_util.tree_flatten_with_path(params, is_leaf=_is_box_or_none)
    leaves = [unbox(x) for _, x in pairs]
    ours = are_tables(mask, tree.unflatten(leaves), [path_name(path) for path, _ in pairs], leaves)

    def zeros(dtype: Any, of_rows: bool) -> Any:
        shapes = [x.shape[:1] if table and of_rows else () for table, x in zip(ours, leaves)]
        return tree.unflatten([jnp.zeros(shape, dtype) for shape in shapes])

    count = jnp.zeros([], jnp.int32)
    sums = zeros(jnp.int32, False), zeros(jnp.float32, False)
    return RowSparseState(inner_state, count, *sums, zeros(jnp.int32, True), zeros(jnp.int32, True))


def _is_box_or_none(x: Any) -> bool:
    return x is None or is_box(x)


class _Decay(NamedTuple):
    """What a step with gradient zero does to a row, as factors."""

    moments: dict[int, Array]  # by the place of the array in the flat state
    log_params: Array


class _Records:
    """What "catch_up" remembers, by the place of each parameter."""

    def __init__(self, problem: Problem, tables: dict[int, SparseRows], state: RowSparseState):
        self.state, self.tables = state, tables
        trees = [jax.tree.flatten(tree, is_leaf=is_none) for tree in state[2:]]
        columns, self.trees = zip(*trees)
        lists: Any = [[None if x is None else jnp.asarray(x) for x in column] for column in columns]
        self.log_decay, self.remainder, self.last, self.last_log_decay = lists
        named = [i for i, x in enumerate(self.last) if jnp.ndim(x)]
        if missing := [i for i in named if i not in tables]:
            raise ValueError(
                f"{problem.paths[missing[0]]!r} is a table by `mask`, but has no row gradient: with 'catch_up' "
                "every table must have one in every step. Leave it out of `mask`, or give its `token_ids`."
            )
        for place in tables:
            if self.last[place].shape != (tables[place].shape[0],):
                raise ValueError(
                    f"{problem.paths[place]!r} has a row gradient, but 'catch_up' keeps no record of its rows: "
                    "name it in `mask` when the optimizer is made."
                )

    def catch_up(self, decays: dict[int, _Decay], place: int, indices: Array, rows: Rows) -> Rows:
        decay, p = decays[place], rows.params
        assert p is not None  # checked by `step`
        skipped = (self.state.count - take_rows(self.last[place], indices)).astype(jnp.float32)
        log_factor = UNIT * (self.log_decay[place] - take_rows(self.last_log_decay[place], indices)).astype(jnp.float32)
        drift = p * jnp.expm1(log_factor)[:, None].astype(p.dtype)
        state = {
            i: (x * (decay.moments[i] ** skipped).reshape(-1, *[1] * (x.ndim - 1))).astype(x.dtype)
            for i, x in rows.state.items()
        }
        return rows._replace(params=p + drift, state=state, drift=drift)

    def after(self, inner_state: Any, decays: dict[int, _Decay]) -> RowSparseState:
        count = jnp.asarray(optax.safe_increment(self.state.count))
        for place, x in self.tables.items():
            units = (decays[place].log_params / UNIT) + self.remainder[place]
            whole = jnp.clip(jnp.round(units), -(2.0**30), 2.0**30)  # a decay to zero is one by e^-16
            self.remainder[place] = units - whole
            self.log_decay[place] = self.log_decay[place] + whole.astype(jnp.int32)
            for column, value in ((self.last, count), (self.last_log_decay, self.log_decay[place])):
                column[place] = set_rows(column[place], x.indices, jnp.full(x.indices.shape, value))
        columns = zip(self.trees, (self.log_decay, self.remainder, self.last, self.last_log_decay))
        return RowSparseState(inner_state, count, *(tree.unflatten(column) for tree, column in columns))


def _decays(step: RowStep, problem: Problem, tables: dict[int, SparseRows]) -> dict[int, _Decay]:
    """Read off the optimizer: its step without a gradient on a row of which one moment, or the parameter, is ones."""
    n = max(len(problem.rows_of_state(place)) for place in tables) + 1
    blank = _rows_without_gradient(problem, tables, np.eye(n))
    outcome = step(problem, blank, others=False)
    return {
        place: _Decay(
            {i: outcome.state[i][k].ravel()[0].astype(jnp.float32) for k, i in enumerate(rows.state)},
            jnp.log1p(outcome.outputs[place][-1].ravel()[0].astype(jnp.float32)),
        )
        for place, rows in blank.items()
    }


def _rows_without_gradient(problem: Problem, tables: Any, numbers: np.ndarray) -> dict[int, Rows]:
    """A row for each row of `numbers`, filled with them: the k-th moment with the k-th, the parameter with the last."""

    def filled(x: Array, column: np.ndarray) -> Array:
        column = column.reshape(-1, *[1] * (x.ndim - 1))
        return jnp.asarray(np.broadcast_to(column, (len(numbers), *x.shape[1:])), x.dtype)

    blank = {}
    for place in tables:
        g, kept = problem.grads[place], problem.rows_of_state(place)
        p = None if problem.params is None else filled(problem.params[place], numbers[:, -1])
        state = {i: filled(problem.state[i], numbers[:, k]) for k, i in enumerate(kept)}
        blank[place] = Rows(jnp.zeros((len(numbers), g.shape[1]), g.dtype), p, state)
    return blank


# --- what cannot be done row by row ----------------------------------------------------------------------------------


def _check_once(checked: set, tx: Any, problem: Problem, tables: Any, extra_args: Any, catches_up: bool) -> None:
    """Raises where `tx` does not do with a few rows what it does with all of them; tried on random numbers."""
    key = problem.tree, problem.state_tree, tuple(tables), problem.params is None
    if key in checked:
        return
    for state in jax.tree.leaves(problem.state_tree.unflatten(problem.state), is_leaf=_accumulates):
        if _accumulates(state):
            raise TypeError(_ACCUMULATES.format(type(state).__name__))
    step = RowStep(tx, False, extra_args)
    try:
        with jax.ensure_compile_time_eval(), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            try:
                small = _small(tx, problem, tables)
            except ValueError:
                return  # rules that go by shapes
            rowwise = _is_rowwise(step, small, tables)
            decays = not catches_up or not rowwise or _decays_by_factors(step, small, tables)
    except jax.errors.JAXTypeError:
        return  # hyper-parameters are traced
    if not rowwise:
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


def _small(tx: Any, problem: Problem, tables: Any) -> Problem:
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

    grads = [numbers(i, g) for i, g in enumerate(problem.grads)]
    params = [numbers(i, p) for i, p in enumerate(problem.params or problem.grads)]
    state = tx.init(problem.tree.unflatten(params))
    given = None if problem.params is None else problem.tree.unflatten(params)
    return Problem.of(problem.tree, problem.paths, grads, given, state)


SIZES = 1.0, 1e4, 1e-4  # of the gradients in three steps: limits come into force between them


def _is_rowwise(step: RowStep, problem: Problem, tables: Any) -> bool:
    """Whether two rows among others, some of which are NaN at last, make the steps that they make alone."""
    some = np.array([0, 2])
    grads = problem.grads
    for size in (*SIZES, None):
        changed = [g if g is None else g * (1.0 if size is None else size) for g in grads]
        if size is None:
            changed = [jnp.asarray(g).at[1].set(jnp.nan) if i in tables else g for i, g in enumerate(changed)]
        problem = problem._replace(grads=[g if g is None else g.astype(o.dtype) for g, o in zip(changed, grads)])
        kept = {place: problem.rows_of_state(place) for place in tables}
        every = {place: np.arange(problem.grads[place].shape[0]) for place in tables}
        whole = step(problem, _cut(problem, kept, every))
        try:
            part = step(problem, _cut(problem, kept, dict.fromkeys(tables, some)))
        except (TypeError, ValueError):  # moments whose shapes do not go with fewer rows
            return False
        pairs = [(whole.outputs[place][some], part.outputs[place]) for place in tables]
        pairs += [(whole.state[i][some], part.state[i]) for place in tables for i in kept[place]]
        pairs += [(a, b) for a, b, owner in zip(whole.state, part.state, problem.owners) if owner is None]
        if not all(_close(a, b) for a, b in pairs):
            return False
        problem = problem._replace(state=whole.state)
    return True


def _cut(problem: Problem, kept: dict[int, list[int]], rows: dict[int, np.ndarray]) -> dict[int, Rows]:
    """These rows of every table."""
    params: Any = problem.params
    return {
        place: Rows(
            problem.grads[place][at],
            None if params is None else params[place][at],
            {i: problem.state[i][at] for i in kept[place]},
        )
        for place, at in rows.items()
    }


def _decays_by_factors(step: RowStep, problem: Problem, tables: Any) -> bool:
    """Whether three steps without a gradient are what factors say: of parameters that have not moved, and of moments.

    (Parameters that have moved may go on to, by momentum.)
    """
    n = max(len(problem.rows_of_state(place)) for place in tables) + 1
    blank = _rows_without_gradient(problem, tables, np.concatenate([np.eye(n), 2 * np.eye(n)]))
    outcome = step(problem, blank)
    for place, rows in blank.items():
        u = outcome.outputs[place]
        still = all(np.max(np.abs(outcome.state[i][n - 1]), initial=0.0) < 1e-6 for i in rows.state)
        if not (still and _close(2 * u[n - 1], u[2 * n - 1])):
            return False
    whole = {place: np.arange(problem.grads[place].shape[0]) for place in tables}
    kept = {place: problem.rows_of_state(place) for place in tables}
    given: Any = problem.params  # checked by `step` of the transform
    moved = step(problem, _cut(problem, kept, whole)).state
    problem = problem._replace(grads=[g if g is None else jnp.zeros_like(g) for g in problem.grads])
    for state, of_params in ((problem.state, True), (moved, False)):
        now, params = problem._replace(state=state), {place: given[place] for place in tables}
        moments, want = {i: state[i] for place in tables for i in kept[place]}, dict(params)
        for _ in range(3):
            decays = _decays(step, now, tables)
            for place, decay in decays.items():
                want[place] = want[place] * jnp.exp(decay.log_params).astype(want[place].dtype)
                moments |= {i: moments[i] * c.astype(moments[i].dtype) for i, c in decay.moments.items()}
            after = step(now, _cut(now, kept, whole))
            params = {place: p + after.outputs[place] for place, p in params.items()}
            now = now._replace(state=after.state, params=[params.get(i, p) for i, p in enumerate(given)])
        if of_params and not all(_close(params[place], want[place], 1e-6) for place in tables):
            return False
        if not all(_close(now.state[i], x, 1e-6) for i, x in moments.items()):
            return False
    return True


def _close(a: Any, b: Any, least: float = 0.0) -> bool:
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
