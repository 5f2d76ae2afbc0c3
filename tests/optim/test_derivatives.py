"""Tests that derivatives which JAX would take for zero raise, or are those of the number before it was rounded."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from flax_stable_embed.optim.derivatives import refuse_derivative, straight_through

X = jnp.linspace(-1, 1, 6).reshape(2, 3)

# How a program reaches the function, and how a derivative is taken.
PROGRAMS = {
    "plain": lambda f: f,
    "jit": jax.jit,
    "checkpoint": jax.checkpoint,
    "cond": lambda f: lambda x: jax.lax.cond(x[0, 0] < 0, f, lambda x: x, x),
    "scan": lambda f: lambda x: jax.lax.scan(lambda c, _: (f(c), None), x, None, 2)[0],
    "scan over rows": lambda f: lambda x: jax.lax.map(f, x),
    "vmap": jax.vmap,
}
DERIVATIVES = {
    "grad": lambda f, x: jax.grad(lambda x: jnp.sum(f(x)))(x),
    "jvp": lambda f, x: jax.jvp(f, (x,), (jnp.ones_like(x),))[1],
    "linearize": lambda f, x: jax.linearize(f, x)[1](jnp.ones_like(x)),
    "jacfwd": lambda f, x: jax.jacfwd(f)(x),
}


@pytest.mark.parametrize("program", PROGRAMS)
@pytest.mark.parametrize("derivative", DERIVATIVES)
def test_a_derivative_that_is_refused_raises_in_every_program(program, derivative):
    f = PROGRAMS[program](lambda x: refuse_derivative(2 * x, "No derivative here.") / 2)
    np.testing.assert_array_equal(f(X), X)
    with pytest.raises(TypeError, match="No derivative here"):
        DERIVATIVES[derivative](f, X)
    stopped = DERIVATIVES[derivative](lambda x: f(jax.lax.stop_gradient(x)) * x, X)
    assert np.any(stopped)


def test_integers_have_no_derivative_to_refuse():
    def f(x):
        return x * refuse_derivative(jnp.round(x).astype(jnp.int32), "No derivative here.")

    np.testing.assert_array_equal(jax.grad(lambda x: jnp.sum(f(x)))(X), jnp.round(X))


@pytest.mark.parametrize("program", PROGRAMS)
@pytest.mark.parametrize("derivative", DERIVATIVES)
def test_a_rounded_array_has_the_derivative_of_the_array_before(program, derivative):
    f, unrounded = (PROGRAMS[program](g) for g in (lambda x: straight_through(jnp.round(x**2), x**2), lambda x: x**2))
    if program != "scan":  # there the second step starts from another number
        np.testing.assert_allclose(DERIVATIVES[derivative](f, X), DERIVATIVES[derivative](unrounded, X), rtol=1e-6)
    assert np.any(DERIVATIVES[derivative](f, X))
