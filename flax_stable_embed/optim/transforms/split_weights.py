r"""Trains bfloat16 parameters as float32 ones. The state holds the bits that bfloat16 lacks.

    w = join(p, r);   w <- w + tx(g, w);   (p, r) <- split(w)

`p` is the parameter of the model, in bfloat16. The remainder `r` has 8 or 16 bits. `ops/split_weights.py` defines both
functions. An optimizer of this library does all of it in one pass, in its kernels.
"""

import zlib
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import Array
from jax.tree_util import tree_flatten_with_path

from ...ops.counter_random import rounding_key
from ...ops.embedding.rows import is_sparse_rows, take_rows
from ...ops.sharding import placed_like
from ...ops.split_weights import REMAINDERS, join_weight, split_weight
from ..arguments import check_fields, check_transform, kind_of
from ..boxes import rebox, unbox
from ..derivatives import straight_through
from ..engine.records import RECORDS, Record, Remainder, Split, trace_init
from ..fused_update import FusedTransformation, fused_update, takes_split_parameters
from ..placement import device_of
from ..split_parameter import SplitParameter, joined
from ..storage.defaults import default_bits
from ..storage.format_code import is_right
from ..storage.moments import in_memory, memory_of, no_scales
from ..storage.rules import is_pair, matches_pattern, pattern_of
from ..trees import Params, check_paths, is_array, is_hole, is_hole_or_box, is_none, path_name


class SplitWeightsState(NamedTuple):
    """State of `split_weights`."""

    count: Array  # shape=(), dtype=int32: number of steps
    remainder: Any  # int8 or int16 of the parameters' shapes; int8 [1] * ndim where a parameter is not split
    inner_state: Any
    format: Array  # uint8: which parameters have how many bits


