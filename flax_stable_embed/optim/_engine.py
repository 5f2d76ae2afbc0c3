"""The engine of every 8-bit optimizer: parameters in, a tree of codes and scales kept, one step over the tree.

The state is parallel trees with exactly one array per parameter each: for every moment its codes (or fp32 values), of
the parameter's own shape, and its scales, of the parameter's rank. Whether a parameter is in 8 bits is decided once, in
`init`; `update` reads it off the state's dtypes. An optimizer brings a `Method` (its rule and its names), nothing else.
"""

import zlib
from collections.abc import Callable
from contextvars import ContextVar
from dataclasses import dataclass
from math import prod
from typing import Any, NamedTuple
from warnings import warn

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import Array
from jax.core import Tracer
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from ..ops.blockwise.blocks import Blocks
from ..ops.blockwise.codecs import CODECS, mix
from ..ops.blockwise.implementations import Implementation, check_implementation, step_blockwise
from ..ops.blockwise.step import Moment, Operands, Step, apply_rule
from ._boxes import is_box, optim_bits, rebox, rebox_scales, unbox
from ._rules import LIKE_AN_EMBEDDING, Decision, Rules, StateFormat, path_name

_FORMAT_SIZE = 12  # bytes of one StateFormat in the state's `format`


class MomentName(NamedTuple):
    """A moment's field in the state, and whether it can be negative.

    `dynamic_signed` is the sign with the `dynamic` codec, where bitsandbytes decides; `second` moments are those that
    stochastic rounding acts on.
    """

    name: str
    signed: bool
    dynamic_signed: bool
    second: bool = False

    def stored(self, state_format: StateFormat) -> Moment:
        signed = self.dynamic_signed if state_format.codec == "dynamic" else self.signed
        return Moment(signed, state_format.codec, self.second and state_format.rounding == "stochastic")


@dataclass(frozen=True)
class Method:
    """What tells one optimizer from another.

    `rule(g, *moments, **hyper) -> (u, moments)` is a module-level function of arrays in float32; `hyper(count)` gives
    its keyword arguments at step `count`, 1 at the first: Python numbers are static, arrays are traced.
    """

    state: Callable[..., Any]  # a NamedTuple: count, the moments, <moment>_absmax each, format
    rule: Callable
    moments: tuple[MomentName, ...]
    hyper: Callable[[Array], dict[str, Any]]


class Row(NamedTuple):
    """One parameter in the report of `describe`."""

    path: str
    shape: tuple[int, ...]
    bits: int
    block: str
    reason: str
    implementation: str
    bytes: int


# Where `describe` collects rows while it traces an `init`; None at all other times.
REPORT: ContextVar[list[Row] | None] = ContextVar("report", default=None)


class Tail(NamedTuple):
    """What an optimizer does after its method: `u += weight_decay * p` where the mask allows, then `u *= step_size`."""

    step_size: Any = None
    weight_decay: Any = None
    mask: Any = None  # a pytree of booleans, or a prefix of one; None allows all


