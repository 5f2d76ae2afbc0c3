"""Prints the XLA_FLAGS that `make test` compiles with, as far as the installed XLA knows them.

They divide the time of compiling for CPU by three, which is most of the time of `make test`. `make test-all` compiles
as users do.
XLA ends the process for a flag that it does not know, so each one is tried in a process of its own.
"""

import os
import subprocess
import sys

FLAGS = [
    "--xla_backend_optimization_level=0",
    "--xla_cpu_parallel_codegen_split_count=1",  # the workers of pytest have all cores already
    "--xla_cpu_use_fusion_emitters=false",  # gone from JAX 0.11
    "--xla_cpu_max_isa=AVX",  # no fused multiply-adds: without it the last bits depend on the CPU
]


def is_known(flag: str) -> bool:
    """Returns whether XLA starts with this flag."""
    environment = os.environ | {"XLA_FLAGS": flag, "JAX_PLATFORMS": "cpu"}
    start = [sys.executable, "-c", "import jax; jax.devices()"]
    return subprocess.run(start, env=environment, capture_output=True).returncode == 0


if __name__ == "__main__":
    print(" ".join(filter(is_known, FLAGS)))
