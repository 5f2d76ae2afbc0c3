"""Checks in every flow that a step on several devices sees how its arrays are sharded, without being told."""

import pytest

from flax_stable_embed.ops.blockwise_step import as_sharded


@pytest.fixture(autouse=True)
def every_step_knows_its_sharding(monkeypatch):
    """Warns in programs for CPU as in those for TPU, and warnings are errors."""
    monkeypatch.setattr(as_sharded, "PLATFORMS", as_sharded.PLATFORMS | {"cpu": "pallas_gpu"})