def split_weights(tx: optax.GradientTransformation, bits: int = 24, rules: Any = ()) -> FusedTransformation:
    r"""Wraps an optimizer so that bfloat16 parameters are trained as float32 ones. The rest of each is in the state.

    $$w = \mathrm{join}(\theta, r), \quad w \leftarrow w + \mathrm{tx}(g, w), \quad
    (\theta, r) \leftarrow \mathrm{split}(w)$$

    The parameters are those of the model, in bfloat16, so nothing in the model changes. `tx` sees float32 parameters
    and float32 gradients, and its state is that of float32 parameters. A remainder of 1 byte (`bits=24`) or 2 bytes
    (`bits=32`) for each parameter is stored in the state. It is sharded like the parameter. With `adamw8bit`,
    parameter, gradient, moments and remainder take 7.06 bytes, and 16 with float32 `optax.adamw`.

    - `bits=32`: training is that of float32 parameters, bit for bit. (XLA may contract a product and a sum in one
      program and not in another, so last bits may differ between programs. With `update`, a weight that an update
      cancels nearly to zero is off by half an ulp of the weight before.)
    - `bits=24`: a weight has 15 bits of mantissa instead of 23. It is rounded by dither, so that on average no update
      is lost, however small. Vectors and parameters that the default rules of `adamw8bit` take for a norm or a bias
      have 32 bits, because they can be near 1 and take no memory.

    Other parameters than bfloat16 are left alone. float16 is refused.

    The returned updates are for `optax.apply_updates`, which turns them into exactly the new parameters. So this
    wrapper must be outermost: nothing may change the updates after it. Clipping goes inside, `fse.chain(clip, tx)`, or
    before it. `optax.MultiSteps` and `optax.apply_if_finite` go around it if the gradients are float32, because they
    replace updates by zeros like the gradients, and updates are float32. A wrapper around it that drops updates but
    keeps the state leaves a weight off by at most one ulp of bfloat16. If you set
    a parameter from outside, its remainder stays. It is at most half an ulp of bfloat16, and a zero stays zero.

    Derivatives of a step are those of float32 parameters.

    Args:
        tx: Any optax transform whose updates are added to the parameters.
        bits: 24 or 32: the bits of a parameter and its remainder.
        rules: Pairs `(pattern, 24 or 32)`. A pattern is a regular expression that is searched in the path of the
            parameter, or `fse.where`. The first one that matches decides.

    Returns:
        An optax transform. `fse.fused_update` and `fse.in_place` take it for any `tx`. One of this library reads and
        writes every array once.

    Raises:
        TypeError: `tx` is not an optax transform, or `rules` are not pairs. In `init`: a parameter is float16.
        ValueError: `bits` is neither 24 nor 32. In `update`: `params` is None, or the state has other bits.

    >>> import jax.numpy as jnp, optax, flax_stable_embed as fse
    >>> tx = fse.split_weights(fse.adamw8bit(1e-5, weight_decay=0.0))
    >>> params = {"kernel": jnp.ones((64, 64), jnp.bfloat16)}
    >>> state = tx.init(params)
    >>> for _ in range(2):
    ...     updates, state = tx.update(params, state, params)
    ...     params = optax.apply_updates(params, updates)
    >>> params["kernel"][0, 0].item()  # its last bit is 0.004
    1.0
    >>> weights = fse.master_weights(tx, params, state)
    >>> round(float(1 - weights["kernel"].mean()), 6)
    2e-05
    """
    check_transform(tx)
    if not isinstance(bits, int) or bits not in REMAINDERS:
        raise ValueError(f"`bits` must be 24 or 32, got {bits!r}.")
    chosen = _Bits(bits, _checked_rules(rules))
    inner = optax.with_extra_args_support(tx)

    def init(params):
        records = RECORDS.get()
        own: list[Record] = []
        token = RECORDS.set(own)
        try:
            inner_state = inner.init(jax.tree.map(_as_float32, params))
        finally:
            RECORDS.reset(token)
        kinds = {path: plan.memory_kind for record in own for path, plan in record.plans.items()}
        pairs, tree = tree_flatten_with_path(params, is_leaf=is_hole_or_box)
        found = {path_name(path): chosen.of(path_name(path), unbox(x)) for path, x in pairs}
        remainder = [_zeros(x, found[path_name(path)], kinds.get(path_name(path))) for path, x in pairs]
        vector = jnp.array(chosen.code(found), device=device_of(params))
        if records is not None:
            kept = {
                path_name(path): Remainder(of, int(np.prod(unbox(x).shape)) * REMAINDERS[of].itemsize)
                for path, x in pairs
                if (of := found[path_name(path)]) is not None
            }
            records += [*own, Record(vector, [], {}, {}, [], split=Split(kept, chosen.code(found)))]
        return SplitWeightsState(jnp.zeros([], jnp.int32), tree.unflatten(remainder), inner_state, vector)

    def step(grads, state, params, extra_args, *, fused):
        """Runs a step: parameters before it and after it, what `tx` returned for each, and the next state."""
        leaves = _Leaves.of(chosen, state, params)
        count = jnp.asarray(optax.safe_increment(state.count))
        before = leaves.parameters(count)
        takes_split = takes_split_parameters(tx)
        given = before if takes_split else [joined(p) for p in before]
        run = partial(fused_update, tx) if fused and takes_split else inner.update
        if not takes_split:
            grads = jax.tree.map(_as_float32, grads)
        out, inner_state = run(grads, state.inner_state, leaves.tree.unflatten(given), **extra_args)
        outs = leaves.tree.flatten_up_to(out)
        after = [_stepped(old, base, x, is_new=fused and takes_split) for old, base, x in zip(before, given, outs)]
        remainder = leaves.remainders(state.remainder, after)
        state = state._replace(count=count, remainder=remainder, inner_state=inner_state)
        return leaves.tree, before, after, outs, state

    def update(updates, state, params=None, **extra_args):
        tree, before, after, outs, state = step(updates, state, params, extra_args, fused=False)
        changes = [
            _change(old, new, x) if isinstance(old, SplitParameter) else x for old, new, x in zip(before, after, outs)
        ]
        return tree.unflatten(changes), state

    def fused(grads, state, params, **extra_args):
        tree, _, after, _, state = step(grads, state, params, extra_args, fused=True)
        return tree.unflatten(p.p if isinstance(p, SplitParameter) else p for p in after), state

    return FusedTransformation(init, update, fused)


