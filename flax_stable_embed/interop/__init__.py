"""Foreign formats in and out, one folder or file for each library."""

from . import bitsandbytes as bitsandbytes
