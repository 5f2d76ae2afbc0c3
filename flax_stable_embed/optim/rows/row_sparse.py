r"""Any optimizer that treats rows one by one, on the rows that a batch touched and on nothing else of a table.

    m_i, p_i <- step(g_i, m_i, p_i)    for the rows i of the gradient;    all other rows stay as they are

The rows of parameters and moments are gathered, the optimizer makes its step on them as on any array, and they are put
back, in place where the arrays are donated: the formula is the dense one's own.
"""

from functools import partial
from typing import Any, Literal, get_args

import jax
import jax.numpy as jnp
import optax

from ...ops.embedding.rows import SparseRows, distinct, is_none_or_rows, is_sparse_rows, take_rows
from ..arguments import check_transform
from ..fused_update import FusedTransformation, is_fused
from ..trees import path_name
from .catch_up import RowHistory, RowSparseState, initial_state, measure_decays
from .row_step import RowStep, StepInputs, step_on_rows
from .row_step_check import ACCUMULATES, check_once
from .tables import are_tables, row_numbers_by_path

Semantics = Literal["lazy", "catch_up"]


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
    first step checks on a few rows of random numbers that it really treats rows one by one (it cannot where
    hyper-parameters are traced, as those of `optax.inject_hyperparams` are under jit). Norms over all gradients belong
    before it: `optax.chain(fse.clip_by_global_norm(1.0), fse.row_sparse(tx))`. (A function of parameters, as a mask can
    be, sees the shapes of the rows; `fse.where` sees those of the tables. Around `row_sparse`, the masks of
    `optax.masked` and the labels of `optax.partition` must be trees, or functions that stop at `fse.SparseRows`.)

    The semantics, for a row that was not touched for k steps:

    - "lazy": these steps are skipped, as in torch.optim.SparseAdam and TensorFlow's LazyAdam. Moments do not decay in
      them, and bias corrections go by the count of all steps, as there.
    - "catch_up": before the row's next step, what a step with gradient zero does by itself is made up for:

      $$m_i \leftarrow c^k m_i, \qquad \theta_i \leftarrow \theta_i \prod_s (1 - \alpha_s \lambda)$$

      with c the decay rate of each moment (b1, b2, 1 for Adagrad's sum) and the product over the skipped steps, whose
      learning rates may follow a schedule. Both are read off `tx` itself, from its step on rows of ones. From the same
      gradients, moments and decoupled weight decay are then those of the dense optimizer, and for optimizers without
      momentum (SGD, RMSprop, Adagrad) so are the parameters. Not made up for are how momentum would have moved the row
      meanwhile, and that the loss looked the row up before its weight decay was made up for. Rows that no batch looks
      up again keep their old values: a last step on all of them, gradients of zero with `token_ids=jnp.arange(n)`,
      brings a table up to date.
      The state has three more numbers for each row. Decay rates must not change, and a step not decay to zero or below.

    Sums of gradients over steps are not row by row: `optax.MultiSteps` is refused, and around `row_sparse` it cannot
    add its gradients up; see `fse.sum_microbatches`.

    Args:
        tx: the optimizer.
        semantics: "lazy" or "catch_up".
        mask: a pytree of booleans like the parameters, or a function of them that gives one: the tables. By default
            two-dimensional parameters with the name of an embedding, as in the default rules of `adamw8bit`. It
            matters for "catch_up", which keeps numbers for each row, and where `token_ids` is one array.

    Returns:
        An optax transform; `update(grads, state, params, token_ids=None)`. `token_ids`: for dense gradients, the ids
        that were looked up: an array, where there is one table, or `{"path/of/embedding": array or list of arrays}`.
        Negative ones count from the end and those outside the table are none: after a lookup with `mode="clip"`, clip
        them. A row whose id is missing is not updated. It also serves `fse.fused_update` if `tx` does.

    Raises:
        TypeError: `tx` is not an optax transform, accumulates steps or does not treat rows one by one; moments of a
            table in 8 bits; in `update`, a state of the other semantics.
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
        raise TypeError(ACCUMULATES.format("optax.MultiSteps"))
    check_transform(tx)
    if semantics not in get_args(Semantics):
        raise ValueError(f"`semantics` must be 'lazy' or 'catch_up', got {semantics!r}.")
    catches_up, checked = semantics == "catch_up", set()

    def init(params):
        inner = tx.init(params)
        return initial_state(inner, params, mask) if catches_up else inner

    def step(grads, state, params, token_ids, extra_args, *, fused):
        if catches_up is not isinstance(state, RowSparseState):
            raise TypeError(
                f"`state` is of the other semantics: {semantics=} cannot go on with a {type(state).__name__}. "
                "Make the optimizer as it was when the state was made."
            )
        inner_state = state.inner_state if catches_up else state
        inputs = _step_inputs(grads, params, inner_state, token_ids, mask)
        tables = {i: g for i, g in enumerate(inputs.grads) if is_sparse_rows(g)}
        if catches_up and params is None:
            raise ValueError("semantics='catch_up' needs `params`: call update(grads, state, params); got None.")
        one_step = RowStep(tx, extra_args, fused=fused)
        check_once(checked, tx, inputs, tables, extra_args, catches_up)
        if not catches_up:
            after = step_on_rows(one_step, inputs, tables)
            return inputs.tree.unflatten(after.out), inputs.state_tree.unflatten(after.state)
        history = RowHistory(inputs, tables, state)
        decays = measure_decays(RowStep(tx, extra_args, fused=False), inputs, tables)
        after = step_on_rows(one_step, inputs, tables, partial(history.catch_up, decays))
        inner_state = inputs.state_tree.unflatten(after.state)
        return inputs.tree.unflatten(after.out), history.next_state(inner_state, decays)

    def update(updates, state, params=None, *, token_ids=None, **extra_args):
        return step(updates, state, params, token_ids, extra_args, fused=False)

    def fused_update(grads, state, params, *, token_ids=None, **extra_args):
        return step(grads, state, params, token_ids, extra_args, fused=True)

    return FusedTransformation(init, update, fused_update if is_fused(tx) else None)


def _step_inputs(grads: Any, params: Any, state: Any, token_ids: Any, mask: Any) -> StepInputs:
    """The step's arrays, with row gradients in the place of dense ones where `token_ids` says so."""
    pairs, tree = jax.tree_util.tree_flatten_with_path(grads, is_leaf=is_none_or_rows)
    paths, leaves = [path_name(path) for path, _ in pairs], [g for _, g in pairs]
    known = {path: g.shape[0] for path, g in zip(paths, leaves) if len(getattr(g, "shape", ())) == 2}
    if token_ids is not None:
        dense = [path in known and not is_sparse_rows(g) for path, g in zip(paths, leaves)]
        chosen = are_tables(mask, tree.unflatten(leaves), paths, leaves)
        tables = {path: known[path] for path, ours, d in zip(paths, chosen, dense) if ours and d}
        unneeded = not tables and any(map(is_sparse_rows, leaves))  # row gradients know their rows
        found = {} if unneeded else row_numbers_by_path(token_ids, tables, known)
        for i, path in enumerate(paths):
            if path in found and dense[i]:
                indices = distinct(found[path], known[path])
                leaves[i] = SparseRows(indices, take_rows(jnp.asarray(leaves[i]), indices), known[path])
    if not any(map(is_sparse_rows, leaves)):
        raise ValueError(
            "`row_sparse` got no row gradients. Take them from fse.row_value_and_grad, or give the ids that were "
            "looked up: tx.update(grads, state, params, token_ids=ids). (optax.MultiSteps around `row_sparse` makes "
            "row gradients dense: use fse.sum_microbatches in its place.)"
        )
    inputs = StepInputs.of(tree, paths, leaves, params, state)
    if params is not None:
        for path, g, p in zip(paths, leaves, inputs.params or ()):
            if is_sparse_rows(g) and getattr(p, "shape", None) != g.shape:
                raise ValueError(
                    f"The row gradient of {path!r} is of a table of shape {g.shape}, but it has {p.shape}."
                )
    return inputs
