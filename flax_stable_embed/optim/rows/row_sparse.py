r"""Runs any optimizer that treats rows one by one on the touched rows of embedding tables only.

    m_i, p_i <- step(g_i, m_i, p_i)    for the rows i of the gradient;    all other rows stay as they are

The touched rows of parameters and moments are gathered. The optimizer makes its step on them as on any array. The
results are written back, in place if the arrays are donated. So every optimizer keeps its own formula.
"""

from functools import partial
from typing import Any, Literal, get_args

import jax
import jax.numpy as jnp
import optax

from ...ops.embedding.rows import SparseRows, distinct, is_none_or_rows, is_sparse_rows, take_rows
from ..arguments import check_transform
from ..fused_update import FusedTransformation, is_fused, takes_split_parameters
from ..trees import Mask, Params, Updates, path_name
from .catch_up import RowHistory, RowSparseState, initial_state, measure_decays
from .row_step import RowStep, StepInputs, step_on_rows
from .row_step_check import ACCUMULATES, check_once
from .tables import are_tables, row_numbers_by_path

Semantics = Literal["lazy", "catch_up"]


def row_sparse(
    tx: optax.GradientTransformation, semantics: Semantics = "lazy", *, mask: Mask = None
) -> FusedTransformation:
    r"""Wraps `tx` so that it updates only the embedding rows that a batch touched, and only their moments.

    $$m_i, \theta_i \leftarrow \mathrm{tx}(g_i, m_i, \theta_i) \ \text{for the rows } i \text{ of the gradient}$$

    The cost of a step grows with the number of touched rows and not with the size of the table. The rows are those of
    the row gradients from `fse.row_value_and_grad`. With dense gradients (`jax.grad`), the rows are those of
    `token_ids`, an argument of `update`. The update of a table is a `fse.SparseRows`. `optax.apply_updates`,
    `TrainState` and `nnx.Optimizer` can add it to the table. Under `jit`, donate parameters and state; their rows are
    then written in place.

    `tx` may be any optimizer that treats the rows of a table one by one: sgd (also with momentum), adagrad, adam,
    adamw, rmsprop, lion and most others of optax and of this library. Other parameters may have 8-bit moments, but
    tables keep fp32 moments. `tx` sees small arrays in the places of tables, and all its options work as usual. The
    first step checks with random numbers that `tx` treats rows one by one. It cannot check this if hyperparameters are
    traced, as those of `optax.inject_hyperparams` under `jit`.

    A row that was not touched for k steps is treated as `semantics` says:

    - "lazy": the k steps are skipped, as in torch.optim.SparseAdam and TensorFlow's LazyAdam. Moments do not decay in
      these steps. Bias correction uses the count of all steps, as it does there.
    - "catch_up": before its next step, the row gets the decay that k steps with a zero gradient would have caused:

      $$m_i \leftarrow c^k m_i, \qquad \theta_i \leftarrow \theta_i \prod_s (1 - \alpha_s \lambda)$$

      Here c is the decay rate of each moment (b1, b2, or 1 for the sum of Adagrad). The product is over the skipped
      steps, and their learning rates may follow a schedule. Both are measured on `tx` itself, by its step on rows of
      ones. For the same gradients, moments and decoupled weight decay then equal those of the dense optimizer. So do
      the parameters for optimizers without momentum (SGD, RMSprop, Adagrad). The state holds three more int32 numbers
      per row.

    Limits of "catch_up": it does not add the movement that momentum would have caused in the skipped steps, and the
    forward pass that looks a row up still sees the value without the missing decay. Rows that are never looked up again
    keep their old values. To bring a table up to date, make a last step with gradients of zero and
    `token_ids=jnp.arange(num_embeddings)`. Decay rates must be constant, and no step may decay a parameter to zero or
    below.

    Limits of `row_sparse`:

    - It does not clip by a norm over all gradients. Do that before it:
      `optax.chain(fse.clip_by_global_norm(1.0), fse.row_sparse(tx))`.
    - It does not add up gradients over steps, because each step has other rows. `optax.MultiSteps` is refused inside,
      and around `row_sparse` it cannot add row gradients. Use `fse.sum_microbatches`.
    - Functions of parameters in `tx`, such as a mask, see the shapes of the rows. (`fse.where` sees the shapes of the
      tables.) Around `row_sparse`, the masks of `optax.masked` and the labels of `optax.partition` must be trees, or
      functions that treat a `fse.SparseRows` as a leaf.

    Args:
        tx: The optimizer.
        semantics: "lazy" or "catch_up": how steps that did not touch a row are treated.
        mask: Pytree of booleans with the structure of the parameters (or a prefix of it), or a function that takes the
            parameters (in `update`, their gradients) and returns one. It is True for the embedding tables. By default,
            tables are two-dimensional parameters with the name of an embedding, as in the default rules of `adamw8bit`.
            The mask is used by "catch_up", which stores numbers for each row, and to find the table if `token_ids` is
            one array.

    Returns:
        An optax transform with `update(grads, state, params, token_ids=None)`. `token_ids` is needed for dense
        gradients and holds the ids that were looked up: an array if there is one table, else a dict from paths of
        tables to arrays or lists of arrays. Negative ids count from the end, and ids outside the table are ignored.
        After a lookup with `mode="clip"`, pass clipped ids. A row whose id is missing is not updated.
        `fse.fused_update` takes the transform if it takes `tx`.

    Raises:
        TypeError: `tx` is not an optax transform, sums gradients over steps, does not treat rows one by one, or has
            8-bit moments for a table. In `update`: the state was made with other semantics.
        ValueError: `semantics` is unknown. In `update`: there are neither row gradients nor `token_ids`. With
            "catch_up": `params` is None, a table is missing in `mask` or has no gradient, or the moments or weights of
            `tx` do not decay by factors.
        NotImplementedError: In `update`: the moments of a table are in host memory.

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
                f"`state` is a {type(state).__name__}, which was not made with {semantics=}. Give row_sparse the "
                "`semantics` that the state was made with."
            )
        inner_state = state.inner_state if catches_up else state
        inputs = _step_inputs(grads, params, inner_state, token_ids, mask)
        tables = {i: g for i, g in enumerate(inputs.grads) if is_sparse_rows(g)}
        if catches_up and params is None:
            raise ValueError(
                "`params` is None, but semantics='catch_up' needs the parameters. Call `update(grads, state, params)`."
            )
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

    fused = fused_update if is_fused(tx) else None
    return FusedTransformation(init, update, fused, takes_split=takes_split_parameters(tx))


def _step_inputs(grads: Updates, params: Params, state: Any, token_ids: Any, mask: Mask) -> StepInputs:
    """Returns the arrays of the step, in which `token_ids` has turned dense gradients of tables into row gradients."""
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
            "`grads` holds no row gradients. Compute them with fse.row_value_and_grad, or pass the ids that were "
            "looked up, tx.update(grads, state, params, token_ids=ids). Around row_sparse, optax.MultiSteps makes row "
            "gradients dense; use fse.sum_microbatches in its place."
        )
    inputs = StepInputs.of(tree, paths, leaves, params, state)
    if params is not None:
        for path, g, p in zip(paths, leaves, inputs.params or ()):
            if is_sparse_rows(g) and getattr(p, "shape", None) != g.shape:
                raise ValueError(
                    f"The row gradient of {path!r} is for a table of shape {g.shape}, but the parameter has shape "
                    f"{getattr(p, 'shape', None)}. Pass the parameters that the gradients were computed from."
                )
    return inputs
