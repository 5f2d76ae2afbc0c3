"""Compares quantize and dequantize with NumPy on unusual numbers, and asserts the round-trip error."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from flax_stable_embed.ops.blockwise import quantize
from flax_stable_embed.ops.blockwise.codecs import CODECS, TINY, table
from flax_stable_embed.ops.blockwise.quantize import dequantize

ALL = pytest.mark.parametrize("codec", list(CODECS))
SIGNS = pytest.mark.parametrize("signed", [True, False], ids=["signed", "unsigned"])
BLOCK = 256


def by_brute_force(x, codec, signed):
    """Returns codes and scales of rows of `BLOCK` numbers, in NumPy, from the definition."""
    x = x.reshape(-1, BLOCK)
    magnitude = np.abs(x) if signed else np.maximum(x, 0)
    live = (magnitude >= TINY) & np.isfinite(magnitude)
    absmax = np.where(live, magnitude, 0).max(axis=1, keepdims=True)
    n = np.divide(magnitude, absmax, out=np.zeros_like(x), where=live)
    n = np.where(live, np.maximum(n, np.float32(TINY)), np.float32(0))
    n = np.where(x < 0, -n, n) if signed else n
    if codec == "root":
        root = np.sqrt(np.abs(n)) * np.float32(127) if signed else np.sqrt(np.sqrt(n)) * np.float32(255)
        codes = np.sign(n) * np.rint(root) if signed else np.where(n > 0, np.maximum(np.rint(root), 1), 0)
    else:
        values = np.sort(table(codec, signed))[1 if CODECS[codec](signed).dtype == np.int8 else 0 :]
        lowest = -127 if signed else 0
        codes = np.searchsorted((values[1:] + values[:-1]) * np.float32(0.5), n, side="left") + lowest
    return codes.reshape(-1).astype(CODECS[codec](signed).dtype), absmax.reshape(-1)


def hard_numbers(seed=0):
    """Returns rows of one block each, of all scales, with zeros, subnormals, NaN and infinities, some of only those."""
    rng = np.random.default_rng(seed)
    x = rng.standard_normal((3000, BLOCK)).astype(np.float32) * (10 ** rng.uniform(-44, 37, (3000, 1))).astype(
        np.float32
    )
    x[::3] = rng.standard_normal(x[::3].shape).astype(np.float32) ** 5
    x[rng.random(x.shape) < 0.02] = 0
    odd = rng.random(x.shape) < 0.001
    x[odd] = rng.choice(np.float32([np.nan, np.inf, -np.inf, 1e-42, -1e-42, 3e38, TINY]), odd.sum())
    for row, value in enumerate((0.0, -0.0, np.nan, np.inf, -np.inf, 1e-42, TINY, 3.4e38)):
        x[row] = value
    return x


@ALL
@SIGNS
@pytest.mark.one_in(4)
def test_codes_and_scales_equal_the_definition(codec, signed):
    x = hard_numbers()
    codes, absmax = quantize(x, signed=signed, codec=codec, block_size=BLOCK)
    expected_codes, expected_absmax = by_brute_force(x, codec, signed)
    np.testing.assert_array_equal(np.asarray(absmax).reshape(-1), expected_absmax)
    np.testing.assert_array_equal(np.asarray(codes).reshape(-1), expected_codes)


@ALL
@SIGNS
@pytest.mark.one_in(4)
def test_non_finite_numbers_do_not_affect_the_rest_of_their_block(codec, signed):
    x = np.abs(np.random.default_rng(0).standard_normal((4, BLOCK)).astype(np.float32))
    clean, absmax = quantize(np.where(np.arange(BLOCK) < 3, 0, x), signed=signed, codec=codec)
    x[:, :3] = np.nan, np.inf, -np.inf
    codes, spoiled_absmax = quantize(x, signed=signed, codec=codec)
    np.testing.assert_array_equal(spoiled_absmax, absmax)
    np.testing.assert_array_equal(codes[:, 3:], clean[:, 3:])
    back = dequantize(codes, absmax, signed=signed, codec=codec)
    assert np.all(np.isfinite(back))
    np.testing.assert_array_equal(back[:, :3], 0)


@ALL
@SIGNS
@pytest.mark.one_in(4)
def test_zero_is_stored_exactly_and_a_zero_block_is_zeros(codec, signed):
    x = np.abs(np.random.default_rng(0).standard_normal((2, BLOCK)).astype(np.float32))
    x[0, ::2] = 0
    x[1] = 0
    for rounding in ("nearest", "dither", "stochastic"):
        codes, absmax = quantize(x, signed=signed, codec=codec, rounding=rounding, seed=1)
        back = dequantize(codes, absmax, signed=signed, codec=codec)
        np.testing.assert_array_equal(back[0, ::2], 0)
        np.testing.assert_array_equal(back[1], 0)
        assert absmax[1, 0] == 0


# codec, block size: mean error / mean magnitude of normal and Student-t(2) numbers, signed; of their squares, unsigned
ROUND_TRIP = {
    ("root", 32): (0.00584, 0.00752, 0.00450, 0.00194),
    ("root", 64): (0.00634, 0.00928, 0.00503, 0.00263),
    ("root", 128): (0.00672, 0.01124, 0.00544, 0.00344),
    ("root", 256): (0.00702, 0.01355, 0.00576, 0.00437),
    ("dynamic", 32): (0.00870, 0.01139, 0.00486, 0.00234),
    ("dynamic", 64): (0.00946, 0.01322, 0.00563, 0.00326),
    ("dynamic", 128): (0.01013, 0.01497, 0.00627, 0.00436),
    ("dynamic", 256): (0.01071, 0.01673, 0.00682, 0.00574),
    ("linear", 32): (0.00562, 0.01324, 0.00530, 0.01118),
    ("linear", 64): (0.00633, 0.01893, 0.00652, 0.01928),
    ("linear", 128): (0.00695, 0.02685, 0.00773, 0.03154),
    ("linear", 256): (0.00751, 0.03780, 0.00891, 0.05049),
}


@pytest.mark.parametrize(("codec", "block_size"), list(ROUND_TRIP))
@pytest.mark.one_in(4)
def test_round_trip_error_has_not_changed(codec, block_size):
    rng = np.random.default_rng(0)
    normal = rng.standard_normal((256, 1024)).astype(np.float32)
    heavy = rng.standard_t(2, (256, 1024)).astype(np.float32)
    cases = (normal, True), (heavy, True), (normal**2, False), (heavy**2, False)
    for (x, signed), expected in zip(cases, ROUND_TRIP[codec, block_size]):
        codes, absmax = quantize(x, signed=signed, codec=codec, block_size=block_size)
        back = dequantize(codes, absmax, signed=signed, codec=codec, block_size=block_size)
        error = np.abs(np.asarray(back, np.float64) - x).mean() / np.abs(x).mean()
        assert error == pytest.approx(expected, abs=6e-6)


@ALL
@pytest.mark.parametrize("axis", [0, 1, -1])
@pytest.mark.parametrize("shape", [(96, 70), (1, 300), (5, 64, 3)], ids=str)
@pytest.mark.one_in(7)
def test_blocks_are_along_the_axis_and_the_last_may_be_short(codec, axis, shape):
    x = np.random.default_rng(0).standard_normal(shape).astype(np.float32)
    codes, absmax = quantize(x, signed=True, codec=codec, block_size=32, axis=axis)
    assert codes.shape == shape
    assert absmax.shape[axis] == -(-shape[axis] // 32)
    moved = np.moveaxis(x, axis, 0)
    for i in range(absmax.shape[axis]):
        np.testing.assert_array_equal(np.abs(moved[32 * i : 32 * i + 32]).max(axis=0), np.moveaxis(absmax, axis, 0)[i])
    back = dequantize(codes, absmax, signed=True, codec=codec, block_size=32, axis=axis)
    largest = np.repeat(np.moveaxis(absmax, axis, 0), 32, axis=0)[: shape[axis]]
    assert np.all(np.abs(np.moveaxis(back, axis, 0) - moved) <= 0.0101 * largest)  # half of root's widest gap


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32", "float64"])
def test_every_float_dtype_is_accepted_and_scales_are_float32(dtype):
    with jax.enable_x64(dtype == "float64"):
        x = jnp.asarray(np.linspace(-1, 1, 128), dtype)
        codes, absmax = quantize(x, signed=True)
        assert (codes.dtype, absmax.dtype) == (jnp.int8, jnp.float32)
        assert dequantize(codes, absmax, signed=True).dtype == jnp.float32


@pytest.mark.parametrize("shape", [(), (0,), (0, 4), (4, 0), (3, 0, 2)], ids=str)
def test_scalars_and_empty_arrays_survive_a_round_trip(shape):
    x = jnp.full(shape, -3.0)
    codes, absmax = quantize(x, signed=True)
    assert codes.shape == shape
    np.testing.assert_array_equal(dequantize(codes, absmax, signed=True), x)


@pytest.mark.parametrize("rounding", ["dither", "stochastic"])
def test_rounding_depends_on_the_seed_alone(rounding):
    x = np.random.default_rng(0).random((64, 256)).astype(np.float32)
    first, _ = quantize(x, signed=False, rounding=rounding, seed=1)
    again, _ = jax.jit(lambda x: quantize(x, signed=False, rounding=rounding, seed=1))(x)
    other, _ = quantize(x, signed=False, rounding=rounding, seed=2)
    np.testing.assert_array_equal(first, again)
    assert np.mean(np.asarray(first) != np.asarray(other)) > 0.2


def test_quantize_works_under_vmap_and_jit():
    x = np.random.default_rng(0).standard_normal((3, 4, 64)).astype(np.float32)
    one = [quantize(row, signed=True)[0] for row in x]
    many, _ = jax.jit(jax.vmap(lambda row: quantize(row, signed=True)))(x)
    np.testing.assert_array_equal(many, np.stack(one))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"codec": "fp4"}, r"`codec` must be one of 'root', 'dynamic', 'linear', got 'fp4'"),
        ({"block_size": 0}, r"`block_size` must be an integer of at least 1, got 0. Try 256"),
        ({"block_size": 2.5}, r"`block_size` must be an integer of at least 1, got 2.5"),
        ({"axis": 2}, r"`axis` must be in \[-2, 1\] for an array of shape \(4, 4\), got 2"),
        ({"rounding": "up"}, r"`rounding` must be 'nearest', 'dither' or 'stochastic', got 'up'"),
        ({"rounding": "stochastic"}, r"needs an integer `seed`, got None"),
    ],
)
def test_errors_name_the_argument_and_its_value(change, message):
    with pytest.raises(ValueError, match=message):
        quantize(jnp.ones((4, 4)), **({"signed": True} | change))


def test_quantizing_numbers_that_are_not_real_floats_raises():
    for x in (jnp.ones(4, jnp.int32), jnp.ones(4, jnp.complex64)):
        with pytest.raises(TypeError, match=r"`x` must be real floating point, got (int32|complex64)"):
            quantize(x, signed=True)


def test_codes_and_scales_that_do_not_match_raise():
    codes, absmax = quantize(jnp.ones((4, 512)), signed=True)
    with pytest.raises(ValueError, match="`codes` of codec 'dynamic' with signed=True are uint8, got int8"):
        dequantize(codes, absmax, signed=True, codec="dynamic")
    with pytest.raises(ValueError, match=r"`absmax` must have shape \(4, 8\).*got \(4, 2\)"):
        dequantize(codes, absmax, signed=True, block_size=64)
