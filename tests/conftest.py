"""Gives every test eight virtual CPU devices, forbids rank promotion, and compiles equal programs once."""

import atexit
import os
import shutil
import tempfile
from collections import Counter

import pytest

os.environ.setdefault("JAX_PLATFORMS", "cpu")

import jax

jax.config.update("jax_num_cpu_devices", 8)
jax.config.update("jax_numpy_rank_promotion", "raise")
# libtpu must not see XLA_FLAGS, because it ends the process for a flag of the CPU compiler. The workers of pytest-xdist
# inherit the environment of a process that has removed them, so they find them under another name.
os.environ.setdefault("CPU_XLA_FLAGS", os.environ.get("XLA_FLAGS", ""))
os.environ["XLA_FLAGS"] = os.environ["CPU_XLA_FLAGS"]
jax.devices()  # reads XLA_FLAGS
del os.environ["XLA_FLAGS"]

# The cache saves a tenth of the time, because many tests define their own functions that compile to equal programs.
# Each process has its own folder, because JAX writes into it without a lock.
COMPILED = tempfile.mkdtemp()
atexit.register(shutil.rmtree, COMPILED, ignore_errors=True)
jax.config.update("jax_compilation_cache_dir", COMPILED)
jax.config.update("jax_persistent_cache_min_compile_time_secs", 0)
jax.config.update("jax_persistent_cache_min_entry_size_bytes", -1)


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items):
    """Marks cases of a test marked `one_in(n)` as slow, except for every n-th case from `start` on.

    If `n` does not divide the number of optimizers, each value of the next parameter runs with another optimizer.
    """
    cases = Counter()
    for item in items:
        mark = item.get_closest_marker("one_in")
        if mark is not None and item.get_closest_marker("slow") is None:
            test = item.nodeid.partition("[")[0]
            (n,), start = mark.args, mark.kwargs.get("start", 0)
            if cases[test] % n != start:
                item.add_marker("slow")
            cases[test] += 1
