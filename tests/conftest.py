"""Eight virtual CPU devices, and no silent broadcasting of ranks, in every test; equal programs are compiled once."""

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

# Saves a tenth of the time: most tests make functions of their own, alike only in what they compile to. A folder for
# each process, since JAX writes into it without a lock.
COMPILED = tempfile.mkdtemp()
atexit.register(shutil.rmtree, COMPILED, ignore_errors=True)
jax.config.update("jax_compilation_cache_dir", COMPILED)
jax.config.update("jax_persistent_cache_min_compile_time_secs", 0)
jax.config.update("jax_persistent_cache_min_entry_size_bytes", -1)


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items):
    """Of a test marked `one_in(n)`, every n-th case is in `make test`, beginning with `start`; the others are slow.

    An `n` that does not divide the number of optimizers, say, takes another one for each value of the next parameter.
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
