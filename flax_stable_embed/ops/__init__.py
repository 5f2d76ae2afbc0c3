"""Functions from arrays to arrays, built on JAX and NumPy alone: the 8-bit format, the step and the lookups."""

from .blockwise import quantize as quantize
from .blockwise.quantize import dequantize as dequantize