def master_weights(tx: optax.GradientTransformation, params: Params, state: Any) -> Any:
    """Returns the float32 parameters that `split_weights` trains: for evaluation, averages or export.

    Args:
        tx: The transform that made the state: `split_weights`, also inside of `fse.in_place` or wrappers of optax.
        params: The parameters.
        state: Its state.

    Returns:
        A pytree like the parameters. Split ones are float32, and the others are as they are.

    Raises:
        TypeError: There is no `split_weights` in `tx`.
        ValueError: `state` was not made by `tx` for these parameters.

    >>> import jax.numpy as jnp, flax_stable_embed as fse
    >>> tx, params = fse.split_weights(fse.adamw8bit(1e-3)), {"kernel": jnp.ones((64, 64), jnp.bfloat16)}
    >>> str(fse.master_weights(tx, params, tx.init(params))["kernel"].dtype)
    'float32'
    """
    bits = _bits_of(tx, params)
    stored = {}
    for own in jax.tree.leaves(state, is_leaf=is_split_state):
        if is_split_state(own):
            stored |= {path_name(path): r for path, r in tree_flatten_with_path(own.remainder)[0]}

    check_paths([path_name(path) for path, _ in tree_flatten_with_path(params)[0]])

    def joined_leaf(path, p):
        name = path_name(path)
        if name not in bits:
            return p
        _check_remainder(name, p, stored.get(name), bits[name])
        return join_weight(jnp.asarray(p), in_memory(stored[name], "device"))

    return jax.tree_util.tree_map_with_path(joined_leaf, params)


def from_master_weights(tx: optax.GradientTransformation, params: Params, state: Any = None) -> tuple[Any, Any]:
    """Splits float32 parameters, from a float32 checkpoint or to continue a float32 run.

    Args:
        tx: The transform that the run continues with: `split_weights`, also inside of `fse.in_place` or wrappers of
            optax.
        params: The float32 parameters. Each becomes a bfloat16 and a remainder. With 24 bits it is rounded to nearest.
            Parameters of other dtypes stay as they are.
        state: The state of the optimizer inside `split_weights` for these parameters, to continue a run. By default a
            new one.

    Returns:
        The parameters in bfloat16, and the state of `tx`.

    Raises:
        TypeError: There is no `split_weights` in `tx`.
        ValueError: `state` is not that of the one optimizer inside `split_weights`, or two parameters have one path.

    >>> import jax.numpy as jnp, flax_stable_embed as fse
    >>> tx = fse.split_weights(fse.adamw8bit(1e-3), bits=32)
    >>> params, state = fse.from_master_weights(tx, {"kernel": jnp.full((64, 64), 0.1)})
    >>> str(params["kernel"].dtype), fse.master_weights(tx, params, state)["kernel"][0, 0] == jnp.float32(0.1)
    ('bfloat16', Array(True, dtype=bool))
    """

    def is_float32(p):
        return getattr(p, "dtype", None) == jnp.float32

    bits = _bits_of(
        tx, jax.tree.map(lambda p: jax.ShapeDtypeStruct(p.shape, jnp.bfloat16) if is_float32(p) else p, params)
    )
    pairs, tree = tree_flatten_with_path(params)
    names = [path_name(path) for path, _ in pairs]
    check_paths(names)
    halves = {
        name: split_weight(jnp.asarray(p), bits[name])
        for name, (_, p) in zip(names, pairs)
        if is_float32(p) and name in bits
    }
    new = tree.unflatten(halves[name][0] if name in halves else p for name, (_, p) in zip(names, pairs))

    def with_remainders(own):
        if not is_split_state(own):
            return own

        def of(path, zeros):
            name = path_name(path)
            return in_memory(placed_like(halves[name][1], zeros), memory_of(zeros)) if name in halves else zeros

        own = own._replace(remainder=jax.tree_util.tree_map_with_path(of, own.remainder))
        return own if state is None else own._replace(inner_state=state)

    first = tx.init(new)
    if state is not None:
        inside = [own.inner_state for own in jax.tree.leaves(first, is_leaf=is_split_state) if is_split_state(own)]
        if len(inside) != 1 or jax.tree.structure(inside[0]) != jax.tree.structure(state):
            raise ValueError(
                f"`state` must be the state of the one optimizer inside split_weights, got {kind_of(state)}, and `tx` "
                f"has {len(inside)} split_weights. Start without a state, or give the part of it that belongs to that "
                "optimizer."
            )
    return new, jax.tree.map(with_remainders, first, is_leaf=is_split_state)


