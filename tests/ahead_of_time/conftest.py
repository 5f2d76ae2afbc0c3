"""Fixtures for compiling without a TPU: the libtpu wheel (extra `tpu`) compiles for named topologies anywhere."""

import importlib.util
import os

import jax
import pytest
from jax.experimental.compilation_cache import compilation_cache

from benchmarks.counted.compiled import QUIET

os.environ.update(QUIET)  # read when libtpu is loaded


@pytest.fixture(autouse=True)
def compile_each_time():
    """Switches the compilation cache off: it can store a program for a missing chip, but not load it again."""
    use_compilation_cache(False)
    yield
    use_compilation_cache(True)


def use_compilation_cache(enabled):
    jax.config.update("jax_enable_compilation_cache", enabled)
    compilation_cache.reset_cache()


@pytest.fixture(scope="session")
def topology():
    """Returns the devices of a named topology, as in `topology("v5e:2x2")`. Skips if libtpu is not installed."""
    if importlib.util.find_spec("libtpu") is None:
        pytest.skip("libtpu is not installed. `make test EXTRAS=tpu` installs it and runs these tests")
    from jax.experimental import topologies

    return lambda name: topologies.get_topology_desc(platform="tpu", topology_name=name).devices