class Engine:
    """`init`, `update` and `fused_update` of a method over a tree of parameters."""

    def __init__(
        self,
        method: Method,
        rules: Any,
        state_format: StateFormat,
        implementation: Implementation | None,
        skip_nonfinite: bool,
    ):
        check_implementation(implementation)
        self.method, self.skip_nonfinite = method, skip_nonfinite
        self.implementation: Implementation | None = implementation
        self.rules = Rules(rules, state_format)

    # --- init --------------------------------------------------------------------------------------------------------

    def init(self, params: Any) -> Any:
        """A state of zeros. Reads shapes, dtypes, paths and metadata, never values."""
        leaves, tree = jax.tree_util.tree_flatten_with_path(params, is_leaf=is_box)
        leaves = [(path_name(path), _with_shape(box)) for path, box in leaves]
        decisions = [
            self.rules.decide(path, unbox(box).shape, unbox(box).dtype, optim_bits(box)) if _is_array(box) else None
            for path, box in leaves
        ]
        self._check_rules(params, leaves, decisions)
        self._report(leaves, decisions)
        moments, scales = {}, {}
        for moment in self.method.moments:
            pairs = [_zeros(box, moment, d) if d else (box, box) for (_, box), d in zip(leaves, decisions)]
            moments[moment.name] = tree.unflatten([value for value, _ in pairs])
            scales[f"{moment.name}_absmax"] = tree.unflatten([absmax for _, absmax in pairs])
        count = jnp.zeros([], jnp.int32)
        return self.method.state(
            count=count, **moments, **scales, format=jnp.asarray(_format_bytes(self.rules.formats))
        )

    def _check_rules(self, params, leaves, decisions):
        hidden = any(isinstance(x, optax.MaskedNode) for x in jax.tree.leaves(params, is_leaf=_is_masked_node))
        named = [(path, unbox(box).shape) for (path, box), d in zip(leaves, decisions) if d]
        if not named or hidden or any(not _is_array(box) for _, box in leaves):
            return  # a placeholder, or parameters that a mask hides: a rule may match elsewhere
        if unmatched := self.rules.unmatched(named):
            paths = ", ".join(path for path, _ in named[:8]) + (", ..." if len(named) > 8 else "")
            raise ValueError(
                f"`rules` has patterns that match no parameter: {', '.join(unmatched)}. The parameters are: {paths}. "
                "Correct the pattern, or drop it."
            )
        if not any(d.reason == "embedding" for d in decisions):
            suspects = [
                p
                for (p, _), d in zip(leaves, decisions)
                if d.bits == 8 and d.reason == "default" and LIKE_AN_EMBEDDING.search(p)
            ]
            if suspects:
                warn(
                    "No parameter is named like an embedding, yet these might be one and get 8-bit moments: "
                    f"{', '.join(suspects)}. To keep them in fp32, or to confirm: rules=(({suspects[0]!r}, 32 or 8),).",
                    stacklevel=4,
                )

    def _report(self, leaves, decisions):
        if (rows := REPORT.get()) is None:
            return
        for (path, box), d in zip(leaves, decisions):
            if d is None:
                continue
            shape, n = unbox(box).shape, len(self.method.moments)
            if d.blocks is None:
                size = n * prod(shape) * _wide_dtype(unbox(box).dtype).itemsize + n * 4
                rows.append(Row(path, shape, 32, "", d.reason, "optax's formula", size))
            else:
                size = n * (prod(shape) + 4 * prod(d.blocks.absmax_shape(shape)))
                block = f"{d.blocks.size} on axis {d.blocks.axis}, {d.format.codec}"
                rows.append(Row(path, shape, 8, block, d.reason, self.implementation or "xla", size))

    # --- one step ----------------------------------------------------------------------------------------------------

    def step(self, grads: Any, state: Any, params: Any, *, fused: bool = False, tail: Tail = Tail()) -> tuple[Any, Any]:
        """Updates (or, fused, the new parameters) and the new state."""
        leaves, tree = jax.tree_util.tree_flatten_with_path(grads, is_leaf=_is_none)
        trees = {name: getattr(state, name) for m in self.method.moments for name in (m.name, f"{m.name}_absmax")}
        columns = {name: jax.tree.leaves(x, is_leaf=_is_none) for name, x in trees.items()}
        p_leaves = [None] * len(leaves) if params is None else jax.tree.leaves(params, is_leaf=_is_none)
        if {len(column) for column in (*columns.values(), p_leaves)} != {len(leaves)}:
            raise ValueError(
                f"The gradients have {len(leaves)} leaves, the parameters {len(p_leaves)} and the optimizer state "
                f"{len(columns[self.method.moments[0].name])}: was the state made by `init` of the same parameters?"
            )
        _check_same_paths(leaves, trees[self.method.moments[0].name])
        self._check_format(state.format)
        allowed = _broadcast_mask(tail.mask, grads, len(leaves))
        count = jnp.asarray(optax.safe_increment(state.count))
        hyper = self.method.hyper(count)
        outputs = []
        for i, (path, g) in enumerate(leaves):
            p, stored = p_leaves[i], {name: column[i] for name, column in columns.items()}
            if g is None:
                outputs.append(p if fused else None)
                continue
            own = dict(hyper)
            if tail.weight_decay is not None and allowed[i]:
                own["weight_decay"] = tail.weight_decay
            if tail.step_size is not None:
                own["step_size"] = tail.step_size
            out, stored = self._step_leaf(path_name(path), g, p, stored, own, count, fused)
            outputs.append(out)
            for name, value in stored.items():
                columns[name][i] = value
        new = {name: jax.tree.structure(x, is_leaf=_is_none).unflatten(columns[name]) for name, x in trees.items()}
        return tree.unflatten(outputs), state._replace(count=count, **new)

    def _step_leaf(self, path: str, g, p, stored: dict, hyper: dict, count, fused: bool):
        g, p = jnp.asarray(g), None if p is None else jnp.asarray(p)  # numpy's arrays and Python's numbers too
        names = [m.name for m in self.method.moments]
        # A np.float64 is a float, but one that would widen float32 arrays under x64: made a true one here.
        static = tuple((k, float(v) if isinstance(v, float) else v) for k, v in hyper.items() if _is_static(v))
        traced = {k: v for k, v in hyper.items() if not _is_static(v)}
        step = Step(
            self.method.rule,
            hyper=static,
            fused=fused,
            skip_nonfinite=self.skip_nonfinite,
            dtype=np.dtype(g.dtype if p is None else p.dtype),
        )
        moments = tuple(stored[name] for name in names)
        if not _is_codes(moments[0].dtype):
            out, new = apply_rule(step, g, p, moments, traced)
            new = [after.astype(before.dtype) for after, before in zip(new, moments)]
            return out, stored | dict(zip(names, new))
        state_format, blocks = self.rules.blocks(path, g.shape)
        step = step.with_storage(tuple(m.stored(state_format) for m in self.method.moments), blocks)
        absmax = tuple(stored[f"{name}_absmax"] for name in names)
        self._check_storage(path, g.shape, step, moments, absmax)
        traced = {k: jnp.asarray(v, jnp.float32) for k, v in traced.items()}
        key = mix(jnp.uint32(zlib.crc32(path.encode())) + mix(count.astype(jnp.uint32))) if step.stochastic else None
        operands = Operands(g, p if fused or "weight_decay" in hyper else None, moments, absmax, traced, key)
        out, codes, absmax = step_blockwise(step, operands, self.implementation)
        return out, dict(zip(names, codes)) | {f"{name}_absmax": a for name, a in zip(names, absmax)}

    def _check_format(self, vector):
        """By its length, which names the codecs: their dtypes and shapes can be the same."""
        want = _format_bytes(self.rules.formats).shape
        if vector.shape != want:
            raise ValueError(
                f"The state's `format` has the shape {vector.shape}, but rules and `state_format` ask for {want}: its "
                "codecs are others. Make the optimizer with those that made the state."
            )

    def _check_storage(self, path, shape, step: Step, moments, absmax):
        for m, codes, scales in zip(step.moments, moments, absmax):
            want = m.code.dtype, step.blocks.absmax_shape(shape)
            if (codes.dtype, scales.shape) != want:
                raise ValueError(
                    f"The state of parameter {path!r} has {codes.dtype} codes and scales of shape {scales.shape}, but "
                    f"rules and `state_format` ask for {want[0]} and {want[1]}. Make the optimizer with those that "
                    "made the state; and call it outside of shard_map, whose pieces do not show the global shape."
                )


