"""A TPU compiler without a TPU: the libtpu wheel (extra `tpu`) compiles for named topologies on any machine."""

import importlib.util
import os

import jax
import pytest
from jax.experimental.compilation_cache import compilation_cache

from benchmarks.counted.compiled import QUIET

os.environ.update(QUIET)  # read when libtpu is loaded


@pytest.fixture(autouse=True)
def compiled_each_time():
    """A program for a chip that is not here can be kept, but not loaded again."""
    keep_compiled(False)
    yield
    keep_compiled(True)


def keep_compiled(enabled):
    jax.config.update("jax_enable_compilation_cache", enabled)
    compilation_cache.reset_cache()


@pytest.fixture(scope="session")
def topology():
    """The devices of a named topology, `topology("v5e:2x2")`; skips where libtpu is not installed."""
    if importlib.util.find_spec("libtpu") is None:
        pytest.skip("libtpu is not installed: `make test EXTRAS=tpu` adds it and with it the ahead-of-time tests")
    from jax.experimental import topologies

    return lambda name: topologies.get_topology_desc(platform="tpu", topology_name=name).devices
