"""A TPU compiler without a TPU: the libtpu wheel (extra `tpu`) compiles for named topologies on any machine."""

import importlib.util
import os

import pytest

# Quiet, offline, and at peace with other processes that load libtpu: read when it is loaded.
os.environ.update(
    ALLOW_MULTIPLE_LIBTPU_LOAD="1",
    TPU_SKIP_MDS_QUERY="1",
    TPU_ACCELERATOR_TYPE="v5litepod-4",
    TPU_WORKER_HOSTNAMES="localhost",
    TPU_WORKER_ID="0",
    TPU_LOG_DIR="disabled",
    TPU_STDERR_LOG_LEVEL="3",
    TPU_MIN_LOG_LEVEL="3",
)


@pytest.fixture(scope="session")
def topology():
    """The devices of a named topology, `topology("v5e:2x2")`; skips where libtpu is not installed."""
    if importlib.util.find_spec("libtpu") is None:
        pytest.skip("libtpu is not installed: `make test EXTRAS=tpu` adds it and with it the ahead-of-time tests")
    from jax.experimental import topologies

    return lambda name: topologies.get_topology_desc(platform="tpu", topology_name=name).devices
