"""The 8-bit block-wise number format; README.md beside this file explains it."""

from .quantize import dequantize as dequantize
from .quantize import quantize as quantize
