"""Reads and writes the formats of other libraries; one folder or file per library."""

from . import bitsandbytes as bitsandbytes
from .t5x import t5x_partition_rules as t5x_partition_rules
