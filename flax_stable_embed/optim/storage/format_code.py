"""Writes, reads and checks the field `format` of a state: a short vector that says how the state is stored.

A checksum in it is the identity of the storage. Its length differs too, where it can. A step fails on a state that was
made with other rules or another `state_format`, or that a checkpoint loader has cast, padded or truncated.
"""

import zlib
from collections.abc import Sequence
from itertools import zip_longest
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.core import Tracer

from ...ops.blockwise.blocks import Blocks
from ...ops.blockwise.codecs import CODECS
from ...ops.sharding import placed_like
from ..placement import device_of
from ..trees import Params, is_array
from .plan import LeafPlan
from .rules import Rules
from .state_format import StateFormat

_VERSION = 1  # of the bytes of a state. Another number makes every stored state an error.
_FORMAT_SIZE = 12  # bytes of one StateFormat in the state's `format`
_CHECKSUM = slice(8, 12)  # the bytes of the first StateFormat that are compared; the others are for error messages
_CODECS = list(CODECS)
_COMPARED = ("codec", "block_size", "block_axis", "shards")  # the fields that change how codes are read


class CheckedFormat(NamedTuple):
    """The `format` of a state after its check.

    Attributes:
        right: Whether its values are right; None if that is known, because they are.
        vector: The `format` of the next state.
    """

    right: Array | None
    vector: Array

    def nan_if_wrong(self, x: Any) -> Any:
        """Returns a number or an array, or NaN if the values are wrong."""
        return x if self.right is None else jnp.where(self.right, x, jnp.nan)


def check_format(rules: Rules, vector: Array, plans: Sequence[LeafPlan]) -> CheckedFormat:
    """Checks that a state's `format` names these rules and plans. Dtypes and shapes alone cannot tell.

    Its length is always known. Its values are known outside of `jit`. If all of them are zero, the state was set to
    zero, which is a new state. In a traced program the check is a part of the program.

    Raises:
        ValueError: It is the format of another state, or not a vector of uint8.
    """
    want = format_code(rules.formats, plans)
    right = is_right(vector, want)
    if right is False:
        raise ValueError(
            f"The state's `format` says that other rules or another `state_format` made it{differs(rules, vector)}, or "
            "that a checkpoint loader padded or truncated its arrays. Make the optimizer with those that made the "
            "state, restore the state with it, and then convert the state: fse.convert_state."
        )
    if right is True:
        fresh = not _read(vector)[_CHECKSUM].any()
        return CheckedFormat(None, jax.device_put(want, getattr(vector, "sharding", None)) if fresh else vector)
    return CheckedFormat(right, placed_like(jnp.where(right, want, vector), vector))


def is_right(vector: Any, want: np.ndarray) -> bool | Array:
    """Returns whether a vector says the same as `want`, of `format_code`, or has the checksum zero of a state of zeros.

    The result for a traced vector is traced. Of a `jax.ShapeDtypeStruct` only the length counts.
    """
    _check_vector(vector)
    if vector.shape != want.shape:
        return False
    if isinstance(vector, jax.ShapeDtypeStruct):
        return True
    checksum = int(want[_CHECKSUM].view(np.uint32)[0])
    if isinstance(vector, Tracer):
        # Every element becomes the checksum. The TPU compiler keeps such small vectors in scratch memory. For the
        # scalar of a sum or a bitcast it would reserve main memory, and then also for every other scalar of the step.
        word = vector[_CHECKSUM].astype(jnp.uint32) << np.arange(0, 32, 8, dtype=np.uint32)
        word = word | word[::-1]
        word = word | word.reshape(2, 2)[:, ::-1].reshape(4)
        return ((word == np.uint32(checksum)) | (word == 0))[0]
    return int(_read(vector)[_CHECKSUM].view(np.uint32)[0]) in (checksum, 0)


def _check_vector(vector: Any) -> None:
    """Raises unless `vector` is a vector of bytes. A loader may have cast it, or stacked those of several states."""
    if is_array(vector) and (vector.dtype, vector.ndim) == (np.uint8, 1):
        return
    found = f"{vector.dtype} of shape {vector.shape}" if is_array(vector) else f"{vector!r:.40}"
    raise ValueError(
        f"`format` of the state is {found}, where `init` makes a vector of uint8. Restore the state with the shapes "
        "and dtypes of fse.abstract_state, or of `init`."
    )


