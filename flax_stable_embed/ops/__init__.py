"""Arrays in, arrays out: the 8-bit number format and the embedding lookup, on jax and numpy alone."""

from .blockwise import quantize as quantize
from .blockwise.quantize import dequantize as dequantize
