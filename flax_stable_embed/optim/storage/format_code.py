"""Writes, reads and checks the field `format` of a state: a short vector that says how the state is stored.

It makes a step fail on a state that was made with other rules or another `state_format`.
"""

import zlib
from collections.abc import Sequence
from dataclasses import fields
from itertools import zip_longest

import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.core import Tracer

from ...ops.blockwise.blocks import Blocks
from ...ops.blockwise.codecs import CODECS
from ..placement import device_of
from ..trees import Params
from .plan import LeafPlan
from .rules import Rules
from .state_format import StateFormat

_FORMAT_SIZE = 12  # bytes of one StateFormat in the state's `format`
_CODECS = list(CODECS)


def check_format(rules: Rules, vector: Array, plans: Sequence[LeafPlan]) -> None:
    """Raises unless a state's `format` names these rules and plans. Dtypes and shapes alone cannot tell."""
    if vector.shape != format_code(rules.formats, plans).shape:
        raise ValueError(
            "The state's `format` says that other rules or another `state_format` made it"
            f"{differs(rules, vector)}. Make the optimizer with those that made the state, or convert the state: "
            "fse.convert_state."
        )


def differs(rules: Rules, vector: Array) -> str:
    """Returns the differences between a state's `format` and the rules, in parentheses; "" if there are none."""
    found = format_difference(vector, rules.formats)
    return f" ({found})" if found else ""


def format_vector(rules: Rules, plans: Sequence[LeafPlan], params: Params) -> Array:
    """Makes the `format` of a state, on the device of its parameters."""
    # Before JAX 0.10, `asarray` ignores the mesh of `jax.set_mesh`.
    return jnp.array(format_code(rules.formats, plans), device=device_of(params))


def format_code(formats: Sequence[StateFormat], plans: Sequence[LeafPlan] = ()) -> np.ndarray:
    """Writes the formats in use into one small uint8 vector, the `format` of a state.

    Its length differs for every sequence of codecs. A checkpoint with another codec then fails on its shape, because
    orbax casts dtypes without asking. The length is 12 bytes times the sequence, read as a number in bijective base 3.
    Sometimes the shapes of codes and scales do not show how every parameter is stored. Then the length is 72 times that
    number plus a checksum which is not a multiple of 12. Two different layouts share a length with probability 1/66.

    Args:
        formats: The optimizer's format, then the formats of the rules in order.
        plans: The plans of the parameters. Those without 8-bit moments do not matter.
    """
    number, content = 0, []
    for f in formats:
        codec = _CODECS.index(f.codec) + 1
        number = 3 * number + codec
        numbers = (f.block_size or 0, f.shards, f.min_size)
        axis = 255 if f.block_axis is None else f.block_axis % 254
        content += [codec, int(f.rounding == "stochastic"), axis]
        content += [byte for x in numbers for byte in min(x, 2**24 - 1).to_bytes(3, "little")]
    ambiguous = [
        f"{x.path} {x.state_format.codec} {x.blocks}" for x in plans if x.blocks and _is_ambiguous(x, x.blocks, formats)
    ]
    length = _FORMAT_SIZE * number
    if ambiguous:
        tens, ones = divmod(zlib.crc32("; ".join(sorted(ambiguous)).encode()) % 66, _FORMAT_SIZE - 1)
        length = _FORMAT_SIZE * (6 * number + tens) + ones + 1
    vector = np.zeros(length, np.uint8)
    vector[: len(content)] = content
    return vector


def _is_ambiguous(plan: LeafPlan, blocks: Blocks, formats: Sequence[StateFormat]) -> bool:
    """Returns whether scales of this shape could belong to other codes, or to moments that are not in 8 bits."""
    one_block = not plan.shape or blocks.size in (1, plan.shape[blocks.axis])
    another_size = not one_block and blocks.size & (blocks.size - 1) != 0  # 384 and 512 both split 768 in two
    no_codes = all(n == 1 for n in blocks.absmax_shape(plan.shape))  # as for a parameter that is not in 8 bits
    return plan.state_format.codec != formats[0].codec or another_size or no_codes


def format_difference(vector: Array, formats: Sequence[StateFormat]) -> str:
    """Describes the differences between a state's `format` and `formats`. For a tracer only codecs are compared."""
    length = vector.shape[0]
    number, codecs = length // _FORMAT_SIZE // (6 if length % _FORMAT_SIZE else 1), []
    while number > 0:
        number, codec = divmod(number - 1, 3)
        codecs.insert(0, _CODECS[codec])
    made, compared = [StateFormat(codec) for codec in codecs], ("codec",)
    if not isinstance(vector, Tracer):
        made, compared = _formats_of(np.asarray(vector), len(codecs)), [f.name for f in fields(StateFormat)]
    found = []
    for i, (a, b) in enumerate(zip_longest(made, formats)):
        name = "`state_format`" if i == 0 else f"the rules' format {i}"
        if a is None or b is None:
            found.append(f"{name} is {'new here' if a is None else 'missing here'}")
            continue
        pairs = {field: (getattr(a, field), getattr(b, field)) for field in compared}
        changes = [f"{field} {x!r}, here {y!r}" for field, (x, y) in pairs.items() if x != y]
        found += [f"{name} had {', and '.join(changes)}"] if changes else []
    return "; ".join(found)


def _formats_of(vector: np.ndarray, n: int) -> list[StateFormat]:
    """Reads the first `n` formats from a vector of `format_code`."""
    formats = []
    for codec, stochastic, axis, *rest in vector[: n * _FORMAT_SIZE].reshape(n, _FORMAT_SIZE).tolist():
        size, shards, min_size = (int.from_bytes(rest[i : i + 3], "little") for i in (0, 3, 6))
        axis = None if axis == 255 else axis - 254 if axis > 127 else axis
        rounding = "stochastic" if stochastic else "nearest"
        formats.append(StateFormat(_CODECS[codec - 1], rounding, size or None, axis, shards, min_size))
    return formats