def _read(vector: Any) -> np.ndarray:
    """Returns the values of a concrete array, which may be on the devices of several processes."""
    partly = isinstance(vector, jax.Array) and not vector.is_fully_addressable
    return np.asarray(vector.addressable_data(0) if partly else vector)


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

    For each format 12 bytes: the codec, the axis, 3 bytes each for `block_size` and `shards`, and a checksum of the
    version, of the codec and the blocks of every parameter in 8 bits, and of those with "rowwise" moments.

    Its length differs for every sequence of codecs. A checkpoint with another codec then fails on its shape, because
    orbax casts dtypes without asking. The length is 12 bytes times the sequence, read as a number in bijective base 3.
    Sometimes the shapes of codes and scales do not show how every parameter is stored. Then the length is 72 times that
    number plus a checksum which is not a multiple of 12. Two different layouts share a length with probability 1/66.

    Args:
        formats: The optimizer's format, then the formats of the rules in order.
        plans: The plans of the parameters. Those with float32 or bfloat16 moments do not matter.
    """
    in_8_bits = [(x, x.blocks) for x in plans if x.blocks]
    layouts = [_layout(x, blocks) for x, blocks in in_8_bits]
    layouts += [f"{x.path} rowwise" for x in plans if x.bits == "rowwise"]
    checksum = _checksum(layouts).to_bytes(4, "little")
    number, content = 0, []
    for f in formats:
        codec = _CODECS.index(f.codec) + 1
        number = 3 * number + codec
        axis = 255 if f.block_axis is None else f.block_axis % 254
        content += [codec, axis]
        content += [byte for x in (f.block_size or 0, f.shards) for byte in min(x, 2**24 - 1).to_bytes(3, "little")]
        content += checksum
    ambiguous = [_layout(x, blocks) for x, blocks in in_8_bits if _is_ambiguous(x, blocks, formats)]
    length = _FORMAT_SIZE * number
    if ambiguous:
        tens, ones = divmod(_checksum(ambiguous) % 66, _FORMAT_SIZE - 1)
        length = _FORMAT_SIZE * (6 * number + tens) + ones + 1
    vector = np.zeros(length, np.uint8)
    vector[: len(content)] = content
    return vector


def _layout(plan: LeafPlan, blocks: Blocks) -> str:
    return f"{plan.path} {plan.state_format.codec} {blocks.axis} {blocks.size}"


def _checksum(layouts: Sequence[str]) -> int:
    return max(1, zlib.crc32("; ".join([str(_VERSION), *sorted(layouts)]).encode()))  # 0 is the checksum of zeros


def _is_ambiguous(plan: LeafPlan, blocks: Blocks, formats: Sequence[StateFormat]) -> bool:
    """Returns whether scales of this shape could belong to other codes, or to moments that are not in 8 bits."""
    one_block = not plan.shape or blocks.size in (1, plan.shape[blocks.axis])
    another_size = not one_block and blocks.size & (blocks.size - 1) != 0  # 384 and 512 both split 768 in two
    no_codes = all(n == 1 for n in blocks.absmax_shape(plan.shape))  # as for a parameter that is not in 8 bits
    return plan.state_format.codec != formats[0].codec or another_size or no_codes


def format_difference(vector: Array, formats: Sequence[StateFormat]) -> str:
    """Describes the differences between a state's `format` and `formats`. For a tracer only codecs are compared."""
    _check_vector(vector)
    length = vector.shape[0]
    number, codecs = length // _FORMAT_SIZE // (6 if length % _FORMAT_SIZE else 1), []
    while number > 0:
        number, codec = divmod(number - 1, 3)
        codecs.insert(0, _CODECS[codec])
    made, compared = [StateFormat(codec) for codec in codecs], ("codec",)
    if not isinstance(vector, Tracer):
        made, compared = _formats_of(_read(vector), len(codecs)), _COMPARED
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
    """Reads the first formats, at most `n`, from a vector of `format_code`. Other vectors may end earlier."""
    formats = []
    for codec, axis, *rest in vector[: n * _FORMAT_SIZE].reshape(n, _FORMAT_SIZE).tolist():
        if not 0 < codec <= len(_CODECS):
            break
        size, shards = (int.from_bytes(rest[i : i + 3], "little") for i in (0, 3))
        axis = None if axis == 255 else axis - 254 if axis > 127 else axis
        formats.append(StateFormat(_CODECS[codec - 1], block_size=size or None, block_axis=axis, shards=max(1, shards)))
    return formats
