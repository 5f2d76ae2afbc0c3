"""The codecs of `kernel_codecs.py` in the instructions of NVIDIA GPUs.

They dequantize to products, which a sum in the update rule takes as they are. They give NaN the code of zero. So a
moment that is not finite needs no test of its own (`Instructions.nan_if_any_overflows`).
"""

import jax.numpy as jnp
import numpy as np
from jax import Array, lax

from ..blockwise.codecs import Code
from ..counter_random import Rounding, as_fraction
from .gpu_instructions import Instructions, Product, contracted
from .kernel_codecs import ROUNDER, KernelCodec, by_square_roots, kernel_codec
from .step import Moment


def gpu_codec(instructions: Instructions, moment: Moment) -> KernelCodec:
    """Builds the codec of one moment."""
    code = moment.code
    if moment.codec != "root":
        return _general(instructions, moment)
    if not code.bottom:
        return _unsigned_root(instructions, code, moment.rounding)
    signed = _signed_root(instructions, code)
    if moment.rounding == "nearest":
        return signed
    return _general(instructions, moment)._replace(dequantize=signed.dequantize)


def _signed_root(do: Instructions, code: Code) -> KernelCodec:
    top = float(code.top)

    def dequantize(codes: Array, absmax: Array) -> Product:
        level = do.levels(codes)
        return Product(level * lax.abs(level), absmax * np.float32(1 / top**2))

    def quantize(x: Array, factor: Array, _) -> Array:  # factor = 1 / sqrt(absmax), infinite for a block of zeros
        root = do.clipped_product(do.sqrt(lax.abs(x)), factor)  # of 0 and infinity: zero
        return do.last_bytes(do.multiply_add(root, do.with_sign_of(x, top), ROUNDER), code.dtype)

    return KernelCodec(dequantize, do.rsqrt, quantize)


def _unsigned_root(do: Instructions, code: Code, rounding: Rounding) -> KernelCodec:
    top = float(code.top)

    def dequantize(codes: Array, absmax: Array) -> Product:
        level = do.levels(codes, 1 / 128)  # at most 2, so that its fourth power times a scale does not overflow
        square = level * level
        return Product(square * square, absmax * np.float32((128 / top) ** 4))

    def to_neighbors(x: Array, factor: Array, _) -> Array:  # factor = top^2 / sqrt(absmax)
        level = do.sqrt(do.sqrt(x) * factor)
        at_least = do.clipped_product(level, 2.0**100)  # 1, or 0 for zero and NaN
        return do.last_bytes(do.larger(level, at_least) + ROUNDER, code.dtype)

    def up_or_down(x: Array, factor: Array, bits: Array) -> Array:  # factor = 1 / sqrt(absmax)
        """Rounds up where n - k^4 > u ((k + 1)^4 - k^4), for n = top^4 x / absmax and k = floor(n^(1/4)).

        ((4 k + 6) k + 4) k + 1 is the distance of the neighbors. With 0 for the last 1 where k is 0, every n above zero
        is rounded up there.
        """
        u = do.fraction(bits) if rounding == "dither" else as_fraction(rounding, bits)
        n = do.clipped_product(x * factor, factor)
        k, raised, one = do.floor_of_product(do.sqrt(do.sqrt(n)), top)
        square = k * k
        above = do.multiply_add(n, top**4, -(square * square))
        distance = do.multiply_add(do.multiply_add(do.multiply_add(k, 4.0, 6.0), k, 4.0), k, one)
        return do.last_bytes(raised + do.one_if_greater(above, u * distance), code.dtype)

    if rounding == "nearest":
        return KernelCodec(dequantize, lambda absmax: do.rsqrt(absmax) * np.float32(top**2), to_neighbors)
    return KernelCodec(dequantize, do.rsqrt, up_or_down)


def _general(do: Instructions, moment: Moment) -> KernelCodec:
    """Builds a codec from that of the other kernels, which gives NaN the code of zero.

    Dithered and stochastic rounding divide by the scale, as the reference does. In that the instructions are not used,
    because the reciprocal of a scale above 2^126 would be zero.
    """
    codec = kernel_codec(moment, by_square_roots)
    dequantize = contracted(do, codec.dequantize)
    quantize = contracted(do, codec.quantize) if moment.rounding == "nearest" else codec.quantize

    def quantize_finite(x: Array, factor: Array, bits: Array | None) -> Array:
        return quantize(jnp.where(lax.abs(x) < jnp.inf, x, 0.0), factor, bits)

    return KernelCodec(dequantize, codec.factor, quantize_finite)
