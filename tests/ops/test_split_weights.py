"""Proves the split of float32 into bfloat16 and a remainder, on every mantissa of some exponents and all exponents."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

from flax_stable_embed.ops.split_weights import REMAINDERS, join_weight, split_weight

NAN = 0x7FC00000


def floats(words):
    return np.asarray(words, np.uint32).view(np.float32)


def words(x):
    return np.asarray(x).view(np.uint32)


def of_exponents(*exponents):
    """Returns every float32 of some exponents (0: the subnormals and zero), of both signs."""
    mantissas = np.arange(1 << 23, dtype=np.uint32)
    return [
        floats(sign | np.uint32(e << 23) | mantissas) for e in exponents for sign in (np.uint32(0), np.uint32(1 << 31))
    ]


def sampled():
    """Returns numbers of all exponents: each has 1024 random mantissas and those next to every tie."""
    rng = np.random.default_rng(0)
    near = np.arange(-2, 3)[:, None] + np.array([0, 0x80, 0x100, 0x7F80, 0x8000, 0x8080, 0x10000, 0x7FFF80, 0x7FFFFF])
    mantissas = np.concatenate([rng.integers(0, 1 << 23, 1024), near.ravel() % (1 << 23)]).astype(np.uint32)
    exponents = np.arange(255, dtype=np.uint32)[:, None] << 23
    positive = (exponents | mantissas).ravel()
    special = np.array([0, 1, 0x7F7FFFFF, 0x7F7FFF80, 0x7F7FFF7F, 0x7F7F8000, 0x7F7F7FFF, 0x7F800000], np.uint32)
    both = np.concatenate([positive, special])
    return floats(np.concatenate([both, both | np.uint32(1 << 31)]))


@pytest.fixture(scope="module", params=["one exponent", "subnormals", "sampled"])
def numbers(request):
    return {"one exponent": lambda: of_exponents(127)[0], "subnormals": lambda: of_exponents(0)[1], "sampled": sampled}[
        request.param
    ]()


split, join = jax.jit(split_weight, static_argnums=1), jax.jit(join_weight)


def test_32_bits_join_to_the_very_bits(numbers):
    p, remainder = split(numbers, 32)
    assert remainder.dtype == np.int16
    np.testing.assert_array_equal(words(join(p, remainder)), words(numbers))


def test_24_bits_join_to_the_nearest_number_of_15_bits(numbers):
    """To infinity, too, as in any rounding to nearest. Compared in exact integers."""
    p, remainder = split(numbers, 24)
    assert remainder.dtype == np.int8
    found = words(join(p, remainder)).astype(np.int64) & 0x7FFFFFFF
    exact = words(numbers).astype(np.int64) & 0x7FFFFFFF
    assert (words(join(p, remainder)) >> 31 == words(numbers) >> 31).all()
    assert (found % 256 == 0).all()
    assert np.abs(found - exact).max() <= 128
    ties = exact % 256 == 128
    assert (found[ties] // 256 % 2 == 0).all()


@pytest.mark.parametrize("bits", REMAINDERS)
def test_the_bfloat16_is_the_nearest_with_ties_away_from_zero(numbers, bits):
    p, _ = split(numbers, bits)
    exact = words(numbers).astype(np.int64) & 0x7FFFFFFF
    if bits == 24:
        exact = words(join(*split(numbers, 24))).astype(np.int64) & 0x7FFFFFFF
    want = np.minimum((exact + 0x8000) >> 16, 0x7F80)
    np.testing.assert_array_equal(np.asarray(p).view(np.uint16) & 0x7FFF, want)
    rounded = np.asarray(numbers).astype(jnp.bfloat16).view(np.uint16)
    ties = exact % 0x10000 == 0x8000
    if bits == 32:
        np.testing.assert_array_equal(np.asarray(p).view(np.uint16)[~ties], rounded[~ties])


@pytest.mark.parametrize("bits", REMAINDERS)
@pytest.mark.parametrize("noisy", [False, True])
def test_splitting_again_gives_the_same_pair(numbers, bits, noisy):
    """With noise too, because nothing is left to round."""
    noise = np.random.default_rng(1).integers(0, 1 << 32, numbers.shape, dtype=np.uint32) if noisy else None
    pair = split(numbers, bits)
    again = split(join(*pair), bits, noise)
    np.testing.assert_array_equal(np.asarray(again[0]).view(np.uint16), np.asarray(pair[0]).view(np.uint16))
    np.testing.assert_array_equal(again[1], pair[1])


@pytest.mark.parametrize("bits", REMAINDERS)
def test_nan_stays_nan_and_keeps_its_sign(bits):
    """Every payload, also those that a sum would carry into the sign."""
    payloads = np.concatenate([np.arange(1, 4096), np.arange((1 << 23) - 4096, 1 << 23), [1 << 22]]).astype(np.uint32)
    for sign in (0, 1 << 31):
        x = floats(np.uint32(sign | 0x7F800000) | payloads)
        p, remainder = split(x, bits)
        assert np.isnan(np.asarray(p, np.float32)).all() and not np.asarray(remainder).any()
        np.testing.assert_array_equal(words(join(p, remainder)), np.full(x.shape, sign | NAN, np.uint32))


@pytest.mark.parametrize("dtype", REMAINDERS.values(), ids=str)
@pytest.mark.parametrize("zero", [0.0, -0.0])
def test_a_weight_that_was_set_to_zero_stays_zero(dtype, zero):
    info = np.iinfo(dtype)
    remainder = jnp.arange(info.min, 1, dtype=dtype)  # those of a weight that was larger than its bfloat16
    joined = join(jnp.full(remainder.shape, zero, jnp.bfloat16), remainder)
    np.testing.assert_array_equal(words(joined), words(np.float32(zero)))
    positive = jnp.arange(1, info.max + 1, dtype=dtype)  # they join to subnormal numbers, whose bfloat16 is zero
    again, _ = split(join(jnp.full(positive.shape, zero, jnp.bfloat16), positive), 8 * dtype.itemsize + 16)
    np.testing.assert_array_equal(np.asarray(again, np.float32), 0)


@pytest.mark.parametrize("dtype", REMAINDERS.values(), ids=str)
def test_any_other_edit_moves_a_weight_by_half_an_ulp_at_most(dtype):
    info = np.iinfo(dtype)
    p = jnp.asarray([1.0, -0.02, 3e8, 1e-30], jnp.bfloat16)[:, None]
    remainder = jnp.asarray([info.min, -1, 0, 1, info.max], dtype)[None]
    joined = np.asarray(join(jnp.broadcast_to(p, (4, 5)), jnp.broadcast_to(remainder, (4, 5))), np.float64)
    exact = np.asarray(p, np.float64)
    ulp = 2.0 ** (np.floor(np.log2(np.abs(exact))) - 7)
    assert (np.abs(joined - exact) <= ulp / 2).all()


def test_noise_rounds_up_with_the_probability_of_the_bits_that_are_lost():
    """Over all 256 values of the noise, the mean of the joined numbers is the number, exactly."""
    x = floats(np.uint32(0x3F800000) + np.arange(0, 1 << 16, 37, dtype=np.uint32))
    noise = jnp.arange(256, dtype=jnp.uint32)[:, None] | np.uint32(0xABCD00)  # only its last 8 bits count
    p, remainder = split(jnp.broadcast_to(x, (256, x.size)), 24, jnp.broadcast_to(noise, (256, x.size)))
    joined = words(join(p, remainder)).astype(np.int64)
    np.testing.assert_array_equal(joined.sum(axis=0), 256 * words(x).astype(np.int64))
    assert np.abs(joined - words(x).astype(np.int64)).max() <= 255


def test_no_operation_is_of_floating_point():
    """So flushing, excess precision and contraction cannot change a bit."""
    x, noise = jnp.ones(8), jnp.arange(8, dtype=jnp.uint32)
    programs = (lambda x: split_weight(x, 24, noise), (x,)), (join_weight, split_weight(x, 32))
    for function, args in programs:
        (call,) = jax.make_jaxpr(function)(*args).eqns
        equations = call.params["call_jaxpr"].eqns
        assert len(equations) > 5
        for equation in equations:
            floating = [v for v in equation.invars if jnp.issubdtype(v.aval.dtype, jnp.floating)]
            assert not floating or equation.primitive is lax.bitcast_convert_type_p, equation
