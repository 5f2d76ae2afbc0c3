"""Checksums of the arrays of a pytree, to find bits that changed on a disk."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax

from ...ops.counter_random import linear_index, mix
from ...ops.sharding import placed_like
from ..trees import dotted
from .named_state import listed


def checksums(tree: Any) -> dict[str, Array]:
    r"""Computes a checksum of every array of a pytree, such as parameters and optimizer state.

    $$c = \sum_i \mathrm{mix}(\mathrm{bits}(x_i) + \mathrm{mix}(i)) \bmod 2^{32}$$

    `i` is the index of an element in the global array, and `mix` is a permutation of the 32-bit integers. So the
    checksum is the same on every mesh, and a single element with other bits always changes it.

    Save it next to the tree. Orbax does not find out if a bit of a file has changed: the restored array has another
    number, without an error.

    Args:
        tree: A pytree of arrays.

    Returns:
        A uint32 scalar for the path of every array, on the devices of the array.

    Raises:
        TypeError: A leaf is not an array of numbers, booleans or random keys.

    >>> import jax.numpy as jnp, flax_stable_embed as fse
    >>> state = {"mu": jnp.arange(6, dtype=jnp.int8).reshape(2, 3)}
    >>> sums = fse.checksums(state)
    >>> fse.verify_checksums(state, sums)
    >>> fse.verify_checksums({"mu": state["mu"].at[1, 2].set(7)}, sums)
    Traceback (most recent call last):
    ValueError: These arrays have other bits than when their checksums were computed: mu. ...
    """
    pairs = jax.tree_util.tree_leaves_with_path(tree)
    return {dotted(path): _checksum(_checked(dotted(path), x)) for path, x in pairs}


def verify_checksums(tree: Any, sums: dict[str, Any]) -> None:
    """Raises if arrays have other bits than when their checksums were computed.

    Args:
        tree: The pytree, for example restored from a checkpoint. It may be on another mesh.
        sums: The result of `checksums` for it, restored from the same checkpoint.

    Raises:
        ValueError: Some arrays have other bits, or the paths of arrays and checksums differ.
        TypeError: A leaf is not an array of numbers, booleans or random keys.

    >>> import jax.numpy as jnp, flax_stable_embed as fse
    >>> state = {"mu": jnp.arange(6, dtype=jnp.int8)}
    >>> fse.verify_checksums(state, fse.checksums(state))
    """
    found = checksums(tree)
    if found.keys() != sums.keys():
        differ = sorted(found.keys() ^ sums.keys())
        raise ValueError(f"The tree and its checksums have other paths: {listed(differ)}.")
    wrong = [path for path, x in found.items() if int(x) != int(sums[path])]
    if wrong:
        raise ValueError(
            f"These arrays have other bits than when their checksums were computed: {listed(wrong)}. Restore an "
            "earlier checkpoint, or a copy of this one."
        )


def _checked(path: str, x: Any) -> Any:
    dtype = getattr(x, "dtype", None)
    if dtype is not None and jnp.issubdtype(dtype, jax.dtypes.prng_key):
        return jax.random.key_data(x)
    if dtype is None or not (jnp.issubdtype(dtype, jnp.number) or dtype == jnp.bool_):
        raise TypeError(f"The leaf {path!r} must be an array, got {x!r:.60}.")
    return x


@jax.jit
def _checksum(x: Array) -> Array:
    x = jnp.asarray(x)
    if jnp.iscomplexobj(x):
        x = jnp.stack([x.real, x.imag], axis=-1)
    words = _words(x)
    at = linear_index(x.shape).reshape(*x.shape, *[1] * (words.ndim - x.ndim))
    if words.ndim > x.ndim:
        at = at * np.uint32(2) + jnp.arange(2, dtype=jnp.uint32).reshape(*[1] * x.ndim, 2)
    return jnp.sum(mix(words + mix(placed_like(at, words))), dtype=jnp.uint32)


def _words(x: Array) -> Array:
    """Returns the bits of every element as uint32; those of 8 bytes as two along a new last axis."""
    if x.dtype == jnp.bool_:
        return x.astype(jnp.uint32)
    if x.dtype.itemsize == 8:
        return lax.bitcast_convert_type(x, jnp.uint32)
    if jnp.issubdtype(x.dtype, jnp.integer):  # also those of less than a byte
        return x.astype(jnp.uint32)
    unsigned = {1: jnp.uint8, 2: jnp.uint16, 4: jnp.uint32}[x.dtype.itemsize]
    return lax.bitcast_convert_type(x, unsigned).astype(jnp.uint32)