def _check_same_paths(leaves, moment: Any):
    """Leaves are paired by position: a renamed or swapped parameter must not get another one's moments."""
    stored, _ = jax.tree_util.tree_flatten_with_path(moment, is_leaf=_is_none)
    for (path, _), (other, _) in zip(leaves, stored):
        if path_name(path) != path_name(other):
            raise ValueError(
                f"The gradients have a leaf {path_name(path)!r} where the optimizer state has {path_name(other)!r}: "
                "was the state made by `init` of the same parameters?"
            )


# --- leaves ----------------------------------------------------------------------------------------------------------


def _is_none(x: Any) -> bool:
    return x is None


def _is_static(hyper: Any) -> bool:
    return isinstance(hyper, int | float)


def _is_masked_node(x: Any) -> bool:
    return isinstance(x, optax.MaskedNode)


def _is_array(box: Any) -> bool:
    """Whether there is an array in the wrapper, and not, say, optax's MaskedNode."""
    return hasattr(unbox(box), "shape") and hasattr(unbox(box), "dtype")


def _is_codes(dtype: Any) -> bool:
    return dtype in (jnp.int8, jnp.uint8)


def _with_shape(box: Any) -> Any:
    """Python numbers as shapes; all else as it is."""
    if not isinstance(box, int | float | complex) or _is_array(box):
        return box
    return jax.ShapeDtypeStruct((), jax.typeof(box).dtype)


