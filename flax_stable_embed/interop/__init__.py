"""Foreign formats in and out, one folder or file for each library."""

from . import bitsandbytes as bitsandbytes
from .t5x import t5x_partition_rules as t5x_partition_rules