def is_split_state(x: Any) -> bool:
    """Returns whether `x` is the state of `split_weights`."""
    return isinstance(x, SplitWeightsState)


def _bits_of(tx: Any, params: Params) -> dict[str, int]:
    """Returns the bits of every parameter that `tx` splits, by path."""
    splits = [record.split for _, record in trace_init(tx, params)[1] if record.split]
    found = {path: remainder.bits for split in splits for path, remainder in split.remainders.items()}
    if not found and any(getattr(unbox(p), "dtype", None) == jnp.bfloat16 for p in jax.tree.leaves(params)):
        raise TypeError("`tx` must be a transform with fse.split_weights in it, but it splits no parameter.")
    return found


def _check_remainder(path: str, p: Any, r: Any, bits: int) -> None:
    """Raises unless `r` is the remainder of a parameter in this many bits."""
    wanted, found = (p.shape, REMAINDERS[bits]), (getattr(r, "shape", None), getattr(r, "dtype", None))
    if wanted != found:
        raise ValueError(
            f"The remainder of parameter {path!r} is {found[1]} of shape {found[0]}, and {bits} bits need {wanted[1]} "
            f"of shape {wanted[0]}. Restore the state with the bits that made it, and then convert it: "
            "fse.convert_state."
        )


class _Bits(NamedTuple):
    """Which parameters are split, and into how many bits."""

    default: int
    rules: list[tuple[Any, int]]

    def of(self, path: str, p: Any) -> int | None:
        """Returns the bits of a parameter; None if it is not split.

        Raises:
            TypeError: It is float16.
        """
        dtype = getattr(p, "dtype", None)
        if dtype == jnp.float16:
            raise TypeError(
                f"Parameter {path!r} is float16, and split_weights takes bfloat16, whose exponents are those of "
                "float32. Store it in bfloat16, or use fse.stochastic_round_updates."
            )
        if dtype != jnp.bfloat16:
            return None
        found = next((bits for pattern, bits in self.rules if matches_pattern(pattern, path, p.shape)), None)
        if found is not None:
            return found
        small = len(p.shape) < 2 or default_bits(path)[1] == "norm or bias"
        return 32 if small else self.default

    def code(self, found: dict[str, int | None]) -> np.ndarray:
        """Writes the bits of all parameters into a vector whose length, too, depends on them.

        Orbax casts int16 to int8 without asking, and refuses vectors of other lengths.
        """
        text = "; ".join(f"{path} {bits}" for path, bits in sorted(found.items()) if bits is not None)
        checksum = max(1, zlib.crc32(text.encode()))
        vector = np.zeros(12 + 2 * (checksum % 250) + (self.default == 32), np.uint8)
        vector[:2] = 1, self.default
        vector[8:12] = list(checksum.to_bytes(4, "little"))
        return vector


def _checked_rules(rules: Any) -> list[tuple[Any, int]]:
    if not isinstance(rules, tuple | list) or not all(map(is_pair, rules)):
        raise TypeError(f"`rules` must be a tuple of pairs such as (('norm', 32),), got {rules!r}.")
    for pattern, bits in rules:
        if bits not in REMAINDERS:
            raise ValueError(f"`rules` of split_weights give 24 or 32 for each pattern, got {bits!r} for {pattern!r}.")
    return [(pattern_of(pattern), bits) for pattern, bits in rules]


