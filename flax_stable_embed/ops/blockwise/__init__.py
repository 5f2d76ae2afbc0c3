"""The 8-bit block-wise number format, which README.md in this folder explains."""

from .quantize import dequantize as dequantize
from .quantize import quantize as quantize