def _wide_dtype(dtype: Any) -> np.dtype:
    """The dtype of moments that are not in 8 bits: float32, or what is wider; complex as it is."""
    dtype = jax.dtypes.canonicalize_dtype(dtype)
    wide = jnp.issubdtype(dtype, jnp.complexfloating) or dtype == jnp.float64
    return np.dtype(dtype if wide else jnp.float32)


def _zeros(box: Any, moment: MomentName, decision: Decision) -> tuple[Any, Any]:
    """A moment of zeros and its scales, in the parameter's wrapper and on its devices."""
    p = unbox(box)
    if decision.blocks is None:
        values = jnp.zeros_like(p, dtype=_wide_dtype(p.dtype))
        shape = (1,) * len(p.shape)
    else:
        code = moment.stored(decision.format).code
        values = jnp.full_like(p, code.zero, dtype=code.dtype)
        shape = decision.blocks.absmax_shape(p.shape)
    scales = jnp.zeros(shape, jnp.float32, device=_scales_sharding(p, shape, decision.blocks))
    return rebox(box, values), rebox_scales(box, scales, decision.blocks, decision.format.shards)


def _scales_sharding(p: Any, shape: tuple[int, ...], blocks: Blocks | None) -> NamedSharding | None:
    """The sharding of `p`, less what would not divide; None where JAX chooses, as for `jnp.zeros_like`."""
    sharding = jax.typeof(p).sharding if isinstance(p, Tracer) else getattr(p, "sharding", None)
    if not isinstance(sharding, NamedSharding) or sharding.mesh.empty:
        return None
    if isinstance(p, Tracer) and AxisType.Explicit not in sharding.mesh.axis_types:
        return None
    spec = []
    for axis, names in enumerate(sharding.spec):
        ways = prod(sharding.mesh.shape[n] for n in ((names,) if isinstance(names, str) else names or ()))
        spec.append(names if blocks is not None and shape[axis] % ways == 0 else None)
    return NamedSharding(sharding.mesh, PartitionSpec(*spec))


def _broadcast_mask(mask: Any, grads: Any, n: int) -> list[bool]:
    """A tree of booleans, or a prefix of one, as one boolean a leaf; None in both is a leaf too."""
    if mask is None:
        return [True] * n

    def spread(m, part):
        return jax.tree.map(lambda _: bool(m), part, is_leaf=_is_none)

    return jax.tree.leaves(jax.tree.map(spread, mask, grads, is_leaf=_is_none))


def _format_bytes(formats: list[StateFormat]) -> np.ndarray:
    """The formats in use as one small uint8 vector.

    Its length differs for every sequence of codecs, so that a checkpoint of another codec fails on shape (orbax casts
    dtypes without a word): 12 bytes times the sequence read as a number in bijective base 3.
    """
    number, content = 0, []
    for f in formats:
        codec = list(CODECS).index(f.codec) + 1
        number = 3 * number + codec
        numbers = (f.block_size or 0, f.shards, f.min_size)
        axis = 255 if f.block_axis is None else f.block_axis % 254
        content += [codec, int(f.rounding == "stochastic"), axis]
        content += [byte for x in numbers for byte in min(x, 2**24 - 1).to_bytes(3, "little")]
    vector = np.zeros(_FORMAT_SIZE * number, np.uint8)
    vector[: len(content)] = content
    return vector