class _Leaves(NamedTuple):
    """The parameters of a step, flat, with their remainders."""

    tree: Any
    paths: list[str]
    params: list[Any]
    remainder: list[Any]
    bits: list[int | None]

    @classmethod
    def of(cls, chosen: _Bits, state: Any, params: Params) -> "_Leaves":
        """Pairs parameters and remainders.

        Raises:
            TypeError: `state` is no state of `split_weights`.
            ValueError: There are no parameters, or the state has other bits or is of other parameters.
        """
        if params is None:
            raise ValueError(
                "`params` is None, but split_weights joins them with their remainders. Call `update(grads, state, "
                "params)`."
            )
        if not isinstance(state, SplitWeightsState):
            raise TypeError(
                f"`state` must be a SplitWeightsState, as `init` makes it, got {kind_of(state)}. The order is "
                "update(grads, state, params); fse.from_master_weights continues a float32 run."
            )
        check_fields(state, "count", "format")
        pairs, tree = tree_flatten_with_path(params, is_leaf=is_none)
        paths, leaves = [path_name(path) for path, _ in pairs], [x for _, x in pairs]
        remainder = jax.tree.leaves(state.remainder, is_leaf=is_none)
        if len(remainder) != len(leaves):
            raise ValueError(
                f"There are {len(leaves)} parameters, and the state has {len(remainder)} remainders: was the state "
                "made by `init` of the same parameters?"
            )
        bits = [chosen.of(path, x) for path, x in zip(paths, leaves)]
        for path, x, r, of in zip(paths, leaves, remainder, bits):
            if of is not None:
                _check_remainder(path, x, r, of)
        if is_right(state.format, chosen.code(dict(zip(paths, bits)))) is False:
            raise ValueError(
                "The state's `format` says that its parameters were split into other bits. Restore the state with the "
                "bits that made it, and then convert it: fse.convert_state."
            )
        return cls(tree, paths, leaves, remainder, bits)

    def parameters(self, count: Array) -> list[Any]:
        """Returns the parameters, split where they are, with the keys of a step."""
        return [
            p if bits is None else SplitParameter(jnp.asarray(p), in_memory(r, "device"), _key(bits, path, count))
            for path, p, r, bits in zip(self.paths, self.params, self.remainder, self.bits)
        ]

    def remainders(self, like: Any, after: list[Any]) -> Any:
        """Returns the next remainders, in the memory of the last ones."""
        new = [
            in_memory(p.remainder, memory_of(r)) if isinstance(p, SplitParameter) else r
            for p, r in zip(after, self.remainder)
        ]
        return jax.tree.structure(like, is_leaf=is_none).unflatten(new)


def _key(bits: int, path: str, count: Array) -> Array | None:
    return rounding_key("dither", f"split_weights/{path}", count) if bits == 24 else None


def _zeros(box: Any, bits: int | None, memory_kind: str | None) -> Any:
    """Makes the remainder of a parameter that is exact, in its wrapper; or a placeholder."""
    x = unbox(box)
    if not is_array(box):
        return box if is_hole(x) else jnp.zeros([], jnp.int8)
    if bits is not None:
        return rebox(box, in_memory(jnp.full_like(x, 0, dtype=REMAINDERS[bits]), memory_kind))
    placeholder = no_scales(box)
    return jax.tree.map(lambda x: x.astype(jnp.int8), placeholder)


def _as_float32(x: Any) -> Any:
    if getattr(x, "dtype", None) != jnp.bfloat16:
        return x
    return x.update(dtype=jnp.float32) if isinstance(x, jax.ShapeDtypeStruct) else jnp.asarray(x).astype(jnp.float32)


def _stepped(old: Any, base: Any, out: Any, *, is_new: bool) -> Any:
    """Returns a parameter after a step. `tx` returned an update, rows of an update, or the new parameter."""
    if isinstance(out, SplitParameter):
        return out
    if out is None:
        return old
    if not isinstance(old, SplitParameter):
        return out if is_new or old is None else _added(base, out)
    if is_sparse_rows(out):
        return old.with_rows(out.indices, old.rows(out.indices) + out.values)
    return old.with_value(out if is_new else joined(base) + out)


def _added(p: Any, update: Any) -> Array:
    """Does what `optax.apply_updates` does."""
    return jnp.asarray(p + update).astype(jnp.asarray(p).dtype)


def _change(old: SplitParameter, new: SplitParameter, out: Any) -> Any:
    """Returns the float32 update that `optax.apply_updates` turns into the new bfloat16 parameter, exactly."""
    if out is None:
        return None
    if is_sparse_rows(out):
        values = _difference(take_rows(old.p, out.indices), take_rows(new.p, out.indices))
        return out.with_values(straight_through(values, out.values))
    return straight_through(_difference(old.p, new.p), joined(new) - joined(old))


def _difference(old: Array, new: Array) -> Array:
    return jnp.where(new == old, -0.0, new.astype(jnp.float32) - old.astype(jnp.float32))
