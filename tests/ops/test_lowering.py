"""Tests of the choice between kernel and reference that does not depend on the operation."""

from types import SimpleNamespace

import jax
import jax.numpy as jnp
import pytest

import flax_stable_embed as fse
from flax_stable_embed.ops.lowering import kernels_compile_here

VERSIONS = {"7.5": False, "8.0": True, "9.0": True, "10.3": True, "gfx90a": False}


@pytest.fixture(params=VERSIONS)
def gpu(request, monkeypatch):
    """Makes this process look as if it had two GPUs of a compute capability, and returns that."""
    devices = [SimpleNamespace(compute_capability=version) for version in ("9.0", request.param)]
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    monkeypatch.setattr(jax, "local_devices", lambda: devices)
    return request.param


def test_kernels_compile_for_recent_gpus_of_nvidia(gpu):
    assert kernels_compile_here() == VERSIONS[gpu]


def test_describe_says_that_a_gpu_is_too_old(gpu):
    tx = fse.adamw8bit(1e-3)
    params = {"kernel": jax.device_put(jnp.ones((1024, 1024)), jax.devices()[0])}
    (row,) = fse.describe(tx, params, platform="gpu").rows
    expected = "pallas_gpu" if VERSIONS[gpu] else "xla: the kernel needs a GPU with compute capability 8.0"
    assert row.implementation == expected


def test_kernels_compile_ahead_of_time_in_a_process_without_a_gpu():
    assert kernels_compile_here()
