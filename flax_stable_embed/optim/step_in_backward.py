"""Updates the layers of a model inside the backward pass, so that their gradients never exist all at once."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from ..ops.jax_compat import get_opaque_trace_state
from .arguments import check_transform
from .fused_update import fused_update, is_fused
from .trees import path_name


def step_in_backward(loss_fn: Callable, tx: optax.GradientTransformation, *, has_aux: bool = False) -> Callable:
    r"""Computes a loss and its gradients, and updates stacked layers inside the backward pass (gradient release).

    $$dx_{i-1},\ g_i = \mathrm{vjp}(f;\ \theta_i, x_{i-1})(dx_i), \qquad
    (\theta_i, s_i) \leftarrow \mathrm{step}(g_i, s_i, \theta_i), \qquad i = n, \dots, 1$$

    The gradient of a `jax.lax.scan` over layers is an array like all of its parameters. It exists until the optimizer
    steps. Here each layer is updated as soon as its gradient is known, so that there is never more than the gradient of
    one layer. Parameters and state are updated in place (`jax.new_ref`).

    The layers are applied as `jax.lax.scan(jax.checkpoint(layer))` does it: the inputs of the layers are kept, and
    the backward pass runs each layer again.

    A step sees the gradient of one layer. So nothing that needs all gradients can come before it: no clipping by the
    norm of the entire model (`fse.chain(clip, tx)` clips by the norm of the layer), no sum over microbatches, and no
    `jax.lax.psum` by hand. Under `jit`, XLA sums over sharded batches.

    Args:
        loss_fn: Function `loss_fn(params, layers, *args) -> loss`. It must call `layers(layer, x, *inputs)` once, and
            not inside of a transformation (`jit`, `scan`, `cond`, `vmap`, `checkpoint`, `grad`). That returns `x` after
            all layers: `x = layer(layer_params, x, *inputs)` for each.
        tx: The optimizer of the layers: any optax transform that needs no extra arguments. One of this library makes
            its step in one pass.
        has_aux: Whether `loss_fn` returns a pair `(loss, aux)`.

    Returns:
        A function `(params, layers, state, *args) -> loss, grads, layers, state`. `layers` are the stacked parameters
        of the layers, with an axis more in front, and `state` begins as `jax.vmap(tx.init)(layers)`. `grads` are those
        of `params`, all other parameters, which are for an optimizer of their own. With `has_aux`, the first result is
        `(loss, aux)`. Other functions of this library take one layer, so use `jax.vmap` for the states of all:
        `jax.vmap(partial(fse.master_weights, tx))(layers, state)`.

    Raises:
        TypeError: `tx` is not an optax transform, or a parameter of the layers is not floating.
        ValueError: `loss_fn` does not call `layers` exactly once, or inside of a transformation, or the loss does not
            depend on its result; the layers or the states have no common first axis.

    >>> import jax, jax.numpy as jnp, flax_stable_embed as fse
    >>> tx = fse.adamw8bit(1e-2)
    >>> layers = {"kernel": jnp.full((4, 64, 64), 0.1)}  # four layers
    >>> state = jax.vmap(tx.init)(layers)
    >>> def loss_fn(params, layers, batch):
    ...     x = layers(lambda layer, x: jnp.tanh(x @ layer["kernel"]), batch * params["scale"])
    ...     return jnp.mean(x**2)
    >>> step = jax.jit(fse.experimental.step_in_backward(loss_fn, tx), donate_argnums=(1, 2))
    >>> loss, grads, layers, state = step({"scale": jnp.ones((1, 64))}, layers, state, jnp.ones((8, 64)))
    >>> grads["scale"].shape, layers["kernel"].shape
    ((1, 64), (4, 64, 64))
    """
    check_transform(tx)

    def step(params, layers, state, *args):
        released = _Layers(tx, layers, state)

        def loss_of(params, one):
            released.one, released.trace = one, get_opaque_trace_state(convention="flax_stable_embed")
            try:
                return loss_fn(params, released, *args)
            finally:
                released.one = None

        # `one` is a number that all calls depend on, so that JAX runs their backward pass if nothing else needs it.
        value, (grads, _) = jax.value_and_grad(loss_of, argnums=(0, 1), has_aux=has_aux)(params, jnp.ones([]))
        if not released.stepped:
            raise ValueError(
                "The loss of `loss_fn` does not depend on its layers, so they were not updated. It must call "
                "`layers(layer, x)` and use the result."
            )
        return value, grads, *released.read()

    return step


class _Layers:
    """Stacked layers and their states, in arrays that are changed in place."""

    def __init__(self, tx, params, state):
        leaves = jax.tree.leaves((params, state))
        lengths = {jnp.shape(x)[0] if jnp.ndim(x) else None for x in leaves}
        if len(lengths) != 1 or None in lengths:
            raise ValueError(
                f"`layers` and `state` must be stacked along a first axis of one length, got {_shown(lengths)}. Make "
                "the state with jax.vmap(tx.init)(layers)."
            )
        (self.length,) = lengths
        if self.length == 0:
            raise ValueError("`layers` has no layers: the first axis of its arrays has length 0.")
        for path, x in jax.tree.leaves_with_path(params):
            if not jnp.issubdtype(jnp.asarray(x).dtype, jnp.inexact):
                raise TypeError(
                    f"The parameter {path_name(path)!r} of `layers` is {x.dtype}, and an optimizer needs floating "
                    "ones. Give other arrays to `layers(layer, x, *inputs)`."
                )
        self.tx, self.called, self.stepped, self.one = tx, False, False, None
        self.trace: Any = None
        self.refs = jax.tree.map(lambda x: jax.new_ref(jnp.asarray(x)), (params, state))

    def read(self):
        """Returns the parameters and the state as they are now."""
        return _all_of(self.refs)

    def __call__(self, layer: Callable, x: Any, *inputs: Any) -> Any:
        """Applies all layers to `x`."""
        if self.called:
            raise ValueError("`layers` was called twice. A layer that is used twice has no gradient at its first use.")
        if get_opaque_trace_state(convention="flax_stable_embed") != self.trace:
            raise ValueError(
                "`layers` must be called in `loss_fn` itself. Inside of a jit, scan, cond, vmap, checkpoint or grad it "
                "could run several times, and each run would make a step."
            )
        self.called = True
        tx, length = self.tx, self.length
        first = _at(_all_of(self.refs[0]), 0)
        layer, closed_over = jax.closure_convert(layer, first, x, *inputs)  # arrays that depend on `params`
        inputs = (*inputs, *closed_over)

        @jax.custom_vjp
        def run(refs, one, x, inputs):
            return forward(refs, one, x, inputs)[0]

        def forward(refs, one, x, inputs):
            def body(x, params):
                return layer(params, x, *inputs), x

            after, before = jax.lax.scan(body, x, _all_of(refs[0]))
            return after, (refs, before, inputs)

        def backward(kept, dx):
            refs, before, inputs = kept
            self.stepped = True

            def body(carry, i):
                dx, total, both = carry
                params, state = _at(both, i)
                _, vjp = jax.vjp(lambda p, x, given: layer(p, x, *given), params, _at(before, i), inputs)
                grads, dx, d_inputs = vjp(_with_float0(dx, before, first=1))
                both = jax.tree.map(lambda x, new: x.at[i].set(new), both, _stepped(tx, grads, state, params))
                return (_without_float0(dx), jax.tree.map(jnp.add, total, _without_float0(d_inputs)), both), None

            zeros = [jnp.zeros_like(x) for x in jax.tree.leaves(inputs) if _has_gradient(x)]
            carry = _without_float0(dx), zeros, _all_of(refs)
            (dx, d_inputs, new), _ = jax.lax.scan(body, carry, jnp.arange(length), reverse=True)
            jax.tree.map(_set_all, refs, new)
            return None, jnp.zeros([]), _with_float0(dx, before, first=1), _with_float0(d_inputs, inputs)

        run.defvjp(forward, backward)
        return run(self.refs, self.one, x, inputs)


def _has_gradient(x):
    return jnp.issubdtype(jnp.result_type(x), jnp.inexact)


def _without_float0(cotangents):
    """Returns the cotangents that are arrays. JAX has float0 for those of integers, and no loop can carry them."""
    return [x for x in jax.tree.leaves(cotangents) if x.dtype != jax.dtypes.float0]


def _with_float0(cotangents, like, first=0):
    """Returns the cotangents of the tree `like`, from those that are arrays. Axes before `first` are not of `like`."""
    leaves, tree = jax.tree.flatten(like)
    found = iter(cotangents)
    of_integer = lambda x: np.zeros(np.shape(x)[first:], jax.dtypes.float0)  # noqa: E731
    return tree.unflatten(next(found) if _has_gradient(x) else of_integer(x) for x in leaves)


def _at(tree, i):
    return jax.tree.map(lambda x: x[i], tree)


def _all_of(refs):
    return jax.tree.map(lambda ref: ref[...], refs)


def _set_all(ref, new):
    ref[...] = new


def _stepped(tx, grads, state, params):
    if is_fused(tx):
        return fused_update(tx, grads, state, params)
    updates, state = tx.update(grads, state, params)
    return optax.apply_updates(params, updates), state


def _shown(lengths):
    return ", ".join("no axis" if n is None else f"{n}" for n in lengths) or "no arrays"
